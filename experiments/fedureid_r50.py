"""FedUReID in the published setting: ResNet-50, 256 x 128, eight re-ID sets, 20 epochs and then 19 rounds of one.

    python experiments/run.py --config=experiments/fedureid_r50.py --config.data.root=DIR

DIR holds one folder a client in Market-1501 layout, named as `data.clients` below (give other names there). The sets
are not ours to hand out. A job for an accelerator: nothing of it was run here at full size, so there is no time,
memory or score to promise. The paper starts from ImageNet weights: give them as `--config.model.pretrained=FILE.pth`.
Personalised clustering needs to know about how many people a client sees: `--config.bottom_up.identities=viper:316,0.1`
(here: a tenth as many as pictures at the others). The authors' code merges by the pooled feature in front of the
embedding block; here the embedding serves for everything.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config

CLIENTS = ("dukemtmc", "market1501", "cuhk03", "prid2011", "cuhk01", "viper", "3dpes", "ilids")


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedureid"
    config.name = "fedureid_r50"
    config.task.name = "bottom_up"
    config.model.arch = "resnet50"
    config.model.embedding, config.model.dropout = 2048, 0.5
    config.data.source = "folder"
    config.data.clients = ",".join(CLIENTS)
    config.data.height, config.data.width = 256, 128
    config.data.pad, config.data.erase = 10, 0.0
    config.rounds, config.epochs = 20, 1
    config.bottom_up.first_epochs, config.bottom_up.first_decay_from = 20, 16
    config.bottom_up.merge, config.bottom_up.identities = 0.05, ""
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.01
    config.optimizer.momentum, config.optimizer.nesterov, config.optimizer.weight_decay = 0.9, True, 5e-4
    config.optimizer.backbone = 0.1
    config.bottom_up.first = 10.0
    return config
