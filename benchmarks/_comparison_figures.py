"""Figures of a comparison: accuracy against megabytes, accuracy per round, and every client's accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from benchmarks._comparison import Result, Results, headline, look_up, numbers
from benchmarks._figures import Name, dress, names_beside, new_page, png
from fedklpr_jax.figures import LIGHT, Style, client_styles
from fedklpr_jax.metrics import METRIC_TITLES

_CURVES = 8  # in one panel: more colours cannot be told apart
_BARS = 160  # in one row
_HATCHES = ("", "////", "....", "xxxx", "----")


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other one beats: none has at most as many bytes and at least the accuracy, and differs in one.

    Args:
      points: by name (bytes, accuracy).

    Returns:
      The names by bytes, the fewest first.

    >>> pareto_front({"a": (1.0, 0.5), "b": (2.0, 0.4), "c": (2.0, 0.6), "d": (3.0, 0.6)})
    ['a', 'c']
    """

    def beaten(name: str) -> bool:
        size, accuracy = points[name]
        return any(s <= size and a >= accuracy and (s, a) != (size, accuracy) for s, a in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def _rows(names: Sequence[str], longest: int) -> list[Sequence[str]]:
    """Names in rows of at most `longest`, as equal as rows of one length and a shorter last one can be.

    >>> _rows("abcde", 4)
    ['abc', 'de']
    """
    each = -(-len(names) // -(-len(names) // longest))
    return [names[start : start + each] for start in range(0, len(names), each)]


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def front_figure(results: Results, title: str) -> bytes | None:
    """Accuracy before local fine-tuning against megabytes, with deviations over seeds; None without a point."""
    key = headline(results)
    found = {
        method: (numbers(runs, "bytes", "total", scale=1e-6), numbers(runs, "mean", str(key), scale=100))
        for method, runs in results.items()
    }
    points = {
        method: (float(np.mean(sizes)), float(np.mean(scores)))
        for method, (sizes, scores) in found.items()
        if sizes and scores
    }
    if key is None or not points:
        return None
    front = pareto_front(points)
    styles = client_styles(list(results))
    page = new_page(8, max(4.0, 0.2 * len(points) + 1))
    axes = page.subplots()
    dress(axes, f"{title}; Pareto front dashed, in bold type", "MB exchanged", f"{METRIC_TITLES[key]} (%)")
    steps = [points[name] for name in front]
    # To the right end: more bytes never cost accuracy.
    end = max(size for size, _ in points.values())
    axes.plot(
        [*(size for size, _ in steps), end], [*(score for _, score in steps), steps[-1][1]], color=LIGHT.ink,
        linestyle="--", linewidth=1, drawstyle="steps-post", zorder=1,
    )  # fmt: skip
    names = []
    for method, (size, score) in points.items():
        sizes, scores = found[method]
        style = styles[method]
        axes.errorbar(
            size, score, xerr=_deviation(sizes), yerr=_deviation(scores), color=style.colour, marker=style.marker,
            markersize=6, elinewidth=0.8, zorder=2,
        )  # fmt: skip
        names.append(Name(method, size, score, style.colour, method in front))
    # From zero, so that the figure does not blow up differences of a thousandth.
    axes.set_xlim(-0.03 * end, 1.05 * end or 1.0)
    names_beside(axes, names)
    return png(page)


def _curves(runs: Sequence[Result], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Rounds [r] that every run was evaluated at, and the values in per cent there, float64 [seeds, r]."""
    known = [{round_: row[key] for round_, row in run.curve.items() if row.get(key) is not None} for run in runs]
    rounds = sorted(set.intersection(*map(set, known))) if known else []
    return np.array(rounds), np.array([[100 * curve[round_] for round_ in rounds] for curve in known])


def rounds_figure(results: Results, title: str) -> bytes | None:
    """Accuracy per round: the mean over seeds and a band of a standard deviation; None without a curve."""
    key = str(headline(results))
    curves = {method: curve for method, runs in results.items() if (curve := _curves(runs, key))[0].size}
    if not curves:
        return None
    panels = _rows(list(curves), _CURVES)
    styles = client_styles(list(results))
    page = new_page(8, 0.4 + 4.0 * len(panels))
    grid = page.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, shown in zip(grid, panels, strict=True):
        last = axes is grid[-1]
        dress(axes, title if axes is grid[0] else "", "rounds" if last else "", f"{METRIC_TITLES[key]} (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        names = []
        for method in shown:
            rounds, values = curves[method]
            mean, style = values.mean(axis=0), styles[method]
            axes.plot(
                rounds, mean, color=style.colour, marker=style.marker, markersize=4, linewidth=1.4,
                # A marker on each of many rounds would hide the line.
                markevery=max(1, len(rounds) // 12),
            )  # fmt: skip
            if len(values) > 1:
                band = values.std(axis=0, ddof=1)
                axes.fill_between(rounds, mean - band, mean + band, color=style.colour, alpha=0.15, linewidth=0)
            names.append(Name(method, float(rounds[-1]), float(mean[-1]), style.colour))
        names_beside(axes, names)
    return png(page)


def _styled(methods: Sequence[str]) -> dict[str, tuple[Style, str]]:
    """Per method its style and, since bars have no marker, a hatch once the colours are used up."""
    styles = client_styles(methods)
    used: dict[str, int] = {}
    found = {}
    for method, style in styles.items():
        found[method] = style, _HATCHES[used.setdefault(style.colour, 0) % len(_HATCHES)]
        used[style.colour] += 1
    return found


def clients_figure(results: Results, title: str) -> bytes | None:
    """Every client's accuracy before local fine-tuning, the methods side by side; None without a client."""
    key = str(headline(results))
    values = {
        method: {
            client: numbers(runs, "clients", client, key, scale=100)
            for run in runs
            for client, row in run.summary["clients"].items()
            if look_up(row, key) is not None
        }
        for method, runs in results.items()
    }
    values = {method: rows for method, rows in values.items() if rows}
    clients = list(dict.fromkeys(client for rows in values.values() for client in rows))
    if not clients:
        return None
    rows = _rows(clients, max(1, _BARS // (len(values) + 1)))
    each = len(rows[0])
    styles = _styled(list(results))
    height = 1.8 if len(rows) < 5 else 1.2
    page = new_page(max(7.0, min(12.0, 1.5 + 0.13 * each * (len(values) + 1))), 1.0 + height * len(rows))
    grid = page.subplots(len(rows), 1, sharey=True, squeeze=False)[:, 0]
    width = 1 / (len(values) + 1)
    for axes, shown in zip(grid, rows, strict=True):
        dress(axes, ylabel=f"{METRIC_TITLES[key]} (%)")
        axes.grid(False, axis="x")
        for place, (method, found) in enumerate(values.items()):
            style, hatch = styles[method]
            here = [(x, found[client]) for x, client in enumerate(shown) if client in found]
            axes.bar(
                [x + (place + 1) * width - 0.5 for x, _ in here], [np.mean(scores) for _, scores in here], width=width,
                yerr=[_deviation(scores) for _, scores in here], color=style.colour, hatch=hatch,
                edgecolor=LIGHT.face, linewidth=0.3, error_kw={"elinewidth": 0.6, "ecolor": LIGHT.ink}, label=method,
            )  # fmt: skip
        axes.set_xlim(-0.55, each - 0.45)
        axes.set_xticks(range(len(shown)))
        long = max(map(len, shown)) * len(shown) > 90
        axes.set_xticklabels(
            shown, parse_math=False, fontsize=8, rotation=45 if long else 0, ha="right" if long else "center"
        )
    handles, labels = grid[0].get_legend_handles_labels()
    page.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=8,
                title=title, title_fontsize=10)
    return png(page)
