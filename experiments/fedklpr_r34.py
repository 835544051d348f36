"""FedKLPR in the published setting with ResNet-34; everything else as in `fedklpr_r50.py`.

    python experiments/run.py --config=experiments/fedklpr_r34.py --config.data.root=DIR
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fedklpr_r50 import get_config as published  # noqa: E402


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = published()
    config.name = "fedklpr_r34"
    config.model.arch = "resnet34"
    return config
