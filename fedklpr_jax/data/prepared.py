"""Re-ID sites as TensorFlow Datasets keeps them (array_record): reading what `preparing.py` has written.

Read from the written files alone, without the code that wrote them and without TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedklpr_jax.data.decoding import STORED, Source
from fedklpr_jax.data.folder import check_names, decoded_site, decoder
from fedklpr_jax.data.layouts import LAYOUTS, MARKET_LAYOUT, SPLITS, Picture
from fedklpr_jax.data.listing import first_line, shown
from fedklpr_jax.data.site import Site
from fedklpr_jax.errors import InputError

NAME = "reid_folder"
VERSION = "1.0.0"
FEATURES = IMAGE, PERSON, CAMERA, FILE = "image", "person", "camera", "file"
# By the split of a layout that of the data set.
SPLIT_NAMES = dict(zip(SPLITS, ("train", "query", "gallery"), strict=True))

_PREPARE = "python -m fedklpr_jax.data prepare DIR --out"


def read_prepared(
    data_dir: str, names: Sequence[str] = (), *, height: int, width: int, cache: Path | None = None
) -> tuple[list[Site], list[str]]:
    """Reads the prepared sites in a folder: all of them, sorted by name, or exactly `names` in that order.

    A site is the same as `folder.read_site` makes of the folder it came from, pixel for pixel.

    Args:
      data_dir: a folder of prepared sets; empty means TFDS's own (TFDS_DATA_DIR or ~/tensorflow_datasets).
      names: the sites wanted; empty means every one.
      height: see `folder.read_site`.
      width: see `folder.read_site`.
      cache: see `folder.read_site`.

    Returns:
      The sites, and one line for each that is passed over because it is not whole (none when `names` given).

    Raises:
      InputError: no prepared site there, a name that is missing, repeated or not whole, a set of other features or
        damaged, or as `folder.read_site`.
    """
    # Half a second to import, and only this function needs it.
    from tensorflow_datasets.core import constants

    root = Path(os.path.abspath(os.path.expanduser(data_dir or constants.DATA_DIR))) / NAME
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; prepare it: {_PREPARE} {root.parent}")
    reasons = {sub: _why_not_whole(root / sub) for sub in sorted(os.listdir(root)) if os.path.isdir(root / sub)}
    there = [name for name, reason in reasons.items() if reason is None]
    if not there:
        raise InputError(f"{root}: holds no whole set; prepare one: {_PREPARE} {root.parent}")
    check_names(root, names, there, reasons)
    skipped = [] if names else [f"{shown(name)}: {reason}" for name, reason in reasons.items() if reason]
    return [_read(root / name, height, width, cache) for name in names or there], skipped


def set_folder(data_dir: Path, name: str) -> Path:
    """Where the files of a prepared site lie."""
    return data_dir / NAME / name / VERSION


def is_whole(place: Path) -> bool:
    """Whether all files of a prepared site are there: TFDS writes them elsewhere and moves them here at the end."""
    return os.path.isfile(place / "dataset_info.json")


def _why_not_whole(folder: Path) -> str | None:
    return None if is_whole(folder / VERSION) else f"holds no whole set of version {VERSION}"


def _read(folder: Path, height: int, width: int, cache: Path | None) -> Site:
    import tensorflow_datasets as tfds

    place, name = folder / VERSION, folder.name
    try:
        builder = tfds.builder_from_directory(place)
        features, metadata = set(builder.info.features), dict(builder.info.metadata)
        # Decoded here instead, by the decoder of all other sites.
        sources = builder.as_data_source(decoders={IMAGE: tfds.decode.SkipDecoding()}) if IMAGE in features else {}
        lacking = [*(set(FEATURES) - features), *(set(SPLIT_NAMES.values()) - set(sources))]
        pictures, rows = ([], {}) if lacking else _listed(sources)
    except Exception as error:  # TFDS has no one error for a set that is damaged or of another format
        raise InputError(f"{place}: cannot be read ({first_line(error)}); delete it and prepare it anew") from error
    if lacking:
        raise InputError(f"{place}: has no {', '.join(sorted(lacking))}; delete it and prepare it anew")

    def read(path: str) -> bytes:
        split, row = rows[path]
        return sources[split][row][IMAGE]

    files = sorted((file.name, file.stat().st_size, (file.stat().st_mtime_ns,)) for file in place.iterdir())
    layout = next((layout for layout in LAYOUTS if layout.name == metadata.get("layout")), MARKET_LAYOUT)
    decode = decoder(
        Source(read, lambda path: STORED), place, name, files, height=height, width=width, cache=cache
    )
    return decoded_site(name, layout, pictures, metadata.get("refused", []), decode)


def _listed(sources: Any) -> tuple[list[Picture], dict[str, tuple[str, int]]]:
    """All pictures of a set, and by its path the split and the row of each."""
    pictures: list[Picture] = []
    rows: dict[str, tuple[str, int]] = {}
    for split, name in SPLIT_NAMES.items():
        for row, example in enumerate(sources[name]):
            path = example[FILE].decode("utf-8")
            if path in rows:
                raise ValueError(f"{shown(path)} is there twice")
            rows[path] = name, row
            member = (path, len(example[IMAGE]), ())
            pictures.append(Picture(member, int(example[PERSON]), int(example[CAMERA]), split))
    return pictures, rows
