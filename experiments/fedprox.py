"""fedprox."""

from fedklpr_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "fedprox"
    config.method.name = "fedprox"
    return config
