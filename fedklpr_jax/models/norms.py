"""The norms of the networks: batch norm and group norm, with float32 sums over channels last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# A factory of layers: the settings that a whole network shares are in it.
Layer = Callable[..., Any]


class BatchNorm(nn.Module):
    """Batch norm: each channel by its mean and variance over the batch and all places, or by running values of them.

        y = scale (x - mean) / sqrt(var + epsilon) + bias

    (Ioffe and Szegedy, "Batch normalization", ICML 2015, algorithm 1). Names, shapes and initial values are those of
    `nn.BatchNorm`, whose values and gradients these are but for rounding; here a step reads the map fewer times and
    keeps one array of its size less. Running value = 0.9 old + 0.1 new (PyTorch's momentum 0.1).

    >>> norm = BatchNorm(use_running_average=False)
    >>> x = jnp.array([[1.0, 0.0], [3.0, 20.0]])
    >>> y, updated = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    >>> y.round(3).tolist(), updated["batch_stats"]["mean"].round(3).tolist()
    ([[-1.0, -1.0], [1.0, 1.0]], [0.20000000298023224, 1.0])
    """

    use_running_average: bool
    use_bias: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, h, w, c]` or `[n, c]` to the same shape, of `dtype`; sums run in float32."""
        features = x.shape[-1:]
        scale, bias = _scale_and_bias(self, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_variance = self.variable("batch_stats", "var", jnp.ones, features)
        x = x.astype(jnp.float32)
        if self.use_running_average:
            factor = scale * lax.rsqrt(running_variance.value + self.epsilon)
            return (x * factor + (bias - running_mean.value * factor)).astype(self.dtype)
        mean, variance = lax.stop_gradient(statistics(x))
        if not self.is_initializing():
            for running, new in ((running_mean, mean), (running_variance, variance)):
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        return normalised(x, mean, lax.rsqrt(variance + self.epsilon), scale, bias).astype(self.dtype)


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance `[c]` of `x` float32 `[..., c]`, by `E[x^2] - E[x]^2`, which is one pass over `x`."""
    places = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, places)
    return mean, jnp.maximum(jnp.mean(jnp.square(x), places) - jnp.square(mean), 0.0)


@jax.custom_vjp
def normalised(x: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """`scale (x - mean) inverse + bias`; only reverse differentiation is defined, and that of the whole batch norm.

    Mean and inverse are functions of `x`: what `x` does through them is in the gradient of `x`, and theirs is 0. With
    g the gradient of the result, n places and a = scale inverse,

        of bias:   b = sum g
        of scale:  s = (sum g x - mean b) inverse
        of x:      a (g - b / n - (x - mean) inverse s / n)

    The difference in s loses fewer digits than that in the variance, which squares mean over deviation.

    Args:
        x: float32 `[..., c]`.
        mean: float32 `[c]`.
        inverse: float32 `[c]`, of the standard deviation.
        scale: float32 `[c]`.
        bias: float32 `[c]`.

    >>> one = jnp.ones(1)
    >>> normalised(jnp.array([[1.0], [5.0]]), 3 * one, one / 2, one, 7 * one).tolist()
    [[6.0], [8.0]]
    """
    factor = scale * inverse
    return x * factor + (bias - mean * factor)


def _normalised_forward(x: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    return normalised(x, mean, inverse, scale, bias), (x, mean, inverse, scale)


def _normalised_backward(kept: Any, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    x, mean, inverse, scale = kept
    places, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    of_bias = jnp.sum(cotangent, places)
    of_scale = (jnp.sum(cotangent * x, places) - mean * of_bias) * inverse
    factor, slope = scale * inverse, inverse * of_scale / count
    of_x = cotangent * factor - x * (factor * slope) + factor * (mean * slope - of_bias / count)
    return of_x, jnp.zeros_like(mean), jnp.zeros_like(inverse), of_scale, of_bias


normalised.defvjp(_normalised_forward, _normalised_backward)


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
        scale, bias = _scale_and_bias(self, x.shape[-1:])
        x = x.astype(jnp.float32)
        kept = (scale != 0).astype(jnp.float32)
        share = kept / jnp.maximum(jnp.sum(kept), 1.0)
        places = tuple(range(1, x.ndim - 1))

        def over_kept(values: jax.Array) -> jax.Array:
            # Places first, which a CPU adds up for many channels at once.
            return jnp.sum(jnp.mean(values, places, keepdims=True) * share, axis=-1, keepdims=True)

        mean = over_kept(x)
        variance = jnp.maximum(over_kept(jnp.square(x)) - jnp.square(mean), 0.0)
        factor = scale * lax.rsqrt(variance + self.epsilon)
        return ((x - mean) * factor + bias).astype(self.dtype)


def _scale_and_bias(norm: BatchNorm | GroupNorm, features: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The parameters of a norm, float32 `[c]`; without `use_bias` the bias is zeros and no parameter."""
    scale = norm.param("scale", nn.initializers.ones, features)
    return scale, norm.param("bias", nn.initializers.zeros, features) if norm.use_bias else jnp.zeros(features)


def make_norm(kind: str, *, train: bool, dtype: Any) -> Layer:
    """The factory of a network's norms, of epsilon 1e-5.

    Args:
        kind: `"batch"`, or `"group"`, which has no running values.
        train: True for statistics of the batch, False for running ones.
        dtype: of the result.
    """
    if kind == "group":
        return partial(GroupNorm, dtype=dtype)
    return partial(BatchNorm, use_running_average=not train, dtype=dtype)
