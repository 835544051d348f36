"""Batch norm and group norm by hand, against Flax's own, under a mask, and inside the networks."""

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
from fedklpr_jax.models.norms import BatchNorm, GroupNorm

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


def test_batch_norm_by_hand() -> None:
    # Mean 3, variance 4 of the first channel, 0 and 0 of the second; running values move by a tenth.
    x = jnp.array([[[[1.0, 0.0]], [[5.0, 0.0]]]])
    start = variables([3.0, 2.0], [0.5, -1.0]) | {"batch_stats": {"mean": jnp.full(2, 10.0), "var": jnp.full(2, 4.0)}}
    found, updated = BatchNorm(use_running_average=False, epsilon=0.25).apply(start, x, mutable=["batch_stats"])
    outer = 3 * 2 / np.sqrt(4.25)
    np.testing.assert_allclose(found, [[[[0.5 - outer, -1.0]], [[0.5 + outer, -1.0]]]], rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [9.3, 9.0], rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], [4.0, 3.6], rtol=1e-6)
    running = BatchNorm(use_running_average=True, epsilon=0.0).apply(start, x)
    np.testing.assert_allclose(running, [[[[-13.0, -11.0]], [[-7.0, -11.0]]]], rtol=1e-6)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (4, 6)])
def test_batch_norm_is_that_of_flax(shape: tuple[int, ...], running: bool) -> None:
    x, weight = random(*shape), random(*shape, seed=1)
    ours: Any = BatchNorm(use_running_average=running)
    theirs: Any = nn.BatchNorm(use_running_average=running, momentum=0.9)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), theirs.init(jax.random.key(0), x))
    statistics = {"mean": random(6, seed=4), "var": np.square(random(6, seed=5))}

    @partial(jax.jit, static_argnums=0)
    def results(norm: Any, params: Any, x: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            y, updated = norm.apply(params | {"batch_stats": statistics}, x, mutable=["batch_stats"])
            return jnp.sum(weight * y), (y, updated)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    params = variables(random(6, seed=2), random(6, seed=3))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, results(ours, params, x), results(theirs, params, x))


@pytest.mark.parametrize("mean", [0.0, 10.0, 300.0])
def test_gradients_of_batch_norm_lose_no_more_digits_than_those_of_flax(mean: float) -> None:
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=(16, 8, 4, 32)) + offset for offset in (mean, 0.0))
    x, weight, places = x.astype(np.float32), weight.astype(np.float32), (0, 1, 2)
    wide, count = x.astype(np.float64), x.size // x.shape[-1]
    inverse = 1 / np.sqrt(wide.var(places) + 1e-5)
    normal = (wide - wide.mean(places)) * inverse
    of_bias, of_scale = weight.sum(places, np.float64), (weight * normal).sum(places)
    exact = [inverse * (weight - of_bias / count - normal * of_scale / count), of_scale]

    def errors(norm: Any) -> list[float]:
        start = norm.init(jax.random.key(0), x)
        rest = {"batch_stats": start["batch_stats"]}

        @jax.jit
        def gradients(x: Any, params: Any) -> Any:
            def loss(x: Any, params: Any) -> Any:
                return jnp.sum(weight * norm.apply({"params": params} | rest, x, mutable=["batch_stats"])[0])

            return jax.grad(loss, (0, 1))(x, params)

        of_x, of_params = gradients(x, start["params"])
        found = (of_x, of_params["scale"])
        return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]

    ours, theirs = errors(BatchNorm(use_running_average=False)), errors(nn.BatchNorm(use_running_average=False))
    assert all(a <= 1.5 * b + 1e-7 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert max(ours) < (1e-5 if mean <= 10 else 1e-2)


def test_batch_norm_over_clients_is_that_of_each() -> None:
    x = random(3, 4, 2, 2, 5)
    norm = BatchNorm(use_running_average=False)
    params = jax.vmap(norm.init, (None, 0))(jax.random.key(0), x)

    def gradients(params: Any, x: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            y, updated = norm.apply(params, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), updated

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    together = jax.jit(jax.vmap(gradients))(params, x)
    apart = jax.jit(partial(jax.lax.map, lambda both: gradients(*both)))((params, x))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), together, apart)


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
