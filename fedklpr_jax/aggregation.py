"""The server's arithmetic: aggregation weights (KLAW, PRAW, KLPWA) and the sparse-skipping masked mean (SAS).

Sums over clients are unrolled in chunks of at most `CHUNK` and scanned over the chunks: on a CPU a reduction over a
leading client axis is some 40 times slower than the memory it touches, and unrolling 100 clients takes XLA half a
minute to compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from fedklpr_jax.trees import PyTree

CHUNK = 8


def _add(left: PyTree, right: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, left, right)


def client_terms(params: PyTree, mask: PyTree | None, weight: jax.Array) -> tuple[PyTree, PyTree]:
    """`(w m x, w m)` of one client, in float32: what `weighted_sums` sums.

    Args:
      params: leaves of any shape.
      mask: bool leaves of these shapes, or None where everything is kept (the second result is then one scalar a leaf).
      weight: float32 scalar; with 0 both are 0 even where values are not finite.

    >>> client_terms({"x": jnp.array([2.0, 4.0])}, {"x": jnp.array([True, False])}, jnp.float32(3))[0]["x"].tolist()
    [6.0, 0.0]
    """

    def numerator(leaf: jax.Array, kept: jax.Array | bool) -> jax.Array:
        return jnp.where(kept & (weight > 0), weight * leaf.astype(jnp.float32), 0.0)

    if mask is None:
        return jax.tree.map(lambda leaf: numerator(leaf, True), params), jax.tree.map(lambda _: weight, params)
    return jax.tree.map(numerator, params, mask), jax.tree.map(lambda kept: jnp.where(kept, weight, 0.0), mask)


def weighted_sums(params: PyTree, masks: PyTree | None, weights: jax.Array) -> tuple[PyTree, PyTree]:
    """`(sum_k w_k m_k x_k, sum_k w_k m_k)` over the leading axis of every leaf, in float32.

    Args:
      params: leaves [K, ...].
      masks: bool leaves [K, ...], or None where everything is kept (the second result is then one scalar a leaf).
      weights: float32 [K]. An entry of weight 0 is skipped even where its values are not finite.
    """
    chex.assert_rank(weights, 1)
    chex.assert_tree_shape_prefix((params, masks), (len(weights),))
    # Host arrays cannot be indexed by the scan's counter.
    params, masks, weights = jax.tree.map(jnp.asarray, (params, masks, weights))
    count = weights.shape[0]

    def terms_of(index: jax.Array | int) -> tuple[PyTree, PyTree]:
        row, kept = jax.tree.map(lambda leaf: leaf[index], (params, masks))
        return client_terms(row, kept, weights[index])

    def chunk_terms(first: jax.Array | int, length: int) -> tuple[PyTree, PyTree]:
        terms = terms_of(first)
        for offset in range(1, length):
            terms = _add(terms, terms_of(first + offset))
        return terms

    if count <= CHUNK:
        return chunk_terms(0, count)
    whole, rest = divmod(count, CHUNK)

    def body(carry: PyTree, chunk: jax.Array) -> tuple[PyTree, None]:
        return _add(carry, chunk_terms(chunk * CHUNK, CHUNK)), None

    sums, _ = jax.lax.scan(body, chunk_terms(0, CHUNK), jnp.arange(1, whole))
    return _add(sums, chunk_terms(whole * CHUNK, rest)) if rest else sums


def mean_of_sums(sums: tuple[PyTree, PyTree], previous: PyTree) -> PyTree:
    """`numerator / denominator`, or the previous value where the denominator is 0; dtypes of `previous`."""
    return jax.tree.map(
        lambda top, bottom, old: jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), old).astype(old.dtype),
        *sums,
        previous,
    )


def stacked(trees: PyTree | Sequence[PyTree]) -> PyTree:
    """A list or tuple of K trees as one with a leading axis [K, ...] on every leaf; anything else as it is."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if isinstance(trees, list | tuple) else trees


