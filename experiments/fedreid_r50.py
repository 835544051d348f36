"""FedReID in the published setting: ResNet-50 with the 512-d embedding block, nine re-ID sets, 300 rounds of 1 epoch.

    python experiments/run.py --config=experiments/fedreid_r50.py --config.data.root=DIR --config.data.public=CUHK02

DIR holds one folder a client in Market-1501 layout, named as `data.clients` below (give other names there), CUHK02 the
public pictures. The sets are not ours to hand out. A job for an accelerator: nothing of it was run here at full size,
so there is no time, memory or score to promise; the published ones stand in `docs/reproduction.md`. The paper starts
from ImageNet weights: give them as `--config.model.pretrained=FILE.pth`. Theirs and not ours: batches of 32 drawn at
random, not 8 people x 4.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config

CLIENTS = ("msmt17", "dukemtmc", "market1501", "cuhk03", "prid2011", "cuhk01", "viper", "3dpes", "ilids")


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedreid"
    config.name = "fedreid_r50"
    config.task.name = "supervised"
    config.task.smoothing, config.task.triplet = 0.0, 0.0
    config.model.arch = "resnet50"
    config.model.embedding = 512
    config.data.source = "folder"
    config.data.clients = ",".join(CLIENTS)
    config.data.height, config.data.width = 256, 128
    config.data.pad, config.data.erase = 10, 0.0
    config.rounds, config.epochs = 300, 1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate, config.optimizer.backbone = 0.05, 0.1
    # The authors' code never lets the step size fall.
    config.optimizer.decay = 1.0
    config.method.reid.distill_every = 10
    return config
