"""torchvision's names on our trees: which tensor goes where, what is told, and PyTorch's own features."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from fedklpr_jax.errors import InputError
from fedklpr_jax.models import ModelSpec, make_spec, pretrained
from fedklpr_jax.models.foreign_names import NAMINGS, torchvision_name
from tests.weight_files import npz, safetensors, saved, stream_file

TORCH = os.environ.get("TORCH") or (sys.executable if importlib.util.find_spec("torch") else "")
needs_torch = pytest.mark.skipif(not TORCH, reason="no PyTorch in this Python; TORCH=PYTHON names one that has it")
TINY = ModelSpec("tiny", (4, 8), (2, 1), bottleneck=True)
TINY_LITE = ModelSpec("tiny_lite", (4, 4, 8, 8, 8, 8, 8, 8, 16), (1, 2, 1, 1, 1, 2, 1), family="efficientnet")


def leaves_of(spec: ModelSpec) -> dict[str, Any]:
    like = jax.eval_shape(lambda: spec.init(jax.random.key(0), 64, 32))
    return traverse_util.flatten_dict(like, sep="/")


def theirs(spec: ModelSpec, prefix: str = "", seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a network under the names of others, with what stands beside a trunk."""
    rng = np.random.default_rng(seed)
    found = {}
    for leaf, like in leaves_of(spec).items():
        name = NAMINGS[spec.family].of(leaf)
        if name:
            shape = tuple(like.shape[axis] for axis in (3, 2, 0, 1)) if like.ndim == 4 else like.shape
            found[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    found["bn1.num_batches_tracked"] = np.array(5, np.int64)
    fc = "fc" if spec.family == "resnet" else "_fc"
    found[f"{fc}.weight"] = np.zeros((10, spec.pooled_dim), np.float32)
    found[f"{fc}.bias"] = np.zeros(10, np.float32)
    return {prefix + name: array for name, array in found.items()}


def load(path: Path, spec: ModelSpec = TINY) -> pretrained.Loaded:
    return pretrained.load(path, spec, jax.random.key(1))


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    kinds = {".pth": saved, ".safetensors": safetensors, ".npz": npz}
    path.write_bytes(kinds[path.suffix](arrays))
    return path


def refused(path: Path, spec: ModelSpec = TINY) -> str:
    with pytest.raises(InputError) as caught:
        load(path, spec)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    return said.removeprefix(f"{path}: ")


def test_names_are_those_of_theirs():
    names = {torchvision_name(leaf) for leaf in leaves_of(make_spec("resnet50", pooling="gem", embedding_dim=8))}
    assert names > {
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "layer1.0.conv3.weight",
        "layer1.0.downsample.0.weight", "layer1.0.downsample.1.running_var", "layer3.5.bn2.bias", "layer4.2.bn3.weight",
        None,
    }  # fmt: skip
    # 53 convolutions, each with a norm of four vectors.
    assert len(names) == 5 * 53 + 1


@pytest.mark.parametrize("spec", [TINY, TINY_LITE], ids=lambda spec: spec.name)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "base."])
def test_every_format_fills_the_trunk_and_leaves_the_rest(tmp_path, spec, suffix, prefix):
    arrays = theirs(spec, prefix) | {"head.scale": np.ones(2, np.float32)}
    path = write(tmp_path / f"net{suffix}", arrays)
    loaded, like = load(path, spec), leaves_of(spec)
    found = traverse_util.flatten_dict(loaded.variables, sep="/")
    assert found.keys() == like.keys()
    used = 0
    for leaf, value in found.items():
        assert isinstance(value, np.ndarray) and value.dtype == np.float32 and value.shape == like[leaf].shape
        name = NAMINGS[spec.family].of(leaf)
        wanted = arrays[prefix + name] if name else np.full(value.shape, float(not leaf.endswith("mean")), np.float32)
        used += name is not None
        np.testing.assert_array_equal(value, np.moveaxis(wanted, (0, 1), (3, 2)) if value.ndim == 4 else wanted)
    behind, fc = f", named behind {prefix!r}" if prefix else "", "fc" if spec is TINY else "_fc"
    assert loaded.report == (
        f"net{suffix}: {used} tensors make the trunk of {spec.name}{behind}",
        f"net{suffix}: not used of it: {fc}.bias, {fc}.weight, head.scale; not in it, and as initialised: bnneck",
    )


def test_a_kernel_is_turned_and_not_only_reshaped(tmp_path):
    arrays = theirs(TINY)
    arrays["conv1.weight"][3, 2, 1, 0] = 77
    loaded = load(write(tmp_path / "net.npz", arrays))
    assert loaded.variables["params"]["conv1"]["kernel"][1, 0, 2, 3] == 77


def test_all_that_is_not_in_a_file_is_named_and_long_lists_are_cut(tmp_path):
    spec = ModelSpec("tiny", (4, 8), (2, 1), bottleneck=True, pooling="gem", embedding_dim=6)
    extra = {f"head.{number}": np.ones(1, np.float32) for number in range(9)}
    path = write(tmp_path / "net.pth", {**theirs(spec), **extra})
    loaded = load(path, spec)
    assert loaded.report[1] == (
        "net.pth: not used of it: fc.bias, fc.weight, head.0, head.1 and 7 more; not in it, and as initialised: "
        "embedding, embedding_bn, gem"
    )
    drawn = loaded.variables["params"]["embedding"]["kernel"]
    np.testing.assert_array_equal(drawn, spec.init(jax.random.key(1), 64, 32)["params"]["embedding"]["kernel"])


