"""Pseudo labels for unsupervised re-identification: DBSCAN on the k-reciprocal Jaccard distance, on the host.

The distance is that of Zhong et al. ("Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017,
equations 2-10) over one set of images; the clustering is DBSCAN (Ester et al., KDD 1996). The defaults are FedCAPR's
(CVPRW 2025). Nothing of size n^2 is made. `clustering_traced` is the same inside `jax.jit`.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from fedklpr_jax.errors import InputError
from fedklpr_jax.reciprocal import expanded_reciprocal, query_expansion

# Equal sums in another order must decide alike at eps: sets of equal sizes often lie at a distance of exactly one half.
ROUNDING = 1e-6

_BLOCK = 512
_PAIRS = 1 << 18


def check_settings(k1: int, k2: int) -> None:
    """Raises InputError where a number of neighbours is not allowed."""
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise InputError(f"{name}: {value} is not allowed; give a whole number from 1")


def distinct_rows(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `features` [n, d] without copies, and for each row its place among them, int [n]."""
    places: dict[bytes, int] = {}
    # Adding 0 turns -0 into 0, which has other bytes.
    place = np.array([places.setdefault((row + 0.0).tobytes(), len(places)) for row in features])
    first = np.unique(place, return_index=True)[1]
    return features[first], place


def lengths(rows: np.ndarray) -> np.ndarray:
    """Euclidean lengths of `rows` float32 [m, d], float32 [m, 1]; 1 for a row of zeros."""
    # Squares of a large float32 overflow, those of a small one vanish.
    length = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return np.where(length > 0, length, 1).astype(np.float32)[:, None]


