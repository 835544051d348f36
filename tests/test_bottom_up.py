"""Bottom-up merging: by hand, against a slow version written from the published procedure, and what always holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import bottom_up
from fedklpr_jax.bottom_up import merge
from fedklpr_jax.errors import InputError


def line(*places):
    """Images on a line."""
    return np.array(places, np.float32)[:, None]


def slowly(features, labels, merges, size_weight):
    """Pairs of images from the nearest on, sizes fixed, until so many clusters are gone."""
    labels = list(labels)
    sizes = [labels.count(label) for label in labels]
    count = len(labels)
    pairs = sorted(
        (
            float(np.sum((features[i] - features[j]) ** 2)) + size_weight * (sizes[i] + sizes[j]),
            *sorted((labels[i], labels[j])),
        )
        for i in range(count)
        for j in range(i + 1, count)
        if labels[i] != labels[j]
    )
    now = {label: label for label in labels}
    for _, first, second in pairs:
        if merges == 0:
            break
        low, high = sorted((now[first], now[second]))
        if low < high:
            now = {label: low if to == high else to for label, to in now.items()}
            merges -= 1
    first_seen: dict[int, int] = {}
    return np.array([first_seen.setdefault(now[label], len(first_seen)) for label in labels])


# --- by hand --------------------------------------------------------------------------------------


def test_the_nearest_pairs_are_joined_and_clusters_numbered_by_their_first_image():
    # Squared distances: 0-2 1, 1-3 4, 2-1 49.
    features = line(0, 8, 1, 10)
    assert merge(features, range(4), 0).tolist() == [0, 1, 2, 3]
    assert merge(features, range(4), 1).tolist() == [0, 1, 0, 2]
    assert merge(features, range(4), 2).tolist() == [0, 1, 0, 1]
    assert merge(features, range(4), 3).tolist() == [0, 0, 0, 0]
    assert merge(features, range(4), 2).dtype == np.int32


def test_a_chain_grows_in_one_call():
    # 0-1 at 1, then 1-2 at 1.21: both before 3-4 at 4. The distance of clusters is that of their nearest members.
    assert merge(line(0, 1, 2.1, 10, 12), range(5), 2).tolist() == [0, 0, 0, 1, 2]


def test_a_pair_that_is_together_already_does_not_count():
    # 0, 1, 2 within 0.04 of each other: three pairs, two merges; the third is 3-4.
    assert merge(line(0, 0.1, 0.2, 5, 6), range(5), 3, size_weight=0).tolist() == [0, 0, 0, 1, 1]


def test_the_nearest_members_decide_not_the_means():
    # Of the cluster {0, 6}, 6 is at 1 from 7 (its mean at 16); 7 and 9 are at 4.
    assert merge(line(0, 6, 7, 9), [0, 0, 1, 2], 1).tolist() == [0, 0, 0, 1]


def test_of_equal_pairs_those_of_the_first_images_are_joined():
    assert merge(line(4, 0, 5, 1), range(4), 1, size_weight=0).tolist() == [0, 1, 0, 2]
    assert merge(line(0, 1, 2, 3), range(4), 2, size_weight=0).tolist() == [0, 0, 0, 1]
    assert merge(np.zeros((5, 2)), range(5), 2).tolist() == [0, 0, 0, 1, 2]


@pytest.mark.parametrize(("size_weight", "expected"), [(0.0, [0, 0, 0, 0, 1, 2]), (0.02, [0, 0, 0, 1, 2, 2])])
def test_the_size_term_keeps_large_clusters_apart(size_weight, expected):
    # Three at 0 and one at 1: 1 + 4 lambda. The other two at 5 and 6.01: 1.0201 + 2 lambda.
    assert merge(line(0, 0, 0, 1, 5, 6.01), [0, 0, 0, 1, 2, 3], 1, size_weight=size_weight).tolist() == expected


def test_sizes_are_those_before_the_merges():
    # 0-1 is joined first (0.01 + 2 x 0.1). Then 1-2 (1 + 0.2) goes before 5-6.05 (1.1025 + 0.2), which it would not if
    # the new size of 2 counted (1 + 0.3).
    assert merge(line(0, 0.1, 1.1, 5, 6.05), range(5), 2, size_weight=0.1).tolist() == [0, 0, 0, 1, 2]


def test_no_more_clusters_than_there_are_can_go():
    assert merge(line(0, 1, 5), range(3), 7).tolist() == [0, 0, 0]
    assert merge(line(0, 1, 5), [0, 0, 0], 2).tolist() == [0, 0, 0]
    assert merge(np.empty((0, 2)), [], 2).tolist() == []


def test_a_diverged_model_merges_nothing():
    assert merge([[0.0], [np.nan], [0.1]], range(3), 1).tolist() == [0, 1, 2]


def test_mistakes_are_told():
    with pytest.raises(InputError, match=r"features: shape \(3,\) is not allowed; give \[3, d\]"):
        merge([0.0, 1.0, 2.0], range(3), 1)
    with pytest.raises(InputError, match=r"features: shape \(2, 1\) is not allowed; give \[3, d\]"):
        merge(line(0, 1), range(3), 1)
    with pytest.raises(InputError, match="merges: -1 is not allowed; give a number from 0"):
        merge(line(0, 1), range(2), -1)


# --- what always holds ----------------------------------------------------------------------------

images = st.integers(2, 24).flatmap(
    lambda count: st.tuples(
        # Whole numbers have exact distances, and many equal ones.
        st.lists(st.tuples(*[st.integers(0, 6)] * 2), min_size=count, max_size=count),
        st.lists(st.integers(0, 8), min_size=count, max_size=count),
    )
)


@settings(deadline=None, max_examples=150)
@given(images, st.integers(0, 12), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([1, 30, 1 << 21]))
def test_it_is_the_published_procedure_in_blocks_of_any_size(drawn, merges, size_weight, pairs):
    features, raw = np.array(drawn[0], np.float32), drawn[1]
    labels = merge(features, raw, 0)
    expected = slowly(features, labels, merges, size_weight)
    before, bottom_up._PAIRS = bottom_up._PAIRS, pairs
    try:
        after = merge(features, labels, merges, size_weight=size_weight)
    finally:
        bottom_up._PAIRS = before
    np.testing.assert_array_equal(after, expected)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.integers(2, 60), st.lists(st.integers(0, 8), max_size=5))
def test_so_many_clusters_go_and_none_is_ever_split(seed, count, merges):
    features = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    labels = np.arange(count)
    for fewer in merges:
        after = merge(features, labels, fewer)
        clusters = int(labels.max()) + 1
        assert int(after.max()) + 1 == max(clusters - fewer, 1)
        # Without gaps, in the order of the first image of each.
        _, first = np.unique(after, return_index=True)
        assert (np.diff(first) > 0).all() and len(first) == after.max() + 1
        for cluster in range(clusters):
            assert len(set(after[labels == cluster].tolist())) == 1
        labels = after
