"""k-reciprocal re-ranking and Jaccard clustering as they are usually written: arrays of [n, n] for distances, ranking
and encoding, every row sorted, Python loops over images.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, equations 2 to 12.
"""

from __future__ import annotations

import time

import numpy as np
from sklearn.cluster import DBSCAN


def mutual(ranking: np.ndarray, i: int, k: int) -> np.ndarray:
    """The k-reciprocal neighbours of image i, itself among them, from the whole ranking [n, n]."""
    forward = ranking[i, : k + 1]
    return forward[(ranking[forward, : k + 1] == i).any(axis=1)]


def encode(distance: np.ndarray, ranking: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """V of all images, float32 [n, n], averaged over the `k2` nearest of each."""
    size = len(distance)
    encoding = np.zeros((size, size), np.float32)
    for i in range(size):
        members = candidates = mutual(ranking, i, k1)
        for candidate in candidates:
            others = mutual(ranking, candidate, round(k1 / 2))
            if 3 * len(np.intersect1d(others, candidates)) > 2 * len(others):
                members = np.append(members, others)
        members = np.unique(members)
        weights = np.exp(-distance[i, members])
        encoding[i, members] = weights / weights.sum()
    if k2 == 1:
        return encoding
    averaged = np.empty_like(encoding)
    for i in range(size):
        averaged[i] = encoding[ranking[i, :k2]].mean(axis=0)
    return averaged


def jaccard(encoding: np.ndarray, rows: int) -> np.ndarray:
    """Distances of the first `rows` images from all, float32 [rows, n]."""
    size = len(encoding)
    holders = [np.flatnonzero(column) for column in encoding.T]
    distance = np.empty((rows, size), np.float32)
    for i in range(rows):
        shared = np.zeros(size, np.float32)
        for column in np.flatnonzero(encoding[i]):
            having = holders[column]
            shared[having] += np.minimum(encoding[i, column], encoding[having, column])
        distance[i] = np.maximum(1 - shared / (2 - shared), 0)
    return distance


def rerank(
    query_gallery: np.ndarray,
    query_query: np.ndarray,
    gallery_gallery: np.ndarray,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> np.ndarray:
    """Distances [q, g] after re-ranking, from squared Euclidean ones; as `fedklpr_jax.evaluation.rerank` gives them."""
    queries = len(query_query)
    distance = np.concatenate(
        [
            np.concatenate([query_query, query_gallery], axis=1),
            np.concatenate([query_gallery.T, gallery_gallery], axis=1),
        ]
    )
    distance = np.power(distance, 2).astype(np.float32)
    distance = distance / distance.max(axis=1, keepdims=True)
    ranking = np.argsort(distance, axis=1).astype(np.int32)
    encoding = encode(distance, ranking, k1, k2)
    del ranking
    distance = distance[:queries]
    return ((1 - lambda_value) * jaccard(encoding, queries) + lambda_value * distance)[:, queries:]


def cluster(
    features: np.ndarray, k1: int, k2: int, eps: float, min_samples: int
) -> tuple[np.ndarray, tuple[float, ...]]:
    """The clusters of `fedklpr_jax.clustering.cluster`, and the seconds of its steps: distances and ranking, encoding,
    Jaccard distances, DBSCAN."""
    clock = [time.perf_counter()]
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 2 - 2 * features @ features.T
    # An image stands before its copies.
    np.fill_diagonal(distance, -1)
    ranking = np.argsort(distance, axis=1, kind="stable")
    np.fill_diagonal(distance, 0)
    clock.append(time.perf_counter())
    encoding = encode(distance, ranking, k1, k2)
    clock.append(time.perf_counter())
    del ranking, distance
    distance = jaccard(encoding, len(encoding))
    clock.append(time.perf_counter())
    labels = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(distance)
    clock.append(time.perf_counter())
    return labels, tuple(np.diff(clock).tolist())
