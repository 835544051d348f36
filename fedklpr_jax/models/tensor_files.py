"""Named tensors from a file that others wrote: `.pth`, `.safetensors` or `.npz`, none of which is trusted; and ours as
`.safetensors`.

Names and shapes are read first, the numbers of a tensor only when it asks for them, so that a file takes no more memory
than its own size and what is wanted of it.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.torch_file import Refused, Stored, read_torch, whole

# What a damaged file raises where nothing looks for the damage.
BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
          ValueError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)  # fmt: skip
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def open_tensors(path: Path) -> dict[str, Stored]:
    """The tensors in a file by name, their numbers not read yet.

    Args:
      path: an `.npz` of plain arrays, a `.safetensors`, or (any other name) a file of `torch.save`.

    Raises:
      InputError: no such file, or none of these.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .pth, .safetensors or .npz of torchvision-named weights")
    reader = {".npz": _read_npz, ".safetensors": _read_safetensors}.get(path.suffix, read_torch)
    try:
        found = reader(path.read_bytes())
    except Refused as error:
        raise InputError(f"{path}: {error}") from error
    except BROKEN as error:
        raise InputError(f"{path}: damaged, or not what its name says; get it again") from error
    for name in found:
        if not (name.isprintable() and len(name) <= 200):
            raise InputError(f"{path}: {ascii(name)[:80]} is no name of a tensor; get it again")
    return found


def read_float32(path: Path, tensors: Mapping[str, Stored], name: str) -> np.ndarray:
    """The numbers of one of `open_tensors(path)`, as float32.

    Raises:
      InputError: it is damaged, not of floating-point numbers, or not finite.
    """
    try:
        found = tensors[name].read()
    except Refused as error:
        raise InputError(f"{path}: {name}: {error}") from error
    except BROKEN as error:
        raise InputError(f"{path}: {name}: damaged; get the file again") from error
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise InputError(f"{path}: {name}: holds {found.dtype}; give floating-point numbers")
    with np.errstate(over="ignore"):
        found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise InputError(f"{path}: {name}: holds values that are not finite; give others")
    return found


def safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Float32 `tensors` by name as a `.safetensors` file, with what it tells of itself.

    The format: 8 bytes that are the length of a JSON header, the header, the numbers end to end (little-endian).

    >>> safetensors_bytes({"a": np.float32([1.0])}, {"run": "one"})[8:].rstrip().decode("latin-1")[:60]
    '{"__metadata__": {"run": "one"}, "a": {"dtype": "F32", "shap'
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    parts, end = [], 0
    for name, values in tensors.items():
        parts.append(np.ascontiguousarray(values, "<f4").tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": "F32", "shape": list(np.shape(values)), "data_offsets": [begin, end]}
    text = json.dumps(header).encode("ascii")
    # Numbers begin at a multiple of their size, for those who map the file into memory.
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _read_safetensors(data: bytes) -> dict[str, Stored]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise Refused(f"no .safetensors: {len(data)} bytes with a header of {length}; get it again")
    header, numbers = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    return {name: _slice(name, entry, numbers) for name, entry in header.items() if name != "__metadata__"}


def _slice(name: str, entry: Mapping[str, object], numbers: memoryview) -> Stored:
    dtype, shape = _DTYPES.get(str(entry["dtype"])), whole(entry["shape"])
    if dtype is None:
        raise Refused(f"{ascii(name)[:80]} is of type {ascii(entry['dtype'])[:20]}; give one of {', '.join(_DTYPES)}")
    begin, end = whole(entry["data_offsets"])
    if not (end - begin == math.prod(shape) * dtype.itemsize and end <= len(numbers)):
        raise Refused(f"{ascii(name)[:80]} of shape {shape} lies at {begin} to {end} of {len(numbers)} bytes; get it "
                      "again")
    return Stored(shape, lambda: np.frombuffer(numbers[begin:end], dtype).reshape(shape))


def _read_npz(data: bytes) -> dict[str, Stored]:
    archive = zipfile.ZipFile(io.BytesIO(data))

    def stored(name: str) -> Stored:
        with archive.open(name) as member:
            # That of all arrays of numbers; the headers of the others may be of any length.
            if np.lib.format.read_magic(member) != (1, 0):
                raise Refused(f"{ascii(name)[:80]} is no plain array; give plain arrays of numbers")
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)

        def read() -> np.ndarray:
            if dtype.kind not in "fiub":  # others can be of any size
                raise Refused("no array of numbers; give one")
            with archive.open(name) as member:
                return np.lib.format.read_array(member, allow_pickle=False)

        return Stored(shape, read)

    return {name.removesuffix(".npy"): stored(name) for name in archive.namelist() if name.endswith(".npy")}
