"""What clients did as parts of figures: each its own curve and row of marks, or what they cover where they are many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from fedklpr_jax.figures import MARKS, Band, Bars, Curve, Panel, Plot, Style, printable

MANY = 12
"""Up to so many clients have a curve and a row of marks each; of more a panel shows the bands they cover."""

Line = tuple[str, Sequence[tuple[float, float]]]
"""A client and (x, y) of points to join."""


def values_of(events: Sequence[Mapping[str, Any]], client: str | None, key: str) -> list[tuple[float, float]]:
    """(round, value) of one client, or of the mean over clients for None, where there is a value."""
    found = {}
    for event in events:
        row = event.get("mean") if client is None else event.get("clients", {}).get(client)
        if row and row.get(key) is not None:
            found[event["round"]] = row[key]
    return sorted(found.items())


def client_panel(
    ylabel: str, lines: Sequence[Line], styles: Mapping[str, Style], means: Sequence[Curve] = ()
) -> list[Panel]:
    """One panel with lines of clients, or with what they cover where they are many; none for no line and no mean.

    A client may have several lines. Bands get the mean over the clients at each x where `means` has no other.
    """
    shown = dict.fromkeys(client for client, _ in lines)
    if len(shown) <= MANY:
        # Only a legend of few clients stands beside the figures.
        names = {client: printable(client, place) for place, client in enumerate(styles)} if len(styles) > MANY else {}
        curves = []
        for client, points in lines:
            x, y = zip(*points, strict=True)
            curves.append(Curve(list(x), list(y), styles[client], names.pop(client, "")))
        return [Panel(ylabel, [*curves, *means])] if curves or means else []
    values: dict[float, list[float]] = {}
    for _, points in lines:
        for place, value in points:
            values.setdefault(place, []).append(value)
    at = sorted(values)
    least, low, high, most = ([float(np.percentile(values[place], part)) for place in at] for part in (0, 25, 75, 100))
    mean = Curve(at, [float(np.mean(values[place])) for place in at], None, "mean")
    bands = [Band(at, least, most, "all clients"), Band(at, low, high, "middle half", strong=True)]
    return [Panel(ylabel, means or [mean], bands=bands)]


def round_panel(
    events: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], key: str, ylabel: str, scale: float = 1.0,
    means: Sequence[Curve] = (),
) -> list[Panel]:
    """One panel with the values `key` of every client, or none if no client has a value."""
    lines = [(client, [(x, scale * y) for x, y in points])
             for client in styles if (points := values_of(events, client, key))]
    return client_panel(ylabel, lines, styles, means)


def epochs_of(rounds: Sequence[Mapping[str, Any]], client: str, key: str) -> list[tuple[float, float | None]]:
    """(round + part of its epochs that were done, value) of one client; None where an epoch has no value."""
    found: list[tuple[float, float | None]] = []
    for event in rounds:
        values = event.get("clients", {}).get(client, {}).get(key) or []
        found += [(event["round"] + epoch / len(values), value) for epoch, value in enumerate(values)]
    return sorted(found, key=lambda point: point[0])


def epoch_panel(
    rounds: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], key: str, ylabel: str, scale: float = 1.0
) -> list[Panel]:
    """One panel with the epochs of every client, a line for each stretch of epochs that have a value."""
    lines: list[Line] = []
    for client in styles:
        for known, stretch in groupby(epochs_of(rounds, client, key), key=lambda point: point[1] is not None):
            if known:
                lines.append((client, [(x, scale * (value or 0.0)) for x, value in stretch]))
    return client_panel(ylabel, lines, styles)


def _counted(marks: Mapping[str, Mapping[float, str]]) -> list[Panel]:
    """How many clients have each mark at each x, as stacked bars: what stands for rows of marks of many clients."""
    at = sorted({x for row in marks.values() for x in row})
    found = [mark for mark in MARKS if any(mark in row.values() for row in marks.values())]
    width = 0.8 * min([1.0, *np.diff(at)])
    bars = [
        Bars(at, [sum(row.get(x) == mark for row in marks.values()) for x in at], MARKS[mark][1], mark, width)
        for mark in found
    ]
    return [Panel("clients", bars=bars)] if bars else []


def marked(
    title: str, caption: str, panels: Sequence[Panel], xlabel: str, marks: Mapping[str, Mapping[float, str]], label: str
) -> Plot:
    """A plot with a row of marks for each client, or with their counts where the clients are many."""
    if len(marks) > MANY and panels:
        return Plot(title, caption, [*panels, *_counted(marks)], xlabel)
    return Plot(title, caption, panels, xlabel, marks, label if marks else "")
