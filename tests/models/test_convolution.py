"""The patches convolution and the sliced max-pool against their stock forms, and which path runs where."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.convolution import (
    choose_convolution,
    convolution_for,
    depthwise_convolution,
    max_pool,
    patches_convolution,
    winograd_convolution,
)
from tests.convolutions import assert_clients_agree, direct_with_gradients, with_gradients

LAYOUT = ("NHWC", "HWIO", "NHWC")
PAIR = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(deadline=None, max_examples=8)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(PAIR, PAIR)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
@example((4, 2), (3, 3), (1, 1), ((1, 1), (1, 1)), (2, 3), 0)  # a map smaller than its kernel
@example((7, 5), (1, 1), (2, 2), "SAME", (2, 3), 0)  # a strided 1x1
def test_equals_float64_forward_and_gradients(
    size: Any, kernel: Any, strides: Any, padding: Any, channels: Any, seed: int
) -> None:
    x = jax.random.normal(jax.random.key(seed), (2, *size, channels[0]))
    w = jax.random.normal(jax.random.key(seed + 1), (*kernel, *channels))
    # The window must fit at least once.
    if padding == "VALID":
        total = size
    elif padding == "SAME":
        total = (99, 99)
    else:
        total = tuple(s + sum(p) for s, p in zip(size, padding, strict=True))
    if total[0] < kernel[0] or total[1] < kernel[1]:
        with pytest.raises(ValueError, match="does not fit"):
            patches_convolution(x, w, strides, padding)
        return
    # In float64, where a sum that cancels stays exact enough for a tight tolerance.
    with jax.enable_x64(True):
        doubles = (jnp.asarray(np.asarray(array, np.float64)) for array in (x, w))
        ours = jax.jit(lambda x, w: with_gradients(patches_convolution, x, w, strides, padding))(*doubles)
    for mine, exact in zip(ours, direct_with_gradients(x, w, strides, padding), strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_allclose(mine, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel, strides", [(3, (1, 1)), (5, (2, 2)), (3, (2, 1))])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 2), (3, 1))])
def test_depthwise_equals_stock_forward_and_gradients(kernel: int, strides: Any, padding: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    w = jax.random.normal(jax.random.key(1), (kernel, kernel, 1, 3))
    groups = {"dimension_numbers": LAYOUT, "feature_group_count": 3}
    stock, ours = (partial(f, **groups) for f in (lax.conv_general_dilated, depthwise_convolution))
    both = jax.jit(lambda x, w: [with_gradients(f, x, w, strides, padding) for f in (ours, stock)])
    for mine, theirs in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_depthwise_sums_in_float32_and_refuses_other_groups() -> None:
    # 1 + 8 * 2^-9; in bfloat16 the sum would stay at 1, here it is rounded once.
    x = jnp.full((1, 3, 3, 1), 2.0**-9, jnp.bfloat16).at[0, 0, 0, 0].set(1)
    w = jnp.ones((3, 3, 1, 1), jnp.bfloat16)
    y = depthwise_convolution(x, w, (1, 1), "VALID", feature_group_count=1)
    assert y.dtype == jnp.bfloat16 and float(y[0, 0, 0, 0]) == 1.015625
    for groups, shape in ((1, (3, 3, 2, 2)), (2, (3, 3, 1, 4)), (1, (3, 3, 1, 2))):
        with pytest.raises(ValueError, match="not one for each of 2 channels"):
            depthwise_convolution(jnp.ones((1, 4, 4, 2)), jnp.ones(shape), (1, 1), "SAME", feature_group_count=groups)
    with pytest.raises(ValueError, match="no dilation"):
        depthwise_convolution(x, w, (1, 1), "SAME", feature_group_count=1, rhs_dilation=(2, 2))


def test_vmap_over_client_kernels_and_scan_equal_separate_calls() -> None:
    assert_clients_agree(patches_convolution, (1, 1), "SAME")


def test_bfloat16_sums_in_float32() -> None:
    # 1 + 511 * 2^-9 = 1.998; a bfloat16 sum would stay at 1, because 1 + 2^-9 rounds to 1.
    x = jnp.full((1, 1, 1, 512), 2.0**-9, jnp.bfloat16).at[..., 0].set(1)
    y = patches_convolution(x, jnp.ones((1, 1, 512, 1), jnp.bfloat16), (1, 1), "VALID")
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0, 0, 0]) == 2.0


@pytest.mark.parametrize("kernel, strides, padding", [(7, 2, [(3, 3), (3, 3)]), (1, 2, 0)])
def test_fits_flax_conv(kernel: int, strides: int, padding: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 9, 7, 3))
    stock: Any = nn.Conv(5, (kernel, kernel), strides, padding)
    ours: Any = nn.Conv(5, (kernel, kernel), strides, padding, conv_general_dilated=patches_convolution)
    variables = stock.init(jax.random.key(1), x)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, variables, ours.init(jax.random.key(1), x))))
    np.testing.assert_allclose(ours.apply(variables, x), stock.apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"rhs_dilation": (2, 2)}, "no dilation"),
        ({"lhs_dilation": (2, 1)}, "no dilation"),
        ({"feature_group_count": 2}, "no groups"),
        ({"batch_group_count": 2}, "no groups"),
        ({"dimension_numbers": None}, "NHWC"),
        ({"dimension_numbers": ("NCHW", "OIHW", "NCHW")}, "NHWC"),
        ({"window_strides": (1,)}, "two-dimensional"),
        ({"lhs": jnp.ones((1, 4, 4, 3))}, "3 channels"),
    ],
)
def test_refuses_what_it_does_not_cover(arguments: dict[str, Any], says: str) -> None:
    plain: dict[str, Any] = {"lhs": jnp.ones((1, 4, 4, 2)), "rhs": jnp.ones((3, 3, 2, 2))}
    plain |= {"window_strides": (1, 1), "padding": "SAME"}
    with pytest.raises(ValueError, match=says):
        patches_convolution(**(plain | arguments))


def test_choice_by_backend_and_by_name() -> None:
    assert convolution_for("cpu") is winograd_convolution
    assert convolution_for("gpu") is convolution_for("tpu") is lax.conv_general_dilated
    assert choose_convolution("auto") is convolution_for(jax.default_backend())
    assert choose_convolution("winograd") is winograd_convolution
    assert choose_convolution("patches") is patches_convolution
    assert choose_convolution("stock") is lax.conv_general_dilated
    with pytest.raises(InputError, match="model.convolution: 'fft' is unknown"):
        choose_convolution("fft")


@pytest.mark.parametrize(
    "size, window, strides, padding",
    [
        ((8, 6), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((7, 5), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((1, 1), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((8, 6), (2, 2), (2, 2), "VALID"),
        ((7, 5), (2, 2), (2, 2), "VALID"),
        ((7, 9), (2, 3), (2, 3), "VALID"),
    ],
)
def test_max_pool_equals_stock_forward_and_gradient(size: Any, window: Any, strides: Any, padding: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))  # no two values equal

    def loss(pool: Any, x: jax.Array) -> jax.Array:
        y = pool(x, window, strides, padding)
        return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y)

    np.testing.assert_array_equal(max_pool(x, window, strides, padding), nn.max_pool(x, window, strides, padding))
    ours, theirs = (jax.grad(lambda x, pool=pool: loss(pool, x))(x) for pool in (max_pool, nn.max_pool))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_max_pool_gradient_avoids_select_and_scatter() -> None:
    for window, padding in (((3, 3), "SAME"), ((2, 2), "VALID")):
        gradient = jax.grad(lambda x, w=window, p=padding: max_pool(x, w, (2, 2), p).sum())
        text = str(jax.make_jaxpr(gradient)(jnp.ones((1, 8, 8, 1))))
        assert "select_and_scatter" not in text and "reduce_window" not in text
