"""FedKLPR (arXiv 2508.17431) on the supervised task: pruned, personalised models from six synthetic sites.

    python experiments/run.py --config=experiments/fedklpr.py

@FEDKLPR@
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedklpr"
    return config
