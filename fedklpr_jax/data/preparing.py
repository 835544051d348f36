"""The TFDS builder `reid_folder`: a re-ID site of any layout of docs/data.md, written once as array_record.

TensorFlow is not needed. Importing this module registers the builder, which only writing needs (`prepared.py` says how
its files are read). Importing it takes half a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fedklpr_jax.data import decoding, image_cache
from fedklpr_jax.data.decoding import Source, formats_by_name
from fedklpr_jax.data.finding import Found, find, opened_site
from fedklpr_jax.data.folder import check_splits, decoded_site
from fedklpr_jax.data.layouts import Picture
from fedklpr_jax.data.listing import first_line, shown
from fedklpr_jax.data.prepared import CAMERA, FILE, IMAGE, NAME, PERSON, SPLIT_NAMES, VERSION, is_whole, set_folder
from fedklpr_jax.errors import InputError

# TFDS holds one file's pictures in memory while it writes it.
SHARD = 512

_NAMES = re.compile(r"[\w+\-][\w+\-.]*", re.ASCII)


def _unwatched() -> None:
    """Takes no notice of a picture that is done."""


@dataclasses.dataclass
class SiteConfig(tfds.core.BuilderConfig):
    """One site: `folder` is where its files lie, in any of the layouts; `advance` is called after every picture."""

    folder: str = ""
    advance: Callable[[], None] = _unwatched


class ReidFolder(tfds.core.ShardBasedBuilder):
    """Person re-identification pictures as they lie in a folder.

    Shards, not TFDS's shuffling generator: that one needs TensorFlow for splits over 1 GB, and the order here is that
    of the file names, as everywhere else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     builder = ReidFolder(config=SiteConfig(name="gate", folder="gate"), data_dir=folder)
    >>> sorted(builder.info.features)
    ['camera', 'file', 'image', 'person']
    """

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures of one person each, by person and camera: training, query and gallery.",
            features=tfds.features.FeaturesDict({
                IMAGE: tfds.features.Image(shape=(None, None, 3), doc="at its own size, RGB"),
                PERSON: tfds.features.Scalar(np.int32, doc="0 is a distractor, which matches no query"),
                CAMERA: tfds.features.Scalar(np.int32),
                FILE: tfds.features.Text(doc="the path in the site's folder"),
            }),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )  # fmt: skip

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes the shards, then notes of the set: its `layout`, a line for each file `refused`, and a `stamp` of the
        files it was made of."""
        name = self.builder_config.name
        found = find(Path(os.path.abspath(self.builder_config.folder)))
        if isinstance(found, str):
            raise InputError(f"{self.builder_config.folder}: {found}")
        with opened_site(found) as (listed, read):
            check_splits(name, found.layout, listed.pictures, listed.refused)
            self._pictures, self._source = listed.pictures, Source(read, formats_by_name)
            self._broken: dict[str, str] = {}
            super()._download_and_prepare(dl_manager, download_config)
            whole = len(listed.pictures) - len(self._broken)
            site = decoded_site(
                name, found.layout, listed.pictures, listed.refused,
                lambda paths: (np.empty((whole, 0, 0, 3), np.uint8), self._broken),
            )  # fmt: skip
        note = {"layout": found.layout.name, "refused": list(site.refused), "stamp": _stamp(found, listed.pictures)}
        self.info.metadata.update(note)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[Any]]]]:
        iterators: dict[str, list[Callable[[], Iterator[Any]]]] = {}
        for split, name in SPLIT_NAMES.items():
            pictures = [picture for picture in self._pictures if picture.split == split]
            shards = [pictures[first : first + SHARD] for first in range(0, len(pictures), SHARD)]
            iterators[name] = [functools.partial(self._examples, shard) for shard in shards]
        return iterators

    def _examples(self, pictures: Sequence[Picture]) -> Iterator[tuple[str, dict[str, Any]]]:
        results = decoding.each([picture.path for picture in pictures], self._source, decoding.storable)
        for picture, (path, result) in zip(pictures, results, strict=True):
            if isinstance(result, str):
                self._broken[path] = result
            else:
                yield path, {IMAGE: result, PERSON: picture.id, CAMERA: picture.cam, FILE: shown(path)}
            self.builder_config.advance()


class Prepared(NamedTuple):
    """A site on disk: in which folder, pictures by split, a line for each file refused, and whether it was there
    already."""

    place: Path
    counts: dict[str, int]
    refused: tuple[str, ...]
    before: bool


def prepare(found: Found, data_dir: Path, advance: Callable[[], None] = _unwatched) -> Prepared:
    """Writes a site below `data_dir`, whole or not at all; one that is there already is left as it is.

    Raises:
      InputError: a name that TFDS does not take, a set there that was made of other files, a folder that cannot be
        written, or as `folder.read_site`.
    """
    name = found.folder.name
    if not _NAMES.fullmatch(name):
        raise InputError(f"{shown(str(found.folder))}: TFDS takes names of letters, digits, _, +, - and . only; "
                         "rename the folder, or give a link to it")
    data_dir = Path(os.path.abspath(data_dir))
    place = set_folder(data_dir, name)
    before = is_whole(place)
    if before:
        builder = tfds.builder_from_directory(place)
        with opened_site(found) as (listed, _):
            same = dict(builder.info.metadata).get("stamp") == _stamp(found, listed.pictures)
        if not same:
            raise InputError(f"{place}: is there already and was made of other files; delete it, or give another --out")
    elif place.exists():
        raise InputError(f"{place}: is there already, but is no whole set; delete it, or give another --out")
    else:
        config = SiteConfig(name=name, folder=str(found.folder), advance=advance)
        try:
            # What TFDS prints says nothing that is not said elsewhere.
            with contextlib.redirect_stdout(io.StringIO()):
                builder = ReidFolder(config=config, data_dir=data_dir, file_format="array_record")
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{place}: cannot be written ({first_line(error)}); give a folder with room") from error
    counts = {split: builder.info.splits[split].num_examples for split in SPLIT_NAMES.values()}
    return Prepared(place, counts, tuple(dict(builder.info.metadata)["refused"]), before)


def _stamp(found: Found, pictures: Sequence[Picture]) -> str:
    """What tells these files from others, and from themselves once changed."""
    return image_cache.digest(found.folder / found.base, [picture.member for picture in pictures])
