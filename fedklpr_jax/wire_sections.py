"""The sections a wire payload is built of: byte planes, masks, values. `fedklpr_jax.wire` puts them together.

**Byte planes.** An array of n unsigned integers is cut into blocks of 2**18 values; of each block the lowest bytes of
all values are one plane, then the next bytes, and so on. Each plane is one zstd frame after its length (uint32).
Sign and exponent bytes of weights are alike and shrink to about a third; mantissa bytes do not, and zstd stores them.

**Masks** (boolean trees, True = kept) travel as one of

* full: one flag bit a leaf (1 = everything kept), then the packed bits of the other leaves, one plane;
* change: the number of flips against a mask that the receiver holds (uint64), then the gaps between them over all
  leaves laid end to end, as uint32 planes.

Both sides know how many values to expect before they read, so nothing in a payload decides how much is allocated.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from fedklpr_jax.errors import InputError

BLOCK = 1 << 18  # values in a block: its planes stay in the second-level cache while they are cut and compressed
MAX_CHANGE_ELEMENTS = (1 << 32) - 1  # gaps are uint32
HASH_BYTES = 16
DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", jnp.bfloat16)
}

# Matches shorter than 7 bytes are accidents in exponent bytes. Without them zstd is both faster and smaller than at
# level 3 (8 % smaller exponent planes of a normal distribution), while the runs of structured masks are still found.
_COMPRESSION = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, min_match=7, window_log=18, hash_log=12, write_content_size=True
)


class WireError(ValueError):
    """A payload that is damaged, hostile, or does not fit the template or the mask it was decoded with."""


@dataclass(frozen=True)
class LeafSpec:
    """Path, shape and dtype of one leaf; its text is the leaf's line in the schema."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype.name} {format_shape(self.shape)} {self.path}"

    @property
    def size(self) -> int:
        """Number of elements, as a Python integer that cannot overflow."""
        return math.prod(self.shape)

    def wire_dtype(self, value_dtype: str | None) -> np.dtype:
        """Returns the dtype that the leaf travels in when kernels are cast to `value_dtype`."""
        is_kernel = len(self.shape) >= 2 and self.dtype.name in ("float32", "float64")
        return DTYPES[value_dtype] if value_dtype is not None and is_kernel else self.dtype


class Reader:
    """Takes a section apart from front to back and never reads past its end."""

    def __init__(self, view: memoryview, name: str) -> None:
        self._view, self._name, self._at = view, name, 0

    def take(self, count: int) -> memoryview:
        """Returns the next `count` bytes.

        Raises:
            WireError: if fewer are left.
        """
        part = self._view[self._at : self._at + count]
        if len(part) != count:
            raise WireError(f"{self._name}: {count} bytes expected at {self._at}, {len(part)} left")
        self._at += count
        return part

    def finish(self) -> None:
        """Raises `WireError` if bytes are left over."""
        if self._at != len(self._view):
            raise WireError(f"{self._name}: {len(self._view) - self._at} bytes too many")


def flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Returns the paths, the leaves and the tree definition of a pytree, in JAX's order.

    >>> flatten({"b": {"c": 1.0}, "a": 2.0})[:2]
    (["['a']", "['b']['c']"], [2.0, 1.0])
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def format_shape(shape: Sequence[int]) -> str:
    """Writes a shape as it stands in a payload: `3x4`, and an empty string for a scalar."""
    return "x".join(map(str, shape))


def mask_leaves(mask: Any, name: str) -> tuple[list[str], list[np.ndarray]]:
    """Returns the paths and the boolean arrays of a mask.

    Raises:
        InputError: if a leaf is not boolean.
    """
    paths, leaves, _ = flatten(mask)
    arrays = [np.asarray(leaf) for leaf in leaves]
    for path, array in zip(paths, arrays, strict=True):
        if array.dtype != np.bool_:
            raise InputError(f"{name}{path}: has dtype {array.dtype}; give a boolean array")
    return paths, arrays


def digest_mask(paths: Sequence[str], leaves: Sequence[np.ndarray]) -> bytes:
    """Returns 16 bytes of BLAKE2b over paths, shapes and packed bits."""
    state = hashlib.blake2b(digest_size=HASH_BYTES, person=b"fedklpr mask")
    for path, leaf in zip(paths, leaves, strict=True):
        state.update(f"{format_shape(leaf.shape)} {path}\n".encode())
        state.update(np.packbits(leaf).data)
    return state.digest()


