"""Channels that belong together in every network, their scores by hand, and networks cut to some of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import capacity, channels
from fedklpr_jax.errors import InputError
from fedklpr_jax.models.spec import ModelSpec, make_spec
from fedklpr_jax.pruning import apply_mask
from fedklpr_jax.trees import path_map
from tests.federations import TINY

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

SPECS = {
    "basic": make_spec("resnet_cifar_thin", widths=(16, 24), blocks=(1, 1)),
    "bottleneck": ModelSpec("b", (16,), (2,), bottleneck=True, stem="3x3/2", pooling="gem"),
    "one stream": ModelSpec("s", (16, 16), (1, 1), stem="3x3/2", neck="bn"),
    "embedding": ModelSpec("e", (16, 16), (1, 1), stem="3x3/2", embedding_dim=6),
    "vgg": make_spec("vgg11_thin", widths=(16, 24), blocks=(1, 1)),
    "cnn": make_spec("cnn", widths=(16, 24, 32)),
    "basic, group norm": make_spec("resnet_cifar_thin", widths=(16, 24), blocks=(1, 1), norm="group"),
    "vgg, group norm": make_spec("vgg11_thin", widths=(16, 24), blocks=(1, 1), norm="group"),
}
CLASSES = 3



def shaped(spec):
    """The shapes of a task's variables."""

    def init():
        trunk = spec.init(jax.random.key(0), 16, 16)
        classifier = {"kernel": jnp.zeros((spec.feature_dim, CLASSES)), "bias": jnp.zeros(CLASSES)}
        return {
            "params": {"trunk": trunk["params"], "classifier": classifier},
            "batch_stats": {"trunk": trunk["batch_stats"]},
        }

    return jax.eval_shape(init)


def random_variables(spec, seed=0):
    random = np.random.default_rng(seed)
    # Positive, for the variances.
    return jax.tree.map(lambda leaf: random.uniform(0.1, 0.5, leaf.shape).astype(np.float32), shaped(spec))


def random_kept(groups, seed=0, counts=None):
    random = np.random.default_rng(seed)
    counts = counts or [random.integers(1, group.width + 1) for group in groups]
    return tuple(
        np.isin(np.arange(group.width), random.choice(group.width, count, replace=False))
        for group, count in zip(groups, counts, strict=True)
    )


def flat(tree):
    found = {}
    path_map(lambda path, leaf: found.setdefault(path, leaf), tree)
    return found


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_axis_of_channels_is_in_one_group(spec):
    variables = shaped(spec)
    groups = channels.channel_groups(variables)
    axes = [(slot.path, slot.axis) for g in groups for slot in (*(s for layer in g.layers for s in layer), *g.others)]
    assert len(axes) == len(set(axes))
    # What is left over: classes, image channels, the embedding's own outputs, and GeM's exponent; and the places of
    # kernels, which are no channels.
    whole = {
        (path, axis)
        for path, leaf in flat(variables).items()
        for axis in range(max(leaf.ndim - 2, 0) if path.endswith("kernel") else 0, leaf.ndim)
    }
    left = whole - set(axes)
    embedding = [entry for entry in left if "/embedding" in entry[0]]
    expected = {("params/classifier/bias", 0), ("params/classifier/kernel", 1)}
    expected |= {("params/trunk/conv1_1/kernel", 2)} if spec.family == "vgg" else {("params/trunk/conv1/kernel", 2)}
    expected |= {("params/trunk/gem/p", 0)} if spec.pooling == "gem" else set()
    if spec.embedding_dim:
        expected |= {("params/classifier/kernel", 0)}
        assert len(embedding) == 6
    assert left - set(embedding) == expected


