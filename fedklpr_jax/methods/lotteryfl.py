"""LotteryFL: every client looks for its winning ticket, a pruned network rewound to its first weights.

Li, Sun, Wang, Duan, Li, Chen, Li, "LotteryFL: Personalized and communication-efficient federated learning with lottery
ticket hypothesis on non-IID datasets", arXiv 2008.03371, algorithm 1. A round of client k, r_k its remaining rate:

    if score(m_k * theta_g) > start and r_k > end:
        m_k <- m_k without the lowest p % of the alive weights of each layer of m_k * theta_g;   r_k <- r_k (1 - p)
        theta <- m_k * theta_0                               rewound
    else:
        theta <- m_k * theta_g
    train theta under m_k
    server    g[j] = sum_k m_k[j] x_k[j] / sum_k m_k[j]; what nobody keeps stays. Clients count the same.

Ours: the score is taken on validation data (the authors' code reads the test set), on re-ID it is the mAP; floor(p *
alive) weights of a layer go, where an interpolated percentile may take one more; the classifier is not pruned; with the
weights and biases batch-norm statistics are rewound, which would not fit them; layers that stay at the client are not.
A client without labels scores with those that it made last: nothing is cut in its first round.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedklpr_jax import pruning
from fedklpr_jax.federated import ClientContext, ClientState, Method, Upload
from fedklpr_jax.methods.fedper import named
from fedklpr_jax.methods.subfedavg import aggregate, download
from fedklpr_jax.trees import PyTree, select


class Memory(NamedTuple):
    """What a client remembers: the model before round 0, theta_0, and its remaining rate, float32."""

    initial: PyTree
    rate: jax.Array


def make(*, local: str, step: float, start: float, end: float) -> Method:
    """LotteryFL; `local` names the layers that stay, `step` p, `start` a score and `end` a rate, are shares of 1."""

    def begin(client: ClientState, context: ClientContext) -> tuple[PyTree, ClientState]:
        # The download is m_k * theta_g already.
        memory: Memory = client.memory
        cut = (context.score(context.received) > start) & (memory.rate > end)
        smaller = pruning.magnitude_mask(context.received, client.mask, step, "layer")
        mask = select(cut, smaller, client.mask)
        model = select(cut, pruning.apply_mask(memory.initial, mask), context.received)
        rate = jnp.where(cut, memory.rate * (1.0 - step), memory.rate)
        return model, client._replace(mask=mask, memory=memory._replace(rate=rate))

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        return Upload(model, client.mask, {"images": context.images}), client, {"density": pruning.density(client.mask)}

    return Method(
        "lotteryfl",
        is_local=named(local),
        server_memory=pruning.mask_table,
        client_mask=pruning.full_mask,
        client_memory=lambda model, mask: Memory(model, jnp.float32(1)),
        download=download,
        begin=begin,
        finish=finish,
        aggregate=aggregate,
        needs_score=True,
    )
