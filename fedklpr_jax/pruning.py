"""Unstructured magnitude pruning and cross-round recovery (CRR) as pure functions over boolean masks.

A mask is a boolean pytree of the model's structure, True = kept. Only *prunable* leaves ever lose entries: kernels
outside the classifier, the proxies and the BNNeck. Everything is exact and compiles: thresholds come from bisection on
the float bits, not from a sort.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax.trees import PyTree, merge, path_map, select, split

HEADS = frozenset({"classifier", "proxies", "bnneck"})
DECISIONS = ("none", "accepted", "rejected", "halted", "target", "recovered")


def is_prunable(path: str) -> bool:
    """Leaves named `kernel`, never those of heads, proxies or the BNNeck (nor biases, norms, statistics).

    >>> is_prunable("params/trunk/conv1/kernel"), is_prunable("params/classifier/kernel"), is_prunable("bn1/scale")
    (True, False, False)
    """
    parts = path.split("/")
    return parts[-1] == "kernel" and not HEADS.intersection(parts)


def full_mask(tree: PyTree) -> PyTree:
    """The mask that keeps everything: True in the shape of every leaf."""
    return jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), tree)


def apply_mask(tree: PyTree, mask: PyTree | None) -> PyTree:
    """`m * tree`: zeros where the mask is False; the tree itself where there is no mask."""
    if mask is None:
        return tree
    return jax.tree.map(lambda leaf, kept: jnp.where(kept, leaf, jnp.zeros_like(leaf)), tree, mask)


def _prunable_leaves(tree: PyTree, prunable: Callable[[str], bool]) -> list[jax.Array]:
    chosen: list[jax.Array] = []
    path_map(lambda path, leaf: chosen.append(leaf) if prunable(path) else None, tree)
    return chosen


def count_true(tree: PyTree) -> jax.Array:
    """How many entries of a tree of boolean arrays (any shapes, fewer than 2**31 in all) hold: int32 scalar.

    >>> int(count_true([jnp.arange(1000) % 3 == 0, jnp.array(True)]))
    335
    """
    return sum((_count(leaf) for leaf in jax.tree.leaves(tree)), start=jnp.int32(0))


def _count(flags: jax.Array) -> jax.Array:
    # Added as bytes, 8 rows and then 16, what is left is a 128th: on a CPU the plain sum takes 30 times as long, for it
    # adds one number after the other.
    flat = flags.ravel()
    length = flat.size // 128
    rows = flat[: 128 * length].reshape(128, length).astype(jnp.uint8)
    rows = functools.reduce(jnp.add, [rows[first : first + 16] for first in range(0, 128, 16)])
    columns = functools.reduce(jnp.add, list(rows))
    return jnp.sum(columns, dtype=jnp.int32) + jnp.sum(flat[128 * length :], dtype=jnp.int32)


def density(mask: PyTree, prunable: Callable[[str], bool] = is_prunable) -> jax.Array:
    """Kept / prunable entries: float32 scalar in [0, 1]; 1 where nothing is prunable.

    >>> float(density({"kernel": jnp.array([True, False, True, True]), "bias": jnp.array([True])}))
    0.75
    """
    leaves = _prunable_leaves(mask, prunable)
    total = sum(leaf.size for leaf in leaves)
    return count_true(leaves).astype(jnp.float32) / total if total else jnp.float32(1.0)


def hamming_distance(first: PyTree, second: PyTree, prunable: Callable[[str], bool] = is_prunable) -> jax.Array:
    """Share of the entries in which two masks differ, averaged over the prunable leaves: float32 scalar in [0, 1].

    Source: Sub-FedAvg (Vahidian et al. 2021): every layer counts the same, however large.

    >>> one = {"a": {"kernel": jnp.array([1, 1, 1, 0], bool)}, "b": {"kernel": jnp.array([1, 0], bool)}}
    >>> two = {"a": {"kernel": jnp.array([1, 0, 1, 0], bool)}, "b": {"kernel": jnp.array([1, 1], bool)}}
    >>> float(hamming_distance(one, two))
    0.375
    """
    pairs = list(zip(_prunable_leaves(first, prunable), _prunable_leaves(second, prunable), strict=True))
    layers = [jnp.mean((a != b).astype(jnp.float32)) for a, b in pairs]
    return sum(layers, start=jnp.float32(0)) / max(len(layers), 1)


def mask_table(model: PyTree, clients: int) -> PyTree:
    """What a server knows of its clients' masks at the start, everything kept: bool leaves [clients, ...]."""
    return jax.tree.map(lambda leaf: jnp.ones((clients, *leaf.shape), bool), model)


