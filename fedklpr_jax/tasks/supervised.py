"""Supervised person re-ID: identity cross-entropy with label smoothing plus batch-hard triplet loss.

The identity loss reads the classifier's logits (over the BNNeck output), the triplet loss the pooled feature before
the neck (Luo et al., "Bag of tricks and a strong baseline for deep person re-identification", CVPRW 2019). Whole
identities are held out of training for the validation score, a retrieval mAP; test images are only ever evaluated on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax import losses
from fedklpr_jax.data import augment as augmentation
from fedklpr_jax.data.plans import identity_plan
from fedklpr_jax.data.site import Clients, Site, here
from fedklpr_jax.data.stream import Streamed, ahead_of
from fedklpr_jax.data.validation import hold_out_identities, same_camera_counts
from fedklpr_jax.evaluation.validation import retrieval_map
from fedklpr_jax.federated import ClientData, Examined, Task
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.optimizer import make_optimizer, step_decay
from fedklpr_jax.tasks import reid
from fedklpr_jax.trees import PyTree


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


# What `sizes` tells.
SIZES = ("images", "classes", "held")


def sizes(site: Site, seed: int) -> dict[str, int]:
    """What the others' shapes depend on: the `classes` a client trains, and how many rows it has for training and for
    validation, `images` and `held`; `seed` is the run's.

    Raises:
      InputError: too few identities to train and to validate on.
    """
    held = _held(site, seed)
    return {
        "images": int((~held).sum()),
        "classes": len(np.unique(site.train.ids[~held])),
        "held": int(held.sum()),
    }


def _held(site: Site, seed: int) -> np.ndarray:
    return hold_out_identities(site.train.ids, site.train.cams, seed=seed, client=site.name)


def make_task(
    sites: Clients,
    spec: ModelSpec,
    config: Any,
    *,
    union: bool,
    trunk: PyTree | None = None,
    exams: Sequence[reid.Exam] | None = None,
) -> Task:
    """Supervised re-ID over `sites`, one client each.

    Args:
      sites: the clients' pictures, or of clients on other machines their `sizes`.
      spec: the network.
      config: the run's configuration (`data`, `task`, `optimizer`, `eval`, `seed`, `rounds` are read).
      union: one classifier over all clients' identities (FedAvg), else one a client, padded to the widest.
      trunk: the network's variables to start from; None = random ones.
      exams: what is tested; None = each client on its own site.

    Raises:
      InputError: a client has too few identities to train and to validate on.
    """
    tests = reid.exams_of(sites, exams)
    known = [sizes(site, config.seed) if isinstance(site, Site) else site.sizes for site in sites]
    classes = [of["classes"] for of in known]
    height, width = config.data.height, config.data.width
    arrays = _arrays(sites, classes, union, config.seed, reid.training_pixels(sites, config.data))
    clients = _clients(sites, known, union, config.seed)
    widest = sum(classes) if union else max(classes)
    options = config.task

    def init(key: jax.Array) -> PyTree:
        trunk_key, head_key = jax.random.split(key)
        start = spec.init(trunk_key, height, width) if trunk is None else trunk
        kernel = 0.001 * jax.random.normal(head_key, (spec.feature_dim, widest))
        return {
            "params": {"trunk": start["params"], "classifier": {"kernel": kernel}},
            "batch_stats": {"trunk": start["batch_stats"]},
        }

    def inputs(arrays: Arrays, rows: jax.Array) -> jax.Array:
        return augmentation.normalise(arrays.pixels[rows])

    def forward(
        variables: PyTree, images: jax.Array, client: ClientData, train: bool, key: jax.Array
    ) -> tuple[dict[str, jax.Array], PyTree]:
        outputs, new_stats = spec.apply(reid.trunk_of(variables), images, train, {"dropout": key})
        logits = outputs["embedding"] @ variables["params"]["classifier"]["kernel"]
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
        features = reid.embed(spec, variables, lambda chunk: inputs(arrays, rows[chunk]), len(rows), count)
        valid = jnp.arange(len(rows)) < count
        return retrieval_map(features, arrays.ids[rows], arrays.cams[rows], valid, client.task.same_camera)

    @jax.jit
    def score_alone(arrays: Arrays, variables: PyTree, client: ClientData) -> jax.Array:
        return score(arrays, variables, client)

    # Labels of one client's own rows, for the sampler: rows of the plan are global.
    spans = _spans(sites)

    def plan(seed: int, round_: int, client: int, epochs: int) -> np.ndarray:
        first, last = spans[client], spans[client + 1]
        if first == last:
            return np.zeros((epochs, 0, options.people * options.shots), np.int32)
        rows = [
            identity_plan(
                arrays.labels[first:last], people=options.people, shots=options.shots, key=(seed, round_, client, epoch)
            )
            for epoch in range(epochs)
        ]
        return (np.stack(rows) + first).astype(np.int32)

    return Task(
        name="supervised",
        arrays=arrays,
        client_names=tuple(site.name for site in sites),
        clients=clients,
        init=init,
        inputs=inputs,
        augment=reid.augmenting(config.data),
        forward=forward,
        loss=loss,
        score=score,
        plan=plan,
        evaluate=reid.evaluating(tests, spec, config.eval),
        tests=tuple(Examined(site.name, client) for site, client in tests),
        optimizer=make_optimizer(config.optimizer),
        learning_rate=step_decay(config.optimizer, config.rounds, config.last),
        validate=lambda variables, client: float(score_alone(arrays, variables, clients[client])),
        ahead=ahead_of(arrays.pixels),
        pictures=reid.picture_format(config.data),
    )


def _spans(sites: Clients) -> np.ndarray:
    """Where each client's rows begin, and the end of the last: int64 [K + 1]; of a client elsewhere none are here."""
    return np.cumsum([0, *(len(site.train) if isinstance(site, Site) else 0 for site in sites)])


