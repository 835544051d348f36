"""FedKLPR in the published setting: ResNet-50, 256 x 128, eight re-ID sets, 20 rounds of 5 epochs.

    python experiments/run.py --config=experiments/fedklpr_r50.py --config.data.root=DIR

DIR holds one folder a client in Market-1501 layout, named as `data.clients` below (give other names there). The sets
are not ours to hand out. A job for an accelerator: nothing of it was run here at full size, so there is no time,
memory or score to promise; the published ones stand in `docs/fidelity.md`. The papers start from ImageNet weights: give
them as `--config.model.pretrained=FILE.pth`; without, the trunk is first trained on drawn sites, on the same
accelerator.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config

CLIENTS = ("dukemtmc", "market1501", "cuhk03", "prid2011", "cuhk01", "viper", "3dpes", "ilids")


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedklpr"
    config.name = "fedklpr_r50"
    config.model.arch = "resnet50"
    config.data.source = "folder"
    config.data.clients = ",".join(CLIENTS)
    # IDE: about 20 images a person at every client.
    config.data.copies = "1,cuhk03:2,prid2011:2,cuhk01:5,viper:10,3dpes:4,ilids:5"
    config.data.height, config.data.width = 256, 128
    config.data.pad, config.data.erase = 10, 0.5
    config.rounds, config.epochs = 20, 5
    config.last.epochs = 50
    config.optimizer.learning_rate = 3.5e-4
    config.optimizer.decay_from, config.optimizer.decay = 0.25, 0.1
    return config
