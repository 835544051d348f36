"""Which figures a run has: the events of its log as curves, bands, bars and marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedklpr_jax.figures import COLOURS, Bars, Curve, Panel, Plot, Style
from fedklpr_jax.metrics import METRIC_TITLES, MOST_ROWS, headline_metric, show
from fedklpr_jax.panels import MANY, epoch_panel, epochs_of, marked, round_panel, values_of

PHASES = {
    "embedding": "#0072B2",
    "clustering": "#E69F00",
    "training": "#009E73",
    "pruning": "#CC79A7",
    "aggregation": "#D55E00",
    "wire": "#56B4E9",
}
"""What a round spends its time on, in the order of the stack, with colours of Okabe and Ito."""


def _accuracy(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]
) -> list[Panel]:
    panels = []
    for key in ("rank1", "map", "accuracy"):
        means = []
        for events, stage, dashed in ((before, "before", False), (after, "after", True)):
            pooled = values_of(events, None, "pooled") if key == "accuracy" else []
            points = pooled or values_of(events, None, key)
            if points:
                label = f"{'all images' if pooled else 'mean'} {stage}"
                means.append(Curve([x for x, _ in points], [100 * y for _, y in points], None, label, dashed))
        panels += round_panel(before, styles, key, f"{METRIC_TITLES[key]} (%)", 100, means)
    return panels


def _accuracy_per_megabyte(before: Sequence[Mapping[str, Any]]) -> list[Panel]:
    curves = []
    pooled = any((event.get("mean") or {}).get("pooled") is not None for event in before)
    for key, dashed in (("rank1", False), ("map", True), ("pooled" if pooled else "accuracy", False)):
        points = sorted(
            (event["bytes_total"] / 1e6, 100 * event["mean"][key])
            for event in before
            if event.get("bytes_total") is not None and (event.get("mean") or {}).get(key) is not None
        )
        # A run that sends nothing has all its accuracy at 0 bytes.
        if points and points[-1][0]:
            curves.append(Curve([x for x, _ in points], [y for _, y in points], None, METRIC_TITLES[key], dashed))
    return [Panel("accuracy (%)" if pooled else "mean accuracy (%)", curves)] if curves else []


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
        *epoch_panel(rounds, styles, "purity", "purity (%)", 100),
        *epoch_panel(rounds, styles, "clusters", "clusters"),
        *epoch_panel(rounds, styles, "clustered", "clustered (%)", 100),
    ]
    # A row for every client, as for the pruning decisions: rows number the clients that the font cannot write.
    idle = {
        client: {x: "no cluster" for x, count in epochs_of(rounds, client, "clusters") if count == 0}
        for client in styles
    }
    return marked(
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


def _clusters(rounds: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]) -> Plot:
    """The groups of clients that share a model at the server; a refused client is in none (-1)."""
    of = {client: {x: int(cluster) for x, cluster in values_of(rounds, client, "cluster") if cluster >= 0}
          for client in styles}
    at = sorted({x for row in of.values() for x in row})
    members = [[row[x] for row in of.values() if x in row] for x in at]
    panels = [Panel("clusters", [Curve(at, [len(set(found)) for found in members])])] if at else []
    marks = {client: {x: f"cluster {cluster + 1}" for x, cluster in row.items()} for client, row in of.items()}
    if len(styles) > MANY and at:
        shares = [100 * max(map(found.count, found)) / len(found) for found in members]
        panels.append(Panel("in the largest (%)", [Curve(at, shares)]))
        marks = {}
    return Plot(
        "Clusters of clients", "Clients in one cluster share a model at the server; numbers are new in every round.",
        panels, "round (the first is 0)", marks if at else {}, "clusters",
    )  # fmt: skip


def _training_time(rounds: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]) -> Plot:
    """Seconds of each client, or the mean of each capacity where clients differ in it."""
    # The first round compiles, so that it says nothing of the others.
    usual = rounds[1:] or rounds
    seconds: dict[float, dict[float, list[float]]] = {}
    for event in usual:
        for row in event.get("clients", {}).values():
            if row.get("train_seconds") is not None and row.get("capacity") is not None:
                seconds.setdefault(row["capacity"], {}).setdefault(event["round"], []).append(row["train_seconds"])
    if not seconds:
        panels = round_panel(usual, styles, "train_seconds", "seconds")
        return Plot("Training time per client", "Of one client and round.", panels, "round (the first is 0)")
    curves = [
        Curve(sorted(row), [float(np.mean(row[x])) for x in sorted(row)],
              Style(COLOURS[place % len(COLOURS)], "osD^v"[place % 5]), f"capacity {capacity:g}")
        for place, (capacity, row) in enumerate(sorted(seconds.items(), reverse=True))
    ]
    whole = {capacity: np.mean([value for values in row.values() for value in values])
             for capacity, row in sorted(seconds.items(), reverse=True)}
    caption = "Mean over the clients of a capacity (share of the channels): " + ", ".join(
        f"{capacity:g} {show(float(value), digits=2)} s" for capacity, value in whole.items())
    return Plot("Training time per client", f"{caption}.", [Panel("seconds", curves)], "round (the first is 0)")


def distribution(summary: Mapping[str, Any]) -> list[Plot]:
    """How the results of many clients are spread, before and after local fine-tuning; nothing for few clients.

    Args:
        summary: what `summary.json` holds.
    """
    if len(summary["clients"]) <= MOST_ROWS:
        return []
    key, edges = headline_metric(summary["mean"]), np.arange(0, 101, 5)
    after = (summary.get("after") or {}).get("clients") or {}
    panels, captions = [], []
    for stage, rows, colour in (("before", summary["clients"], COLOURS[0]), ("after", after, COLOURS[2])):
        values = [100 * row[key] for row in rows.values() if row.get(key) is not None]
        if values:
            heights = np.histogram(values, edges)[0].tolist()
            bars = Bars((edges[:-1] + 2.5).tolist(), heights, colour, f"{stage} local fine-tuning", 4.6)
            panels.append(Panel("clients", bars=[bars]))
            least, median, most = np.percentile(values, (0, 50, 100))
            captions.append(f"{stage} local fine-tuning {least:.1f} to {most:.1f} %, median {median:.1f} %")
    title = f"{METRIC_TITLES[key]} of the clients"
    return [Plot(title, f"From the worst to the best: {'; '.join(captions)}.", panels, "%")] if panels else []


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
        *round_panel(rounds, styles, "klaw", "KLAW a (nat)"),
        *round_panel(rounds, styles, "praw", "PRAW b"),
        *round_panel(rounds, styles, "cdw", "CDW d (1 - cos)"),
        *round_panel(rounds, styles, "weight", "final weight"),
    ]
    scores = [
        *round_panel(rounds, styles, "score_download", "downloaded (%)", 100),
        *round_panel(rounds, styles, "score_current", "trained (%)", 100),
        *round_panel(rounds, styles, "score_candidate", "pruned (%)", 100),
    ]
    done, index = "rounds completed", "round (the first is 0)"
    classifies = any((event.get("mean") or {}).get("pooled") is not None for event in evals)
    thick = "all test images together" if classifies else "their mean"
    colour = "bands" if len(styles) > MANY else "colour"
    plots = [
        Plot("Accuracy per round", f"Clients in {colour}, {thick} thick.", _accuracy(before, after, styles), done),
        Plot("Accuracy against bytes exchanged",
             f"{'Over all test images' if classifies else 'Mean over clients'}; both directions, all clients.",
             _accuracy_per_megabyte(before), "MB exchanged", whole=False),
        marked("Density", "Kept part of the prunable weights, and what pruning did in each round.",
               round_panel(rounds, styles, "density", "density (kept / prunable)"), index, _decisions(rounds, styles),
               "pruning decision"),
        # One that trains alone counts all.
        Plot("Aggregation weights", "What each client's upload counts in the server's mean.",
             weights if any(len(event.get("clients", {})) > 1 for event in rounds) else [], index),
        Plot("Validation scores", "Before training, after it, and under the proposed mask.", scores, index),
        Plot("Training loss", "Mean over the round's steps.", round_panel(rounds, styles, "loss", "loss"), index),
        _pseudo_labels(rounds, styles),
        Plot("Own elements", "Share of the shared model's elements that a client keeps from its own training.",
             round_panel(rounds, styles, "personal", "own (%)", 100), index),
        _clusters(rounds, styles),
        _time_split(rounds),
        _training_time(rounds, styles),
    ]
    return [plot for plot in plots if plot.panels]
