"""Weights of others as the start of a trunk: ResNet-18, -34 and -50 under torchvision's names, and EfficientNet-Lite0.

    python experiments/run.py --config=experiments/fedklpr_r50.py --config.model.pretrained=resnet50.pth

What the file has and the network has not (the classifier) is left out; what the network has and the file has not (the
neck, the embedding block, the exponent of GeM) begins as it always does, and the classifier belongs to the task. Such
weights expect RGB images in [0, 1], less (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225) by channel: what
`data.augment.normalise` makes of every re-ID picture. The networks differ from theirs in the stride of the last
stage alone (`ModelSpec.last_stride`), which changes no shape of a weight.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.foreign_names import NAMINGS
from fedklpr_jax.models.spec import ModelSpec, Variables, make_spec
from fedklpr_jax.models.tensor_files import open_tensors, read_float32

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "efficientnet_lite0")

_MOST_NAMES = 4


class Loaded(NamedTuple):
    """Variables like those of `ModelSpec.init`, float32 host arrays, and in one line each what is from the file, and
    what is not."""

    variables: Variables
    report: tuple[str, ...]


def load(path: Path, spec: ModelSpec, key: jax.Array) -> Loaded:
    """Variables of a network with the trunk from a file.

    Names may stand behind a common prefix (`module.`, `backbone.`).

    Args:
      path: `.pth`, `.safetensors` or `.npz`, as `tensor_files.open_tensors` reads it.
      spec: a network of `ARCHITECTURES`, or another of their families; its blocks have to be those of the file.
      key: of `jax.random.key`, for what is not in the file.

    Raises:
      InputError: a file that cannot be read, is of another network, or lacks a tensor or has it in another shape.
    """
    tensors, naming = open_tensors(path), NAMINGS[spec.family]
    right = f"give {naming.words} of {spec.name}"
    prefix = _prefix(path, tensors, naming.anchor, right)
    ours = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    if another := naming.another(ours, spec):
        raise InputError(f"{path}: weights of {another}, not of {spec.name}; set config.model.arch, or {right}")

    def init(key: jax.Array) -> dict[str, jax.Array]:
        # The size of the images changes no shape.
        return traverse_util.flatten_dict(spec.init(key, 64, 32), sep="/")

    like = jax.eval_shape(init, key)
    wanted = {leaf: name for leaf in like if (name := naming.of(leaf))}
    missing = [name for name in wanted.values() if name not in ours]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing ({_few(missing)}); {right}")
    left = sorted(name for name in ours - set(wanted.values()) if not name.endswith("num_batches_tracked"))
    strange = [name for name in left if naming.trunk.match(name)]
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
    """The feature that the network in a file has for images, to check the file: theirs in front of the classifier.

    Args:
      path: as of `load`.
      images: float32 `[n, h, w, 3]`, RGB, normalised as at the top of this module.
      arch: one of `ARCHITECTURES`.
      last_stride: of the last stage: 2 as theirs, 1 as the runs have it.

    Returns:
      float32 `[n, d]`, averaged over the map, in eval mode.

    Raises:
      InputError: as `load`; another network; images of another type or shape.
    """
    if arch not in ARCHITECTURES:
        raise InputError(f"arch: {arch!r} has no names in files of others; give one of {', '.join(ARCHITECTURES)}")
    images = np.asarray(images)
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"images: {images.dtype} {images.shape} is not allowed; give float32 [n, h, w, 3], normalised")
    # Not by Winograd's tiles, which round more, and on a GPU without the short floats of its tensor cores.
    spec = make_spec(arch, last_stride=last_stride, neck="none", convolution="stock")
    variables = load(Path(path), spec, jax.random.key(0)).variables
    with jax.default_matmul_precision("float32"):
        outputs, _ = jax.jit(spec.apply, static_argnums=2)(variables, jnp.asarray(images), False)
    return np.asarray(outputs["pooled"])


def _prefix(path: Path, names: Collection[str], anchor: str, right: str) -> str:
    """What stands in front of every name of the trunk."""
    found = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{path}: {len(found)} networks, behind {_few(found)}; give a file of one")
    if any(name.startswith("params/") for name in names):
        raise InputError(f"{path}: weights of this library; give the file as config.model.weights")
    raise InputError(f"{path}: has no {anchor}, but {_few(sorted(names))}; {right}")


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a kernel `[h, w, i, o]` to `[o, i, h, w]`; of a vector as it is."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else tuple(shape)


def _few(names: Sequence[str]) -> str:
    """The first of some names in a line, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(name[:80] for name in names[:_MOST_NAMES]) + more or "nothing"
