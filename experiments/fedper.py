"""FedPer (arXiv 1912.00818): FedAvg whose personalisation layers stay at the clients.

    python experiments/run.py --config=experiments/fedper.py

With labels the classifier stays, which is FedPAV; more with `--config.method.per.layers=classifier,layer4_0,bnneck`
(parts of the leaves' paths). Without labels there is no classifier, and the neck (`bnneck`) stays.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedper"
    return config
