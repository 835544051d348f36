"""Sub-FedAvg (unstructured): clients prune until they have found their subnetwork, and average where these overlap.

Vahidian, Morafah, Lin, "Personalized federated learning by structured and unstructured pruning under data
heterogeneity", ICDCS workshops 2021, algorithm 1, details from the authors' code. A round of client k:

    theta  <- m_k * theta_g
    m', m" <- m_k without the lowest p % of the alive weights of each layer, after the first and after the last epoch
    m_k    <- m"   if Delta(m', m") > eps, pruned < target, and score(m" * theta_k) > threshold;  else m_k
    server    g[j] = sum_k m_k[j] x_k[j] / sum_k m_k[j]; what nobody keeps stays. Clients count the same.

Delta is the mean over layers of the Hamming distance: a mask that has settled is left alone, so one epoch a round never
prunes. Within p % of the target, pruned share P, p <- min(5, (target - P) / (100 - P) * 100).

Ours: the score is taken on validation data (the authors' code reads the test set), on re-ID it is the mAP; P counts
prunable weights, which biases, norms and the classifier are not; the smaller step near the target makes both masks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedklpr_jax import aggregation, pruning
from fedklpr_jax.federated import (
    ClientContext,
    ClientState,
    Message,
    Method,
    ServerContext,
    ServerState,
    Upload,
    Uploads,
)
from fedklpr_jax.methods.fedper import named
from fedklpr_jax.trees import PyTree, select

NEAR = 0.05


def download(server: ServerState, client: jax.Array) -> Message:
    """m_k * theta_g: the server's memory is the last mask of every client."""
    mask = jax.tree.map(lambda leaf: leaf[client], server.memory)
    return Message(pruning.apply_mask(server.model, mask), mask)


def aggregate(
    server: ServerState, uploads: Uploads, context: ServerContext
) -> tuple[ServerState, dict[str, jax.Array]]:
    """The mean over those who keep an entry, without sample weights."""
    weights = aggregation.equal_weights(uploads.accepted)
    model = context.mean(uploads.model, uploads.mask, weights, server.model)
    masks = pruning.updated_table(server.memory, uploads.mask, uploads.clients, uploads.accepted)
    return ServerState(model, masks, server.round + 1), {"weight": weights}


def make(*, local: str, step: float, target: float, eps: float, threshold: float) -> Method:
    """Sub-FedAvg; `local` names the layers that stay, `step`, `target` (pruned) and `threshold` are shares of 1.

    What a client remembers is m', the candidate mask after its first epoch.
    """

    def candidate(model: PyTree, mask: PyTree) -> PyTree:
        pruned = 1.0 - pruning.density(mask)
        last_steps = jnp.minimum(NEAR, (target - pruned) / (1.0 - pruned))
        return pruning.magnitude_mask(model, mask, jnp.where(target - pruned < step, last_steps, step), "layer")

    def on_epoch_end(
        model: PyTree, client: ClientState, context: ClientContext, epoch: jax.Array
    ) -> tuple[PyTree, ClientState]:
        first = jax.lax.cond(epoch == 0, candidate, lambda model, mask: client.memory, model, client.mask)
        return model, client._replace(memory=first)

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        last = candidate(model, client.mask)
        distance = pruning.hamming_distance(client.memory, last)
        score = context.score(pruning.apply_mask(model, last))
        # At the target there is nothing to cut; rounding makes `pruned < target` true there.
        smaller = pruning.density(last) < pruning.density(client.mask)
        moving, good = distance > eps, score > threshold
        mask = select(smaller & moving & good, last, client.mask)
        outcome = jnp.where(good, pruning.DECISIONS.index("accepted"), pruning.DECISIONS.index("rejected"))
        outcome = jnp.where(moving, outcome, pruning.DECISIONS.index("none"))
        logs = {
            "density": pruning.density(mask),
            "decision": jnp.where(smaller, outcome, pruning.DECISIONS.index("target")),
            "score_candidate": score,
            "distance": distance,
        }
        upload = Upload(pruning.apply_mask(model, mask), mask, {"images": context.images})
        return upload, client._replace(mask=mask), logs

    return Method(
        "subfedavg",
        is_local=named(local),
        server_memory=pruning.mask_table,
        client_mask=pruning.full_mask,
        client_memory=lambda model, mask: mask,
        download=download,
        on_epoch_end=on_epoch_end,
        finish=finish,
        aggregate=aggregate,
        needs_score=True,
    )
