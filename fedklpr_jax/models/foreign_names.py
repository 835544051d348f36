"""How files of others call the weights of our networks: torchvision's ResNets, and EfficientNet-Lite in PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from fedklpr_jax.models.spec import SPECS, ModelSpec

_LEAVES = {
    "params/kernel": "weight",
    "params/scale": "weight",
    "params/bias": "bias",
    "batch_stats/mean": "running_mean",
    "batch_stats/var": "running_var",
}
_RESIDUAL = re.compile(r"(conv1|bn1|layer\d+_\d+/(conv|bn|downsample_)\w+)/\w+")
_INVERTED = re.compile(r"((conv_stem|bn0|conv_head|bn1|blocks_\d+/(\w+_conv|bn\d)))/\w+")


class Naming(NamedTuple):
    """The names of a family of networks.

    Attributes:
      words: what to call them.
      anchor: a tensor of every network of the family, and the end of no other name.
      of: the path of a leaf -> the name of its tensor; None for what their networks have not.
      trunk: matches the beginning of the names of a trunk's tensors.
      another: (the names in a file, a spec) -> what network the names are of, if not of the spec's size; else "".
    """

    words: str
    anchor: str
    of: Callable[[str], str | None]
    trunk: re.Pattern[str]
    another: Callable[[set[str], ModelSpec], str]


def torchvision_name(path: str) -> str | None:
    """torchvision's name for a leaf of a residual network, by its path.

    >>> torchvision_name("params/layer1_0/downsample_bn/scale"), torchvision_name("batch_stats/bn1/var")
    ('layer1.0.downsample.1.weight', 'bn1.running_var')
    >>> torchvision_name("params/bnneck/scale")
    """
    kind, _, place = path.partition("/")
    if not _RESIDUAL.fullmatch(place):
        return None
    layer, _, leaf = place.rpartition("/")
    layer = re.sub(r"^(layer\d+)_(\d+)/", r"\1.\2.", layer)
    layer = layer.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    return f"{layer}.{_LEAVES[f'{kind}/{leaf}']}"


def lite_name(path: str) -> str | None:
    """The name in the PyTorch port of EfficientNet-Lite (`efficientnet_lite_pytorch`) for a leaf, by its path.

    >>> lite_name("params/blocks_3/depthwise_conv/kernel"), lite_name("batch_stats/bn1/mean")
    ('_blocks.3._depthwise_conv.weight', '_bn1.running_mean')
    >>> lite_name("params/bnneck/scale")
    """
    kind, _, place = path.partition("/")
    if not _INVERTED.fullmatch(place):
        return None
    layer, _, leaf = place.rpartition("/")
    return "_" + re.sub(r"^(blocks)_(\d+)/", r"\1.\2._", layer) + f".{_LEAVES[f'{kind}/{leaf}']}"


def _another_resnet(names: set[str], spec: ModelSpec) -> str:
    stages = [match for name in names if (match := re.fullmatch(r"layer(\d{1,2})\.\d+\.conv1\.weight", name))]
    last = max(int(match[1]) for match in stages)
    blocks = tuple(sum(int(match[1]) == stage for match in stages) for stage in range(1, last + 1))
    found = blocks, _TORCHVISION.anchor.replace("conv1", "conv3") in names
    if found == (spec.blocks, spec.bottleneck):
        return ""
    for known in SPECS.values():
        if known.family == "resnet" and known.neck == "bn" and (known.blocks, known.bottleneck) == found:
            return known.name
    return f"a ResNet of {'+'.join(map(str, blocks))} {'bottlenecks' if found[1] else 'blocks'}"


def _another_lite(names: set[str], spec: ModelSpec) -> str:
    blocks = {match[1] for name in names if (match := re.match(r"_blocks\.(\d{1,3})\.", name))}
    return "" if len(blocks) == sum(spec.blocks) else f"an EfficientNet of {len(blocks)} blocks"


_TORCHVISION = Naming(
    "torchvision-named weights", "layer1.0.conv1.weight", torchvision_name, re.compile(r"conv1\.|bn1\.|layer\d"),
    _another_resnet,
)  # fmt: skip
_LITE = Naming(
    "weights of efficientnet_lite_pytorch", "_conv_stem.weight", lite_name, re.compile(r"_(conv|bn|blocks)"),
    _another_lite,
)  # fmt: skip
NAMINGS = {"resnet": _TORCHVISION, "efficientnet": _LITE}
"""By `ModelSpec.family`."""
