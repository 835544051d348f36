"""Losses of person re-identification and of federated regularisation: pure functions of features and logits."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax

MASKED_LOGIT = -1e9


def kl_feature_loss(
    reference: jax.Array, local: jax.Array, *, temperature: float = 1.0, direction: str = "forward"
) -> jax.Array:
    """Mean KL divergence between two sets of features read as distributions: float32 scalar.

    `P = softmax(reference / T)`, `Q = softmax(local / T)`, `D_KL(P || Q) = sum P log(P / Q)`, no T^2 factor.
    Features are taken as they are: on L2-normalised wide features the divergence all but vanishes.

    Args:
      reference: [batch, d], the received model's features (or logits).
      local: [batch, d], those of the model in training.
      temperature: T > 0.
      direction: `forward` = KL(reference || local), `reverse` = KL(local || reference).

    Source: FedKLPR (arXiv 2508.17431), KL-divergence regularisation loss and KL aggregation weight; softmax over
    un-normalised features and T are our choice.

    >>> float(kl_feature_loss(jnp.array([[0., 0.]]), jnp.array([[0., 0.]])))
    0.0
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction: {direction!r} is not known; it is 'forward' or 'reverse'")
    chex.assert_rank(local, 2)
    chex.assert_equal_shape([reference, local])
    first, second = (reference, local) if direction == "forward" else (local, reference)
    log_p = jax.nn.log_softmax(first.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(second.astype(jnp.float32) / temperature)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def cosine_distance(reference: jax.Array, local: jax.Array) -> jax.Array:
    """`mean(1 - cos)` between the rows of two sets of features [batch, d]: float32 scalar; a row of zeros counts 1.

    Source: FedCAPR's penalty and cosine distance weight; FedReID (ACM MM 2020) for the weight.

    >>> float(cosine_distance(jnp.array([[3., 0.], [1., 1.]]), jnp.array([[0., 2.], [2., 2.]])))
    0.5
    """
    chex.assert_rank(local, 2)
    chex.assert_equal_shape([reference, local])
    return jnp.mean(optax.losses.cosine_distance(local, reference, epsilon=1e-12))


def mask_logits(logits: jax.Array, num_classes: jax.Array) -> jax.Array:
    """Logits [batch, widest] with the columns from `num_classes` on (padding of a narrower client) put out of play."""
    return jnp.where(jnp.arange(logits.shape[-1]) < num_classes, logits, MASKED_LOGIT)


def identity_cross_entropy(
    logits: jax.Array, labels: jax.Array, num_classes: jax.Array, *, smoothing: float = 0.1
) -> jax.Array:
    """Cross-entropy over a client's own identities with label smoothing: float32 scalar.

    The target is `1 - smoothing` on the label plus `smoothing / num_classes` on each of the client's classes.

    Args:
      logits: [batch, widest], already passed through `mask_logits`.
      labels: int32 [batch] in [0, num_classes).
      num_classes: int32 scalar, the client's true number of identities.
      smoothing: in [0, 1).
    """
    chex.assert_rank([logits, labels], [2, 1])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    true = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    valid = jnp.arange(logits.shape[-1]) < num_classes
    spread = jnp.sum(jnp.where(valid, log_p, 0.0), axis=-1) / num_classes
    return -jnp.mean((1.0 - smoothing) * true + smoothing * spread)


def batch_hard_triplet(features: jax.Array, labels: jax.Array, *, margin: float = 0.3) -> jax.Array:
    """Batch-hard triplet loss on Euclidean distances: float32 scalar.

    For each anchor `max(0, margin + farthest positive - nearest negative)`, averaged over the anchors that have both.

    Args:
      features: [batch, d], un-normalised.
      labels: int32 [batch].
      margin: in units of distance.

    Source: Hermans et al., "In defense of the triplet loss" (arXiv 1703.07737), equation 5.
    """
    chex.assert_rank([features, labels], [2, 1])
    x = features.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1)
    distance = jnp.sqrt(jnp.maximum(squared[:, None] + squared[None] - 2.0 * x @ x.T, 1e-12))
    same = labels[:, None] == labels[None]
    positive = same & ~jnp.eye(len(labels), dtype=bool)
    hardest_positive = jnp.max(jnp.where(positive, distance, 0.0), axis=1)
    hardest_negative = jnp.min(jnp.where(same, jnp.inf, distance), axis=1)
    usable = positive.any(axis=1) & (~same).any(axis=1)
    excess = jnp.where(usable, margin + hardest_positive - jnp.where(usable, hardest_negative, 0.0), 0.0)
    return jnp.sum(jnp.maximum(excess, 0.0)) / jnp.maximum(jnp.sum(usable), 1)


def proximal(params: jax.typing.ArrayLike, received: jax.typing.ArrayLike) -> jax.Array:
    """`1/2 * ||params - received||^2` over two trees: float32 scalar (FedProx, Li et al. 2020, equation 2, mu = 1)."""
    chex.assert_trees_all_equal_shapes(params, received)
    difference = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), params, received)
    return 0.5 * optax.tree.norm(difference, squared=True)
