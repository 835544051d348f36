"""The pictures of a folder to search in: those of a gallery where it is a re-ID data set, else all there are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedklpr_jax.data.finding import find, opened_site
from fedklpr_jax.data.layouts import GALLERY, named_after
from fedklpr_jax.data.listing import NO_FILE, Read, is_clutter, line, why_unusable
from fedklpr_jax.errors import InputError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")


class Shown(NamedTuple):
    """A picture: its path in the folder, and of whom and from which camera it is; None where nothing tells."""

    path: str
    person: int | None
    camera: int | None


@contextlib.contextmanager
def opened_gallery(folder: Path) -> Iterator[tuple[list[Shown], list[str], Read]]:
    """The pictures of `folder`, sorted by path, a line for each file left out, and the function that reads one.

    A re-ID data set, in an `images.zip` or not, has its gallery; any other folder what lies in it or below under names
    that end like a picture's. Nothing is opened before it is read.

    Raises:
      InputError: no such folder, no picture in it, or one that cannot be listed.
    """
    if not folder.is_dir():
        raise InputError(f"--gallery: {folder} is no folder; give one of pictures")
    found = find(folder)
    if not isinstance(found, str):
        with opened_site(found) as (listed, read):
            gallery = [Shown(p.path, p.id, p.cam) for p in listed.pictures if p.split == GALLERY]
            yield _some(gallery, folder), listed.refused, read
        return
    pictures, refused = [], []
    for path in _below(folder):
        if path.lower().endswith(ENDINGS) and not is_clutter(path):
            file = folder / path
            reason = why_unusable(file.stat().st_size if file.is_file() else NO_FILE)
            if reason:
                refused.append(line(path, reason))
            else:
                pictures.append(Shown(path, *(named_after(file.name) or (None, None))))
    yield _some(pictures, folder), refused, lambda path: (folder / path).read_bytes()


def _below(folder: Path) -> list[str]:
    """The paths of all files below, sorted; links to folders are not followed, which might lead back."""

    def cannot(error: OSError) -> None:
        where = f"{error.filename} cannot be listed ({error.strerror})"
        raise InputError(f"--gallery: {where}; make it readable") from error

    found = [Path(top, name) for top, _, names in os.walk(folder, onerror=cannot) for name in names]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _some(pictures: list[Shown], folder: Path) -> list[Shown]:
    if not pictures:
        raise InputError(f"--gallery: {folder} holds no picture to search in; they end in {', '.join(ENDINGS)}")
    return pictures
