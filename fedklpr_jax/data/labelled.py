"""Labelled pictures for classification: an .npz, class-named folders of pictures, or a TensorFlow Datasets set."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import shlex
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedklpr_jax.data.decoding import MAX_PIXELS
from fedklpr_jax.data.listing import MAX_BYTES
from fedklpr_jax.errors import BROKEN_NPZ, InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
SPLITS = ("train", "validation", "test")

_CACHE_VERSION = 1
_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")
# Deeper modes (16-bit, float) would be clipped, not scaled, by a conversion to 8 bits.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Pictures and their classes.

    Attributes:
      pixels: uint8 [n, height, width, channels].
      labels: int32 [n], places in `classes`.
      classes: the name of each class.
      refused: one line for each file or part that was left out.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    refused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def read_folder(root: Path, *, cache: Path | None = None) -> Labelled:
    """Reads a folder with one .npz, or else with one sub-folder of pictures a class.

    The .npz holds `images`, uint8 [n, h, w] or [n, h, w, c], and `labels`, whole numbers from 0; classes are then named
    "0", "1", ... Sub-folders name the classes, in sorted order, and hold .png, .jpg, .jpeg or .bmp files of one size;
    these are grey (one channel) where every picture is, else RGB. Files that are no readable picture are left out.

    Args:
      root: the folder.
      cache: a folder that keeps the decoded pictures of class folders, so that a later call with the same files decodes
        nothing. An .npz needs none.

    Returns:
      The pictures in the order of the file, or class by class in the order of the file names.

    Raises:
      InputError: neither layout, an unreadable or malformed .npz, pictures of different sizes, a class without a
        readable picture, or a cache folder that cannot be written.
    """
    root = Path(os.path.abspath(root))
    try:
        entries = sorted(entry for entry in root.iterdir() if not _clutter(entry))
    except OSError as error:
        raise InputError(f"{root}: cannot be listed ({error.strerror}); give a readable folder") from error
    archives = [entry for entry in entries if entry.suffix.lower() == ".npz"]
    if len(archives) == 1:
        return _read_npz(archives[0])
    if archives:
        raise InputError(f"{root}: holds {len(archives)} .npz files; leave exactly one there")
    folders = [entry for entry in entries if os.path.isdir(entry)]
    if not folders:
        raise InputError(f"{root}: holds neither an .npz file nor a sub-folder of pictures for each class")
    if cache is None:
        return _read_pictures(root, folders)
    kept = cache / f"{root.name[:40]}-{_digest(root, folders)}.npz"
    found = _load(kept)
    if found is None:
        found = _read_pictures(root, folders)
        _save(kept, found)
    return found


def read_tfds(name: str, data_dir: str = "") -> Labelled:
    """Reads an image classification set that TensorFlow Datasets has prepared on disk as array_record.

    TensorFlow is not needed to read, and nothing is downloaded: a set is prepared once with `tfds build`, which needs
    it. The splits train, validation and test are merged in this order, as the literature on personalised federated
    learning does; what other splits there are (`extra`, `unlabelled`) is told in `refused`.

    Args:
      name: as TFDS spells it, with configuration and version where wanted: `mnist`, `emnist/balanced:3.1.0`.
      data_dir: the folder of prepared sets; empty means TFDS's own (TFDS_DATA_DIR or ~/tensorflow_datasets).

    Returns:
      The pictures, split after split in TFDS's order.

    Raises:
      InputError: an unknown name, a set without uint8 image and class features, a set that is not prepared, or
        pictures of different sizes.
    """
    import tensorflow_datasets as tfds  # half a second to import, and only this function needs it

    folder = os.path.abspath(os.path.expanduser(data_dir)) if data_dir else None
    try:
        builder = tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
        hint = f"did you mean {near[0]}?" if near else "see the list at tensorflow.org/datasets/catalog"
        raise InputError(f"{_shown(name)}: TFDS knows no such data set; {hint}") from error
    except Exception as error:  # a set's own code runs here and raises nearly every type
        raise InputError(f"{_shown(name)}: TFDS cannot open it ({_first_line(error)}); give another name") from error
    features = builder.info.features
    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    image, label = (dict(features or {}).get(key) for key in (image_key, label_key))
    if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
        there = ", ".join(sorted(features or ()))
        raise InputError(f"{name}: no image classification set (features {there}); give one")
    if image.np_dtype != np.uint8:
        raise InputError(f"{name}: its images are {np.dtype(image.np_dtype)}; give a set of uint8 images")
    try:
        sources = builder.as_data_source()
    except Exception as error:  # TFDS has no one error for a set that is absent, half written or of another format
        where = f" --data_dir={shlex.quote(folder)}" if folder else ""
        raise InputError(
            f"{name}: not prepared as array_record in {builder.data_dir}; run once, where TensorFlow is installed: "
            f"tfds build {name} --file_format=array_record{where}"
        ) from error
    wanted = [split for split in SPLITS if split in sources]
    if not wanted:
        raise InputError(f"{name}: none of its splits {', '.join(sources)} is one of {', '.join(SPLITS)}")
    pixels, labels = _stack(name, [sources[split] for split in wanted], image_key, label_key)
    return Labelled(
        pixels,
        labels,
        tuple(label.int2str(number) for number in range(label.num_classes)),
        tuple(
            f"{name}: split {split} left out ({len(sources[split])} pictures); {', '.join(SPLITS)} are read"
            for split in sources
            if split not in SPLITS
        ),
    )


def _stack(name: str, sources: Sequence[Sequence], image_key: str, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    count = sum(map(len, sources))
    pixels, labels, shape = np.zeros((0, 0, 0, 0), np.uint8), np.empty(count, np.int32), None
    for row, example in enumerate(example for source in sources for example in source):
        picture = example[image_key]
        if shape is None:
            shape = picture.shape
            pixels = np.empty((count, *shape), np.uint8)
        if picture.shape != shape:
            raise InputError(
                f"{name}: picture {row} is {_size(picture)}, the first {_size(pixels[0])}; give a set of one size"
            )
        pixels[row], labels[row] = picture, example[label_key]
    if count == 0 or labels.min() < 0:
        raise InputError(f"{name}: {int((labels < 0).sum())} of {count} pictures have no label; give a labelled set")
    return pixels, labels


def _check_length(archive: Any, key: str) -> None:
    """Raises ValueError where an array of an .npz claims to be longer than what is there can hold."""
    info = archive.zip.getinfo(f"{key}.npy")
    with archive.zip.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version > (2, 0):
            raise ValueError(f"`{key}` is of an unknown version of the format")
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
    # No compression of a zip takes more than 1032 bytes into one.
    if math.prod(shape) * dtype.itemsize > min(info.file_size, 1032 * info.compress_size):
        raise ValueError(f"`{key}` claims to be longer than the file")


def _read_npz(path: Path) -> Labelled:
    name = _shown(str(path))
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in ("images", "labels") if key not in archive]
            if missing:
                raise InputError(f"{name}: has no array `{missing[0]}`; it must hold `images` and `labels`")
            for key in ("images", "labels"):
                _check_length(archive, key)
            pixels, labels = archive["images"], archive["labels"]
    except InputError:
        raise
    except BROKEN_NPZ as error:
        raise InputError(f"{name}: no readable .npz ({_first_line(error)}); give an intact one") from error
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or 0 in pixels.shape:
        shape = list(pixels.shape)
        raise InputError(f"{name}: `images` is {pixels.dtype} {shape}; give uint8 [n, h, w] or [n, h, w, c]")
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        raise InputError(
            f"{name}: `labels` is {labels.dtype} {list(labels.shape)}; give one whole number for each of the "
            f"{len(pixels)} images"
        )
    if labels.min() < 0 or labels.max() >= len(labels):
        raise InputError(f"{name}: `labels` runs from {labels.min()} to {labels.max()}; number the classes from 0")
    classes = tuple(str(number) for number in range(int(labels.max()) + 1))
    return Labelled(pixels if pixels.ndim == 4 else pixels[..., None], labels.astype(np.int32), classes)


def _read_pictures(root: Path, folders: Sequence[Path]) -> Labelled:
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    refused: list[str] = []
    first = ""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, folder in enumerate(folders):
            files = list(_files(folder))
            for path, result in zip(files, pool.map(_pixels_of, files), strict=True):
                shown = _shown(str(path.relative_to(root)))
                if isinstance(result, str):
                    refused.append(f"{shown}: {result}")
                    continue
                first = first or shown
                pixels.append(result)
                labels.append(number)
                if result.shape[:2] != pixels[0].shape[:2]:
                    raise InputError(
                        f"{root}: {shown} is {_size(result)}, but {first} {_size(pixels[0])}; give all one size"
                    )
            if not labels or labels[-1] != number:
                raise InputError(
                    f"{root}: class folder {_shown(folder.name)} holds no readable picture ({', '.join(SUFFIXES)}); "
                    "add some or take the folder away"
                )
    if any(picture.shape[2] == 3 for picture in pixels):
        pixels = [np.broadcast_to(picture, (*picture.shape[:2], 3)) for picture in pixels]
    classes = tuple(_shown(folder.name) for folder in folders)
    return Labelled(np.stack(pixels), np.array(labels, np.int32), classes, tuple(refused))


def _files(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(entry for entry in folder.iterdir() if not _clutter(entry))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error


def _pixels_of(path: Path) -> np.ndarray | str:
    """uint8 [h, w, 1 or 3], or the reason why this file is no usable picture."""
    if path.suffix.lower() not in SUFFIXES:
        return f"not named {', '.join(SUFFIXES)}"
    if not os.path.isfile(path):
        return "no regular file"
    if path.stat().st_size > MAX_BYTES:
        return f"{path.stat().st_size} bytes, more than {MAX_BYTES}"
    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP")) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}"
            if image.mode not in _MODES:
                return f"pixels of mode {image.mode}; 8 bits a channel are read"
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
            return pixels if pixels.ndim == 3 else pixels[..., None]
    except UnidentifiedImageError:
        return "not a PNG, JPEG or BMP picture"
    except MemoryError:
        raise
    except PermissionError as error:
        # A fault of the disk's rights is not the picture's: refusing it would quietly shrink the data.
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    except Exception as error:  # decoders raise nearly every type on damaged bytes
        return f"does not decode ({_first_line(error)})"


def _digest(root: Path, folders: Sequence[Path]) -> str:
    files = []
    for folder in folders:
        for path in _files(folder):
            with contextlib.suppress(OSError):
                info = path.stat()
                files.append([folder.name, path.name, info.st_size, info.st_mtime_ns])
    text = json.dumps([_CACHE_VERSION, str(root.resolve()), [folder.name for folder in folders], files])
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def _load(path: Path) -> Labelled | None:
    """What `_save` kept, or None where there is nothing whole."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            classes, refused = json.loads(str(kept["text"]))
            return Labelled(kept["pixels"], kept["labels"], tuple(classes), tuple(refused))
    except BROKEN_NPZ:
        return None


def _save(path: Path, data: Labelled) -> None:
    draft = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.npz")
    text = json.dumps([data.classes, data.refused])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(draft, pixels=data.pixels, labels=data.labels, text=np.array(text))
        os.replace(draft, path)
    except OSError as error:
        raise InputError(f"{path.parent}: the cache cannot be written ({error.strerror}); give another") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _clutter(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _CLUTTER


def _size(picture: np.ndarray) -> str:
    return "x".join(map(str, picture.shape[:2])) + " pixels"


def _shown(text: str) -> str:
    # A name may hold line breaks or control codes; a message is one harmless line.
    return text if text.isprintable() else ascii(text)


def _first_line(error: BaseException) -> str:
    return _shown(" ".join(str(error).split())[:200] or type(error).__name__)
