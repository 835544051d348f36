"""The files of one site, plain or inside an `images.zip`: their names, sizes and content. Nothing is opened or unpacked
to disk to list them."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from fedklpr_jax.errors import InputError

ARCHIVE = "images.zip"
MAX_BYTES = 32 << 20
NO_FILE = -1
BROKEN_ZIP = (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, struct.error)

_CLUTTER = ("thumbs.db", "desktop.ini")

# The path, bytes, and a stamp that changes when the content does (mtime, or CRC and mtime of the zip).
Member = tuple[str, int, tuple[int, ...]]
Read = Callable[[str], bytes]


def shown(text: str) -> str:
    """A file name as one harmless line: it may hold line breaks or control codes.

    >>> shown("a\\nb.jpg")
    "'a\\\\nb.jpg'"
    """
    return text if text.isprintable() else ascii(text)


def line(path: str, reason: str) -> str:
    """Why a file is left out, in one line."""
    return f"{shown(path)}: {reason}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return shown(" ".join(str(error).split()) or type(error).__name__)


def why_unusable(size: int) -> str | None:
    """Why a file of that many bytes (`NO_FILE` for what is none) is not read; None for one that is.

    >>> why_unusable(0), why_unusable(9)
    ('0 bytes', None)
    """
    if size == NO_FILE:
        return "no regular file (a broken link?)"
    if size == 0:
        return "0 bytes"
    return f"{size} bytes, more than {MAX_BYTES}" if size > MAX_BYTES else None


def tops(names: Collection[str], base: str) -> set[str]:
    """What lies right under `base` in an archive of these names, folders with a slash behind them.

    >>> sorted(tops(["a/b/c.txt", "a/d.txt", "e.txt"], "a/"))
    ['b/', 'd.txt']
    """
    below = (name[len(base) :].partition("/") for name in names if name.startswith(base))
    return {top + slash for top, slash, _ in below}


@contextlib.contextmanager
def opened(
    folder: Path, base: str, wanted: Collection[str], depth: int, zipped: bool
) -> Iterator[tuple[list[Member], Read]]:
    """The files wanted, sorted by path, and the function that reads one; paths begin behind `base`.

    Args:
      folder: a site.
      base: a folder in it, "" or with a slash behind its name.
      wanted: files right under the base, and folders (with a slash behind their names) whose files are listed.
      depth: how many folders deeper than a wanted folder files are listed.
      zipped: whether to look into the folder's archive.

    Raises:
      InputError: a folder that cannot be listed, or an archive that cannot be opened.
    """
    if not zipped:
        try:
            members = [_member(folder / base, name) for name in wanted if os.path.isfile(folder / base / name)]
            for name in (name.rstrip("/") for name in wanted if name.endswith("/")):
                if os.path.isdir(folder / base / name):
                    members += _below(folder / base, name, depth)
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
        yield sorted(members), lambda path: (folder / base / path).read_bytes()
        return
    try:
        archive = zipfile.ZipFile(folder / ARCHIVE)
    except BROKEN_ZIP as error:
        raise InputError(f"{folder / ARCHIVE}: no readable zip ({first_line(error)}); give an intact one") from error
    with archive:
        mtime = (folder / ARCHIVE).stat().st_mtime_ns
        members = []
        # By name, as `ZipFile.read` looks them up: of two members with one name the last counts.
        for name, entry in {entry.filename: entry for entry in archive.infolist()}.items():
            path = name.removeprefix(base)
            top, slash, rest = path.partition("/")
            inside = top + slash in wanted and rest.count("/") <= depth and not path.endswith("/")
            if name.startswith(base) and inside:
                members.append((path, entry.file_size, (entry.CRC, mtime)))
        yield sorted(members), lambda path: archive.read(base + path)


def is_clutter(path: str) -> bool:
    """Whether an operating system left this file, so that it is worth no message.

    >>> is_clutter("query/Thumbs.db"), is_clutter("query/._0001_c1s1_000001_00.jpg"), is_clutter("query/a.jpg")
    (True, True, False)
    """
    name = path.rpartition("/")[2]
    return name.startswith(".") or name.lower() in _CLUTTER


def _below(root: Path, path: str, depth: int) -> Iterator[Member]:
    """The files of the folder `path`, and of folders in it down to `depth`; links are followed."""
    with os.scandir(root / path) as entries:
        for entry in entries:
            below = f"{path}/{entry.name}"
            # A link that leads nowhere or to itself makes `entry.is_dir` raise.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                if depth > 0:
                    yield from _below(root, below, depth - 1)
            else:
                yield _member(root, below)


def _member(root: Path, path: str) -> Member:
    if not os.path.isfile(root / path):
        return path, NO_FILE, ()
    info = (root / path).stat()
    return path, info.st_size, (info.st_mtime_ns,)