def test_another_network_is_named(tmp_path):
    right = "give torchvision-named weights of"
    path = tmp_path / "net.safetensors"
    small = {"layer1.0.conv1.weight": np.zeros((1, 1), np.float32), "layer1.1.conv1.weight": np.zeros(1, np.float32)}
    write(path, small)
    assert refused(path) == f"weights of a ResNet of 2 blocks, not of tiny; set config.model.arch, or {right} tiny"
    stages = {f"layer{stage}.{block}.conv1.weight": small["layer1.0.conv1.weight"]
              for stage, count in enumerate((3, 4, 6, 3), 1) for block in range(count)}  # fmt: skip
    write(path, stages)
    assert refused(path).startswith("weights of resnet34, not of tiny; ")
    write(path, stages | {"layer1.0.conv3.weight": small["layer1.0.conv1.weight"]})
    assert refused(path).startswith("weights of resnet50, not of tiny; ")


def test_another_lite_network_is_named(tmp_path):
    right = "give weights of efficientnet_lite_pytorch of"
    path = write(tmp_path / "net.npz", theirs(TINY))
    said = refused(path, TINY_LITE)
    assert said.startswith("has no _conv_stem.weight, but bn1.bias, ") and said.endswith(f"; {right} tiny_lite")
    write(path, theirs(TINY_LITE))
    lite0 = make_spec("efficientnet_lite0")
    assert refused(path, lite0) == (
        f"weights of an EfficientNet of 9 blocks, not of {lite0.name}; set config.model.arch, or {right} {lite0.name}"
    )
    write(path, theirs(TINY_LITE) | {"_blocks.3._se_reduce.weight": np.ones((1, 8, 1, 1), np.float32)})
    assert refused(path, TINY_LITE).startswith("_blocks.3._se_reduce.weight: no part of tiny_lite, so")


def test_tensors_that_are_missing_strange_or_of_another_shape_are_named(tmp_path):
    path, right = tmp_path / "net.npz", "; give torchvision-named weights of tiny"
    arrays = theirs(TINY)
    write(path, {name: array for name, array in arrays.items() if name != "layer2.0.bn3.bias"})
    total = sum(torchvision_name(leaf) is not None for leaf in leaves_of(TINY))
    assert refused(path) == f"1 of {total} tensors are missing (layer2.0.bn3.bias){right}"
    write(path, arrays | {"layer1.1.IN.weight": np.ones(4, np.float32)})
    assert refused(path) == f"layer1.1.IN.weight: no part of tiny, so that it is another network{right}"
    write(path, arrays | {"conv1.weight": np.ones((4, 3, 3, 3), np.float32)})
    assert refused(path) == f"conv1.weight: shape (4, 3, 3, 3), not (4, 3, 7, 7) as in tiny{right}"
    write(path, arrays | {"bn1.running_var": np.full(4, np.nan, np.float32)})
    assert refused(path) == "bn1.running_var: holds values that are not finite; give others"
    write(path, arrays | {"bn1.running_var": np.ones(4, np.int64)})
    assert refused(path) == "bn1.running_var: holds int64; give floating-point numbers"


def test_files_without_one_resnet_in_them_are_told(tmp_path):
    path = tmp_path / "net.npz"
    write(path, theirs(TINY, "student.") | theirs(TINY, "teacher."))
    assert refused(path) == "2 networks, behind student., teacher.; give a file of one"
    write(path, {"params/conv1/kernel": np.zeros(1, np.float32)})
    assert refused(path) == "weights of this library; give the file as config.model.weights"
    write(path, {"0.weight": np.zeros(1, np.float32)})
    assert refused(path) == "has no layer1.0.conv1.weight, but 0.weight; give torchvision-named weights of tiny"
    write(path, {})
    assert "but nothing; give" in refused(path)
    path = tmp_path / "net.pth"
    path.write_bytes(saved(theirs(TINY), stream_file)[:-1000])
    assert refused(path) == "ends in the middle of its numbers; get it again"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"arch": "thin"}, "arch: 'thin' has no names in files of others; give one of resnet18,"),
        ({"last_stride": 3}, "model.last_stride: 3 is unknown; give one of 1, 2"),
        ({"images": np.zeros((1, 64, 32, 3), np.uint8)}, "images: uint8 (1, 64, 32, 3) is not allowed; give float32"),
        ({"images": np.zeros((1, 3, 64, 32), np.float32)}, "images: float32 (1, 3, 64, 32) is not allowed"),
        ({}, "nowhere.pth: no such file"),
    ],
)
def test_wrong_arguments_are_told(how, words):
    arguments = {"images": np.zeros((1, 64, 32, 3), np.float32), **how}
    with pytest.raises(InputError) as caught:
        pretrained.trunk_features("nowhere.pth", **arguments)
    assert str(caught.value).startswith(words)


@needs_torch
@pytest.mark.parametrize("name", pretrained.ARCHITECTURES)
def test_features_are_those_of_pytorch(tmp_path, name):
    script = Path(__file__).parents[1] / "torch_networks.py"
    subprocess.run([TORCH, str(script), str(tmp_path), name], check=True)
    images = np.load(tmp_path / "images.npy")
    for file, stride in (("zip.pth", 1), ("zip.pth", 2), ("stream.pth", 2)):
        theirs = np.load(tmp_path / f"features-{stride}.npy")
        ours = pretrained.trunk_features(tmp_path / file, images, name, stride)
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-4