@pytest.mark.parametrize("share", [1.0, 0.8, 0.4])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_cut_network_has_the_shapes_of_the_scaled_one(spec, share):
    variables, devices = shaped(spec), capacity.DeviceClasses((share,), 4)
    mask = jax.eval_shape(lambda: devices.first_mask(variables, 0))
    small = jax.eval_shape(lambda mask: devices.cut(variables, mask, 0), mask)
    (scaled,) = devices.specs(spec)
    assert {path: leaf.shape for path, leaf in flat(small).items()} == {
        path: leaf.shape for path, leaf in flat(shaped(scaled)).items()
    }


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_cut_and_restored_into_zeros_is_masked(spec):
    variables = random_variables(spec)
    groups = channels.channel_groups(variables)
    kept = random_kept(groups)
    counts = [int(flags.sum()) for flags in kept]

    @jax.jit
    def there_and_back(variables, kept):
        mask = channels.structured_mask(variables, groups, kept)
        small = channels.cut(variables, groups, channels.keep_sets(kept, counts))
        zeros, ones = (jax.tree.map(lambda leaf, x=x: jnp.full_like(leaf, x), variables) for x in (0, 1))
        back = [channels.restore(small, groups, kept, into) for into in (zeros, ones)]
        return mask, *back, channels.kept_channels(mask, groups)

    mask, zeros, ones, found = there_and_back(variables, kept)
    for path, leaf in flat(variables).items():
        np.testing.assert_array_equal(flat(zeros)[path], np.where(flat(mask)[path], leaf, 0), err_msg=path)
        # Into another tree: its entries stay where the mask is False, and nowhere else.
        np.testing.assert_array_equal(flat(ones)[path], np.where(flat(mask)[path], leaf, 1), err_msg=path)
    for one, flags in zip(found, kept, strict=True):
        np.testing.assert_array_equal(one, flags)


@pytest.mark.parametrize("name", ["bottleneck", "embedding", "cnn", "basic, group norm", "vgg, group norm"])
def test_a_cut_network_computes_what_the_masked_one_computes(name):
    spec = SPECS[name]
    variables = random_variables(spec)
    groups = channels.channel_groups(variables)
    (small_spec,), devices = capacity.DeviceClasses((0.5,), 4).specs(spec), capacity.DeviceClasses((0.5,), 4)
    kept = random_kept(groups, counts=devices.counts(groups)[0].tolist())
    images = np.random.default_rng(1).normal(size=(4, 16, 16, 3)).astype(np.float32)

    def logits(spec, variables):
        trunk = {kind: variables[kind]["trunk"] for kind in ("params", "batch_stats")}
        features, stats = spec.apply(trunk, images, True)
        return features["embedding"] @ variables["params"]["classifier"]["kernel"], {"batch_stats": {"trunk": stats}}

    @jax.jit
    def both(variables, kept):
        mask = channels.structured_mask(variables, groups, kept)
        whole, stats = logits(spec, apply_mask(variables, mask))
        return (whole, devices.cut(stats, mask, 0)), logits(small_spec, devices.cut(variables, mask, 0))

    (whole, stats), (small, small_stats) = both(variables, kept)
    np.testing.assert_allclose(small, whole, rtol=1e-4, atol=1e-4)
    for path, leaf in flat(stats).items():
        np.testing.assert_allclose(flat(small_stats)[path], leaf, rtol=1e-4, atol=1e-5)


def chain(kernel, scale, bias, second):
    """Two 1x1 convolutions of two channels on one grey channel, as a VGG names them."""

    def conv(value):
        return {"kernel": jnp.array(value, jnp.float32)}

    def norm(scale, bias):
        return {"scale": jnp.array(scale, jnp.float32), "bias": jnp.array(bias, jnp.float32)}

    return {"trunk": {"conv1_1": conv([[[kernel]]]), "bn1_1": norm(scale, bias), "conv1_2": conv([[second]]),
                      "bn1_2": norm([1.0, 1.0], [0.0, 0.0])}}  # fmt: skip


