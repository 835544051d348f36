"""First-neighbour clustering, one step, traced.

"Efficient parameter-free clustering using first neighbor relations" (FINCH, Sarfraz et al., CVPR 2019), equation 1: two
points are linked if one is the other's first neighbour, or if both have the same one; a cluster is a connected
component. This is the first of the partitions that FINCH goes on to merge.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp


def first_neighbour_clusters(features: jax.Array, valid: jax.Array) -> jax.Array:
    """The cluster of each point, by cosine similarity: int32 [K], numbered from 0 in order of appearance.

    Among equally near neighbours the first counts. A point without any neighbour is a cluster of its own.

    Args:
      features: float32 [K, d], one row a point; those of points that do not count may hold anything.
      valid: bool [K], which points count; the others get -1.

    >>> features = jnp.array([[1., 0.], [0., 1.], [2., .1], [.1, 1.]])
    >>> first_neighbour_clusters(features, jnp.array([True, True, True, True])).tolist()
    [0, 1, 0, 1]
    """
    chex.assert_rank([features, valid], [2, 1])
    count = len(features)
    rows = jnp.where(valid[:, None], features.astype(jnp.float32), 0.0)
    rows = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    # The default product of an accelerator is too coarse to tell near neighbours apart.
    similarity = jnp.matmul(rows, rows.T, precision="highest")
    itself = jnp.eye(count, dtype=bool)
    allowed = valid[:, None] & valid[None] & ~itself
    nearest = jnp.argmax(jnp.where(allowed, similarity, -jnp.inf), axis=1)
    linked = allowed & (jnp.arange(count)[None] == nearest[:, None])
    # Who shares a first neighbour is linked through it.
    reached = linked | linked.T | itself
    for _ in range(math.ceil(math.log2(max(count, 2)))):
        reached = jnp.matmul(reached.astype(jnp.float32), reached.astype(jnp.float32)) > 0
    first = jnp.argmax(reached, axis=1)
    opens = valid & (first == jnp.arange(count))
    return jnp.where(valid, (jnp.cumsum(opens) - 1)[first], -1).astype(jnp.int32)
