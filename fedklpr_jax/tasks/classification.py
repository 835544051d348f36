"""Image classification: cross-entropy over a linear classifier on the network's embedding.

The problem of FedOBP's, CA-HFP's and most personalisation papers: one data set dealt to many clients, each of which
keeps a part of its images for its own test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedklpr_jax.data.labelled import Labelled
from fedklpr_jax.data.picture_format import PictureFormat
from fedklpr_jax.data.plans import shuffled_plan
from fedklpr_jax.data.stream import Streamed, ahead_of, import_grain
from fedklpr_jax.evaluation.accuracy import Classified, classified
from fedklpr_jax.federated import ClientData, Examined, Task
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.optimizer import make_optimizer, step_decay
from fedklpr_jax.tasks import reid
from fedklpr_jax.trees import PyTree

TEST_BATCH = 256


class Share(NamedTuple):
    """The rows of one client in the data set, int [n] each."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Arrays(NamedTuple):
    """The data set: `pixels` uint8 [n, h, w, c], `labels` int32 [n]."""

    pixels: Any
    labels: Any


class Held(NamedTuple):
    """Of one client: `validation` int32 [v], its validation rows, padded; `validations` int32, how many."""

    validation: Any
    validations: Any


def image(rows: jax.Array) -> jax.Array:
    """The image at each place of a batch; places that only fill it up hold the complement of a row."""
    return jnp.where(rows < 0, ~rows, rows)


