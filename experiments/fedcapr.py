"""FedCAPR (CVPR 2025 workshop): the dense, unsupervised system that FedKLPR builds on.

    python experiments/run.py --config=experiments/fedcapr.py

Same data, network, start and length as `fedklpr.py`; time, memory and scores stand beside it in the README.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedcapr"
    return config
