"""FedReID (Zhuang et al., ACM MM 2020 and TOMM 2023): FedPAV with distillation on the server's public pictures alone.

    python experiments/run.py --config=experiments/fedreid_kd.py

Same data, network and length as `fedpav.py` with `--config.task.name=supervised`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedreid"
    config.name = "fedreid_kd"
    config.task.name = "supervised"
    config.method.reid.cdw = False
    return config