def make_task(
    data: Labelled, shares: Sequence[Share], spec: ModelSpec, config: Any, *, pooled: bool = False
) -> Task:
    """Classification of `data` over clients that hold `shares` of it.

    Args:
      data: images and labels.
      shares: the rows of each client.
      spec: the network.
      config: the run's configuration (`data`, `task`, `optimizer`, `seed`, `rounds` are read).
      pooled: all training images in one client, tested on each share's test images (centralised training).
    """
    names = tuple(f"c{k:0{len(str(len(shares) - 1))}d}" for k in range(len(shares)))
    own = [Share(*(np.concatenate(rows) for rows in zip(*shares, strict=True)))] if pooled else list(shares)
    training = np.concatenate([share.train for share in own])
    pictures = _picture_format(data.pixels, training)
    height, width, channels = pictures.shape
    classes, batch = len(data.classes), config.task.batch
    augmented = any((config.data.flip, config.data.pad, config.data.erase))

    def init(key: jax.Array) -> PyTree:
        trunk_key, kernel_key, bias_key = jax.random.split(key, 3)
        start = spec.init(trunk_key, height, width, channels)
        # PyTorch's default for a linear layer, which the settings to be reproduced start from.
        bound = spec.feature_dim**-0.5
        classifier = {
            "kernel": jax.random.uniform(kernel_key, (spec.feature_dim, classes), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(bias_key, (classes,), minval=-bound, maxval=bound),
        }
        return {
            "params": {"trunk": start["params"], "classifier": classifier},
            "batch_stats": {"trunk": start["batch_stats"]},
        }

    def inputs(arrays: Arrays, rows: jax.Array) -> jax.Array:
        return pictures.normalise(arrays.pixels[image(rows)])

    def forward(
        variables: PyTree, images: jax.Array, client: ClientData, train: bool, key: jax.Array
    ) -> tuple[dict[str, jax.Array], PyTree]:
        outputs, new_stats = spec.apply(reid.trunk_of(variables), images, train, {"dropout": key})
        logits = _logits(variables, outputs["embedding"])
        # Of a network without batch norm the tree holds no statistics, and must not begin to.
        stats = {"trunk": new_stats} if new_stats else variables.get("batch_stats", {})
        return outputs | {"logits": logits}, stats

    def loss(arrays: Arrays, outputs: dict[str, jax.Array], rows: jax.Array, client: ClientData) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], arrays.labels[image(rows)])
        counted = rows >= 0
        return jnp.sum(jnp.where(counted, each, 0.0)) / jnp.maximum(jnp.sum(counted), 1)

    def predict(variables: PyTree, images: jax.Array) -> jax.Array:
        # A classifier does not care which client asks, nor evaluation for the key.
        outputs, _ = forward(variables, images, clients[0], False, jax.random.key(0))
        return jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)

    def score(arrays: Arrays, variables: PyTree, client: ClientData) -> jax.Array:
        rows, count = client.task.validation, client.task.validations

        def chunk(index: jax.Array, right: jax.Array) -> jax.Array:
            place = index * batch + jnp.arange(batch)
            chosen = rows[place]
            hits = predict(variables, inputs(arrays, chosen)) == arrays.labels[chosen]
            return right + jnp.sum(hits & (place < count))

        right = jax.lax.fori_loop(0, (count + batch - 1) // batch, chunk, jnp.int32(0))
        return right / jnp.maximum(count, 1)

    def plan(seed: int, round_: int, client: int, epochs: int) -> np.ndarray:
        rows = own[client].train
        return np.stack([shuffled_plan(rows, batch, key=(seed, round_, client, epoch)) for epoch in range(epochs)])

    classify = classifier(spec, pictures)

    def evaluate(variables: PyTree, test: int) -> Classified:
        rows = shares[test].test
        predicted = np.argmax(classify(variables, data.pixels[rows]), axis=-1)
        return classified(predicted.astype(np.int32), data.labels[rows])

    pixels: np.ndarray | Streamed = data.pixels
    if config.data.stream:
        import_grain()
        pixels = Streamed([data.pixels], (height, width, channels))
    clients = _clients(own, batch, config.seed)
    return Task(
        name="classification",
        arrays=Arrays(pixels, data.labels.astype(np.int32)),
        client_names=("all",) if pooled else names,
        clients=clients,
        init=init,
        inputs=inputs,
        augment=reid.augmenting(config.data) if augmented else lambda key, images: images,
        forward=forward,
        loss=loss,
        score=score,
        plan=plan,
        evaluate=evaluate,
        optimizer=make_optimizer(config.optimizer),
        learning_rate=step_decay(config.optimizer, config.rounds, config.last),
        tests=tuple(Examined(name, 0 if pooled else k) for k, name in enumerate(names)),
        ahead=ahead_of(pixels),
        pictures=pictures,
        classes=tuple(data.classes),
    )


def _logits(variables: PyTree, embedding: jax.Array) -> jax.Array:
    classifier = variables["params"]["classifier"]
    return embedding @ classifier["kernel"] + classifier["bias"]


def classifier(spec: ModelSpec, pictures: PictureFormat) -> reid.Network:
    """The logits that tests are answered by: that of the answer is the largest."""

    def classify_batch(variables: PyTree, pixels: jax.Array) -> jax.Array:
        outputs, _ = spec.apply(reid.trunk_of(variables), pictures.normalise(pixels), False)
        return _logits(variables, outputs["embedding"])

    return reid.in_batches(classify_batch, TEST_BATCH)


def _picture_format(pixels: np.ndarray, training: np.ndarray) -> PictureFormat:
    """That of `pixels`, of which the `training` rows give mean and deviation; a constant channel has deviation 1."""
    chosen, axes = pixels[training], (0, 1, 2)
    mean, deviation = chosen.mean(axes, dtype=np.float64), chosen.std(axes, dtype=np.float64)
    values = (mean.astype(np.float32), np.where(deviation > 0, deviation, 1.0).astype(np.float32))
    return PictureFormat(*pixels.shape[1:], *(tuple(of.tolist()) for of in values))


def _clients(shares: Sequence[Share], batch: int, seed: int) -> tuple[ClientData, ...]:
    # Whole batches, so that the last one of a score never reads past the end.
    widest = max(len(share.validation) for share in shares)
    widest += -widest % batch
    clients = []
    for index, share in enumerate(shares):
        rows = np.zeros(max(widest, batch), np.int32)
        rows[: len(share.validation)] = share.validation
        held = Held(rows, np.int32(len(share.validation)))
        probe = reid.probe_rows(share.train, (seed, index))
        clients.append(ClientData(np.int32(index), np.float32(len(share.train)), probe, held))
    return tuple(clients)
