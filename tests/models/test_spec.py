"""`ModelSpec`: sizes, statistics, choices, errors, and that another framework's model fits the same seam."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedklpr_jax.errors import InputError
from fedklpr_jax.models import SPECS, ModelSpec, make_spec
from fedklpr_jax.models.layers import GeM

TINY = ModelSpec("tiny", (4, 8), (1, 1), stem="3x3/2")


def shapes(spec: ModelSpec) -> Any:
    """Shapes of the variables; nothing is computed."""
    return jax.eval_shape(lambda key: spec.init(key, 64, 32), jax.random.key(0))


# Compiled: run op by op, every small operation would be compiled on its own.
@partial(jax.jit, static_argnums=(0, 3))
def run(spec: ModelSpec, variables: Any, x: jax.Array, train: bool, rngs: Any = None) -> Any:
    return spec.apply(variables, x, train, rngs)


def images(n: int = 4, height: int = 16, width: int = 8) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (n, height, width, 3))


def assert_trees_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(
    "name, trunk",
    [
        ("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032),
        # 4,652,008 with its classifier of 1000 classes.
        ("efficientnet_lite0", 4_652_008 - 1281 * 1000),
    ],
)  # fmt: skip
def test_trunk_sizes_are_the_well_known_ones(name: str, trunk: int) -> None:
    params = dict(shapes(make_spec(name))["params"])
    neck = params.pop("bnneck")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == trunk
    assert list(neck) == ["scale"]  # the bias is frozen: no such parameter


def test_thin_is_thin() -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes(make_spec("thin"))["params"]))
    assert 300_000 <= size <= 800_000
    assert 128 <= make_spec("thin").feature_dim <= 256


@pytest.mark.parametrize("name", SPECS)
def test_output_sizes_and_dtypes(name: str) -> None:
    spec = make_spec(name)
    outputs, stats = jax.eval_shape(
        lambda v, x: spec.apply(v, x, train=True), shapes(spec), jax.ShapeDtypeStruct((2, 64, 32, 3), jnp.float32)
    )
    assert outputs["pooled"].shape == (2, spec.pooled_dim)
    assert outputs["embedding"].shape == (2, spec.feature_dim)
    chex.assert_trees_all_equal_structs(stats, shapes(spec)["batch_stats"])
    assert {leaf.dtype for leaf in jax.tree.leaves((outputs, stats))} == {jnp.dtype("float32")}


def test_resnet50_embedding_is_2048() -> None:
    assert make_spec("resnet50").feature_dim == 2048


@pytest.mark.parametrize("last_stride, size", [(1, (16, 8)), (2, (8, 4))])
@pytest.mark.parametrize("name, layer, width", [("resnet50", "layer4_2", 2048), ("efficientnet_lite0", "bn1", 1280)])
def test_last_stride_one_keeps_the_map_twice_as_large(
    last_stride: int, size: tuple[int, int], name: str, layer: str, width: int
) -> None:
    spec = make_spec(name, last_stride=last_stride)

    def last_map(variables: Any, x: jax.Array) -> jax.Array:
        module: Any = spec.module()
        _, seen = module.apply(variables, x, train=False, mutable=["intermediates"], capture_intermediates=True)
        return seen["intermediates"][layer]["__call__"][0]

    found = jax.eval_shape(last_map, shapes(spec), jax.ShapeDtypeStruct((1, 256, 128, 3), jnp.float32))
    assert found.shape == (1, *size, width)


def test_leaf_names_and_plain_dicts() -> None:
    variables = shapes(make_spec("resnet50", pooling="gem"))
    assert type(variables) is dict and type(variables["params"]["layer1_0"]) is dict
    paths = {"/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(variables["params"])}
    assert {"conv1/kernel", "bn1/scale", "layer1_0/conv1/kernel", "layer1_0/downsample_conv/kernel"} <= paths
    assert {"layer4_2/bn3/bias", "gem/p", "bnneck/scale"} <= paths
    assert {path.rsplit("/", 1)[1] for path in paths} == {"kernel", "scale", "bias", "p"}


def test_initial_values() -> None:
    spec = make_spec("thin", widths=(4, 64), blocks=(1, 1), pooling="gem")
    params = spec.init(jax.random.key(0), 16, 8)["params"]
    kernel = params["layer2_0"]["conv2"]["kernel"]  # 36864 values: their deviation is known within 0.4 %
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * kernel.shape[-1])), rtol=0.02)
    np.testing.assert_array_equal(params["gem"]["p"], [3.0])
    np.testing.assert_array_equal(params["layer1_0"]["bn2"]["scale"], 1.0)


def test_init_depends_on_the_key_alone() -> None:
    assert_trees_equal(TINY.init(jax.random.key(3), 16, 8), TINY.init(jax.random.key(3), 32, 16))
    other = TINY.init(jax.random.key(4), 16, 8)
    assert not np.array_equal(
        other["params"]["conv1"]["kernel"], TINY.init(jax.random.key(3), 16, 8)["params"]["conv1"]["kernel"]
    )


@pytest.mark.parametrize(
    "name, kind",
    [
        ("thin", {"widths": (4, 8), "blocks": (1, 1), "bottleneck": True, "stem": "7x7/2+pool"}),
        ("efficientnet_lite0", {"widths": (4, 4, 8, 8, 8, 8, 8, 8, 16), "blocks": (1, 1, 1, 1, 1, 2, 1)}),
    ],
)
def test_convolution_choice_changes_neither_parameters_nor_numbers(name: str, kind: dict[str, Any]) -> None:
    stock, *others = (make_spec(name, convolution=c, **kind) for c in ("stock", "patches", "winograd"))
    variables = stock.init(jax.random.key(0), 16, 8)
    theirs = run(stock, variables, images(), True)
    for other in others:
        assert_trees_equal(variables, other.init(jax.random.key(0), 16, 8))
        ours = run(other, variables, images(), True)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("name", ["thin", "resnet50"])
def test_which_path_runs_where(name: str) -> None:
    def traced(convolution: str) -> str:
        spec = make_spec(name, blocks=(1, 1, 1, 1), convolution=convolution)

        def loss(params: Any, stats: Any, x: jax.Array) -> jax.Array:
            outputs, _ = spec.apply({"params": params, "batch_stats": stats}, x, train=True)
            return outputs["embedding"].sum()

        variables = shapes(spec)
        x = jax.ShapeDtypeStruct((2, 64, 32, 3), jnp.float32)
        return str(jax.make_jaxpr(jax.grad(loss))(variables["params"], variables["batch_stats"], x))

    assert "conv_general_dilated" not in traced("patches") + traced("winograd")
    assert "conv_general_dilated" in traced("stock")
    assert ("conv_general_dilated" in traced("auto")) == (jax.default_backend() != "cpu")


def test_statistics_move_with_momentum_nine_tenths() -> None:
    variables = TINY.init(jax.random.key(0), 16, 8)
    x = images()
    outputs, stats = run(TINY, variables, x, True)
    # The neck sees the pooled feature itself, so its statistics can be counted by hand.
    pooled = np.asarray(outputs["pooled"], np.float64)
    np.testing.assert_allclose(stats["bnneck"]["mean"], 0.9 * 0 + 0.1 * pooled.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stats["bnneck"]["var"], 0.9 * 1 + 0.1 * pooled.var(0), rtol=1e-5)
    expected = (pooled - pooled.mean(0)) / np.sqrt(pooled.var(0) + 1e-5)
    np.testing.assert_allclose(outputs["embedding"], expected, rtol=1e-3, atol=1e-3)


def test_evaluation_is_deterministic_and_keeps_statistics() -> None:
    spec = make_spec("thin", widths=[4, 8], blocks=[1, 1], embedding_dim=6, dropout=0.5)
    variables = spec.init(jax.random.key(0), 16, 8)
    first, stats = run(spec, variables, images(), False)
    again, _ = run(spec, variables, images(), False, rngs={"dropout": jax.random.key(1)})
    assert_trees_equal(first, again)
    assert_trees_equal(stats, variables["batch_stats"])
    alone, _ = run(spec, variables, images()[:1], False)
    np.testing.assert_allclose(alone["embedding"][0], first["embedding"][0], rtol=1e-4, atol=1e-5)


def test_embedding_block_drops_half_in_training() -> None:
    spec = make_spec("thin", widths=(4, 8), blocks=(1, 1), embedding_dim=512, dropout=0.5)
    variables = spec.init(jax.random.key(0), 16, 8)
    assert {"embedding", "embedding_bn"} < set(variables["params"]) and "bnneck" not in variables["params"]
    outputs, _ = run(spec, variables, images(8), True, rngs={"dropout": jax.random.key(1)})
    assert outputs["embedding"].shape == (8, 512)
    assert 0.45 < float(jnp.mean(outputs["embedding"] == 0)) < 0.55
    with pytest.raises(InputError, match="rngs"):
        run(spec, variables, images(), True)


def test_bfloat16_keeps_float32_parameters_and_is_finite() -> None:
    spec = make_spec("thin", dtype="bfloat16", widths=(8, 16), blocks=(1, 1))
    variables = spec.init(jax.random.key(0), 16, 8)

    def loss(params: Any) -> Any:
        outputs, stats = spec.apply({**variables, "params": params}, images(), train=True)
        return jnp.sum(outputs["embedding"] ** 3), (outputs, stats)

    gradients, (outputs, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for leaf in jax.tree.leaves((variables, gradients, outputs, stats)):
        assert leaf.dtype == jnp.float32
        assert bool(jnp.isfinite(leaf).all())
    exact, _ = run(make_spec("thin", widths=(8, 16), blocks=(1, 1)), variables, images(), False)
    rounded, _ = run(spec, variables, images(), False)
    np.testing.assert_allclose(rounded["pooled"], exact["pooled"], rtol=0.05, atol=0.02)
    assert not np.array_equal(rounded["pooled"], exact["pooled"])  # or the option does nothing


def test_gem_is_the_average_at_one_and_hand_computed_at_three() -> None:
    x = jnp.array([[[[1.0], [2.0]], [[3.0], [4.0]]]])
    pool: Any = GeM()
    assert float(pool.apply({"params": {"p": jnp.ones(1)}}, x)[0, 0]) == pytest.approx(2.5)
    third = pool.apply({"params": {"p": jnp.full(1, 3.0)}}, x)
    assert float(third[0, 0]) == pytest.approx(25 ** (1 / 3))  # (1 + 8 + 27 + 64) / 4 = 25
    gem, avg = (make_spec("thin", widths=(4, 8), blocks=(1, 1), pooling=p) for p in ("gem", "avg"))
    variables = gem.init(jax.random.key(0), 16, 8)
    variables["params"]["gem"]["p"] = jnp.ones(1)
    plain = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "gem"}}
    ours, theirs = run(gem, variables, images(), False)[0], run(avg, plain, images(), False)[0]
    np.testing.assert_allclose(ours["pooled"], theirs["pooled"], rtol=1e-5, atol=2e-6)


def test_specs_are_hashable_values() -> None:
    assert make_spec("thin", widths=[4, 8], blocks=[1, 1]) == make_spec("thin", widths=(4, 8), blocks=(1, 1))
    assert len({make_spec("thin"), make_spec("thin"), make_spec("thin", dropout=0.1)}) == 2


@pytest.mark.parametrize(
    "name, overrides, says",
    [
        ("resnet51", {}, "model.name: 'resnet51' is unknown"),
        ("thin", {"depth": 3}, "model.depth: no such field"),
        ("thin", {"stem": "5x5"}, "model.stem"),
        ("thin", {"last_stride": 3}, "model.last_stride"),
        ("thin", {"pooling": "max"}, "model.pooling"),
        ("thin", {"dtype": "float16"}, "model.dtype"),
        ("thin", {"convolution": "fft"}, "model.convolution"),
        ("thin", {"bottleneck": "yes"}, "model.bottleneck"),
        ("thin", {"widths": (8, 0, 8, 8)}, "model.widths"),
        ("thin", {"widths": 8}, "model.widths"),
        ("thin", {"blocks": (1, 1)}, "model.blocks: 2 stages"),
        ("efficientnet_lite0", {"widths": (8, 8, 8)}, "takes 9 and 7 blocks, not 3 and 7"),
        ("thin", {"embedding_dim": -1}, "model.embedding_dim"),
        ("thin", {"dropout": 1.0}, "model.dropout"),
    ],
)
def test_mistakes_are_one_clear_line(name: str, overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        make_spec(name, **overrides)
    assert "\n" not in str(caught.value)


class NnxNet(nnx.Module):
    """A small NNX network; what it computes does not matter, only that it has weights and statistics."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 8, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.bnneck = nnx.BatchNorm(8, momentum=0.9, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        pooled = jnp.mean(nnx.relu(self.bn1(self.conv1(x))), axis=(1, 2))
        return {"pooled": pooled, "embedding": self.bnneck(pooled)}


