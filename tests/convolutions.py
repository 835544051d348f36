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


def direct_with_gradients(x: jax.Array, w: jax.Array, strides: Any, padding: Any) -> Any:
    """What `with_gradients` gives, place by place of the kernel, in NumPy and float64."""
    images, kernel = np.asarray(x, np.float64), np.asarray(w, np.float64)
    places = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], w.shape[:2], strides, padding)
    (top, _), (left, _) = padding
    padded = np.pad(images, ((0, 0), *padding, (0, 0)))
    rows, columns = ((padded.shape[1 + d] - kernel.shape[d]) // strides[d] * strides[d] + 1 for d in (0, 1))

    def seen(array: Any, i: int, j: int) -> Any:
        return array[:, i : i + rows : strides[0], j : j + columns : strides[1]]

    y = sum(seen(padded, i, j) @ kernel[i, j] for i, j in places)
    weights = np.cos(np.arange(y.size)).reshape(y.shape)
    by_padded, by_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in places:
        seen(by_padded, i, j)[...] += weights @ kernel[i, j].T
        by_kernel[i, j] = np.einsum("nhwc,nhwo->co", seen(padded, i, j), weights)
    return y, by_padded[:, top : top + x.shape[1], left : left + x.shape[2]], by_kernel


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
