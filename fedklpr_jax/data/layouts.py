"""The folder layouts in which re-ID data sets are distributed: which file shows whom, where and in which split.

Nothing here opens a picture: names, and the lists beside them, tell everything. Where a set has no published split, one
is drawn (`draw_people`). Person 0 is a distractor, in the gallery of a Market-1501 layout and nowhere else: sets that
count their people from 0 are counted from 1 here. docs/data.md has a table of all sets.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from fedklpr_jax.data.listing import MAX_BYTES, Member, Read, first_line, line
from fedklpr_jax.data.published import CUHK01, ILIDS, MARKET, MSMT17, PES3D, PRID, PUBLISHED, VIPER
from fedklpr_jax.errors import InputError

TRAIN, QUERY, GALLERY = SPLITS = ("bounding_box_train", "query", "bounding_box_test")
SEED = 2508
EXCHANGES = 10_000
SHOTS = 10

_A, _B = 1, 2
# The scene part (`s1`) is optional because DukeMTMC-reID and CUHK03-NP, same layout, have none: 0001_c2_f0046182.jpg.
_MARKET_NAME = r"(-1|\d{1,9})_c(\d{1,4})(?:s\d+)?_\w+\.(?:jpe?g|png)"
_MARKET = f"(?:bounding_box_train|query|bounding_box_test)/{_MARKET_NAME}"
_VIPER = r"cam_([ab])/(\d{1,9})_\d{1,3}\.(?:bmp|png|jpe?g)"
_CUHK01 = r"campus/(?!0000)(\d{4})00([1-4])\.(?:png|jpe?g)"
_PES3D = r"RGB/(\d{1,9})_(\d{1,9})_\w+\.bmp"
_ILIDS = r"Persons/(?!0000)(\d{4})(\d{3})\.(?:jpe?g|png)"
_PRID = r"(?:single_shot/cam_([ab])/person_(?!0000)(\d{4})|multi_shot/cam_([ab])/person_(?!0000)(\d{4})/\w+)\.png"
# Numbers of people whom both cameras of PRID2011 saw; from there on, one number is two people.
_SHARED = 200
_ONLY_A = 1000
_MSMT17 = r"(?:[^/\s]+/)*\d+_\d+_(\d{1,4})_\w+\.(?:jpe?g|png)"
_LISTS = {"list_train.txt": TRAIN, "list_val.txt": TRAIN, "list_query.txt": QUERY, "list_gallery.txt": GALLERY}


class Picture(NamedTuple):
    """One file: whom it shows (-1 junk, 0 a distractor), under which camera, in which of `SPLITS`."""

    member: Member
    id: int
    cam: int
    split: str

    @property
    def path(self) -> str:
        return self.member[0]


Sorted = tuple[list[Picture], list[str]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files of a set lie, folders written with a slash behind their names.

    Attributes:
      name: of the set; Market-1501 stands for every set in its layout.
      marks: what tells that a folder is in this layout: all of one of these groups.
      listed: what is looked into.
      needs: what of it has to be there.
      depth: how many folders deeper files lie.
      sort: members and the function that reads one to pictures and a line for each file left out.
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    listed: tuple[str, ...]
    needs: tuple[str, ...]
    depth: int
    sort: Callable[[Sequence[Member], Read], Sorted]


def recognised(has: Callable[[str], bool]) -> Layout | None:
    """The layout of a folder, `has` telling of a name whether it is there.

    >>> recognised({"cam_a/", "cam_b/"}.__contains__).name
    'VIPeR'
    """
    return next((found for found in LAYOUTS if any(all(map(has, group)) for group in found.marks)), None)


def named_after(name: str) -> tuple[int, int] | None:
    """Person and camera of a picture whose file is named as in Market-1501; None for other names.

    >>> named_after("0002_c1s1_000451_03.jpg"), named_after("entrance.jpg")
    ((2, 1), None)
    """
    match = re.fullmatch(_MARKET_NAME, name, re.IGNORECASE | re.ASCII)
    return (int(match[1]), int(match[2])) if match else None


def draw_people(
    sizes: Mapping[int, tuple[int, int, int]], name: str, besides: tuple[int, int, int] = (0, 0, 0)
) -> set[int]:
    """The people trained on where the published split was a random one that nobody kept.

    The share of people is the published one; NumPy's `default_rng(SEED)` draws them. Of a complete set people are then
    exchanged, one drawn for one not, as long as this brings the numbers of training, query and gallery pictures no
    farther from the published ones: until they are equal, or `EXCHANGES` times.

    Args:
      sizes: by person, the pictures that they would bring to training, to query and to gallery.
      name: a set in `PUBLISHED` with a `draw`.
      besides: pictures of the three splits that belong to nobody in `sizes`.

    >>> sorted(draw_people({person: (2, 1, 1) for person in range(1, 7)}, "VIPeR"))
    [1, 2, 6]
    """
    published = PUBLISHED[name]
    assert published.draw is not None
    part, whole = published.draw
    people = np.array(sorted(sizes), int)
    count = (len(people) * part + whole // 2) // whole
    table = np.array([sizes[int(person)] for person in people], int).reshape(-1, 3)
    wanted = np.array([published.train, published.query, published.gallery]) - besides
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(people))

    def off() -> int:
        counts = [table[order[:count], 0].sum(), *table[order[count:], 1:].sum(axis=0)]
        return int(np.abs(counts - wanted).sum())

    if len(people) == whole:
        least = off()
        for _ in range(EXCHANGES):
            if least == 0:
                break
            pair = [rng.integers(count), rng.integers(count, whole)]
            order[pair] = order[pair[::-1]]
            now = off()
            if now > least:
                order[pair] = order[pair[::-1]]
            least = min(least, now)
    return set(people[order[:count]].tolist())


def _named(members: Iterable[Member], pattern: str, form: str, refused: list[str]) -> Iterator[tuple[Member, re.Match]]:
    """The members whose whole path fits, each with its match; the others get a line in `refused`."""
    fits = re.compile(pattern, re.IGNORECASE | re.ASCII)
    for member in members:
        match = fits.fullmatch(member[0])
        if match:
            yield member, match
        else:
            refused.append(line(member[0], f"not named like {form}"))


def _market(members: Sequence[Member], read: Read) -> Sorted:
    """Zheng et al., ICCV 2015: the folder is the split, the name tells person and camera."""
    refused: list[str] = []
    named = _named(members, _MARKET, "0002_c1s1_000451_03.jpg (or .png)", refused)
    return [Picture(file, int(m[1]), int(m[2]), file[0].partition("/")[0]) for file, m in named], refused


def _seen_by_two(pictures: Sequence[Picture], name: str) -> list[Picture]:
    """The pictures with their splits: people drawn are trained on, of the others camera A asks and camera B answers."""
    seen: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for picture in pictures:
        # The numbers of the cameras are the places of query and gallery among the splits.
        seen[picture.id][0] += 1
        seen[picture.id][picture.cam] += 1
    trained = draw_people({person: (whole, asked, answers) for person, (whole, asked, answers) in seen.items()}, name)
    return [picture._replace(split=TRAIN if picture.id in trained else SPLITS[picture.cam]) for picture in pictures]


def _viper(members: Sequence[Member], read: Read) -> Sorted:
    """Gray et al., PETS 2007: a picture a person and camera, people counted from 0."""
    refused: list[str] = []
    named = _named(members, _VIPER, "cam_a/000_45.bmp", refused)
    pictures = [Picture(file, int(m[2]) + 1, _camera(m[1]), "") for file, m in named]
    return _seen_by_two(pictures, VIPER), refused


def _cuhk01(members: Sequence[Member], read: Read) -> Sorted:
    """Li et al., ACCV 2012: four digits of the person, three of the picture: 1 and 2 by camera A, 3 and 4 by B."""
    refused: list[str] = []
    named = _named(members, _CUHK01, "campus/0001001.png (pictures 001 to 004)", refused)
    pictures = [Picture(file, int(m[1]), _A if int(m[2]) <= 2 else _B, "") for file, m in named]
    return _seen_by_two(pictures, CUHK01), refused


def _pes3d(members: Sequence[Member], read: Read) -> Sorted:
    """Baltieri et al., 2011: the person, the sequence and the frame; no name tells a camera."""
    refused: list[str] = []
    named = _named(members, _PES3D, "RGB/100_3_FRAME_26_RGB.bmp", refused)
    return _seen_by_two(_halves([(file, int(m[1]) + 1, int(m[2])) for file, m in named]), PES3D), refused


def _ilids(members: Sequence[Member], read: Read) -> Sorted:
    """Zheng et al., BMVC 2009: four digits of the person, three of the picture; no name tells a camera."""
    refused: list[str] = []
    named = _named(members, _ILIDS, "Persons/0001001.jpg", refused)
    return _seen_by_two(_halves([(file, int(m[1]), int(m[2])) for file, m in named]), ILIDS), refused


def _halves(views: Sequence[tuple[Member, int, int]]) -> list[Picture]:
    """Pictures of (file, person, view): the first half of a person's views stands for camera A, the others for B, as
    Xiao et al. (CVPR 2016) deal them, but in order instead of by chance."""
    of: dict[int, set[int]] = defaultdict(set)
    for _, person, view in views:
        of[person].add(view)
    first = {person: sorted(numbers)[: len(numbers) // 2] for person, numbers in of.items()}
    return [Picture(file, person, _A if view in first[person] else _B, "") for file, person, view in views]


def _prid(members: Sequence[Member], read: Read) -> Sorted:
    """Hirzer et al., SCIA 2011, split as by Xiao et al. (CVPR 2016): half of the people whom both cameras saw and all
    whom A alone saw are trained on, at most `SHOTS` pictures a camera, evenly spread; tests are on single shots, people
    whom B alone saw are in the gallery."""
    refused: list[str] = []
    single: dict[tuple[int, int], Member] = {}
    shots: dict[tuple[int, int], list[Member]] = defaultdict(list)
    for file, m in _named(members, _PRID, "single_shot/cam_a/person_0001.png (or multi_shot/.../0001.png)", refused):
        if m[1]:
            single[_camera(m[1]), int(m[2])] = file
        else:
            shots[_camera(m[3]), int(m[4])].append(file)

    def training(cam: int, number: int) -> list[Member]:
        files = shots.get((cam, number)) or [single[cam, number]]
        return [files[int(row)] for row in np.linspace(0, len(files) - 1, min(SHOTS, len(files)))]

    shared = [n for n in range(1, _SHARED + 1) if (_A, n) in single and (_B, n) in single]
    only_a = sorted({n for cam, n in [*single, *shots] if cam == _A and n > _SHARED})
    only_b = sorted(n for cam, n in single if cam == _B and n > _SHARED)
    pictures = [Picture(file, _ONLY_A + n, _A, TRAIN) for n in only_a for file in training(_A, n)]
    pictures += [Picture(single[_B, n], n, _B, GALLERY) for n in only_b]
    besides = (len(pictures) - len(only_b), 0, len(only_b))
    trained = draw_people({n: (len(training(_A, n)) + len(training(_B, n)), 1, 1) for n in shared}, PRID, besides)
    for n in shared:
        if n in trained:
            pictures += [Picture(file, n, cam, TRAIN) for cam in (_A, _B) for file in training(cam, n)]
        else:
            pictures += [Picture(single[_A, n], n, _A, QUERY), Picture(single[_B, n], n, _B, GALLERY)]
    return pictures, refused


def _camera(letter: str) -> int:
    return _A if letter.lower() == "a" else _B


def _msmt17(folders: Mapping[str, str], members: Sequence[Member], read: Read) -> Sorted:
    """Wei et al., CVPR 2018: lists of file and person, the third number of a name is the camera. Training and test
    count their people from 0 each; those of the test are counted on behind those of training here."""
    there = {member[0]: member for member in members}
    form, fits = "0000/0000_000_01_0303morning_0008_0.jpg 0", re.compile(rf"({_MSMT17})\s+(\d{{1,9}})", re.ASCII)
    pictures: dict[str, Picture] = {}
    refused: list[str] = []
    behind = 0
    for name, split in _LISTS.items():
        if split == QUERY:
            behind = max((picture.id for picture in pictures.values()), default=0)
        wrong, first = 0, 0
        for number, text in enumerate(map(str.strip, _text(there[name], read).splitlines()), start=1):
            match = fits.fullmatch(text)
            if match is None:
                # Counted, not told one by one: what is no list at all may have millions of lines.
                wrong, first = wrong + bool(text), first or (number if text else 0)
                continue
            path = f"{folders[split]}/{match[1]}"
            if path in pictures:
                refused.append(line(path, f"{name} names it for the second time"))
            elif path not in there:
                refused.append(line(path, f"{name} names it, but it is not there"))
            else:
                pictures[path] = Picture(there[path], int(match[3]) + 1 + behind, int(match[2]), split)
        if wrong:
            refused.append(line(name, f"{wrong} lines not like {form}, the first is line {first}"))
    return list(pictures.values()), refused


def _text(member: Member, read: Read) -> str:
    path, size, _ = member
    if size > MAX_BYTES:
        raise InputError(line(path, f"{size} bytes, more than {MAX_BYTES}; give the list that came with the set"))
    try:
        return read(path).decode("utf-8-sig", "replace")
    except MemoryError:
        raise
    except Exception as error:  # of the disk, or of a damaged zip member
        raise InputError(line(path, f"cannot be read ({first_line(error)}); make it readable")) from error


def _version(train: str, test: str, marks: tuple[tuple[str, ...], ...]) -> Layout:
    folders = (f"{train}/", f"{test}/")
    sort = partial(_msmt17, {TRAIN: train, QUERY: test, GALLERY: test})
    return Layout(MSMT17, marks, (*folders, *_LISTS), (*folders, *_LISTS), 1, sort)


def _simple(name: str, folders: tuple[str, ...], sort: Callable[[Sequence[Member], Read], Sorted]) -> Layout:
    return Layout(name, (folders,), folders, (), 0, sort)


_MARKET_FOLDERS = tuple(f"{split}/" for split in SPLITS)
_PRID_FOLDERS = ("single_shot/", "multi_shot/")
MARKET_LAYOUT = Layout(MARKET, tuple((folder,) for folder in _MARKET_FOLDERS), _MARKET_FOLDERS, (), 0, _market)
LAYOUTS = (
    MARKET_LAYOUT,
    # Folders `train` and `test` are common: without one of the lists they are no MSMT17.
    _version("train", "test", tuple(("train/", "test/", name) for name in _LISTS)),
    _version("mask_train_v2", "mask_test_v2", (("mask_train_v2/",), ("mask_test_v2/",))),
    Layout(PRID, tuple((folder,) for folder in _PRID_FOLDERS), _PRID_FOLDERS, _PRID_FOLDERS[:1], 2, _prid),
    _simple(VIPER, ("cam_a/", "cam_b/"), _viper),
    _simple(CUHK01, ("campus/",), _cuhk01),
    _simple(PES3D, ("RGB/",), _pes3d),
    _simple(ILIDS, ("Persons/",), _ilids),
)
