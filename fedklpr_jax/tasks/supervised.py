"""Supervised person re-ID: identity cross-entropy with label smoothing plus batch-hard triplet loss.

The identity loss reads the classifier's logits (over the BNNeck output), the triplet loss the pooled feature before
the neck (Luo et al., "Bag of tricks and a strong baseline for deep person re-identification", CVPRW 2019). Whole
identities are held out of training for the validation score, a retrieval mAP; test images are only ever evaluated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax import losses
from fedklpr_jax.data import augment as augmentation
from fedklpr_jax.data.plans import identity_plan
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.data.validation import hold_out_identities, same_camera_counts
from fedklpr_jax.evaluation.features import Evaluation, evaluate_features
from fedklpr_jax.evaluation.validation import retrieval_map
from fedklpr_jax.federated import ClientData, Task
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.optimizer import make_optimizer, step_decay
from fedklpr_jax.trees import PyTree

PROBE = 32
EMBED_BATCH = 64


class Arrays(NamedTuple):
    """The training images of all clients, one after the other.

    `pixels` uint8 [n, h, w, 3]; `ids` and `cams` int32 [n] as in the data set; `labels` int32 [n], the class that the
    classifier learns, -1 for validation images.
    """

    pixels: Any
    ids: Any
    cams: Any
    labels: Any


class ReIDData(NamedTuple):
    """Of one client: `classes` int32, how many its classifier has; `validation` int32 [v], its validation rows,
    padded; `validations` int32, how many; `same_camera` bool, whether same-camera matches count among them."""

    classes: Any
    validation: Any
    validations: Any
    same_camera: Any


def make_task(sites: Sequence[Site], spec: ModelSpec, config: Any, *, union: bool) -> Task:
    """Supervised re-ID over `sites`, one client each.

    Args:
      sites: the clients' pictures.
      spec: the network.
      config: the run's configuration (`data`, `task`, `optimizer`, `eval`, `seed`, `rounds` are read).
      union: one classifier over all clients' identities (FedAvg), else one a client, padded to the widest.

    Raises:
      InputError: a client has too few identities to train and to validate on.
    """
    held = [hold_out_identities(s.train.ids, s.train.cams, seed=config.seed, client=s.name) for s in sites]
    arrays, classes = _arrays(sites, held, union)
    clients = _clients(sites, held, classes, union, config.seed)
    widest = sum(classes) if union else max(classes)
    height, width = config.data.height, config.data.width
    options = config.task

    def init(key: jax.Array) -> PyTree:
        trunk_key, head_key = jax.random.split(key)
        trunk = spec.init(trunk_key, height, width)
        kernel = 0.001 * jax.random.normal(head_key, (spec.feature_dim, widest))
        return {
            "params": {"trunk": trunk["params"], "classifier": {"kernel": kernel}},
            "batch_stats": {"trunk": trunk["batch_stats"]},
        }

    def inputs(arrays: Arrays, rows: jax.Array) -> jax.Array:
        return augmentation.normalise(arrays.pixels[rows])

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        return augmentation.augment(
            key,
            images,
            flip_probability=config.data.flip,
            pad=config.data.pad,
            erase_probability=config.data.erase,
        )

    def forward(
        variables: PyTree, images: jax.Array, client: ClientData, train: bool, key: jax.Array
    ) -> tuple[dict[str, jax.Array], PyTree]:
        params, stats = variables["params"], variables["batch_stats"]
        trunk = {"params": params["trunk"], "batch_stats": stats["trunk"]}
        outputs, new_stats = spec.apply(trunk, images, train, {"dropout": key})
        logits = outputs["embedding"] @ params["classifier"]["kernel"]
        return outputs | {"logits": losses.mask_logits(logits, client.task.classes)}, {"trunk": new_stats}

    def loss(arrays: Arrays, outputs: dict[str, jax.Array], rows: jax.Array, client: ClientData) -> jax.Array:
        labels = arrays.labels[rows]
        total = jnp.float32(0)
        if options.identity:
            total += options.identity * losses.identity_cross_entropy(
                outputs["logits"], labels, client.task.classes, smoothing=options.smoothing
            )
        if options.triplet:
            total += options.triplet * losses.batch_hard_triplet(outputs["pooled"], labels, margin=options.margin)
        return total

    def score(arrays: Arrays, variables: PyTree, client: ClientData) -> jax.Array:
        rows, count = client.task.validation, client.task.validations

        def embed(index: jax.Array, features: jax.Array) -> jax.Array:
            chunk = jax.lax.dynamic_slice(rows, (index * EMBED_BATCH,), (EMBED_BATCH,))
            outputs, _ = forward(variables, inputs(arrays, chunk), client, False, jax.random.key(0))
            return jax.lax.dynamic_update_slice(features, outputs["embedding"], (index * EMBED_BATCH, 0))

        features = jnp.zeros((len(rows), spec.feature_dim))
        features = jax.lax.fori_loop(0, (count + EMBED_BATCH - 1) // EMBED_BATCH, embed, features)
        features /= jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        valid = jnp.arange(len(rows)) < count
        return retrieval_map(features, arrays.ids[rows], arrays.cams[rows], valid, client.task.same_camera)

    # Labels of one client's own rows, for the sampler: rows of the plan are global.
    spans = np.cumsum([0, *(len(site.train) for site in sites)])

    def plan(seed: int, round_: int, client: int, epochs: int) -> np.ndarray:
        first, last = spans[client], spans[client + 1]
        rows = [
            identity_plan(
                arrays.labels[first:last], people=options.people, shots=options.shots, key=(seed, round_, client, epoch)
            )
            for epoch in range(epochs)
        ]
        return (np.stack(rows) + first).astype(np.int32)

    @jax.jit
    def embed_test(variables: PyTree, pixels: jax.Array) -> jax.Array:
        trunk = {"params": variables["params"]["trunk"], "batch_stats": variables["batch_stats"]["trunk"]}
        images = augmentation.normalise(pixels)
        features = spec.apply(trunk, images, False)[0]["embedding"]
        features += spec.apply(trunk, augmentation.flip(images), False)[0]["embedding"]
        return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def embed_images(variables: PyTree, images: Images) -> np.ndarray:
        parts = []
        for first in range(0, len(images), EMBED_BATCH):
            chunk = np.asarray(images.pixels[first : first + EMBED_BATCH])
            # One shape for all chunks: the last is filled up, or every client would compile anew.
            filled = np.zeros((EMBED_BATCH, *chunk.shape[1:]), np.uint8)
            filled[: len(chunk)] = chunk
            parts.append(np.asarray(embed_test(variables, filled))[: len(chunk)])
        return np.concatenate(parts)

    def evaluate(variables: PyTree, client: int) -> Evaluation:
        site = sites[client]
        return evaluate_features(
            embed_images(variables, site.query),
            embed_images(variables, site.gallery),
            site.query,
            site.gallery,
            average_precision=config.eval.average_precision,
            rerank_lists=config.eval.rerank,
        )

    return Task(
        name="supervised",
        arrays=arrays,
        client_names=tuple(site.name for site in sites),
        clients=clients,
        init=init,
        inputs=inputs,
        augment=augment,
        forward=forward,
        loss=loss,
        score=score,
        plan=plan,
        evaluate=evaluate,
        optimizer=make_optimizer(config.optimizer),
        learning_rate=step_decay(config.optimizer, config.rounds),
    )


def _arrays(sites: Sequence[Site], held: Sequence[np.ndarray], union: bool) -> tuple[Arrays, list[int]]:
    """All training images in one place with class labels from 0 a client (or over the union), and classes a client."""
    labels: list[np.ndarray] = []
    classes: list[int] = []
    for site, validation in zip(sites, held, strict=True):
        own, label = np.unique(site.train.ids[~validation], return_inverse=True)
        row_labels = np.full(len(site.train), -1, np.int32)
        row_labels[~validation] = label + (sum(classes) if union else 0)
        labels.append(row_labels)
        classes.append(len(own))
    arrays = Arrays(
        np.concatenate([np.asarray(site.train.pixels) for site in sites]),
        np.concatenate([site.train.ids for site in sites]).astype(np.int32),
        np.concatenate([site.train.cams for site in sites]).astype(np.int32),
        np.concatenate(labels),
    )
    return arrays, classes


def _clients(
    sites: Sequence[Site], held: Sequence[np.ndarray], classes: Sequence[int], union: bool, seed: int
) -> tuple[ClientData, ...]:
    widest = max(int(validation.sum()) for validation in held)
    widest += -widest % EMBED_BATCH
    clients, first = [], 0
    for index, (site, validation) in enumerate(zip(sites, held, strict=True)):
        training = first + np.flatnonzero(~validation)
        own = first + np.flatnonzero(validation)
        rows = np.zeros(widest, np.int32)
        rows[: len(own)] = own
        random = np.random.default_rng((seed, index))
        data = ReIDData(
            np.int32(sum(classes) if union else classes[index]),
            rows,
            np.int32(len(own)),
            np.bool_(same_camera_counts(site.train.ids[validation], site.train.cams[validation])),
        )
        probe = random.choice(training, PROBE, replace=len(training) < PROBE).astype(np.int32)
        clients.append(ClientData(np.int32(index), np.float32(len(training)), probe, data))
        first += len(site.train)
    return tuple(clients)