def mask_hash(mask: Any) -> str:
    """Names a mask in 32 hexadecimal digits: BLAKE2b over paths, shapes and bits.

    Args:
        mask: pytree of boolean arrays of any shape.

    Returns:
        The digest; equal masks in equal trees have equal digests on every machine.

    Raises:
        InputError: if a leaf is not boolean.

    Example:
        >>> mask_hash({"w": np.array([True, False])}) == mask_hash({"w": np.array([True, True])})
        False
    """
    return digest_mask(*mask_leaves(mask, "mask")).hex()


def pack_planes(values: np.ndarray) -> list[bytes]:
    """Codes a vector of unsigned integers (uint8 to uint64) as byte planes; see the top of this file.

    Returns:
        The pieces to send one after another; joining them once, with the whole payload, spares a copy.
    """
    compressor = zstandard.ZstdCompressor(compression_params=_COMPRESSION)
    shift = values.dtype.type
    parts: list[bytes] = []
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        for byte in range(values.itemsize):
            frame = compressor.compress((block >> shift(8 * byte)).astype(np.uint8))
            parts += [struct.pack("<I", len(frame)), frame]
    return parts


def unpack_planes(reader: Reader, count: int, dtype: np.dtype) -> np.ndarray:
    """Undoes `pack_planes`: `count` values of an unsigned `dtype`.

    Raises:
        WireError: if a frame is broken or does not hold exactly the bytes of its plane.
    """
    # The limit on the window keeps a crafted frame from asking for more working memory than a plane needs.
    decompressor = zstandard.ZstdDecompressor(max_window_size=BLOCK)
    values = np.empty(count, dtype)
    for start in range(0, count, BLOCK):
        block = values[start : start + BLOCK]
        frames = [reader.take(struct.unpack("<I", reader.take(4))[0]) for _ in range(values.itemsize)]
        planes = [np.frombuffer(_decompress(decompressor, frame, block.size), np.uint8) for frame in frames]
        block[...] = planes[-1]
        for plane in planes[-2::-1]:
            block <<= dtype.type(8)
            block |= plane
    return values


def _decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, size: int) -> bytes:
    try:
        # zstandard allocates what the frame claims, whatever limit it is given: compare the claim first.
        claimed = zstandard.frame_content_size(frame)
        if claimed != size:
            raise WireError(f"a zstd frame claims {claimed} bytes where {size} are expected")
        data = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"a zstd frame is broken: {error}") from error
    if len(data) != size:
        raise WireError(f"a zstd frame holds {len(data)} bytes where {size} are expected")
    return data


def pack_full_mask(leaves: Sequence[np.ndarray]) -> bytes:
    """Codes a mask by itself: flags of the leaves that are kept whole, and the bits of the others."""
    whole = np.array([leaf.all() for leaf in leaves], np.bool_)
    bits = [np.packbits(leaf) for leaf, flag in zip(leaves, whole, strict=True) if not flag]
    return b"".join([np.packbits(whole).tobytes(), *(pack_planes(np.concatenate(bits)) if bits else [])])