def _arrays(
    sites: Clients, classes: Sequence[int], union: bool, seed: int, pixels: np.ndarray | Streamed
) -> Arrays:
    """All training images of this machine in one place, with class labels from 0 a client (or over the union)."""
    labels = [np.zeros(0, np.int32)]
    for index, site in enumerate(sites):
        if isinstance(site, Site):
            held = _held(site, seed)
            label = np.unique(site.train.ids[~held], return_inverse=True)[1]
            row_labels = np.full(len(site.train), -1, np.int32)
            row_labels[~held] = label + (sum(classes[:index]) if union else 0)
            labels.append(row_labels)
    trains = [site.train for site in here(sites)]
    empty = np.zeros(0, np.int32)
    return Arrays(
        pixels,
        np.concatenate([empty, *(train.ids for train in trains)]).astype(np.int32),
        np.concatenate([empty, *(train.cams for train in trains)]).astype(np.int32),
        np.concatenate(labels),
    )


def _clients(sites: Clients, known: Sequence[Mapping[str, int]], union: bool, seed: int) -> tuple[ClientData, ...]:
    widest = max(of["held"] for of in known)
    widest += -widest % reid.EMBED_BATCH
    classes = [of["classes"] for of in known]
    clients = []
    for index, (site, first) in enumerate(zip(sites, _spans(sites), strict=False)):
        rows, probe, alike = np.zeros(widest, np.int32), np.zeros(reid.PROBE, np.int32), False
        if isinstance(site, Site):
            held = _held(site, seed)
            rows[: held.sum()] = first + np.flatnonzero(held)
            probe = reid.probe_rows(first + np.flatnonzero(~held), (seed, index))
            alike = same_camera_counts(site.train.ids[held], site.train.cams[held])
        data = ReIDData(
            np.int32(sum(classes) if union else classes[index]), rows, np.int32(known[index]["held"]), np.bool_(alike)
        )
        clients.append(ClientData(np.int32(index), np.float32(known[index]["images"]), probe, data))
    return tuple(clients)
