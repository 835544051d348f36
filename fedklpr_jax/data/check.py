"""What data sets a folder holds, beside what is published of them. No picture is opened."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedklpr_jax.data.finding import Found, find, opened_site
from fedklpr_jax.data.folder import TITLES, check_splits, cross_camera_queries
from fedklpr_jax.data.layouts import MARKET_LAYOUT, SEED, SPLITS, Picture
from fedklpr_jax.data.listing import ARCHIVE, line, shown
from fedklpr_jax.data.published import PUBLISHED, Counts, set_named
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Part:
    """One split, or all of them: who and what is there, and what is published (None: nothing).

    Attributes:
      title: its name.
      people: persons, distractors and junk not counted.
      images: pictures with a good name, those of nobody among them.
      cameras: how many took them.
      published: the published numbers of persons, images and cameras.
    """

    title: str
    people: int
    images: int
    cameras: int
    published: tuple[int | None, int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Report:
    """What one data set holds: a line that names it, its splits and all of them together, and what there is to say."""

    headline: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def data_sets(folder: Path) -> tuple[list[Found], list[str]]:
    """The data sets in a folder: itself, or its sub-folders, and a line for each of these that is none.

    Raises:
      InputError: there is none, or no such folder.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{shown(str(folder))}: no such folder; give a data set, or a folder of several")
    folder = Path(os.path.abspath(folder))
    itself = find(folder)
    if isinstance(itself, Found) and not itself.base:
        return [itself], []
    try:
        subs = [name for name in sorted(os.listdir(folder)) if os.path.isdir(folder / name)]
    except OSError as error:
        raise InputError(f"{shown(str(folder))}: cannot be listed ({error.strerror}); make it readable") from error
    looked = {name: find(folder / name) for name in subs}
    sets = [found for found in looked.values() if isinstance(found, Found)]
    if len(sets) > 1 or isinstance(itself, str):
        if not sets:
            raise InputError(f"{shown(str(folder))}: {itself}; no other layout of docs/data.md fits, here or one below")
        return sets, [line(name, found) for name, found in looked.items() if isinstance(found, str)]
    return [itself], []


def report(found: Found) -> Report:
    """What a data set holds, counted by the names of its files.

    Raises:
      InputError: as `folder.read_site`, as far as names tell.
    """
    with opened_site(found) as (listed, _):
        pass
    name = found.folder.name
    check_splits(name, found.layout, listed.pictures, listed.refused)
    known = found.layout.name
    if found.layout is MARKET_LAYOUT:
        known = set_named(found.base) or set_named(name) or ""
    published = PUBLISHED.get(known)
    parts = _parts(listed.pictures, listed.left_out, published)
    notes = _differences(parts) if published else ["no published counts are known under this name"]
    if known and found.layout is not MARKET_LAYOUT and published and published.draw:
        notes.append(f"no split of this set is published: the people to train on are drawn (seed {SEED})")
    if found.absent:
        notes.append(f"not there: {', '.join(found.absent)}")
    if published and published.note:
        notes.append(published.note)
    if listed.left_out:
        notes.append(f"{len(listed.left_out):,} of these images show nobody (junk) and are not read")
    queries = [picture for picture in listed.pictures if picture.split == SPLITS[1]]
    lonely = len(queries) - _scored(listed.pictures)
    if lonely:
        notes.append(f"{lonely:,} of {len(queries):,} queries have no second camera; not counted in tests")
    if listed.refused:
        notes.append(f"{len(listed.refused):,} files are not read, the first of them: {listed.refused[0]}")
    where = ", ".join(filter(None, [found.base, ARCHIVE if found.zipped else ""]))
    layout = "" if known == found.layout.name else f" in the layout of {found.layout.name}"
    return Report(f"{shown(name)}: {known or 'a set'}{layout}{f' ({where})' if where else ''}", parts, tuple(notes))


def _scored(pictures: Sequence[Picture]) -> int:
    """How many queries can be scored."""
    train, query, gallery = (
        Images(
            np.empty((0, 0, 0, 3), np.uint8),
            np.array([picture.id for picture in pictures if picture.split == split], np.int32),
            np.array([picture.cam for picture in pictures if picture.split == split], np.int32),
            (),
        )
        for split in SPLITS
    )
    return cross_camera_queries(Site("", train, query, gallery))


def _parts(pictures: Sequence[Picture], nobody: Sequence[Picture], published: Counts | None) -> tuple[Part, ...]:
    def part(title: str, splits: Sequence[str], *numbers: int | None) -> Part:
        of = [picture for picture in pictures if picture.split in splits]
        extra = [picture for picture in nobody if picture.split in splits]
        people, cameras = {picture.id for picture in of} - {0}, {picture.cam for picture in [*of, *extra]}
        people_there, images_there, cameras_there = numbers if published else (None, None, None)
        return Part(title, len(people), len(of) + len(extra), len(cameras), (people_there, images_there, cameras_there))

    p = published or Counts(0, 0, 0, 0, 0)
    train, query, gallery = SPLITS
    return (
        part(TITLES[train], [train], p.people, p.train, None),
        part(TITLES[query], [query], None, p.query, None),
        part(TITLES[gallery], [gallery], None, p.gallery, None),
        part("all", SPLITS, None, None, p.cameras),
    )


def _differences(parts: Sequence[Part]) -> list[str]:
    """What is missing or too much, a line a split."""
    lines = []
    for part in parts:
        found = {"persons": part.people, "images": part.images, "cameras": part.cameras}
        off = [
            f"{abs(there - wanted):,} {what} {'missing' if there < wanted else 'more than published'}"
            for (what, there), wanted in zip(found.items(), part.published, strict=True)
            if wanted is not None and there != wanted
        ]
        if off:
            lines.append(f"{part.title}: {', '.join(off)}")
    return lines or ["as many as published"]
