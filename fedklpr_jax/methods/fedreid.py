"""FedReID: FedPAV with cosine distance weight, knowledge distillation, client clustering and edges.

Zhuang et al., "Performance optimization for federated person re-identification via benchmark analysis", ACM MM 2020,
and "Optimizing performance of federated person re-identification", ACM TOMM 2023; formulas from the authors' code.
Classifiers stay at the clients; F is the embedding of a model, x an image of the public set.

    CDW         d_k = mean(1 - cos(logits before, logits after local training))     on the fixed batch D_batch
                theta <- sum_k d_k / sum d * theta_k
    KD          every so many rounds, one pass in batches of 32 over the public set:
                theta <- theta - SGD of mean((F_theta(x) - mean_k F_k(x) / |F_k(x)|)^2)
    clustering  v_k = F_k of 32 public images, one after the other; FINCH on the v_k, one first-neighbour step, cosine;
                each cluster has its own mean (with CDW by d_k), which its clients download next
    edges       an edge averages its cameras every round, the cloud the edges every so many rounds, by n_k

The student's feature is not normalised, as in their code. Ours: teachers and v_k in eval mode and the student without
dropout (their models stay in train mode); an edge counts at the cloud with the images of its cameras heard since the
cloud last averaged; a cluster or edge in which nothing turned (all d_k = 0) keeps its model. The global model is the
mean over all clients where there are clusters, and the cloud's last one where there are edges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedklpr_jax import aggregation, losses
from fedklpr_jax.errors import InputError
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
from fedklpr_jax.finch import first_neighbour_clusters
from fedklpr_jax.methods.fedpav import is_classifier
from fedklpr_jax.trees import PyTree, merge, pair, select

BATCH = 32
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


class Edges(NamedTuple):
    """What the server side remembers with edges: `models`, every client's next one, leaves [clients, ...], and the
    `images` float32 [clients] of those heard since the cloud last averaged."""

    models: PyTree
    images: jax.Array


def turned(model: PyTree, client: ClientState, context: ClientContext, space: str) -> jax.Array:
    """How far local training turned the outputs `space` (embeddings if the task has no such) on D_batch: mean(1 - cos),
    each model with the local leaves it had: float32 scalar."""
    received = merge(context.received, context.received_local)
    # Both models go through one traced copy of the network.
    outputs = jax.lax.map(context.probe, pair(received, merge(model, client.local)))
    found = outputs.get(space, outputs["embedding"])
    # Columns out of play are alike in both models and so large that they would hide all others.
    before, after = jnp.where(found > losses.MASKED_LOGIT, found, 0.0)
    return losses.cosine_distance(before, after)


def by_distance(uploads: Uploads) -> tuple[jax.Array, jax.Array]:
    """CDW's weights and the distances d_k of the accepted clients, float32 [K] each."""
    moved = jnp.where(uploads.accepted, jnp.maximum(uploads.scalars["cdw"], 0.0), 0.0)
    by_images = aggregation.image_weights(uploads.scalars["images"], uploads.accepted)
    return aggregation.distance_weights(moved, by_images), moved


