"""ResNet for re-identification: the residual trunk of He et al. (2016) under a BNNeck (Luo et al., 2019).

Names follow the usual ones (`conv1`, `bn1`, `layer1_0/conv1`, `layer1_0/downsample_conv`, ...), so weights of other
libraries map onto the paths one to one. Convolution and dense leaves are called `kernel`, those of norms `scale` and
`bias`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from fedklpr_jax.models.convolution import Convolution, max_pool
from fedklpr_jax.models.layers import conv, outputs, pool_map, relu
from fedklpr_jax.models.norms import Layer, make_norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; `conv` and `norm` are the layer factories of the whole network."""

    width: int
    stride: int
    conv: Layer
    norm: Layer

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, h, w, c]` to `[n, h / stride, w / stride, width]`."""
        y = self.conv(self.width, 3, self.stride, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.width, 3, 1, name="conv2")(y)
        y = self.norm(name="bn2")(y)
        return relu(y + _shortcut(self, x, self.width))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (which strides, as in torchvision), 1x1 to four times the width."""

    width: int
    stride: int
    conv: Layer
    norm: Layer

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, h, w, c]` to `[n, h / stride, w / stride, 4 * width]`."""
        y = self.conv(self.width, 1, 1, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.width, 3, self.stride, name="conv2")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(4 * self.width, 1, 1, name="conv3")(y)
        y = self.norm(name="bn3")(y)
        return relu(y + _shortcut(self, x, 4 * self.width))


def _shortcut(block: BasicBlock | BottleneckBlock, x: jax.Array, features: int) -> jax.Array:
    if block.stride == 1 and x.shape[-1] == features:
        return x
    x = block.conv(features, 1, block.stride, name="downsample_conv")(x)
    return block.norm(name="downsample_bn")(x)


class ResNet(nn.Module):
    """Trunk, pooling and neck; `fedklpr_jax.models.spec.ModelSpec` builds it and says what each field means."""

    widths: Sequence[int]
    blocks: Sequence[int]
    bottleneck: bool
    stem: str
    last_stride: int
    pooling: str
    norm: str
    neck: str
    embedding_dim: int
    dropout: float
    dtype: Any
    convolution: Convolution

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """Features of a batch.

        Args:
            images: float32 `[n, h, w, c]`, normalised.
            train: True for statistics of the batch and dropout, False for running statistics.

        Returns:
            float32 `{"pooled": [n, d], "embedding": [n, e]}`, neither of them L2-normalised.
        """
        layer = partial(conv, dtype=self.dtype, convolution=self.convolution)
        norm = make_norm(self.norm, train=train, dtype=self.dtype)
        block = BottleneckBlock if self.bottleneck else BasicBlock

        kernel, stride = {"7x7/2+pool": (7, 2), "3x3/2": (3, 2), "3x3/1": (3, 1)}[self.stem]
        x = layer(self.widths[0], kernel, stride, name="conv1")(images)
        x = relu(norm(name="bn1")(x))
        if self.stem == "7x7/2+pool":
            x = max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        last = len(self.widths) - 1
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            stage_stride = 1 if stage == 0 else self.last_stride if stage == last else 2
            for i in range(count):
                x = block(width, stage_stride if i == 0 else 1, layer, norm, name=f"layer{stage + 1}_{i}")(x)

        return outputs(
            pool_map(x, self.pooling),
            neck=self.neck,
            embedding_dim=self.embedding_dim,
            dropout=self.dropout,
            norm=norm,
            train=train,
        )
