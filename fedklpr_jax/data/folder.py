"""Re-ID image folders in the Market-1501 layout, read once into uint8 arrays.

A site is a folder with `bounding_box_train/`, `query/` and `bounding_box_test/`, either as plain files or inside an
`images.zip` (read in place, never extracted; plain folders win where both exist). File names give person and camera:
`0002_c1s1_000451_03.jpg` is person 2 under camera 1. Person -1 is junk and left out; person 0000 is a distractor, kept
in the gallery as id 0 and dropped elsewhere (Zheng et al., ICCV 2015).

Nothing here trusts a picture: what does not decode is refused with one line and reading goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.errors import InputError

TRAIN, QUERY, GALLERY = SPLITS = ("bounding_box_train", "query", "bounding_box_test")
ARCHIVE = "images.zip"
MAX_BYTES = 32 << 20
MAX_PIXELS = 1 << 24

_LAYOUT = "bounding_box_train/, query/ and bounding_box_test/"
_CACHE_VERSION = 1
_CHUNK = 256
_NO_FILE = -1
# The scene part (`s1`) is optional because DukeMTMC-reID, same layout, has none: 0001_c2_f0046182.jpg.
_NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,4})(?:s\d+)?_\w+\.(?:jpe?g|png)", re.IGNORECASE | re.ASCII)
_CLUTTER = ("thumbs.db", "desktop.ini")
# Deeper modes (16-bit, float) would be clipped, not scaled, by a conversion to RGB.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_BROKEN_ZIP = (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, struct.error)

# `split/name`, bytes, and a stamp that changes when the content does (mtime, or CRC and mtime of the zip).
_Member = tuple[str, int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _Picture:
    member: _Member
    id: int
    cam: int

    @property
    def path(self) -> str:
        return self.member[0]

    @property
    def split(self) -> str:
        return self.path.partition("/")[0]


def read_site(folder: Path, *, height: int, width: int, cache: Path | None = None) -> Site:
    """Reads one site; pictures are resized (Pillow bilinear, which antialiases) to RGB `height` x `width`.

    Args:
      folder: a folder in the layout above; its name becomes the site's name.
      height: rows of every picture, pixels.
      width: columns of every picture, pixels.
      cache: a folder that keeps the decoded pixels. With it `pixels` are read-only memory maps, and a later call
        with the same files and size decodes nothing.

    Returns:
      The site. Pictures are in the order of their file names; `Images.names` are `split/file name`.

    Raises:
      InputError: no such layout, an unreadable zip or file, a split without a readable picture, no query whose
        person is in the gallery under another camera, or a cache folder that cannot be written.
    """
    if height < 1 or width < 1:
        raise InputError(f"image size: {height}x{width} is not allowed; give a height and a width from 1")
    folder = Path(os.path.abspath(folder))
    reason = _why_no_layout(folder)
    if reason:
        raise InputError(f"{folder}: {reason}")
    with _opened(folder) as (members, read):
        pictures, refused = _sort_out(members)
        _check_splits(folder.name, pictures, refused)
        if cache is None:
            pixels, broken = _decode_to_memory(pictures, read, height, width)
        else:
            stem = f"{folder.name[:40]}-{_digest(folder, pictures, height, width)}"
            shape = (height, width, 3)
            found = _load_cache(cache, stem, pictures, shape)
            if found is None:
                _write_cache(cache, stem, _decoded(pictures, read, height, width), len(pictures), shape)
                found = _load_cache(cache, stem, pictures, shape)
            if found is None:
                raise InputError(f"{cache}: what was just written there cannot be read back; give another cache folder")
            pixels, broken = found
    refused = sorted(refused + [_line(path, reason) for path, reason in broken.items()])
    pictures = [picture for picture in pictures if picture.path not in broken]
    _check_splits(folder.name, pictures, refused)
    train, query, gallery = (_images(split, pictures, pixels) for split in SPLITS)
    site = Site(folder.name, train, query, gallery, tuple(refused))
    if cross_camera_queries(site) == 0:
        raise InputError(
            f"{site.name}: none of its {len(site.query)} queries has its person in bounding_box_test/ under another "
            "camera, so nothing can be scored; give at least one such pair"
        )
    return site


def read_sites(
    root: Path, names: Sequence[str] = (), *, height: int, width: int, cache: Path | None = None
) -> tuple[list[Site], list[str]]:
    """Reads the sub-folders of `root` as sites: all of them, sorted by name, or exactly `names` in that order.

    Args:
      root: a folder whose sub-folders are sites.
      names: the sub-folders wanted; empty means every one in the layout.
      height: see `read_site`.
      width: see `read_site`.
      cache: see `read_site`.

    Returns:
      The sites, and one line for each sub-folder passed over because it is no re-ID layout (none when `names` given).

    Raises:
      InputError: a missing root, no site in it, a name that is missing, repeated or no site, or as `read_site`.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds one sub-folder a site")
    reasons = {sub: _why_no_layout(root / sub) for sub in sorted(os.listdir(root)) if os.path.isdir(root / sub)}
    there = [name for name, reason in reasons.items() if reason is None]
    if not there:
        hint = "give its parent folder" if _why_no_layout(root) is None else f"a site holds {ARCHIVE} or {_LAYOUT}"
        raise InputError(f"{root}: none of its {len(reasons)} sub-folders is a re-ID site; {hint}")
    listed = ", ".join(map(_shown, there))
    for place, name in enumerate(names):
        if name not in there:
            raise InputError(f"{root}: {_shown(name)} {reasons.get(name) or 'is not there'}; there is {listed}")
        if name in names[:place]:
            raise InputError(f"{root}: {name} is named twice; name every site once")
    skipped = [] if names else [f"{_shown(name)}: {reason}" for name, reason in reasons.items() if reason]
    return [read_site(root / name, height=height, width=width, cache=cache) for name in names or there], skipped


