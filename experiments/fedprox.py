"""FedProx: FedPAV with clients held near the model they received (`method.prox.mu`).

    python experiments/run.py --config=experiments/fedprox.py

Same data, network and length as `fedklpr.py`; time, memory and scores stand beside it in the README.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedprox"
    return config
