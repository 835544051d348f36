"""FedUReID (ACM MM 2021): clusters grow from single pictures, and every client keeps a share of its own model.

    python experiments/run.py --config=experiments/fedureid.py

Same data, network and start as `fedcapr.py`. The first round, in which every picture is told apart from all others, is
kept short and careful here: as long and strong as published it undoes what the starting weights know.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedureid"
    config.task.name = "bottom_up"
    return config
