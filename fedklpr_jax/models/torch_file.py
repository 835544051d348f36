"""The tensors of a PyTorch checkpoint (`.pth`), read without PyTorch.

`torch.save` writes a pickle, which is a program, and beside it the numbers. Here nothing is unpickled: the few opcodes
that a state_dict is written with are followed by rules for plain data and tensors, and every other opcode, and every
class but those of tensors, is refused. No name in a file is ever imported or called. Both formats are known: the zip of
PyTorch 1.6 and later, and the stream of pickles before it.
"""

from __future__ import annotations

import functools
import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_STREAM = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of the older format, a magic number
_PROTOCOL = 1001  # the second
_WHOLE_FILE = "save the tensors alone: torch.save(model.state_dict(), FILE)"

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_KNOWN = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.nn.parameter Parameter",
    *(f"torch {kind}" for kind in _DTYPES),
}
# Under which names training scripts keep the state_dict in their checkpoints.
_INSIDE = ("state_dict", "model_state_dict", "model")


class Refused(ValueError):
    """What is wrong with a file, and what would be right, as the end of a line that begins with its name."""


class Stored(NamedTuple):
    """A tensor in a file: its shape, and what reads its numbers, which raises where the file is damaged."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class _Storage(NamedTuple):
    """The numbers that tensors are views of: their name in the file, type and count."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(data: bytes) -> dict[str, Stored]:
    """The tensors of a checkpoint's state_dict by name; the numbers of a tensor are read when it asks for them.

    Args:
      data: a file of `torch.save`: a state_dict, or a dict with one under `state_dict`, `model_state_dict` or `model`.

    Raises:
      Refused: no such file, or one that holds something else than plain data and tensors.
      Exception: of the kinds of `tensor_files.BROKEN`, for a damaged file.
    """
    storages: dict[str, _Storage] = {}
    if data.startswith(b"PK"):
        found, order, record = _open_zip(data, storages)
    elif data.startswith(_STREAM):
        found, order, record = _open_stream(data, storages)
    else:
        raise Refused("no file of torch.save; give a .pth, .safetensors or .npz of torchvision-named weights")

    def stored(tensor: _Tensor) -> Stored:
        return Stored(tensor.shape, lambda: _array(record(tensor.storage.key), tensor, order))

    return {name: stored(tensor) for name, tensor in _state_dict(found).items()}


def whole(values: Any) -> tuple[int, ...]:
    """`values`, where they are the sizes or strides of a tensor.

    Raises:
      Refused: they are not.

    >>> whole([2, 3])
    (2, 3)
    """
    if not (isinstance(values, tuple | list) and len(values) <= 8):
        raise Refused("a shape in it is no short list of whole numbers; the file is damaged")
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise Refused("a size, stride or offset in it is no whole number from 0; the file is damaged")
    return tuple(values)


