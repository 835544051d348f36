"""Which figures a run has: the events of its log as curves, bars and marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from fedklpr_jax.figures import Bars, Curve, Panel, Plot, Style
from fedklpr_jax.metrics import METRIC_TITLES, show

PHASES = {
    "embedding": "#0072B2",
    "clustering": "#E69F00",
    "training": "#009E73",
    "pruning": "#CC79A7",
    "aggregation": "#D55E00",
    "wire": "#56B4E9",
}
"""What a round spends its time on, in the order of the stack, with colours of Okabe and Ito."""


def _points(events: Sequence[Mapping[str, Any]], client: str | None, key: str) -> list[tuple[float, float]]:
    """(round, value) of one client, or of the mean over clients for None, where there is a value."""
    found = {}
    for event in events:
        row = event.get("mean") if client is None else event.get("clients", {}).get(client)
        if row and row.get(key) is not None:
            found[event["round"]] = row[key]
    return sorted(found.items())


def _panel(
    events: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], key: str, ylabel: str, scale: float = 1.0
) -> list[Panel]:
    """One panel with a curve per client, or none if no client has a value."""
    curves = []
    for client, style in styles.items():
        points = _points(events, client, key)
        if points:
            curves.append(Curve([x for x, _ in points], [scale * y for _, y in points], style))
    return [Panel(ylabel, curves)] if curves else []


def _accuracy(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]
) -> list[Panel]:
    panels = []
    for key in ("rank1", "map", "accuracy"):
        ylabel = f"{METRIC_TITLES[key]} (%)"
        curves = [curve for panel in _panel(before, styles, key, ylabel, 100) for curve in panel.curves]
        for events, label, dashed in ((before, "mean before", False), (after, "mean after", True)):
            points = _points(events, None, key)
            if points:
                curves.append(Curve([x for x, _ in points], [100 * y for _, y in points], None, label, dashed))
        if curves:
            panels.append(Panel(ylabel, curves))
    return panels


def _accuracy_per_megabyte(before: Sequence[Mapping[str, Any]]) -> list[Panel]:
    curves = []
    for key, dashed in (("rank1", False), ("map", True), ("accuracy", False)):
        points = sorted(
            (event["bytes_total"] / 1e6, 100 * event["mean"][key])
            for event in before
            if event.get("bytes_total") is not None and (event.get("mean") or {}).get(key) is not None
        )
        if points:
            curves.append(Curve([x for x, _ in points], [y for _, y in points], None, METRIC_TITLES[key], dashed))
    return [Panel("mean accuracy (%)", curves)] if curves else []


def _decisions(rounds: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]) -> dict[str, dict[float, str]]:
    rows = {
        client: {
            event["round"]: event["clients"][client]["decision"]
            for event in rounds
            if event.get("clients", {}).get(client, {}).get("decision")
        }
        for client in styles
    }
    return rows if any(rows.values()) else {}


def _epochs(rounds: Sequence[Mapping[str, Any]], client: str, key: str) -> list[tuple[float, float | None]]:
    """(round + part of its epochs that were done, value) of one client; None where an epoch has no value."""
    found: list[tuple[float, float | None]] = []
    for event in rounds:
        values = event.get("clients", {}).get(client, {}).get(key) or []
        found += [(event["round"] + epoch / len(values), value) for epoch, value in enumerate(values)]
    return sorted(found, key=lambda point: point[0])


def _epoch_panel(
    rounds: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], key: str, ylabel: str, scale: float = 1.0
) -> list[Panel]:
    """One panel with the epochs of every client, a curve for each stretch of epochs that have a value."""
    curves = []
    for client, style in styles.items():
        for known, stretch in groupby(_epochs(rounds, client, key), key=lambda point: point[1] is not None):
            if known:
                x, y = zip(*stretch, strict=True)
                curves.append(Curve(x, [scale * value for value in y], style))
    return [Panel(ylabel, curves)] if curves else []


def idle_epochs(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(client, round, epoch), both from 0, where clustering found no cluster, in the order of the run.

    Args:
        rounds: the `round` events of `metrics.jsonl`.

    >>> idle_epochs([{"round": 3, "clients": {"a": {"clusters": [7, 0]}, "b": {}}}])
    [('a', 3, 1)]
    """
    return [
        (client, event["round"], epoch)
        for event in rounds
        for client, row in event.get("clients", {}).items()
        for epoch, count in enumerate(row.get("clusters") or [])
        if count == 0
    ]


