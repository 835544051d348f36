"""FedReID's device-edge-cloud: every camera is a client, a site's edge averages its cameras, the cloud its edges.

    python experiments/run.py --config=experiments/fedreid_edges.py

Edges average every round, the cloud every second one. The ledger counts what cameras and edges exchange; between edges
and cloud one model goes up and one comes down for every edge and every round in which the cloud averages.
"""

from ml_collections import ConfigDict

from fedklpr_jax.config import default_config


def get_config() -> ConfigDict:
    """The settings of this run; `fedklpr_jax/config.py` explains every field."""
    config = default_config()
    config.method.name = "fedreid"
    config.name = "fedreid_edges"
    config.task.name = "supervised"
    config.data.scenario = "camera"
    config.method.reid.cdw = False
    config.method.reid.distill_every = 0
    config.method.reid.cloud_every = 2
    return config
