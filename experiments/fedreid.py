"""FedReID (Zhuang et al., ACM MM 2020 and TOMM 2023): the full system of ACM MM 2020, cosine distance weight and
distillation.

    python experiments/run.py --config=experiments/fedreid.py

Same data, network and length as `fedpav.py` with `--config.task.name=supervised`. `fedreid_*.py` are the other
published combinations, the edges, and the published setting.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedreid"
    config.task.name = "supervised"
    return config
