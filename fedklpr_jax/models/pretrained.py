"""Weights of others: ResNet-18, -34 and -50 under torchvision's names, as the start of a trunk.

    python experiments/run.py --config=experiments/fedklpr_r50.py --config.model.pretrained=resnet50.pth

What the file has and the network has not (`fc`) is left out; what the network has and the file has not (the neck, the
embedding block, the exponent of GeM) begins as it always does, and the classifier belongs to the task. Such weights
expect RGB images in [0, 1], less (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225) by channel: what
`data.augment.normalise` makes of every re-ID picture. The networks differ from torchvision's in the stride of the last
stage alone (`ModelSpec.last_stride`), which changes no shape of a weight.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.spec import SPECS, ModelSpec, Variables, make_spec
from fedklpr_jax.models.tensor_files import open_tensors, read_float32

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")

_ANCHOR = "layer1.0.conv1.weight"  # in every residual network, and at the end of no other name
_LEAVES = {
    "params/kernel": "weight",
    "params/scale": "weight",
    "params/bias": "bias",
    "batch_stats/mean": "running_mean",
    "batch_stats/var": "running_var",
}
_TRUNK = re.compile(r"(conv1|bn1|layer\d+_\d+/(conv|bn|downsample_)\w+)/\w+")
_MOST_NAMES = 4


class Loaded(NamedTuple):
    """Variables like those of `ModelSpec.init`, float32 host arrays, and in one line each what is from the file, and
    what is not."""

    variables: Variables
    report: tuple[str, ...]


def torch_name(path: str) -> str | None:
    """torchvision's name for a leaf of a residual network, by its path; None for what torchvision's has not.

    >>> torch_name("params/layer1_0/downsample_bn/scale"), torch_name("batch_stats/bn1/var")
    ('layer1.0.downsample.1.weight', 'bn1.running_var')
    >>> torch_name("params/bnneck/scale")
    """
    kind, _, place = path.partition("/")
    if not _TRUNK.fullmatch(place):
        return None
    layer, _, leaf = place.rpartition("/")
    layer = re.sub(r"^(layer\d+)_(\d+)/", r"\1.\2.", layer)
    layer = layer.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    return f"{layer}.{_LEAVES[f'{kind}/{leaf}']}"


def load(path: Path, spec: ModelSpec, key: jax.Array) -> Loaded:
    """Variables of a residual network with the trunk from a file.

    Names may stand behind a common prefix (`module.`, `backbone.`).

    Args:
      path: `.pth`, `.safetensors` or `.npz`, as `tensor_files.open_tensors` reads it.
      spec: the network; its blocks have to be those of the file.
      key: of `jax.random.key`, for what is not in the file.

    Raises:
      InputError: a file that cannot be read, is of another network, or lacks a tensor or has it in another shape.
    """
    tensors = open_tensors(path)
    prefix = _prefix(path, tensors)
    ours = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    right = f"give torchvision-named weights of {spec.name}"
    found = _blocks(ours)
    if found != (spec.blocks, spec.bottleneck):
        raise InputError(f"{path}: weights of {_named(*found)}, not of {spec.name}; set config.model.arch, or {right}")

    def init(key: jax.Array) -> dict[str, jax.Array]:
        # The size of the images changes no shape.
        return traverse_util.flatten_dict(spec.init(key, 64, 32), sep="/")

    like = jax.eval_shape(init, key)
    wanted = {leaf: name for leaf in like if (name := torch_name(leaf))}
    missing = [name for name in wanted.values() if name not in ours]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing ({_few(missing)}); {right}")
    left = sorted(name for name in ours - set(wanted.values()) if not name.endswith("num_batches_tracked"))
    strange = [name for name in left if re.match(r"conv1\.|bn1\.|layer\d", name)]
    if strange:
        raise InputError(f"{path}: {_few(strange)}: no part of {spec.name}, so that it is another network; {right}")
    for leaf, name in wanted.items():
        has, shape = tensors[prefix + name].shape, _torch_shape(like[leaf].shape)
        if has != shape:
            raise InputError(f"{path}: {prefix}{name}: shape {has}, not {shape} as in {spec.name}; {right}")
    # Compiled for these alone, which takes no time beside the whole network's.
    rest = jax.jit(lambda key: {leaf: value for leaf, value in init(key).items() if leaf not in wanted})(key)
    leaves = {leaf: np.asarray(value) for leaf, value in rest.items()}
    for leaf, name in wanted.items():
        value = read_float32(path, tensors, prefix + name)
        leaves[leaf] = np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value)
    fresh = sorted({leaf.split("/")[1] for leaf in rest})
    left += sorted(name for name in tensors if not name.startswith(prefix))
    behind = f", named behind {prefix!r}" if prefix else ""
    report = (
        f"{path.name}: {len(wanted)} tensors make the trunk of {spec.name}{behind}",
        f"{path.name}: not used of it: {_few(left)}; not in it, and as initialised: {_few(fresh)}",
    )
    return Loaded(traverse_util.unflatten_dict({leaf: leaves[leaf] for leaf in like}, sep="/"), report)


def trunk_features(
    path: str | os.PathLike[str], images: Any, arch: str = "resnet50", last_stride: int = 2
) -> np.ndarray:
    """The feature that the network in a file has for images, to check the file: torchvision's in front of `fc`.

    Args:
      path: as of `load`.
      images: float32 `[n, h, w, 3]`, RGB, normalised as at the top of this module.
      arch: one of `ARCHITECTURES`.
      last_stride: of the last stage: 2 as in torchvision, 1 as the runs have it.

    Returns:
      float32 `[n, d]`, averaged over the map, in eval mode.

    Raises:
      InputError: as `load`; another network; images of another type or shape.
    """
    if arch not in ARCHITECTURES:
        raise InputError(f"arch: {arch!r} has no torchvision names; give one of {', '.join(ARCHITECTURES)}")
    images = np.asarray(images)
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"images: {images.dtype} {images.shape} is not allowed; give float32 [n, h, w, 3], normalised")
    # Not by Winograd's tiles, which round more, and on a GPU without the short floats of its tensor cores.
    spec = make_spec(arch, last_stride=last_stride, neck="none", convolution="stock")
    variables = load(Path(path), spec, jax.random.key(0)).variables
    with jax.default_matmul_precision("float32"):
        outputs, _ = jax.jit(spec.apply, static_argnums=2)(variables, jnp.asarray(images), False)
    return np.asarray(outputs["pooled"])


def _prefix(path: Path, names: Collection[str]) -> str:
    """What stands in front of every name of the trunk."""
    found = [name.removesuffix(_ANCHOR) for name in names if name.endswith(_ANCHOR)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{path}: {len(found)} networks, behind {_few(found)}; give a file of one")
    if any(name.startswith("params/") for name in names):
        raise InputError(f"{path}: weights of this library; give the file as config.model.weights")
    raise InputError(f"{path}: has no {_ANCHOR}, but {_few(sorted(names))}; give torchvision-named weights of a ResNet")


def _blocks(names: set[str]) -> tuple[tuple[int, ...], bool]:
    """Blocks of each stage, and whether they are bottlenecks."""
    stages = [match for name in names if (match := re.fullmatch(r"layer(\d{1,2})\.\d+\.conv1\.weight", name))]
    last = max(int(match[1]) for match in stages)
    counts = tuple(sum(int(match[1]) == stage for match in stages) for stage in range(1, last + 1))
    return counts, _ANCHOR.replace("conv1", "conv3") in names


def _named(blocks: tuple[int, ...], bottleneck: bool) -> str:
    for name in ARCHITECTURES:
        if (SPECS[name].blocks, SPECS[name].bottleneck) == (blocks, bottleneck):
            return name
    return f"a ResNet of {'+'.join(map(str, blocks))} {'bottlenecks' if bottleneck else 'blocks'}"


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a kernel `[h, w, i, o]` to `[o, i, h, w]`; of a vector as it is."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else tuple(shape)


def _few(names: Sequence[str]) -> str:
    """The first of some names in a line, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(name[:80] for name in names[:_MOST_NAMES]) + more or "nothing"
