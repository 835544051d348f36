"""FedKLPR: KL-guided federated re-ID with pruned, personalised models.

"FedKLPR: KL-guided pruning-aware federated learning for person re-identification", arXiv 2508.17431. A round of
client k, M^{t-1} the model decoded from its download, M^t the one it uploads:

    CRR 2   restore the mask before the last accepted step if the download scores worse than the one before that step
    KLL     L = L_task + d * KL(P_{M^{t-1}} || P_M)                          from round 1 on
    prune   m' = m without the smallest floor(step * alive) weights          never in a client's first round (ours)
    CRR 1   m <- m' if score(m' * M) >= score(m * M) - drop, else m
    KLAW    a_k = mean KL(P_{M^{t-1}} || P_{M^t}) on the fixed batch D_batch
    server  r_k from the mask (PRAW), w_k from a_k and r_k (KLPWA), and the sparse-skipping mean (SAS)
            g[j] = sum_k w_k m_k[j] x_k[j] / sum_k w_k m_k[j]

The paper states these parts; the formulas it leaves open are configuration fields, described in `config.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedklpr_jax import aggregation, losses, pruning
from fedklpr_jax.federated import (
    ClientContext,
    ClientState,
    Message,
    Method,
    ServerContext,
    ServerState,
    Step,
    Upload,
    Uploads,
)
from fedklpr_jax.methods.fedpav import is_classifier
from fedklpr_jax.trees import PyTree, merge, pair

FEATURES = {"features": "embedding", "proxies": "logits"}


class Memory(NamedTuple):
    """What a client remembers: CRR's `Recovery`, and of the round in progress the download's score and whether the
    mask was restored."""

    recovery: pruning.Recovery
    score_download: jax.Array
    recovered: jax.Array


def make(*, kll: Any, klaw: Any, praw: Any, klpwa: Any, sas: Any, prune: Any, crr: Any, bn: Any) -> Method:
    """FedKLPR from its configuration sections (`config.method.kll`, ... ; attributes as in `config.py`)."""

    def is_local(path: str) -> bool:
        return is_classifier(path) or (bn.statistics == "local" and path.startswith("batch_stats/"))

    def divergence(reference: Any, local: Any, direction: str) -> jax.Array:
        space = FEATURES[kll.space]
        return losses.kl_feature_loss(
            reference[space], local[space], temperature=kll.temperature, direction=direction
        )

    def client_memory(model: PyTree, mask: PyTree) -> Memory:
        return Memory(pruning.no_recovery(model, mask), jnp.float32(0), jnp.bool_(False))

    def download(server: ServerState, client: jax.Array) -> Message:
        if kll.reference == "global":
            return Message(server.model, None)
        mask = jax.tree.map(lambda leaf: leaf[client], server.memory)
        return Message(pruning.apply_mask(server.model, mask), mask)

    def personalise(message: Message, client: ClientState) -> PyTree:
        return pruning.apply_mask(message.model, client.mask)

    def begin(client: ClientState, context: ClientContext) -> tuple[PyTree, ClientState]:
        model = pruning.apply_mask(context.received, client.mask)
        score = context.score(model)
        model, mask, recovery, recovered = pruning.crr_recover(
            client.memory.recovery, model, client.mask, score, recover=crr.recover, halt=crr.halt
        )
        return model, client._replace(mask=mask, memory=Memory(recovery, score, recovered))

    def penalty(step: Step) -> jax.Array:
        kl = divergence(step.reference(), step.outputs, kll.direction)
        return jnp.where(step.round > 0, kll.weight, 0.0) * kl

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        memory: Memory = client.memory
        candidate = pruning.magnitude_mask(model, client.mask, prune.step, prune.scope, target=prune.target)
        # Pairs of models go through one traced copy of the network: half the compile time, the same work.
        score_current, score_candidate = jax.lax.map(context.score, pair(model, pruning.apply_mask(model, candidate)))
        mask, recovery, decision = pruning.crr_accept(
            memory.recovery, model, client.mask, candidate,
            memory.score_download, score_current, score_candidate, drop=crr.drop,
        )  # fmt: skip
        decision = jnp.where(memory.recovered, pruning.DECISIONS.index("recovered"), decision)
        uploaded = pruning.apply_mask(model, mask)
        # M^{t-1} with the local leaves (statistics, classifier) it was received with, not with the trained ones.
        received = merge(context.received, context.received_local)
        outputs = jax.lax.map(context.probe, pair(received, merge(uploaded, client.local)))
        before, after = ({name: leaf[k] for name, leaf in outputs.items()} for k in (0, 1))
        gained = divergence(before, after, "forward")
        logs = {
            "density": pruning.density(mask),
            "decision": decision,
            "score_download": memory.score_download,
            "score_current": score_current,
            "score_candidate": score_candidate,
        }
        upload = Upload(uploaded, mask, {"images": context.images, "klaw": gained})
        return upload, client._replace(mask=mask, memory=memory._replace(recovery=recovery)), logs

    def aggregate(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        accepted = uploads.accepted
        # Rounding takes the divergence of all but equal models below 0, and `gain` would make it a negative weight.
        gained = jnp.where(accepted, jnp.maximum(uploads.scalars["klaw"], 0.0), 0.0)
        by_images = aggregation.image_weights(uploads.scalars["images"], accepted)
        a = by_images if klaw.sign == "none" else aggregation.klaw(gained, sign=klaw.sign, where=accepted)
        b = aggregation.praw(1.0 - jax.vmap(pruning.density)(uploads.mask), form=praw.form)
        weights = aggregation.klpwa(a, b, form=klpwa.form, mix=klpwa.mix, cap=klpwa.cap, where=accepted)
        if klaw.sign != "none":
            weights = jnp.where(jnp.sum(gained) < 1e-12, by_images, weights)
        # Without SAS pruned entries count as the zeros that they are.
        kept = uploads.mask if sas.form == "skip" else None
        model = context.mean(uploads.model, kept, weights, server.model)
        masks = pruning.updated_table(server.memory, uploads.mask, uploads.clients, accepted)
        return ServerState(model, masks, server.round + 1), {"weight": weights, "klaw": gained, "praw": b}

    return Method(
        "fedklpr",
        is_local=is_local,
        server_memory=pruning.mask_table,
        client_mask=pruning.full_mask,
        client_memory=client_memory,
        download=download,
        begin=begin,
        penalty=penalty,
        finish=finish,
        aggregate=aggregate,
        personalise=personalise,
        tells=("images", "klaw"),
        needs_score=True,
    )
