"""The pictures of one client: what every source of data (folders, the synthetic generator) hands over."""

from __future__ import annotations

import dataclasses

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
