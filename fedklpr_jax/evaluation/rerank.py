"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017).

Neighbour sets and their encodings are sparse matrices, so that nothing of size (q + g)^2 is made beside the distances
that were given, and rows are not sorted beyond their nearest few.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from fedklpr_jax.errors import InputError
from fedklpr_jax.reciprocal import expanded_reciprocal, query_expansion

_BLOCK = 256


class _Joint:
    """Rows of the (q + g) x (q + g) distance matrix over queries and gallery together, made when asked for."""

    def __init__(self, query_gallery: np.ndarray, query_query: np.ndarray, gallery_gallery: np.ndarray) -> None:
        self.query_gallery, self.query_query, self.gallery_gallery = query_gallery, query_query, gallery_gallery
        self.queries = len(query_query)
        self.size = self.queries + len(gallery_gallery)

    def blocks(self) -> list[tuple[int, int]]:
        """Row ranges; none holds both queries and gallery images."""
        edges = [*range(0, self.queries, _BLOCK), *range(self.queries, self.size, _BLOCK), self.size]
        return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Squared and divided by the row's largest entry, float32 [stop - start, q + g]; an all-zero row stays zero."""
        if start < self.queries:
            parts = self.query_query[start:stop], self.query_gallery[start:stop]
        else:
            a, b = start - self.queries, stop - self.queries
            parts = self.query_gallery[:, a:b].T, self.gallery_gallery[a:b]
        rows = np.square(np.concatenate(parts, axis=1)).astype(np.float32)
        largest = rows.max(axis=1, keepdims=True)
        rows /= np.where(largest > 0, largest, 1)
        return rows


def _nearest(joint: _Joint, cuts: list[int]) -> np.ndarray:
    """The `max(cuts)` nearest of every row, int32; for each k of `cuts` the first k columns are its k nearest."""
    count = max(cuts)
    nearest = np.empty((joint.size, count), np.int32)
    # One more than needed, to see whether the last one kept is as far away as the first one left out.
    kept = min(count + 1, joint.size)
    inner = np.array([k for k in cuts if k < joint.size], int)
    for start, stop in joint.blocks():
        rows = joint.rows(start, stop)
        top = np.argpartition(rows, kept - 1, axis=1)[:, :kept]
        values = np.take_along_axis(rows, top, axis=1)
        order = np.argsort(values, axis=1)
        values = np.take_along_axis(values, order, axis=1)
        nearest[start:stop] = np.take_along_axis(top, order, axis=1)[:, :count]
        # Copies of an image make exact ties; at a cut they decide who is a neighbour. The usual code leaves that to
        # np.argsort of the whole row, and so do these few rows, for the same numbers on the same machine.
        for i in np.flatnonzero((values[:, inner - 1] == values[:, inner]).any(axis=1)):
            nearest[start + i] = np.argsort(rows[i])[:count]
    return nearest


def _encoded(joint: _Joint, members: sp.csr_matrix) -> sp.csr_matrix:
    """Rows exp(-distance) over the members, each row summing to 1 (equation 7)."""
    weights = np.empty(members.nnz, np.float32)
    for start, stop in joint.blocks():
        span = slice(members.indptr[start], members.indptr[stop])
        local = np.repeat(np.arange(stop - start), np.diff(members.indptr[start : stop + 1]))
        values = np.exp(-joint.rows(start, stop)[local, members.indices[span]])
        weights[span] = values / np.bincount(local, values)[local]
    return sp.csr_matrix((weights, members.indices, members.indptr), shape=members.shape)


def _check(name: str, matrix: np.ndarray, shape: tuple[int, int]) -> None:
    if matrix.shape != shape:
        raise InputError(f"{name}: shape {matrix.shape} does not fit query_gallery; give {shape}")
    if not np.isfinite(matrix.sum(dtype=np.float64)):
        raise InputError(f"{name}: contains NaN or infinity; give finite distances (has the model diverged?)")


def rerank(
    query_gallery: ArrayLike,
    query_query: ArrayLike,
    gallery_gallery: ArrayLike,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> np.ndarray:
    """Distances after k-reciprocal re-ranking: (1 - lambda) Jaccard + lambda original (equation 12).

    As in the authors' code the distances are squared once more and divided by the largest of the query's row, so the
    published settings expect squared Euclidean distances (`euclidean_distances`).

    Args:
      query_gallery: float [q, g], at least one of each.
      query_query: float [q, q], symmetric.
      gallery_gallery: float [g, g], symmetric.
      k1: neighbours that make the reciprocal sets, at least 1.
      k2: neighbours (itself included) whose encodings are averaged, at least 1 (1 averages nothing).
      lambda_value: share of the original distance, in [0, 1].

    Returns:
      float32 [q, g]. Where images are exact copies of each other, who is among the k nearest can hang on the order
      in which `np.argsort` puts equal numbers, which differs between processors (the usual code shares this).

    Raises:
      InputError: a shape or setting does not fit, or a distance is not finite.

    >>> line = np.array([0.0, 0.1, 5.0, 5.1])
    >>> squared = (line[:, None] - line) ** 2
    >>> rerank(squared[:1, 1:], squared[:1, :1], squared[1:, 1:], k1=1, k2=1).round(2)
    array([[0.  , 0.98, 1.  ]], dtype=float32)
    """
    across, queries, gallery = (np.asarray(x) for x in (query_gallery, query_query, gallery_gallery))
    if across.ndim != 2 or across.size == 0:
        raise InputError(f"query_gallery: shape {across.shape} is not allowed; give [q, g] with at least one of each")
    q, g = across.shape
    _check("query_gallery", across, (q, g))
    _check("query_query", queries, (q, q))
    _check("gallery_gallery", gallery, (g, g))
    for name, k in (("k1", k1), ("k2", k2)):
        if k < 1:
            raise InputError(f"{name}: {k} is not allowed; give a whole number from 1")
    if not 0 <= lambda_value <= 1:
        raise InputError(f"lambda_value: {lambda_value} is not allowed; give a number from 0 to 1")

    joint = _Joint(across, queries, gallery)
    nearest = _nearest(joint, [min(k, joint.size) for k in (k1 + 1, round(k1 / 2) + 1, k2)])
    encoding = query_expansion(_encoded(joint, expanded_reciprocal(nearest, k1)), nearest, k2)

    gallery_by_member = encoding[q:].tocsc()
    result = np.empty((q, g), np.float32)
    for start in range(0, q, _BLOCK):
        stop = min(start + _BLOCK, q)
        original = joint.rows(start, stop)[:, q:]
        for i in range(start, stop):
            span = slice(encoding.indptr[i], encoding.indptr[i + 1])
            shared = gallery_by_member[:, encoding.indices[span]]
            own = np.repeat(encoding.data[span], np.diff(shared.indptr))
            # Rows sum to 1, so the element-wise maxima sum to 2 - (the sum of the minima).
            smaller = np.bincount(shared.indices, np.minimum(own, shared.data), minlength=g)
            jaccard = 1 - smaller / (2 - smaller)
            result[i] = (1 - lambda_value) * jaccard + lambda_value * original[i - start]
    return result