def read_pictures(files: Sequence[Path], *, height: int, width: int) -> tuple[np.ndarray, dict[str, str]]:
    """Pictures of whatever names: uint8 [n, height, width, 3], and by its name why each of the others is left out.

    Args:
      files: of one folder.
      height: see `read_site`.
      width: see `read_site`.

    Raises:
      InputError: a file that cannot be read.
    """
    sizes = {str(file): file.stat().st_size for file in files}
    pictures = [_Picture((path, size, ()), 0, 0) for path, size in sizes.items() if size <= MAX_BYTES]
    large = {path: f"{size} bytes, more than {MAX_BYTES}" for path, size in sizes.items() if size > MAX_BYTES}
    pixels, broken = _decode_to_memory(pictures, lambda path: Path(path).read_bytes(), height, width)
    return pixels, {_shown(Path(path).name): reason for path, reason in (large | broken).items()}


def cross_camera_queries(site: Site) -> int:
    """The number of queries whose person is in the gallery under another camera (only these can be scored).

    >>> blank = np.zeros((2, 1, 1, 3), np.uint8)
    >>> query = Images(blank, np.array([1, 2]), np.array([1, 1]), ("a", "b"))
    >>> gallery = Images(blank, np.array([1, 2]), np.array([2, 1]), ("c", "d"))
    >>> cross_camera_queries(Site("toy", gallery, query, gallery))
    1
    """
    seen: dict[int, set[int]] = {}
    for person, cam in zip(site.gallery.ids.tolist(), site.gallery.cams.tolist(), strict=True):
        seen.setdefault(person, set()).add(cam)
    pairs = zip(site.query.ids.tolist(), site.query.cams.tolist(), strict=True)
    return sum(person != 0 and bool(seen.get(person, set()) - {cam}) for person, cam in pairs)


def _shown(text: str) -> str:
    # A file name may hold line breaks or control codes; a message is one harmless line.
    return text if text.isprintable() else ascii(text)


