"""What every target needs: one execution under its limits, and changes to bytes that know nothing of a format."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

Basic = Callable[[bytes, random.Random], bytes]

_SECONDS = 1.0
_PIECES = (b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\0" * 4, b"\xff" * 4, b"\xff" * 8, b"\0\0\0\x80", b"\n", b"=")


class Finding(Exception):
    """An input that was neither read nor refused in the one way allowed."""


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
      run: reads one input; True where it was accepted, False where it was refused as it should be. Whatever else it
        raises is a finding.
      mutate: another input from one, knowing the format; `Basic` is the change to bytes to use inside.
      memory: bytes that reading an input may take at most, beyond those of the input.
    """

    run: Callable[[bytes], bool]
    mutate: Callable[[bytes, random.Random, Basic], bytes]
    memory: int


def judge(target: Target, data: bytes, *, traced: bool = False) -> bool:
    """One execution: what `target.run` returns.

    Args:
      target: what reads.
      data: the input.
      traced: also measure the memory, which takes several times as long.

    Raises:
      Finding: it took more than a second of processor time, or more memory than allowed.
    """
    if traced:
        tracemalloc.start()
    began = time.process_time()
    try:
        accepted = target.run(data)
        seconds = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
    finally:
        if traced:
            tracemalloc.stop()
    if seconds > _SECONDS:
        raise Finding(f"{seconds:.2f} s for {len(data)} bytes")
    if peak > target.memory + len(data):
        raise Finding(f"{peak} bytes of memory for {len(data)} bytes, {target.memory} beyond them allowed")
    return accepted


def one_line(error: Exception) -> None:
    """Raises `Finding` unless the message of a refusal is one line."""
    text = str(error)
    if not text or len(text.splitlines()) > 1:
        raise Finding(f"a refusal of {len(text.splitlines())} lines: {text[:200]!r}")


def change(data: bytes, rng: random.Random) -> bytes:
    """A `Basic`: one bit, byte, number or piece changed, put in, taken out or doubled."""
    if not data:
        return rng.randbytes(rng.randint(0, 8))
    at = rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 32)))
    put = rng.choice((
        bytes([data[at] ^ 1 << rng.randrange(8)]), rng.randbytes(end - at), rng.choice(_PIECES), b"",
        data[at:end] * rng.randint(2, 4),
    ))  # fmt: skip
    # Half of the time the place is kept at its length, for formats in which a shift makes everything else wrong.
    end = min(len(data), at + len(put)) if rng.random() < 0.5 else end
    return data[:at] + put + data[end:]
