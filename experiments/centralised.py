"""Centralised training: all pictures in one place, one model, tested on every site; what federation gives up.

    python experiments/run.py --config=experiments/centralised.py

Supervised re-ID, as long as the federated runs: 12 x 2 epochs over everybody's pictures.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "centralised"
    config.task.name = "supervised"
    return config
