"""The traced clustering against the definitions, the host's clustering and scikit-learn's DBSCAN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from fedklpr_jax import clustering, clustering_traced
from fedklpr_jax.errors import InputError
from tests.clusterings import clumps, definition, problems, settings_of_clustering

ROOM = 48


def padded(features, rng, room=ROOM):
    """Features [room, 8] with the given rows in their order among padding of any kind, and which are real."""
    places = np.sort(rng.permutation(room)[: len(features)])
    filled = rng.normal(size=(room, 8)).astype(np.float32)
    filled[::5] = np.nan
    filled[1::5] = features[0, 0]
    filled[places] = np.pad(features, ((0, 0), (0, 8 - features.shape[1])))
    return filled, np.isin(np.arange(room), places)


@settings(deadline=None, max_examples=100)
@given(
    features=problems(),
    seed=st.integers(0, 2**32 - 1),
    neighbours=st.sampled_from([(20, 6), (5, 1), (2, 9)]),
    **settings_of_clustering,
)
def test_equals_the_definitions_whatever_the_padding(features, seed, neighbours, eps, min_samples):
    k1, k2 = neighbours
    filled, valid = padded(features, np.random.default_rng(seed))
    chosen = {"k1": k1, "k2": k2, "eps": eps, "min_samples": min_samples}
    result = np.asarray(clustering_traced.cluster(filled, valid, **chosen))
    assert result.dtype == np.int32 and (result[~valid] == -1).all()
    np.testing.assert_array_equal(result[valid], definition(features, **chosen))
    np.testing.assert_array_equal(result[valid], clustering.cluster(features, **chosen))


@pytest.mark.parametrize("copies", [1, 6])
def test_equals_the_host_over_several_blocks(copies):
    rng = np.random.default_rng(3)
    features = clumps(rng, 600 // copies, width=16, people=36 // copies, noise=0.8)
    features = features[rng.permutation(np.repeat(np.arange(len(features)), copies))]
    expected = clustering.cluster(features)
    assert expected.max() > 3
    result = clustering_traced.cluster(features, np.ones(len(features), bool))
    np.testing.assert_array_equal(result, expected)


def test_vmap_equals_a_loop():
    rng = np.random.default_rng(0)
    counts = [40, 3, 0, 31]
    many = [padded(clumps(rng, max(count, 1)), rng) for count in counts]
    features = jnp.stack([filled for filled, _ in many])
    valid = jnp.stack([real & (count > 0) for (_, real), count in zip(many, counts, strict=True)])

    def one(features, valid):
        return clustering_traced.cluster(features, valid, k1=5, k2=1, min_samples=2)

    together = jax.jit(jax.vmap(one))(features, valid)
    assert (together.max(axis=1) > 0).tolist() == [True, False, False, True]
    for row, *problem in zip(together, features, valid, strict=True):
        np.testing.assert_array_equal(row, one(*problem))


def test_order_of_images_changes_names_only():
    rng = np.random.default_rng(2)
    features = clumps(rng, ROOM)
    shuffled = rng.permutation(ROOM)
    valid = np.ones(ROOM, bool)
    chosen = {"k1": 5, "k2": 1, "min_samples": 1}
    before = np.asarray(clustering_traced.cluster(features, valid, **chosen))[shuffled]
    after = np.asarray(clustering_traced.cluster(features[shuffled], valid, **chosen))
    assert before.max() > 2
    np.testing.assert_array_equal(before[:, None] == before, after[:, None] == after)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_model_finds_no_cluster(bad):
    features, valid = np.ones((ROOM, 8), np.float32), np.arange(ROOM) < 12
    assert clustering_traced.cluster(features, valid).tolist() == [0] * 12 + [-1] * (ROOM - 12)
    features[20, 2] = bad  # padding
    assert clustering_traced.cluster(features, valid).max() == 0
    features[7, 2] = bad
    assert clustering_traced.cluster(features, valid).tolist() == [-1] * ROOM


def test_large_features_do_not_overflow():
    features, valid = clumps(np.random.default_rng(1), ROOM), np.ones(ROOM, bool)
    expected = clustering_traced.cluster(features, valid, k1=5, k2=1)
    assert expected.max() > 0
    np.testing.assert_array_equal(clustering_traced.cluster(features * 2.0**100, valid, k1=5, k2=1), expected)


def test_all_noise_and_nothing_at_all():
    assert clustering_traced.cluster(np.eye(30), np.ones(30, bool), k1=1, k2=1).tolist() == [-1] * 30
    assert clustering_traced.cluster(np.zeros((0, 4)), np.zeros(0, bool)).shape == (0,)
    assert clustering_traced.cluster(np.zeros((2, 0)), np.ones(2, bool)).tolist() == [-1, -1]


def test_first_copy_sees_equal_rows_and_no_others():
    features = np.random.default_rng(0).integers(-1, 2, size=(400, 4)).astype(np.float32)
    features[::2] *= -1  # 0 becomes -0
    expected = [np.flatnonzero((features == row).all(axis=1))[0] for row in features]
    np.testing.assert_array_equal(clustering_traced.first_copy(features), expected)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), edges=st.integers(0, 80), min_samples=st.integers(1, 5), chain=st.booleans())
def test_dbscan_equals_scikit_learn(seed, edges, min_samples, chain):
    rng = np.random.default_rng(seed)
    near = np.eye(ROOM, dtype=bool)
    near[rng.integers(ROOM, size=edges), rng.integers(ROOM, size=edges)] = True
    if chain:  # the longest way that a label can have to go
        order = rng.permutation(ROOM)
        near[order[1:], order[:-1]] = True
    near |= near.T
    expected = DBSCAN(eps=0.5, min_samples=min_samples, metric="precomputed").fit_predict(1.0 - near)
    result = jax.jit(clustering_traced.dbscan)(near, np.ones(ROOM, bool), min_samples)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros(3)}, "features: shape (3,)"),
        ({"valid": np.ones(2, bool)}, "features: shape (3, 2) with valid (2,)"),
        ({"k1": 0}, "k1: 0"),
        ({"k2": 0}, "k2: 0"),
    ],
)
def test_mistakes_stop_with_one_line(change, message):
    with pytest.raises(InputError) as caught:
        clustering_traced.cluster(**({"features": np.ones((3, 2)), "valid": np.ones(3, bool)} | change))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
