"""Re-ID image folders, read once into uint8 arrays.

A site is a folder in the layout of Market-1501 or of another published set (`layouts.py`), either as plain files or
inside an `images.zip` (read in place, never extracted; plain folders win where both exist). Market-1501 has
`bounding_box_train/`, `query/` and `bounding_box_test/`, whose file names give person and camera:
`0002_c1s1_000451_03.jpg` is person 2 under camera 1. Person -1 is junk and left out; person 0000 is a distractor, kept
in the gallery as id 0 and dropped elsewhere (Zheng et al., ICCV 2015).

Nothing here trusts a picture: what does not decode is refused with one line and reading goes on.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedklpr_jax.data import image_cache
from fedklpr_jax.data.finding import MARKET_FOLDERS, find, opened_site
from fedklpr_jax.data.layouts import GALLERY, MARKET_LAYOUT, QUERY, SPLITS, TRAIN, Layout, Picture
from fedklpr_jax.data.listing import ARCHIVE, MAX_BYTES, Read, first_line, line, shown
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.errors import InputError

MAX_PIXELS = 1 << 24

_CHUNK = 256
# Deeper modes (16-bit, float) would be clipped, not scaled, by a conversion to RGB.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
TITLES = {TRAIN: "training", QUERY: "query", GALLERY: "gallery"}


def read_site(folder: Path, *, height: int, width: int, cache: Path | None = None) -> Site:
    """Reads one site; pictures are resized (Pillow bilinear, which antialiases) to RGB `height` x `width`.

    Args:
      folder: a folder in one of the layouts; its name becomes the site's name.
      height: rows of every picture, pixels.
      width: columns of every picture, pixels.
      cache: a folder that keeps the decoded pixels. With it `pixels` are read-only memory maps, and a later call
        with the same files and size decodes nothing.

    Returns:
      The site. Pictures are in the order of their file names; `Images.names` are paths, `split/file name` in the layout
      of Market-1501.

    Raises:
      InputError: no such layout, an unreadable zip or file, a split without a readable picture, no query whose
        person is in the gallery under another camera, or a cache folder that cannot be written.
    """
    if height < 1 or width < 1:
        raise InputError(f"image size: {height}x{width} is not allowed; give a height and a width from 1")
    folder = Path(os.path.abspath(folder))
    found = find(folder)
    if isinstance(found, str):
        raise InputError(f"{folder}: {found}")
    with opened_site(found) as (listed, read):
        pictures, refused = listed.pictures, listed.refused
        members, paths = [picture.member for picture in pictures], [picture.path for picture in pictures]
        check_splits(folder.name, found.layout, pictures, refused)
        if cache is None:
            pixels, broken = _decode_to_memory(paths, read, height, width)
        else:
            stem = f"{folder.name[:40]}-{image_cache.digest(folder / found.base, members, height, width)}"
            shape = (height, width, 3)
            kept = image_cache.load(cache, stem, paths, shape)
            if kept is None:
                image_cache.write(cache, stem, decoded(paths, read, height, width), len(paths), shape)
                kept = image_cache.load(cache, stem, paths, shape)
            if kept is None:
                raise InputError(f"{cache}: what was just written there cannot be read back; give another cache folder")
            pixels, broken = kept
    refused = sorted(refused + [line(path, reason) for path, reason in broken.items()])
    pictures = [picture for picture in pictures if picture.path not in broken]
    check_splits(folder.name, found.layout, pictures, refused)
    train, query, gallery = (_images(split, pictures, pixels) for split in SPLITS)
    site = Site(folder.name, train, query, gallery, tuple(refused))
    if cross_camera_queries(site) == 0:
        answers = f"{GALLERY}/" if found.layout is MARKET_LAYOUT else "the gallery"
        raise InputError(
            f"{site.name}: none of its {len(site.query)} queries has its person in {answers} under another "
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
    reasons = {sub: _why_no_site(root / sub) for sub in sorted(os.listdir(root)) if os.path.isdir(root / sub)}
    there = [name for name, reason in reasons.items() if reason is None]
    if not there:
        hint = "give its parent folder" if _why_no_site(root) is None else f"a site holds {ARCHIVE} or {MARKET_FOLDERS}"
        raise InputError(f"{root}: none of its {len(reasons)} sub-folders is a re-ID site; {hint}")
    listed = ", ".join(map(shown, there))
    for place, name in enumerate(names):
        if name not in there:
            raise InputError(f"{root}: {shown(name)} {reasons.get(name) or 'is not there'}; there is {listed}")
        if name in names[:place]:
            raise InputError(f"{root}: {name} is named twice; name every site once")
    skipped = [] if names else [f"{shown(name)}: {reason}" for name, reason in reasons.items() if reason]
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
    paths = [path for path, size in sizes.items() if size <= MAX_BYTES]
    large = {path: f"{size} bytes, more than {MAX_BYTES}" for path, size in sizes.items() if size > MAX_BYTES}
    pixels, broken = _decode_to_memory(paths, lambda path: Path(path).read_bytes(), height, width)
    return pixels, {shown(Path(path).name): reason for path, reason in (large | broken).items()}


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


def check_splits(site: str, layout: Layout, pictures: Sequence[Picture], refused: Sequence[str]) -> None:
    """Makes sure that each of the three splits has a picture.

    Args:
      site: its name, for the message.
      layout: how the files lie.
      pictures: those of all splits.
      refused: a line for each file left out.

    Raises:
      InputError: one has none.
    """
    for split in SPLITS:
        if not any(picture.split == split for picture in pictures):
            market = layout is MARKET_LAYOUT
            lines = [text for text in refused if not market or text.lstrip("'").startswith(f"{split}/")]
            why = f" ({len(lines)} refused, the first is {lines[0]})" if lines else ""
            what = f"{split}/" if market else f"the {TITLES[split]} split of {layout.name}"
            raise InputError(f"{site}: {what} holds no readable picture of a person{why}; all three splits need some")


def _why_no_site(folder: Path) -> str | None:
    found = find(folder)
    return found if isinstance(found, str) else None


def _images(split: str, pictures: Sequence[Picture], pixels: np.ndarray) -> Images:
    rows = [row for row, picture in enumerate(pictures) if picture.split == split]
    chosen = [pictures[row] for row in rows]
    return Images(
        pixels[rows[0] : rows[-1] + 1],
        np.array([picture.id for picture in chosen], np.int32),
        np.array([picture.cam for picture in chosen], np.int32),
        tuple(shown(picture.path) for picture in chosen),
    )


def _pixels_of(blob: bytes, height: int, width: int, formats: tuple[str, ...]) -> np.ndarray | str:
    """uint8 [height, width, 3], or the reason why these bytes are no usable picture."""
    try:
        with Image.open(io.BytesIO(blob), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}"
            if image.mode not in _MODES:
                return f"pixels of mode {image.mode}; 8 bits a channel are read"
            return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    except UnidentifiedImageError:
        return f"not a {' or '.join(formats)} picture"
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly every type on damaged bytes
        return f"does not decode ({first_line(error)})"


def decoded(
    paths: Sequence[str], read: Read, height: int, width: int
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Each path with its picture, uint8 [height, width, 3], or with why it is left out; in their order, a few hundred
    at a time.

    Args:
      paths: of pictures; those that end in `.bmp` are read as such, others as JPEG or PNG.
      read: the content of a file.
      height: see `read_site`.
      width: see `read_site`.

    Raises:
      InputError: a file that cannot be read.
    """

    def work(path: str) -> tuple[str, np.ndarray | str]:
        try:
            blob = read(path)
        except OSError as error:
            # A disk or permission fault is not the picture's: refusing it would quietly shrink the data.
            raise InputError(f"{shown(path)}: cannot be read ({first_line(error)}); make it readable") from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged, encrypted or oddly compressed zip member
            return path, f"cannot be unpacked ({first_line(error)})"
        return path, _pixels_of(blob, height, width, ("BMP",) if path.lower().endswith(".bmp") else ("JPEG", "PNG"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # In chunks, because `map` would start on everything and hold what the reader has not yet taken.
        for start in range(0, len(paths), _CHUNK):
            yield from pool.map(work, paths[start : start + _CHUNK])


def _decode_to_memory(
    paths: Sequence[str], read: Read, height: int, width: int
) -> tuple[np.ndarray, dict[str, str]]:
    pixels = np.empty((len(paths), height, width, 3), np.uint8)
    kept, broken = 0, {}
    for path, result in decoded(paths, read, height, width):
        if isinstance(result, str):
            broken[path] = result
        else:
            pixels[kept] = result
            kept += 1
    return pixels[:kept], broken
