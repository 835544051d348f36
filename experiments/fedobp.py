"""FedOBP (arXiv 2604.16574): FedAvg whose clients keep the few elements that matter most to them.

    python experiments/run.py --config=experiments/fedobp.py

Same data, network and length as `fedklpr.py`; the published settings are for image classification.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedobp"
    return config
