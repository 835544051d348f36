"""The pictures of one client: what every source of data (folders, the synthetic generator) hands over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of person crops.

    Attributes:
      pixels: uint8 [n, height, width, 3], RGB; a memory map is fine.
      ids: int32 [n], the person; -1 never appears here, 0 is a distractor (matches no query).
      cams: int32 [n], the camera.
      names: n strings to show in messages and reports.
    """

    pixels: np.ndarray
    ids: np.ndarray
    cams: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> Images:
        """The same pictures, only `rows` (int [m]) and in that order."""
        return Images(self.pixels[rows], self.ids[rows], self.cams[rows], tuple(self.names[int(i)] for i in rows))


@dataclasses.dataclass(frozen=True)
class Site:
    """One client of the federation: its name, its three splits, and what was refused while reading them.

    `refused` holds one line per picture that was left out, naming the file and the reason.
    """

    name: str
    train: Images
    query: Images
    gallery: Images
    refused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Away:
    """A client whose pictures lie on another machine: all that is known of them here.

    Attributes:
      name: the client.
      sizes: whole numbers by name, as the `sizes` of its task tells them there.
    """

    name: str
    sizes: Mapping[str, int]


Clients = Sequence[Site | Away]


def here(sites: Clients) -> list[Site]:
    """The clients whose pictures are on this machine."""
    return [site for site in sites if isinstance(site, Site)]


def pixels_here(sites: Clients, height: int, width: int) -> np.ndarray:
    """The training pictures that are on this machine, client after client: uint8 [n, height, width, 3]."""
    return np.concatenate([np.zeros((0, height, width, 3), np.uint8), *(site.train.pixels for site in here(sites))])


def pooled(sites: Sequence[Site], name: str) -> Site:
    """One site whose training images are those of all `sites`, as if footage could be moved; query and gallery empty.

    People and cameras of different sites stay different ones.
    """
    trains = [site.train for site in sites]
    ids: list[np.ndarray] = []
    cams: list[np.ndarray] = []
    for train in trains:
        ids.append(np.where(train.ids > 0, train.ids + (int(ids[-1].max()) if ids else 0), train.ids))
        cams.append(train.cams + (1 + int(cams[-1].max()) if cams else 0))
    together = Images(
        np.concatenate([np.asarray(train.pixels) for train in trains]),
        np.concatenate(ids),
        np.concatenate(cams),
        tuple(f"{site.name}/{picture}" for site in sites for picture in site.train.names),
    )
    return Site(name, together, together.take(np.arange(0)), together.take(np.arange(0)))
