"""Files of weights as others write them: `.pth` in both formats, made without PyTorch, `.safetensors`, `.npz`."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
BFLOAT16 = np.dtype(jnp.bfloat16)
STREAM = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class View(NamedTuple):
    """A tensor as the file describes it: of the storage `key`, with sizes that may be lies."""

    array: np.ndarray
    key: str = "0"
    size: int | None = None
    offset: int = 0
    shape: tuple | None = None
    strides: tuple | None = None


class Raw(NamedTuple):
    """Opcodes, as they are."""

    code: bytes


def opcodes(value: Any, *, parameters: bool = False, older: bool = False) -> bytes:
    """A value in the opcodes of pickle protocol 2, without the first and the last."""

    def write(value: Any) -> bytes:
        if isinstance(value, Raw):
            return value.code
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            small = -(2**31) <= value < 2**31
            return b"J" + struct.pack("<i", value) if small else b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        if isinstance(value, View):
            return tensor(value)
        if isinstance(value, tuple):
            return b"(" + b"".join(map(write, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        assert isinstance(value, dict), value
        items = b"".join(write(key) + write(item) for key, item in value.items())
        # With the attributes that a module's state_dict has.
        return b"ccollections\nOrderedDict\n)R(" + items + b"u}X\x09\0\0\0_metadataNsb"

    def tensor(view: View) -> bytes:
        array = view.array
        shape = array.shape if view.shape is None else view.shape
        steps = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        size = array.size if view.size is None else view.size
        kind = Raw(f"ctorch\n{STORAGES[array.dtype.name]}\n".encode())
        storage = write(("storage", kind, view.key, "cpu", size, *([None] if older else []))) + b"Q"
        hooks = Raw(b"ccollections\nOrderedDict\n)R")
        arguments = (Raw(storage), view.offset, shape, steps if view.strides is None else view.strides, False, hooks)
        rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n" + write(arguments) + b"R"
        if not parameters:
            return rebuilt
        return b"ctorch._utils\n_rebuild_parameter\n" + write((Raw(rebuilt), True, hooks)) + b"R"

    return write(value)


def views(arrays: Mapping[str, np.ndarray]) -> dict[str, View]:
    """Each array in a storage of its own."""
    return {name: View(array, str(key)) for key, (name, array) in enumerate(arrays.items())}


def zip_file(
    value: Any,
    records: Mapping[str, np.ndarray],
    *,
    order: str = "little",
    compression: int = zipfile.ZIP_STORED,
    parameters: bool = False,
) -> bytes:
    """The format since PyTorch 1.6; `records` are the numbers of each storage by its key."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes(value, parameters=parameters) + b".")
        archive.writestr("archive/byteorder", order)
        for key, array in records.items():
            archive.writestr(f"archive/data/{key}", (array.byteswap() if order == "big" else array).tobytes())
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def stream_file(value: Any, records: Mapping[str, np.ndarray]) -> bytes:
    """The format before."""
    told = [1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}]
    parts = [*told, value, list(records)]
    pickles = b"".join(b"\x80\x02" + opcodes(part, older=True) + b"." for part in parts)
    numbers = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in records.values())
    return STREAM + pickles + numbers


def saved(
    arrays: Mapping[str, np.ndarray],
    writer: Callable[..., bytes] = zip_file,
    wrap: Callable[[Any], Any] = lambda tensors: tensors,
    **how: Any,
) -> bytes:
    """A state_dict of these arrays as `writer` writes it, inside what `wrap` makes of it."""
    tensors = views(arrays)
    return writer(wrap(tensors), {view.key: view.array for view in tensors.values()}, **how)


def safetensors(arrays: Mapping[str, np.ndarray], **changed: Any) -> bytes:
    """The file of these arrays, with some entries of its header changed."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in arrays.items():
        place = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": place}
        body += array.tobytes()
    for name, entry in changed.items():
        header[name] = {**header[name], **entry} if isinstance(entry, dict) else entry
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def npz(arrays: Mapping[str, np.ndarray], save: Callable[..., None] = np.savez) -> bytes:
    """As NumPy writes it."""
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()
