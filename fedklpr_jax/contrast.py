"""The camera-aware contrast of unsupervised re-ID: a sample against the proxies of its client.

FedCAPR (CVPRW 2025, from its authors' code): L = 0.6 L_intra + 0.7 L_inter over logits f . c / tau, c a proxy
(`proxies.py`), each the sum over the cameras of the batch of the mean over that camera's samples. The optional online
association is that of O2CAP (Wang et al., IEEE TIP 2022).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedklpr_jax.losses import MASKED_LOGIT
from fedklpr_jax.proxies import Bank


def proxy_logits(features: jax.Array, bank: Bank, *, temperature: float) -> jax.Array:
    """`f . c / tau` for every proxy, empty places out of play: float32 [b, n]. `features` are L2-normalised."""
    logits = features @ jax.lax.stop_gradient(bank.features).T / temperature
    return jnp.where(bank.clusters >= 0, logits, MASKED_LOGIT)


def camera_weights(cameras: jax.Array) -> jax.Array:
    """The weight of each sample in a sum over cameras of means over their samples: float32 [b].

    >>> camera_weights(jnp.array([3, 1, 3])).tolist()
    [0.5, 1.0, 0.5]
    """
    return 1.0 / jnp.sum(cameras[:, None] == cameras[None], axis=1)


def intra_camera(logits: jax.Array, bank: Bank, points: jax.Array) -> jax.Array:
    """L_intra, one value a sample: cross-entropy over the proxies of the sample's own camera.

    Args:
      logits: float32 [b, n], of `proxy_logits`.
      bank: the proxies.
      points: int32 [b], the samples' points; each must have a proxy.
    """
    own = bank.of_point[points]
    same_camera = bank.cameras[None] == bank.cameras[own][:, None]
    log_p = jax.nn.log_softmax(jnp.where(same_camera, logits, MASKED_LOGIT))
    return -jnp.take_along_axis(log_p, own[:, None], axis=1)[:, 0]


def _against(logits: jax.Array, positive: jax.Array, hardness: jax.Array, negatives: int) -> jax.Array:
    """`-(1/|P|) sum_{p in P} log(exp(l_p) / sum_{q in P + N} exp(l_q))`, N the others of most `hardness`."""
    ranked = jnp.where(positive, -jnp.inf, hardness)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(ranked), min(negatives, logits.shape[1]))
    # With fewer others than that the choice runs on into the positives, which must not count twice.
    taken = jnp.take_along_axis(positive, chosen, axis=1)
    hard = jnp.where(taken, MASKED_LOGIT, jnp.take_along_axis(logits, chosen, axis=1))
    both = jnp.concatenate([jnp.where(positive, logits, MASKED_LOGIT), hard], axis=1)
    mean = jnp.sum(jnp.where(positive, logits, 0.0), axis=1) / jnp.sum(positive, axis=1)
    return jax.nn.logsumexp(both, axis=1) - mean


def inter_camera(logits: jax.Array, bank: Bank, points: jax.Array, *, negatives: int) -> jax.Array:
    """L_inter, one value a sample: P all proxies of its cluster, N the `negatives` most similar other proxies."""
    positive = bank.clusters[None] == bank.clusters[bank.of_point[points]][:, None]
    return _against(logits, positive, logits, negatives)


def online_association(
    features: jax.Array,
    logits: jax.Array,
    bank: Bank,
    points: jax.Array,
    *,
    cameras: int,
    negatives: int,
    positives: int = 3,
    balance: float = 0.15,
) -> jax.Array:
    """O2CAP's online loss, one value a sample: P is found anew for every sample instead of by clustering.

    Proxies are ranked by `balance f . c + (1 - balance) c_own . c`; of the best one of each camera the `positives` most
    similar are P, and N are the `negatives` most similar of all others.

    Args:
      features: float32 [b, d], L2-normalised.
      logits: float32 [b, n], of `proxy_logits`.
      bank: the proxies.
      points: int32 [b].
      cameras: how many cameras there are at most.
      negatives: |N|.
      positives: |P| at most (fewer where there are fewer cameras).
      balance: weight of the sample against its proxy [O2CAP's code: 0.15].
    """
    anchors = bank.features[bank.of_point[points]]
    similar = (balance * jax.lax.stop_gradient(features) + (1.0 - balance) * anchors) @ bank.features.T
    similar = jnp.where(bank.clusters >= 0, similar, -jnp.inf)
    of_camera = bank.cameras[None] == jnp.arange(cameras)[:, None]
    best = jax.vmap(lambda row: jnp.argmax(jnp.where(of_camera, row, -jnp.inf), axis=1))(similar)
    scores = jnp.where(of_camera.any(axis=1), jnp.take_along_axis(similar, best, axis=1), -jnp.inf)
    top, chosen = jax.lax.top_k(scores, min(positives, cameras))
    rows = jnp.arange(len(points))[:, None]
    positive = jnp.zeros(logits.shape, bool).at[rows, jnp.take_along_axis(best, chosen, axis=1)].max(jnp.isfinite(top))
    return _against(logits, positive, similar, negatives)
