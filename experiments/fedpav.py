"""fedpav."""

from fedklpr_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "fedpav"
    config.method.name = "fedpav"
    return config
