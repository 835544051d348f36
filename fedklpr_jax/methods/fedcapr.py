"""FedCAPR: unsupervised federated re-ID, clients held near the received model, weighted by how far they moved.

"FedCAPR", CVPR 2025 workshop; formulas from the authors' code. Its contrast is the task (`tasks/unsupervised.py`); the
federation is

    L = L_task + 0.13 mean(1 - cos(f_local, f_received))      from round 1 on, over the whole batch (their code applies
                                                              it to one camera only, which looks like a slip)
    d_k = mean(1 - cos(F_received(x), F_trained(x)))          on the fixed batch D_batch: cosine distance weight (CDW)
    theta <- sum_k d_k / sum d * theta_k                      the whole state, batch-norm statistics too

On a task with classifiers these stay at the client.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedklpr_jax import losses
from fedklpr_jax.federated import ClientContext, ClientState, Method, ServerContext, ServerState, Step, Upload, Uploads
from fedklpr_jax.methods.fedpav import is_classifier
from fedklpr_jax.methods.fedreid import by_distance, turned
from fedklpr_jax.trees import PyTree


def make(weight: float) -> Method:
    """FedCAPR with `weight` on the cosine penalty."""

    def penalty(step: Step) -> jax.Array:
        distance = losses.cosine_distance(step.reference()["embedding"], step.outputs["embedding"])
        return jnp.where(step.round > 0, weight, 0.0) * distance

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        moved = turned(model, client, context, "embedding")
        return Upload(model, None, {"images": context.images, "cdw": moved}), client, {}

    def aggregate(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        weights, moved = by_distance(uploads)
        model = context.mean(uploads.model, uploads.mask, weights, server.model)
        return server._replace(model=model, round=server.round + 1), {"weight": weights, "cdw": moved}

    return Method(
        "fedcapr",
        is_local=is_classifier,
        penalty=penalty,
        finish=finish,
        aggregate=aggregate,
        tells=("images", "cdw"),
    )
