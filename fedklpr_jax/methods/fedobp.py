"""FedOBP: every element of the model is either the client's own or the global one.

"FedOBP", arXiv 2604.16574. Per element of client i, theta_i the model it trained last and theta_g the global one,

    s   = |(theta_i - theta_g) * theta_i|     obd: optimal brain damage, its gradient taken as theta_i - theta_g
    s   = (theta_i - theta_g)^2               squared: the authors' later code
    E  <- (1 - a) s + a E                     once in every round the client takes part in, from E = 0
    theta_i where E > quantile_q(E), else theta_g

The client trains, and is tested with, this mixture; the server averages all elements by n_k / n. A client that never
trained has theta_i = theta_g: nothing is its own. Batch-norm statistics are never personal (ours).
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    average,
    send_all,
)
from fedklpr_jax.methods.fedpav import is_classifier
from fedklpr_jax.pruning import above_rank, count_true
from fedklpr_jax.trees import PyTree, merge, parameter_count, select, split


class Memory(NamedTuple):
    """What is kept of a client, by itself or (with a leading axis [clients]) by the server.

    `own` the scored leaves of the model it trained last; `trained` bool, whether there is one; `average` float32, E of
    the same structure (empty without EMA); `personal` float32, the share of these elements that was its own when it
    last took part.
    """

    own: PyTree
    trained: jax.Array
    average: PyTree
    personal: jax.Array


def _rounded(product: jax.Array) -> jax.Array:
    """A product that is rounded to float32 before anything is added to it.

    Compilers contract product and sum into one rounding, in one program and not in another, where server and client
    have to find the same bits. A bound that no finite value meets stands between the two in all of them.
    """
    return jnp.minimum(product, jnp.finfo(jnp.float32).max)


def _scores(own: PyTree, global_params: PyTree, score: str) -> PyTree:
    if score not in ("obd", "squared"):
        raise ValueError(f"score: {score!r} is not known; it is 'obd' or 'squared'")

    def of_leaf(mine: jax.Array, theirs: jax.Array) -> jax.Array:
        mine, theirs = jnp.asarray(mine, jnp.float32), jnp.asarray(theirs, jnp.float32)
        moved = mine - theirs
        return _rounded(jnp.abs(moved * mine) if score == "obd" else jnp.square(moved))

    return jax.tree.map(of_leaf, own, global_params)


def _unit_range(scores: jax.Array) -> jax.Array:
    """Minimum to 0, maximum to 1; 0 where they are equal."""
    low, width = jnp.min(scores), jnp.ptp(scores)
    return jnp.where(width > 0, (scores - low) / jnp.where(width > 0, width, 1.0), 0.0)


def quantile_rank(quantile: float, number: int) -> int:
    """`floor(quantile * (number - 1))` in exact arithmetic, of the quantile as it is written: 0.9999 = 9999/10000.

    Raises:
      ValueError: a quantile outside of [0, 1].

    >>> quantile_rank(0.29, 101), int(0.29 * 100)
    (29, 28)
    """
    share = Fraction(str(quantile))
    if not 0 <= share <= 1:
        raise ValueError(f"quantile: {quantile!r} is not allowed; it is a number from 0 to 1")
    return math.floor(share * (number - 1))


def _above_quantile(scores: PyTree, quantile: float) -> PyTree:
    leaves, structure = jax.tree.flatten(scores)
    flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
    # The interpolated quantile lies from the k-th smallest score up to below the next (or on it, where they are equal),
    # so the same scores exceed it as exceed the k-th: there is nothing to interpolate.
    above = above_rank(flat, quantile_rank(quantile, flat.size))
    parts = jnp.split(above, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(structure, [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)])


@functools.partial(jax.jit, static_argnames=("quantile", "score"))
def personal_mask(own: PyTree, global_params: PyTree, quantile: float, score: str = "obd") -> PyTree:
    """Which elements a client keeps as its own: bool, the structure of `own`, True = personal.

    For n distinct scores these are n - 1 - floor(quantile * (n - 1)): none at 1, all but the lowest score at 0.

    Args:
      own: the client's last trained parameters, any floating dtype; scores are float32.
      global_params: the global ones, same structure.
      quantile: q of the linearly interpolated quantile over the scores of all leaves, from 0 to 1; a constant of the
        program, taken as the decimal number that it is written as.
      score: `obd`, |(own - global) * own|, or `squared`, (own - global)^2.

    Raises:
      ValueError: an unknown score or a quantile outside of its range.

    Source: FedOBP (arXiv 2604.16574), and its authors' later code for `squared`.

    >>> own = {"kernel": jnp.array([1.0, 2.0, 4.0]), "bias": jnp.array([0.1, 8.0])}
    >>> personal_mask(own, {"kernel": jnp.array([0.0, 2.0, 3.0]), "bias": jnp.array([5.0, 8.0])}, 0.5)
    {'bias': Array([False, False], dtype=bool), 'kernel': Array([ True, False,  True], dtype=bool)}
    """
    return _above_quantile(_scores(own, global_params, score), quantile)


def make(*, quantile: float, score: str, ema: float, norm: str, classifier_only: bool, score_on: str) -> Method:
    """FedOBP.

    Both places to score give the same elements where the wire is lossless, and the full model travels both ways. The
    server's is the paper's and the cheaper one in a simulation: its memory stays on the device and is updated in place,
    while client states are stacked and copied in every round and evaluation.

    Args:
      quantile: q; elements scored above it are personal.
      score: `obd` or `squared`.
      ema: a, the weight of the old E; 0 = the scores of this download alone, and nothing is kept of older ones.
      norm: what brings E to [0, 1] before the quantile: `none`, `layer` (minimum and maximum of each leaf), or `global`
        (of all leaves: the order of elements stays, so it is `none` by another name).
      classifier_only: score the identity classifier alone; the rest is global.
      score_on: `server`, which remembers every client's last upload and sends the mixture, or `client`.
    """

    def scored(path: str) -> bool:
        return path.startswith("params/") and (is_classifier(path) or not classifier_only)

    def first_memory(model: PyTree) -> Memory:
        own = split(model, scored)[1]
        if not own:
            raise InputError("config.method.obp.classifier: True, but this task's model has no classifier; give False")
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), own)
        return Memory(own, jnp.bool_(False), zeros if ema else (), jnp.float32(0))

    def server_memory(model: PyTree, clients: int) -> Memory:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), first_memory(model))

    @jax.jit
    def mixture(model: PyTree, memory: Memory) -> tuple[PyTree, Memory]:
        """The global `model` with the client's own elements, and its memory after this download."""
        theirs = split(model, scored)[1]
        own = select(memory.trained, memory.own, theirs)
        scores = _scores(own, theirs, score)
        if ema:
            scores = jax.tree.map(
                lambda new, old: _rounded((1.0 - ema) * new) + _rounded(ema * old), scores, memory.average
            )
            memory = memory._replace(average=scores)
        kept = _above_quantile(jax.tree.map(_unit_range, scores) if norm == "layer" else scores, quantile)
        mixed = jax.tree.map(jnp.where, kept, own, theirs)
        personal = count_true(kept)
        share = personal.astype(jnp.float32) / parameter_count(kept)
        return merge(model, mixed), memory._replace(personal=share)

    def download(server: ServerState, client: jax.Array) -> Message:
        memory = jax.tree.map(lambda leaf: leaf[client], server.memory)
        return Message(mixture(server.model, memory)[0], None)

    def aggregate(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        def remembered(row: tuple[Memory, PyTree, jax.Array]) -> tuple[Memory, jax.Array]:
            before, own, accepted = row
            after = mixture(server.model, before)[1]
            # A refused client, too, is left with what it had.
            return select(accepted, after._replace(own=own, trained=jnp.bool_(True)), before), after.personal

        # The choice of what is kept stands inside the loop: nothing is written before every row is read, and so XLA
        # writes in place instead of copying what all clients sent.
        held = jax.tree.map(lambda leaf: leaf[jnp.asarray(uploads.clients)], server.memory)
        rows, shares = jax.lax.map(remembered, (held, split(uploads.model, scored)[1], uploads.accepted))
        memory = jax.tree.map(lambda leaf, new: leaf.at[uploads.clients].set(new), server.memory, rows)
        server, logs = average(server, uploads, context)
        return server._replace(memory=memory), logs | {"personal": shares}

    def begin(client: ClientState, context: ClientContext) -> tuple[PyTree, ClientState]:
        model, memory = mixture(context.received, client.memory)
        return model, client._replace(memory=memory)

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        upload, client, _ = send_all(model, client, context)
        memory = client.memory._replace(own=split(model, scored)[1], trained=jnp.bool_(True))
        return upload, client._replace(memory=memory), {"personal": memory.personal}

    if score_on == "server":
        return Method("fedobp", server_memory=server_memory, download=download, aggregate=aggregate)
    return Method(
        "fedobp",
        client_memory=lambda model, mask: first_memory(model),
        begin=begin,
        finish=finish,
        personalise=lambda message, client: mixture(message.model, client.memory)[0],
    )
