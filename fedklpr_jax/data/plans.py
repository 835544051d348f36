"""Index plans: which image is at which place of which batch, as a pure function of integers.

A plan is drawn on the host and handed to the compiled epoch as data. Its key (seed, round, client, epoch) is all that
decides it, so resuming a run needs only the round number. Keys of one run must have one length: NumPy pads short keys
with zeros, so (1,) and (1, 0) would draw the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedklpr_jax.errors import InputError


def identity_plan(labels: np.ndarray, *, people: int, shots: int, key: Sequence[int]) -> np.ndarray:
    """P x K sampling (Hermans et al., arXiv 1703.07737): every batch holds P identities with K images each.

    The images of an identity are shuffled and taken K at a time, going round when they run out, so K images of one
    person differ where it has K. How often an identity comes is its number of images / K, rounded up or down by
    chance: every image expects about one visit, also where identities have fewer than K. The more of these draws are
    left, the likelier an identity is in the next batch, where it comes once. With fewer than P identities all of them
    are in every batch, and some twice or more.

    Args:
      labels: int32 [n], the identity or cluster of each image; negative = not used.
      people: P, identities in a batch.
      shots: K, images of each.
      key: whole numbers from 0, (seed, round, client, epoch).

    Returns:
      int32 [ceil(used / (P K)), P K], rows of `labels`; the K images of one identity lie side by side. The shape
      depends on the counts only.

    Raises:
      InputError: `people` or `shots` below 1.

    >>> plan = identity_plan(np.array([0, 0, 1, 1, 2, 2, -1]), people=2, shots=2, key=(0, 0, 0, 0))
    >>> plan.shape
    (2, 4)
    >>> 6 in plan
    False
    """
    if people < 1 or shots < 1:
        raise InputError(f"people, shots: {people} x {shots} is not a batch; give whole numbers from 1")
    rng = np.random.default_rng(list(key))
    rows = np.flatnonzero(labels >= 0)
    steps = -(-len(rows) // (people * shots))
    if steps == 0:
        return np.zeros((0, people * shots), np.int32)
    rows = rows[np.lexsort((rng.random(len(rows)), labels[rows]))]
    counts = np.unique(labels[rows], return_counts=True)[1]
    starts = np.cumsum(counts) - counts
    chosen, visit = _draw(counts, steps, people, rng)
    place = visit[:, None] * shots + np.arange(shots)
    plan = rows[starts[chosen][:, None] + place % counts[chosen][:, None]]
    return plan.reshape(steps, people * shots).astype(np.int32)


def shuffled_plan(rows: np.ndarray, batch: int, *, key: Sequence[int]) -> np.ndarray:
    """Every row once, in random order; the last batch is filled with complements `~row` of rows from the start.

    A complement is negative: its image takes part in batch norm, its label counts for no loss. So every image counts
    once an epoch and all batches have one shape.

    Args:
      rows: int [n], n from 1.
      batch: images in a batch.
      key: whole numbers from 0, (seed, round, client, epoch).

    Returns:
      int32 [ceil(n / batch), batch].

    Raises:
      InputError: no rows, or `batch` below 1.

    >>> plan = shuffled_plan(np.arange(5), 4, key=(0, 0, 0, 0))
    >>> plan.shape, sorted(plan[plan >= 0].tolist()), sorted((~plan[plan < 0]).tolist()) == sorted(plan[0, :3].tolist())
    ((2, 4), [0, 1, 2, 3, 4], True)
    """
    if batch < 1 or not len(rows):
        raise InputError(f"batch: {len(rows)} images in batches of {batch}; both must be at least 1")
    order = np.random.default_rng(list(key)).permutation(rows).astype(np.int32)
    missing = -len(order) % batch
    return np.concatenate([order, ~np.resize(order, missing)]).reshape(-1, batch)


def _quotas(counts: np.ndarray, steps: int, every: int, extra: int, rng: np.random.Generator) -> np.ndarray:
    """How often each identity is one of the `extra` of a step: int64 [identities], in 0..steps, sum steps * extra.

    Shares are proportional to the images as far as the bounds allow, so that every image expects the same number of
    visits. Systematic rounding keeps these expectations and the sum.
    """
    total = steps * extra
    low, high = 0.0, (every + 1) * steps / counts.min()
    for _ in range(60):
        rate = (low + high) / 2
        share = np.clip(rate * counts - every * steps, 0, steps)
        low, high = (rate, high) if share.sum() < total else (low, rate)
    order = rng.permutation(len(counts))
    edges = np.cumsum(share[order])
    edges[-1] = total
    quotas = np.empty(len(counts), np.int64)
    quotas[order] = np.diff(np.floor(edges + rng.random()), prepend=0)
    return quotas


def _draw(counts: np.ndarray, steps: int, people: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For each place in the epoch the identity, and how often it came before: int64 [steps * people] each."""
    every, extra = divmod(people, len(counts))
    all_once = np.tile(np.arange(len(counts)), every)
    earlier = np.repeat(np.arange(every), len(counts))
    left = _quotas(counts, steps, every, extra, rng)
    taken = np.zeros(len(counts), np.int64)
    chosen, visit = np.empty((2, steps, people), np.int64)
    for step in range(steps):
        clock = rng.standard_exponential(len(counts))
        # The smallest of exponential clocks with rates w are a draw without replacement in proportion to w. The tiny
        # rate keeps finished identities behind all others.
        order = clock / np.maximum(left, 1e-9)
        # An identity due in every step that is left goes first (a negative time), or it could not be finished.
        urgent = left >= steps - step
        order[urgent] = -clock[urgent]
        first = np.argpartition(order, extra)[:extra]
        # Sorted, as the order within a partition differs between processors.
        first = first[np.argsort(order[first])]
        chosen[step] = np.concatenate([all_once, first])
        visit[step] = np.concatenate([taken[all_once] + earlier, taken[first] + every])
        taken += every
        taken[first] += 1
        left[first] -= 1
    return chosen.ravel(), visit.ravel()
