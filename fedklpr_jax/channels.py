"""Structured pruning: which leaves share which output channels, how much a channel matters, and a network cut to some.

A *unit* is an output channel of a convolution or dense layer with its norm parameters and statistics, and the slices of
every later layer that reads it. Layers that are added to each other (a residual stream) share their channels: together
they are one *group*. Class outputs and image channels are in no group. A client keeps a set of channels of every group;
as a *structured mask* over the whole network that is a pruning mask like any other, and the network *cut* to it is the
same network of smaller widths: a cut channel has zero kernel, scale and bias, so that both compute the same numbers
(group norm counts the channels whose scale is not zero).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from fedklpr_jax.errors import InputError
from fedklpr_jax.trees import PyTree, path_map

TRUNK = "params/trunk/"
CLASSIFIER = "params/classifier/kernel"


class Slot(NamedTuple):
    """An axis of a leaf along which its entries belong to channels. An axis of r times as many entries as channels (a
    flattened map) holds them r times, channels fastest."""

    path: str
    axis: int


class Group(NamedTuple):
    """Channels that are kept or cut together.

    `width` how many; `multiple` how many of them a unit of the network's `widths` stands for (4 at the end of a
    bottleneck); `layers` the weights that make them, by layer: these are scored; `others` what else is indexed by them:
    statistics, and the inputs of the layers that read them. A slot need not be in every tree.
    """

    width: int
    multiple: int
    layers: tuple[tuple[Slot, ...], ...]
    others: tuple[Slot, ...]


class _Stream(NamedTuple):
    """Of a group while it is collected: `(layer, its norm or "")` that make its channels, layers that read them."""

    makers: list[tuple[str, str]]
    readers: list[str]
    multiple: int


def channel_groups(model: PyTree) -> tuple[Group, ...]:
    """The groups of a task's network, told by the names of its layers.

    Args:
      model: variables of a task, or their shared part, or a mask of these; only names and shapes are read, and only of
        `params/trunk`.

    Raises:
      InputError: none of the three families of `models/`.

    >>> from fedklpr_jax.models import make_spec
    >>> trunk = make_spec("cnn").init(jax.random.key(0), 28, 28, 1)
    >>> [group.width for group in channel_groups({"params": {"trunk": trunk["params"]}})]
    [32, 64, 512]
    """
    layers = model["params"]["trunk"]
    names = sorted(layers, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    if "layer1_0" in layers:
        streams = _residual(layers, [name for name in names if name.startswith("layer")])
    elif "conv1_1" in layers:
        streams = _chain([(name, name.replace("conv", "bn")) for name in names if name.startswith("conv")])
    elif {"conv1", "conv2", "dense"} <= layers.keys():
        streams = _chain([("conv1", ""), ("conv2", ""), ("dense", "")])
    else:
        raise InputError(
            f"model: a network of layers {', '.join(sorted(layers))} has no known channels; give a resnet, vgg or cnn"
        )
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(model, sep="/").items()}
    groups = [_group(stream, shapes) for stream in streams]
    # What reads the last map: an embedding block, or a neck and the task's classifier.
    if "embedding" in layers:
        head = [Slot(f"{TRUNK}embedding/kernel", 0)]
    else:
        head = [Slot(f"{TRUNK}bnneck/scale", 0), *_statistics("bnneck"), Slot(CLASSIFIER, 0)]
    return (*groups[:-1], groups[-1]._replace(others=groups[-1].others + tuple(head)))


def _chain(layers: list[tuple[str, str]]) -> list[_Stream]:
    """Every layer reads the one before."""
    readers = [[name] for name, _ in layers[1:]] + [[]]
    return [_Stream([layer], reader, 1) for layer, reader in zip(layers, readers, strict=True)]


def _residual(layers: PyTree, blocks: list[str]) -> list[_Stream]:
    """The inside of every block, and the streams: a new one begins where a block has a convolution on its shortcut."""
    made = []
    stream = _Stream([("conv1", "bn1")], [], 1)
    for block in blocks:
        bottleneck = "conv3" in layers[block]
        inside = [(f"{block}/conv{i}", f"{block}/bn{i}") for i in range(1, 4 if bottleneck else 3)]
        stream.readers.append(inside[0][0])
        made += [_Stream([one], [after], 1) for one, (after, _) in zip(inside, inside[1:], strict=False)]
        if "downsample_conv" in layers[block]:
            shortcut = f"{block}/downsample_conv"
            stream.readers.append(shortcut)
            made.append(stream)
            stream = _Stream([inside[-1], (shortcut, f"{block}/downsample_bn")], [], 4 if bottleneck else 1)
        else:
            stream.makers.append(inside[-1])
    return [*made, stream]


def _group(stream: _Stream, shapes: dict[str, tuple[int, ...]]) -> Group:
    layers, others = [], []
    for layer, norm in stream.makers:
        rank = len(shapes[f"{TRUNK}{layer}/kernel"])
        own = [Slot(f"{TRUNK}{layer}/kernel", rank - 1), Slot(f"{TRUNK}{layer}/bias", 0)]
        if norm:
            own += [Slot(f"{TRUNK}{norm}/scale", 0), Slot(f"{TRUNK}{norm}/bias", 0)]
            others += _statistics(norm)
        layers.append(tuple(own))
    for reader in stream.readers:
        path = f"{TRUNK}{reader}/kernel"
        others.append(Slot(path, len(shapes[path]) - 2))
    width = shapes[layers[0][0].path][-1]
    return Group(width, stream.multiple, tuple(layers), tuple(others))


def _statistics(norm: str) -> list[Slot]:
    return [Slot(f"batch_stats/trunk/{norm}/{name}", 0) for name in ("mean", "var")]


def _places(groups: Sequence[Group]) -> dict[str, list[tuple[int, int]]]:
    """Path of a leaf -> its axes and the numbers of their groups."""
    found: dict[str, list[tuple[int, int]]] = {}
    for number, group in enumerate(groups):
        for slot in (*(slot for layer in group.layers for slot in layer), *group.others):
            found.setdefault(slot.path, []).append((slot.axis, number))
    return found


def _layer_sums(
    tree: PyTree, groups: Sequence[Group], score: Callable[[PyTree], jax.Array]
) -> tuple[jax.Array, ...]:
    """Of every group the sum over its layers of a channel's share in its layer's score; `score` gets [width, weights of
    a channel]."""
    flat = traverse_util.flatten_dict({"params": tree}, sep="/")

    def rows(slot: Slot) -> PyTree:
        return jax.tree.map(
            lambda leaf: jnp.moveaxis(leaf, slot.axis, 0).reshape(leaf.shape[slot.axis], -1), flat[slot.path]
        )

    def layer_share(layer: tuple[Slot, ...]) -> jax.Array:
        parts = [rows(slot) for slot in layer if slot.path in flat]
        scores = score(jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts))
        total = jnp.sum(scores)
        return jnp.where(total > 0, scores / jnp.where(total > 0, total, 1.0), 0.0)

    return tuple(jnp.sum(jnp.stack([layer_share(layer) for layer in group.layers]), axis=0) for group in groups)


def channel_scores(
    params: PyTree, gradient: PyTree, fisher: PyTree, groups: Sequence[Group]
) -> tuple[jax.Array, ...]:
    """The loss that removing a channel is expected to cost, as a share of its layer's.

        S_c = |sum_{i in c} g_i w_i| + 1/2 sum_{i in c} h_i w_i^2

    over the weights i that make channel c: its kernel slice, bias and norm parameters. Divided by the layer's sum, so
    that the layers of a residual stream count alike, and added up over them.

    Args:
      params: the network's, as `model["params"]`.
      gradient: g, the mean gradient of the loss; same structure.
      fisher: h, the diagonal of the empirical Fisher matrix; same structure.
      groups: of `channel_groups`.

    Returns:
      float32 [width] of each group; of a layer without any score 0.

    Source: second-order expansion of the loss, as CA-HFP (arXiv 2603.12591) states its criterion in words; unit, Fisher
    and normalisation are ours.
    """

    def cost(unit: _Weight) -> jax.Array:
        first = jnp.sum(unit.gradient * unit.weight, axis=1)
        return jnp.abs(first) + 0.5 * jnp.sum(unit.fisher * jnp.square(unit.weight), axis=1)

    together = jax.tree.map(lambda *leaves: _Weight(*leaves), params, gradient, fisher)
    return _layer_sums(together, groups, cost)


class _Weight(NamedTuple):
    """A leaf with its gradient and curvature."""

    weight: jax.Array
    gradient: jax.Array
    fisher: jax.Array


def magnitude_scores(params: PyTree, groups: Sequence[Group]) -> tuple[jax.Array, ...]:
    """The same from weights alone, `S_c = sum_{i in c} w_i^2`: where the loss needs labels that are not there yet."""
    return _layer_sums(params, groups, lambda unit: jnp.sum(jnp.square(unit), axis=1))


def top_channels(scores: Sequence[jax.Array], counts: Sequence[Any]) -> tuple[jax.Array, ...]:
    """The `counts[i]` channels of highest score of every group, bool [width]; of equal ones the first.

    >>> [kept.tolist() for kept in top_channels([jnp.array([.1, .5, .5, .3])], [2])]
    [[False, True, True, False]]
    """
    # The rank of a channel, so that counts may be traced.
    return tuple(
        jnp.argsort(jnp.argsort(-score, stable=True)) < count for score, count in zip(scores, counts, strict=True)
    )


def keep_sets(kept: Sequence[jax.Array], counts: Sequence[int]) -> tuple[jax.Array, ...]:
    """The kept channels of every group as sorted numbers, int32 [count].

    >>> [keep.tolist() for keep in keep_sets([jnp.array([False, True, False, True])], [2])]
    [[1, 3]]
    """
    return tuple(jnp.nonzero(flags, size=count)[0] for flags, count in zip(kept, counts, strict=True))


def _along(flags: jax.Array, size: int) -> jax.Array:
    """A group's values along an axis of `size` entries, which may hold the channels several times."""
    return jnp.tile(flags, size // flags.shape[0])


def structured_mask(tree: PyTree, groups: Sequence[Group], kept: Sequence[jax.Array]) -> PyTree:
    """bool of the shapes of `tree`: True where every channel that an entry belongs to is kept.

    `kept` is bool [width] a group.
    """
    places = _places(groups)

    def mask(path: str, leaf: Any) -> jax.Array:
        shape = jnp.shape(leaf)
        found = jnp.ones(shape, bool)
        for axis, number in places.get(path, []):
            flags = _along(jnp.asarray(kept[number]), shape[axis])
            found &= flags.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return found

    return path_map(mask, tree)


def kept_channels(mask: PyTree, groups: Sequence[Group]) -> tuple[jax.Array, ...]:
    """The inverse of `structured_mask`: which channels of every group it keeps, bool [width]."""
    flat = traverse_util.flatten_dict(mask, sep="/")

    def kept(slot: Slot) -> jax.Array:
        leaf = flat[slot.path]
        return jnp.any(leaf, axis=tuple(i for i in range(leaf.ndim) if i != slot.axis))

    return tuple(kept(group.layers[0][0]) for group in groups)


def cut(tree: PyTree, groups: Sequence[Group], keep: Sequence[jax.Array]) -> PyTree:
    """The smaller network: the kept channels (int32 [count] a group, sorted) of every leaf in a group.

    `tree` may be any part of a task's variables.
    """
    places = _places(groups)

    def smaller(path: str, leaf: jax.Array) -> jax.Array:
        for axis, number in places.get(path, []):
            width = groups[number].width
            repeats = leaf.shape[axis] // width
            rows = (jnp.arange(repeats)[:, None] * width + keep[number]).ravel()
            leaf = jnp.take(leaf, rows, axis=axis, mode="clip")
        return leaf

    return path_map(smaller, tree)


def restore(small: PyTree, groups: Sequence[Group], kept: Sequence[jax.Array], into: PyTree) -> PyTree:
    """The inverse of `cut`: the entries of `small` in their places, those of cut channels from `into`.

    Args:
      small: what `cut` gave, or what became of it.
      groups: of the whole network.
      kept: bool [width] a group.
      into: the whole tree.
    """
    places = _places(groups)
    mask = structured_mask(into, groups, kept)

    def larger(path: str, leaf: jax.Array, whole: jax.Array, own: jax.Array) -> jax.Array:
        for axis, number in places.get(path, []):
            flags = _along(jnp.asarray(kept[number]), whole.shape[axis])
            # A gather: a scatter along two axes is a loop over entries on a CPU.
            rows = jnp.maximum(jnp.cumsum(flags) - 1, 0)
            leaf = jnp.take(leaf, rows, axis=axis, mode="clip")
        return jnp.where(own, leaf, whole)

    return path_map(larger, small, into, mask)


def keep_cut(tree: PyTree, mask: PyTree, old: PyTree) -> PyTree:
    """`tree` with the entries of the channels that a structured `mask` cuts as they are in `old`.

    `tree` and `old` are any part of a task's variables, `mask` is of another part that holds the trunk's parameters.
    """
    groups = channel_groups(mask)
    own = structured_mask(tree, groups, kept_channels(mask, groups))
    return jax.tree.map(jnp.where, own, tree, old)
