"""Bytes of picture files as pixels. Nothing here trusts a picture: what does not decode gives the reason why."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedklpr_jax.data import image_cache
from fedklpr_jax.data.listing import Read, first_line, shown
from fedklpr_jax.errors import InputError

MAX_PIXELS = 1 << 24
STORED = ("JPEG", "PNG")

_CHUNK = 256
# Deeper modes (16-bit, float) would be clipped, not scaled, by a conversion to RGB.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
# In these a decoder's pixels are those of the conversion to RGB, at most three times over.
_PLAIN = ("L", "RGB")

T = TypeVar("T")


class Source(NamedTuple):
    """Where pictures come from: `read(path)` the bytes of one, `formats(path)` those of Pillow's that it may have."""

    read: Read
    formats: Callable[[str], tuple[str, ...]]


def formats_by_name(path: str) -> tuple[str, ...]:
    """What a file of a re-ID layout may hold.

    >>> formats_by_name("cam_a/000_45.BMP"), formats_by_name("query/0001_c1s1_000001_00.jpg")
    (('BMP',), ('JPEG', 'PNG'))
    """
    return ("BMP",) if path.lower().endswith(".bmp") else STORED


def pixels_of(blob: bytes, formats: tuple[str, ...], height: int, width: int) -> np.ndarray | str:
    """uint8 [height, width, 3] (Pillow bilinear, which antialiases), or why these bytes are no usable picture."""
    return _used(
        blob, formats, lambda image: np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    )


def storable(blob: bytes, formats: tuple[str, ...]) -> bytes | str:
    """The picture at its own size as JPEG or PNG that every decoder reads as the same RGB, or why it is not usable.

    These are the very bytes where they are a JPEG or PNG in RGB or grey, else a PNG (lossless) of what `pixels_of`
    resizes.
    """

    def encoded(image: Image.Image) -> bytes:
        colours = image.convert("RGB")
        if image.format in STORED and image.mode in _PLAIN:
            return blob
        png = io.BytesIO()
        colours.save(png, "PNG")
        return png.getvalue()

    return _used(blob, formats, encoded)


def each(
    paths: Sequence[str], source: Source, work: Callable[[bytes, tuple[str, ...]], T | str]
) -> Iterator[tuple[str, T | str]]:
    """Every path with what `work(bytes, formats)` makes of it, or the reason why it cannot be unpacked; on all cores.

    Raises:
      InputError: a file that cannot be read.
    """

    def one(path: str) -> tuple[str, T | str]:
        try:
            blob = source.read(path)
        except OSError as error:
            # A disk or permission fault is not the picture's: refusing it would quietly shrink the data.
            raise InputError(f"{shown(path)}: cannot be read ({first_line(error)}); make it readable") from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged, encrypted or oddly compressed zip member
            return path, f"cannot be unpacked ({first_line(error)})"
        return path, work(blob, source.formats(path))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # In chunks, because `map` would start on everything and hold what the reader has not yet taken.
        for start in range(0, len(paths), _CHUNK):
            yield from pool.map(one, paths[start : start + _CHUNK])


def decoded(
    paths: Sequence[str], source: Source, height: int, width: int
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Every path with its pixels, uint8 [height, width, 3], or the reason why it has none.

    Raises:
      InputError: as `each`.
    """
    return each(paths, source, lambda blob, formats: pixels_of(blob, formats, height, width))


def in_memory(paths: Sequence[str], source: Source, height: int, width: int) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels of those that decode, uint8 [n, height, width, 3], and by its path why each of the others is left out.

    Raises:
      InputError: as `each`.
    """
    pixels = np.empty((len(paths), height, width, 3), np.uint8)
    kept, broken = 0, {}
    for path, result in decoded(paths, source, height, width):
        if isinstance(result, str):
            broken[path] = result
        else:
            pixels[kept] = result
            kept += 1
    return pixels[:kept], broken


def on_disk(
    paths: Sequence[str], source: Source, height: int, width: int, *, cache: Path, stem: str
) -> tuple[np.ndarray, dict[str, str]]:
    """The same as a read-only memory map; where the cache has it under `stem` already nothing is decoded.

    Raises:
      InputError: as `each`, or the cache cannot be written.
    """
    shape = (height, width, 3)
    kept = image_cache.load(cache, stem, paths, shape)
    if kept is None:
        image_cache.write(cache, stem, decoded(paths, source, height, width), len(paths), shape)
        kept = image_cache.load(cache, stem, paths, shape)
    if kept is None:
        raise InputError(f"{cache}: what was just written there cannot be read back; give another cache folder")
    return kept


def _used(blob: bytes, formats: tuple[str, ...], use: Callable[[Image.Image], T]) -> T | str:
    """What `use` makes of the picture, or the reason why these bytes are no usable one."""
    try:
        with Image.open(io.BytesIO(blob), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}"
            if image.mode not in _MODES:
                return f"pixels of mode {image.mode}; 8 bits a channel are read"
            return use(image)
    except UnidentifiedImageError:
        return f"not a {' or '.join(formats)} picture"
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly every type on damaged bytes
        return f"does not decode ({first_line(error)})"
