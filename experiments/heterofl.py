"""HeteroFL (ICLR 2021) on classification: every device trains the first channels of each layer.

    python experiments/run.py --config=experiments/heterofl.py

Data, network and device classes are those of `cahfp.py`; the published classes are
`--config.method.capacity.shares=1.0,0.5,0.25,0.125,0.0625`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "heterofl"
    config.task.name = "classification"
    config.data.count = 20
    config.model.arch = "vgg11_thin"
    return config
