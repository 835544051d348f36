"""Every family of networks, every norm, pooling, stem and neck gives in onnxruntime what it gives here."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fedklpr_jax.data.picture_format import PictureFormat
from fedklpr_jax.errors import InputError
from fedklpr_jax.models import onnx_graph
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.tasks import classification, reid

onnx = pytest.importorskip("onnx", reason="the package onnx (extra onnx) is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime (extra onnx) is not installed")

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

PEOPLE = reid.picture_format(type("Data", (), {"height": 32, "width": 16}))
GREY = PictureFormat(28, 28, 1, (72.9,), (90.1,))
COLOUR = PictureFormat(16, 24, 3, (120.0, 110.0, 100.0), (60.0, 61.0, 62.0))
EMBEDDING = {
    "stem of 3x3, projected shortcut": ModelSpec("a", (4, 8), (2, 1), stem="3x3/2"),
    "stem of 7x7, gem, last stride 2": ModelSpec("b", (4, 4, 8), (1, 1, 1), pooling="gem", last_stride=2),
    "bottleneck, embedding block": ModelSpec("c", (4, 4), (1, 2), bottleneck=True, embedding_dim=6, dropout=0.5),
    "efficientnet, a block in and out alike": ModelSpec(
        "h", (4, 4, 6, 8, 8, 8, 8, 10, 12), (1, 2, 1, 1, 2, 1, 1), family="efficientnet", pooling="gem"),
    "efficientnet, last stride 2": ModelSpec(
        "i", (4, 6, 6, 6, 8, 8, 8, 8, 8), (1,) * 7, family="efficientnet", last_stride=2),
}  # fmt: skip
LOGITS = {
    "cnn": (ModelSpec("d", (4, 4, 8), (1, 1, 1), family="cnn", neck="none"), GREY),
    # 28 rows come to a single one before the last pool, which is then left out.
    "vgg": (ModelSpec("e", (4,) * 5, (1,) * 5, family="vgg", neck="none"), GREY),
    "vgg, group norm": (ModelSpec("f", (4, 6), (1, 1), family="vgg", neck="none", norm="group"), COLOUR),
    "resnet, group norm": (ModelSpec("g", (4, 6), (1, 1), stem="3x3/1", neck="none", norm="group"), COLOUR),
}  # fmt: skip


def variables_of(spec: ModelSpec, pictures: PictureFormat, classes: int = 0) -> dict:
    """A task's, no leaf at its first value, and a channel of every group norm pruned."""
    rng = np.random.default_rng(0)
    trunk = spec.init(jax.random.key(0), *pictures.shape)

    def moved(path: tuple, leaf: jax.Array) -> np.ndarray:
        # Kernels to both sides, for what clips at 6 would else stand there whatever the picture.
        least = -0.3 if path[-1].key == "kernel" else 0.05
        values = np.asarray(leaf) + rng.uniform(least, 0.3, leaf.shape).astype(np.float32)
        if spec.norm == "group" and path[-1].key in ("scale", "bias") and leaf.ndim == 1:
            values[0] = 0.0
        return values

    trunk = jax.tree_util.tree_map_with_path(moved, trunk)
    params = {"trunk": trunk["params"]}
    if classes:
        kernel = rng.normal(size=(spec.feature_dim, classes)).astype(np.float32)
        params["classifier"] = {"kernel": kernel, "bias": rng.normal(size=classes).astype(np.float32)}
    return {"params": params, "batch_stats": {"trunk": trunk["batch_stats"]}}


def run(spec: ModelSpec, variables: dict, pictures: PictureFormat, pixels: np.ndarray, *, logits: bool) -> np.ndarray:
    data = onnx_graph.onnx_bytes(spec, variables, pictures, {"run": "a"}, logits=logits)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [(one.name, one.type, one.shape) for one in session.get_inputs()] == [
        ("pictures", "tensor(uint8)", ["n", *pictures.shape])
    ]
    (found,) = session.run(None, {"pictures": pixels})
    (alone,) = session.run(["logits" if logits else "embedding"], {"pictures": pixels[:1]})
    np.testing.assert_allclose(alone, found[:1], atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map == {"run": "a"}
    return found


def pixels_of(pictures: PictureFormat) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, *pictures.shape), np.uint8)


@pytest.mark.parametrize("name", EMBEDDING)
def test_an_embedding_is_that_of_the_tests(name):
    spec, pixels = EMBEDDING[name], pixels_of(PEOPLE)
    variables = variables_of(spec, PEOPLE)
    found = run(spec, variables, PEOPLE, pixels, logits=False)
    np.testing.assert_allclose(found, reid.embedder(spec)(variables, pixels), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_the_tests(name):
    spec, pictures = LOGITS[name]
    variables, pixels = variables_of(spec, pictures, classes=5), pixels_of(pictures)
    expected = classification.classifier(spec, pictures)(variables, pixels)
    found = run(spec, variables, pictures, pixels, logits=True)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_pruned_weights_stay_zeros_under_the_names_of_their_leaves():
    spec = EMBEDDING["stem of 3x3, projected shortcut"]
    variables = variables_of(spec, PEOPLE)
    kernel = variables["params"]["trunk"]["conv1"]["kernel"]
    kernel[np.random.default_rng(2).random(kernel.shape) < 0.7] = 0.0
    model = onnx.load_from_string(onnx_graph.onnx_bytes(spec, variables, PEOPLE, {}, logits=False))
    held = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    np.testing.assert_array_equal(held["params.trunk.conv1.kernel"], kernel.transpose(3, 2, 0, 1))
    kinds = [node.op_type for node in model.graph.node]
    # The stem, three blocks of two, one shortcut; a norm each, and the neck.
    assert kinds.count("Conv") == 8 and kinds.count("BatchNormalization") == 9


def test_a_family_that_is_not_written_down_is_told():
    spec = EMBEDDING["stem of 3x3, projected shortcut"]
    object.__setattr__(spec := ModelSpec(**vars(spec)), "family", "mixer")
    with pytest.raises(InputError, match="networks of the family mixer are not written as onnx; give safetensors"):
        onnx_graph.onnx_bytes(spec, {}, PEOPLE, {}, logits=False)
