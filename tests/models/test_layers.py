"""Group norm by hand, against Flax's own, under a mask, and inside the networks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax.models import ModelSpec, make_spec
from fedklpr_jax.models.layers import GroupNorm

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

SPECS = {
    "vgg": make_spec("vgg11", widths=(3, 4), blocks=(2,), norm="group"),
    "resnet with a neck": ModelSpec("tiny", (3, 5), (1, 1), stem="3x3/2", norm="group"),
}


def variables(scale: Any, bias: Any) -> Any:
    return {"params": {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, 3.0, shape).astype(np.float32)


def test_group_norm_by_hand() -> None:
    # Two places of two channels: mean 3, variance (4 + 0 + 0 + 4) / 4 = 2; the second image is ten times the first.
    x = jnp.array([[[[1.0, 3.0], [3.0, 5.0]]]])
    found = GroupNorm(epsilon=0.0).apply(variables([1.0, 2.0], [0.0, 0.5]), jnp.concatenate([x, 10 * x]))
    expected = [[[-(2**0.5), 0.5], [0.0, 2 * 2**0.5 + 0.5]]]
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-6, atol=1e-6)
    # With epsilon 2 the divisor is sqrt(2 + 2).
    found = GroupNorm(epsilon=2.0, use_bias=False).apply({"params": {"scale": jnp.ones(2)}}, x)
    np.testing.assert_allclose(found, [[[[-1.0, 0.0], [0.0, 1.0]]]], atol=1e-6)


def test_pruned_channels_do_not_count_and_stay_zero() -> None:
    # Of [1, 5, -] the mean is 3 and the variance 4, whatever the third channel holds.
    norm = GroupNorm(epsilon=0.0)
    for third in (0.0, 7.0):
        found = norm.apply(variables([1.0, 2.0, 0.0], [0.0, 1.0, 0.0]), jnp.array([[1.0, 5.0, third]]))
        np.testing.assert_allclose(found, [[-1.0, 3.0, 0.0]], atol=1e-6)
    nothing = GroupNorm().apply(variables([0.0, 0.0], [0.0, 0.0]), jnp.array([[1.0, 5.0]]))
    assert nothing.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (4, 6)])
def test_group_norm_is_that_of_flax(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(*shape, seed=1)
    params = variables(random(6, seed=2), random(6, seed=3))
    ours: Any = GroupNorm()
    theirs: Any = nn.GroupNorm(num_groups=1, epsilon=1e-5)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), theirs.init(jax.random.key(0), x))

    @partial(jax.jit, static_argnums=0)
    def results(norm: Any, params: Any, x: Any) -> Any:
        gradients = jax.grad(lambda params, x: jnp.sum(weight * norm.apply(params, x)), (0, 1))(params, x)
        return norm.apply(params, x), gradients

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, results(ours, params, x), results(theirs, params, x))


def test_gradients_of_kept_channels_are_those_of_the_cut_norm() -> None:
    kept = np.array([True, False, True, True, False])
    x, weight, scale = random(4, 3, 2, 5) * kept, random(4, 3, 2, 5, seed=1), random(5, seed=2) * kept

    @jax.jit
    def gradients(params: Any, x: Any, weight: Any) -> Any:
        return jax.grad(lambda params, x: jnp.sum(weight * GroupNorm().apply(params, x)), (0, 1))(params, x)

    masked = gradients(variables(scale, scale), x, weight)
    cut = gradients(variables(scale[kept], scale[kept]), x[..., kept], weight[..., kept])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.tree.map(lambda leaf: leaf[..., kept], masked), cut)


def test_a_constant_image_becomes_the_bias() -> None:
    found = GroupNorm().apply(variables([1.0, 1.0], [0.25, -4.0]), jnp.full((1, 3, 3, 2), 1000.0))
    np.testing.assert_allclose(found[0, 0, 0], [0.25, -4.0], atol=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_networks_with_group_norm_have_no_statistics(name: str) -> None:
    def start(spec: ModelSpec) -> Any:
        return spec.init(jax.random.key(0), 16, 16, 1)

    spec, x = SPECS[name], random(6, 16, 16, 1)
    batch = jax.eval_shape(partial(start, replace(spec, norm="batch")))

    @jax.jit
    def run(x: Any) -> Any:
        fresh = start(spec)
        return fresh, spec.apply(fresh, x, train=True), spec.apply(fresh, x[:2], train=False)

    fresh, (whole, stats), (alone, _) = run(x)
    assert fresh["batch_stats"] == stats == {}
    chex.assert_trees_all_equal_shapes(fresh["params"], batch["params"])
    # Neither the other images of a batch nor training matter.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), alone, jax.tree.map(lambda y: y[:2], whole))
