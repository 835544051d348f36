"""What every re-ID task shares: embedding, augmentation, the probe batch, and the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax.data import augment as augmentation
from fedklpr_jax.data.picture_format import PictureFormat
from fedklpr_jax.data.site import Away, Clients, Site, here, pixels_here
from fedklpr_jax.data.stream import Streamed, import_grain
from fedklpr_jax.evaluation.features import Evaluation, evaluate_features
from fedklpr_jax.federated import Public
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.trees import PyTree

PROBE = 32
EMBED_BATCH = 64
# Batches of one call of a network at work. The memory that a call works in comes anew from the system, page by page:
# with one batch a call that took a fifth of ResNet-18's time on a CPU.
_BATCHES_A_CALL = 8


class Exam(NamedTuple):
    """A test: the `site` whose query is ranked against its gallery, and the number of the client whose model ranks;
    None = the server's, on a site that no client trains on. A site elsewhere is tested there."""

    site: Site | Away
    client: int | None


def exams_of(sites: Clients, exams: Sequence[Exam] | None) -> list[Exam]:
    """The given tests, or one on each client's own site."""
    return [Exam(site, client) for client, site in enumerate(sites)] if exams is None else list(exams)


def trunk_of(variables: PyTree) -> PyTree:
    """The variables of the network itself, out of those of a task; one without batch norm has no statistics."""
    stats = variables.get("batch_stats", {}).get("trunk", {})
    return {"params": variables["params"]["trunk"], "batch_stats": stats}


def normalise_features(features: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays one."""
    # The floor is under the root, where it stops the gradient of a row of zeros from being infinite.
    return features / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(features), axis=-1, keepdims=True), 1e-24))


def embed(
    spec: ModelSpec, variables: PyTree, images: Callable[[jax.Array], jax.Array], size: int, count: jax.Array
) -> jax.Array:
    """L2-normalised embeddings (eval mode) of the first `count` of `size` images; the other rows are 0.

    Args:
      spec: the network.
      variables: a task's.
      images: int32 [EMBED_BATCH] of places -> model inputs; places from `size` on are never asked for.
      size: how many there may be, a multiple of `EMBED_BATCH`.
      count: int32 scalar; only the batches it needs are run.

    Returns:
      float32 [size, feature_dim].
    """

    def batch(index: jax.Array, features: jax.Array) -> jax.Array:
        first = index * EMBED_BATCH
        outputs, _ = spec.apply(trunk_of(variables), images(first + jnp.arange(EMBED_BATCH)), False)
        return jax.lax.dynamic_update_slice(features, outputs["embedding"], (first, 0))

    features = jnp.zeros((size, spec.feature_dim))
    features = jax.lax.fori_loop(0, (count + EMBED_BATCH - 1) // EMBED_BATCH, batch, features)
    return jnp.where(jnp.arange(size)[:, None] < count, normalise_features(features), 0.0)


def training_pixels(sites: Clients, data: Any) -> np.ndarray | Streamed:
    """The training pictures that are on this machine, client after client: uint8 [n, h, w, 3], or with `data.stream`
    where they lie on disk.

    Raises:
      InputError: they are to be streamed, and Grain is not installed.
    """
    if data.stream:
        import_grain()
        return Streamed([site.train.pixels for site in here(sites)], (data.height, data.width, 3))
    return pixels_here(sites, data.height, data.width)


def padded(size: int) -> int:
    """`size` rounded up to whole batches of `embed`.

    >>> padded(1), padded(128)
    (64, 128)
    """
    return size + -size % EMBED_BATCH


def augmenting(data: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The training augmentation of `config.data`: (key, images) -> images."""
    return lambda key, images: augmentation.augment(
        key, images, flip_probability=data.flip, pad=data.pad, erase_probability=data.erase
    )


def public_images(pixels: np.ndarray, spec: ModelSpec) -> Public:
    """The server's unlabelled images as methods read them: un-normalised embeddings, in train mode without dropout.

    Args:
      pixels: uint8 [n, h, w, 3].
      spec: the network.
    """
    plain = dataclasses.replace(spec, dropout=0.0)

    def represent(
        pixels: jax.Array, model: PyTree, rows: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        outputs, stats = plain.apply(trunk_of(model), augmentation.normalise(pixels[rows]), train)
        return outputs["embedding"], {"trunk": stats}

    return Public(pixels, len(pixels), represent)


def probe_rows(training: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """D_batch: a fixed choice of 32 of the training rows, int32 [32]; the key is (seed, client)."""
    chosen = np.random.default_rng(key).choice(training, PROBE, replace=len(training) < PROBE)
    return chosen.astype(np.int32)


def picture_format(data: Any) -> PictureFormat:
    """What a network of re-ID takes; `data` is `config.data`."""
    mean, deviation = (tuple(values.tolist()) for values in (augmentation.MEAN, augmentation.STD))
    return PictureFormat(data.height, data.width, 3, mean, deviation)


# A trained network at work: (a task's variables, uint8 [n, h, w, c]) -> float32 [n, d].
Network = Callable[[PyTree, np.ndarray], np.ndarray]


def in_batches(function: Callable[[PyTree, Any], jax.Array], size: int) -> Network:
    """The pure `function`, which takes `size` pictures, compiled for any number of them from 1."""

    @jax.jit
    def program(variables: PyTree, pixels: jax.Array, batches: jax.Array) -> jax.Array:
        stacked = pixels.reshape(-1, size, *pixels.shape[1:])
        one = jax.eval_shape(function, variables, stacked[0])
        results = jnp.zeros((len(stacked), *one.shape), one.dtype)
        results = jax.lax.fori_loop(
            0, batches, lambda index, rows: rows.at[index].set(function(variables, stacked[index])), results
        )
        return results.reshape(-1, *one.shape[1:])

    def network(variables: PyTree, pixels: np.ndarray) -> np.ndarray:
        together, parts = size * _BATCHES_A_CALL, []
        for first in range(0, len(pixels), together):
            chunk = np.asarray(pixels[first : first + together])
            # One shape for all chunks: the last is filled up, or every client would compile anew.
            filled = np.zeros((together, *chunk.shape[1:]), np.uint8)
            filled[: len(chunk)] = chunk
            batches = np.int32(-(-len(chunk) // size))
            parts.append(np.asarray(program(variables, filled, batches))[: len(chunk)])
        return np.concatenate(parts)

    return network


def embedder(spec: ModelSpec) -> Network:
    """The embeddings that tests rank by: f(x) + f(flip x), L2-normalised."""

    def embed_batch(variables: PyTree, pixels: jax.Array) -> jax.Array:
        trunk, images = trunk_of(variables), augmentation.normalise(pixels)
        features = spec.apply(trunk, images, False)[0]["embedding"]
        features += spec.apply(trunk, augmentation.flip(images), False)[0]["embedding"]
        return normalise_features(features)

    return in_batches(embed_batch, EMBED_BATCH)


def evaluating(exams: Sequence[Exam], spec: ModelSpec, options: Any) -> Callable[[PyTree, int], Evaluation]:
    """(variables, number of the test) -> its result, of the embeddings of `embedder`.

    `options` is `config.eval`.
    """
    embed_all = embedder(spec)

    def evaluate(variables: PyTree, test: int) -> Evaluation:
        site = exams[test].site
        assert isinstance(site, Site), f"{site.name} is tested where its pictures are"
        return evaluate_features(
            embed_all(variables, site.query.pixels),
            embed_all(variables, site.gallery.pixels),
            site.query,
            site.gallery,
            average_precision=options.average_precision,
            rerank_lists=options.rerank,
        )

    return evaluate
