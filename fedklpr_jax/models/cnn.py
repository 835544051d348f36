"""The small convolutional network of FedOBP (arXiv 2604.16574): two 5x5 convolutions and a dense layer, with biases.

The map is flattened as it lies, rows by columns by channels; weights of a network whose maps lie channels first need
the rows of `dense/kernel` reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.convolution import Convolution, max_pool
from fedklpr_jax.models.layers import outputs, relu
from fedklpr_jax.models.norms import make_norm

# Below this, no place is left after the second pool.
SMALLEST = 16


class CNN(nn.Module):
    """`conv1`, `conv2` and `dense`; `fedklpr_jax.models.spec.ModelSpec` builds it and says what each field means."""

    widths: Sequence[int]
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
            images: float32 `[n, h, w, c]`, normalised, at least 16x16.
            train: True for dropout.

        Returns:
            float32 `{"pooled": [n, d], "embedding": [n, e]}`, neither of them L2-normalised.

        Raises:
            InputError: for smaller images.
        """
        height, width = images.shape[1:3]
        if min(height, width) < SMALLEST:
            least = f"{SMALLEST}x{SMALLEST}"
            raise InputError(f"model cnn: images of {height}x{width} are too small; give at least {least}")
        x = images
        for i, features in enumerate(self.widths[:2], 1):
            draw = _uniform(25 * x.shape[3])
            x = nn.Conv(
                features,
                (5, 5),
                padding="VALID",
                dtype=self.dtype,
                kernel_init=draw,
                bias_init=draw,
                conv_general_dilated=self.convolution,
                name=f"conv{i}",
            )(x)
            # The two commute; in this order the ReLU meets a quarter of the map.
            x = relu(max_pool(x, (2, 2), (2, 2), "VALID"))
        x = x.reshape(x.shape[0], -1)
        draw = _uniform(x.shape[1])
        x = nn.Dense(self.widths[2], dtype=self.dtype, kernel_init=draw, bias_init=draw, name="dense")(x)
        return outputs(
            relu(x).astype(jnp.float32),
            neck=self.neck,
            embedding_dim=self.embedding_dim,
            dropout=self.dropout,
            norm=make_norm(self.norm, train=train, dtype=self.dtype),
            train=train,
        )


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's initial values of kernel and bias: uniform within 1 / sqrt(fan_in) of zero."""
    bound = fan_in**-0.5

    def draw(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return draw
