"""fedklpr."""

from fedklpr_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "fedklpr"
    config.method.name = "fedklpr"
    return config