def updated_table(table: PyTree, masks: PyTree, clients: jax.Array, accepted: jax.Array) -> PyTree:
    """The `mask_table` after a round: the rows of accepted participants replaced by the masks that they sent.

    Args:
      table: bool leaves [all clients, ...].
      masks: bool leaves [K, ...], the participants' own.
      clients: int32 [K], whose they are.
      accepted: bool [K]; a refused client keeps its row.
    """
    # Row by row in place: a scatter of all rows at once takes five times as long on a CPU.
    def set_row(place: jax.Array, table: PyTree) -> PyTree:
        client = clients[place]
        return jax.tree.map(
            lambda held, new: held.at[client].set(jnp.where(accepted[place], new[place], held[client])), table, masks
        )

    return jax.lax.fori_loop(0, len(clients), set_row, table)


def _smallest(enough: Callable[[jax.Array], jax.Array], bits: int) -> jax.Array:
    """Smallest uint32 `t < 2**bits` with `enough(t)` (monotone), or `2**bits - 1` if there is none."""

    def step(index: jax.Array, low: jax.Array) -> jax.Array:
        half = jnp.uint32(1) << (jnp.uint32(bits - 1) - index.astype(jnp.uint32))
        return jnp.where(enough(low + half - 1), low, low + half)

    return jax.lax.fori_loop(0, bits, step, jnp.uint32(0))


