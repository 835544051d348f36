"""A convolution with its gradients, for comparing two forms of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def with_gradients(convolution: Any, x: jax.Array, w: jax.Array, *how: Any) -> Any:
    """Output and both gradients of a loss that weighs every output place differently; `how` goes to the convolution."""

    def loss(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = convolution(x, w, *how)
        return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y), y

    gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return y, *gradients


def assert_clients_agree(convolution: Any, *how: Any) -> None:
    """`vmap` over kernels of clients and a scan over clients give what separate calls give, gradients included."""
    x = jax.random.normal(jax.random.key(0), (3, 2, 6, 5, 4))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 4, 5))

    def one(x: jax.Array, w: jax.Array) -> Any:
        return with_gradients(convolution, x, w, *how)

    step = jax.jit(one)
    apart = [step(x[i], w[i]) for i in range(3)]
    for together in (jax.jit(jax.vmap(one))(x, w), lax.map(lambda pair: one(*pair), (x, w))):
        for i in range(3):
            for ours, theirs in zip(together, apart[i], strict=True):
                np.testing.assert_allclose(ours[i], theirs, rtol=1e-5, atol=1e-5)
