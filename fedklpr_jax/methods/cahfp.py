"""CA-HFP: every device trains the channels that matter most to its data, as many as it can carry.

CA-HFP (arXiv 2603.12591): structures are pruned for each device, by a significance score that knows of curvature; the
compact submodel is mapped back into the common parameter space before aggregation. The paper states these parts; the
formulas are ours. With g the mean gradient and h the diagonal of the empirical Fisher matrix on the client's own data,

    S_c = |sum_{i in c} g_i w_i| + 1/2 sum_{i in c} h_i w_i^2     of output channel c, as a share of its layer's
    keep the n channels of highest S_c of every layer             n from the device's capacity alone

In its first round (and, with `refresh`, every so many of its rounds) a client downloads the whole model, scores it, and
chooses; from then on only its submodel travels, both ways. Until it has chosen it is tested with the first n channels.
Statistics of batch norm are of the channels that a client has: averaged over clients with others they suit nobody
(docs/classification.md), so that in classification they stay. Group norm (`model.norm`) has none.
The server brings what a client did not train back as one of

    coverage    nothing: W[j] <- sum_k n_k W_k[j] / sum_k n_k over those that hold j; the old value where nobody does
    global      its present value, and averages all models by n_k / n
    zeros       0, and averages all models by n_k / n
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedklpr_jax import aggregation, channels
from fedklpr_jax.capacity import DeviceClasses
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
from fedklpr_jax.methods.heterofl import own_submodel, send_submodel
from fedklpr_jax.pruning import apply_mask
from fedklpr_jax.trees import PyTree


class Memory(NamedTuple):
    """What the server knows of every client: `kept` bool [clients, width] a group of channels, the client's choice, and
    `rounds` int32 [clients], rounds it has finished."""

    kept: tuple[jax.Array, ...]
    rounds: jax.Array


def make(*, shares: str, min_channels: int, local: str, score: str, refresh: int, fill: str) -> Method:
    """CA-HFP.

    Args:
      shares: of the channels of each layer that each class of devices trains, such as `1.0,0.8,0.6,0.4`.
      min_channels: that a layer keeps at least.
      local: comma-separated layers that stay at the client; "" = none.
      score: `curvature` (S_c above), or `magnitude`, the sum of squares, for tasks without labels.
      refresh: a client chooses anew every so many of its rounds; 0 = in its first alone.
      fill: `coverage`, `global` or `zeros`.
    """
    capacity = DeviceClasses.parse(shares, min_channels)

    def chooses(rounds: jax.Array) -> jax.Array:
        return rounds % refresh == 0 if refresh else rounds == 0

    def server_memory(model: PyTree, clients: int) -> Memory:
        groups = channels.channel_groups(model)
        kept = jax.vmap(lambda client: capacity.first_channels(groups, client))(jnp.arange(clients))
        return Memory(kept, jnp.zeros(clients, jnp.int32))

    def download(server: ServerState, client: jax.Array) -> Message:
        memory: Memory = server.memory
        due = chooses(memory.rounds[client])
        kept = tuple(rows[client] | due for rows in memory.kept)
        mask = channels.structured_mask(server.model, channels.channel_groups(server.model), kept)
        return Message(apply_mask(server.model, mask), mask)

    def choose(client: ClientState, context: ClientContext) -> PyTree:
        model = context.received
        groups = channels.channel_groups(model)
        if score == "curvature":
            scores = channels.channel_scores(model["params"], *context.curvature(model), groups)
        else:
            scores = channels.magnitude_scores(model["params"], groups)
        return channels.structured_mask(model, groups, capacity.best_channels(scores, groups, context.client))

    def begin(client: ClientState, context: ClientContext) -> tuple[PyTree, ClientState]:
        # A branch, not a select: scoring costs an epoch of gradients of the whole network.
        mask = jax.lax.cond(chooses(client.memory), lambda: choose(client, context), lambda: client.mask)
        return apply_mask(context.received, mask), client._replace(mask=mask)

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        upload, client, logs = send_submodel(model, client, context)
        return upload, client._replace(memory=client.memory + 1), logs

    def aggregate(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        memory: Memory = server.memory
        weights = aggregation.image_weights(uploads.scalars["images"], uploads.accepted)
        models, masks = uploads.model, uploads.mask
        if fill == "global":
            models = jax.tree.map(jnp.where, masks, models, jax.tree.map(lambda leaf: leaf[None], server.model))
        # Models with zeros in place of the others are what came.
        model = context.mean(models, masks if fill == "coverage" else None, weights, server.model)
        groups = channels.channel_groups(server.model)
        new = jax.vmap(lambda mask: channels.kept_channels(mask, groups))(masks)
        accepted, clients = uploads.accepted, uploads.clients
        kept = tuple(
            held.at[clients].set(jnp.where(accepted[:, None], chosen, held[clients]))
            for held, chosen in zip(memory.kept, new, strict=True)
        )
        rounds = memory.rounds.at[clients].add(accepted.astype(jnp.int32))
        return ServerState(model, Memory(kept, rounds), server.round + 1), {"weight": weights}

    def client_memory(model: PyTree, mask: Any) -> jax.Array:
        """Rounds the client has finished."""
        return jnp.int32(0)

    return Method(
        "cahfp",
        is_local=named(local),
        server_memory=server_memory,
        client_memory=client_memory,
        download=download,
        begin=begin,
        finish=finish,
        aggregate=aggregate,
        personalise=own_submodel,
        capacity=capacity,
    )