def nearest_points(points: np.ndarray, place: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest of every image, nearest first, int32 [n, count].

    The image itself is the first; equally near ones come by index. Only equal numbers are seen as equally near, and a
    product of matrices may give copies of an image different last bits: that is why each is multiplied only once.

    Args:
      points: float32 [m, d] of length 1 or 0, no two the same.
      place: int [n]: the row of `points` that is an image's feature.
      count: from 1 to n.
    """
    images = np.arange(len(place))
    copies = len(points) < len(place)
    ranked = np.empty((len(points), count), np.int32)
    # The `count`-th largest of the largest in each group is at most the `count`-th largest of all; what reaches it is
    # little more than what is looked for, and holds every tie.
    width = min(16, max(1, len(place) // (4 * count)))
    grouped = len(place) // width * width
    for start in range(0, len(points), _BLOCK):
        similar = points[start : start + _BLOCK] @ points.T
        if copies:
            similar = similar[:, place]
        largest = similar[:, :grouped].reshape(len(similar), width, -1).max(axis=1)
        bound = np.partition(largest, -count, axis=1)[:, -count]
        row, column = np.nonzero(similar >= bound[:, None])
        order = np.lexsort((-similar[row, column], row))  # stable, so ties stay in the order of their columns
        starts = np.searchsorted(row, np.arange(len(similar)))
        ranked[start : start + _BLOCK] = column[order[starts[:, None] + np.arange(count)]]
    nearest = ranked[place]
    itself = nearest == images[:, None]
    missing = ~itself.any(axis=1)
    nearest[missing, -1] = images[missing]
    itself[missing, -1] = True
    return np.take_along_axis(nearest, np.argsort(~itself, axis=1, kind="stable"), axis=1)


def encode(points: np.ndarray, place: np.ndarray, members: sp.csr_matrix) -> sp.csr_matrix:
    """Rows exp(-(2 - 2 f.f')) over the members, float32, each row summing to 1 (equation 7).

    Args:
      points: float32 [m, d].
      place: int [n]: the row of `points` that is an image's feature.
      members: [n, n], the members being its stored entries.
    """
    weights = np.empty(members.nnz, np.float32)
    columns = place[members.indices]
    for i, (start, stop) in enumerate(zip(members.indptr, members.indptr[1:], strict=False)):
        weights[start:stop] = points[columns[start:stop]] @ points[place[i]]
    weights = np.exp(2 * weights - 2)
    weights /= np.repeat(np.add.reduceat(weights, members.indptr[:-1]), np.diff(members.indptr))
    return sp.csr_matrix((weights, members.indices, members.indptr), shape=members.shape)


def jaccard_graph(encoding: sp.csr_matrix, limit: float) -> sp.csr_matrix:
    """Jaccard distances of at most `limit` < 1 between the rows of `encoding`, float64 [n, n]; the rest is not stored.

    1 - sum min / sum max; rows sum to 1, so that the maxima sum to 2 - (the sum of the minima).
    """
    size = encoding.shape[0]
    encoding.sort_indices()  # the minima are added in the order of the columns, so that the result is symmetric
    by_column = encoding.tocsc()
    holders = np.diff(by_column.indptr)
    met = np.concatenate([[0], np.cumsum(holders[encoding.indices], dtype=np.int64)])
    least = 2 * (1 - limit) / (2 - limit)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    stop = 0
    while stop < size:
        start = stop
        # As many rows as make _PAIRS minima, at least one.
        full = np.searchsorted(met[encoding.indptr], met[encoding.indptr[start]] + _PAIRS, side="right") - 1
        stop = int(min(max(full, start + 1), start + _BLOCK, size))
        entries = slice(encoding.indptr[start], encoding.indptr[stop])
        columns = encoding.indices[entries]
        counts = holders[columns]
        offset = by_column.indptr[columns] - (met[entries] - met[entries.start])
        where = np.arange(counts.sum()) + np.repeat(offset, counts)
        local = np.repeat(np.arange(stop - start), np.diff(encoding.indptr[start : stop + 1]))
        minima = np.minimum(by_column.data[where], np.repeat(encoding.data[entries], counts))
        cell = by_column.indices[where] + np.repeat(local * size, counts)
        shared = np.bincount(cell, minima, minlength=(stop - start) * size)
        near = np.flatnonzero(shared >= least)
        found.append((near + start * size, shared[near]))
    cells, shared = (np.concatenate(parts) for parts in zip(*found, strict=True))
    distances = np.maximum(1 - shared / (2 - shared), 0)
    return sp.csr_matrix((distances, (cells // size, cells % size)), shape=(size, size))


def cluster(features: ArrayLike, *, k1: int = 20, k2: int = 6, eps: float = 0.5, min_samples: int = 4) -> np.ndarray:
    """Pseudo labels of images from their features.

    Squared distances are 2 - 2 f.f' of the features scaled to length 1. V_i = exp(-distance) over the expanded
    k-reciprocal set of image i, scaled to sum 1 and averaged over the `k2` nearest; the distance of two images is the
    Jaccard distance of their V, and at most `eps` (up to rounding, 1e-6) makes them neighbours. Equally near images
    are ranked by index, an image before its copies.

    Args:
      features: float32 [n, d], any lengths; a row of zeros is at the distance 2 from everything.
      k1: neighbours that make the reciprocal sets, at least 1.
      k2: neighbours (itself included) whose V are averaged, at least 1 (1 averages nothing).
      eps: largest Jaccard distance of neighbours, above 0 and below 1.
      min_samples: neighbours (itself included) that make a core point, at least 1.

    Returns:
      int32 [n]: clusters from 0 in the order of their first core point; a border point is in the first cluster that it
      has a core neighbour in; -1 belongs to none. All -1 if a feature is not finite: a diverged model has no clusters.

    Raises:
      InputError: the shape or a setting is not allowed.

    >>> angles = np.radians([0, 1, 2, 90, 91, 92])
    >>> cluster(np.stack([np.cos(angles), np.sin(angles)], axis=1), k1=2, k2=1, min_samples=2)
    array([0, 0, 0, 1, 1, 1], dtype=int32)
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2:
        raise InputError(f"features: shape {features.shape} is not allowed; give [n, d]")
    check_settings(k1, k2)
    if not 0 < eps < 1:
        raise InputError(f"eps: {eps} is not allowed; give a number above 0 and below 1")
    if min_samples < 1:
        raise InputError(f"min_samples: {min_samples} is not allowed; give a whole number from 1")
    size = len(features)
    if features.size == 0 or not np.isfinite(features).all():
        return np.full(size, -1, np.int32)

    points, place = distinct_rows(features)
    points /= lengths(points)
    # Imported late: it takes a second, and runs with labels do without.
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import sort_graph_by_row_values

    nearest = nearest_points(points, place, min(max(k1 + 1, k2), size))
    encoding = query_expansion(encode(points, place, expanded_reciprocal(nearest, k1)), nearest, k2)
    limit = eps + ROUNDING
    graph = sort_graph_by_row_values(jaccard_graph(encoding, limit), warn_when_not_sorted=False)
    return DBSCAN(eps=limit, min_samples=min_samples, metric="precomputed").fit_predict(graph).astype(np.int32)
