"""Figures of the ablation and of comparisons: a page in the light theme, names beside the axes, and the PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedklpr_jax.figures import LIGHT


@dataclass(frozen=True)
class Name:
    """What stands beside the axes for the point (x, y): in `colour`, and in bold type where `bold`."""

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False


def new_page(width: float, height: float) -> Figure:
    """An empty page; sizes in inches."""
    return Figure(figsize=(width, height), dpi=150, facecolor=LIGHT.face, layout="constrained")


def dress(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Grid, title and names of the axes."""
    axes.grid(True, color=LIGHT.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, color=LIGHT.ink, fontsize=10, parse_math=False)
    axes.set_xlabel(xlabel, color=LIGHT.ink)
    axes.set_ylabel(ylabel, color=LIGHT.ink)


def spread_out(heights: Sequence[float], step: float) -> list[float]:
    """Heights from 0 to 1 in rising order, moved as little as a walk up and one down need to be `step` apart.

    >>> spread_out([0.5, 0.5, 1.0], 0.25)
    [0.5, 0.75, 1.0]
    """
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + step if places else 0.0))
    top = 1.0
    for number in reversed(range(len(places))):
        places[number] = min(places[number], top)
        top = places[number] - step
    return places


def names_beside(axes: Axes, names: Sequence[Name]) -> None:
    """Names in a column to the right of the axes, each with a line to its point.

    At the points, many of which lie close together, they would overlap.
    """
    low, high = axes.get_ylim()
    rising = sorted(names, key=lambda name: name.y)
    # No further apart than lines of text need to be.
    step = min(0.06, 1 / max(1, len(names)))
    places = spread_out([(name.y - low) / (high - low) for name in rising], step)
    for place, name in zip(places, rising, strict=True):
        axes.annotate(
            name.text, (name.x, name.y), (1.06, place), textcoords="axes fraction", fontsize=8,
            color=name.colour, va="center", weight="bold" if name.bold else "normal", parse_math=False,
            arrowprops={"arrowstyle": "-", "color": name.colour, "linewidth": 0.4, "relpos": (0, 0.5)},
        )  # fmt: skip


def png(page: Figure) -> bytes:
    """The page as a PNG; equal pages give equal bytes."""
    file = io.BytesIO()
    FigureCanvasAgg(page).print_png(file, metadata={"Software": None})
    return file.getvalue()