def _pseudo_labels(rounds: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]) -> Plot:
    panels = [
        *_epoch_panel(rounds, styles, "purity", "purity (%)", 100),
        *_epoch_panel(rounds, styles, "clusters", "clusters"),
        *_epoch_panel(rounds, styles, "clustered", "clustered (%)", 100),
    ]
    # A row for every client, as for the pruning decisions: rows number the clients that the font cannot write.
    idle = {
        client: {x: "no cluster" for x, count in _epochs(rounds, client, "clusters") if count == 0}
        for client in styles
    }
    return Plot(
        "Pseudo labels",
        "Per local epoch: images that share their cluster's commonest identity (known for this figure only), number of "
        "clusters, and images in a cluster.",
        panels, "round (the first is 0), with its epochs", idle if any(idle.values()) else {}, "idle epochs",
    )  # fmt: skip


def _time_split(rounds: Sequence[Mapping[str, Any]]) -> Plot:
    timed = sorted((event["round"], event["split"]) for event in rounds if event.get("split"))
    phases = [phase for phase in PHASES if any(split.get(phase) is not None for _, split in timed)]
    bars = [
        Bars([round_ for round_, _ in timed], [split.get(phase) or 0.0 for _, split in timed], PHASES[phase], phase)
        for phase in phases
    ]
    # The first round compiles, so that it says nothing of the others.
    usual = timed[1:] or timed
    means = {phase: sum(split.get(phase) or 0.0 for _, split in usual) / len(usual) for phase in phases}
    whole = sum(means.values())
    caption = f"Mean{' without the first round, which compiles' if len(timed) > 1 else ''}: " + ", ".join(
        f"{phase} {show(value)} s" + (f" ({show(value / whole, 100, 0)} %)" if whole else "")
        for phase, value in means.items()
    ) + "."
    return Plot("Time per round", caption, [Panel("seconds", bars=bars)] if bars else [], "round (the first is 0)")


def run_plots(events: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]) -> list[Plot]:
    """The figures for which a run has data.

    Args:
        events: of `metrics.jsonl`.
        styles: per client, in the order of the legend.
    """
    rounds = [event for event in events if event.get("event") == "round"]
    evals = [event for event in events if event.get("event") == "eval"]
    before = [event for event in evals if event.get("stage") == "before"]
    after = [event for event in evals if event.get("stage") == "after"]
    weights = [
        *_panel(rounds, styles, "klaw", "KLAW a (nat)"),
        *_panel(rounds, styles, "praw", "PRAW b"),
        *_panel(rounds, styles, "weight", "final weight"),
    ]
    scores = [
        *_panel(rounds, styles, "score_download", "downloaded (%)", 100),
        *_panel(rounds, styles, "score_current", "trained (%)", 100),
        *_panel(rounds, styles, "score_candidate", "pruned (%)", 100),
    ]
    done, index = "rounds completed", "round (the first is 0)"
    plots = [
        Plot("Accuracy per round", "Clients in colour, their mean thick.", _accuracy(before, after, styles), done),
        Plot("Accuracy against bytes exchanged", "Mean over clients; both directions, all clients.",
             _accuracy_per_megabyte(before), "MB exchanged", whole=False),
        Plot("Density", "Kept part of the prunable weights, and what pruning did in each round.",
             _panel(rounds, styles, "density", "density (kept / prunable)"), index, _decisions(rounds, styles),
             "pruning decision"),
        Plot("Aggregation weights", "What each client's upload counts in the server's mean.", weights, index),
        Plot("Validation scores", "Before training, after it, and under the proposed mask.", scores, index),
        Plot("Training loss", "Mean over the round's steps.", _panel(rounds, styles, "loss", "loss"), index),
        _pseudo_labels(rounds, styles),
        _time_split(rounds),
    ]
    return [plot for plot in plots if plot.panels]