class NnxAdapter:
    """An NNX network behind the seam of `ModelSpec`: the same two calls over the same two dicts."""

    feature_dim = 8

    def init(self, key: jax.Array, height: int, width: int) -> dict[str, Any]:
        params, stats = nnx.state(NnxNet(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}

    def apply(self, variables: Any, x: jax.Array, train: bool, rngs: Any = None) -> Any:
        abstract = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
        graph, params, stats = nnx.split(abstract, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
        nnx.replace_by_pure_dict(params, variables["params"])
        nnx.replace_by_pure_dict(stats, variables["batch_stats"])
        net = nnx.merge(graph, params, stats)
        net.set_attributes(use_running_average=not train)
        outputs = net(x)
        return outputs, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))


@pytest.mark.parametrize("spec", [TINY, NnxAdapter()], ids=["linen", "nnx"])
def test_any_framework_trains_through_the_seam(spec: Any) -> None:
    """Two clients, a few compiled steps in `lax.map`: what the rounds do with a model, and all they ask of it."""
    key = jax.random.key(0)
    clients = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), spec.init(key, 16, 8))
    data = jax.random.normal(key, (2, 4, 16, 8, 3))

    def local(client: Any) -> Any:
        variables, x = client

        def loss(params: Any, stats: Any) -> Any:
            outputs, new_stats = spec.apply({"params": params, "batch_stats": stats}, x, train=True)
            return jnp.mean((outputs["embedding"] - 1.0) ** 2) + jnp.mean(outputs["pooled"] ** 2), new_stats

        def step(state: Any, _: None) -> Any:
            (value, stats), g = jax.value_and_grad(loss, has_aux=True)(state["params"], state["batch_stats"])
            params = jax.tree.map(lambda p, d: p - 0.1 * d, state["params"], g)
            return {"params": params, "batch_stats": stats}, value

        return jax.lax.scan(step, variables, length=5)

    trained, losses = jax.jit(lambda c: jax.lax.map(local, c))((clients, data))
    assert (losses[:, -1] < losses[:, 0]).all()
    chex.assert_trees_all_equal_structs(trained, clients)
    paths = {path[-1].key for path, _ in jax.tree.leaves_with_path(clients["params"])}
    assert paths == {"kernel", "scale", "bias"}
    first = jax.tree.map(lambda leaf: leaf[0], trained)
    outputs, stats = spec.apply(first, data[0], train=False)
    assert outputs["embedding"].shape == (4, spec.feature_dim)
    assert_trees_equal(stats, first["batch_stats"])
