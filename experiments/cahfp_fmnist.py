"""CA-HFP (arXiv 2603.12591) on Fashion-MNIST: 20 clients, Dirichlet 0.5, devices that carry 100, 80, 60 and 40 % of the
channels.

    python experiments/run.py --config=experiments/cahfp_fmnist.py --config.data.root=../shared/data/fashion_mnist

A thin VGG-11; `--config.model.arch=resnet_cifar_thin` for the residual network, `--config.method.name=fedavg` for the
comparison. Five clients a round, 50 rounds of one local epoch. The paper gives no code: network sizes, step size and
participation are ours, chosen for two cores and tuned on nothing. All methods have group norm: averaged statistics of
batches suit no submodel, and those of a client's own few labels suit no global model. FedAvg alone, which has neither
trouble, learns faster with `--config.model.norm=batch`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "cahfp"
    config.task.name = "classification"
    config.data.source = "folder"
    config.data.count = 20
    config.data.alpha = 0.5
    config.data.seed = 42
    config.model.arch = "vgg11_thin"
    config.model.norm = "group"
    config.rounds = 50
    config.epochs = 1
    config.participation = 0.25
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.05
    config.eval.every = 5
    return config
