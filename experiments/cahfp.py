"""CA-HFP (arXiv 2603.12591) on classification: every device trains the channels that matter most to its data.

    python experiments/run.py --config=experiments/cahfp.py

Twenty clients share a drawn set of shapes, dealt by Dirichlet(0.5); four classes of devices train 100, 80, 60 and 40 %
of the channels of each layer of a thin VGG-11, and only these travel. On re-ID with labels:
`--config.task.name=supervised --config.model.arch=thin`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "cahfp"
    config.task.name = "classification"
    config.data.count = 20
    config.model.arch = "vgg11_thin"
    return config