def masked_mean(
    params: PyTree | Sequence[PyTree],
    masks: PyTree | Sequence[PyTree] | None,
    weights: jax.Array,
    previous: PyTree,
) -> PyTree:
    """SAS, the sparse-skipping weighted mean: pruned entries are left out, not averaged in as zeros.

    `g[j] = sum_k w_k m_k[j] x_k[j] / sum_k w_k m_k[j]`; where no participant keeps j the previous value stays.

    Args:
      params: K client models: one tree with a leading axis [K, ...] on every leaf, or a list or tuple of K trees.
      masks: bool, in the same form; None = everything is kept.
      weights: float32 [K], not negative; need not sum to 1.
      previous: the global model before, no client axis.

    Returns:
      A tree like `previous`.

    Source: FedKLPR (arXiv 2508.17431), sparse activation skipping.

    >>> masked_mean([jnp.array([2., 0, 4, 0]), jnp.array([4., 6, 0, 0])],
    ...             [jnp.array([True, False, True, False]), jnp.array([True, True, False, False])],
    ...             jnp.array([.5, .5]), jnp.full(4, 9.)).tolist()
    [3.0, 6.0, 4.0, 9.0]
    """
    params, masks = stacked(params), stacked(masks)
    weights = jnp.asarray(weights, jnp.float32)
    chex.assert_trees_all_equal_structs(params, previous)
    return mean_of_sums(weighted_sums(params, masks, weights), previous)


def grouped_mean(
    params: PyTree, weights: jax.Array, groups: jax.Array, receivers: jax.Array, previous: PyTree
) -> PyTree:
    """The weighted mean of each group of clients, handed to every receiver of that group: leaves [C, ...].

    `g[c] = sum w_k x_k / sum w_k` over the k of `groups[k] = receivers[c]`; the previous value where that sum is 0.

    Args:
      params: K client models, leaves [K, ...]. One of weight 0 is skipped even where its values are not finite.
      weights: float32 [K], not negative; need not sum to 1.
      groups: int32 [K], the group of each model.
      receivers: int32 [C], the group whose mean each receiver gets.
      previous: what the receivers have, leaves [C, ...].

    >>> grouped_mean(jnp.array([1., 3., 8.]), jnp.array([3., 1., 1.]), jnp.array([0, 0, 1]), jnp.array([1, 0, 0, 2]),
    ...              jnp.full(4, 7.)).tolist()
    [8.0, 1.5, 1.5, 7.0]
    """
    chex.assert_rank([weights, groups, receivers], 1)
    chex.assert_tree_shape_prefix(params, (len(weights),))
    chex.assert_tree_shape_prefix(previous, (len(receivers),))
    shares = jnp.where(receivers[:, None] == groups[None], weights, 0.0)
    total = jnp.sum(shares, axis=1)
    shares = shares / jnp.where(total > 0, total, 1.0)[:, None]

    def along(values: jax.Array, leaf: jax.Array) -> jax.Array:
        return values.reshape(-1, *[1] * (leaf.ndim - 1))

    def mean(leaf: jax.Array, old: jax.Array) -> jax.Array:
        counted = jnp.where(along(weights > 0, leaf), leaf.astype(jnp.float32), 0.0)
        # The default product of an accelerator is coarser than float32.
        merged = jnp.tensordot(shares, counted, 1, precision="highest")
        return jnp.where(along(total > 0, old), merged, old).astype(old.dtype)

    return jax.tree.map(mean, params, previous)


def normalised(weights: jax.Array) -> jax.Array:
    """Weights divided by their sum; equal weights where the sum is 0."""
    total = jnp.sum(weights)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1.0 / weights.shape[0])


def image_weights(images: jax.Array, accepted: jax.Array) -> jax.Array:
    """FedAvg's `n_k / n` over the accepted clients: float32 [K], all 0 where none is accepted."""
    return jnp.where(accepted, normalised(jnp.where(accepted, images, 0.0)), 0.0)


def equal_weights(accepted: jax.Array) -> jax.Array:
    """`1 / K` for each of the K accepted clients: float32, all 0 where none is accepted.

    >>> equal_weights(jnp.array([True, False, True])).tolist()
    [0.5, 0.0, 0.5]
    """
    return image_weights(jnp.ones(accepted.shape), accepted)


def distance_weights(moved: jax.Array, by_images: jax.Array) -> jax.Array:
    """CDW, cosine distance weights `d_k / sum d`; the `by_images` weights where no client moved. float32 [K].

    Source: FedReID (Zhuang et al., ACM MM 2020); FedCAPR takes the distance between features.

    >>> distance_weights(jnp.array([1., 3.]), jnp.array([.5, .5])).tolist()
    [0.25, 0.75]
    """
    return jnp.where(jnp.sum(moved) > 1e-12, normalised(moved), by_images)


