"""Is one method better than another, or were the queries kind? A paired bootstrap over queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedklpr_jax.errors import InputError

# Entries of one block of resampled rows: bounds memory at 8 MB.
_BLOCK = 1 << 20


class RatioInterval(NamedTuple):
    """Ratio of two mean APs on the queries as they are, and the ends of its bootstrap interval."""

    ratio: float
    low: float
    high: float


def _resampled_means(pair: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of both rows of `pair` [2, q] over the same resampled queries, float64 [2, samples]."""
    queries = pair.shape[1]
    means = np.empty((2, samples))
    block = max(1, _BLOCK // queries)
    for start in range(0, samples, block):
        stop = min(start + block, samples)
        rows = rng.integers(queries, size=(stop - start, queries))
        means[:, start:stop] = [aps[rows].mean(axis=1) for aps in pair]
    return means


def _valid_pair(where: str, ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"{where}: shapes {a.shape} and {b.shape} do not pair; give the APs of the same queries")
    valid = ~np.isnan(a)
    if not np.array_equal(valid, ~np.isnan(b)):
        raise InputError(f"{where}: other queries are NaN in ours than in theirs; give the APs of the same queries")
    if not valid.any():
        raise InputError(f"{where}: no valid query; give at least one AP that is not NaN")
    return np.stack([a[valid], b[valid]])


def paired_ratio_interval(
    ours: Sequence[Sequence[ArrayLike]],
    theirs: Sequence[Sequence[ArrayLike]],
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> RatioInterval:
    """Ratio of two methods' mean mAP with a percentile interval (Efron and Tibshirani 1993, chapter 13).

    The statistic is the mean over seeds and clients of the clients' mAP, ours divided by theirs. In each sample the
    valid queries of every (seed, client) are drawn anew with replacement, the same ones for both methods, so that
    queries hard for both do not widen the interval. The spread between training seeds is not resampled.

    Args:
      ours: `ours[s][c]`, float [q_sc], AP per query of seed s and client c; NaN is a query without a match.
      theirs: the same queries under the other method.
      samples: number of bootstrap samples, at least 1.
      seed: of the resampling.
      level: share of the samples inside the interval, strictly between 0 and 1.

    Returns:
      The ratio on all valid queries, and the ends of its interval.

    Raises:
      InputError: the two do not hold the same seeds, clients and queries, a client has no valid query, theirs is zero,
        or a setting is out of range.

    >>> paired_ratio_interval([[[0.2, 0.4, float("nan")]]], [[[0.1, 0.2, float("nan")]]])
    RatioInterval(ratio=2.0, low=2.0, high=2.0)
    """
    if samples < 1:
        raise InputError(f"samples: {samples} is not allowed; give a whole number from 1")
    if not 0 < level < 1:
        raise InputError(f"level: {level} is not allowed; give a number between 0 and 1, such as 0.95")
    if len(ours) == 0 or [len(clients) for clients in ours] != [len(clients) for clients in theirs]:
        raise InputError("theirs: other seeds or clients than ours; give the same at least one seed and client twice")
    pairs = [
        _valid_pair(f"seed {s}, client {c}", a, b)
        for s, (our_clients, their_clients) in enumerate(zip(ours, theirs, strict=True))
        for c, (a, b) in enumerate(zip(our_clients, their_clients, strict=True))
    ]
    if not pairs:
        raise InputError("ours: no client in any seed; give at least one")
    ours_mean, theirs_mean = np.mean([pair.mean(axis=1) for pair in pairs], axis=0)
    if theirs_mean <= 0:
        raise InputError("theirs: the mean AP is 0; a ratio needs a positive one")

    rng = np.random.default_rng(seed)
    totals = np.zeros((2, samples))
    for pair in pairs:
        totals += _resampled_means(pair, samples, rng)
    # A sample in which theirs is 0 speaks for no finite upper end.
    ratios = np.full(samples, np.inf)
    np.divide(totals[0], totals[1], out=ratios, where=totals[1] > 0)
    tail = (1 - level) / 2
    # Order statistics: interpolating towards an infinite sample would give NaN.
    low, high = np.quantile(ratios, [tail, 1 - tail], method="inverted_cdf")
    return RatioInterval(float(ours_mean / theirs_mean), float(low), float(high))
