"""FedRep (ICML 2021): in each round first the head, which stays at the client, then the shared body below it.

    python experiments/run.py --config=experiments/fedrep.py

One epoch of each. As published: `--config.epochs=11 --config.method.rep.head_epochs=10`. With labels the head is the
classifier; without labels there is none, and the neck (`bnneck`: the last batch norm's scale and statistics) stands for
it. A network with `model.embedding` has no neck: `--config.method.rep.layers=embedding,embedding_bn`.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedrep"
    return config
