"""`ModelSpec`: a network as a value, and the only seam between Flax and everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.cnn import CNN
from fedklpr_jax.models.convolution import CONVOLUTIONS, choose_convolution, choose_depthwise
from fedklpr_jax.models.efficientnet import KERNELS, EfficientNetLite
from fedklpr_jax.models.resnet import BottleneckBlock, ResNet
from fedklpr_jax.models.vgg import VGG

FAMILIES = ("resnet", "cnn", "vgg", "efficientnet")
NORMS = ("batch", "group")
NECKS = ("bn", "none")
STEMS = ("7x7/2+pool", "3x3/2", "3x3/1")
POOLINGS = ("avg", "gem")
DTYPES = ("float32", "bfloat16")

Variables = dict[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """A network as a hashable value; a narrower submodel is the same code with other `widths`.

    It ends with its embedding: the last classifier belongs to the task. Four families stand behind the same two calls:
    residual networks (re-ID and classification), EfficientNet-Lite, VGG with norms, and the small CNN of FedOBP.

    Attributes:
        name: what reports and errors call it.
        widths: of `"resnet"` the channels of each stage; the stem has `widths[0]`, a bottleneck stage ends with four
            times its width. Of `"vgg"` the channels of each convolution. Of `"cnn"` two convolutions and a dense layer.
            Of `"efficientnet"` the stem, what each of seven stages ends with, and the last convolution.
        blocks: of `"resnet"` and `"efficientnet"` the blocks of each stage, of `"vgg"` the convolutions before each
            pool; of `"cnn"` (1, 1, 1).
        bottleneck: 1x1-3x3-1x1 blocks (ResNet-50) instead of two 3x3 convolutions; residual networks only.
        stem: `"7x7/2+pool"` (stride 2, then 3x3 max-pool of stride 2), `"3x3/2"` or `"3x3/1"` for small images; read
            by residual networks.
        last_stride: stride of the last stage that has one; 1 keeps its map twice as large, the usual choice for re-ID;
            read by residual networks and EfficientNet.
        pooling: `"avg"`, or `"gem"` with a learnable exponent that starts at 3; the CNN has no global pooling.
        embedding_dim: 0 for the neck on the pooled feature; else the size of a Linear-BN block in its place (FedReID).
        dropout: rate on the embedding, in training only (FedReID: 0.5).
        dtype: of the trunk's computation, `"float32"` or `"bfloat16"`; parameters, statistics and outputs are float32.
        convolution: `"auto"` (by backend), `"winograd"`, `"patches"` or `"stock"`.
        family: `"resnet"`, `"cnn"`, `"vgg"` or `"efficientnet"`.
        neck: `"bn"` for a BNNeck; `"none"` where the embedding is the pooled feature, as in classification.
        norm: `"batch"`, or `"group"` for group norm of one group, which has no statistics of batches, so that none of
            another client's labels (Hsieh et al., "The non-IID data quagmire of decentralized machine learning", ICML
            2020) or of another submodel's channels get into a model.

    Raises:
        InputError: for a value outside these, or two that do not go together.

    >>> spec = make_spec("thin")
    >>> variables = spec.init(jax.random.key(0), 64, 32)
    >>> outputs, stats = jax.jit(spec.apply, static_argnames="train")(variables, jnp.zeros((2, 64, 32, 3)), train=False)
    >>> outputs["embedding"].shape == (2, spec.feature_dim)
    True
    """

    name: str
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    bottleneck: bool = False
    stem: str = "7x7/2+pool"
    last_stride: int = 1
    pooling: str = "avg"
    embedding_dim: int = 0
    dropout: float = 0.0
    dtype: str = "float32"
    convolution: str = "auto"
    family: str = "resnet"
    neck: str = "bn"
    norm: str = "batch"

    def __post_init__(self) -> None:
        for field in ("widths", "blocks"):
            value = getattr(self, field)
            if not (isinstance(value, tuple) and value and all(_is_whole(v) and v >= 1 for v in value)):
                raise InputError(f"model.{field}: {value!r} is not allowed; give whole numbers from 1, one a stage")
        choices = {"family": FAMILIES, "neck": NECKS, "norm": NORMS, "stem": STEMS, "last_stride": (1, 2),
                   "pooling": POOLINGS, "dtype": DTYPES, "convolution": CONVOLUTIONS,
                   "bottleneck": (False, True)}  # fmt: skip
        for field, allowed in choices.items():
            value = getattr(self, field)
            if value not in allowed:
                raise InputError(f"model.{field}: {value!r} is unknown; give one of {', '.join(map(str, allowed))}")
        self._refuse_misfits()
        if not (_is_whole(self.embedding_dim) and self.embedding_dim >= 0):
            raise InputError(f"model.embedding_dim: {self.embedding_dim!r} is not allowed; give 0 (BNNeck) or a size")
        if self.embedding_dim and self.neck == "none":
            raise InputError(f"model.embedding_dim: {self.embedding_dim} needs model.neck 'bn'; without a neck give 0")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise InputError(f"model.dropout: {self.dropout!r} is not allowed; give a rate from 0 to below 1")

    def _refuse_misfits(self) -> None:
        """Raise InputError where sizes or options do not fit the family."""
        widths, blocks = len(self.widths), len(self.blocks)
        if self.family == "resnet" and widths != blocks:
            raise InputError(f"model.blocks: {blocks} stages but model.widths has {widths}; give equally many")
        if self.family == "vgg" and widths != sum(self.blocks):
            raise InputError(
                f"model.blocks: {sum(self.blocks)} convolutions but model.widths has {widths}; give equally many"
            )
        if self.family == "efficientnet" and (blocks != len(KERNELS) or widths != blocks + 2):
            raise InputError(
                f"model.widths: the efficientnet takes {len(KERNELS) + 2} and {len(KERNELS)} blocks, not {widths} and "
                f"{blocks}; give a stem, {len(KERNELS)} stages and a head"
            )
        if self.family == "cnn" and (widths != 3 or self.blocks != (1, 1, 1)):
            raise InputError(
                f"model.widths: the cnn takes three and blocks (1, 1, 1), not {widths} and {self.blocks}; give those"
            )
        if self.family != "resnet" and self.bottleneck:
            raise InputError(f"model.bottleneck: the {self.family} has no residual blocks; give False")
        if self.family == "cnn" and self.neck == "none" and self.norm != "batch":
            raise InputError(f"model.norm: {self.norm!r} has no place in the cnn, which has no norms; give 'batch'")
        if self.family == "cnn" and self.pooling != "avg":
            raise InputError(f"model.pooling: {self.pooling!r} has no place in the cnn, which flattens; give 'avg'")

    @property
    def pooled_dim(self) -> int:
        """Size d of the pooled feature.

        >>> make_spec("resnet50", embedding_dim=512).pooled_dim
        2048
        """
        return self.widths[-1] * (BottleneckBlock.expansion if self.bottleneck else 1)

    @property
    def feature_dim(self) -> int:
        """Size e of the embedding.

        >>> make_spec("resnet50").feature_dim, make_spec("resnet50", embedding_dim=512).feature_dim
        (2048, 512)
        """
        return self.embedding_dim or self.pooled_dim

    def scaled(self, share: float, least: int = 8) -> ModelSpec:
        """The narrower network that a device of less capacity trains (HeteroFL, CA-HFP).

        Args:
            share: of the channels that each layer keeps, above 0 and at most 1; 1 gives an equal spec.
            least: channels that a layer keeps at least, where it has as many.

        Returns:
            The same network with every width times `share`, to the nearest multiple of 8 (of 4 where the full width is
            below 16), and never above the full width.

        Raises:
            InputError: for a share outside its range.

        >>> make_spec("cnn").scaled(0.4).widths, make_spec("thin").scaled(0.5).widths
        ((16, 24, 208), (8, 16, 32, 96))
        """
        if not 0 < share <= 1:
            raise InputError(f"share: {share!r} of the channels is not allowed; give a share above 0 and at most 1")
        if share == 1:
            return self

        def narrow(full: int) -> int:
            step = 8 if full >= 16 else 4
            return min(full, max(step * math.floor(full * share / step + 0.5), least))

        return replace(self, widths=tuple(map(narrow, self.widths)))

    def module(self) -> ResNet | EfficientNetLite | VGG | CNN:
        """The Linen module; only `models/` and its tests look at it."""
        shared: dict[str, Any] = {
            "widths": self.widths,
            "norm": self.norm,
            "neck": self.neck,
            "embedding_dim": self.embedding_dim,
            "dropout": self.dropout,
            "dtype": jnp.dtype(self.dtype),
            "convolution": choose_convolution(self.convolution),
        }
        if self.family == "cnn":
            return CNN(**shared)
        shared |= {"blocks": self.blocks, "pooling": self.pooling}
        if self.family == "vgg":
            return VGG(**shared)
        if self.family == "efficientnet":
            depthwise = choose_depthwise(self.convolution)
            return EfficientNetLite(last_stride=self.last_stride, depthwise=depthwise, **shared)
        return ResNet(bottleneck=self.bottleneck, stem=self.stem, last_stride=self.last_stride, **shared)

    def init(self, key: jax.Array, height: int, width: int, channels: int = 3) -> Variables:
        """Fresh variables: `{"params": ..., "batch_stats": ...}`, plain nested dicts of float32 arrays.

        Args:
            key: a key of `jax.random.key`.
            height: of the images in pixels; where pooling is global it changes no shape, nor does `width`.
            width: of the images in pixels.
            channels: of the images.

        Returns:
            The variables; `batch_stats` is `{}` for a network without batch norm.

        Raises:
            InputError: for images too small for the CNN.
        """
        return _init(self, key, height, width, channels)

    def apply(
        self,
        variables: Mapping[str, Any],
        images: jax.Array,
        train: bool,
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> tuple[dict[str, jax.Array], Variables]:
        """Features of a batch and the statistics after it.

        Args:
            variables: as `init` gives them.
            images: float32 `[n, h, w, c]`, normalised.
            train: True uses and records the statistics of the batch (running value = 0.9 old + 0.1 new) and applies
                dropout; False uses the running ones and returns them as they came.
            rngs: `{"dropout": key}`, needed when training with dropout.

        Returns:
            float32 `{"pooled": [n, d], "embedding": [n, e]}` (not L2-normalised), and the new `batch_stats`.

        Raises:
            InputError: training with dropout, but without its key.
        """
        # Linen types its results for every use of `apply`; Any picks the one in hand.
        module: Any = self.module()
        if not train:
            return module.apply(variables, images, train=False), variables["batch_stats"]
        if self.dropout and "dropout" not in (rngs or {}):
            raise InputError(f"model {self.name}: dropout {self.dropout} needs a key; give rngs={{'dropout': key}}")
        outputs, changed = module.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return outputs, changed.get("batch_stats", {})


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Compiled, so that the forward pass which Linen traces for the shapes is thrown away instead of run.
@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _init(spec: ModelSpec, key: jax.Array, height: int, width: int, channels: int) -> Variables:
    variables = spec.module().init(key, jnp.zeros((1, height, width, channels)), train=False)
    return {"batch_stats": {}, **variables}


_WIDTHS = (64, 128, 256, 512)
_VGG11_WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
_VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_VGG11 = ModelSpec("vgg11", _VGG11_WIDTHS, (1, 1, 2, 2, 2), family="vgg", neck="none")
_RESNET18_CIFAR = ModelSpec("resnet18_cifar", _WIDTHS, (2, 2, 2, 2), stem="3x3/1", last_stride=2, neck="none")
SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("resnet18", _WIDTHS, (2, 2, 2, 2)),
        ModelSpec("resnet34", _WIDTHS, (3, 4, 6, 3)),
        ModelSpec("resnet50", _WIDTHS, (3, 4, 6, 3), bottleneck=True),
        ModelSpec("efficientnet_lite0", (32, 16, 24, 40, 80, 112, 192, 320, 1280), (1, 2, 2, 3, 3, 4, 1),
                  family="efficientnet"),
        # For 64x32 images on a CPU: the first maps carry most of the cost and the last most of the parameters.
        ModelSpec("thin", (8, 32, 64, 192), (1, 1, 1, 1), stem="3x3/2", last_stride=2),
        # Classification of small images (28x28, 32x32).
        ModelSpec("cnn", (32, 64, 512), (1, 1, 1), family="cnn", neck="none"),
        _VGG11,
        replace(_VGG11, name="vgg16", widths=_VGG16_WIDTHS, blocks=(2, 2, 3, 3, 3)),
        replace(_VGG11, name="vgg11_thin", widths=tuple(width // 4 for width in _VGG11_WIDTHS)),
        _RESNET18_CIFAR,
        replace(_RESNET18_CIFAR, name="resnet_cifar_thin", widths=(16, 32, 64), blocks=(1, 1, 1)),
    )
}


def make_spec(name: str, **overrides: Any) -> ModelSpec:
    """A named network, with some of its fields replaced.

    Args:
        name: a key of `SPECS`.
        **overrides: fields of `ModelSpec`; `widths` and `blocks` may be lists.

    Raises:
        InputError: for an unknown name or field, or a value that `ModelSpec` refuses.

    >>> make_spec("resnet18", pooling="gem").pooling
    'gem'
    """
    if name not in SPECS:
        raise InputError(f"model.name: {name!r} is unknown; give one of {', '.join(SPECS)}")
    known = [field.name for field in fields(ModelSpec)]
    for field in overrides:
        if field not in known:
            raise InputError(f"model.{field}: no such field; give one of {', '.join(known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    return replace(SPECS[name], **values)
