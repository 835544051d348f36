"""What the networks share: the convolution with its initial values, the ReLU, pooling over the map, and the neck."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedklpr_jax.models.convolution import Convolution
from fedklpr_jax.models.norms import Layer

# torchvision's kaiming_normal_(mode="fan_out"): an untruncated normal with variance 2 / (kh * kw * outputs).
he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

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


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """`max(x, 0)`, of any shape; NaN stays NaN. Only reverse differentiation is defined.

    As a choice, and with a gradient that looks at the result: of a maximum XLA:CPU computes the operand anew for every
    use, in a residual network back through all blocks of a stage.

    >>> relu(jnp.array([-1.0, 0.0, 2.0])).tolist()
    [0.0, 0.0, 2.0]
    """
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


def _relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = relu(x)
    return y, y


def _relu_backward(y: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(y > 0, cotangent, jnp.zeros((), cotangent.dtype)),)


relu.defvjp(_relu_forward, _relu_backward)


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
