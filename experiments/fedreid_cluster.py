"""FedReID (Zhuang et al., ACM MM 2020 and TOMM 2023): FedPAV with one model a cluster of clients.

    python experiments/run.py --config=experiments/fedreid_cluster.py

Same data, network and length as `fedpav.py` with `--config.task.name=supervised`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedreid"
    config.name = "fedreid_cluster"
    config.task.name = "supervised"
    config.method.reid.cdw = False
    config.method.reid.distill_every = 0
    config.method.reid.cluster = True
    return config
