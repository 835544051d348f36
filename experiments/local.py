"""local."""

from fedklpr_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "local"
    config.method.name = "local"
    return config
