"""The target `decode`: payloads for a receiver with a template and masks of its own.

An input is a byte that chooses the receiver, and the payload. Most changes are put behind the checks at the door: the
lengths of the sections and the checksum are made right again, so that they meet the code that takes sections apart.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import zstandard

from fedklpr_jax import wire_sections as sections
from fedklpr_jax.wire import WireError, decode, encode, peek
from fuzz._mutation import Basic, Finding, Target, one_line

_HEADER = struct.Struct("<4sBBBxIIIQQ16s16s")
_MODES = ("none", "full", "change", "held")
_LARGEST_FRAME = 1 << 20
# Of what `decode` promises: 16 MiB beyond the template, whose largest here take less than 8 MiB with all copies.
_MEMORY = 25 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Receiver:
    """Who decodes: the tree it expects, and the masks it holds."""

    tree: Any
    mask: Any
    previous: Any
    specs: tuple[sections.LeafSpec, ...]


def _receiver(tree: Any) -> Receiver:
    rng = np.random.default_rng(7)
    paths, leaves, _ = sections.flatten(tree)
    specs = (sections.LeafSpec(path, leaf.shape, leaf.dtype) for path, leaf in zip(paths, leaves, strict=True))
    mask, previous = (jax.tree.map(lambda leaf: rng.random(leaf.shape) < 0.6, tree) for _ in range(2))
    return Receiver(tree, mask, previous, tuple(specs))


def _receivers() -> tuple[Receiver, ...]:
    every = {name: np.zeros((2, 3), dtype) for name, dtype in sections.DTYPES.items()}
    model = {
        "batch_stats": {"norm": {"mean": np.zeros(7, np.float32), "count": np.zeros((), np.int32)}},
        "params": {"dense": {"kernel": np.zeros((9, 7), np.float32), "bias": np.zeros(7, np.float32)}},
        "scalars": (np.zeros((), np.float32), np.zeros((), np.float64), np.zeros(3, np.bool_)),
    }
    wide = {f"{number:02d}": np.zeros(number % 4, np.float32) for number in range(19)}
    # More flips than a byte of gap, and more than one block of planes.
    long = {"flags": np.zeros(3000, np.bool_), "kernel": np.zeros((2, 1500), np.float32)}
    blocks = {"codes": np.zeros(sections.BLOCK + 3, np.uint8)}
    return tuple(map(_receiver, (model, {}, {"empty": np.zeros((0, 4), np.float32)}, every, wide, long, blocks)))


RECEIVERS = _receivers()


def chosen(number: int) -> tuple[Receiver, bool]:
    """The receiver that an input's first byte stands for, and whether it holds its masks."""
    return RECEIVERS[number // 2 % len(RECEIVERS)], number % 2 == 0


def run(data: bytes) -> bool:
    """Decodes one input. What is accepted must fit the template and come back the same when it is coded again."""
    receiver, holds = chosen(data[0] if data else 0)
    payload = data[1:]
    try:
        peek(payload)
        tree, mask = decode(
            payload, receiver.tree,
            mask=receiver.mask if holds else None, previous_mask=receiver.previous if holds else None,
        )  # fmt: skip
    except WireError as error:
        one_line(error)
        return False
    again, again_mask = decode(encode(tree, mask), receiver.tree)
    if _bits(again) != _bits(tree) or _bits(again_mask) != _bits(mask):
        raise Finding("what was decoded is not what comes back when it is coded again")
    if _shapes(tree) != _shapes(receiver.tree):
        raise Finding("what was decoded does not fit the template")
    return True


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _shapes(tree: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def honest(receiver: Receiver, rng: random.Random, mode: str) -> bytes:
    """A payload as a sender would make it for this receiver, of random bits, with the mask sent in this way."""
    draw = np.random.default_rng(rng.getrandbits(64))
    tree = jax.tree.map(lambda leaf: _random_bits(leaf, draw), receiver.tree)
    mask = jax.tree.map(lambda leaf: draw.random(leaf.shape) < rng.choice((0.0, 0.3, 0.9, 1.0)), receiver.tree)
    if mode == "change":
        mask = jax.tree.map(lambda old: old ^ (draw.random(old.shape) < rng.choice((0.0, 0.001))), receiver.previous)
    return encode(
        tree, None if mode == "none" else receiver.mask if mode == "held" else mask,
        previous_mask=receiver.previous if mode == "change" else None, receiver_has_mask=mode == "held",
    )  # fmt: skip


def _random_bits(leaf: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    top = 2 if leaf.dtype == np.bool_ else 256
    return draw.integers(0, top, leaf.nbytes, np.uint8).view(leaf.dtype).reshape(leaf.shape)


@dataclasses.dataclass
class Parts:
    """A payload taken apart: the header's fields but the sections' lengths, and the sections."""

    magic: bytes
    version: int
    mode: int
    value_dtype: int
    leaves: int
    raw: int
    digest: bytes
    previous: bytes
    sections: list[bytes]

    def sealed(self, lengths: list[int] | None = None) -> bytes:
        """The payload, with right lengths (but for those given) and a right checksum."""
        header = _HEADER.pack(
            self.magic, self.version, self.mode, self.value_dtype, self.leaves, self.raw,
            *(lengths or map(len, self.sections)), self.digest, self.previous,
        )  # fmt: skip
        body = header + b"".join(self.sections)
        return body + struct.pack("<I", zlib.crc32(body))


def taken_apart(payload: bytes) -> Parts | None:
    """The parts, or None where the lengths are not right."""
    if len(payload) < _HEADER.size + 4:
        return None
    magic, version, mode, value_dtype, leaves, raw, *lengths, digest, previous = _HEADER.unpack_from(payload)
    if _HEADER.size + sum(lengths) + 4 != len(payload):
        return None
    first, second = _HEADER.size + lengths[0], _HEADER.size + lengths[0] + lengths[1]
    cut = [payload[_HEADER.size : first], payload[first:second], payload[second:-4]]
    return Parts(magic, version, mode, value_dtype, leaves, raw, digest, previous, cut)


@functools.cache
def _pool(receiver: Receiver) -> list[Parts]:
    """Some honest payloads: making one takes longer than decoding it."""
    rng = random.Random(0)
    made = (taken_apart(honest(receiver, rng, mode)) for mode in _MODES * 6)
    return [parts for parts in made if parts]


def _drawn(receiver: Receiver, rng: random.Random) -> Parts:
    parts = copy.copy(rng.choice(_pool(receiver)))
    parts.sections = list(parts.sections)
    return parts


def mutate(data: bytes, rng: random.Random, basic: Basic) -> bytes:
    """Another input: the receiver or the payload changed, most of the time behind the checks at the door."""
    number = data[0] if data and rng.random() < 0.95 else rng.randrange(256)
    receiver, _ = chosen(number)
    if rng.random() < 0.05:
        return bytes([number]) + basic(data[1:], rng)
    parts = (taken_apart(data[1:]) if rng.random() < 0.9 else None) or _drawn(receiver, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_CHANGES)(parts, receiver, rng, basic)
    lengths = None
    if rng.random() < 0.03:
        lengths = [len(section) for section in parts.sections]
        lengths[rng.randrange(3)] = rng.choice((0, 1, (1 << 32) - 1, rng.getrandbits(16)))
    return bytes([number]) + parts.sealed(lengths)


def _header(parts: Parts, receiver: Receiver, rng: random.Random, basic: Basic) -> None:
    name, top, most = rng.choice((("mode", 4, 255), ("value_dtype", 3, 255), ("leaves", 40, 1 << 30),
                                  ("raw", 1 << 24, 1 << 30)))  # fmt: skip
    value = rng.choice((getattr(parts, name) + rng.choice((-1, 1)), rng.randint(0, top), top))
    setattr(parts, name, min(max(value, 0), most))


def _section(parts: Parts, receiver: Receiver, rng: random.Random, basic: Basic) -> None:
    number = rng.randrange(3)
    parts.sections[number] = basic(parts.sections[number], rng)


def _schema(parts: Parts, receiver: Receiver, rng: random.Random, basic: Basic) -> None:
    """Another text of leaves, whole and of the announced length."""
    text = "\n".join(map(str, receiver.specs)).encode()
    line = rng.choice((b"\n", b"float32 3 ['w']\n", text + b"\n"))
    size = rng.choice((0, len(text), len(text) + 1, 3000, 1 << (24 if rng.random() < 0.01 else 12)))
    parts.raw, parts.sections[0] = rng.choice((lambda: _coded(basic(text, rng)), lambda: _repeated(line, size)))()


def _coded(text: bytes) -> tuple[int, bytes]:
    return len(text), b"".join(sections.pack_planes(np.frombuffer(text, np.uint8)))


@functools.cache
def _repeated(line: bytes, size: int) -> tuple[int, bytes]:
    return _coded((line * (size // len(line) + 1))[:size])


def _exchanged(parts: Parts, receiver: Receiver, rng: random.Random, basic: Basic) -> None:
    other = _drawn(rng.choice((receiver, rng.choice(RECEIVERS))), rng)
    number = rng.randrange(3)
    parts.sections[number] = other.sections[number]
    if number == 1 and rng.random() < 0.5:
        parts.mode, parts.digest, parts.previous = other.mode, other.digest, other.previous


def _frames(parts: Parts, receiver: Receiver, rng: random.Random, basic: Basic) -> None:
    """Changes one frame of planes, or the list of them."""
    number = rng.choice((0, 1, 2, 2))
    start = {1: -(-len(receiver.specs) // 8), 2: 8}.get(parts.mode, 0) if number == 1 else 0
    section = parts.sections[number]
    frames, at = [], start
    while at + 4 <= len(section):
        length = int.from_bytes(section[at : at + 4], "little")
        frames.append(section[at + 4 : at + 4 + length])
        at += 4 + length
    if not frames:
        parts.sections[number] = section[:start] + _framed(_made_up(rng))
        return
    place = rng.randrange(len(frames))
    kind = rng.random()
    if kind < 0.5:
        frames[place] = _recompressed(frames[place], rng, basic)
    elif kind < 0.7:
        frames[place] = basic(frames[place], rng)
    elif kind < 0.8:
        frames[place] = _made_up(rng)
    else:
        frames[place : place + 1] = rng.choice(([], [frames[place]] * 2, [frames[place], _made_up(rng)]))
    prefix = basic(section[:start], rng)[:start].ljust(start, b"\0") if rng.random() < 0.2 else section[:start]
    parts.sections[number] = prefix + b"".join(map(_framed, frames))


def _framed(frame: bytes) -> bytes:
    return struct.pack("<I", len(frame)) + frame


def _recompressed(frame: bytes, rng: random.Random, basic: Basic) -> bytes:
    try:
        content = zstandard.ZstdDecompressor(max_window_size=1 << 18).decompressobj().decompress(frame)
    except zstandard.ZstdError:
        return basic(frame, rng)
    content = content[:_LARGEST_FRAME]
    changed = basic(content, rng)
    if rng.random() < 0.8:
        changed = changed[: len(content)].ljust(len(content), b"\0")
    compressor = zstandard.ZstdCompressor(
        rng.choice((1, 3)), write_content_size=rng.random() < 0.95, write_checksum=rng.random() < 0.2
    )
    return compressor.compress(changed)


def _made_up(rng: random.Random) -> bytes:
    """A frame of so many bytes, or one that lies: a skippable one, a large window, more content than it claims."""
    size = rng.choice((0, 1, 4, 45, 3000, 1 << 18, (1 << 18) + 1, 1 << (24 if rng.random() < 0.01 else 12)))
    magic, claim = b"\x28\xb5\x2f\xfd", struct.pack("<I", size)
    repeated = struct.pack("<I", min(size * 4, 1 << 17) << 3 | 0b011)[:3] + b"\n"
    return rng.choice((
        lambda: _compressed(rng.choice((b"\0", b"\n")), size),
        lambda: b"\x50\x2a\x4d\x18" + claim,
        lambda: magic + b"\x80\x80" + claim + struct.pack("<I", min(size, 1 << 17) << 3 | 1)[:3] + bytes(20),
        lambda: magic + b"\xa0" + claim + repeated,
    ))()  # fmt: skip


@functools.cache
def _compressed(byte: bytes, size: int) -> bytes:
    return zstandard.ZstdCompressor().compress(byte * size)


def _mask(parts: Parts, receiver: Receiver, rng: random.Random, basic: Basic) -> None:
    """Announces the hash of the mask that the section holds, so that it passes, and half of the time sends as many
    values as it keeps."""
    reader = sections.Reader(memoryview(parts.sections[1]), "mask")
    try:
        if _MODES[parts.mode % 4] == "change":
            masks = sections.unpack_mask_change(reader, jax.tree.leaves(receiver.previous))
            parts.previous = _digest(receiver, jax.tree.leaves(receiver.previous))
        else:
            masks = sections.unpack_full_mask(reader, receiver.specs)
    except WireError:
        return
    parts.digest = _digest(receiver, masks)
    if rng.random() < 0.5:
        draw = np.random.default_rng(rng.getrandbits(64))
        leaves = [_random_bits(leaf, draw) for leaf in jax.tree.leaves(receiver.tree)]
        dtype = rng.choice((None, None, "bfloat16", "float16"))
        parts.value_dtype = (None, "bfloat16", "float16").index(dtype)
        leaves = [np.nan_to_num(leaf).clip(-9, 9) if leaf.dtype.kind == "f" else leaf for leaf in leaves]
        parts.sections[2] = b"".join(sections.pack_values(receiver.specs, leaves, masks, dtype))


def _digest(receiver: Receiver, masks: list[np.ndarray]) -> bytes:
    return sections.digest_mask([spec.path for spec in receiver.specs], masks)


_Change = Callable[[Parts, Receiver, random.Random, Basic], None]
_CHANGES: tuple[_Change, ...] = (_header, _schema, _section, _exchanged, _frames, _frames, _frames, _mask)

DECODE = Target(run, mutate, _MEMORY)
