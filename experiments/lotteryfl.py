"""LotteryFL (arXiv 2008.03371): clients prune what they receive, go back to their first weights, and train on.

    python experiments/run.py --config=experiments/lotteryfl.py

Every step costs a client all that it has learnt, so this needs many local epochs (published: 60) or rounds: p 20 %,
from a score of 0.2, until a tenth of the weights is left (published too: `--config.method.lottery.end=0.5`).
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "lotteryfl"
    return config
