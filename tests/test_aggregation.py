"""Weights and the sparse-skipping mean, against hand-computed numbers and a NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import aggregation as agg


def test_pruned_entries_are_left_out_of_the_mean():
    params = {"w": jnp.array([[2.0, 0, 4, 0], [4.0, 6, 0, 0]])}
    masks = {"w": jnp.array([[True, False, True, False], [True, True, False, False]])}
    previous = {"w": jnp.full(4, 9.0)}
    stacked = agg.masked_mean(params, masks, jnp.array([0.5, 0.5]), previous)
    assert stacked["w"].tolist() == [3, 6, 4, 9]
    rows = [jax.tree.map(lambda x, k=k: x[k], params) for k in range(2)]
    kept = [jax.tree.map(lambda x, k=k: x[k], masks) for k in range(2)]
    assert agg.masked_mean(rows, kept, jnp.array([0.5, 0.5]), previous)["w"].tolist() == [3, 6, 4, 9]
    weighted = agg.masked_mean(params, masks, jnp.array([3.0, 1.0]), previous)
    assert weighted["w"].tolist() == [2.5, 6, 4, 9]


def test_without_masks_it_is_the_weighted_mean_and_dtypes_stay():
    params = {"w": jnp.array([[2.0, 4.0], [4.0, 8.0]], jnp.bfloat16)}
    mean = agg.masked_mean(params, None, jnp.array([1.0, 3.0]), {"w": jnp.zeros(2, jnp.bfloat16)})
    assert mean["w"].dtype == jnp.bfloat16 and mean["w"].tolist() == [3.5, 7.0]


def test_a_client_of_weight_zero_cannot_poison_the_mean():
    params = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    assert agg.masked_mean(params, None, jnp.array([1.0, 0.0]), jnp.zeros(2)).tolist() == [1.0, 2.0]
    nobody = agg.masked_mean(params, None, jnp.zeros(2), jnp.array([7.0, 8.0]))
    assert nobody.tolist() == [7.0, 8.0]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_any_number_of_clients_gives_the_mean_numpy_gives(clients, seed):
    # Below, at and beyond one chunk: unrolled, scanned, and scanned with a rest.
    random = np.random.default_rng(seed)
    params = random.normal(size=(clients, 3, 2)).astype(np.float32)
    masks = random.random((clients, 3, 2)) < 0.6
    weights = random.random(clients).astype(np.float32) + 0.01
    previous = random.normal(size=(3, 2)).astype(np.float32)
    found = jax.jit(agg.masked_mean)(params, masks, weights, previous)
    w = weights[:, None, None] * masks
    expected = np.where(w.sum(0) > 0, (w * params).sum(0) / np.maximum(w.sum(0), 1e-9), previous)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_klaw_by_hand():
    a = jnp.array([1.0, 3.0, 5.0])  # median 3
    np.testing.assert_allclose(agg.klaw(a), [1 / 4, 1 / 6, 1 / 8], rtol=1e-6)
    assert agg.klaw(a, sign="gain").tolist() == [1, 3, 5]
    # A client that does not count changes neither its own weight nor the median.
    found = agg.klaw(jnp.array([1.0, 3.0, 5.0, 1e9]), where=jnp.array([True, True, True, False]))
    np.testing.assert_allclose(found, [1 / 4, 1 / 6, 1 / 8, 0], rtol=1e-6)
    assert np.isfinite(agg.klaw(jnp.zeros(3))).all()
    with pytest.raises(ValueError, match="sign"):
        agg.klaw(a, sign="both")


def test_praw_by_hand():
    r = jnp.array([0.0, 0.5, 0.75])
    assert agg.praw(r).tolist() == [1, 2, 4]
    assert agg.praw(r, form="dense").tolist() == [1, 0.5, 0.25]
    assert agg.praw(r, form="none").tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="form"):
        agg.praw(r, form="square")


def test_klpwa_by_hand():
    a, b = jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])
    assert agg.klpwa(a, b).tolist() == [0.25, 0.75]
    np.testing.assert_allclose(agg.klpwa(a, b, form="sum", mix=0.2), [0.45, 0.55], rtol=1e-6)
    with pytest.raises(ValueError, match="form"):
        agg.klpwa(a, b, form="max")


def test_the_cap_binds_and_its_excess_goes_to_the_others():
    # K = 4, cap 2 -> at most 0.5; the other three share the rest as 2 : 1 : 1.
    found = agg.klpwa(jnp.array([100.0, 2.0, 1.0, 1.0]), jnp.ones(4), cap=2.0)
    np.testing.assert_allclose(found, [0.5, 0.25, 0.125, 0.125], rtol=1e-5)
    # Spreading can push the next one over: it is capped too.
    np.testing.assert_allclose(agg.capped(jnp.array([0.6, 0.3, 0.1]), 1.2), [0.4, 0.4, 0.2], rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=12),
    st.floats(1, 13),
    st.sampled_from(["product", "sum"]),
    st.integers(0, 2**31 - 1),
)
def test_weights_are_finite_sum_to_one_and_respect_the_cap(values, cap, form, seed):
    random = np.random.default_rng(seed)
    counted = random.random(len(values)) < 0.8
    counted[random.integers(len(values))] = True
    weights = np.asarray(agg.klpwa(
        agg.klaw(jnp.array(values), where=jnp.array(counted)), agg.praw(jnp.array(random.random(len(values)))),
        form=form, cap=cap, where=jnp.array(counted),
    ))  # fmt: skip
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-4)
    assert (weights[~counted] == 0).all()
    if cap < counted.sum():
        assert weights.max() <= cap / counted.sum() + 1e-4


def test_image_weights_leave_the_refused_out():
    weights = agg.image_weights(jnp.array([10.0, 30.0, 100.0]), jnp.array([True, True, False]))
    assert weights.tolist() == [0.25, 0.75, 0.0]
    assert agg.image_weights(jnp.array([10.0, 30.0]), jnp.array([False, False])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ([1.0, 3.0, 0.0], [0.25, 0.75, 0.0]),
        ([0.0, 0.0, 2.0], [0.0, 0.0, 1.0]),
        ([0.0, 0.0, 0.0], [0.2, 0.3, 0.5]),
        ([4e-13, 3e-13, 0.0], [0.2, 0.3, 0.5]),
        ([1e-9, 1e-9, 2e-9], [0.25, 0.25, 0.5]),
    ],
)
def test_distance_weights_by_hand(moved, expected):
    found = agg.distance_weights(jnp.array(moved), jnp.array([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_distance_weights_where_nobody_is_left():
    assert agg.distance_weights(jnp.zeros(2), jnp.zeros(2)).tolist() == [0.0, 0.0]