def _line(path: str, reason: str) -> str:
    return f"{_shown(path)}: {reason}"


def _why_no_layout(folder: Path) -> str | None:
    """None for a site, else the reason. A broken zip counts as a site: reading it then says what is wrong."""
    # os.path, not Path: it answers False for a folder that may not be entered (lost+found).
    if not os.path.isdir(folder):
        return "is no folder"
    if any(os.path.isdir(folder / split) for split in SPLITS):
        return None
    if not os.path.isfile(folder / ARCHIVE):
        return f"holds neither {ARCHIVE} nor {_LAYOUT}"
    try:
        with zipfile.ZipFile(folder / ARCHIVE) as archive:
            tops = {name.partition("/")[0] for name in archive.namelist()}
    except _BROKEN_ZIP:
        return None
    return None if tops.intersection(SPLITS) else f"its {ARCHIVE} does not hold {_LAYOUT}"


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[list[_Member], Callable[[str], bytes]]]:
    """The files of the three splits, sorted by path, and the function that reads one."""
    members: list[_Member] = []
    if any(os.path.isdir(folder / split) for split in SPLITS):
        try:
            for split in filter(lambda split: os.path.isdir(folder / split), SPLITS):
                for file in (folder / split).iterdir():
                    if file.is_file():
                        info = file.stat()
                        members.append((f"{split}/{file.name}", info.st_size, (info.st_mtime_ns,)))
                    elif not file.is_dir():
                        members.append((f"{split}/{file.name}", _NO_FILE, ()))
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
        yield sorted(members), lambda path: (folder / path).read_bytes()
        return
    try:
        archive = zipfile.ZipFile(folder / ARCHIVE)
    except _BROKEN_ZIP as error:
        raise InputError(f"{folder / ARCHIVE}: no readable zip ({_first_line(error)}); give an intact one") from error
    with archive:
        mtime = (folder / ARCHIVE).stat().st_mtime_ns
        # By name, as `ZipFile.read` looks them up: of two members with one name the last counts.
        for name, entry in {entry.filename: entry for entry in archive.infolist()}.items():
            split, _, rest = name.partition("/")
            if split in SPLITS and rest and "/" not in rest:
                members.append((name, entry.file_size, (entry.CRC, mtime)))
        yield sorted(members), archive.read


def _sort_out(members: Sequence[_Member]) -> tuple[list[_Picture], list[str]]:
    """Pictures worth decoding in the order train, query, gallery, and a line for each file refused unread."""
    pictures: list[_Picture] = []
    refused: list[str] = []
    for path, size, stamp in members:
        split, _, name = path.partition("/")
        if name.startswith(".") or name.lower() in _CLUTTER:
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            refused.append(_line(path, "not named like 0002_c1s1_000451_03.jpg (or .png)"))
        elif size == _NO_FILE:
            refused.append(_line(path, "no regular file (a broken link?)"))
        elif size == 0:
            refused.append(_line(path, "0 bytes"))
        elif size > MAX_BYTES:
            refused.append(_line(path, f"{size} bytes, more than {MAX_BYTES}"))
        else:
            person, cam = int(match[1]), int(match[2])
            if person > 0 or (person == 0 and split == GALLERY):
                pictures.append(_Picture((path, size, stamp), person, cam))
    return sorted(pictures, key=lambda picture: SPLITS.index(picture.split)), refused


def _check_splits(site: str, pictures: Sequence[_Picture], refused: Sequence[str]) -> None:
    for split in SPLITS:
        if not any(picture.split == split for picture in pictures):
            lines = [line for line in refused if line.lstrip("'").startswith(f"{split}/")]
            why = f" ({len(lines)} refused, the first is {lines[0]})" if lines else ""
            raise InputError(f"{site}: {split}/ holds no readable picture of a person{why}; all three splits need some")


