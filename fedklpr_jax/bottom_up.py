"""Bottom-up clustering of images (BUC, Lin et al., AAAI 2019): a few merges of the nearest clusters at a time.

Every image starts as a cluster of its own. The distance of two clusters is that of their nearest members, and large
clusters are kept apart:

    D(A, B) = min_{i in A, j in B} ||f_i - f_j||^2 + lambda (|A| + |B|)

Pairs are joined from the smallest D on until there are m clusters fewer. As in the published code of BUC and FedUReID
sizes are those before the merges, and a cluster may take part in several of them: these are the m shortest edges of the
minimum spanning tree over clusters. Nothing of size n^2 is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from fedklpr_jax.errors import InputError

_PAIRS = 1 << 21


class Edges(NamedTuple):
    """Pairs of clusters `first` < `second`, int64 [e], and how far they are apart, `length` float32 [e]."""

    first: np.ndarray
    second: np.ndarray
    length: np.ndarray


def merge(features: ArrayLike, labels: ArrayLike, merges: int, *, size_weight: float = 0.003) -> np.ndarray:
    """The clusters after `merges` more of the nearest have been joined; of equal pairs those of the first images go
    first.

    Args:
      features: float32 [n, d].
      labels: int [n], the cluster of every image, from 0 without gaps.
      merges: by how many there shall be fewer clusters; more than there are leave one.
      size_weight: lambda, at least 0.

    Returns:
      int32 [n], clusters numbered in the order of their first image. Those of `labels` if a feature is not finite: a
      diverged model says nothing of who is near.

    Raises:
      InputError: the shape of `features`, or a negative number of merges.

    >>> merge([[0.0], [1.0], [3.0], [7.0]], [0, 1, 2, 3], 2)
    array([0, 0, 0, 1], dtype=int32)
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if features.ndim != 2 or len(features) != len(labels):
        raise InputError(f"features: shape {features.shape} is not allowed; give [{len(labels)}, d]")
    if merges < 0:
        raise InputError(f"merges: {merges} is not allowed; give a number from 0")
    labels = _by_first_image(labels)
    clusters = int(labels.max(initial=-1)) + 1
    if merges == 0 or clusters < 2 or not np.isfinite(features).all():
        return labels
    shortest = _shortest_tree_edges(features, labels, clusters, min(merges, clusters - 1), size_weight)
    joined = sp.coo_matrix((np.ones(len(shortest.first)), shortest[:2]), shape=(clusters, clusters))
    return _by_first_image(connected_components(joined, directed=False)[1][labels])


def _by_first_image(labels: np.ndarray) -> np.ndarray:
    """The same clusters numbered from 0 in the order of their first image, int32."""
    _, first, cluster = np.unique(labels, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int32)
    number[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return number[cluster]


def _shortest_tree_edges(
    features: np.ndarray, labels: np.ndarray, clusters: int, count: int, size_weight: float
) -> Edges:
    """The `count` shortest edges of the minimum spanning tree over clusters.

    An edge that is among them is also among those of any part of the graph that it lies in, so that from block to block
    only the best so far are kept.
    """
    nearest = np.full(clusters, np.inf, np.float32)
    best = Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    for here, least, near in _blocks(features, labels, size_weight):
        # Edges from every cluster to the nearest of the later ones make a forest, so that the `count`-th shortest of
        # these is no shorter than the last one wanted.
        nearest[here] = np.minimum(nearest[here], near.min(axis=1))
        bound = np.partition(nearest, count - 1)[count - 1]
        row, column = np.nonzero((near <= bound) & np.isfinite(near))
        found = Edges(here[row], column + least, near[row, column])
        best = _kruskal(Edges(*map(np.concatenate, zip(best, found, strict=True))), clusters, count)
    return best


def _blocks(
    features: np.ndarray, labels: np.ndarray, size_weight: float
) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """The distances of clusters, some images at a time: the clusters these are in, int64 [c] in order, the first of
    them, and float32 [c, clusters from that one on] between them and each later cluster, infinity elsewhere."""
    order = np.argsort(labels, kind="stable")
    points, cluster = features[order], labels[order].astype(np.int64)
    squares = np.einsum("ij,ij->i", points, points)
    sizes = np.bincount(cluster)
    starts = np.cumsum(sizes) - sizes
    rows = max(_PAIRS // len(points), 1)
    for start in range(0, len(points), rows):
        block, least = slice(start, start + rows), int(cluster[start])
        others = slice(int(starts[least]), None)
        near = squares[block, None] + squares[None, others] - 2 * points[block] @ points[others].T
        np.maximum(near, 0, out=near)
        here, first_rows = np.unique(cluster[block], return_index=True)
        near = np.minimum.reduceat(near, starts[least:] - starts[least], axis=1)
        near = np.minimum.reduceat(near, first_rows, axis=0)
        near += np.float32(size_weight) * (sizes[here][:, None] + sizes[None, least:]).astype(np.float32)
        yield here, least, np.where(here[:, None] < np.arange(least, len(sizes)), near, np.float32(np.inf))


def _kruskal(edges: Edges, clusters: int, count: int) -> Edges:
    """The first `count` edges, shortest first, that each join two parts not joined by shorter ones."""
    pair = edges.first * clusters + edges.second
    order = np.lexsort((pair, edges.length))
    # A cluster that lies in two blocks is met twice; the shorter of two edges comes first.
    order = order[np.sort(np.unique(pair[order], return_index=True)[1])]
    # Ranks instead of lengths: no two are equal, and none is 0, which scipy would take for no edge.
    rank = np.arange(1, len(order) + 1, dtype=np.float64)
    shape = (clusters, clusters)
    tree = minimum_spanning_tree(sp.csr_matrix((rank, (edges.first[order], edges.second[order])), shape=shape))
    chosen = order[np.sort(tree.data).astype(np.int64)[:count] - 1]
    return Edges(*(values[chosen] for values in edges))
