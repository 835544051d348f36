"""Sub-FedAvg, unstructured (Vahidian et al. 2021): clients prune to their subnetworks and average where these overlap.

    python experiments/run.py --config=experiments/subfedavg.py

Published: p 10 %, 30 % pruned at the end, and an accuracy above 50 % for every step. A validation mAP may never get
there, then nothing is pruned: `--config.method.sub.threshold=0.2`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "subfedavg"
    return config