def test_scores_by_hand():
    params = chain([2.0, -1.0], [1.0, 3.0], [0.5, 0.0], [[1.0, 2.0], [0.0, 0.0]])
    gradient = chain([0.5, 1.0], [-3.0, 1.0], [2.0, 7.0], [[1.0, -1.0], [5.0, 5.0]])
    fisher = chain([1.0, 4.0], [2.0, 0.0], [8.0, 1.0], [[0.0, 2.0], [9.0, 9.0]])
    groups = channels.channel_groups({"params": params})
    first, _ = channels.channel_scores(params, gradient, fisher, groups)
    # c = 0: |0.5*2 - 3*1 + 2*0.5| + (1*4 + 2*1 + 8*0.25)/2 = 1 + 4 = 5; c = 1: |-1 + 3 + 0| + (4*1 + 0 + 0)/2 = 4.
    np.testing.assert_allclose(first, [5 / 9, 4 / 9], rtol=1e-6)
    # By output, not by input; the norm's scale counts. c = 0: |1 - 3| + (0 + 2)/2 = 3; c = 1: |-2 + 1| + (8 + 0)/2 = 5.
    gradient["trunk"]["bn1_2"]["scale"] = jnp.array([-3.0, 1.0])
    fisher["trunk"]["bn1_2"]["scale"] = jnp.array([2.0, 0.0])
    _, second = channels.channel_scores(params, gradient, fisher, groups)
    np.testing.assert_allclose(second, [3 / 8, 5 / 8], rtol=1e-6)
    # Magnitudes: 4 + 1 + 0.25 against 1 + 9.
    np.testing.assert_allclose(channels.magnitude_scores(params, groups)[0], [5.25 / 15.25, 10 / 15.25], rtol=1e-6)


def test_the_layers_of_a_stream_count_alike():
    spec = SPECS["one stream"]
    variables = random_variables(spec)
    groups = channels.channel_groups(variables)
    stream = groups[-1]
    # The stem and the second convolution of both blocks.
    assert len(stream.layers) == 3 and len(groups) == 3
    scores = channels.magnitude_scores(variables["params"], groups)
    np.testing.assert_allclose(jnp.sum(scores[-1]), 3.0, rtol=1e-5)
    # A hundred times larger weights of one layer change nothing.
    variables["params"]["trunk"]["conv1"] = {"kernel": 100 * variables["params"]["trunk"]["conv1"]["kernel"]}
    variables["params"]["trunk"]["bn1"] = jax.tree.map(lambda x: 100 * x, variables["params"]["trunk"]["bn1"])
    np.testing.assert_allclose(channels.magnitude_scores(variables["params"], groups)[-1], scores[-1], rtol=1e-4)


def test_a_layer_without_a_score_keeps_its_first_channels():
    params = chain([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [[1.0, 2.0], [3.0, 4.0]])
    groups = channels.channel_groups({"params": params})
    scores = channels.channel_scores(params, params, params, groups)
    assert scores[0].tolist() == [0.0, 0.0]
    assert channels.top_channels(scores, [1, 1])[0].tolist() == [True, False]


def test_device_classes():
    devices = capacity.DeviceClasses.parse("1.0,0.5, 0.1", 4)
    variables = shaped(SPECS["bottleneck"])
    groups = channels.channel_groups(variables)
    # The stem, the insides of two blocks, and the one stream at the end, four times as wide.
    assert sorted(group.width for group in groups) == [16] * 5 + [64]
    for row, share in zip(devices.counts(groups), (1.0, 0.5, 0.25), strict=True):
        assert row.tolist() == [group.width * share for group in groups]
    # Client k is of class k modulo the classes.
    for client, count in ((0, 16), (4, 8), (5, 4)):
        kept = devices.first_channels(groups, client)[0]
        assert kept.tolist() == [True] * count + [False] * (16 - count)


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(InputError, match="a network of layers kernel has no known channels; give a resnet, vgg or cnn"):
        channels.channel_groups({"params": {"trunk": {"kernel": np.zeros(2)}}})
    assert len(channels.channel_groups(shaped(TINY))) == 3
