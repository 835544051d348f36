"""A query picture ranked against the pictures of a folder by a trained network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedklpr_jax.console import Console
from fedklpr_jax.data.decoding import Source, decoded, formats_by_name
from fedklpr_jax.data.gallery import Shown, opened_gallery
from fedklpr_jax.data.layouts import named_after
from fedklpr_jax.data.listing import Read, line, why_unusable
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.ranking import euclidean_distances
from fedklpr_jax.ranked_picture import Tile, draw_ranking
from fedklpr_jax.tasks.reid import Network
from fedklpr_jax.trained import Trained

# Decoded pictures in memory at a time.
_BLOCK = 256
_DRAWN_HEIGHT = 192


class Found(NamedTuple):
    """A picture of the gallery, and how alike it is: the cosine of the two embeddings, from -1 to 1."""

    shown: Shown
    similarity: float


class Ranking(NamedTuple):
    """What was found for a query, the most alike first, among how many pictures `searched`, a line for each file left
    out, and the picture of it (PNG, empty if none was asked for)."""

    query: Shown
    found: list[Found]
    searched: int
    refused: list[str]
    picture: bytes

    def hit(self, place: int) -> bool | None:
        """Whether what was found there shows the query's person; None where names do not tell."""
        person = self.found[place].shown.person
        return None if None in (person, self.query.person) else person == self.query.person


def rank(model: Trained, query: Path, gallery: Path, top: int, console: Console, *, draw: bool) -> Ranking:
    """Ranks the pictures in the folder `gallery` by how alike they are to the picture `query`.

    The query itself is left out where it lies in that folder.

    Args:
      model: with an embedding.
      query: a picture.
      gallery: of `opened_gallery`.
      top: how many to show.
      console: shows how far it is.
      draw: whether to make the picture.

    Raises:
      InputError: a query or gallery without a picture that can be read, or a network without an embedding.
    """
    if model.classes:
        raise InputError(f"{model.client}: its network tells {len(model.classes)} classes apart and has no embedding "
                         "to search by; give a run of re-ID")
    height, width = model.pictures.height, model.pictures.width
    asked = Shown(query.name, *(named_after(query.name) or (None, None)))
    question = _query_pixels(query, height, width)
    network = model.network()
    with opened_gallery(gallery) as (pictures, refused, read):
        pictures = [shown for shown in pictures if not _same(gallery / shown.path, query)]
        embedded, kept, broken = _embedded(model, network, pictures, read, console)
        if not kept:
            raise InputError(f"--gallery: {gallery} holds no picture that can be searched; the first: "
                             f"{(broken + refused + ['the query alone'])[0]}")
        distances = euclidean_distances(network(model.variables, question[None]), embedded)[0]
        nearest = np.argsort(distances, kind="stable")[:top]
        # Of vectors of length 1 |a - b|^2 = 2 - 2 a.b.
        found = [Found(kept[row], 1.0 - float(distances[row]) / 2.0) for row in nearest]
        ranking = Ranking(asked, found, len(kept), sorted(refused + broken), b"")
        return ranking._replace(picture=_drawn(ranking, query, read, height, width)) if draw else ranking


def _same(one: Path, other: Path) -> bool:
    return one.exists() and os.path.samefile(one, other)


def _query_pixels(query: Path, height: int, width: int) -> np.ndarray:
    if not query.is_file():
        raise InputError(f"--query: {query} is no file; give a picture")
    reason = why_unusable(query.stat().st_size)
    pixels = reason or next(iter(decoded([str(query)], Source(_read_path, formats_by_name), height, width)))[1]
    if isinstance(pixels, str):
        raise InputError(f"--query: {line(str(query), pixels)}; give a JPEG, PNG or (ending in .bmp) BMP picture")
    return pixels


def _read_path(path: str) -> bytes:
    return Path(path).read_bytes()


def _embedded(
    model: Trained, network: Network, pictures: Sequence[Shown], read: Read, console: Console
) -> tuple[np.ndarray, list[Shown], list[str]]:
    """The embeddings of the pictures that can be read, float32 [n, d], these pictures, and a line for each other."""
    by_path = {shown.path: shown for shown in pictures}
    kept: list[Shown] = []
    parts: list[np.ndarray] = []
    block: list[np.ndarray] = []
    broken: list[str] = []

    def embed_block() -> None:
        if block:
            parts.append(network(model.variables, np.stack(block)))
            block.clear()

    results = decoded(list(by_path), Source(read, formats_by_name), model.pictures.height, model.pictures.width)
    for path, result in console.track(results, len(by_path), "pictures to search"):
        if isinstance(result, str):
            broken.append(line(path, result))
            continue
        kept.append(by_path[path])
        block.append(result)
        if len(block) == _BLOCK:
            embed_block()
    embed_block()
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32), kept, broken


def _drawn(ranking: Ranking, query: Path, read: Read, height: int, width: int) -> bytes:
    """The picture of a ranking, larger than the network sees it and of the same shape."""
    size = (_DRAWN_HEIGHT, max(1, round(_DRAWN_HEIGHT * width / height)))

    def tile(path: str, how: Read, lines: list[str], hit: bool | None = None) -> Tile:
        ((_, pixels),) = decoded([path], Source(how, formats_by_name), *size)
        assert isinstance(pixels, np.ndarray), f"{path} was read before"
        return Tile(pixels, lines, hit)

    tiles = [
        tile(one.shown.path, read, [f"{place + 1}: {one.similarity:.3f}", *described(one.shown)], ranking.hit(place))
        for place, one in enumerate(ranking.found)
    ]
    return draw_ranking(tile(str(query), _read_path, described(ranking.query)), tiles)


def described(shown: Shown) -> list[str]:
    """Whom a picture shows, where that is known, and what its file is called."""
    who = [] if shown.person is None else [f"person {shown.person}, c{shown.camera}"]
    return [*who, shown.path.rpartition("/")[2]]
