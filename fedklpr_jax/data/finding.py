"""Which data set lies in a folder, and which of its files are pictures of whom."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

from fedklpr_jax.data.layouts import GALLERY, MARKET_LAYOUT, SPLITS, Layout, Picture, recognised
from fedklpr_jax.data.listing import ARCHIVE, BROKEN_ZIP, Read, is_clutter, line, opened, tops, why_unusable
from fedklpr_jax.errors import InputError

MARKET_FOLDERS = "bounding_box_train/, query/ and bounding_box_test/"
# The folders into which the published archives unpack.
HOLDERS = (
    "Market-1501-v15.09.15", "DukeMTMC-reID", "detected", "labeled", "MSMT17_V1", "MSMT17_V2", "prid_2011", "VIPeR",
    "3DPeS", "i-LIDS_Pedestrian", "i-LIDS",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """A data set on disk.

    Attributes:
      folder: the site.
      layout: how its files lie.
      base: the folder in the site under which they lie, "" or with a slash behind its name.
      zipped: whether they lie in its `images.zip`.
      absent: what would be looked into and is not there.
    """

    folder: Path
    layout: Layout
    base: str = ""
    zipped: bool = False
    absent: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Listed:
    """The files of a data set, none opened.

    Attributes:
      pictures: worth decoding, in the order training, query, gallery and in each of their paths.
      refused: a line for each file that is none of them, sorted.
      left_out: pictures of nobody (junk, and distractors outside the gallery).
    """

    pictures: list[Picture]
    refused: list[str]
    left_out: list[Picture]


def find(folder: Path) -> Found | str:
    """The data set in a folder, or why there is none.

    A broken zip counts as one: reading it then says what is wrong.
    """
    # os.path, not Path: it answers False for a folder that may not be entered (lost+found).
    if not os.path.isdir(folder):
        return "is no folder"
    names: Collection[str] = ()
    archived, broken = os.path.isfile(folder / ARCHIVE), False
    if archived:
        try:
            with zipfile.ZipFile(folder / ARCHIVE) as archive:
                names = archive.namelist()
        except BROKEN_ZIP:
            broken = True
    if found := _at(folder, "", names):
        return found
    if broken:
        return Found(folder, MARKET_LAYOUT, zipped=True)
    held = [found for name in HOLDERS if (found := _at(folder, f"{name}/", names))]
    if len(held) == 1:
        return held[0]
    if held:
        several = " and ".join(found.base for found in held)
        return f"holds several data sets ({several}); give one of them as a folder of its own"
    if archived:
        return f"its {ARCHIVE} does not hold {MARKET_FOLDERS}"
    return f"holds neither {ARCHIVE} nor {MARKET_FOLDERS}"


@contextlib.contextmanager
def opened_site(found: Found) -> Iterator[tuple[Listed, Read]]:
    """The files of a data set and the function that reads the one at a path.

    Raises:
      InputError: something that its layout needs is missing, or cannot be listed or read.
    """
    layout = found.layout
    missing = ", ".join(name for name in found.absent if name in layout.needs)
    if missing:
        raise InputError(f"{found.folder}: {missing} of {layout.name} missing; put it there as it is distributed")
    with opened(found.folder, found.base, layout.listed, layout.depth, found.zipped) as (members, read):
        named, refused = layout.sort([member for member in members if not is_clutter(member[0])], read)
        pictures, left_out = [], []
        for picture in named:
            reason = why_unusable(picture.member[1])
            if reason:
                refused.append(line(picture.path, reason))
            elif picture.id > 0 or (picture.id == 0 and picture.split == GALLERY):
                pictures.append(picture)
            else:
                left_out.append(picture)
        pictures.sort(key=lambda picture: (SPLITS.index(picture.split), picture.path))
        yield Listed(pictures, sorted(refused), left_out), read


def _at(folder: Path, base: str, names: Collection[str]) -> Found | None:
    """The data set under `base`; plain files win over the archive, whose names are given."""

    def there(name: str) -> bool:
        return (os.path.isdir if name.endswith("/") else os.path.isfile)(folder / base / name)

    for zipped, has in ((False, there), (True, tops(names, base).__contains__)):
        layout = recognised(has)
        if layout:
            return Found(folder, layout, base, zipped, tuple(name for name in layout.listed if not has(name)))
    return None
