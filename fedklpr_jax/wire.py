"""Parameter trees as bytes: what a client and a server send each other, and whose length is the reported cost.

A payload is, in little-endian order,

    magic "FKPW" | version u8 | mask mode u8 | value dtype u8 | 0 u8 | leaves u32 | schema length u32
    | bytes of the schema section u32 | of the mask section u64 | of the value section u64
    | hash of the mask, 16 bytes | hash of the previous mask, 16 bytes
    | schema section | mask section | value section | CRC-32 of all bytes before it, u32

* The schema is text, one line `dtype shape path` a leaf. It is compared with the template's, never parsed.
* The mask section is empty, a bitmap, or a list of changes; `fedklpr_jax.wire_sections` describes both.
* The value section holds the kept values of all leaves of one wire dtype after another, dtypes in order of name.

Everything is lossless, bit by bit, unless `value_dtype` is given. No object is ever unpickled. The checksum finds
damage, not forgery: authentication belongs to the transport (TLS). It is a CRC because a cryptographic hash took a
third of the time of encoding.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from fedklpr_jax import wire_sections as sections
from fedklpr_jax.errors import InputError
from fedklpr_jax.wire_sections import LeafSpec, Reader, WireError, mask_hash

__all__ = ["WireError", "decode", "encode", "mask_hash", "peek"]

Payload = bytes | bytearray | memoryview
VERSION = 2
_MAGIC = b"FKPW"
_HEADER = struct.Struct("<4sBBBxIIIQQ16s16s")
_CHECKSUM = struct.Struct("<I")
_NO_HASH = bytes(sections.HASH_BYTES)
_SCHEMA_LIMIT = 1 << 24
_MODES = ("none", "full", "change", "held")
_VALUE_DTYPES = (None, "bfloat16", "float16")


@dataclass(frozen=True)
class _Parts:
    """A payload whose header and checksum are in order, cut into its sections."""

    mode: str
    value_dtype: str | None
    leaves: int
    schema_length: int
    mask_hash: bytes
    previous_hash: bytes
    schema: memoryview
    mask: memoryview
    values: memoryview


def encode(
    tree: Any,
    mask: Any = None,
    *,
    previous_mask: Any = None,
    receiver_has_mask: bool = False,
    value_dtype: Any = None,
) -> bytes:
    """Codes a tree of arrays; only values whose mask is True travel.

    Args:
        tree: pytree of NumPy or JAX arrays or scalars of any shape: bool, (u)int8-64, float16/32/64 or bfloat16.
            A Python number counts as NumPy takes it: float64 or int64.
        mask: pytree of booleans of the same structure and shapes (True = kept), or None to send everything.
        previous_mask: mask that the receiver holds. If the changes against it are shorter than the bitmap, they are
            sent instead, and the receiver must hand the same `previous_mask` to `decode`.
        receiver_has_mask: send no mask at all, only its hash; the receiver must hand the same `mask` to `decode`.
        value_dtype: "bfloat16" or "float16" (or such a dtype) sends float32 and float64 leaves of 2 or more
            dimensions (kernels) rounded to it. Vectors and scalars (norms, statistics, counters) always travel
            exactly. A leading client axis turns vectors into matrices: code one client at a time.

    Returns:
        The payload; equal inputs give equal bytes. Its length is the communication cost.

    Raises:
        InputError: (a ValueError) for a dtype that cannot travel, a mask that does not fit the tree, options that
            contradict each other, or a value too large for `value_dtype`.

    Example:
        >>> weights = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
        >>> kept = {"kernel": np.array([[True, False, True], [False, False, True]])}
        >>> tree, mask = decode(encode(weights, kept), template=weights)
        >>> tree["kernel"].tolist()
        [[0.0, 0.0, 2.0], [0.0, 0.0, 5.0]]
    """
    if mask is None and (previous_mask is not None or receiver_has_mask):
        raise InputError("encode: previous_mask and receiver_has_mask need a mask; give mask as well")
    if previous_mask is not None and receiver_has_mask:
        raise InputError("encode: previous_mask and receiver_has_mask exclude each other; give one")
    value_name = _value_name(value_dtype)
    specs, leaves, _ = _specs(tree, "tree")
    schema = _schema(specs)
    if len(schema) > _SCHEMA_LIMIT:
        raise InputError(f"tree: paths and shapes take {len(schema)} bytes; at most {_SCHEMA_LIMIT} can travel")

    masks: list[np.ndarray] | None = None
    mode, mask_section, digest, previous_digest = "none", b"", _NO_HASH, _NO_HASH
    if mask is not None:
        paths, masks = sections.mask_leaves(mask, "mask")
        _check_fit(paths, masks, specs, "mask", InputError)
        digest = sections.digest_mask(paths, masks)
        mode, mask_section = ("held", b"") if receiver_has_mask else ("full", sections.pack_full_mask(masks))
    if masks is not None and previous_mask is not None:
        paths, previous = sections.mask_leaves(previous_mask, "previous_mask")
        _check_fit(paths, previous, specs, "previous_mask", InputError)
        if sum(leaf.size for leaf in previous) <= sections.MAX_CHANGE_ELEMENTS:
            change = sections.pack_mask_change(masks, previous)
            if len(change) < len(mask_section):
                mode, mask_section, previous_digest = "change", change, sections.digest_mask(paths, previous)

    schema_section = b"".join(sections.pack_planes(np.frombuffer(schema, np.uint8)))
    values = sections.pack_values(specs, leaves, masks, value_name)
    header = _HEADER.pack(
        _MAGIC, VERSION, _MODES.index(mode), _VALUE_DTYPES.index(value_name), len(specs), len(schema),
        len(schema_section), len(mask_section), sum(map(len, values)), digest, previous_digest,
    )  # fmt: skip
    body = [header, schema_section, mask_section, *values]
    return b"".join([*body, _checksum(body)])


def decode(payload: Payload, template: Any, *, mask: Any = None, previous_mask: Any = None) -> tuple[Any, Any]:
    """Rebuilds the tree and the mask that `encode` was given.

    Args:
        payload: bytes from anywhere; nothing in it is trusted.
        template: pytree with the paths, shapes and dtypes to expect, as arrays or `jax.ShapeDtypeStruct`.
        mask: the mask held here, for a payload coded with `receiver_has_mask`; ignored for any other.
        previous_mask: the mask held here, for a payload that carries changes against it; ignored for any other.

    Returns:
        `(tree, mask)` in the structure of the template, as NumPy arrays. Values that did not travel are zero. The
        mask is None if the payload was coded without one.

    Raises:
        WireError: if the payload is damaged, or does not fit the template or the mask held here. Whatever it holds,
            no more memory is asked for than 16 MiB and 25 bytes for each element of the template.
        InputError: (a ValueError) if the template or a mask handed in is itself unusable.

    Example:
        >>> decode(b"FKPW", template={"w": np.ones(2, np.float32)})
        Traceback (most recent call last):
        ...
        fedklpr_jax.wire_sections.WireError: payload: 4 bytes, at least 72 expected
    """
    parts = _split(payload)
    specs, _, treedef = _specs(template, "template")
    _check_schema(parts, specs)
    masks = _unpack_mask(parts, specs, mask, previous_mask)
    reader = Reader(parts.values, "values")
    arrays = sections.unpack_values(reader, specs, masks, parts.value_dtype)
    reader.finish()
    return treedef.unflatten(arrays), None if masks is None else treedef.unflatten(masks)


def peek(payload: Payload) -> dict[str, Any]:
    """Reads the header of a payload after checking it and the checksum; needs no template.

    Returns:
        `version`, `mask_mode` ("none", "full", "change" or "held"), `mask_hash` and `previous_mask_hash` (32
        hexadecimal digits or None), `value_dtype` (None = exact), `leaves`, and the sizes in bytes `schema_bytes`,
        `mask_bytes`, `value_bytes` and `total_bytes`.

    Raises:
        WireError: if the payload is damaged.

    Example:
        >>> peek(encode({"w": np.ones(2, np.float32)}))["mask_mode"]
        'none'
    """
    parts = _split(payload)
    return {
        "version": VERSION,
        "mask_mode": parts.mode,
        "mask_hash": None if parts.mode == "none" else parts.mask_hash.hex(),
        "previous_mask_hash": parts.previous_hash.hex() if parts.mode == "change" else None,
        "value_dtype": parts.value_dtype,
        "leaves": parts.leaves,
        "schema_bytes": len(parts.schema),
        "mask_bytes": len(parts.mask),
        "value_bytes": len(parts.values),
        "total_bytes": memoryview(payload).nbytes,
    }


def _value_name(value_dtype: Any) -> str | None:
    try:
        name = None if value_dtype is None else np.dtype(value_dtype).name
    except TypeError:
        name = str(value_dtype)
    if name not in _VALUE_DTYPES:
        raise InputError(f"encode: value_dtype {name} cannot be used; give None (exact), 'bfloat16' or 'float16'")
    return name


def _specs(tree: Any, name: str) -> tuple[list[LeafSpec], list[Any], Any]:
    paths, leaves, treedef = sections.flatten(tree)
    leaves = [leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in leaves]
    specs = []
    for path, leaf in zip(paths, leaves, strict=True):
        dtype = sections.DTYPES.get(getattr(leaf.dtype, "name", str(leaf.dtype)))
        if dtype is None:
            known = ", ".join(sections.DTYPES)
            raise InputError(f"{name}{path}: dtype {leaf.dtype} cannot travel; give one of {known}")
        specs.append(LeafSpec(path, tuple(leaf.shape), dtype))
    return specs, leaves, treedef


def _schema(specs: Sequence[LeafSpec]) -> bytes:
    return "\n".join(map(str, specs)).encode()


def _check_fit(
    paths: Sequence[str], masks: Sequence[np.ndarray], specs: Sequence[LeafSpec], name: str, error: type[ValueError]
) -> None:
    for path, wanted in zip_longest(paths, [spec.path for spec in specs]):
        if path != wanted:
            raise error(f"{name}: has leaf {path} where the tree has {wanted}; give one leaf for each leaf of the tree")
    for leaf, spec in zip(masks, specs, strict=True):
        if leaf.shape != spec.shape:
            raise error(f"{name}{spec.path}: has shape {leaf.shape}; give {spec.shape}, the shape of the leaf")


def _checksum(parts: Sequence[bytes | memoryview]) -> bytes:
    state = 0
    for part in parts:
        state = zlib.crc32(part, state)
    return _CHECKSUM.pack(state)


def _split(payload: Payload) -> _Parts:
    try:
        view = memoryview(payload).cast("B")
    except TypeError as error:
        raise WireError(f"payload: bytes expected, got {type(payload).__name__}") from error
    tail = _CHECKSUM.size
    if len(view) < _HEADER.size + tail:
        raise WireError(f"payload: {len(view)} bytes, at least {_HEADER.size + tail} expected")
    (magic, version, mode, value_dtype, leaves, schema_length, schema, mask, values, digest, previous) = (
        _HEADER.unpack_from(view)
    )
    if magic != _MAGIC:
        raise WireError("payload: does not begin with FKPW, so it is no FedKLPR payload")
    if version != VERSION:
        raise WireError(f"payload: version {version}; this program reads version {VERSION}")
    announced = _HEADER.size + schema + mask + values + tail
    if announced != len(view):
        raise WireError(f"payload: {len(view)} bytes, {announced} announced")
    if _checksum([view[:-tail]]) != view[-tail:]:
        raise WireError("payload: the checksum is wrong; it was damaged on the way")
    if mode >= len(_MODES) or value_dtype >= len(_VALUE_DTYPES):
        raise WireError(f"payload: mask mode {mode} or value dtype {value_dtype} is unknown")
    if schema_length > _SCHEMA_LIMIT:
        raise WireError(f"payload: a schema of {schema_length} bytes, at most {_SCHEMA_LIMIT} allowed")
    reader = Reader(view[_HEADER.size : -tail], "payload")
    return _Parts(
        _MODES[mode], _VALUE_DTYPES[value_dtype], leaves, schema_length, digest, previous,
        reader.take(schema), reader.take(mask), reader.take(values),
    )  # fmt: skip


def _check_schema(parts: _Parts, specs: Sequence[LeafSpec]) -> None:
    reader = Reader(parts.schema, "schema")
    sent = sections.unpack_planes(reader, parts.schema_length, np.dtype(np.uint8))
    reader.finish()
    if parts.leaves != len(specs):
        raise WireError(f"payload: {parts.leaves} leaves, the template has {len(specs)}")
    ours = _schema(specs)
    if sent.size != len(ours) or sent.tobytes() != ours:
        # No more of it than differs from the template at the latest: a schema of line breaks makes millions of lines.
        lines = sent[: len(ours) + 200].tobytes().decode("utf-8", "replace").split("\n")
        pairs = zip(lines, map(str, specs), strict=False)
        theirs, expected = next((pair for pair in pairs if pair[0] != pair[1]), ("more than it should", "less"))
        raise WireError(f"payload: has a leaf {theirs[:200]!r} where the template has {expected!r}")


def _unpack_mask(parts: _Parts, specs: Sequence[LeafSpec], mask: Any, previous_mask: Any) -> list[np.ndarray] | None:
    reader = Reader(parts.mask, "mask")
    if parts.mode == "none":
        masks = None
    elif parts.mode == "full":
        masks = sections.unpack_full_mask(reader, specs)
    elif parts.mode == "change":
        masks = sections.unpack_mask_change(reader, _held(previous_mask, parts.previous_hash, specs, "previous_mask"))
    else:
        masks = _held(mask, parts.mask_hash, specs, "mask")
    reader.finish()
    if masks is not None and sections.digest_mask([spec.path for spec in specs], masks) != parts.mask_hash:
        raise WireError("mask: its hash is not the announced one")
    return masks


def _held(mask: Any, digest: bytes, specs: Sequence[LeafSpec], name: str) -> list[np.ndarray]:
    if mask is None:
        raise WireError(f"{name}: the payload was coded for a receiver that holds mask {digest.hex()}; give it")
    paths, leaves = sections.mask_leaves(mask, name)
    found = sections.digest_mask(paths, leaves)
    if found != digest:
        raise WireError(f"{name}: has hash {found.hex()}, the payload was coded for {digest.hex()}")
    _check_fit(paths, leaves, specs, name, WireError)
    return leaves
