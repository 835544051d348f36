"""CMC, mAP and mINP of a query-gallery distance matrix, under the Market-1501 rule.

The rank of a match is one plus the matches and the negatives in front of it, so counting negatives replaces the sort
of the whole gallery. A negative at the same distance as a match stands in front of it: a collapsed model, whose
distances are all equal, gets the worst score there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedklpr_jax.errors import InputError

AveragePrecision = Literal["standard", "trapezoidal"]

JUNK_ID = -1
_AVERAGE_PRECISIONS = ("standard", "trapezoidal")
# One compare-and-count pass over a row costs about 3 us, sorting it 270 us (15,913 float32): break-even near 90.
_COUNTING_LIMIT = 64
_BLOCK = 512


class Ranking(NamedTuple):
    """Scores over the valid queries.

    Attributes:
      cmc: float64 [max_rank]; `cmc[k - 1]` is the share of queries with a match among the first k (Rank-k).
      mean_ap: mean average precision, in [0, 1].
      mean_inp: mean inverse negative penalty, in [0, 1].
      valid_queries: how many queries had a match left in the gallery.
    """

    cmc: np.ndarray
    mean_ap: float
    mean_inp: float
    valid_queries: int


class QueryScores(NamedTuple):
    """Scores per query, [q] each.

    Attributes:
      first_rank: int64, rank of the best match counted from 1; 0 where the query is not valid.
      ap: float64, average precision; NaN where the query is not valid.
      inp: float64, number of matches / rank of the hardest match; NaN where the query is not valid.
      valid: bool, whether a match is left in the gallery.
    """

    first_rank: np.ndarray
    ap: np.ndarray
    inp: np.ndarray
    valid: np.ndarray


def euclidean_distances(query_features: ArrayLike, gallery_features: ArrayLike) -> np.ndarray:
    """Squared Euclidean distances, float32 [q, g].

    Both sides are first moved so that the first gallery feature is the origin: a common offset would otherwise eat the
    float32 digits, and equal features get exactly equal distances.

    Args:
      query_features: [q, d], any float type, normalised or not.
      gallery_features: [g, d].

    Raises:
      InputError: the features are not two matrices of the same width.

    >>> euclidean_distances([[0.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 4.0]])
    array([[ 0., 16.],
           [25.,  9.]], dtype=float32)
    """
    query, gallery = _features(query_features, gallery_features)
    distances = np.empty((len(query), len(gallery)), np.float32)
    for _ in _filled(distances, query, gallery):
        pass
    return distances


def distance_blocks(query_features: ArrayLike, gallery_features: ArrayLike) -> Iterator[tuple[slice, np.ndarray]]:
    """`euclidean_distances` of 512 queries after the other, so that memory does not grow with the queries.

    Yields the rows of the queries, and their distances, float32 [<= 512, g], which the next ones overwrite.

    Raises:
      InputError: as `euclidean_distances`.

    >>> [(rows.start, block.tolist()) for rows, block in distance_blocks([[3.0]], [[0.0], [1.0]])]
    [(0, [[9.0, 4.0]])]
    """
    query, gallery = _features(query_features, gallery_features)
    block = np.empty((min(_BLOCK, len(query)), len(gallery)), np.float32)
    return _filled(block, query, gallery)


def _features(query_features: ArrayLike, gallery_features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    query = np.asarray(query_features, np.float32)
    gallery = np.asarray(gallery_features, np.float32)
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise InputError(
            f"gallery_features: shape {gallery.shape} does not fit query_features {query.shape}; "
            "give [g, d] and [q, d] with the same d"
        )
    return query, gallery


def _filled(distances: np.ndarray, query: np.ndarray, gallery: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Fills `distances`, of all queries or of one block of them, block by block."""
    if len(query) == 0 or len(gallery) == 0:
        yield slice(0, len(query)), np.empty((len(query), len(gallery)), np.float32)
        return
    origin = gallery[0]
    gallery = gallery - origin
    gallery_norms = np.einsum("ij,ij->i", gallery, gallery)
    for start in range(0, len(query), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(query)))
        block = query[rows] - origin
        out = distances[rows] if len(distances) == len(query) else distances[: len(block)]
        np.matmul(block, gallery.T, out=out)
        out *= -2
        out += np.einsum("ij,ij->i", block, block)[:, None]
        out += gallery_norms
        np.maximum(out, 0, out=out)
        yield rows, out


