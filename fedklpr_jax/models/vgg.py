"""VGG with norms (Simonyan and Zisserman, 2015, configurations A and D) and global pooling in place of its head.

Layers are called `conv{group}_{place}` and `bn{group}_{place}`, both counted from 1, as in the authors' own release.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from fedklpr_jax.models.convolution import Convolution, max_pool
from fedklpr_jax.models.layers import conv, outputs, pool_map, relu
from fedklpr_jax.models.norms import make_norm


class VGG(nn.Module):
    """Groups of 3x3 convolutions; `fedklpr_jax.models.spec.ModelSpec` builds it and says what each field means."""

    widths: Sequence[int]
    blocks: Sequence[int]
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
        norm = make_norm(self.norm, train=train, dtype=self.dtype)
        widths = iter(self.widths)
        x = images
        for group, count in enumerate(self.blocks, 1):
            for place in range(1, count + 1):
                name = f"conv{group}_{place}"
                x = conv(next(widths), 3, 1, name=name, dtype=self.dtype, convolution=self.convolution)(x)
                x = relu(norm(name=f"bn{group}_{place}")(x))
            # 28x28 images come to a single place before the last pool.
            if min(x.shape[1:3]) >= 2:
                x = max_pool(x, (2, 2), (2, 2), "VALID")
        return outputs(
            pool_map(x, self.pooling),
            neck=self.neck,
            embedding_dim=self.embedding_dim,
            dropout=self.dropout,
            norm=norm,
            train=train,
        )
