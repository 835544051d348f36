"""Camera-aware proxies: one feature for every (cluster, camera), the bank a client's contrast is made against.

Wang et al., "Camera-aware proxies for unsupervised person re-identification" (AAAI 2021), as FedCAPR (CVPRW 2025) uses
them. All shapes are fixed by the number of points, so that a whole epoch, relabelling included, compiles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Bank(NamedTuple):
    """The proxies of one client; places behind the last proxy are empty.

    `features` float32 [n, d], of length 1; `clusters` and `cameras` int32 [n], -1 in empty places; `of_point` int32
    [n], the proxy of each of the client's n points, -1 for one that sits out.
    """

    features: jax.Array
    clusters: jax.Array
    cameras: jax.Array
    of_point: jax.Array


def blank(points: int, width: int) -> Bank:
    """A bank without a proxy."""
    nobody = jnp.full(points, -1, jnp.int32)
    return Bank(jnp.zeros((points, width)), nobody, nobody, nobody)


def build(features: jax.Array, clusters: jax.Array, cameras: jax.Array) -> Bank:
    """The bank of an epoch: every proxy is the normalised mean embedding of its points.

    Proxies are numbered by cluster, then camera.

    Args:
      features: float32 [n, d], L2-normalised.
      clusters: int32 [n], negative for a point that sits out.
      cameras: int32 [n], from 0.

    >>> bank = build(jnp.eye(3), jnp.array([0, -1, 0]), jnp.array([1, 1, 0]))
    >>> bank.of_point.tolist(), bank.clusters.tolist(), bank.cameras.tolist()
    ([1, -1, 0], [0, 0, -1], [0, 1, -1])
    """
    count = len(clusters)
    used = clusters >= 0
    order = jnp.lexsort((cameras, clusters, ~used))
    cluster, camera, alive = clusters[order], cameras[order], used[order]
    changed = (cluster[1:] != cluster[:-1]) | (camera[1:] != camera[:-1])
    number = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), changed.astype(jnp.int32)]))
    of_point = jnp.full(count, -1, jnp.int32).at[order].set(jnp.where(alive, number, -1).astype(jnp.int32))
    # Points that sit out are summed in a place behind all proxies.
    place = jnp.where(used, of_point, count)
    total = jax.ops.segment_sum(jnp.where(used[:, None], features, 0.0), place, count + 1)[:count]
    length = jnp.linalg.norm(total, axis=1, keepdims=True)

    def label(values: jax.Array) -> jax.Array:
        return jnp.full(count + 1, -1, jnp.int32).at[place].set(values.astype(jnp.int32))[:count]

    return Bank(total / jnp.maximum(length, 1e-12), label(clusters), label(cameras), of_point)


def plan(bank: Bank, key: jax.Array, *, proxies: int, shots: int) -> tuple[jax.Array, jax.Array]:
    """An epoch of batches of P proxies with K points each, and how many of its batches count.

    Every proxy comes once, with K of its points drawn at random, going round where it has fewer; the last batch is
    filled up with proxies of the first.

    Args:
      bank: proxies over n points.
      key: random key.
      proxies: P.
      shots: K.

    Returns:
      int32 [ceil(n / P), P K], places of points, those of one proxy side by side, and int32, the number of batches.

    Source: batches of 8 proxies x 4 images are FedCAPR's, one visit of each proxy an epoch is that of CAP's code.
    """
    count = len(bank.of_point)
    points_key, proxies_key = jax.random.split(key)
    proxy = jnp.where(bank.of_point >= 0, bank.of_point, count)
    order = jnp.lexsort((jax.random.uniform(points_key, (count,)), proxy))
    size = jax.ops.segment_sum(jnp.ones(count, jnp.int32), proxy, count + 1)
    first = jnp.cumsum(size) - size
    total = jnp.sum(bank.clusters >= 0)
    shuffled = jnp.argsort(jnp.where(bank.clusters >= 0, jax.random.uniform(proxies_key, (count,)), jnp.inf))
    batches = -(-count // proxies)
    chosen = shuffled[jnp.arange(batches * proxies) % jnp.maximum(total, 1)][:, None]
    members = first[chosen] + jnp.arange(shots) % jnp.maximum(size[chosen], 1)
    return order[members].reshape(batches, proxies * shots).astype(jnp.int32), (-(-total // proxies)).astype(jnp.int32)


def move(bank: Bank, features: jax.Array, points: jax.Array, *, momentum: float) -> Bank:
    """The bank after a batch, sample by sample: `c <- normalise(momentum c + (1 - momentum) f)`.

    Args:
      bank: before.
      features: float32 [b, d], L2-normalised.
      points: int32 [b], the points they are of.
      momentum: the share a proxy keeps.
    """

    def one(index: jax.Array, proxies: jax.Array) -> jax.Array:
        own = bank.of_point[points[index]]
        moved = momentum * proxies[own] + (1.0 - momentum) * features[index]
        moved /= jnp.maximum(jnp.linalg.norm(moved), 1e-12)
        return proxies.at[own].set(jnp.where(own >= 0, moved, proxies[own]))

    return bank._replace(features=jax.lax.fori_loop(0, len(points), one, bank.features))
