"""FedKLPR (arXiv 2508.17431) as published, unsupervised: pruned, personalised models from six synthetic sites.

    python experiments/run.py --config=experiments/fedklpr.py

Six unequal drawn sites, 64 x 32 pixels, 8 rounds of 2 local epochs, from weights trained on drawn sites of no client.
Measured on two cores without a GPU: 3 min 8 s with nothing compiled or cached before, 2.2 GiB of memory; mean mAP
60.2 % at the start, 79.2 % before and 80.4 % after local fine-tuning; 47 % of the bytes saved (seed 0; three seeds in
the README). Another number of cores changes the digits. With labels: `--config.task.name=supervised`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedklpr"
    return config
