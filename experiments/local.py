"""Local training: every site on its own, nothing sent.

    python experiments/run.py --config=experiments/local.py

@LOCAL@
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "local"
    return config
