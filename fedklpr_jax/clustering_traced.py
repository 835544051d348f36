"""The clustering of `clustering.cluster` inside `jax.jit`: fixed shapes, dense [n, n] arrays, no [n, n, n]."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from fedklpr_jax.clustering import ROUNDING, check_settings
from fedklpr_jax.errors import InputError

_BLOCK = 64


def first_copy(features: jax.Array) -> jax.Array:
    """For every row the first one with the same bits, int32 [n], by two 32-bit hashes."""
    # The multipliers and shifts are those of MurmurHash3's finaliser; each column starts it from another number.
    bits = lax.bitcast_convert_type(jnp.where(features == 0, 0.0, features), jnp.uint32)
    column = jnp.arange(1, features.shape[1] + 1, dtype=jnp.uint32)
    same = jnp.ones((len(features), len(features)), bool)
    for odd in (0x9E3779B1, 0x85EBCA77):
        mixed = bits ^ (column * jnp.uint32(odd))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        value = (mixed ^ (mixed >> 16)).sum(axis=1, dtype=jnp.uint32)
        same &= value[:, None] == value
    return jnp.argmax(same, axis=1)


def _similarities(features: jax.Array) -> jax.Array:
    """f.f' of the features scaled to length 1, float32 [n, n], with equal entries for equal rows."""
    # By the largest entry first, so that no square overflows.
    for order in (jnp.inf, 2):
        length = jnp.linalg.norm(features, ord=order, axis=1, keepdims=True)
        features = features / jnp.where(length > 0, length, 1)
    similar = jnp.matmul(features, features.T, precision=lax.Precision.HIGHEST)
    # A product of matrices may give copies different last bits, which would rank them.
    first = first_copy(features)
    return similar[first][:, first]


def _encodings(similar: jax.Array, valid: jax.Array, k1: int, k2: int) -> jax.Array:
    """Averaged V of every image, float32 [n, n]; zero where an image is padding."""
    size = len(similar)
    rows = jnp.arange(size)[:, None]
    among = jnp.where(jnp.eye(size, dtype=bool), jnp.inf, jnp.where(valid, similar, -jnp.inf))
    # Without the barrier XLA merges the slices below into top_k's own and then sorts the rows from end to end.
    closeness, nearest = lax.optimization_barrier(lax.top_k(among, min(max(k1 + 1, k2), size)))
    known = (closeness > -jnp.inf) & valid[:, None]

    def reciprocal(k: int) -> tuple[jax.Array, jax.Array]:
        """R(i, k) as a table [n, n], and which of the nearest k + 1 are in it."""
        near = jnp.zeros((size, size), bool).at[rows, nearest[:, : k + 1]].set(known[:, : k + 1])
        mutual = near & near.T
        return mutual, mutual[rows, nearest[:, : k + 1]]

    wide, is_candidate = reciprocal(k1)
    _, in_narrow = reciprocal(round(k1 / 2))
    candidates = nearest[:, : k1 + 1]
    added = nearest[candidates, : in_narrow.shape[1]]
    counted = in_narrow[candidates]
    shared = (counted & wide[rows[:, :, None], added]).sum(axis=2)
    accepted = is_candidate & (3 * shared > 2 * counted.sum(axis=2))
    members = wide.at[rows[:, :, None], added].max(accepted[:, :, None] & counted)

    weights = jnp.where(members, jnp.exp(2 * similar - 2), 0)
    weights /= jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(weights.dtype).tiny)
    if k2 == 1:
        return weights
    total = jnp.zeros_like(weights)
    for place in range(min(k2, size)):
        total += jnp.where(known[:, place, None], weights[nearest[:, place]], 0)
    return total / jnp.maximum(known[:, :k2].sum(axis=1, keepdims=True), 1)


