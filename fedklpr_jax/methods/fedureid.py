"""FedUReID's personalised update: a client starts from, and keeps, a mixture of its own model and the global one.

Zhuang et al., "Joint optimization in edge-cloud continuum for federated unsupervised person re-identification", ACM MM
2021. Its clustering and its epochs are the task (`tasks/bottom_up.py`); the federation is FedAvg with

    theta_k <- mu theta_k + (1 - mu) theta        theta_k as client k trained it last, theta the download

at the begin of a client's round, over all leaves. The mixture is also what the client is tested with. A client that has
not trained yet takes the download (ours); the paper gives no number for mu. On a task with classifiers these stay at
the client.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedklpr_jax.federated import ClientContext, ClientState, Method, Upload
from fedklpr_jax.methods.fedpav import is_classifier
from fedklpr_jax.trees import PyTree


class Memory(NamedTuple):
    """The `model` that a client trained last, and whether there is one: `trained` bool."""

    model: PyTree
    trained: jax.Array


def make(mu: float) -> Method:
    """FedUReID whose clients keep the share `mu` of their own model."""

    def mixed(memory: Memory, received: PyTree) -> PyTree:
        share = jnp.where(memory.trained, mu, 0.0)
        return jax.tree.map(lambda own, new: share * own + (1.0 - share) * new, memory.model, received)

    def begin(client: ClientState, context: ClientContext) -> tuple[PyTree, ClientState]:
        return mixed(client.memory, context.received), client

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        kept = client._replace(memory=Memory(model, jnp.bool_(True)))
        return Upload(model, None, {"images": context.images}), kept, {}

    return Method(
        "fedureid",
        is_local=is_classifier,
        client_memory=lambda model, mask: Memory(model, jnp.bool_(False)),
        begin=begin,
        finish=finish,
        personalise=lambda message, client: mixed(client.memory, message.model),
    )
