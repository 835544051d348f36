"""The pictures of a report, as HTML: what was found for a query, and which class test pictures were given."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from fedklpr_jax.metrics import show

_MAX_PICTURES = 240  # about 1 MB of ranked lists
_PICTURE_HEIGHT = 136  # pixels: twice what is shown, for dense screens
_SMALL = 64  # pixels


@dataclass(frozen=True, eq=False)
class RankedList:
    """A query picture and the gallery pictures found for it, nearest first.

    Attributes:
        query: uint8 [h, w, 3].
        gallery: uint8 [k, h, w, 3].
        hits: bool [k], True where the person is the query's.
        query_name: what to call the query.
        gallery_names: what to call the k pictures.

    Raises:
        ValueError: dtypes or shapes that do not fit.
    """

    query: np.ndarray
    gallery: np.ndarray
    hits: np.ndarray
    query_name: str
    gallery_names: Sequence[str]

    def __post_init__(self) -> None:
        if self.query.dtype != np.uint8 or self.gallery.dtype != np.uint8:
            raise ValueError(f"pictures are uint8, not {self.query.dtype} and {self.gallery.dtype}")
        if self.query.ndim != 3 or self.query.shape[2] != 3 or self.gallery.shape[1:] != self.query.shape:
            shapes = f"{self.query.shape}, {self.gallery.shape}"
            raise ValueError(f"query is [h, w, 3] and gallery [k, h, w, 3], not {shapes}")
        if not len(self.gallery) == len(self.hits) == len(self.gallery_names):
            raise ValueError(f"{len(self.gallery)} pictures, {len(self.hits)} hits, {len(self.gallery_names)} names")


@dataclass(frozen=True, eq=False)
class ClassifiedPictures:
    """Test pictures of one client and the class its model gave them.

    Attributes:
        pixels: uint8 [k, h, w, 3].
        predicted: names of the k predicted classes.
        actual: names of the k right ones.

    Raises:
        ValueError: dtypes or shapes that do not fit.
    """

    pixels: np.ndarray
    predicted: Sequence[str]
    actual: Sequence[str]

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[3] != 3:
            raise ValueError(f"pictures are uint8 [k, h, w, 3], not {self.pixels.dtype} {self.pixels.shape}")
        if not len(self.pixels) == len(self.predicted) == len(self.actual):
            names = f"{len(self.predicted)} predicted and {len(self.actual)} right classes"
            raise ValueError(f"{len(self.pixels)} pictures, {names}")


def data_uri(kind: str, data: bytes) -> str:
    """An address that holds the picture itself; `kind` is `png` or `jpeg`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _picture(pixels: np.ndarray, name: str, caption: str, kind: str) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((4 * _PICTURE_HEIGHT, _PICTURE_HEIGHT))
    packed = io.BytesIO()
    # The few pixels of a small picture would drown in what JPEG adds.
    form = "png" if image.height <= _SMALL else "jpeg"
    image.save(packed, form.upper(), quality=80, optimize=True)
    return (
        f'<figure class="{kind}"><img src="{data_uri(form, packed.getvalue())}" title="{escape(name)}" '
        f'alt="{escape(caption)}: {escape(name)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def ranked_lists(ranked: Mapping[str, Sequence[RankedList]]) -> str:
    """The section of ranked lists: as many queries of every client as the budget of pictures allows; empty for none.

    Args:
        ranked: per client.
    """
    lists = {client: entries for client, entries in ranked.items() if entries}
    if not lists:
        return ""
    longest = max(1 + len(entry.gallery) for entries in lists.values() for entry in entries)
    each = max(1, _MAX_PICTURES // (longest * len(lists)))
    budget = max(1, _MAX_PICTURES // longest)
    parts, left_out = [], 0
    for client, entries in lists.items():
        chosen = entries[: min(each, budget)]
        budget -= len(chosen)
        left_out += len(entries) - len(chosen)
        if not chosen:
            continue
        parts.append(f'<h3>{escape(client)}</h3><div class="lists">')
        for entry in chosen:
            pictures = [_picture(entry.query, entry.query_name, "query", "query")]
            for rank, (pixels, hit, name) in enumerate(
                zip(entry.gallery, entry.hits, entry.gallery_names, strict=True), start=1
            ):
                pictures.append(_picture(pixels, name, f"{'✓' if hit else '✗'} {rank}", "hit" if hit else "miss"))
            parts.append(f'<div class="ranked">{"".join(pictures)}</div>')
        parts.append("</div>")
    if left_out:
        parts.append(f'<p class="soft">{left_out} more queries were left out to keep this file small.</p>')
    return ('<h2>Ranked lists</h2><div class="card"><p class="soft">✓ and a full green frame: the same person; '
            f'✗ and a dashed red frame: another one.</p>{"".join(parts)}</div>')


def classified_pictures(
    strips: Mapping[str, ClassifiedPictures], clients: Mapping[str, Mapping[str, Any]]
) -> str:
    """The section of test pictures with their predicted classes, within the budget of pictures; empty for none.

    Args:
        strips: per client.
        clients: their results, for the headings.
    """
    shown = {name: strip for name, strip in strips.items() if len(strip.pixels)}
    if not shown:
        return ""
    each = max(1, _MAX_PICTURES // len(shown))
    parts = []
    for name, strip in list(shown.items())[:_MAX_PICTURES]:
        pictures = []
        for pixels, predicted, actual in zip(
            strip.pixels[:each], strip.predicted[:each], strip.actual[:each], strict=True
        ):
            hit = predicted == actual
            caption = f"✓ {actual}" if hit else f"✗ {predicted}\nis {actual}"
            pictures.append(_picture(pixels, f"predicted {predicted}, is {actual}", caption, "hit" if hit else "miss"))
        accuracy = clients.get(name, {}).get("accuracy")
        right = f": {show(accuracy, 100)} % of its test pictures right" if accuracy is not None else ""
        parts.append(f'<h3>{escape(name)}<span class="soft">{right}</span></h3>'
                     f'<div class="ranked classes">{"".join(pictures)}</div>')
    return ('<h2>Test pictures and their predicted classes</h2><div class="card"><p class="soft">Before local '
            "fine-tuning; clients from the best to the worst, pictures evenly spread over a client's test. ✓ and a "
            f'full green frame: the right class; ✗ and a dashed red frame: another one.</p>{"".join(parts)}</div>')
