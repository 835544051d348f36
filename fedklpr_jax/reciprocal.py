"""Sparse k-reciprocal neighbour sets (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding",
CVPR 2017), which re-ranking and pseudo-label clustering share.

All start from `nearest` int [n, k]: the nearest of each of n points, nearest first.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp


def indicator(columns: np.ndarray) -> sp.csr_matrix:
    """0/1 matrix int32 [n, n] with ones at `columns` int [n, k] of each row."""
    size, count = columns.shape
    ones = np.ones(size * count, np.int32)
    return sp.csr_matrix((ones, columns.ravel(), np.arange(0, size * count + 1, count)), shape=(size, size))


def reciprocal(nearest: np.ndarray, k: int) -> sp.csr_matrix:
    """R(p, k), equation 2: p and those among its k nearest that have p among theirs; symmetric.

    Args:
      nearest: int [n, at least min(k + 1, n)].
      k: neighbours beside the point itself.

    >>> reciprocal(np.array([[0, 1], [1, 0], [2, 1]]), 1).toarray()
    array([[1, 1, 0],
           [1, 1, 0],
           [0, 0, 1]], dtype=int32)
    """
    neighbours = indicator(nearest[:, : k + 1])
    # Behind k copies of itself a point is missing from its own neighbours; the identity puts it back.
    mutual = neighbours.multiply(neighbours.T).maximum(sp.identity(len(nearest), np.int32, format="csr"))
    return mutual.tocsr()


def expanded_reciprocal(nearest: np.ndarray, k1: int) -> sp.csr_matrix:
    """R*(p, k1), equation 3: R(p, k1) with R(c, k1 / 2) of its members c that lie in it by more than two thirds.

    Args:
      nearest: int [n, at least min(k1 + 1, n)].
      k1: neighbours beside the point itself; half of it is rounded as `round` does.

    Returns:
      [n, n] with sorted indices; members are the stored entries, their values mean nothing.
    """
    wide = reciprocal(nearest, k1)
    narrow = reciprocal(nearest, round(k1 / 2))
    sizes = np.asarray(narrow.sum(axis=1)).ravel()
    overlap = (wide @ narrow).multiply(wide).tocoo()
    accepted = 3 * overlap.data > 2 * sizes[overlap.col]
    ones = np.ones(int(accepted.sum()), np.int32)
    candidates = sp.csr_matrix((ones, (overlap.row[accepted], overlap.col[accepted])), shape=wide.shape)
    expanded = (wide + candidates @ narrow).tocsr()
    expanded.sort_indices()
    return expanded


def query_expansion(encoding: sp.csr_matrix, nearest: np.ndarray, k2: int) -> sp.csr_matrix:
    """Each row of `encoding` float32 [n, n] replaced by the mean over the point's `k2` nearest, itself among them."""
    if k2 == 1:
        return encoding
    averaged = nearest[:, :k2]
    return ((indicator(averaged).astype(np.float32) @ encoding) / averaged.shape[1]).tocsr()