def distil(model: PyTree, uploads: Uploads, context: ServerContext, rate: float) -> PyTree:
    """KD: `model` after one pass over the public set with the mean of the accepted clients' features as its target."""
    optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(rate, MOMENTUM, nesterov=True))
    accepted = uploads.accepted[:, None, None]

    def step(carry: tuple[PyTree, PyTree, PyTree], rows: jax.Array) -> tuple[tuple[PyTree, PyTree, PyTree], None]:
        params, stats, momentum = carry

        def label(teacher: PyTree) -> jax.Array:
            features, _ = context.represent(teacher, rows, False)
            return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)

        labels = jnp.where(accepted, jax.lax.map(label, uploads.model), 0.0)
        target = jnp.sum(labels, axis=0) / jnp.maximum(jnp.sum(uploads.accepted), 1)

        def objective(params: PyTree) -> tuple[jax.Array, PyTree]:
            features, after = context.represent({"params": params, "batch_stats": stats}, rows, True)
            return jnp.mean(jnp.square(features - target)), after

        gradient, stats = jax.grad(objective, has_aux=True)(params)
        updates, momentum = optimizer.update(gradient, momentum, params)
        return (optax.apply_updates(params, updates), stats, momentum), None

    start = model["params"], model["batch_stats"], optimizer.init(model["params"])
    whole = jnp.arange(context.public // BATCH * BATCH).reshape(-1, BATCH)
    (params, stats, _), _ = jax.lax.scan(step, start, whole)
    return {"params": params, "batch_stats": stats}


def make(reid: Any, edges: Sequence[int] = ()) -> Method:
    """FedReID from its configuration section (`config.method.reid`) and the edge of each client, numbered from 0."""
    if reid.cloud_every and not edges:
        raise ValueError("fedreid with edges: give the edge of each client")

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        scalars = {"images": context.images}
        if reid.cdw:
            scalars["cdw"] = turned(model, client, context, "logits")
        return Upload(model, None, scalars), client, {}

    def weigh(uploads: Uploads) -> tuple[jax.Array, dict[str, jax.Array]]:
        if reid.cdw:
            weights, moved = by_distance(uploads)
            return weights, {"weight": weights, "cdw": moved}
        weights = aggregation.image_weights(uploads.scalars["images"], uploads.accepted)
        return weights, {"weight": weights}

    def check(context: ServerContext) -> None:
        if context.public < BATCH:
            raise InputError(f"fedreid: {context.public} public pictures at the server are too few; give {BATCH}")

    def one_model(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        weights, logs = weigh(uploads)
        model = context.mean(uploads.model, None, weights, server.model)
        if reid.distill_every:
            check(context)
            due = ((server.round + 1) % reid.distill_every == 0) & jnp.any(uploads.accepted)
            model = jax.lax.cond(due, lambda: distil(model, uploads, context, reid.distill_rate), lambda: model)
        return server._replace(model=model, round=server.round + 1), logs

    def one_a_cluster(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        check(context)
        weights, logs = weigh(uploads)
        seen = jax.lax.map(lambda model: context.represent(model, jnp.arange(BATCH), False)[0].ravel(), uploads.model)
        clusters = first_neighbour_clusters(seen, uploads.accepted)
        clients = len(jax.tree.leaves(server.memory)[0])
        receivers = jnp.full(clients, -1).at[uploads.clients].set(clusters)
        memory = aggregation.grouped_mean(uploads.model, weights, clusters, receivers, server.memory)
        model = context.mean(uploads.model, None, weights, server.model)
        return ServerState(model, memory, server.round + 1), logs | {"cluster": clusters.astype(jnp.float32)}

    def one_an_edge(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        weights, logs = weigh(uploads)
        memory: Edges = server.memory
        edge = jnp.array(edges)
        models = aggregation.grouped_mean(uploads.model, weights, edge[uploads.clients], edge, memory.models)
        heard = jnp.where(uploads.accepted, uploads.scalars["images"], memory.images[uploads.clients])
        images = memory.images.at[uploads.clients].set(heard)
        due = (server.round + 1) % reid.cloud_every == 0
        model = select(due, context.mean(models, None, images, server.model), server.model)
        models = jax.tree.map(lambda own, cloud: jnp.where(due, cloud[None], own), models, model)
        return ServerState(model, Edges(models, jnp.where(due, 0.0, images)), server.round + 1), logs

    def copies(model: PyTree, clients: int) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), model)

    def own_model(models: PyTree, client: jax.Array) -> Message:
        return Message(jax.tree.map(lambda leaf: leaf[client], models), None)

    tells = ("images", "cdw") if reid.cdw else ("images",)
    method = Method("fedreid", is_local=is_classifier, finish=finish, aggregate=one_model, tells=tells)
    if reid.cluster:
        return dataclasses.replace(
            method,
            server_memory=copies,
            download=lambda server, client: own_model(server.memory, client),
            aggregate=one_a_cluster,
            needs_public=True,
        )
    if reid.cloud_every:
        return dataclasses.replace(
            method,
            server_memory=lambda model, clients: Edges(copies(model, clients), jnp.zeros(clients)),
            download=lambda server, client: own_model(server.memory.models, client),
            aggregate=one_an_edge,
        )
    return dataclasses.replace(method, needs_public=bool(reid.distill_every))
