"""What the tests of both forms of clustering share: features, and the definitions written out densely."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

ROUNDING = 1e-6


def definition(features, k1, k2, eps, min_samples):
    """Sets with Python, dense distances, scikit-learn; in float64, where distances equal to nine places are ties."""
    features = np.asarray(features, np.float64)
    size = len(features)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    features = features / np.where(length > 0, length, 1)
    distance = (2 - 2 * features @ features.T).round(9)
    order = []
    for i in range(size):
        others = [j for j in np.argsort(distance[i], kind="stable") if j != i]
        order.append([i, *others])

    def mutual(k):
        near = [set(row[: k + 1]) for row in order]
        return [{j for j in near[i] if i in near[j]} for i in range(size)]

    wide, narrow = mutual(k1), mutual(round(k1 / 2))
    encoding = np.zeros((size, size))
    for i in range(size):
        members = set(wide[i])
        for j in wide[i]:
            if 3 * len(narrow[j] & wide[i]) > 2 * len(narrow[j]):
                members |= narrow[j]
        columns = sorted(members)
        weights = np.exp(-distance[i, columns])
        encoding[i, columns] = weights / weights.sum()
    encoding = np.stack([encoding[row[:k2]].mean(axis=0) for row in order])
    shared = np.stack([np.minimum(row, encoding).sum(axis=1) for row in encoding])
    jaccard = np.maximum(1 - shared / (2 - shared), 0)
    return DBSCAN(eps=eps + ROUNDING, min_samples=min_samples, metric="precomputed").fit_predict(jaccard)


def clumps(rng, count, width=8, people=6, noise=0.5):
    """Float32 [count, width]: a point per person plus noise."""
    centres = rng.normal(size=(people, width))
    return (centres[rng.integers(people, size=count)] + noise * rng.normal(size=(count, width))).astype(np.float32)


def lattice(rng, count, width=6):
    """Float32 [count, width] of -1, 0 and 1, one or four of them not 0: lengths, products and so ties are exact."""
    features = np.zeros((count, width), np.float32)
    for row in features:
        where = rng.choice(width, size=rng.choice([0, 1, 4, 4, 4], p=[0.04, 0.24, 0.24, 0.24, 0.24]), replace=False)
        row[where] = rng.choice([-1, 1], size=len(where))
    return features


@st.composite
def problems(draw, largest=40):
    """Features [n, d] with or without ties and copies, n up to `largest`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, largest))
    features = draw(st.sampled_from([clumps, lattice]))(rng, count)
    if draw(st.booleans()):  # each image a few times, anywhere
        features = features[rng.integers(max(1, count // draw(st.integers(2, 10))), size=count)]
    return features


settings_of_clustering = {
    "eps": st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]),
    "min_samples": st.integers(1, 6),
}
