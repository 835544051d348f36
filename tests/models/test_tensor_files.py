"""`.safetensors` and `.npz` of others: what is read, and what a hostile one is told."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.tensor_files import open_tensors, read_float32
from tests.weight_files import BFLOAT16, npz, safetensors, saved

pytestmark = pytest.mark.short

NUMBERS = np.arange(6, dtype=np.float32).reshape(2, 3)


def refused(path: Path, name: str = "a") -> str:
    """What is said of the tensor `name` of a file, which may take no memory for it."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            read_float32(path, open_tensors(path), name)
        assert tracemalloc.get_traced_memory()[1] < 2**21 + 10 * path.stat().st_size
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    return said.removeprefix(f"{path}: ")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_all_formats_give_the_same_float32(tmp_path, dtype):
    array = (NUMBERS - 2.5).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    files = {"a.safetensors": safetensors({"a.weight": array}), "a.pth": saved({"a.weight": array}),
             "a.npz": npz({"a.weight": array}), "b.npz": npz({"a.weight": array}, np.savez_compressed)}  # fmt: skip
    for name, data in files.items():
        if dtype == "bfloat16" and name.endswith(".npz"):
            continue  # NumPy knows no such type
        (tmp_path / name).write_bytes(data)
        tensors = open_tensors(tmp_path / name)
        assert tensors.keys() == {"a.weight"} and tensors["a.weight"].shape == (2, 3)
        found = read_float32(tmp_path / name, tensors, "a.weight")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, NUMBERS - 2.5)


def test_scalars_and_whole_numbers_may_stand_beside_the_weights(tmp_path):
    arrays = {"a": NUMBERS, "steps": np.array(3, np.int64)}
    for path, data in ((tmp_path / "a.safetensors", safetensors(arrays)), (tmp_path / "a.npz", npz(arrays))):
        path.write_bytes(data)
        tensors = open_tensors(path)
        assert tensors["steps"].shape == () and tensors["steps"].read() == 3
        assert refused(path, "steps") == "steps: holds int64; give floating-point numbers"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"a": np.array([1.0, value])}))
    assert refused(path) == "a: holds values that are not finite; give others"


@pytest.mark.parametrize(
    "changed",
    [
        {"data_offsets": [0, 25]}, {"data_offsets": [4, 28]}, {"data_offsets": [24, 0]}, {"data_offsets": [-24, 0]},
        {"data_offsets": [0]}, {"data_offsets": "ab"}, {"data_offsets": [0, True]},
        {"shape": [2, 4]}, {"shape": [-2, -3]}, {"shape": [2.0, 3]}, {"shape": [1] * 9}, {"shape": None},
        {"shape": [2**62, 2**62]}, {"shape": [10**300]}, {"shape": {"2": 3}},
        {"dtype": "F8_E4M3"}, {"dtype": None}, 5, [],
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_header_is_refused(tmp_path, changed):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"a": NUMBERS}, a=changed))
    assert refused(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\1", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 2) + b"\xff\xff",
     struct.pack("<Q", 20_000) + b'{"a": ' + b"9" * 19_993 + b"}", struct.pack("<Q", 14) + b'{"a\\u001b": {}}'],
    ids=["empty", "one byte", "long header", "cut", "list", "deep", "no text", "long number", "no entry"],
)  # fmt: skip
def test_no_safetensors(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert refused(path)


def test_names_that_a_terminal_would_act_on_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"a\n\x1b[31m": NUMBERS}))
    assert refused(path) == "'a\\n\\x1b[31m' is no name of a tensor; get it again"


def written(path: Path, header: bytes, numbers: bytes = b"", version: bytes = b"\1\0") -> Path:
    """An .npz whose only array has this header."""
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY" + version + size + header + numbers)
    return path


@pytest.mark.parametrize("dtype", ["V1000000000", "U250000000", "O", "<c16"])
def test_arrays_of_something_else_are_refused_unread(tmp_path, dtype):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (2, 3)}}\n".encode()
    assert refused(written(tmp_path / "a.npz", header)) == "a: no array of numbers; give one"


def test_long_headers_and_long_arrays_of_an_npz_take_no_memory(tmp_path):
    path = written(tmp_path / "a.npz", b" " * 2**26, version=b"\2\0")
    assert path.stat().st_size < 2**17 and refused(path) == "'a.npy' is no plain array; give plain arrays of numbers"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (16777216,)}\n"
    # Of the right length, so that only one who knows what is wanted can tell; its shape is told unread.
    path = written(tmp_path / "b.npz", header, b"\0" * 2**26)
    tracemalloc.start()
    assert open_tensors(path)["a"].shape == (2**24,)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_what_is_no_npz_or_no_file_is_told(tmp_path):
    path = tmp_path / "a.npz"
    assert "no such file; give a .pth, .safetensors or .npz" in refused_missing(path)
    for data in (b"", b"PK\3\4 something", npz({"a": NUMBERS})[:-30]):
        path.write_bytes(data)
        assert refused(path) == "damaged, or not what its name says; get it again"
    with path.open("wb") as file:
        np.savez(file, a=np.array([{"b": 1}], object))
    assert refused(path) == "a: no array of numbers; give one"


def refused_missing(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_tensors(path)
    return str(caught.value)
