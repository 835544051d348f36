"""FedReID (Zhuang et al., ACM MM 2020 and TOMM 2023): one model a cluster of clients, averaged by the cosine distance
weight.

    python experiments/run.py --config=experiments/fedreid_cluster_cdw.py

Same data, network and length as `fedpav.py` with `--config.task.name=supervised`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedreid"
    config.name = "fedreid_cluster_cdw"
    config.task.name = "supervised"
    config.method.reid.distill_every = 0
    config.method.reid.cluster = True
    return config
