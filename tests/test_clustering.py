"""Clustering against the definitions written out densely, against numbers by hand, and within its memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.clustering import cluster, nearest_points
from fedklpr_jax.errors import InputError
from tests.clusterings import clumps, definition, lattice, problems, settings_of_clustering


def at_angles(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@settings(deadline=None, max_examples=150)
@given(features=problems(), k1=st.integers(1, 24), k2=st.integers(1, 8), **settings_of_clustering)
def test_equals_the_definitions(features, k1, k2, eps, min_samples):
    result = cluster(features, k1=k1, k2=k2, eps=eps, min_samples=min_samples)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, definition(features, k1, k2, eps, min_samples))


@pytest.mark.parametrize("copies", [1, 6])
def test_equals_the_definitions_over_several_blocks(copies):
    rng = np.random.default_rng(3)
    features = clumps(rng, 600 // copies, width=16, people=36 // copies, noise=0.8)
    features = features[rng.permutation(np.repeat(np.arange(len(features)), copies))]
    result = cluster(features)
    assert result.max() > 3
    np.testing.assert_array_equal(result, definition(features, 20, 6, 0.5, 4))


def test_hand_computed():
    # k1 = 1, k2 = 1: 0 and 10 degrees are mutual neighbours, 40 is alone. With a = exp(-(2 - 2 cos 10)):
    # V0 = (1, a) / (1 + a) and V1 = (a, 1) / (1 + a) share 2a / (1 + a), so they are 1 - a = 0.02993 apart.
    points = at_angles(0, 10, 40)
    apart = {"k1": 1, "k2": 1, "min_samples": 2}
    assert cluster(points, eps=0.0299, **apart).tolist() == [-1, -1, -1]
    assert cluster(points, eps=0.03, **apart).tolist() == [0, 0, -1]
    # k2 = 2: images 0 and 1 both average V0 and V1 to (1, 1, 0) / 2; image 2 averages V2 and V1, its half in the
    # corner is its own and all of the other half is shared: 1 - 0.5 / 1.5 = 2/3.
    assert cluster(points, k1=1, k2=2, eps=0.66, min_samples=2).tolist() == [0, 0, -1]
    assert cluster(points, k1=1, k2=2, eps=0.67, min_samples=2).tolist() == [0, 0, 0]


def test_a_distance_of_exactly_eps_makes_neighbours():
    # Orthogonal images rank each other by index: 0: 0 1 2, 1: 1 0 2, 2: 2 0 1, 3: 3 0 1. With k1 = 2 the sets are
    # {0, 1, 2} three times, and {3}. k2 = 3 makes the first three V equal to (1, 1, 1, 0) / 3 and that of image 3 one
    # third its own: two thirds are shared, which is a distance of 1 - (2/3) / (4/3) = 1/2.
    assert cluster(np.eye(4), k1=2, k2=3, eps=0.5, min_samples=4).tolist() == [0, 0, 0, 0]
    assert cluster(np.eye(4), k1=2, k2=3, eps=0.49, min_samples=3).tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize("seed", range(4))
def test_order_of_images_changes_names_only(seed):
    rng = np.random.default_rng(seed)
    features = clumps(rng, 120)
    shuffled = rng.permutation(120)
    chosen = {"k1": 8, "k2": 3, "min_samples": 1}  # no border points, whose cluster hangs on the order
    before, after = cluster(features, **chosen)[shuffled], cluster(features[shuffled], **chosen)
    assert before.max() > 2
    np.testing.assert_array_equal(before[:, None] == before, after[:, None] == after)


def test_lengths_of_features_do_not_matter():
    rng = np.random.default_rng(1)
    features = clumps(rng, 90)
    expected = cluster(features, k1=8)
    assert expected.max() > 1
    scales = 2.0 ** rng.integers(-70, 70, size=(90, 1))  # squares of these leave float32
    np.testing.assert_array_equal(cluster((features * scales).astype(np.float32), k1=8), expected)


def test_nothing_in_common_is_noise():
    assert cluster(np.eye(30), k1=1, k2=1, min_samples=3).tolist() == [-1] * 30


@pytest.mark.parametrize("count", [1, 2, 5, 60])
def test_copies_of_one_image_are_one_cluster(count):
    for value in (0.0, 1.5):
        result = cluster(np.full((count, 3), value), min_samples=2)
        assert result.tolist() == ([-1] if count == 1 else [0] * count)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_model_finds_no_cluster(bad):
    features = np.ones((12, 4), np.float32)
    assert cluster(features).tolist() == [0] * 12
    features[7, 2] = bad
    assert cluster(features).tolist() == [-1] * 12


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_nothing_to_cluster(shape):
    result = cluster(np.zeros(shape))
    assert result.dtype == np.int32 and result.tolist() == [-1] * shape[0]


def test_ties_at_the_cut_go_by_index():
    rng = np.random.default_rng(0)
    points = np.unique(lattice(rng, 300), axis=0)
    place = rng.integers(len(points), size=900)
    images = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1)
    images = images.astype(np.float32)
    similar = (images @ images.T)[place][:, place]
    np.fill_diagonal(similar, 9)
    expected = np.argsort(-similar, axis=1, kind="stable")
    for count in (1, 7, 21, 900):
        np.testing.assert_array_equal(nearest_points(images, place, count), expected[:, :count])


def test_no_array_of_all_pairs():
    features = clumps(np.random.default_rng(0), 6000, width=32, people=300)
    tracemalloc.start()
    try:
        result = cluster(features)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.max() > 100
    assert peak < 6000 * 6000 * 4 / 2, f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros(3)}, "features: shape (3,)"),
        ({"k1": 0}, "k1: 0"),
        ({"k2": 0}, "k2: 0"),
        ({"eps": 0.0}, "eps: 0.0"),
        ({"eps": 1.0}, "eps: 1.0"),
        ({"min_samples": 0}, "min_samples: 0"),
    ],
)
def test_mistakes_stop_with_one_line(change, message):
    with pytest.raises(InputError) as caught:
        cluster(**({"features": np.ones((3, 2))} | change))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
