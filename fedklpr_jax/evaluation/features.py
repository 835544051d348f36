"""From features to the numbers of a table: what a re-ID task reports of one client."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedklpr_jax.data.site import Images
from fedklpr_jax.evaluation.ranking import JUNK_ID, euclidean_distances, evaluate_ranking, query_scores
from fedklpr_jax.evaluation.rerank import rerank

TOP = 10


class Evaluation(NamedTuple):
    """One client's test result.

    Attributes:
      metrics: `rank1`, `rank5`, `rank10`, `map`, `minp` in [0, 1] and `valid_queries`.
      average_precisions: float64 [q], NaN for a query without a match.
      top: int [q, 10], gallery rows nearest to each query, junk left out; -1 where the gallery is shorter.
    """

    metrics: dict[str, float]
    average_precisions: np.ndarray
    top: np.ndarray


def evaluate_features(
    query_features: np.ndarray,
    gallery_features: np.ndarray,
    query: Images,
    gallery: Images,
    *,
    average_precision: str = "standard",
    rerank_lists: bool = False,
) -> Evaluation:
    """CMC, mAP and mINP of L2-normalised features under the cross-camera protocol.

    Args:
      query_features: float32 [q, d].
      gallery_features: float32 [g, d].
      query: the query's identities and cameras.
      gallery: the gallery's.
      average_precision: `standard` or `trapezoidal`.
      rerank_lists: k-reciprocal re-ranking of the lists first (k1 20, k2 6, lambda 0.3).

    Raises:
      InputError: no query has a match under another camera, or a feature is not finite.
    """
    distances = euclidean_distances(query_features, gallery_features)
    # A diverged model has distances that are not finite; it is ranked as it is, last.
    if rerank_lists and np.isfinite(distances).all():
        distances = rerank(
            distances,
            euclidean_distances(query_features, query_features),
            euclidean_distances(gallery_features, gallery_features),
        )
    labels = (query.ids, gallery.ids, query.cams, gallery.cams)
    ranking = evaluate_ranking(distances, *labels, max_rank=TOP, average_precision=average_precision)  # type: ignore[arg-type]
    scores = query_scores(distances, *labels, average_precision=average_precision)  # type: ignore[arg-type]
    metrics = {
        "rank1": float(ranking.cmc[0]),
        "rank5": float(ranking.cmc[4]),
        "rank10": float(ranking.cmc[9]),
        "map": ranking.mean_ap,
        "minp": ranking.mean_inp,
        "valid_queries": ranking.valid_queries,
    }
    return Evaluation(metrics, scores.ap, _top(distances, query, gallery))


def _top(distances: np.ndarray, query: Images, gallery: Images) -> np.ndarray:
    same = (query.ids[:, None] == gallery.ids[None]) & (query.cams[:, None] == gallery.cams[None])
    shown = np.where(same | (gallery.ids == JUNK_ID)[None], np.inf, distances)
    order = np.argsort(shown, axis=1, kind="stable")[:, :TOP]
    order[np.isinf(np.take_along_axis(shown, order, axis=1))] = -1
    short = TOP - order.shape[1]
    return np.pad(order, ((0, 0), (0, short)), constant_values=-1)
