"""Figures as small PNGs, in a light and a dark theme.

Colours are six of Okabe and Ito's set for colour-blind readers (2008), a violet and a grey; every client also has a
marker. Drawn on matplotlib's Agg canvas through its object API: no global state, and equal input gives equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A63D2", "#8A8A8A")
MARKERS = {
    "o": "M8 5a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "s": "M8 2h6v6h-6z",
    "^": "M11 1.5l3.5 6.5h-7z",
    "D": "M11 1l4 4l-4 4l-4-4z",
    "v": "M11 8.5l3.5-6.5h-7z",
}
"""Matplotlib markers and the same shapes as SVG paths in a box of 22 x 10, centred at (11, 5)."""

MARKS = {
    "accepted": ("o", "#009E73"),
    "rejected": ("x", "#D55E00"),
    "recovered": ("^", "#0072B2"),
    "halted": ("s", "#CC79A7"),
    "target": ("*", "#E69F00"),
    "no cluster": ("x", "#D55E00"),
    **{f"cluster {number + 1}": (tuple(MARKERS)[number % len(MARKERS)], COLOURS[number]) for number in range(8)},
}
"""Marker and colour of each pruning decision (`none` is left blank), of an epoch without a pseudo label, and of the
clusters of clients."""

_WIDTH = 4.8  # inches: read at about its own size in one column of a phone and in two of a desktop
_DPI = 200


@dataclass(frozen=True)
class Theme:
    """Colours of page and figure: `face` behind, `ink` in front, `faint` for the grid."""

    face: str
    ink: str
    faint: str


LIGHT = Theme(face="#ffffff", ink="#1c2024", faint="#d9dde2")
DARK = Theme(face="#1b1f24", ink="#e8eaed", faint="#3a4149")


@dataclass(frozen=True)
class Style:
    """How a client looks in every figure: `colour` as #rrggbb, `marker` a key of `MARKERS`."""

    colour: str
    marker: str


def client_styles(names: Sequence[str]) -> dict[str, Style]:
    """A style per client, by its place in `names`; the first 40 are distinct.

    >>> client_styles(["a", "b"])["b"]
    Style(colour='#D55E00', marker='s')
    """
    markers = tuple(MARKERS)
    return {
        name: Style(COLOURS[place % len(COLOURS)], markers[place % len(markers)]) for place, name in enumerate(names)
    }


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        x: positions.
        y: values, as many.
        style: a client's colour and marker; None is the theme's ink, drawn thick (a mean).
        label: entry of the legend; empty for none.
        dashed: dashes instead of a full line.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: Style | None = None
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """What many curves cover, where they are too many to tell apart.

    Attributes:
        x: positions.
        low: lower edge, as many.
        high: upper edge.
        label: entry of the legend.
        strong: darker than the band that lies behind it.
    """

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    label: str
    strong: bool = False


@dataclass(frozen=True)
class Bars:
    """One layer of stacked bars.

    Attributes:
        x: positions; the same in every layer of a panel.
        y: heights, as many.
        colour: as #rrggbb.
        label: entry of the legend; empty for none.
        width: of a bar, in units of x.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    label: str
    width: float = 0.8


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what `y` measures, with its unit, and what is in it: curves, layers of bars (lowest first) and
    bands (lowest first, behind the curves)."""

    ylabel: str
    curves: Sequence[Curve] = ()
    bars: Sequence[Bars] = ()
    bands: Sequence[Band] = ()


@dataclass(frozen=True)
class Plot:
    """One figure: panels one above the other over a shared x axis.

    Attributes:
        title: what it shows.
        caption: how to read it.
        panels: each with at least one curve, layer of bars or band.
        xlabel: name of the x axis, with its unit.
        marks: per client what happened at which x (keys of `MARKS`, or `none`), as rows of marks below the panels;
            empty for no such rows.
        marks_label: what the marks are.
        whole: whether x counts rounds, so that its ticks are whole numbers.
    """

    title: str
    caption: str
    panels: Sequence[Panel]
    xlabel: str
    marks: Mapping[str, Mapping[float, str]] = field(default_factory=dict)
    marks_label: str = ""
    whole: bool = True


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.face)
    axes.tick_params(colors=theme.ink, labelsize=9, length=3)
    axes.grid(True, color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)


