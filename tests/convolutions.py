"""A convolution with its gradients, for comparing two forms of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def with_gradients(convolution: Any, x: jax.Array, w: jax.Array, *how: Any) -> Any:
    """Output and both gradients of a loss that weighs every output place differently; `how` goes to the convolution."""

    def loss(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = convolution(x, w, *how)
        return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

    gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return y, *gradients
