"""FedKLPR (arXiv 2508.17431) on the supervised task: pruned, personalised models from six synthetic sites.

    python experiments/run.py --config=experiments/fedklpr.py

Six unequal drawn sites, 64 x 32 pixels, 12 rounds of 2 local epochs. Measured on two cores without a GPU: 2 min 17 s
with nothing compiled before, 2.2 GiB of memory; mean mAP 54.5 % before and 60.2 % after local fine-tuning at density
0.40; 47.8 % of the bytes saved (seed 0; three seeds in the README). Another number of cores changes the digits.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedklpr"
    return config