def _curve(axes: Axes, curve: Curve, theme: Theme) -> None:
    axes.plot(
        curve.x,
        curve.y,
        color=curve.style.colour if curve.style else theme.ink,
        linewidth=1.4 if curve.style else 2.4,
        linestyle="--" if curve.dashed else "-",
        marker=curve.style.marker if curve.style else "D" if curve.dashed else "o",
        markersize=4.5,
        markerfacecolor=theme.face if curve.dashed else None,
        zorder=2 if curve.style else 3,
        # A marker on each of many rounds would hide the lines.
        markevery=max(1, len(curve.x) // 12),
        label=curve.label or None,
    )


def printable(name: str, place: int) -> str:
    """A client's name if the font has its letters, else its number in the report's legend; at most 15 letters.

    >>> printable("ward", 0), printable("\u884c\u4eba", 1)
    ('ward', 'client 2')
    """
    short = name if len(name) <= 15 else name[:14] + "…"
    return short if name.isprintable() and all(ord(letter) < 0x250 for letter in name) else f"client {place + 1}"


def _bars(axes: Axes, layers: Sequence[Bars], theme: Theme) -> None:
    bottom = np.zeros(len(layers[0].x))
    # A thin gap parts the layers for those who see their colours alike; between many bars it would eat them.
    gap = 0.5 if len(bottom) <= 40 else 0.0
    for layer in layers:
        axes.bar(
            layer.x, layer.y, width=layer.width, bottom=bottom, color=layer.colour, edgecolor=theme.face, linewidth=gap,
            label=layer.label or None,
        )
        bottom = bottom + np.asarray(layer.y)


def _band(axes: Axes, band: Band) -> None:
    colour, alpha = COLOURS[0], 0.4 if band.strong else 0.2
    if len(band.x) == 1:
        # Between two edges of one point there is no area.
        axes.plot([band.x[0]] * 2, [band.low[0], band.high[0]], color=colour, alpha=alpha, linewidth=8,
                  solid_capstyle="butt", label=band.label)
    else:
        axes.fill_between(band.x, band.low, band.high, color=colour, alpha=alpha, linewidth=0, label=band.label)


def _mark_rows(axes: Axes, plot: Plot, height: float, theme: Theme) -> None:
    rows = plot.marks
    # Marks of many rounds and names of many clients must not run into each other.
    size = min(5.0, max(1.5, 250 / max(1, *(len(marks) for marks in rows.values()))))
    font = min(9.0, 0.7 * 72 * height / len(rows))
    for mark, (marker, colour) in MARKS.items():
        at = [(when, row) for row, marks in enumerate(rows.values()) for when, what in marks.items() if what == mark]
        if at:
            x, y = zip(*at, strict=True)
            axes.scatter(x, y, s=size**2, marker=marker, color=colour, linewidths=size / 4, label=mark, zorder=3)
    axes.set_yticks(range(len(rows)))
    # A dollar sign in a name starts no formula.
    labels = [printable(name, place) for place, name in enumerate(rows)]
    axes.set_yticklabels(labels, parse_math=False, fontsize=font)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_ylabel(plot.marks_label, color=theme.ink, fontsize=10)


def draw(plot: Plot, theme: Theme) -> bytes:
    """The bytes of a PNG, 960 pixels wide."""
    panels, rows = plot.panels, plot.marks
    heights = [2.6 if len(panels) == 1 else 1.9] * len(panels)
    if rows:
        heights.append(max(1.0, min(0.2 * len(rows) + 0.4, 8.0)))
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.8), dpi=_DPI, facecolor=theme.face, layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes in grid:
        _dress(axes, theme)
    for axes, panel in zip(grid, panels, strict=False):
        for band in panel.bands:
            _band(axes, band)
        for curve in panel.curves:
            _curve(axes, curve, theme)
        if panel.bars:
            _bars(axes, panel.bars, theme)
        axes.set_ylabel(panel.ylabel, color=theme.ink, fontsize=10)
    if rows:
        _mark_rows(grid[-1], plot, heights[-1], theme)
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            legend = axes.legend(
                handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize=9,
                labelcolor=theme.ink, borderaxespad=0.1, handletextpad=0.4, columnspacing=1.2,
            )
            for text in legend.get_texts():
                text.set_parse_math(False)
    grid[-1].set_xlabel(plot.xlabel, color=theme.ink, fontsize=10)
    grid[-1].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=plot.whole))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Pillow writes no date and no program name, and a palette of 128 colours makes a third of the bytes.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    packed = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return packed.getvalue()
