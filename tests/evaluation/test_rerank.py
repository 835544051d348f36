"""Re-ranking against a dense, set-by-set reading of the paper, and against stored results on real features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation import euclidean_distances, evaluate_ranking, rerank

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "reid_reference_vectors"


def squared(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T


def three(query, gallery, distance=squared):
    return distance(query, gallery), distance(query, query), distance(gallery, gallery)


def dense(query_gallery, query_query, gallery_gallery, k1, k2, share):
    """The definitions with Python sets and a full np.argsort; every image belongs to its own neighbours."""
    count = len(query_query)
    joint = np.block([[query_query, query_gallery], [query_gallery.T, gallery_gallery]])
    joint = np.square(joint).astype(np.float32)
    largest = joint.max(axis=1, keepdims=True)
    joint = joint / np.where(largest > 0, largest, 1)
    order = np.argsort(joint, axis=1)
    size = len(joint)

    def mutual(k):
        near = [set(row[: k + 1].tolist()) for row in order]
        return [{i} | {j for j in near[i] if i in near[j]} for i in range(size)]

    wide, narrow = mutual(k1), mutual(round(k1 / 2))
    encoding = np.zeros((size, size))
    for i in range(size):
        members = set(wide[i])
        for j in wide[i]:
            if 3 * len(narrow[j] & wide[i]) > 2 * len(narrow[j]):
                members |= narrow[j]
        columns = sorted(members)
        weights = np.exp(-joint[i, columns].astype(np.float64))
        encoding[i, columns] = weights / weights.sum()
    if k2 > 1:
        encoding = np.stack([encoding[row[:k2]].mean(axis=0) for row in order])
    smaller = np.stack([np.minimum(row, encoding[count:]).sum(axis=1) for row in encoding[:count]])
    larger = np.stack([np.maximum(row, encoding[count:]).sum(axis=1) for row in encoding[:count]])
    return (1 - share) * (1 - smaller / larger) + share * joint[:count, count:]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 8),
    gallery=st.integers(1, 30),
    k1=st.integers(1, 25),
    k2=st.integers(1, 8),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    copies=st.booleans(),
)
def test_equals_the_definitions(seed, queries, gallery, k1, k2, share, copies):
    features = np.random.default_rng(seed).normal(size=(queries + gallery, 3))
    if copies:
        features = features.round()
    inputs = three(features[:queries], features[queries:])
    result = rerank(*inputs, k1=k1, k2=k2, lambda_value=share)
    assert result.dtype == np.float32 and result.shape == (queries, gallery)
    np.testing.assert_allclose(result, dense(*inputs, k1, k2, share), atol=1e-6)


def test_hand_computed():
    # Points 0 | 1, 3 with k1 = 1: 0 and 1 are mutual, 3 is alone (its nearest, 1, prefers 0).
    # Squared twice: rows 0: (0, 1, 81) / 81, 1: (1, 0, 16) / 16, so with round(1 / 2) = 0 nothing is added:
    # V0 = (1, e^{-1/81}) / (1 + e^{-1/81}), V1 = (e^{-1/16}, 1) / (1 + e^{-1/16}), V3 = its own corner.
    points = np.array([[0.0], [1.0], [3.0]])
    result = rerank(*three(points[:1], points[1:]), k1=1, k2=1, lambda_value=0.5)
    a, b = np.exp(-1 / 81), np.exp(-1 / 16)
    minima = min(1 / (1 + a), b / (1 + b)) + min(a / (1 + a), 1 / (1 + b))
    jaccard = 1 - minima / (2 - minima)
    np.testing.assert_allclose(result, [[(jaccard + 1 / 81) / 2, 1.0]], atol=1e-6)


@pytest.mark.parametrize("copies", [False, True])
def test_more_than_one_block_of_rows(copies):
    rng = np.random.default_rng(5)
    identity = rng.normal(size=(40, 6))
    features = np.concatenate([identity[rng.integers(40, size=n)] for n in (270, 300)])
    features += rng.normal(size=features.shape) * 0.4
    if copies:  # exact ties where neighbours are cut off
        features[::3] = features[1::3]
    inputs = three(features[:270], features[270:])
    np.testing.assert_allclose(rerank(*inputs), dense(*inputs, 20, 6, 0.3), atol=1e-6)


def test_lambda_one_is_the_normalised_original():
    features = np.random.default_rng(0).normal(size=(9, 4))
    across, queries, gallery = three(features[:3], features[3:])
    largest = np.maximum(np.square(across).max(axis=1), np.square(queries).max(axis=1))
    result = rerank(across, queries, gallery, lambda_value=1.0)
    np.testing.assert_allclose(result, np.square(across) / largest[:, None], rtol=1e-5)


@pytest.mark.parametrize("copies", [5, 60])
def test_copies_and_collapsed_models_stay_finite(copies):
    collapsed = np.zeros((copies, 4), np.float32)
    result = rerank(*three(collapsed[:2], collapsed[2:], euclidean_distances))
    assert np.isfinite(result).all()
    spread = np.concatenate([collapsed, np.eye(4, dtype=np.float32)])
    assert np.isfinite(rerank(*three(spread[:2], spread[2:], euclidean_distances))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_gallery": np.zeros(3)}, "query_gallery: shape"),
        ({"query_gallery": np.zeros((0, 3))}, "query_gallery: shape"),
        ({"query_query": np.zeros((3, 3))}, "query_query: shape"),
        ({"gallery_gallery": np.zeros((2, 2))}, "gallery_gallery: shape"),
        ({"gallery_gallery": np.full((3, 3), np.nan)}, "gallery_gallery: contains NaN"),
        ({"query_gallery": np.full((2, 3), np.inf)}, "query_gallery: contains NaN"),
        ({"k1": 0}, "k1: 0"),
        ({"k2": 0}, "k2: 0"),
        ({"lambda_value": 1.5}, "lambda_value: 1.5"),
    ],
)
def test_mistakes_stop_with_one_line(change, message):
    arguments = {
        "query_gallery": np.ones((2, 3)),
        "query_query": np.ones((2, 2)),
        "gallery_gallery": np.ones((3, 3)),
    } | change
    with pytest.raises(InputError) as caught:
        rerank(**arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.skipif(not VECTORS.is_dir(), reason="needs ../shared/data/reid_reference_vectors")
@pytest.mark.parametrize(("name", "has_copies"), [("ward", True), ("mars_mini", False)])
def test_stored_results_on_real_features(name, has_copies):
    stored = np.load(VECTORS / f"{name}.npz")
    inputs = three(stored["q_feat"], stored["g_feat"])
    result = rerank(*inputs)
    expected = dense(*inputs, 20, 6, 0.3)
    np.testing.assert_allclose(result, expected, atol=1e-6, rtol=0)
    # Copies of an image are at equal distance from everything; np.argsort orders them by the processor it runs on.
    if has_copies and np.abs(expected - stored["rerank_dist"]).max() > 1e-6:
        pytest.skip("np.argsort orders equal distances otherwise on this processor than where the results were made")
    np.testing.assert_allclose(result, stored["rerank_dist"], atol=1e-6, rtol=0)
    labels = (stored["q_pid"], stored["g_pid"], stored["q_cam"], stored["g_cam"])
    ranking = evaluate_ranking(result, *labels)
    np.testing.assert_allclose(ranking.cmc, stored["cmc_rerank"], atol=1e-6)
    assert ranking.mean_ap == pytest.approx(float(stored["mAP_rerank"]), abs=1e-6)
