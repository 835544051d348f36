"""Retrieval mAP inside jit: the validation score that pruning decisions are made with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedklpr_jax.evaluation.ranking import JUNK_ID


def retrieval_map(
    features: jax.Array,
    ids: jax.Array,
    cams: jax.Array,
    valid: jax.Array,
    same_camera: jax.Array | bool,
    queries: jax.Array | None = None,
) -> jax.Array:
    """Mean average precision with each image, or each of `queries`, as a query against all the others.

    Equal to `evaluate_ranking(...).mean_ap` on the same labels: images of the query's identity and camera are left
    out unless `same_camera`, images with identity -1 take no part, a negative at a match's distance stands before it,
    queries without a match are skipped. Shapes are fixed and everything is traceable, so it works under `jit` and
    `vmap` over clients padded to one size. Memory is a few [n, n] arrays.

    Args:
      features: float [n, d], normalised or not; distances are squared Euclidean in float32.
      ids: int32 [n].
      cams: int32 [n].
      valid: bool [n]; False rows (padding) take no part, whatever they hold.
      same_camera: bool scalar; True lets matches of the query's own camera count.
      queries: bool [n], which images are queries; None = all.

    Returns:
      float32 scalar in [0, 1]; 0.0 if no query has a match, or if a valid feature is not finite or so large that
      its distances overflow (a diverged model must lose every comparison, not stop the program).

    >>> features = jnp.array([[0.0], [1.0], [3.0], [3.5]])
    >>> ids, cams = jnp.array([1, 1, 2, 1]), jnp.array([0, 1, 0, 2])
    >>> float(jnp.round(retrieval_map(features, ids, cams, jnp.ones(4, bool), False), 4))
    0.75
    """
    taking_part = valid & (ids != JUNK_ID)
    # As in euclidean_distances: a feature as origin keeps the digits, and equal features at equal distances.
    origin = features[jnp.argmax(taking_part)].astype(jnp.float32)
    centred = jnp.where(taking_part[:, None], features.astype(jnp.float32) - origin, 0.0)
    norms = jnp.sum(jnp.square(centred), axis=1)
    # Without HIGHEST an accelerator may multiply in ten-bit mantissas, and the score would not match the host's.
    products = jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST)
    distances = norms[:, None] + norms[None, :] - 2 * products
    finite = jnp.all(jnp.isfinite(distances))
    distances = jnp.maximum(distances, 0.0)

    count = features.shape[0]
    same_id = ids[:, None] == ids[None, :]
    same_view = same_id & (cams[:, None] == cams[None, :]) & ~jnp.asarray(same_camera)
    ranked = taking_part[:, None] & taking_part[None, :] & ~same_view & ~jnp.eye(count, dtype=bool)
    matches = (ranked & same_id).astype(jnp.int32)

    # Second key: at equal distance negatives (0) come before matches (1). Entries left out go to the end.
    _, in_order = jax.lax.sort((jnp.where(ranked, distances, jnp.inf), matches), dimension=1, num_keys=2)
    rank = jnp.arange(1, count + 1, dtype=jnp.float32)
    precision = jnp.cumsum(in_order, axis=1) / rank
    found = matches.sum(axis=1)
    ap = jnp.sum(precision * in_order, axis=1) / jnp.maximum(found, 1)
    counted = found > 0 if queries is None else (found > 0) & queries
    score = jnp.sum(jnp.where(counted, ap, 0.0)) / jnp.maximum(jnp.sum(counted), 1)
    return jnp.where(finite, score, 0.0).astype(jnp.float32)
