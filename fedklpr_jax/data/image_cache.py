"""Decoded pictures of a site kept on disk: an .npy of their pixels, and beside it a note of those left out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import uuid
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from fedklpr_jax.data.listing import Member
from fedklpr_jax.errors import InputError

_VERSION = 1


def digest(folder: Path, members: Sequence[Member], *size: int) -> str:
    """A name for these files, in this order and decoded to this size (height, width), or as they are."""
    text = json.dumps([_VERSION, str(folder.resolve()), members, *size])
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def load(
    cache: Path, stem: str, paths: Collection[str], shape: tuple[int, int, int]
) -> tuple[np.ndarray, dict[str, str]] | None:
    """Pixels and refused paths, or None for anything but a whole cache of just these pictures."""
    try:
        note = json.loads((cache / f"{stem}.json").read_text(encoding="utf-8"))
        # What np.load(mmap_mode="r") does for an .npy, and it takes nothing else.
        pixels = np.lib.format.open_memmap(cache / f"{stem}.npy", mode="r")
        size = (cache / f"{stem}.npy").stat().st_size
    except (OSError, ValueError, OverflowError):
        return None
    if not isinstance(note, dict) or note.get("stem") != stem:
        return None
    broken = note.get("refused")
    if not isinstance(broken, dict) or not set(paths).issuperset(broken):
        return None
    whole = (len(paths) - len(broken), *shape)
    if pixels.shape != whole or pixels.dtype != np.uint8 or size != pixels.offset + pixels.nbytes:
        return None
    return pixels, broken


def write(
    cache: Path, stem: str, results: Iterable[tuple[str, np.ndarray | str]], count: int, shape: tuple[int, int, int]
) -> None:
    """Streams the pixels to disk, so that a set larger than memory fits; each file appears whole or not at all.

    Raises:
      InputError: the cache cannot be written.
    """
    draft = cache / f".{stem}.{uuid.uuid4().hex}"
    broken: dict[str, str] = {}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Plain writes, not a memory map: on a full disk a map kills the process, a write raises.
        with open(draft, "xb") as file:
            start = _write_header(file, (count, *shape))
            for path, result in results:
                if isinstance(result, str):
                    broken[path] = result
                else:
                    file.write(result.tobytes())
            file.seek(0)
            if _write_header(file, (count - len(broken), *shape)) != start:
                raise RuntimeError("NumPy changed the length of its header between two counts")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, cache / f"{stem}.npy")
        draft.write_text(json.dumps({"stem": stem, "refused": broken}), encoding="utf-8")
        os.replace(draft, cache / f"{stem}.json")
    except OSError as error:
        raise InputError(f"{cache}: the cache cannot be written ({error.strerror}); give a folder with room") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _write_header(file: io.BufferedWriter, shape: tuple[int, ...]) -> int:
    # NumPy pads the header for a growing first axis, so that it can be rewritten in place.
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()
