"""PyTorch's files without PyTorch: what is read, and that nothing else is followed."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.tensor_files import open_tensors, read_float32
from fedklpr_jax.models.torch_file import Refused, read_torch
from tests.weight_files import BFLOAT16, STREAM, Raw, View, opcodes, saved, stream_file, zip_file

pytestmark = pytest.mark.short

ARRAYS = {
    "conv1.weight": np.arange(12, dtype=np.float32).reshape(2, 3, 2) / 7,
    "wide": np.array([1.5, -2.0, 1e300]),
    "half": np.array([[0.5, 65504.0]], np.float16),
    "brain": np.array([1.0, -2.5, 3e38], BFLOAT16),
    "count": np.array(7, np.int64),
}


def read(data: bytes) -> dict[str, np.ndarray]:
    return {name: stored.read() for name, stored in read_torch(data).items()}


def assert_same(found, arrays=ARRAYS) -> None:
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(found[name].astype(np.float64), array.astype(np.float64))


@pytest.mark.parametrize(
    "data",
    [
        saved(ARRAYS),
        saved(ARRAYS, order="big"),
        saved(ARRAYS, parameters=True),
        saved(ARRAYS, stream_file),
        saved(ARRAYS, wrap=lambda tensors: {"epoch": 3, "best": 0.5, "note": None, "state_dict": tensors}),
        saved(ARRAYS, wrap=lambda tensors: {"model": {"model_state_dict": tensors}, "optimizer": {0: [1, True]}}),
    ],
    ids=["zip", "big endian", "parameters", "stream", "checkpoint", "two levels"],
)
def test_every_type_and_format_is_read(data):
    assert_same(read(data))


def test_python_2_wrote_ordered_dicts_as_pairs():
    pairs = Raw(opcodes([["a", View(ARRAYS["wide"])]]))
    data = zip_file(Raw(b"ccollections\nOrderedDict\n" + opcodes((pairs,)) + b"R"), {"0": ARRAYS["wide"]})
    assert_same(read(data), {"a": ARRAYS["wide"]})


def test_views_share_a_storage_by_offset_and_strides():
    numbers = np.arange(12, dtype=np.float32)
    found = read(zip_file({"turned": View(numbers, offset=2, shape=(3, 2), strides=(1, 4)),
                           "end": View(numbers, offset=11, shape=(), strides=())}, {"0": numbers}))  # fmt: skip
    assert found["turned"].tolist() == [[2, 6], [3, 7], [4, 8]] and found["end"] == 11


class Evil:
    def __reduce__(self):
        return os.mkdir, (EVIL,)


EVIL = "was-executed"


@pytest.mark.parametrize("where", ["value", "attributes", "optimizer"])
@pytest.mark.parametrize("writer", [zip_file, stream_file])
def test_a_class_of_anything_else_is_refused_by_name_and_not_called(tmp_path, monkeypatch, where, writer):
    monkeypatch.chdir(tmp_path)
    code = pickle.dumps(Evil(), 2)
    pickle.loads(code)
    assert (tmp_path / EVIL).is_dir()  # a reader that unpickles would be caught
    (tmp_path / EVIL).rmdir()
    evil = Raw(code[2:-1])
    wrong = {
        "value": evil,
        "attributes": Raw(b"ccollections\nOrderedDict\n)R" + evil.code + b"b"),
        "optimizer": {"state_dict": {}, "optimizer": [evil]},
    }
    with pytest.raises(Refused, match=r"^holds a '(posix|nt)\.mkdir', which is not read; save the tensors alone"):
        read_torch(writer(wrong[where], {}))
    assert not (tmp_path / EVIL).exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_bare_pickle_is_no_file_of_torch(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=r"^no file of torch\.save; give a \.pth, \.safetensors or \.npz"):
        read_torch(pickle.dumps(Evil(), protocol))
    assert not (tmp_path / EVIL).exists()


NUMBERS = np.arange(6, dtype=np.float32)
WRONG = {
    "offset": View(NUMBERS, offset=1),
    "offset below 0": View(NUMBERS, offset=-1),
    "stride": View(NUMBERS, shape=(2, 3), strides=(4, 1)),
    "stride below 0": View(NUMBERS, strides=(-1,)),
    "repeated": View(NUMBERS, shape=(10**12,), strides=(0,)),
    "size": View(NUMBERS, size=10**15, shape=(10**15,), strides=(1,)),
    "smaller storage": View(NUMBERS, size=5, shape=(5,)),
    "beyond int64": View(NUMBERS, size=2**65),
    "strides missing": View(NUMBERS, shape=(2, 3), strides=(3,)),
    "many axes": View(NUMBERS, shape=(1,) * 9, strides=(1,) * 9),
    "shape of texts": View(NUMBERS, shape=("2", 3), strides=(3, 1)),
    "no record": View(NUMBERS, key="9"),
    "another's record": View(NUMBERS, key="../data.pkl"),
    "types": [View(NUMBERS), View(NUMBERS.astype(np.float64))],
    "storage alone": Raw(opcodes(("storage", "torch FloatStorage", "0", "cpu", 6)) + b"Q"),
    "module": Raw(opcodes(("module", "a", "b", "c")) + b"Q"),
    "size called": Raw(b"ctorch\nSize\n" + opcodes(("6",)) + b"R"),
    "type called": Raw(b"ctorch\nFloatStorage\n" + opcodes((2**40,)) + b"R"),
    "text called": Raw(opcodes("os system") + opcodes(("true",)) + b"R"),
    "long memo": Raw(b"r\xff\xff\xff\xff" + b"h\0"),
    "byte array": Raw(b"\x96" + struct.pack("<Q", 2**40)),
    "long text": Raw(b"X" + struct.pack("<I", 2**32 - 1)),
    "copy_reg": Raw(b"ccopy_reg\n_reconstructor\n"),
    "new object": Raw(b"ccollections\nOrderedDict\n)\x81"),
    "empty stack": Raw(b"tR"),
    "other opcode": Raw(b"0"),
    "no mark": Raw(b"t"),
    "list as dict": Raw(b"](NNu"),
    "deep key": Raw(b"})" + b"\x85" * 50_000 + b"Ns"),
}


@pytest.mark.parametrize("writer", [zip_file, stream_file])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_in_one_line_and_little_memory(tmp_path, wrong, writer):
    path = tmp_path / "net.pth"
    path.write_bytes(writer({"a": WRONG[wrong]}, {"0": NUMBERS}))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            tensors = open_tensors(path)
            read_float32(path, tensors, "a")
        assert tracemalloc.get_traced_memory()[1] < 2**21 + 50 * size
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_pair_list_is_made_into_a_dict_once():
    pairs = opcodes([[str(number), 0] for number in range(1000)])
    again = b"ccollections\nOrderedDict\nh\1\x85R" * 1000
    tracemalloc.start()
    try:
        assert read_torch(zip_file(Raw(pairs + b"q\1" + again + b"}"), {})) == {}
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_compressed_and_overlapping_entries_are_refused():
    with pytest.raises(Refused, match="compressed or overlap"):
        read_torch(saved({"a": np.zeros(10**6, np.float32)}, compression=zipfile.ZIP_DEFLATED))
    data = bytearray(saved({"a": NUMBERS}))
    place = data.rindex(b"PK\1\2", 0, data.rindex(b"archive/data/0"))
    data[place + 20 : place + 28] = struct.pack("<II", 2**31, 2**31)
    with pytest.raises(Refused, match="compressed or overlap"):
        read_torch(bytes(data))


def test_archives_of_something_else_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(InputError, match=r"net\.pth: a zip archive without a data\.pkl; give a file of torch\.save"):
        open_tensors(path)
    path.write_bytes(STREAM + b"\x80\x02K\x01.")
    with pytest.raises(InputError, match="of a version that is not known"):
        open_tensors(path)


@pytest.mark.parametrize("writer", [zip_file, stream_file])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damage_is_found_or_harmless(tmp_path_factory, writer, data):
    whole = saved({"a": NUMBERS, "b": NUMBERS[:2]}, writer)
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 3)) if broken else 0):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("broken") / "net.pth"
    path.write_bytes(broken)
    try:
        tensors = open_tensors(path)
        for name in tensors:
            assert read_float32(path, tensors, name).size <= 6
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("writer", [zip_file, stream_file])
def test_every_cut_is_refused(tmp_path, writer):
    whole, path = saved({"a": NUMBERS}, writer), tmp_path / "net.pth"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"^[^\n]*net\.pth: [^\n]*$"):
            read_float32(path, open_tensors(path), "a")
