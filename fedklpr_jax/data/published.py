"""How many people, pictures and cameras each published re-ID data set has."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the literature says of a set.

    Attributes:
      cameras: of the whole set.
      people: who are trained on.
      train: training pictures.
      query: query pictures.
      gallery: gallery pictures, junk and distractors included.
      draw: how many people are drawn to be trained on, and of how many; None where the split is published.
      note: what a holder should know, "" for nothing.
    """

    cameras: int
    people: int
    train: int
    query: int
    gallery: int
    draw: tuple[int, int] | None = None
    note: str = ""


MARKET, DUKE, CUHK03, CUHK03_LABELLED, MSMT17 = (
    "Market-1501", "DukeMTMC-reID", "CUHK03-NP (detected)", "CUHK03-NP (labelled)", "MSMT17"
)  # fmt: skip
PRID, CUHK01, VIPER, PES3D, ILIDS = "PRID2011", "CUHK01", "VIPeR", "3DPeS", "i-LIDS"

PUBLISHED = {
    MSMT17: Counts(15, 1041, 32621, 11659, 82161),
    DUKE: Counts(8, 702, 16522, 2228, 17661, note="withdrawn by its authors; read for those who hold it"),
    MARKET: Counts(6, 751, 12936, 3368, 19732),
    CUHK03: Counts(2, 767, 7365, 1400, 5332),
    CUHK03_LABELLED: Counts(2, 767, 7368, 1400, 5328),
    # 185 people whom camera A alone saw are trained on besides those drawn.
    PRID: Counts(2, 285, 3744, 100, 649, draw=(100, 200)),
    CUHK01: Counts(2, 485, 1940, 972, 972, draw=(485, 971)),
    VIPER: Counts(2, 316, 632, 316, 316, draw=(316, 632)),
    PES3D: Counts(2, 93, 450, 246, 316, draw=(93, 193)),
    ILIDS: Counts(2, 59, 248, 98, 130, draw=(59, 119)),
}

# Folders in the Market-1501 layout tell by their names alone which set they are; the first that fits counts.
_NAMES = {
    "label": CUHK03_LABELLED, "detected": CUHK03, "cuhk03": CUHK03, "cuhk01": CUHK01, "market": MARKET, "duke": DUKE,
    "msmt17": MSMT17, "prid": PRID, "viper": VIPER, "3dpes": PES3D, "ilids": ILIDS,
}  # fmt: skip


def set_named(name: str) -> str | None:
    """The published set that a folder of this name holds, or None.

    >>> set_named("Market-1501-v15.09.15"), set_named("i-LIDS"), set_named("ward")
    ('Market-1501', 'i-LIDS', None)
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((found for part, found in _NAMES.items() if part in plain), None)
