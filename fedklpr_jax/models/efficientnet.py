"""EfficientNet-Lite (Tan and Le, "EfficientNet", ICML 2019, without squeeze-and-excitation and swish), under a BNNeck.

Mobile inverted bottlenecks: a 1x1 convolution to `EXPANSION` times the channels, a depthwise one, a 1x1 convolution
back, the sum with the input where the shape stays; clipped at 6 (`relu6`) behind all but the last. Names follow those
of the public PyTorch weights (`conv_stem`, `blocks_0/depthwise_conv`, ..., `conv_head`), which were converted from
TensorFlow: maps are padded as there ("SAME", more zeros behind than before) and the norms' epsilon is 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from fedklpr_jax.models.convolution import Convolution
from fedklpr_jax.models.layers import outputs, pool_map, same_conv
from fedklpr_jax.models.norms import Layer, make_norm

EXPANSION = 6
EPSILON = 1e-3  # of all norms but the neck's
# Of the seven stages; the first does not expand, and the sixth has `ModelSpec.last_stride`.
KERNELS = (3, 3, 5, 3, 5, 5, 3)
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_LAST_STRIDE = 5


def strides(last_stride: int) -> tuple[int, ...]:
    """Of the first block of each stage.

    >>> strides(1)
    (1, 2, 2, 2, 1, 1, 1)
    """
    return (*_STRIDES[:_LAST_STRIDE], last_stride, *_STRIDES[_LAST_STRIDE + 1 :])


class InvertedBottleneck(nn.Module):
    """One block; `conv` and `norm` are the layer factories of the whole network."""

    width: int
    kernel: int
    stride: int
    expansion: int
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, h, w, c]` to `[n, h / stride, w / stride, width]`."""
        y, wide = x, self.expansion * x.shape[-1]
        if self.expansion != 1:
            y = self.conv(wide, 1, 1, name="expand_conv")(y)
            y = nn.relu6(self.norm(name="bn0")(y))
        y = self.conv(wide, self.kernel, self.stride, depthwise=True, name="depthwise_conv")(y)
        y = nn.relu6(self.norm(name="bn1")(y))
        y = self.conv(self.width, 1, 1, name="project_conv")(y)
        y = self.norm(name="bn2")(y)
        return x + y if x.shape == y.shape else y


class EfficientNetLite(nn.Module):
    """Trunk, pooling and neck; `fedklpr_jax.models.spec.ModelSpec` builds it and says what each field means."""

    widths: Sequence[int]
    blocks: Sequence[int]
    last_stride: int
    pooling: str
    norm: str
    neck: str
    embedding_dim: int
    dropout: float
    dtype: Any
    convolution: Convolution
    depthwise: Convolution

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """Features of a batch.

        Args:
            images: float32 `[n, h, w, c]`, normalised.
            train: True for statistics of the batch and dropout, False for running statistics.

        Returns:
            float32 `{"pooled": [n, d], "embedding": [n, e]}`, neither of them L2-normalised.
        """
        layer = partial(same_conv, dtype=self.dtype, convolution=self.convolution, by_channel=self.depthwise)
        norm = make_norm(self.norm, train=train, dtype=self.dtype)
        inner = partial(norm, epsilon=EPSILON)

        stem, *widths, head = self.widths
        x = layer(stem, 3, 2, name="conv_stem")(images)
        x = nn.relu6(inner(name="bn0")(x))
        number = 0
        stages = zip(widths, self.blocks, KERNELS, strides(self.last_stride), strict=True)
        for stage, (width, count, kernel, stride) in enumerate(stages):
            for i in range(count):
                block = InvertedBottleneck(
                    width, kernel, 1 if i else stride, EXPANSION if stage else 1, layer, inner, name=f"blocks_{number}"
                )
                x, number = block(x), number + 1
        x = layer(head, 1, 1, name="conv_head")(x)
        x = nn.relu6(inner(name="bn1")(x))
        return outputs(
            pool_map(x, self.pooling),
            neck=self.neck,
            embedding_dim=self.embedding_dim,
            dropout=self.dropout,
            norm=norm,
            train=train,
        )
