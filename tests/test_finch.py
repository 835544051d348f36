"""One first-neighbour step: by hand, against connected components of SciPy, and against the authors' package."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fedklpr_jax.finch import first_neighbour_clusters

pytestmark = pytest.mark.short
traced = jax.jit(first_neighbour_clusters)


def at_angles(*degrees: float) -> jax.Array:
    """Points in the plane, of different lengths: only the angle counts."""
    angles = np.deg2rad(degrees)
    lengths = 1.0 + np.arange(len(degrees))
    return jnp.array(lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1), jnp.float32)


def clusters(*degrees: float, valid: list[bool] | None = None) -> list[int]:
    return traced(at_angles(*degrees), jnp.array(valid or [True] * len(degrees))).tolist()


def test_by_hand():
    # 0 and 10 are each other's first neighbours, so are 100 and 105; 25 comes to 10, and so to 0.
    assert clusters(0, 100, 10, 105, 25) == [0, 1, 0, 1, 0]
    # A chain: 0 -> 16, 16 -> 31, 31 -> 45, and 45 -> 31.
    assert clusters(0, 16, 31, 45) == [0, 0, 0, 0]
    # 0 and 40 have the same first neighbour, 20 + 1.
    assert clusters(0, 40, 21) == [0, 0, 0]


def test_numbers_follow_the_first_appearance():
    assert clusters(100, 0, 105, 10) == [0, 1, 0, 1]


def test_few_points():
    assert clusters(70) == [0]
    assert clusters(0, 180) == [0, 0]


def test_equally_near_neighbours_go_to_the_first():
    # 90 is as far from 0 as from 180; 0 and 180 have near neighbours of their own.
    square = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert traced(square, jnp.ones(5, bool)).tolist() == [0, 0, 1, 0, 1]


def test_points_that_do_not_count_are_nobodys_neighbours():
    assert clusters(0, 1, 30, 200, 210, valid=[True, False, True, True, True]) == [0, -1, 0, 1, 1]
    points = at_angles(0, 1, 30, 200, 210).at[1].set(jnp.nan)
    assert traced(points, jnp.array([True, False, True, True, True])).tolist() == [0, -1, 0, 1, 1]
    assert clusters(0, 1, 30, valid=[False, True, False]) == [-1, 0, -1]
    assert clusters(0, 1, valid=[False, False]) == [-1, -1]


def distances(points: np.ndarray) -> np.ndarray:
    unit = points.astype(np.float64) / np.linalg.norm(points, axis=1, keepdims=True)
    distance = 1.0 - unit @ unit.T
    np.fill_diagonal(distance, np.inf)
    return distance


def clear(points: np.ndarray) -> bool:
    """Whether no point has two first neighbours up to rounding."""
    nearest = np.sort(distances(points), axis=1)[:, :2]
    return bool((nearest[:, 1] - nearest[:, 0] > 1e-5).all())


def oracle(points: np.ndarray) -> np.ndarray:
    """FINCH's adjacency written out, and the components that SciPy finds in it."""
    distance = distances(points)
    first = distance.argmin(axis=1)
    pairs = [
        (i, j)
        for i in range(len(points))
        for j in range(len(points))
        if first[i] == j or first[j] == i or first[i] == first[j]
    ]
    rows, columns = np.array(pairs).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(points), len(points)))
    return connected_components(graph, directed=False)[1]


def renumbered(labels: np.ndarray) -> list[int]:
    order = list(dict.fromkeys(labels.tolist()))
    return [order.index(label) for label in labels.tolist()]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 3, 9, 40]), st.integers(0, 2**31 - 1), st.floats(0, 0.6))
def test_it_finds_the_components_that_scipy_finds(count, seed, absent):
    random = np.random.default_rng(seed)
    points = random.normal(size=(count, 3)).astype(np.float32)
    valid = random.random(count) >= absent
    assume(valid.sum() > 1 and clear(points[valid]))
    found = np.asarray(traced(points, valid))
    assert (found[~valid] == -1).all()
    assert found[valid].tolist() == renumbered(oracle(points[valid]))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31 - 1))
def test_the_order_of_the_points_does_not_matter(seed):
    random = np.random.default_rng(seed)
    points = random.normal(size=(9, 3)).astype(np.float32)
    assume(clear(points))
    order = random.permutation(9)
    everyone = np.ones(9, bool)
    shuffled = np.asarray(traced(points[order], everyone))
    assert renumbered(shuffled[np.argsort(order)]) == traced(points, everyone).tolist()


def test_it_agrees_with_the_first_partition_of_the_authors_package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of neighbour searches that are not installed
        package = pytest.importorskip("finch", reason="finch-clust is not installed")
    random = np.random.default_rng(0)
    for count in (2, 3, 9, 40):
        for _ in range(10):
            points = random.normal(size=(count, 4)).astype(np.float32)
            partitions, _, _ = package.FINCH(points, distance="cosine", verbose=False)
            assert traced(points, np.ones(count, bool)).tolist() == renumbered(partitions[:, 0])