def _jaccard(encoding: jax.Array) -> jax.Array:
    """Jaccard distances between the rows of `encoding`, float32 [n, n].

    A row has few entries that are not zero: a block of rows goes from entry to entry and adds the minima with that
    column, which costs n x (all entries) instead of n^3.
    """
    size = len(encoding)
    columns = encoding.T
    # following[i, c]: the first column from c on in which row i is not zero; `size` behind the last one.
    following = jnp.where(encoding > 0, jnp.arange(size), size)
    following = jnp.pad(lax.cummin(following, axis=1, reverse=True), ((0, 0), (0, 1)), constant_values=size)

    def of_block(rows: jax.Array) -> jax.Array:
        def add(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            column, shared = state
            own = encoding.at[rows, column].get(mode="fill", fill_value=0)  # 0 once the row has come to its end
            shared += jnp.minimum(own[:, None], columns[jnp.minimum(column, size - 1)])
            return following[rows, jnp.minimum(column + 1, size)], shared

        begin = following[rows, 0], jnp.zeros((len(rows), size), encoding.dtype)
        shared = lax.while_loop(lambda state: (state[0] < size).any(), add, begin)[1]
        return 1 - shared / (2 - shared)

    blocks = -(-size // _BLOCK)
    rows = jnp.minimum(jnp.arange(blocks * _BLOCK), size - 1).reshape(blocks, _BLOCK)
    return lax.map(of_block, rows).reshape(-1, size)[:size]


def dbscan(near: jax.Array, valid: jax.Array, min_samples: ArrayLike) -> jax.Array:
    """Clusters int32 [n] of a symmetric table of neighbours bool [n, n], a real point being its own neighbour."""
    size = len(near)
    index = jnp.arange(size)
    core = valid & (near.sum(axis=1) >= min_samples)
    linked = near & core  # [i, j]: j is a core point and a neighbour of i

    def smallest(labels: jax.Array) -> jax.Array:
        """The smallest label among each point's core neighbours, `size` where it has none."""
        return jnp.where(linked, labels, size).min(axis=1)

    def spread(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        labels = state[0]
        lowered = jnp.where(core, smallest(labels), size)
        # A label is the index of a core point of the same component, so its own label is at least as good.
        jumped = lowered.at[lowered].get(mode="fill", fill_value=size)
        return jumped, (jumped != labels).any()

    first = lax.while_loop(lambda state: state[1], spread, (jnp.where(core, index, size), jnp.bool_(True)))[0]
    number = jnp.cumsum(core & (first == index)) - 1
    # Core points have their own component's first point here, border points the first of their components.
    found = jnp.where(valid, smallest(first), size)
    return number.at[found].get(mode="fill", fill_value=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("k1", "k2"))
def cluster(
    features: ArrayLike,
    valid: ArrayLike,
    *,
    k1: int = 20,
    k2: int = 6,
    eps: ArrayLike = 0.5,
    min_samples: ArrayLike = 4,
) -> jax.Array:
    """Pseudo labels as of `clustering.cluster`, for use inside `jax.jit` and `jax.vmap`.

    The same clusters with the same numbers, but for images that the rounding of float32 brings past each other.

    Args:
      features: float32 [n, d].
      valid: bool [n]; False marks padding, which changes nothing and is in no cluster.
      k1: neighbours that make the reciprocal sets, at least 1; fixed when compiled, as is `k2`.
      k2: neighbours (itself included) whose encodings are averaged, at least 1.
      eps: largest Jaccard distance of neighbours, above 0 and below 1 (not checked).
      min_samples: neighbours (itself included) that make a core point, at least 1 (not checked).

    Returns:
      int32 [n]; all -1 if a feature of a real image is not finite.

    Raises:
      InputError: a shape, `k1` or `k2` is not allowed.

    >>> angles = jnp.radians(jnp.array([0.0, 1, 2, 90, 91, 92, 0, 0]))
    >>> features = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    >>> cluster(features, jnp.arange(8) < 6, k1=2, k2=1, min_samples=2)
    Array([ 0,  0,  0,  1,  1,  1, -1, -1], dtype=int32)
    """
    features, valid = jnp.asarray(features, jnp.float32), jnp.asarray(valid, bool)
    if features.ndim != 2 or valid.shape != features.shape[:1]:
        raise InputError(f"features: shape {features.shape} with valid {valid.shape}; give [n, d] and [n]")
    check_settings(k1, k2)
    if features.size == 0:
        return jnp.full(len(features), -1, jnp.int32)
    features = jnp.where(valid[:, None], features, 0)
    finite = jnp.isfinite(features).all()
    features = jnp.where(finite, features, 0)
    encoding = _encodings(_similarities(features), valid, k1, k2)
    near = (_jaccard(encoding) <= eps + ROUNDING) & valid[:, None] & valid
    return jnp.where(finite, dbscan(near, valid, min_samples), -1)