def above_rank(values: jax.Array, rank: int) -> jax.Array:
    """Which values exceed the `rank`-th smallest: bool [n], exact for every n below 2**31.

    Args:
      values: [n], any floating dtype up to float32, none negative.
      rank: from 0 to n - 1, a constant of the program.

    >>> above_rank(jnp.array([3.0, 1.0, 2.0, 2.0]), 1).tolist()
    [True, False, False, False]
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    return bits > _smallest(lambda t: count_true(bits <= t) > rank, 31)


def _drop_smallest(weights: jax.Array, kept: jax.Array, number: jax.Array) -> jax.Array:
    """The flat mask `kept` without the `number` kept entries of smallest magnitude; ties fall by flat order."""
    # Magnitudes of non-negative floats order like their bits, so 31 counting passes find the exact threshold.
    bits = jax.lax.bitcast_convert_type(jnp.abs(weights).astype(jnp.float32), jnp.uint32)
    threshold = _smallest(lambda t: count_true([kept & (bits <= t)]) >= number, 31)
    below, tied = kept & (bits < threshold), kept & (bits == threshold)
    order = jax.lax.iota(jnp.uint32, weights.size)
    missing = number - count_true([below])
    cut = _smallest(lambda c: count_true([tied & (order < c)]) >= missing, weights.size.bit_length())
    return kept & ~below & ~(tied & (order < cut))


def _floor_share(number: jax.Array, share: float | jax.Array) -> jax.Array:
    """`floor(share * number)` in integers: float32 would be off beyond 2**24 and 0.2 * 5 must be 1."""
    n: int | jax.Array
    if isinstance(share, jax.Array):
        n, d = jnp.round(10_000 * share).astype(jnp.int32), 10_000
    else:
        fraction = Fraction(share).limit_denominator(10_000)
        n, d = fraction.numerator, fraction.denominator
    return (number // d) * n + (number % d) * n // d


def magnitude_mask(
    params: PyTree,
    mask: PyTree,
    step: float | jax.Array,
    scope: str = "global",
    *,
    target: float = 0.0,
    prunable: Callable[[str], bool] = is_prunable,
) -> PyTree:
    """One step of magnitude pruning: a mask that is a subset of `mask`.

    Removes `floor(step * alive)` of the alive prunable weights, smallest magnitude first, never leaving fewer than
    `ceil(target * prunable)`; equal magnitudes fall in flat order (leaf by leaf, C order).

    Args:
      params: the weights, any floating dtype.
      mask: bool, same structure.
      step: share of the alive weights to remove, in [0, 1] (to 4 decimals or a small fraction, exactly); a traced one
        is rounded to 4 decimals.
      scope: `global`, one threshold over all prunable leaves, or `layer`, one for each.
      target: density that pruning stops at, in [0, 1].
      prunable: which paths may lose weights.

    Source: FedKLPR (arXiv 2508.17431) states unstructured magnitude pruning; threshold, scope and ties are ours.

    >>> weights = {"kernel": jnp.array([.1, -.2, .3, -.4, .5])}
    >>> magnitude_mask(weights, full_mask(weights), 0.4)["kernel"].tolist()
    [False, False, True, True, True]
    """
    if scope not in ("global", "layer"):
        raise ValueError(f"scope: {scope!r} is not known; it is 'global' or 'layer'")
    chex.assert_trees_all_equal_shapes(params, mask)
    weights, kept = _prunable_leaves(params, prunable), _prunable_leaves(mask, prunable)

    def prune(group: list[jax.Array], group_kept: list[jax.Array]) -> list[jax.Array]:
        # One flat vector: the same passes, compiled once instead of once a leaf.
        flat = jnp.concatenate([leaf.ravel() for leaf in group])
        flat_kept = jnp.concatenate([leaf.ravel() for leaf in group_kept])
        alive = count_true([flat_kept])
        floor = flat.size - _floor_share(jnp.int32(flat.size), 1.0 - target)
        left = _drop_smallest(flat, flat_kept, jnp.clip(_floor_share(alive, step), 0, jnp.maximum(alive - floor, 0)))
        ends = np.cumsum([leaf.size for leaf in group])[:-1]
        return [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(left, ends), group, strict=True)]

    if not weights:
        return mask
    if scope == "global":
        pruned = iter(prune(weights, kept))
    else:
        pruned = iter([prune([w], [k])[0] for w, k in zip(weights, kept, strict=True)])
    return path_map(lambda path, leaf: next(pruned) if prunable(path) else leaf, mask)


class Recovery(NamedTuple):
    """What a client remembers so that its last accepted pruning step can be undone.

    Attributes:
      mask: the mask before that step, prunable leaves only.
      params: the client's own weights just before it, prunable leaves only.
      score: float32, score of the download that opened the round of that step.
      armed: bool, whether there is such a step.
      halt: int32, rounds of this client still to pass without pruning.
      rounds: int32, rounds this client has finished; the first upload of a client is never pruned.
    """

    mask: PyTree
    params: PyTree
    score: jax.Array
    armed: jax.Array
    halt: jax.Array
    rounds: jax.Array


def no_recovery(params: PyTree, mask: PyTree) -> Recovery:
    """The memory of a client that has never pruned."""
    return Recovery(
        _prunable(mask), _prunable(params), jnp.float32(0), jnp.bool_(False), jnp.int32(0), jnp.int32(0)
    )


def _prunable(tree: PyTree) -> PyTree:
    """The prunable leaves of a nested dict, in their places."""
    return split(tree, is_prunable)[1]


def crr_recover(
    memory: Recovery, params: PyTree, mask: PyTree, score: jax.Array, *, recover: float, halt: int
) -> tuple[PyTree, PyTree, Recovery, jax.Array]:
    """CRR stage 2, at a download: undo the last accepted step if the federation has lost more than `recover` since.

    Args:
      memory: the client's `Recovery`.
      params: downloaded weights, zero where pruned.
      mask: the mask they came under.
      score: float32, validation score of the download.
      recover: loss of score that triggers recovery.
      halt: rounds without pruning that follow.

    Returns:
      `(params, mask, memory, recovered)`; restored entries carry the client's own stored values. One select, no branch.
    """
    recovered = memory.armed & (score < memory.score - recover)
    old = _prunable(mask)
    restored = select(recovered, memory.mask, old)
    weights = jax.tree.map(
        lambda now, before, was, is_: jnp.where(is_ & ~was, before, now),
        _prunable(params), memory.params, old, restored,
    )  # fmt: skip
    memory = memory._replace(
        armed=memory.armed & ~recovered, halt=jnp.where(recovered, jnp.int32(halt), memory.halt)
    )
    return merge(params, weights), merge(mask, restored), memory, recovered


def crr_accept(
    memory: Recovery,
    params: PyTree,
    mask: PyTree,
    candidate: PyTree,
    score_download: jax.Array,
    score_current: jax.Array,
    score_candidate: jax.Array,
    *,
    drop: float,
) -> tuple[PyTree, Recovery, jax.Array]:
    """CRR stage 1, after local training: take the candidate mask unless it costs more than `drop` of the score.

    Returns:
      `(mask, memory, decision)`, decision an int32 index into `DECISIONS` (never `recovered`: that is stage 2's).
    """
    resting = (memory.halt > 0) | (memory.rounds == 0)
    old, new = _prunable(mask), _prunable(candidate)
    smaller = count_true(new) < count_true(old)
    good = score_candidate >= score_current - drop
    accept = good & smaller & ~resting
    decision = jnp.where(
        memory.rounds == 0,
        DECISIONS.index("none"),
        jnp.where(
            memory.halt > 0,
            DECISIONS.index("halted"),
            jnp.where(
                smaller,
                jnp.where(good, DECISIONS.index("accepted"), DECISIONS.index("rejected")),
                DECISIONS.index("target"),
            ),
        ),
    ).astype(jnp.int32)
    taken = memory._replace(mask=old, params=_prunable(params), score=score_download, armed=jnp.bool_(True))
    memory = select(accept, taken, memory)
    memory = memory._replace(halt=jnp.maximum(memory.halt - 1, 0), rounds=memory.rounds + 1)
    return merge(mask, select(accept, new, old)), memory, decision
