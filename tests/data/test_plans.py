from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.data.plans import identity_plan
from fedklpr_jax.errors import InputError

LABELS = st.lists(st.integers(-1, 12), max_size=80).map(lambda rows: np.array(rows, np.int32))


def market_like() -> np.ndarray:
    """12,936 images of 751 people with a long tail, as in Market-1501."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(751), np.maximum(rng.geometric(1 / 17, 751), 2))[:12936]
    assert len(labels) == 12936
    return rng.permutation(labels).astype(np.int32)


@settings(deadline=None, max_examples=150)
@given(LABELS, st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
def test_every_batch_is_p_by_k(labels: np.ndarray, people: int, shots: int, seed: int) -> None:
    plan = identity_plan(labels, people=people, shots=shots, key=(seed, 1, 2, 3))
    used = int((labels >= 0).sum())
    assert plan.dtype == np.int32 and plan.shape == (-(-used // (people * shots)), people * shots)
    if used == 0:
        return
    assert plan.min() >= 0 and plan.max() < len(labels) and np.all(labels[plan] >= 0)
    identities, counts = np.unique(labels[labels >= 0], return_counts=True)
    size = dict(zip(identities.tolist(), counts.tolist(), strict=True))
    for batch in plan.reshape(len(plan), people, shots):
        owners = labels[batch]
        assert np.all(owners == owners[:, :1])
        assert len(set(owners[:, 0].tolist())) == min(people, len(identities))
        for group, owner in zip(batch.tolist(), owners[:, 0].tolist(), strict=True):
            assert len(set(group)) == min(shots, size[owner])


@settings(deadline=None, max_examples=60)
@given(LABELS, st.integers(1, 6), st.integers(1, 4), st.lists(st.integers(0, 2**40), min_size=4, max_size=4))
def test_pure_function_of_the_key(labels: np.ndarray, people: int, shots: int, key: list[int]) -> None:
    before = labels.copy()
    one = identity_plan(labels, people=people, shots=shots, key=key)
    assert np.array_equal(one, identity_plan(labels, people=people, shots=shots, key=tuple(key)))
    assert np.array_equal(labels, before)


@pytest.mark.parametrize("place", range(4))
def test_each_part_of_the_key_matters(place: int) -> None:
    labels = np.repeat(np.arange(20), 6).astype(np.int32)
    key = [3, 1, 4, 1]
    other = list(key)
    other[place] += 1
    assert not np.array_equal(
        identity_plan(labels, people=4, shots=2, key=key), identity_plan(labels, people=4, shots=2, key=other)
    )


@pytest.mark.parametrize("seed", range(10))
def test_exact_cover_where_one_exists(seed: int) -> None:
    # 24 identities of 8 images: 48 chunks of 4 fill 6 batches of 8 people. Nothing may come twice.
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(24), 8)).astype(np.int32)
    plan = identity_plan(labels, people=8, shots=4, key=(seed, 0, 0, 0))
    assert np.array_equal(np.sort(plan.ravel()), np.arange(len(labels)))


@pytest.mark.parametrize("seed", range(10))
def test_big_identity_is_finished_although_small_ones_compete(seed: int) -> None:
    # One person needs all 5 batches; drawing by chance alone would miss one about always.
    labels = np.concatenate([np.zeros(10), np.repeat(np.arange(1, 6), 2)]).astype(np.int32)
    plan = identity_plan(labels, people=2, shots=2, key=(seed, 0, 0, 0))
    assert plan.shape == (5, 4) and np.array_equal(np.sort(plan.ravel()), np.arange(20))


def test_fewer_people_than_places_fill_the_batch_evenly() -> None:
    labels = np.array([0] * 12 + [1] * 12, np.int32)
    plan = identity_plan(labels, people=6, shots=2, key=(0, 0, 0, 0))
    assert plan.shape == (2, 12)
    assert np.all((labels[plan] == 0).sum(1) == 6)
    assert np.array_equal(np.sort(plan.ravel()), np.arange(24))


@pytest.mark.parametrize("seed", range(5))
def test_places_left_over_go_to_the_bigger_of_few_identities(seed: int) -> None:
    # 14 batches of 3: each person fills one place; by its 30 of 40 images the first is due the third every time.
    labels = np.array([0] * 30 + [1] * 10, np.int32)
    plan = identity_plan(labels, people=3, shots=1, key=(seed, 0, 0, 0))
    assert plan.shape == (14, 3) and np.all((labels[plan] == 0).sum(1) == 2)


def test_images_of_small_identities_are_visited_as_often_on_average() -> None:
    # A person with 1 image is drawn a quarter as often as one with 4, but its image then comes 4 times.
    labels = np.concatenate([np.arange(100), np.repeat(np.arange(100, 200), 4)]).astype(np.int32)
    visits = np.zeros(500)
    for epoch in range(200):
        visits += np.bincount(identity_plan(labels, people=8, shots=4, key=(0, 0, 0, epoch)).ravel(), minlength=500)
    visits /= 200
    assert abs(visits.mean() - 512 / 500) < 1e-9
    assert 0.97 < visits[:100].mean() < 1.08 and 0.97 < visits[100:].mean() < 1.08


def test_negative_labels_only_give_no_step() -> None:
    assert identity_plan(np.full(7, -1, np.int32), people=2, shots=2, key=(0, 0, 0, 0)).shape == (0, 4)


def test_market_size_is_covered() -> None:
    labels = market_like()
    for epoch in range(3):
        plan = identity_plan(labels, people=8, shots=4, key=(0, 0, 0, epoch))
        visits = np.bincount(plan.ravel(), minlength=len(labels))
        assert plan.shape == (405, 32)
        assert (visits > 0).mean() > 0.94 and visits.max() <= 3


@pytest.mark.parametrize("people, shots", [(0, 4), (4, 0), (-1, 2)])
def test_batch_must_be_positive(people: int, shots: int) -> None:
    with pytest.raises(InputError, match="people, shots"):
        identity_plan(np.zeros(4, np.int32), people=people, shots=shots, key=(0,))