def unpack_full_mask(reader: Reader, specs: Sequence[LeafSpec]) -> list[np.ndarray]:
    """Undoes `pack_full_mask`.

    Raises:
        WireError: if the section is too short or broken.
    """
    flags = np.frombuffer(reader.take(-(-len(specs) // 8)), np.uint8)
    whole = np.unpackbits(flags, count=len(specs)).tolist()
    lengths = [0 if flag else -(-spec.size // 8) for spec, flag in zip(specs, whole, strict=True)]
    bits = _cut(unpack_planes(reader, sum(lengths), np.dtype(np.uint8)), lengths)
    return [
        np.ones(spec.shape, np.bool_) if flag else np.unpackbits(part, count=spec.size).view("?").reshape(spec.shape)
        for spec, flag, part in zip(specs, whole, bits, strict=True)
    ]


def pack_mask_change(leaves: Sequence[np.ndarray], previous: Sequence[np.ndarray]) -> bytes:
    """Codes a mask as the places where it differs from `previous` (same shapes); at most 2**32 - 1 elements in all."""
    starts = np.cumsum([0] + [leaf.size for leaf in leaves])
    pairs = zip(leaves, previous, starts[:-1], strict=True)
    flips = np.concatenate([np.flatnonzero(new != old) + start for new, old, start in pairs] or [np.zeros(0, np.int64)])
    gaps = np.diff(flips, prepend=-1) - 1
    return b"".join([struct.pack("<Q", gaps.size), *pack_planes(gaps.astype(np.uint32))])


def unpack_mask_change(reader: Reader, previous: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Undoes `pack_mask_change`.

    Raises:
        WireError: if there are more flips than elements, a flip lies behind the last element, or a frame is broken.
    """
    total = sum(leaf.size for leaf in previous)
    (count,) = struct.unpack("<Q", reader.take(8))
    if count > min(total, MAX_CHANGE_ELEMENTS):
        raise WireError(f"mask: {count} changes in a mask of {total} elements")
    gaps = unpack_planes(reader, count, np.dtype(np.uint32))
    # In place, for a few bytes may announce a flip of every element.
    flips = gaps.astype(np.uint64)
    flips += np.uint64(1)
    np.cumsum(flips, out=flips)
    flips -= np.uint64(1)
    if count and flips[-1] >= total:
        raise WireError(f"mask: a change at element {flips[-1]} of {total}")
    flat = np.concatenate([leaf.reshape(-1) for leaf in previous] or [np.zeros(0, np.bool_)])
    flat[flips] ^= True
    parts = _cut(flat, [leaf.size for leaf in previous])
    return [part.reshape(leaf.shape) for part, leaf in zip(parts, previous, strict=True)]


def pack_values(
    specs: Sequence[LeafSpec], leaves: Sequence[Any], masks: Sequence[np.ndarray] | None, value_dtype: str | None
) -> list[bytes]:
    """Codes the kept values of all leaves, grouped by wire dtype, as pieces to send one after another.

    Raises:
        InputError: if a value is too large for `value_dtype`.
    """
    packed: list[bytes] = []
    for dtype, numbers in _groups(specs, value_dtype):
        kept = []
        for number in numbers:
            values = np.asarray(leaves[number]).astype(specs[number].dtype, copy=False).reshape(-1)
            if masks is not None and not masks[number].all():
                values = values.take(np.flatnonzero(masks[number]))  # 4 times faster than values[mask]
            kept.append(_cast(values, dtype, specs[number].path).view(_bits(dtype)))
        packed += pack_planes(kept[0] if len(kept) == 1 else np.concatenate(kept))
    return packed


def unpack_values(
    reader: Reader, specs: Sequence[LeafSpec], masks: Sequence[np.ndarray] | None, value_dtype: str | None
) -> list[np.ndarray]:
    """Undoes `pack_values`; what did not travel is zero.

    Raises:
        WireError: if the section does not hold exactly the values that specs and masks imply.
    """
    arrays: dict[int, np.ndarray] = {}
    for dtype, numbers in _groups(specs, value_dtype):
        sizes = [specs[i].size if masks is None else int(np.count_nonzero(masks[i])) for i in numbers]
        values = unpack_planes(reader, sum(sizes), _bits(dtype))
        if dtype == np.bool_ and values.size and values.max() > 1:
            raise WireError("values: a boolean is neither 0 nor 1")
        for number, part in zip(numbers, _cut(values.view(dtype), sizes), strict=True):
            spec = specs[number]
            if masks is None or part.size == spec.size:
                array = part.astype(spec.dtype)
            else:
                array = np.zeros(spec.size, spec.dtype)
                array[np.flatnonzero(masks[number])] = part
            arrays[number] = array.reshape(spec.shape)
    return [arrays[number] for number in range(len(specs))]


def _groups(specs: Sequence[LeafSpec], value_dtype: str | None) -> list[tuple[np.dtype, list[int]]]:
    """Gathers the leaf numbers of each wire dtype, dtypes in order of name."""
    groups: dict[str, list[int]] = {}
    for number, spec in enumerate(specs):
        groups.setdefault(spec.wire_dtype(value_dtype).name, []).append(number)
    return [(DTYPES[name], groups[name]) for name in sorted(groups)]


def _cast(values: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if np.count_nonzero(np.isfinite(values)) != np.count_nonzero(np.isfinite(cast)):
        raise InputError(f"tree{path}: has values too large for {dtype.name}; give value_dtype=None")
    return cast


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _cut(flat: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    return [flat[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