def _count_up_to(row: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """For each limit, how many entries of `row` are <= it; NaN entries never count. May sort `row` in place."""
    if len(limits) <= _COUNTING_LIMIT:
        return np.array([np.count_nonzero(row <= limit) for limit in limits], np.int64)
    row.sort()
    return np.searchsorted(row, limits, side="right")


def _precision_at_matches(ranks: np.ndarray, kind: AveragePrecision) -> np.ndarray:
    """Precision credited to each match; `ranks` int [r] count from 0, ascending."""
    index = np.arange(len(ranks))
    after = (index + 1) / (ranks + 1)
    if kind == "standard":
        return after
    before = np.where(ranks == 0, 1.0, index / np.maximum(ranks, 1))
    return (before + after) / 2


def _labels(name: str, values: ArrayLike, length: int, side: str) -> np.ndarray:
    labels = np.asarray(values)
    if labels.shape != (length,):
        raise InputError(f"{name}: shape {labels.shape} does not fit the distances; give one per {side}, ({length},)")
    return labels


def query_scores(
    distances: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    *,
    average_precision: AveragePrecision = "standard",
) -> QueryScores:
    """Rank of the first match, AP and INP of every query.

    Gallery entries of the query's identity and camera, and those with identity -1, are left out. Negatives at a match's
    distance count as ranked before it. Extra memory is one row of the distances.

    Args:
      distances: [q, g], smaller is more alike; infinities are allowed, NaN is not.
      query_ids: int [q].
      gallery_ids: int [g].
      query_cams: int [q].
      gallery_cams: int [g].
      average_precision: `"standard"`, the mean of the precision at each match, or `"trapezoidal"`, the Market-1501
        toolkit's older mean of the precision just before and at each match: with i matches and r entries in front,
        ((i / r, or 1 if r = 0) + (i + 1) / (r + 1)) / 2.

    Raises:
      InputError: a shape does not fit, a distance is NaN, or `average_precision` is unknown.
    """
    matrix = np.asarray(distances)
    if matrix.ndim != 2:
        raise InputError(f"distances: shape {matrix.shape} is not a matrix; give [queries, gallery]")
    if average_precision not in _AVERAGE_PRECISIONS:
        raise InputError(
            f"average_precision: {average_precision!r} is unknown; give one of {', '.join(_AVERAGE_PRECISIONS)}"
        )
    queries, gallery = matrix.shape
    q_ids = _labels("query_ids", query_ids, queries, "query")
    g_ids = _labels("gallery_ids", gallery_ids, gallery, "gallery image")
    q_cams = _labels("query_cams", query_cams, queries, "query")
    g_cams = _labels("gallery_cams", gallery_cams, gallery, "gallery image")
    dtype = np.float32 if matrix.dtype == np.float32 else np.float64

    by_id = np.argsort(g_ids, kind="stable")
    sorted_ids = g_ids[by_id]
    begin = np.searchsorted(sorted_ids, q_ids, side="left")
    end = np.searchsorted(sorted_ids, q_ids, side="right")
    junk = np.flatnonzero(g_ids == JUNK_ID)

    first_rank = np.zeros(queries, np.int64)
    ap = np.full(queries, np.nan)
    inp = np.full(queries, np.nan)
    for i in range(queries):
        row = np.array(matrix[i], dtype)
        # The maximum of a row with a NaN is NaN: one pass, no boolean array.
        if np.isnan(row.max(initial=-np.inf)):
            raise InputError(f"distances: row {i} (query {i}) contains NaN; give numbers (has the model diverged?)")
        same_id = by_id[begin[i] : end[i]]
        matches = same_id[g_cams[same_id] != q_cams[i]]
        if q_ids[i] == JUNK_ID or len(matches) == 0:
            continue
        match_distances = np.sort(row[matches])
        # What is left as a number are the negatives.
        row[same_id] = np.nan
        row[junk] = np.nan
        ranks = np.arange(len(matches)) + _count_up_to(row, match_distances)
        first_rank[i] = ranks[0] + 1
        ap[i] = _precision_at_matches(ranks, average_precision).mean()
        inp[i] = len(matches) / (ranks[-1] + 1)
    return QueryScores(first_rank, ap, inp, first_rank > 0)


def evaluate_ranking(
    distances: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cams: ArrayLike,
    gallery_cams: ArrayLike,
    *,
    max_rank: int = 50,
    average_precision: AveragePrecision = "standard",
) -> Ranking:
    """CMC, mAP (Zheng et al., ICCV 2015) and mINP (Ye et al., TPAMI 2021) over the queries that have a match.

    Args:
      distances: [q, g], smaller is more alike.
      query_ids: int [q].
      gallery_ids: int [g]; -1 is junk.
      query_cams: int [q].
      gallery_cams: int [g].
      max_rank: length of the CMC curve, which is flat beyond the end of a smaller gallery.
      average_precision: see `query_scores`.

    Raises:
      InputError: as `query_scores`; also if no query has a match or `max_rank` is below 1.

    Entries 1 and 4 are junk here, and matches stand at ranks 2 and 4 of what is left:

    >>> result = evaluate_ranking([[1, 2, 3, 4, 5, 6]], [1], [1, 2, 1, -1, 3, 1], [1], [1, 2, 2, 3, 1, 3], max_rank=3)
    >>> result.cmc.tolist(), result.mean_ap, result.mean_inp, result.valid_queries
    ([0.0, 1.0, 1.0], 0.5, 0.5, 1)
    """
    if max_rank < 1:
        raise InputError(f"max_rank: {max_rank} is not allowed; give a whole number from 1")
    scores = query_scores(
        distances, query_ids, gallery_ids, query_cams, gallery_cams, average_precision=average_precision
    )
    return summarised(scores, max_rank)


def summarised(scores: QueryScores, max_rank: int) -> Ranking:
    """The means over the queries that have a match, and a CMC curve of `max_rank` ranks.

    Raises:
      InputError: no query has a match.
    """
    valid = int(scores.valid.sum())
    if valid == 0:
        raise InputError(
            f"query_ids: none of {len(scores.valid)} queries has a match in the gallery; "
            "give at least one identity seen by another camera there"
        )
    first_rank = scores.first_rank[scores.valid]
    hits = np.bincount(np.minimum(first_rank, max_rank + 1), minlength=max_rank + 2)
    cmc = np.cumsum(hits[1 : max_rank + 1]) / valid
    return Ranking(cmc, float(scores.ap[scores.valid].mean()), float(scores.inp[scores.valid].mean()), valid)
