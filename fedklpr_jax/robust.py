"""Merges that one client cannot pull away: median and trimmed mean of every entry, over the clients that keep it.

Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning: towards optimal statistical rates", ICML 2018.
Of the values x_(1) <= ... <= x_(n) that n participants have at one entry of the model,

    median         g = x_((n+1)/2), or the mean of the two in the middle
    trimmed mean   g = 1 / (n - 2b) * (x_(b+1) + ... + x_(n-b))        b values cut at each end

The paper has neither masks nor weights. Ours: a client counts at an entry if its mask keeps it and its weight is above
0; where nobody does, the previous value stays. Beyond that weights are not used, for they follow from what clients say
of themselves. b = ceil(trim * n), at most (n - 1) / 2: rounded up, so that of three values or more the outermost always
go. Of two there is no telling which is wrong: both merges are their mean. One value alone is taken as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedklpr_jax.aggregation import masked_mean, stacked
from fedklpr_jax.trees import PyTree

Merge = Callable[..., PyTree]


def _sorted(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays of one shape, sorted entry by entry: Batcher's odd-even merge sort.

    Minima and maxima fuse into one pass over the memory; on a CPU `jnp.sort` along the clients takes 50 times as long
    and more.
    """
    rows, count, run = list(rows), len(rows), 1
    while run < count:
        gap = run
        while gap:
            for first in range(gap % run, count - gap, 2 * gap):
                for low in range(first, min(first + gap, count - gap)):
                    high = low + gap
                    if low // (2 * run) == high // (2 * run):
                        rows[low], rows[high] = jnp.minimum(rows[low], rows[high]), jnp.maximum(rows[low], rows[high])
            gap //= 2
        run *= 2
    return rows


def _by_rank(
    params: PyTree | Sequence[PyTree],
    masks: PyTree | Sequence[PyTree] | None,
    weights: jax.Array,
    previous: PyTree,
    shares: Callable[[int], list[float]],
) -> PyTree:
    """At every entry the sum of its sorted values, each times its share; `shares(n)` are those of n values."""
    params, masks = stacked(params), stacked(masks)
    counted = jnp.asarray(weights) > 0
    chex.assert_rank(counted, 1)
    chex.assert_trees_all_equal_structs(params, previous)
    chex.assert_tree_shape_prefix((params, masks), (len(counted),))
    count = len(counted)
    table = jnp.array([shares(n) + [0.0] * (count - n) for n in range(count + 1)], jnp.float32)
    # All leaves as one: sorting is compiled once, not for every leaf.
    old, unravel = ravel_pytree(previous)
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0], axis_size=count)
    kept = counted[:, None] if masks is None else flat(masks) & counted[:, None]
    number = jnp.sum(kept, axis=0, dtype=jnp.int32)
    # Who does not count stands behind all who do.
    ranked = _sorted(list(jnp.where(kept, flat(params).astype(jnp.float32), jnp.inf)))

    def term(rank: int) -> jax.Array:
        share = table[number, rank]
        return jnp.where(share > 0, share * ranked[rank], 0.0)

    merged = functools.reduce(jnp.add, map(term, range(count)))
    return unravel(jnp.where(number > 0, merged, old).astype(old.dtype))


def masked_median(
    params: PyTree | Sequence[PyTree],
    masks: PyTree | Sequence[PyTree] | None,
    weights: jax.Array,
    previous: PyTree,
) -> PyTree:
    """The median of every entry over the clients that keep it.

    Args:
      params: K client models: one tree with a leading axis [K, ...] on every leaf, or a list or tuple of K trees.
      masks: bool, in the same form; None = everything is kept.
      weights: float32 [K]; a client of weight 0 does not count, even where its values are not finite.
      previous: the global model before, no client axis.

    Returns:
      A tree like `previous`.

    >>> masked_median([jnp.array([1., 5.]), jnp.array([2., 7.]), jnp.array([1e9, 0.])],
    ...               [jnp.array([True, True]), jnp.array([True, True]), jnp.array([True, False])],
    ...               jnp.array([.2, .3, .5]), jnp.full(2, 9.)).tolist()
    [2.0, 6.0]
    """

    def middle(number: int) -> list[float]:
        return [((rank == (number - 1) // 2) + (rank == number // 2)) / 2 for rank in range(number)]

    return _by_rank(params, masks, weights, previous, middle)


def masked_trimmed_mean(
    params: PyTree | Sequence[PyTree],
    masks: PyTree | Sequence[PyTree] | None,
    weights: jax.Array,
    previous: PyTree,
    *,
    trim: float,
) -> PyTree:
    """The mean of every entry over the clients that keep it, without the lowest and the highest of their values.

    Args:
      params, masks, weights, previous: as for `masked_median`.
      trim: the share cut at each end, from 0 to below 0.5, taken as the decimal number that it is written as.

    Returns:
      A tree like `previous`.

    Raises:
      ValueError: `trim` is out of its range.

    >>> masked_trimmed_mean(jnp.array([[1.], [2.], [6.], [1e9], [4.]]), None, jnp.ones(5), jnp.zeros(1), trim=0.2)
    Array([4.], dtype=float32)
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim: {trim!r} is not allowed; it is a number from 0 to below 0.5")

    def inner(number: int) -> list[float]:
        cut = max(min(math.ceil(Fraction(str(trim)) * number), (number - 1) // 2), 0)
        return [float(cut <= rank < number - cut) / (number - 2 * cut) for rank in range(number)]

    return _by_rank(params, masks, weights, previous, inner)


def make_merge(name: str, trim: float) -> Merge:
    """The merge that `config.merge` asks for: `mean`, `median`, or `trimmed` with the share `trim` cut at each end."""
    merges: dict[str, Merge] = {
        "mean": masked_mean,
        "median": masked_median,
        "trimmed": functools.partial(masked_trimmed_mean, trim=trim),
    }
    if name not in merges:
        raise ValueError(f"merge: {name!r} is not known; it is one of {', '.join(merges)}")
    return merges[name]