def klaw(divergences: jax.Array, *, sign: str = "align", where: jax.Array | None = None) -> jax.Array:
    """KL aggregation weights from `a_k = mean KL(P_{M^{t-1}} || P_{M^t})`: float32 [K], not normalised.

    `align` prefers clients that stayed near the model they received, `1 / (a_k + median a)`; `gain` those that moved
    most, `a_k`. FedKLPR's texts say both; the formulas are ours.

    Args:
      divergences: float32 [K], not negative.
      sign: `align` or `gain`.
      where: bool [K], which clients count (all by default); the others get 0.

    >>> [round(float(w), 3) for w in klaw(jnp.array([1., 3.]))]
    [0.333, 0.2]
    """
    if sign not in ("align", "gain"):
        raise ValueError(f"sign: {sign!r} is not known; it is 'align' or 'gain'")
    counted = jnp.ones_like(divergences, bool) if where is None else where
    if sign == "gain":
        return jnp.where(counted, divergences, 0.0)
    median = jnp.nanmedian(jnp.where(counted, divergences, jnp.nan))
    return jnp.where(counted, 1.0 / jnp.maximum(divergences + jnp.nan_to_num(median), 1e-12), 0.0)


def praw(pruned: jax.Array, *, form: str = "compact") -> jax.Array:
    """Pruning-ratio aggregation weights from the pruned fractions r_k: float32 [K], not normalised.

    `compact` favours smaller models, `1 / (1 - r_k)`; `dense` `1 - r_k`; `none` 1. The paper states the aim (weight
    grows with compactness), the formula is ours.

    >>> praw(jnp.array([0.0, 0.5])).tolist()
    [1.0, 2.0]
    """
    forms = {
        "compact": lambda r: 1.0 / jnp.maximum(1.0 - r, 1e-6),
        "dense": lambda r: 1.0 - r,
        "none": jnp.ones_like,
    }
    if form not in forms:
        raise ValueError(f"form: {form!r} is not known; it is one of {', '.join(forms)}")
    return forms[form](pruned)


def capped(weights: jax.Array, cap: float, where: jax.Array | None = None) -> jax.Array:
    """Weights summing to 1 with none above `cap / K`, the excess spread over the others in proportion.

    K is the number of clients that count (`where`, all by default); `cap >= K` leaves the weights alone.

    >>> capped(jnp.array([0.8, 0.1, 0.1]), 1.5).tolist()
    [0.5, 0.25, 0.25]
    """
    counted = jnp.ones_like(weights, bool) if where is None else where
    limit = cap / jnp.maximum(jnp.sum(counted), 1)

    def spread(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        current, full = state
        full = full | (current > limit)
        # A client without weight still takes its share of an excess that has nowhere else to go.
        open_weight = jnp.where(counted & ~full, current, 0.0)
        share = jnp.where(jnp.sum(open_weight) > 0, open_weight, (counted & ~full).astype(weights.dtype))
        room = 1.0 - limit * jnp.sum(full)
        return jnp.where(full, limit, jnp.where(counted, normalised(share) * room, 0.0)), full

    result, _ = jax.lax.fori_loop(0, weights.shape[0], spread, (weights, jnp.zeros_like(counted)))
    return jnp.where(cap >= jnp.sum(counted), weights, result)


def klpwa(
    klaw_weights: jax.Array,
    praw_weights: jax.Array,
    *,
    form: str = "product",
    mix: float = 0.5,
    cap: float = 3.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """KL- and pruning-aware weights: finite, summing to 1, none above `cap / K`. float32 [K].

    K is the number of clients that count (`where`, all by default); the others get 0.

    `product`: `a_k b_k` normalised; `sum`: `mix * a_k / sum a + (1 - mix) * b_k / sum b`.

    Source: FedKLPR combines the two; how is our choice.

    >>> klpwa(jnp.array([1., 1.]), jnp.array([1., 3.])).tolist()
    [0.25, 0.75]
    """
    if form not in ("product", "sum"):
        raise ValueError(f"form: {form!r} is not known; it is 'product' or 'sum'")
    counted = jnp.ones_like(klaw_weights, bool) if where is None else where
    a = normalised(jnp.where(counted, klaw_weights, 0.0))
    b = normalised(jnp.where(counted, praw_weights, 0.0))
    weights = a * b if form == "product" else mix * a + (1.0 - mix) * b
    weights = capped(normalised(jnp.where(counted, weights, 0.0)), cap, counted)
    return jnp.where(counted, weights, 0.0)
