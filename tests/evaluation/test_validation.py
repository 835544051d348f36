"""The jitted validation score against the host's ranking."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.evaluation import euclidean_distances, query_scores, retrieval_map

SIZE = 16
score = jax.jit(retrieval_map)


def host_map(features, ids, cams, same_camera):
    """Mean AP by query_scores; cameras of its own for every image leave out only the image itself."""
    cams = np.arange(len(ids)) if same_camera else cams
    scores = query_scores(euclidean_distances(features, features), ids, ids, cams, cams)
    return scores.ap[scores.valid].mean() if scores.valid.any() else 0.0


def draw(seed, count, levels, people=4):
    """Whole-number features: distances are exact in float32, and few levels make many ties."""
    rng = np.random.default_rng(seed)
    features = rng.integers(levels, size=(count, 2)).astype(np.float32)
    return features, rng.integers(-1, people, count).astype(np.int32), rng.integers(3, size=count).astype(np.int32)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 200]), st.booleans())
def test_equals_the_host(seed, levels, same_camera):
    features, ids, cams = draw(seed, SIZE, levels)
    result = score(features, ids, cams, np.ones(SIZE, bool), same_camera)
    assert result.dtype == jnp.float32 and result.shape == ()
    assert float(result) == pytest.approx(host_map(features, ids, cams, same_camera), abs=1e-6)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(1, SIZE), st.sampled_from([3, 200]), st.booleans())
def test_padding_changes_nothing(seed, count, levels, same_camera):
    features, ids, cams = draw(seed, count, levels)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(SIZE, count, replace=False))
    # Padding of real-looking labels, with features that would spoil any sum.
    padded = rng.choice(np.array([0, 1, np.nan, np.inf, 1e30], np.float32), (SIZE, 2))
    padded_ids, padded_cams = rng.integers(4, size=SIZE).astype(np.int32), rng.integers(3, size=SIZE).astype(np.int32)
    padded[rows], padded_ids[rows], padded_cams[rows] = features, ids, cams
    valid = np.zeros(SIZE, bool)
    valid[rows] = True
    result = score(padded, padded_ids, padded_cams, valid, same_camera)
    assert float(result) == pytest.approx(host_map(features, ids, cams, same_camera), abs=1e-6)


def test_hand_computed():
    features = jnp.array([[0.0], [1.0], [3.0], [3.5]])
    ids, cams = jnp.array([1, 1, 2, 1]), jnp.array([0, 0, 0, 2])
    ones = jnp.ones(4, bool)
    # Own camera out: 0 and 1 match only 3.5, behind 3; 3.5 finds 3, then 1 and 0.
    assert float(score(features, ids, cams, ones, False)) == pytest.approx((1 / 2 + 1 / 2 + (1 / 2 + 2 / 3) / 2) / 3)
    # Own camera in: 0 finds 1 first, then 3, then 3.5, and so does 1.
    both = (1 + 2 / 3) / 2
    assert float(score(features, ids, cams, ones, True)) == pytest.approx((both + both + (1 / 2 + 2 / 3) / 2) / 3)


def test_a_collapsed_model_scores_low():
    features = jnp.full((8, 4), 0.1)
    ids, cams = jnp.repeat(jnp.arange(4), 2), jnp.tile(jnp.arange(2), 4)
    # One match behind six negatives.
    assert float(score(features, ids, cams, jnp.ones(8, bool), False)) == pytest.approx(1 / 7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("row", [0, 2])
def test_a_diverged_model_scores_zero(bad, row):
    features = np.array([[0.0], [0.1], [5.0], [5.1]], np.float32)
    ids, cams, ones = np.array([1, 1, 2, 2]), np.array([0, 1, 0, 1]), np.ones(4, bool)
    assert float(score(features, ids, cams, ones, False)) == 1.0
    features[row] = bad
    assert float(score(features, ids, cams, ones, False)) == 0.0


def test_without_matches_the_score_is_zero():
    features = jnp.arange(4.0)[:, None]
    ids, same = jnp.array([1, 1, 2, 3]), jnp.zeros(4, jnp.int32)
    assert float(score(features, ids, same, jnp.ones(4, bool), False)) == 0.0
    assert float(score(features, ids, same, jnp.ones(4, bool), True)) > 0.0
    assert float(score(features, ids, jnp.arange(4), jnp.zeros(4, bool), False)) == 0.0


def test_vmap_over_clients_equals_one_by_one():
    clients = [draw(seed, SIZE, 50) for seed in range(3)]
    features, ids, cams = (np.stack(x) for x in zip(*clients, strict=True))
    valid = np.arange(SIZE) < np.array([[16], [9], [0]])
    flags = np.array([False, True, False])
    together = jax.jit(jax.vmap(retrieval_map))(features, ids, cams, valid, flags)
    one_by_one = [score(*client) for client in zip(features, ids, cams, valid, flags, strict=True)]
    np.testing.assert_allclose(together, one_by_one, atol=1e-7)
    assert together[0] > 0 and together[2] == 0


def test_half_precision_features_are_scored_in_single_precision():
    features, ids, cams = draw(1, SIZE, 9)
    run = partial(score, ids=ids, cams=cams, valid=np.ones(SIZE, bool), same_camera=False)
    assert float(run(jnp.asarray(features, jnp.bfloat16))) == float(run(features))


def test_only_queries_are_averaged_and_all_the_others_are_ranked():
    features = jnp.array([[0.0], [1.0], [3.0], [3.5]])
    ids, cams = jnp.array([1, 1, 2, 1]), jnp.array([0, 0, 0, 2])
    ones = jnp.ones(4, bool)

    def of(*queries):
        return float(score(features, ids, cams, ones, True, jnp.array(queries)))

    # 0 and 1 find each other, then 3, then 3.5; 3.5 finds 3 first.
    near, far = (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2
    assert of(True, False, False, False) == pytest.approx(near)
    assert of(False, False, False, True) == pytest.approx(far)
    assert of(True, False, False, True) == pytest.approx((near + far) / 2)
    # The only one of its identity is no query, and nobody is none.
    assert of(True, False, True, False) == pytest.approx(near)
    assert of(False, False, True, False) == of(False, False, False, False) == 0.0
    assert of(True, True, True, True) == float(score(features, ids, cams, ones, True))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_with_queries_it_equals_the_host(seed, same_camera):
    features, ids, cams = draw(seed, SIZE, 200)
    queries = np.random.default_rng(seed).random(SIZE) < 0.4
    scores = query_scores(
        euclidean_distances(features, features), ids, ids, *[np.arange(SIZE) if same_camera else cams] * 2
    )
    counted = scores.valid & queries
    expected = scores.ap[counted].mean() if counted.any() else 0.0
    found = score(features, ids, cams, np.ones(SIZE, bool), same_camera, queries)
    assert float(found) == pytest.approx(expected, abs=1e-6)
