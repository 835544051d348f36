"""A client's trained network as a file for others, which is read back and compared before it is there."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from fedklpr_jax import __version__
from fedklpr_jax.assembly import test_pictures
from fedklpr_jax.errors import InputError
from fedklpr_jax.metrics import write_atomically
from fedklpr_jax.models.onnx_graph import INPUT, onnx_bytes
from fedklpr_jax.models.tensor_files import open_tensors, read_float32, safetensors_bytes
from fedklpr_jax.pictures import spread
from fedklpr_jax.trained import Trained, narrowed
from fedklpr_jax.trees import PyTree, parameter_count

FORMATS = ("safetensors", "onnx")
# Of embeddings of length 1, or of logits over the largest of them: a hundred times what float32 rounds.
TOLERANCE = 1e-4
COMPARED = 64


class Exported(NamedTuple):
    """What was written: the network and how many `parameters` it has, of them `zeros`; the largest `difference` found
    on `compared` pictures of which kind (`of`)."""

    model: Trained
    parameters: int
    zeros: int
    difference: float
    compared: int
    of: str


def export(whole: Trained, form: str, path: Path) -> Exported:
    """Writes a client's network to `path`, whole or not at all.

    Of a client with a network of its own size it is that one. The file is read back and run on some pictures, and what
    it gives is compared with what the run's tests would have been given.

    Args:
      whole: of `trained.load`.
      form: one of `FORMATS`.
      path: an older file is replaced.

    Raises:
      InputError: it cannot be written, a package is missing, or what is read back gives other numbers; `path` is then
        as it was.
    """
    # Files hold float32 and are computed in it, whatever the run computed in.
    whole = dataclasses.replace(whole, spec=dataclasses.replace(whole.spec, dtype="float32"))
    small, kept = narrowed(whole)
    pixels, of = _pictures(whole)
    # An accelerator may take shortcuts of three digits in float32 unless it is told not to.
    with jax.default_matmul_precision("highest"):
        expected = whole.network()(whole.variables, pixels)
    expected = expected if kept is None else expected[:, kept]
    variables, told = _served(small), metadata(small)
    if form == "onnx":
        _runtime()
        data = onnx_bytes(small.spec, variables, small.pictures, told, logits=bool(small.classes))
    else:
        data = safetensors_bytes(_dotted(variables), told)
    # The form is told by the end of the name.
    draft = path.with_name(f".{os.getpid()}.{path.stem}.{form}")
    try:
        write_atomically(draft, data)
        difference = _difference(_read_back(draft, form, small, pixels), expected)
        if not difference <= TOLERANCE:
            raise InputError(f"{path}: not written: what was read back differs by {difference:.1e} on {len(pixels)} "
                             f"{of}, more than {TOLERANCE:.0e}; give another --format")
        os.replace(draft, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give a path in an existing folder") from error
    finally:
        draft.unlink(missing_ok=True)
    zeros = sum(int(np.sum(leaf == 0)) for leaf in _dotted(variables["params"]).values())
    return Exported(small, parameter_count(variables["params"]), zeros, difference, len(pixels), of)


def metadata(model: Trained) -> dict[str, str]:
    """What a file tells of the network in it: whose it is, what it takes and what it gives."""
    pictures, spec = model.pictures, dataclasses.asdict(model.spec)
    height, width, channels = pictures.shape
    colours = "red, green, blue" if channels == 3 else f"{channels} channel{'s' * (channels > 1)}"
    gives = "float32 [n, classes]: logits" if model.classes else (
        "float32 [n, d]: the network's embedding of a picture plus that of its mirror image, L2-normalised; compare "
        "two by their dot product"
    )  # fmt: skip
    return {
        "library": f"fedklpr_jax {__version__}",
        "run": model.run,
        "method": model.method.name,
        "task": model.config.task.name,
        "client": model.client,
        "rounds": str(model.rounds),
        "density": f"{model.density:.4f}",
        "configuration": model.digest,
        "takes": f"uint8 [n, {height}, {width}, {channels}]: pictures, rows, columns, {colours} (NHWC), 0 to 255, "
                 "resized with Pillow's bilinear filter",
        "normalised": "(x - mean) / deviation, both a channel and in units of uint8; the onnx file does this itself",
        "mean": json.dumps(pictures.mean),
        "deviation": json.dumps(pictures.deviation),
        "gives": gives,
        "classes": json.dumps(model.classes),
        "network": json.dumps(spec),
    }  # fmt: skip


def _served(model: Trained) -> PyTree:
    """The leaves that the network's answer depends on: of re-ID no classifier."""
    served = {"params": {"trunk": model.variables["params"]["trunk"]}}
    if model.classes:
        served["params"]["classifier"] = model.variables["params"]["classifier"]
    statistics = model.variables.get("batch_stats", {})
    return {**served, "batch_stats": statistics} if statistics else served


def _dotted(variables: PyTree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(variables, sep=".").items()}


def _pictures(model: Trained) -> tuple[np.ndarray, str]:
    """Some of the client's own test pictures, or noise where they are not here."""
    try:
        found = test_pictures(model.config, model.number, model.client)
        if found.shape[1:] == model.pictures.shape:
            return np.asarray(found[spread(len(found), COMPARED)]), f"test pictures of {model.client}"
    except InputError:
        pass
    noise = np.random.default_rng(0).integers(0, 256, (COMPARED, *model.pictures.shape), np.uint8)
    return noise, "pictures of noise, as the client's own are not here"


def _read_back(path: Path, form: str, model: Trained, pixels: np.ndarray) -> np.ndarray:
    if form == "safetensors":
        tensors = open_tensors(path)
        leaves = {name: read_float32(path, tensors, name) for name in tensors}
        with jax.default_matmul_precision("highest"):
            return model.network()({"batch_stats": {}, **traverse_util.unflatten_dict(leaves, sep=".")}, pixels)
    session = _runtime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # Of two sizes, as any number of pictures may be given.
    parts = [session.run(None, {INPUT: part})[0] for part in (pixels[:1], pixels[1:]) if len(part)]
    return np.concatenate(parts)


def _runtime() -> Any:
    """The module onnxruntime, where onnx is there too."""
    try:
        importlib.import_module("onnx")
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError(
            "--format: onnx needs the packages onnx and onnxruntime; install them with: pip install 'fedklpr_jax[onnx]'"
        ) from error


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest one, as a share of the largest expected number where that is above 1; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.max(np.abs(found - expected)) / max(1.0, float(np.max(np.abs(expected)))))
