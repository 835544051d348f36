"""fedavg."""

from fedklpr_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "fedavg"
    config.method.name = "fedavg"
    return config
