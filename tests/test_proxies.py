"""Proxies against a dictionary of lists, their batches, and how a batch moves them."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import proxies

POINTS = 12
labelled_points = st.lists(
    st.tuples(st.integers(-2, 3), st.integers(0, 2)), min_size=POINTS, max_size=POINTS
).map(lambda rows: np.array(rows, np.int32).T)
seeds = st.integers(0, 2**31 - 1)

build = jax.jit(proxies.build)


@partial(jax.jit, static_argnames=("people", "shots"))
def plan(bank, seed, *, people, shots):
    return proxies.plan(bank, jax.random.key(seed), proxies=people, shots=shots)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw_features(seed, count=POINTS):
    return unit(np.random.default_rng(seed).normal(size=(count, 3))).astype(np.float32)


def bank_of(*sizes):
    """Proxies of so many points each, the last of them points that sit out."""
    clusters = np.repeat([*range(len(sizes) - 1), -1], sizes).astype(np.int32)
    return proxies.build(draw_features(0, len(clusters)), clusters, np.zeros(len(clusters), np.int32))


# --- build ----------------------------------------------------------------------------------------


@pytest.mark.short
def test_a_bank_by_hand():
    features = np.float32([[1, 0], [0, 1], [0.6, 0.8], [1, 0], [0, 1], [-1, 0]])
    bank = build(features, np.int32([2, 2, -1, 0, 2, 0]), np.int32([1, 1, 0, 3, 0, 3]))
    # In the order of cluster and camera: (0, 3) of 3 and 5, (2, 0) of 4, (2, 1) of 0 and 1.
    assert bank.of_point.tolist() == [2, 2, -1, 0, 1, 0]
    assert bank.clusters.tolist() == [0, 2, 2, -1, -1, -1]
    assert bank.cameras.tolist() == [3, 0, 1, -1, -1, -1]
    half = math.sqrt(0.5)
    # Opposite points have no direction between them: such a proxy is 0, not NaN.
    np.testing.assert_allclose(bank.features[:3], [[0, 0], [0, 1], [half, half]], atol=1e-6)
    assert not np.any(bank.features[3:])


@settings(deadline=None, max_examples=60)
@given(labelled_points, seeds)
def test_a_bank_is_that_of_a_dictionary_of_lists(labels, seed):
    clusters, cameras = labels
    features = draw_features(seed)
    members: dict[tuple[int, int], list[int]] = {}
    for point, place in enumerate(zip(clusters.tolist(), cameras.tolist(), strict=True)):
        if place[0] >= 0:
            members.setdefault(place, []).append(point)
    bank = build(features, clusters, cameras)
    of_point = np.full(POINTS, -1)
    for number, place in enumerate(sorted(members)):
        of_point[members[place]] = number
        assert (int(bank.clusters[number]), int(bank.cameras[number])) == place
        mean = features[members[place]].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(bank.features[number], mean / np.linalg.norm(mean), atol=1e-4)
    np.testing.assert_array_equal(bank.of_point, of_point)
    for values, empty in ((bank.clusters, -1), (bank.cameras, -1), (bank.features, 0)):
        assert (np.asarray(values)[len(members) :] == empty).all()
    assert bank.of_point.dtype == bank.clusters.dtype == bank.cameras.dtype == jnp.int32


def test_what_sits_out_has_no_part_even_if_it_is_not_finite():
    features = draw_features(1)
    features[3] = np.nan
    clusters = np.zeros(POINTS, np.int32)
    clusters[3] = -1
    bank = build(features, clusters, np.zeros(POINTS, np.int32))
    assert np.isfinite(bank.features).all() and int(bank.of_point[3]) == -1


def test_nobody_takes_part_in_a_blank_bank():
    nobody = build(draw_features(2), np.full(POINTS, -1, np.int32), np.zeros(POINTS, np.int32))
    for found, blank in zip(nobody, proxies.blank(POINTS, 3), strict=True):
        assert found.dtype == blank.dtype
        np.testing.assert_array_equal(found, blank)


# --- plan -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(labelled_points, seeds)
def test_every_proxy_comes_once_with_points_of_its_own(labels, seed):
    people, shots = 2, 3
    bank = build(draw_features(seed), *labels)
    rows, steps = plan(bank, seed, people=people, shots=shots)
    assert rows.shape == (POINTS // people, people * shots) and rows.dtype == steps.dtype == jnp.int32
    of_point = np.asarray(bank.of_point)
    sizes = Counter(of_point[of_point >= 0].tolist())
    assert int(steps) == math.ceil(len(sizes) / people)
    groups = np.asarray(rows)[: int(steps)].reshape(-1, shots)
    owners = of_point[groups]
    assert (owners >= 0).all() and (owners == owners[:, :1]).all()
    order = owners[:, 0].tolist()
    assert sorted(order[: len(sizes)]) == sorted(sizes)
    # The last batch is filled up from the first.
    assert order[len(sizes) :] == order[: len(order) - len(sizes)]
    for group, owner in zip(groups, order, strict=True):
        # The same point twice only where the proxy has too few.
        assert len(set(group.tolist())) == min(shots, sizes[owner])


def test_too_few_points_go_round():
    rows, steps = plan(bank_of(2, 1, 5), 0, people=2, shots=5)
    assert int(steps) == 1
    assert sorted(Counter(rows[0].tolist()).items()) in ([(0, 3), (1, 2), (2, 5)], [(0, 2), (1, 3), (2, 5)])


def test_which_points_and_which_proxies_meet_is_drawn_anew_for_every_key():
    bank = bank_of(6, 6, 6, 6)
    batches = [plan(bank, seed, people=2, shots=2)[0][0] for seed in range(40)]
    assert set(np.concatenate(batches).tolist()) == set(range(18))
    assert {tuple(bank.of_point[batch[::2]].tolist()) for batch in batches} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }


def test_with_fewer_proxies_than_a_batch_takes_some_come_twice():
    rows, steps = plan(bank_of(2, 2, 4), 0, people=4, shots=2)
    assert int(steps) == 1
    assert Counter(rows[0].tolist()) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_without_a_proxy_there_is_no_step():
    rows, steps = plan(bank_of(0, 8), 0, people=3, shots=2)
    assert int(steps) == 0 and rows.shape == (3, 6) and ((rows >= 0) & (rows < 8)).all()


def test_the_key_decides_and_nothing_else():
    bank = bank_of(6, 6, 6, 2)
    drawn = [plan(bank, seed, people=3, shots=3)[0][0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_clients_side_by_side_get_what_each_gets_alone():
    banks = [bank_of(6, 6, 6, 2), bank_of(1, 4, 0, 15), bank_of(0, 20)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *banks)
    keys = jax.random.split(jax.random.key(0), 3)
    one = partial(proxies.plan, proxies=3, shots=3)
    rows, steps = jax.jit(jax.vmap(one))(together, keys)
    assert steps.tolist() == [1, 1, 0]
    for k, (bank, key) in enumerate(zip(banks, keys, strict=True)):
        np.testing.assert_array_equal(rows[k], jax.jit(one)(bank, key)[0])


# --- move -----------------------------------------------------------------------------------------


@pytest.mark.short
def test_a_batch_moves_proxies_sample_by_sample():
    features = np.float32([[1, 0], [1, 0], [0, 1], [0, 1]])
    bank = proxies.build(features, np.int32([0, 0, 1, -1]), np.zeros(4, np.int32))
    batch = jnp.array([[0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    points = jnp.array([0, 1, 3])
    moved = jax.jit(partial(proxies.move, momentum=0.2))(bank, batch, points)
    # Proxy 0 takes the second sample from where the first one left it; point 3 has no proxy to move.
    first = np.array([0.2, 0.8]) / math.hypot(0.2, 0.8)
    second = 0.2 * first + 0.8 * np.array([0.6, 0.8])
    np.testing.assert_allclose(moved.features[0], second / np.linalg.norm(second), atol=1e-6)
    np.testing.assert_array_equal(moved.features[1:], bank.features[1:])
    for after, before in zip(moved[1:], bank[1:], strict=True):
        np.testing.assert_array_equal(after, before)
    # The other way round it ends elsewhere, and with momentum 1 nothing moves.
    backwards = proxies.move(bank, batch[::-1], points[::-1], momentum=0.2)
    assert not np.allclose(backwards.features[0], moved.features[0], atol=1e-3)
    np.testing.assert_allclose(proxies.move(bank, batch, points, momentum=1.0).features, bank.features)
