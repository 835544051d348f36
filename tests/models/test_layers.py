"""The ReLU: its values and its gradient, in both float formats."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax.models.layers import relu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_and_its_gradient(dtype: Any) -> None:
    x = jnp.array([-jnp.inf, -2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf], dtype)
    y, back = jax.vjp(relu, x)
    (gradient,) = back(jnp.full_like(x, 5.0))
    assert y.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.maximum(np.asarray(x, np.float32), 0.0))
    assert gradient.tolist() == [0.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0]


def test_what_is_not_a_number_stays_so() -> None:
    # Else a model gone wrong would look sound, and its update would be taken.
    assert jnp.isnan(jax.jit(relu)(jnp.array([jnp.nan, 1.0]))).tolist() == [True, False]


def test_relu_over_clients() -> None:
    x = jnp.array([[-1.0, 2.0], [3.0, -4.0]])
    gradient = jax.vmap(jax.grad(lambda row: jnp.sum(jnp.square(relu(row)))))(x)
    assert gradient.tolist() == [[0.0, 4.0], [6.0, 0.0]]
