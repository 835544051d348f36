"""Ranking against hand-computed numbers, a naive loop, and stored results on real features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation import euclidean_distances, evaluate_ranking, query_scores
from fedklpr_jax.evaluation.ranking import _COUNTING_LIMIT

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "reid_reference_vectors"

# Query ID 1 camera 1; the gallery best first. Junk: the first (own camera) and the fourth (-1).
WORKED = ([[1.0, 2, 3, 4, 5, 6]], [1], [1, 2, 1, -1, 3, 1], [1], [1, 2, 2, 3, 1, 3])


def naive(distances, q_ids, g_ids, q_cams, g_cams, trapezoidal):
    """One query at a time, one gallery image at a time, in plain Python."""
    scores = []
    for i, row in enumerate(distances):
        entries = []
        for j, distance in enumerate(row):
            if g_ids[j] == -1 or (g_ids[j] == q_ids[i] and g_cams[j] == q_cams[i]):
                continue
            entries.append((float(distance), bool(g_ids[j] == q_ids[i])))
        entries.sort()  # False before True: at equal distance negatives lead
        found, first, last, total = 0, 0, 0, 0.0
        for position, (_, match) in enumerate(entries):
            if not match:
                continue
            after = (found + 1) / (position + 1)
            before = 1.0 if position == 0 else found / position
            total += (before + after) / 2 if trapezoidal else after
            found += 1
            first = first or position + 1
            last = position + 1
        scores.append((first, total / found, found / last) if found else None)
    return scores


def test_worked_example():
    result = evaluate_ranking(*WORKED, max_rank=10)
    assert result._fields == ("cmc", "mean_ap", "mean_inp", "valid_queries")
    assert result.cmc.dtype == np.float64
    # Ten ranks although four images are left.
    assert result.cmc.tolist() == [0.0] + [1.0] * 9
    assert (result.mean_ap, result.mean_inp, result.valid_queries) == (0.5, 2 / 4, 1)
    trapezoidal = evaluate_ranking(*WORKED, average_precision="trapezoidal")
    assert trapezoidal.mean_ap == pytest.approx(1 / 3, abs=1e-12)


def test_trapezoid_takes_one_before_a_match_at_the_head():
    result = evaluate_ranking([[1.0, 2, 3]], [1], [1, 2, 1], [0], [1, 1, 1], average_precision="trapezoidal")
    # Matches at 0 and 2: (1 + 1) / 2 and (1/2 + 2/3) / 2.
    assert result.mean_ap == pytest.approx((1 + 7 / 12) / 2, abs=1e-12)


def test_queries_without_a_match_are_skipped():
    distances = np.array([[1.0, 2], [1, 2], [1, 2], [2, 1]])
    # Query 1 has its match only in its own camera, query 2 none at all, query 3 is junk itself.
    scores = query_scores(distances, [1, 2, 9, -1], [1, 2], [0, 1, 0, 0], [1, 1])
    assert scores.valid.tolist() == [True, False, False, False]
    assert scores.first_rank.tolist() == [1, 0, 0, 0]
    assert np.isnan(scores.ap[1:]).all() and np.isnan(scores.inp[1:]).all() and scores.ap[0] == 1
    result = evaluate_ranking(distances, [1, 2, 9, -1], [1, 2], [0, 1, 0, 0], [1, 1])
    assert result.valid_queries == 1 and result.mean_ap == 1


def test_junk_queries_match_nothing_even_if_the_gallery_has_junk():
    scores = query_scores([[1.0, 2]], [-1], [-1, 2], [0], [1, 1])
    assert not scores.valid.any()


def test_a_tie_counts_against_the_match():
    # Negatives at the match's distance: match is third, whatever the column order.
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        ids = np.array([1, 2, 3, 4])[order]
        distances = np.array([[5.0, 5, 5, 7]])[:, order]
        result = evaluate_ranking(distances, [1], ids, [0], [1, 1, 1, 1], max_rank=4)
        assert result.cmc.tolist() == [0, 0, 1, 1]
        assert result.mean_ap == pytest.approx(1 / 3)
        assert result.mean_inp == pytest.approx(1 / 3)


def test_equal_positives_take_consecutive_ranks():
    result = evaluate_ranking([[1.0, 1, 1, 2]], [1], [1, 1, 1, 2], [0], [1, 1, 1, 1])
    assert result.mean_ap == 1 and result.mean_inp == 1


@pytest.mark.parametrize("images", [6, 3 * _COUNTING_LIMIT])
def test_a_collapsed_model_gets_the_worst_score(images):
    features = np.full((images, 8), 0.1, np.float32)
    ids, cams = np.repeat([1, 2], images // 2), np.tile([0, 1], images // 2)
    distances = euclidean_distances(features, features)
    assert not distances.any()
    result = evaluate_ranking(distances, ids, ids, cams, cams, max_rank=images)
    # All negatives, half of the images, stand before the first match.
    assert result.cmc[images // 2 - 1] == 0 and result.cmc[images // 2] == 1
    assert result.mean_ap < 0.5


def test_infinite_distances_rank_last():
    result = evaluate_ranking([[np.inf, 1.0, np.inf]], [1], [1, 2, 3], [0], [1, 1, 1], max_rank=3)
    assert result.cmc.tolist() == [0, 0, 1]


def test_the_input_is_left_alone():
    distances = np.random.default_rng(0).random((5, 300)).astype(np.float32)
    before = distances.copy()
    evaluate_ranking(distances, np.zeros(5), np.arange(300) % 2, np.zeros(5), np.arange(300) % 3)
    np.testing.assert_array_equal(distances, before)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 6),
    gallery=st.integers(1, 40),
    people=st.integers(1, 5),
    levels=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64, np.int32]),
    trapezoidal=st.booleans(),
)
def test_equals_a_naive_loop(seed, queries, gallery, people, levels, dtype, trapezoidal):
    rng = np.random.default_rng(seed)
    distances = rng.integers(levels, size=(queries, gallery)).astype(dtype)
    q_ids, g_ids = rng.integers(-1, people, queries), rng.integers(-1, people, gallery)
    q_ids[q_ids == -1] = people + 1
    q_cams, g_cams = rng.integers(3, size=queries), rng.integers(3, size=gallery)
    kind = "trapezoidal" if trapezoidal else "standard"
    labels = (q_ids, g_ids, q_cams, g_cams)
    expected = naive(distances, *labels, trapezoidal)
    scores = query_scores(distances, *labels, average_precision=kind)
    assert scores.valid.tolist() == [e is not None for e in expected]
    known = [e for e in expected if e]
    if not known:
        with pytest.raises(InputError):
            evaluate_ranking(distances, *labels)
        return
    np.testing.assert_allclose(np.stack(scores[:3], axis=1)[scores.valid].astype(float), known, rtol=1e-12)
    result = evaluate_ranking(distances, *labels, max_rank=7, average_precision=kind)
    first, ap, inp = np.array(known).T
    np.testing.assert_allclose(result.cmc, [(first <= k).mean() for k in range(1, 8)], rtol=1e-12)
    np.testing.assert_allclose([result.mean_ap, result.mean_inp], [ap.mean(), inp.mean()], rtol=1e-12)
    assert result.valid_queries == len(known)


@pytest.mark.parametrize("levels", [4, 10**6])
def test_many_matches_take_the_sorting_path_and_agree(levels):
    rng = np.random.default_rng(levels)
    gallery = 6 * _COUNTING_LIMIT
    distances = rng.integers(levels, size=(3, gallery)).astype(np.float32)
    g_ids, g_cams = rng.integers(-1, 2, gallery), rng.integers(3, size=gallery)
    labels = (np.array([0, 1, 1]), g_ids, np.array([0, 1, 2]), g_cams)
    assert (g_ids == 0).sum() > 1.5 * _COUNTING_LIMIT
    scores = query_scores(distances, *labels)
    expected = naive(distances, *labels, trapezoidal=False)
    np.testing.assert_allclose(np.stack(scores[:3], axis=1), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": [[1.0, np.nan]]}, "distances: row 0"),
        ({"distances": [1.0, 2.0]}, "distances: shape"),
        ({"query_ids": [1, 1]}, "query_ids: shape"),
        ({"gallery_ids": [1]}, "gallery_ids: shape"),
        ({"query_cams": [[0]]}, "query_cams: shape"),
        ({"gallery_cams": []}, "gallery_cams: shape"),
        ({"query_ids": [7]}, "query_ids: none of 1"),
        ({"max_rank": 0}, "max_rank: 0"),
        ({"average_precision": "interpolated"}, "average_precision: 'interpolated'"),
    ],
)
def test_mistakes_stop_with_one_line(change, message):
    arguments = {
        "distances": [[1.0, 2.0]],
        "query_ids": [1],
        "gallery_ids": [1, 2],
        "query_cams": [0],
        "gallery_cams": [1, 1],
    } | change
    with pytest.raises(InputError) as caught:
        evaluate_ranking(**arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_nan_is_refused_even_where_it_is_junk():
    with pytest.raises(InputError, match="row 0"):
        evaluate_ranking([[1.0, np.nan]], [1], [1, -1], [0], [1, 1])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_distances_equal_the_double_precision_ones(offset):
    rng = np.random.default_rng(3)
    query = (rng.normal(size=(700, 5)) + offset).astype(np.float32)
    gallery = (rng.normal(size=(9, 5)) + offset).astype(np.float32)
    expected = np.square(query[:, None].astype(float) - gallery[None].astype(float)).sum(axis=2)
    result = euclidean_distances(query, gallery)
    assert result.dtype == np.float32 and result.shape == (700, 9) and (result >= 0).all()
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_distances_refuse_other_widths_and_allow_empty_sides():
    with pytest.raises(InputError, match="gallery_features"):
        euclidean_distances(np.zeros((2, 3)), np.zeros((2, 4)))
    assert euclidean_distances(np.zeros((2, 3)), np.zeros((0, 3))).shape == (2, 0)


@pytest.mark.skipif(not VECTORS.is_dir(), reason="needs ../shared/data/reid_reference_vectors")
@pytest.mark.parametrize("name", ["ward", "mars_mini"])
def test_stored_results_on_real_features(name):
    stored = np.load(VECTORS / f"{name}.npz")
    labels = (stored["q_pid"], stored["g_pid"], stored["q_cam"], stored["g_cam"])
    distances = euclidean_distances(stored["q_feat"], stored["g_feat"])
    result = evaluate_ranking(distances, *labels)
    np.testing.assert_allclose(result.cmc, stored["cmc"], atol=1e-6)
    assert result.mean_ap == pytest.approx(float(stored["mAP"]), abs=1e-6)
    trapezoidal = evaluate_ranking(distances, *labels, average_precision="trapezoidal")
    assert trapezoidal.mean_ap == pytest.approx(float(stored["mAP_trapezoid"]), abs=1e-6)
