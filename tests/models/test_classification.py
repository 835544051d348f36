"""The networks for classification behind the same seam: sizes by hand, numbers, narrow forms, statistics."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.errors import InputError
from fedklpr_jax.models import SPECS, ModelSpec, make_spec

CLASSIFIERS = ("cnn", "vgg11", "vgg16", "vgg11_thin", "resnet18_cifar", "resnet_cifar_thin")
SMALL = {
    "cnn": make_spec("cnn", widths=(3, 5, 7)),
    "vgg": make_spec("vgg11", widths=(3, 4), blocks=(2,)),
    "resnet": make_spec("resnet_cifar_thin", widths=(3, 5), blocks=(1, 1)),
}


def shapes(spec: ModelSpec, size: int = 28, channels: int = 1) -> Any:
    """Shapes of the variables; nothing is computed."""
    return jax.eval_shape(lambda key: spec.init(key, size, size, channels), jax.random.key(0))


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@partial(jax.jit, static_argnums=(0, 3))
def run(spec: ModelSpec, variables: Any, x: jax.Array, train: bool) -> Any:
    return spec.apply(variables, x, train)


def images(n: int = 4, size: int = 16, channels: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (n, size, size, channels))


def test_cnn_with_its_classifier_has_the_published_size() -> None:
    spec = make_spec("cnn")
    classifier = spec.feature_dim * 10 + 10
    assert count(shapes(spec)["params"]) + classifier == 582_026
    assert shapes(spec)["batch_stats"] == {}


@pytest.mark.parametrize("name, convolutions, norms", [("vgg11", 9_217_728, 2752), ("vgg16", 14_710_464, 4224)])
def test_vgg_sizes(name: str, convolutions: int, norms: int) -> None:
    # VGG-11 on 3 channels: 9 * (3*64 + 64*128 + 128*256 + 256*256 + 256*512 + 3 * 512*512) = 9 * 1024192.
    params = shapes(make_spec(name), 32, 3)["params"]
    assert count({k: v for k, v in params.items() if k.startswith("conv")}) == convolutions
    assert count(params) - convolutions == 2 * norms  # a scale and a bias for each channel
    assert set(params["conv1_1"]) == {"kernel"}


def test_resnet18_for_small_images_has_the_well_known_size() -> None:
    # 11,173,962 with ten classes.
    assert count(shapes(make_spec("resnet18_cifar"), 32, 3)["params"]) + 5130 == 11_173_962


@pytest.mark.parametrize("size, channels", [(28, 1), (32, 3)])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_output_sizes(name: str, size: int, channels: int) -> None:
    spec = make_spec(name)
    variables = shapes(spec, size, channels)
    x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    outputs, stats = jax.eval_shape(lambda v, x: spec.apply(v, x, train=True), variables, x)
    assert outputs["pooled"].shape == outputs["embedding"].shape == (2, spec.pooled_dim)
    assert spec.feature_dim == spec.pooled_dim == spec.widths[-1]
    chex.assert_trees_all_equal_structs(stats, variables["batch_stats"])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_any_widths_from_one_up(name: str) -> None:
    full, one = make_spec(name), replace(make_spec(name), widths=(1,) * len(make_spec(name).widths))
    chex.assert_trees_all_equal_structs(shapes(full), shapes(one))  # narrow has every layer of the full network
    outputs = jax.eval_shape(
        lambda v, x: one.apply(v, x, train=False)[0], shapes(one), jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    )
    assert outputs["embedding"].shape == (2, 1)


def test_cnn_against_its_formula() -> None:
    spec = SMALL["cnn"]
    variables = spec.init(jax.random.key(0), 16, 16, 1)
    x = np.asarray(images(2), np.float64)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def convolved(x: np.ndarray, layer: Any) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))
        return np.einsum("nhwcij,ijco->nhwo", windows, layer["kernel"]) + layer["bias"]

    def pooled(x: np.ndarray) -> np.ndarray:
        return np.maximum.reduce([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])

    for layer in ("conv1", "conv2"):
        x = pooled(np.maximum(convolved(x, p[layer]), 0))
    flat = x.reshape(2, -1)
    expected = np.maximum(flat @ p["dense"]["kernel"] + p["dense"]["bias"], 0)
    outputs, stats = run(spec, variables, images(2), True)
    np.testing.assert_allclose(outputs["embedding"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs["pooled"], outputs["embedding"])
    assert stats == {}


def test_cnn_starts_uniform_within_the_bound_of_its_fan_in() -> None:
    params = jax.jit(lambda key: make_spec("cnn").init(key, 28, 28, 1))(jax.random.key(0))["params"]
    for layer, fan_in in (("conv1", 25), ("conv2", 800), ("dense", 1024)):
        for leaf in params[layer].values():
            scaled = np.asarray(leaf).ravel() * np.sqrt(fan_in)  # now uniform on [-1, 1)
            assert 0.85 < np.abs(scaled).max() <= 1 + 1e-6
            assert abs(scaled.mean()) < 4 / np.sqrt(3 * scaled.size)
            assert abs(np.mean(scaled**2) - 1 / 3) < 4 * np.sqrt(4 / 45 / scaled.size)
    assert not np.array_equal(params["conv2"]["bias"], params["conv1"]["bias"][:1])


def test_vgg_layer_order_at_one_place() -> None:
    # A 1x1 image: only the middle of a kernel meets a pixel, no pool fits, and norms start at mean 0, variance 1.
    spec = make_spec("vgg11", widths=(2, 3), blocks=(1, 1))
    variables = spec.init(jax.random.key(0), 1, 1, 2)
    x = images(4, 1, 2)
    y = np.asarray(x[:, 0, 0], np.float64)
    for layer in ("conv1_1", "conv2_1"):
        y = np.maximum(y @ np.asarray(variables["params"][layer]["kernel"][1, 1]) / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(run(spec, variables, x, False)[0]["embedding"], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size, places", [(32, 1), (28, 1), (64, 4)])
def test_vgg_skips_a_pool_that_would_leave_nothing(size: int, places: int) -> None:
    # 32: 16 8 4 2 1; 28: 14 7 3 1 and no fifth pool; 64: 32 16 8 4 2.
    def reduced(variables: Any, x: jax.Array) -> jax.Array:
        module: Any = make_spec("vgg11_thin").module()
        _, seen = module.apply(variables, x, train=False, mutable=["intermediates"], capture_intermediates=True)
        return seen["intermediates"]["bn5_2"]["__call__"][0]

    x = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
    last = jax.eval_shape(reduced, shapes(make_spec("vgg11_thin"), size), x).shape[1:3]
    assert max(last[0] // 2, 1) * max(last[1] // 2, 1) == places


@pytest.mark.parametrize("family", ["cnn", "vgg"])
def test_convolution_choice_changes_neither_parameters_nor_numbers(family: str) -> None:
    patches, stock = (replace(SMALL[family], convolution=choice) for choice in ("patches", "stock"))
    variables = patches.init(jax.random.key(0), 16, 16, 1)
    jax.tree.map(np.testing.assert_array_equal, variables, stock.init(jax.random.key(0), 16, 16, 1))

    @partial(jax.jit, static_argnums=0)
    def step(spec: ModelSpec, params: Any) -> Any:
        def loss(params: Any) -> Any:
            outputs, stats = spec.apply({**variables, "params": params}, images(), train=True)
            return jnp.sum(outputs["embedding"] ** 2), (outputs, stats)

        return jax.grad(loss, has_aux=True)(params)

    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, step(patches, variables["params"]), step(stock, variables["params"]))


def test_training_moves_the_statistics_by_a_tenth_and_evaluation_keeps_them() -> None:
    spec = SMALL["vgg"]
    variables = spec.init(jax.random.key(0), 16, 16, 1)
    evaluated, kept = run(spec, variables, images(), False)
    jax.tree.map(np.testing.assert_array_equal, kept, variables["batch_stats"])
    trained, moved = run(spec, variables, images(), True)
    assert not np.allclose(trained["embedding"], evaluated["embedding"], rtol=1e-2)
    # The first norm sees a plain convolution of the images.
    kernel, layout = variables["params"]["conv1_1"]["kernel"], ("NHWC", "HWIO", "NHWC")
    maps = jax.lax.conv_general_dilated(images(), kernel, (1, 1), "SAME", dimension_numbers=layout)
    np.testing.assert_allclose(moved["bn1_1"]["mean"], 0.1 * maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved["bn1_1"]["var"], 0.9 + 0.1 * maps.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("family", SMALL)
def test_bfloat16_keeps_float32_outside(family: str) -> None:
    spec = replace(SMALL[family], dtype="bfloat16")
    variables = shapes(spec, 16)
    found = jax.eval_shape(lambda v, x: spec.apply(v, x, train=True), variables, images())
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, found))} == {jnp.dtype("float32")}


def test_a_neck_and_gem_where_asked() -> None:
    spec = make_spec("vgg11_thin", neck="bn", pooling="gem")
    assert {"bnneck", "gem"} <= set(shapes(spec)["params"])
    assert not {"bnneck", "embedding", "gem"} & set(shapes(make_spec("vgg11_thin"))["params"])
    spec = make_spec("cnn", neck="bn", embedding_dim=16, dropout=0.5)
    assert spec.feature_dim == 16 and set(shapes(spec)["batch_stats"]) == {"embedding_bn"}


def test_scaled_by_hand() -> None:
    # 16 and 32 * 0.3 = 9.6 go to 8 (of 8 or 16); 8 is below 16, so 2.4 goes to 4, and 4 is less than the least.
    spec = make_spec("thin", widths=(8, 16, 32, 12))
    assert spec.scaled(0.3, least=1).widths == (4, 8, 8, 4)
    assert spec.scaled(0.3).widths == (8, 8, 8, 8)
    assert spec.scaled(0.3, least=100).widths == spec.widths
    assert make_spec("vgg11").scaled(0.4).widths == (24, 48, 104, 104, 208, 208, 208, 208)
    assert make_spec("thin", widths=(3, 5, 18, 24)).scaled(0.99).widths == (3, 5, 16, 24)
    assert make_spec("cnn").scaled(0.5) == make_spec("cnn", widths=(16, 32, 256))


@settings(deadline=None, max_examples=100)
@given(
    widths=st.lists(st.integers(1, 600), min_size=3, max_size=3),
    share=st.floats(0, 1, exclude_min=True),
    least=st.integers(1, 40),
)
def test_scaled_stays_between_least_and_full(widths: list[int], share: float, least: int) -> None:
    spec = make_spec("resnet_cifar_thin", widths=widths)
    assert spec.scaled(1, least) == spec
    for full, narrow in zip(widths, spec.scaled(share, least).widths, strict=True):
        assert min(full, least) <= narrow <= full
        step = 8 if full >= 16 else 4
        assert narrow % step == 0 or narrow in (full, least)
        assert abs(narrow - full * share) <= step / 2 or narrow in (full, least)


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_scaled_refuses_other_shares(share: float) -> None:
    with pytest.raises(InputError, match="share: .* above 0 and at most 1"):
        make_spec("cnn").scaled(share)


@pytest.mark.parametrize(
    "name, overrides, says",
    [
        ("cnn", {"family": "mlp"}, "model.family: 'mlp' is unknown"),
        ("cnn", {"neck": "ln"}, "model.neck: 'ln' is unknown"),
        ("vgg11", {"norm": "layer"}, "model.norm: 'layer' is unknown; give one of batch, group"),
        ("cnn", {"norm": "group"}, "model.norm: 'group' has no place in the cnn"),
        ("cnn", {"widths": (8, 8)}, "the cnn takes three"),
        ("cnn", {"blocks": (1, 1, 2)}, "the cnn takes three"),
        ("cnn", {"bottleneck": True}, "model.bottleneck"),
        ("cnn", {"pooling": "gem"}, "model.pooling"),
        ("cnn", {"embedding_dim": 8}, "model.embedding_dim: 8 needs model.neck 'bn'"),
        ("vgg11", {"blocks": (1, 1, 2, 2, 1)}, "model.blocks: 7 convolutions but model.widths has 8"),
        ("vgg11", {"bottleneck": True}, "model.bottleneck"),
        ("resnet18_cifar", {"blocks": (2, 2)}, "model.blocks: 2 stages"),
    ],
)
def test_mistakes_are_one_clear_line(name: str, overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        make_spec(name, **overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("convolution", ["patches", "stock"])
def test_cnn_refuses_images_too_small_for_it(convolution: str) -> None:
    with pytest.raises(InputError, match="images of 15x32 are too small; give at least 16x16"):
        make_spec("cnn", convolution=convolution).init(jax.random.key(0), 15, 32, 1)


def test_every_classifier_is_listed() -> None:
    assert {name for name, spec in SPECS.items() if spec.neck == "none"} == set(CLASSIFIERS)
