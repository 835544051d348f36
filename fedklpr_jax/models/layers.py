"""What the networks share: the convolution with its initial values, norms, pooling over the map, and the neck."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedklpr_jax.models.convolution import Convolution

# torchvision's kaiming_normal_(mode="fan_out"): an untruncated normal with variance 2 / (kh * kw * outputs).
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

Layer = Callable[..., Any]


def conv(features: int, kernel: int, stride: int, *, name: str, dtype: Any, convolution: Convolution) -> nn.Conv:
    """A square convolution without bias; its odd kernel is padded so that stride 1 keeps the map's size."""
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=[(kernel // 2, kernel // 2)] * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=he_fan_out,
        conv_general_dilated=convolution,
        name=name,
    )


def same_conv(
    features: int,
    kernel: int,
    stride: int,
    *,
    name: str,
    dtype: Any,
    convolution: Convolution,
    by_channel: Convolution,
    depthwise: bool = False,
) -> nn.Conv:
    """A square convolution without bias, padded as TensorFlow's "SAME": a map of h rows becomes ceil(h / stride).

    With `depthwise` every channel has a kernel of its own (`features` are those of the map), by `by_channel`.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding="SAME",
        use_bias=False,
        dtype=dtype,
        kernel_init=he_fan_out,
        feature_group_count=features if depthwise else 1,
        conv_general_dilated=by_channel if depthwise else convolution,
        name=name,
    )


class GeM(nn.Module):
    """Generalised mean over the map, `mean(max(x, eps)^p)^(1/p)`, p learnable (Radenovic et al., 2018, eq. 3)."""

    initial_p: float = 3.0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, h, w, c]`, not negative, to `[n, c]`."""
        p = self.param("p", nn.initializers.constant(self.initial_p), (1,))
        return jnp.mean(jnp.maximum(x, self.epsilon) ** p, axis=(1, 2)) ** (1.0 / p)


def pool_map(x: jax.Array, pooling: str) -> jax.Array:
    """`[n, h, w, c]` to float32 `[n, c]`, by `"avg"` or `"gem"`; for the `@nn.compact` method of a network."""
    x = x.astype(jnp.float32)
    return GeM(name="gem")(x) if pooling == "gem" else jnp.mean(x, axis=(1, 2))


def outputs(
    pooled: jax.Array, *, neck: str, embedding_dim: int, dropout: float, norm: Layer, train: bool
) -> dict[str, jax.Array]:
    """The neck on the pooled feature, and both as every network returns them; for an `@nn.compact` method.

    Args:
        pooled: float32 `[n, d]`.
        neck: `"bn"` for a BNNeck, or a Linear-BN block where `embedding_dim` is given; `"none"` for neither.
        embedding_dim: size e of the Linear-BN block; 0 for e = d.
        dropout: rate on the embedding while training.
        norm: the network's factory of norms.
        train: whether dropout runs.

    Returns:
        float32 `{"pooled": [n, d], "embedding": [n, e]}`.
    """
    if neck == "none":
        embedding = pooled
    elif embedding_dim:
        embedding = nn.Dense(embedding_dim, kernel_init=he_fan_out, name="embedding")(pooled)
        embedding = norm(name="embedding_bn", dtype=jnp.float32)(embedding)
    else:
        # A frozen bias stays at its initial zero, so the neck simply has none.
        embedding = norm(use_bias=False, name="bnneck", dtype=jnp.float32)(pooled)
    return {"pooled": pooled, "embedding": nn.Dropout(dropout, deterministic=not train)(embedding)}


class GroupNorm(nn.Module):
    """Group norm of one group: each image by its own mean and variance over all places and kept channels.

        y = scale (x - mean) / sqrt(var + epsilon) + bias

    (Wu and He, "Group normalization", ECCV 2018, equations 1 to 6). It knows neither the batch nor a running value. A
    channel whose scale is exactly 0 is pruned and does not count, so that a network under a structured mask computes
    what the one cut to it does; where no scale is 0, this is `nn.GroupNorm(num_groups=1)`.

    >>> norm = GroupNorm()
    >>> x = jnp.array([[1.0, 3.0, 100.0]])
    >>> norm.apply({"params": {"scale": jnp.array([1.0, 1.0, 0.0]), "bias": jnp.zeros(3)}}, x).round(2).tolist()
    [[-1.0, 1.0, 0.0]]
    """

    use_bias: bool = True
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, h, w, c]` or `[n, c]` to the same shape, of `dtype`; sums run in float32."""
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features) if self.use_bias else 0.0
        x = x.astype(jnp.float32)
        kept = (scale != 0).astype(jnp.float32)
        share = kept / jnp.maximum(jnp.sum(kept), 1.0)
        places = tuple(range(1, x.ndim - 1))

        def over_kept(values: jax.Array) -> jax.Array:
            # Places first, which a CPU adds up for many channels at once.
            return jnp.sum(jnp.mean(values, places, keepdims=True) * share, axis=-1, keepdims=True)

        mean = over_kept(x)
        variance = jnp.maximum(over_kept(jnp.square(x)) - jnp.square(mean), 0.0)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return ((x - mean) * factor + bias).astype(self.dtype)


def make_norm(kind: str, *, train: bool, dtype: Any) -> Layer:
    """The factory of a network's norms, of epsilon 1e-5.

    Args:
        kind: `"batch"`, running value = 0.9 old + 0.1 new (PyTorch's momentum 0.1), or `"group"`, without such.
        train: True for statistics of the batch, False for running ones.
        dtype: of the result.
    """
    if kind == "group":
        return partial(GroupNorm, dtype=dtype)
    return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype)
