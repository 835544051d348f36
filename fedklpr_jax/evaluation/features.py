"""From features to the numbers of a table: what a re-ID task reports of one client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fedklpr_jax.data.site import Images
from fedklpr_jax.evaluation.ranking import (
    JUNK_ID,
    QueryScores,
    distance_blocks,
    euclidean_distances,
    query_scores,
    summarised,
)
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
    blocks = distance_blocks(query_features, gallery_features)
    if rerank_lists:
        blocks = _reranked(query_features, gallery_features)
    parts, tops = [], []
    for rows, distances in blocks:
        asked = query.ids[rows], query.cams[rows]
        labels = asked[0], gallery.ids, asked[1], gallery.cams
        parts.append(query_scores(distances, *labels, average_precision=average_precision))  # type: ignore[arg-type]
        tops.append(_top(distances, *labels))
    scores = QueryScores(*map(np.concatenate, zip(*parts, strict=True)))
    ranking = summarised(scores, TOP)
    metrics = {
        "rank1": float(ranking.cmc[0]),
        "rank5": float(ranking.cmc[4]),
        "rank10": float(ranking.cmc[9]),
        "map": ranking.mean_ap,
        "minp": ranking.mean_inp,
        "valid_queries": ranking.valid_queries,
    }
    return Evaluation(metrics, scores.ap, np.concatenate(tops))


def _reranked(query: np.ndarray, gallery: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """All re-ranked distances as one block."""
    distances = euclidean_distances(query, gallery)
    # A diverged model has distances that are not finite; it is ranked as it is, last.
    if np.isfinite(distances).all():
        distances = rerank(distances, euclidean_distances(query, query), euclidean_distances(gallery, gallery))
    yield slice(0, len(distances)), distances


def _top(
    distances: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray, query_cams: np.ndarray,
    gallery_cams: np.ndarray,
) -> np.ndarray:  # fmt: skip
    top = np.full((len(distances), TOP), -1)
    junk = gallery_ids == JUNK_ID
    for place, (row, person, camera) in enumerate(zip(distances, query_ids, query_cams, strict=True)):
        shown = np.where(((gallery_ids == person) & (gallery_cams == camera)) | junk, np.inf, row)
        near = np.flatnonzero(np.isfinite(shown))
        if len(near) > TOP:
            # Few are left to be sorted; among equal distances the first of the gallery comes first.
            near = np.flatnonzero(shown <= np.partition(shown, TOP - 1)[TOP - 1])
        near = near[np.argsort(shown[near], kind="stable")][:TOP]
        top[place, : len(near)] = near
    return top