def _open_zip(data: bytes, storages: dict[str, _Storage]) -> tuple[Any, str, Callable[[str], bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = archive.infolist()
    # What is stored as it is, and once, takes no more memory than the file.
    if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(data):
        raise Refused("its entries are compressed or overlap, which torch.save never does; save it again")
    (root,) = [name[:-8] for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1] or [""]
    if not root:
        raise Refused("a zip archive without a data.pkl; give a file of torch.save(model.state_dict(), FILE)")
    order = "little"
    if f"{root}byteorder" in archive.namelist():
        order = archive.read(f"{root}byteorder").decode()
    found = _evaluate(io.BytesIO(archive.read(f"{root}data.pkl")), storages)
    return found, order, functools.cache(lambda key: archive.read(f"{root}data/{key}"))


def _open_stream(data: bytes, storages: dict[str, _Storage]) -> tuple[Any, str, Callable[[str], bytes]]:
    file = io.BytesIO(data)
    file.seek(len(_STREAM))
    if _evaluate(file, storages) != _PROTOCOL:
        raise Refused("of a version that is not known; save it again with a newer PyTorch")
    _evaluate(file, storages)  # sizes of the writer's types
    found, keys = _evaluate(file, storages), _evaluate(file, storages)
    records = {}
    for key in keys:
        storage = storages[str(key)]
        size = int.from_bytes(file.read(8), "little")
        records[storage.key] = file.read(size * storage.dtype.itemsize)
        if len(records[storage.key]) != size * storage.dtype.itemsize:
            raise Refused("ends in the middle of its numbers; get it again")
    # PyTorch writes this format in little endian on every machine.
    return found, "little", records.__getitem__


def _state_dict(found: Any) -> dict[str, _Tensor]:
    for _ in range(3):  # no deeper, for a dict may hold itself
        if isinstance(found, dict):
            found = next((found[name] for name in _INSIDE if isinstance(found.get(name), dict)), found)
    tensors = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in tensors if isinstance(name, str) and isinstance(value, _Tensor)}


def _array(raw: bytes, tensor: _Tensor, order: str) -> np.ndarray:
    storage = tensor.storage
    if len(raw) != storage.size * storage.dtype.itemsize:
        raise Refused(f"{len(raw)} bytes are there for {storage.size} numbers of {storage.dtype}; the file is damaged")
    flat = np.frombuffer(raw, storage.dtype)
    if order == "big":
        flat = flat.byteswap()
    steps = [stride * storage.dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)


def _evaluate(file: io.BytesIO, storages: dict[str, _Storage]) -> Any:
    """The next pickle of `file`, as plain data and `_Tensor`s; what it says of storages goes into `storages`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        first = marks.pop()
        items = stack[first:]
        del stack[first:]
        return items

    operations: Iterable[tuple[Any, Any, Any]] = pickletools.genops(file)
    for opcode, argument, _ in operations:
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = above_mark()
                stack[-1].extend(items)
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                _fill(stack[-1], [(key, value)])
            case "SETITEMS":
                items = above_mark()
                _fill(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in _KNOWN:
                    raise Refused(f"holds a {argument.replace(' ', '.')[:80]!r}, which is not read; {_WHOLE_FILE}")
                stack.append(argument)
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise Refused("a storage in it is of two kinds; the file is damaged")
                stack.append(storage)
            case "REDUCE":
                called, arguments = stack[-2:]
                stack[-2:] = [_made(called, arguments)]
            case "BUILD":
                stack.pop()  # attributes, such as the versions of layers, which say nothing of the tensors
            case _:
                raise Refused(f"has the pickle opcode {opcode.name}, which no state_dict needs; {_WHOLE_FILE}")
    return stack.pop()


def _fill(target: Any, pairs: Any) -> None:
    for key, value in pairs:
        # The hash of a deeply nested tuple would overflow Python's own stack.
        if not isinstance(target, dict) or not isinstance(key, str | int):
            raise Refused(f"holds a dict of other keys than names and numbers; {_WHOLE_FILE}")
        target[key] = value


def _storage(told: Any) -> _Storage:
    match told:
        # The older format ends it with the part of another storage that it is, which was None for most of its life.
        case ("storage", str(kind), str(key), str(), size, *rest) if rest in ([], [None]):
            return _Storage(key, _DTYPES[kind.removeprefix("torch ")], *whole((size,)))
    raise Refused(f"holds something beside tensors of whole storages; {_WHOLE_FILE}")


def _made(called: Any, arguments: Any) -> Any:
    """What a class or function of `_KNOWN` makes, of which none is called."""
    match called, arguments:
        case "collections OrderedDict", ():
            return {}
        case "collections OrderedDict", (list(pairs),):
            # As Python 2 wrote it. Emptied, a list cannot be made into a dict again and again.
            found: dict[Any, Any] = {}
            _fill(found, pairs)
            pairs.clear()
            return found
        case "torch Size", (sizes,):
            return whole(sizes)
        case "torch._utils _rebuild_tensor" | "torch._utils _rebuild_tensor_v2", (
            _Storage() as storage, offset, shape, strides, *_,
        ):  # fmt: skip
            return _view(storage, offset, shape, strides)
        case "torch._utils _rebuild_parameter" | "torch.nn.parameter Parameter", (_Tensor() as tensor, *_):
            return tensor
    raise Refused("a tensor in it is not written as torch.save writes one; the file is damaged")


def _view(storage: _Storage, offset: Any, shape: Any, strides: Any) -> _Tensor:
    (offset,), shape, strides = whole((offset,)), whole(shape), whole(strides)
    if len(shape) != len(strides):
        raise Refused(f"a tensor of shape {shape} has {len(strides)} strides; the file is damaged")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # Views that repeat elements are refused as well: a small file could ask for any amount of memory by them.
    if math.prod(shape) > storage.size or (0 not in shape and last >= storage.size):
        raise Refused(f"a tensor of shape {shape} reaches beyond its storage of {storage.size}; the file is damaged")
    return _Tensor(storage, offset, shape, strides)