def _images(split: str, pictures: Sequence[_Picture], pixels: np.ndarray) -> Images:
    rows = [row for row, picture in enumerate(pictures) if picture.split == split]
    chosen = [pictures[row] for row in rows]
    return Images(
        pixels[rows[0] : rows[-1] + 1],
        np.array([picture.id for picture in chosen], np.int32),
        np.array([picture.cam for picture in chosen], np.int32),
        tuple(_shown(picture.path) for picture in chosen),
    )


def _first_line(error: BaseException) -> str:
    return _shown(" ".join(str(error).split()) or type(error).__name__)


def _pixels_of(blob: bytes, height: int, width: int) -> np.ndarray | str:
    """uint8 [height, width, 3], or the reason why these bytes are no usable picture."""
    try:
        with Image.open(io.BytesIO(blob), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}"
            if image.mode not in _MODES:
                return f"pixels of mode {image.mode}; 8 bits a channel are read"
            return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    except UnidentifiedImageError:
        return "not a JPEG or PNG picture"
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly every type on damaged bytes
        return f"does not decode ({_first_line(error)})"


def _decoded(
    pictures: Sequence[_Picture], read: Callable[[str], bytes], height: int, width: int
) -> Iterator[tuple[str, np.ndarray | str]]:
    def work(picture: _Picture) -> tuple[str, np.ndarray | str]:
        path = picture.path
        try:
            blob = read(path)
        except OSError as error:
            # A disk or permission fault is not the picture's: refusing it would quietly shrink the data.
            raise InputError(f"{_shown(path)}: cannot be read ({_first_line(error)}); make it readable") from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged, encrypted or oddly compressed zip member
            return path, f"cannot be unpacked ({_first_line(error)})"
        return path, _pixels_of(blob, height, width)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # In chunks, because `map` would start on everything and hold what the reader has not yet taken.
        for start in range(0, len(pictures), _CHUNK):
            yield from pool.map(work, pictures[start : start + _CHUNK])


def _decode_to_memory(
    pictures: Sequence[_Picture], read: Callable[[str], bytes], height: int, width: int
) -> tuple[np.ndarray, dict[str, str]]:
    pixels = np.empty((len(pictures), height, width, 3), np.uint8)
    kept, broken = 0, {}
    for path, result in _decoded(pictures, read, height, width):
        if isinstance(result, str):
            broken[path] = result
        else:
            pixels[kept] = result
            kept += 1
    return pixels[:kept], broken


def _digest(folder: Path, pictures: Sequence[_Picture], height: int, width: int) -> str:
    files = [picture.member for picture in pictures]
    text = json.dumps([_CACHE_VERSION, str(folder.resolve()), files, height, width])
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def _load_cache(
    cache: Path, stem: str, pictures: Sequence[_Picture], shape: tuple[int, int, int]
) -> tuple[np.ndarray, dict[str, str]] | None:
    """Pixels and refused paths, or None for anything but a whole cache of just these pictures."""
    try:
        note = json.loads((cache / f"{stem}.json").read_text(encoding="utf-8"))
        # What np.load(mmap_mode="r") does for an .npy, and it takes nothing else.
        pixels = np.lib.format.open_memmap(cache / f"{stem}.npy", mode="r")
        size = (cache / f"{stem}.npy").stat().st_size
    except (OSError, ValueError, OverflowError):
        return None
    known = {picture.path for picture in pictures}
    if not isinstance(note, dict) or note.get("stem") != stem:
        return None
    broken = note.get("refused")
    if not isinstance(broken, dict) or not known.issuperset(broken):
        return None
    whole = (len(pictures) - len(broken), *shape)
    if pixels.shape != whole or pixels.dtype != np.uint8 or size != pixels.offset + pixels.nbytes:
        return None
    return pixels, broken


def _write_cache(
    cache: Path, stem: str, results: Iterator[tuple[str, np.ndarray | str]], count: int, shape: tuple[int, int, int]
) -> None:
    """Streams the pixels to disk, so that a set larger than memory fits; each file appears whole or not at all."""
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
