"""A query and what was found for it, as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from fedklpr_jax.figures import LIGHT

COLUMNS = 10
_HIT, _MISS = "#009E73", "#D55E00"
_GAP, _BETWEEN, _HEAD, _FRAME, _DASH = 12, 36, 24, 4, 10
_LINES, _FONT = 3, 13


@dataclass(frozen=True, eq=False)
class Tile:
    """A picture, uint8 [height, width, 3]; the lines under it; and whether it shows the query's person (None: nobody
    knows)."""

    pixels: np.ndarray
    lines: Sequence[str]
    hit: bool | None = None


def draw_ranking(query: Tile, found: Sequence[Tile]) -> bytes:
    """The bytes of a PNG: the query on the left, right of it what was found, nearest first, ten in a row.

    A full green frame says the same person, a dashed red one another, none that nobody knows.
    """
    height, width = query.pixels.shape[:2]
    block = (width + _GAP, height + _LINES * (_FONT + 4) + 2 * _GAP)
    columns, rows = min(COLUMNS, len(found)), -(-len(found) // COLUMNS)
    left = _GAP + width + _BETWEEN
    page = Image.new("RGB", (left + columns * block[0], _HEAD + rows * block[1] + _GAP), LIGHT.face)
    draw = ImageDraw.Draw(page)
    for text, x in (("query", _GAP), ("gallery, nearest first", left)):
        draw.text((x, 6), text, fill=LIGHT.ink, font_size=_FONT)
    _tile(page, query, _GAP, _HEAD)
    middle = left - _BETWEEN // 2 - _GAP // 2
    draw.line((middle, _GAP, middle, page.height - _GAP), fill=LIGHT.faint, width=2)
    for place, tile in enumerate(found):
        _tile(page, tile, left + place % COLUMNS * block[0], _HEAD + place // COLUMNS * block[1])
    packed = io.BytesIO()
    page.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def _tile(page: Image.Image, tile: Tile, x: int, y: int) -> None:
    height, width = tile.pixels.shape[:2]
    draw = ImageDraw.Draw(page)
    page.paste(Image.fromarray(tile.pixels), (x, y))
    if tile.hit is not None:
        _frame(draw, (x, y, x + width - 1, y + height - 1), tile.hit)
    for number, text in enumerate(tile.lines[:_LINES]):
        place = (x, y + height + 4 + number * (_FONT + 4))
        draw.text(place, _fitting(draw, text, width), fill=LIGHT.ink, font_size=_FONT)


def _frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], hit: bool) -> None:
    left, top, right, bottom = box
    if hit:
        draw.rectangle(box, outline=_HIT, width=_FRAME)
        return
    for start in range(left, right, 2 * _DASH):
        for y in (top, bottom - _FRAME + 1):
            draw.rectangle((start, y, min(start + _DASH, right), y + _FRAME - 1), fill=_MISS)
    for start in range(top, bottom, 2 * _DASH):
        for x in (left, right - _FRAME + 1):
            draw.rectangle((x, start, x + _FRAME - 1, min(start + _DASH, bottom)), fill=_MISS)


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, or as much of its end as fits behind dots: file names differ at their ends."""
    text = text if text.isprintable() else ascii(text)
    if draw.textlength(text, font_size=_FONT) <= width:
        return text
    while text and draw.textlength(f"...{text}", font_size=_FONT) > width:
        text = text[1:]
    return f"...{text}"
