"""The target `folder`: a directory of pictures, good and bad names, broken pictures and archives.

An input is a list of files; every file is the number of its place, the length of its name in one byte, the name, the
length of its content in two bytes, and the content. What is too short is read as far as it goes, so that any bytes are
a directory.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fedklpr_jax.data import folder, labelled
from fedklpr_jax.errors import InputError
from fuzz._mutation import Basic, Finding, Target, one_line

File = tuple[int, bytes, bytes]

_PLACES = (*(f"gate/{split}" for split in folder.SPLITS), "gate", "yard", "yard/query", "")
_FILE, _FOLDER, _LINK = range(3)
_HEIGHT, _WIDTH = 8, 4
_MOST = 12
# A picture may have 2**24 pixels of 4 bytes, and is converted and resized; so may those read beside it.
_MEMORY = 512 << 20
_NAMES = (
    b"0001_c1s1_000001_00.png", b"0001_c2s1_000001_00.png", b"0002_c1_x.jpg", b"-1_c1s1_0_0.png", b"0000_c3_0.png",
    b"999999999_c9999_0.JPEG", b"Thumbs.db", b".hidden", b"0001_c1s1_\n.png", b"\xff\xfe.png", b"images.zip",
    b"1_c1_\xc3\xa9.png", "\u0661_c\u0661_a.png".encode(), b"data.npz", b"more.npz", b"query", b"a.bmp",
)  # fmt: skip


def packed(files: list[File]) -> bytes:
    """The input for these files."""
    cut = ((number, name[:255], content[:65535]) for number, name, content in files)
    return b"".join(
        bytes([number, len(name)]) + name + struct.pack("<H", len(content)) + content for number, name, content in cut
    )


def unpacked(data: bytes) -> list[File]:
    """The files of an input."""
    files: list[File] = []
    at = 0
    while at + 2 <= len(data) and len(files) < _MOST:
        number, end = data[at], at + 2 + data[at + 1]
        size = int.from_bytes(data[end : end + 2], "little")
        files.append((number, data[at + 2 : end], data[end + 2 : end + 2 + size]))
        at = end + 2 + size
    return files


def _write(root: Path, files: list[File]) -> None:
    for number, name, content in files:
        name = name.translate(bytes.maketrans(b"/\0", b"__"))
        if name in (b"", b".", b".."):
            continue
        path = root / _PLACES[number % len(_PLACES)] / os.fsdecode(name)
        # One that is there already, or whose name the system does not take, is none.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = number // len(_PLACES) % 8
            if kind == _FOLDER:
                path.mkdir()
            elif kind == _LINK:
                path.symlink_to("nowhere")
            else:
                path.write_bytes(content)


def run(data: bytes) -> bool:
    """Reads the directory as re-ID sites, twice with a cache and once without, and as pictures of classes."""
    with tempfile.TemporaryDirectory() as name:
        root, kept = Path(name) / "root", Path(name) / "kept"
        root.mkdir()
        _write(root, unpacked(data))
        found = [_allowed(functools.partial(_sites, root, cache)) for cache in (None, kept, kept)]
        if found[0] != found[1] or found[1] != found[2]:
            raise Finding("the same sites are read otherwise with a cache")
        pictures = sorted(path for path in root.rglob("*") if path.is_file())
        _allowed(lambda: folder.read_pictures(pictures, height=_HEIGHT, width=_WIDTH))
        found += [_allowed(functools.partial(_classes, place)) for place in (root, root / "gate")]
        return any(one is not None for one in found)


def _sites(root: Path, kept: Path | None) -> object:
    sites, _ = folder.read_sites(root, height=_HEIGHT, width=_WIDTH, cache=kept)
    for part in (part for site in sites for part in (site.train, site.query, site.gallery)):
        sizes = {len(part.ids), len(part.cams), len(part.names), len(part.pixels)}
        if part.pixels.shape[1:] != (_HEIGHT, _WIDTH, 3) or part.pixels.dtype != np.uint8 or len(sizes) > 1:
            raise Finding(f"pictures of shape {part.pixels.shape} with {sizes} names and numbers")
    return [(site.name, part.names, part.ids.tolist(), part.pixels.tobytes(), site.refused)
            for site in sites for part in (site.train, site.query, site.gallery)]  # fmt: skip


def _classes(root: Path) -> tuple[str, ...]:
    found = labelled.read_folder(root)
    if len(found.pixels) != len(found.labels) or found.labels.max() >= len(found.classes):
        raise Finding(f"{len(found.pixels)} pictures, {len(found.labels)} labels of {len(found.classes)} classes")
    return found.classes


def _allowed(job: Callable[[], object]) -> object:
    try:
        return job()
    except InputError as error:
        one_line(error)
        return None


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """Small pictures of every kind, PNG and JPEG."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8))
    kinds = [colours.convert(mode) for mode in ("RGB", "L", "LA", "P", "RGBA", "1", "CMYK", "I;16")]
    made = []
    for picture in kinds:
        for form in ("PNG", "JPEG", "BMP"):
            with contextlib.suppress(OSError):
                file = io.BytesIO()
                picture.save(file, form)
                made.append(file.getvalue())
    return tuple(made)


def _archive(files: list[File]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name, content in files:
            inside = f"{folder.SPLITS[number % 3]}/{name.decode('utf-8', 'replace')}"
            with contextlib.suppress(ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that stand there twice
                archive.writestr(zipfile.ZipInfo(inside.replace("\0", "_")), content)
    return made.getvalue()


def _table(rng: random.Random) -> bytes:
    made = io.BytesIO()
    count = rng.choice((0, 1, 3))
    np.savez(made, images=np.zeros((count, 4, 4), rng.choice(("u1", "u1", "f4"))), labels=np.arange(count) % 2)
    return made.getvalue()


def _sealed(content: bytes) -> bytes:
    """A PNG whose chunks have right checksums; anything else as it is."""
    if content[:4] != b"\x89PNG":
        return content
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + size]
        parts.append(content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + size
    return b"".join(parts) + content[at:]


def mutate(data: bytes, rng: random.Random, basic: Basic) -> bytes:
    """Another directory: one file of it changed, put in or left out."""
    files = unpacked(data)
    if not files or rng.random() < 0.2:
        number = rng.choice((*range(7), rng.randrange(256)))
        files.insert(rng.randint(0, len(files)), (number, rng.choice(_NAMES), rng.choice(pictures())))
    place = rng.randrange(len(files))
    number, name, content = files[place]
    kind = rng.random()
    if kind < 0.15:
        files[place] = number, rng.choice(_NAMES), content
    elif kind < 0.3:
        files[place] = number, basic(name, rng), content
    elif kind < 0.55:
        files[place] = number, name, _sealed(basic(content, rng))
    elif kind < 0.65:
        files[place] = number, name, basic(content, rng)
    elif kind < 0.75:
        files[place] = rng.choice(((3, b"images.zip", _archive(files)), (3, b"data.npz", _table(rng))))
    elif kind < 0.85:
        files[place] = rng.randrange(256), name, content
    else:
        files[place : place + 1] = rng.choice(([], [files[place]] * 2))
    return packed(files)


FOLDER = Target(run, mutate, _MEMORY)
