"""A client's test result from hand-made features in the plane."""

from __future__ import annotations

import numpy as np
import pytest

from fedklpr_jax.data.site import Images
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.features import evaluate_features
from fedklpr_jax.evaluation.ranking import euclidean_distances, evaluate_ranking
from fedklpr_jax.evaluation.rerank import rerank


def images(*people_and_cameras):
    ids, cams = np.array(people_and_cameras, np.int32).T
    return Images(np.zeros((len(ids), 2, 1, 3), np.uint8), ids, cams, tuple(map(str, range(len(ids)))))


def on_a_line(*places):
    return np.array([(place, 0.0) for place in places], np.float32)


# From the first query at 0, best first: its own picture, a stranger, a match, junk, a stranger, a match.
GALLERY = images((1, 1), (2, 2), (1, 2), (-1, 3), (3, 1), (1, 3))
PLACES = on_a_line(1, 2, 3, 4, 5, 6)


@pytest.mark.short
def test_one_query_by_hand():
    result = evaluate_features(on_a_line(0), PLACES, images((1, 1)), GALLERY)
    # Without junk the matches stand at ranks 2 and 4: AP (1/2 + 2/4) / 2, INP 2/4.
    assert result.metrics == {
        "rank1": 0.0, "rank5": 1.0, "rank10": 1.0, "map": 0.5, "minp": 0.5, "valid_queries": 1,
    }  # fmt: skip
    assert result.average_precisions.tolist() == [0.5]
    assert result.top.tolist() == [[1, 2, 4, 5, -1, -1, -1, -1, -1, -1]]
    older = evaluate_features(on_a_line(0), PLACES, images((1, 1)), GALLERY, average_precision="trapezoidal")
    # (0/1 + 1/2) / 2 and (1/3 + 2/4) / 2.
    assert older.metrics["map"] == pytest.approx((0.25 + 5 / 12) / 2)


def test_several_queries_are_averaged_and_one_without_a_match_is_not_counted():
    # From the second query at 7: 1 at 6 and 3 at 5 are strangers, 1 at 3 too, then the match at 2: rank 4 of 5.
    # The third has no second picture anywhere.
    query = images((1, 1), (2, 1), (8, 1))
    result = evaluate_features(on_a_line(0, 7, 0), PLACES, query, GALLERY)
    assert result.metrics["valid_queries"] == 2
    assert result.metrics["rank1"] == 0.0 and result.metrics["rank5"] == 1.0
    assert result.metrics["map"] == pytest.approx((0.5 + 0.25) / 2)
    assert result.metrics["minp"] == pytest.approx((0.5 + 0.25) / 2)
    np.testing.assert_array_equal(result.average_precisions, [0.5, 0.25, np.nan])
    assert result.top[1].tolist() == [5, 4, 2, 1, 0, -1, -1, -1, -1, -1]


def test_ranks_count_as_many_as_they_say_and_top_shows_ten():
    strangers = [(100 + k, 2) for k in range(12)]
    # The only match stands at rank 5, 6, 10 and 11.
    lists = ((4.5, (0.0, 1.0, 1.0)), (5.5, (0.0, 0.0, 1.0)), (9.5, (0.0, 0.0, 1.0)), (10.5, (0.0, 0.0, 0.0)))
    for place, expected in lists:
        gallery = images((1, 2), *strangers)
        result = evaluate_features(on_a_line(0), on_a_line(place, *range(1, 13)), images((1, 1)), gallery)
        assert tuple(result.metrics[name] for name in ("rank1", "rank5", "rank10")) == expected
        order = np.argsort([place, *range(1, 13)])[:10]
        assert result.top.tolist() == [order.tolist()]


def test_reranking_changes_the_lists_and_what_is_counted_on_them():
    random = np.random.default_rng(1)
    query, gallery = images(*[(p, 1) for p in range(1, 7)]), images(*[(p % 7, 2 + p % 2) for p in range(40)])
    q, g = (random.normal(size=(len(s), 2)).astype(np.float32) for s in (query, gallery))
    distances = rerank(euclidean_distances(q, g), euclidean_distances(q, q), euclidean_distances(g, g))
    expected = evaluate_ranking(distances, query.ids, gallery.ids, query.cams, gallery.cams)
    found = evaluate_features(q, g, query, gallery, rerank_lists=True)
    assert found.metrics["map"] == expected.mean_ap
    np.testing.assert_array_equal(found.top[0], np.argsort(distances[0], kind="stable")[:10])
    plain = evaluate_features(q, g, query, gallery)
    assert plain.metrics["map"] != expected.mean_ap
    np.testing.assert_array_equal(plain.top[0], np.argsort(euclidean_distances(q, g)[0], kind="stable")[:10])


def test_what_cannot_be_evaluated_says_so():
    with pytest.raises(InputError, match="none of 1 queries has a match"):
        evaluate_features(on_a_line(0), PLACES, images((9, 1)), GALLERY)
    broken = PLACES.copy()
    broken[2, 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        evaluate_features(on_a_line(0), broken, images((1, 1)), GALLERY)
    broken[2, 1] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match="NaN|finite"):
        evaluate_features(on_a_line(0), broken, images((1, 1)), GALLERY)


def test_blocks_give_what_all_queries_at_once_give():
    random = np.random.default_rng(3)
    query_features, gallery_features = (random.normal(size=(n, 5)).astype(np.float32) for n in (1100, 60))
    # Distances that are all whole numbers tie often.
    query_features, gallery_features = np.round(query_features), np.round(gallery_features)

    def people(count, ids):
        labels = random.integers(0, ids, count).astype(np.int32), random.integers(1, 4, count).astype(np.int32)
        return Images(np.zeros((count, 1, 1, 3), np.uint8), *labels, ("",) * count)

    query, gallery = people(1100, 9), people(60, 9)
    found = evaluate_features(query_features, gallery_features, query, gallery)
    distances = euclidean_distances(query_features, gallery_features)
    whole = evaluate_ranking(distances, query.ids, gallery.ids, query.cams, gallery.cams)
    assert (found.metrics["map"], found.metrics["minp"]) == (whole.mean_ap, whole.mean_inp)
    np.testing.assert_array_equal([found.metrics[f"rank{k}"] for k in (1, 5, 10)], whole.cmc[[0, 4, 9]])
    same = (query.ids[:, None] == gallery.ids) & (query.cams[:, None] == gallery.cams)
    order = np.argsort(np.where(same, np.inf, distances), axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(found.top, order)


def test_no_query_is_told():
    nobody = images((1, 1)).take(np.arange(0))
    with pytest.raises(InputError, match="none of 0 queries has a match"):
        evaluate_features(np.zeros((0, 2), np.float32), PLACES, nobody, GALLERY)
