"""Methods compared: finished runs as Markdown tables and as CSV. `experiments/compare.py` makes the runs.

Metrics are fractions from 0 to 1, in the tables per cent. The runs of a data set are grouped by method, in table order.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import markdown_header, markdown_row, spread
from benchmarks._runs import finished_summary
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.bootstrap import paired_ratio_interval
from fedklpr_jax.metrics import METRIC_TITLES, read_metrics

HEADLINES = ("map", "accuracy")
"""The metric of figures and comparisons: the first of these that a run has."""
STAGES = {
    "start": ("start", "mean"), "before": ("mean",), "after": ("after", "mean"),
    "best_before": ("best", "before"), "best_after": ("best", "after"),
}  # fmt: skip
"""Where `summary.json` holds the mean over clients: of the first model, the last one before and after local
fine-tuning, and the maximum over the tests of the run."""
CLIENTS = {"start": ("start", "clients"), "before": ("clients",), "after": ("after", "clients")}
_COLUMNS = (
    ("start", "{} start", HEADLINES),
    ("before", "{}", ("rank1", "map", "minp", "accuracy", "pooled")),
    ("after", "{} after", ("rank1", "map", "accuracy", "pooled")),
    # Chosen on test data, so only where published tables do the same.
    ("best_before", "{}, max over tests", ("pooled",)),
    ("best_after", "{} after, max over tests", ("pooled",)),
)
FINE_TUNED = " + fine-tuning"


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
      method: name of its row.
      seed: of the run.
      directory: where it lies.
      summary: its `summary.json`.
      curve: per number of rounds done the mean over clients before local fine-tuning, by metric.
    """

    method: str
    seed: int
    directory: Path
    summary: Mapping[str, Any]
    curve: Mapping[int, Mapping[str, Any]]


Results = Mapping[str, Sequence[Result]]


def read_result(method: str, seed: int, directory: Path) -> Result | None:
    """The run in `directory`, None if it is not finished.

    Raises:
      InputError: it is finished, but its files cannot be read.
    """
    summary = finished_summary(directory)
    if summary is None:
        return None
    events = read_metrics(directory / "metrics.jsonl")
    curve = {e["round"]: e["mean"] for e in events if e["event"] == "eval" and e["stage"] == "before"}
    return Result(method, seed, directory, summary, curve)


def fine_tuned(result: Result) -> Result | None:
    """FedAvg + fine-tuning, from a run of FedAvg: what was "after" becomes "before"; None if there is no "after"."""
    summary, after = result.summary, result.summary.get("after")
    if not after:
        return None
    best = (summary.get("best") or {}).get("after")
    moved = {
        "clients": after["clients"], "mean": after["mean"], "after": None, "best": {"before": best} if best else None,
        "average_precisions": summary.get("average_precisions_after"), "average_precisions_after": None,
        # Nobody can train at a site that nobody trains at; and the run's own verdict is about its own row.
        "unseen": None, "failures": [],
    }  # fmt: skip
    return replace(result, method=f"{result.method}{FINE_TUNED}", summary={**summary, **moved}, curve={})


def look_up(node: Any, *path: str) -> Any:
    """What lies in nested mappings at `path`; None where a key is missing.

    >>> look_up({"a": {"b": 1}}, "a", "b"), look_up({"a": None}, "a", "b")
    (1, None)
    """
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def numbers(runs: Iterable[Result], *path: str, scale: float = 1.0) -> list[float]:
    """The numbers at one place of the summaries, of the runs that have one."""
    return [scale * value for run in runs if (value := look_up(run.summary, *path)) is not None]


def headline(results: Results) -> str | None:
    """The metric of figures and comparisons, None without a result."""
    everyone = [run for runs in results.values() for run in runs]
    return next((key for key in HEADLINES if numbers(everyone, "mean", key)), None)


def table(results: Results, seeds: Sequence[int]) -> str:
    """A row a method that has a finished run: mean and standard deviation over its seeds; below, what is missing."""
    everyone = [run for runs in results.values() for run in runs]
    columns = [
        (words.format(METRIC_TITLES[key]), (*STAGES[stage], key))
        for stage, words, keys in _COLUMNS
        for key in keys
        if numbers(everyone, *STAGES[stage], key)
    ]
    names = [name for name, _ in columns]
    lines = [markdown_header("method", "seeds", *names, "density", "MB", "saving %", "minutes")]
    for method, runs in results.items():
        if runs:
            lines.append(markdown_row(
                method, len(runs) if len(runs) == len(seeds) else f"{len(runs)} of {len(seeds)}",
                *(spread(numbers(runs, *path, scale=100)) for _, path in columns),
                spread(numbers(runs, "mean", "density"), 2),
                spread(numbers(runs, "bytes", "total", scale=1e-6)),
                spread(numbers(runs, "saving", scale=100)),
                spread(numbers(runs, "seconds", scale=1 / 60)),
            ))  # fmt: skip
    missing = [
        f"{method} ({', '.join(str(seed) for seed in seeds if seed not in {run.seed for run in runs})})"
        for method, runs in results.items()
        if len(runs) < len(seeds)
    ]
    return "\n".join(lines) + (f"\n\nNot finished (seeds): {', '.join(missing)}." if missing else "")


def _ratio(ours: Sequence[Result], theirs: Sequence[Result], key: str) -> str:
    """Ratio of mAP with its bootstrap interval over queries; a dash where the runs hold no pairs of queries."""
    sides = [[look_up(run.summary, key) for run in runs] for runs in (ours, theirs)]
    clients = list(sides[0][0] or ())
    if not clients or any((entry or {}).keys() != set(clients) for side in sides for entry in side):
        return "-"
    pairs = [[[np.array(entry[client], float) for client in clients] for entry in side] for side in sides]
    try:
        ratio = paired_ratio_interval(*pairs)
    except InputError:
        return "-"
    return f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _difference(ours: Sequence[Result], theirs: Sequence[Result], *path: str) -> str:
    """Ours minus theirs in points, mean and deviation over the pairs."""
    pairs = [(look_up(a.summary, *path), look_up(b.summary, *path)) for a, b in zip(ours, theirs, strict=True)]
    values = [round(100 * (a - b), 9) for a, b in pairs if a is not None and b is not None]
    return ("+" if values and np.mean(values) >= 0 else "") + spread(values)


def _fewer(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """Bytes that we save against them in per cent: the mean, and by seed."""
    sizes = [[look_up(run.summary, "bytes", "total") for run in runs] for runs in (ours, theirs)]
    if not all(sizes[1]) or None in sizes[0]:
        return "-"
    saved = [100 * (1 - a / b) for a, b in zip(*sizes, strict=True)]
    # Plus zero, so that a tiny loss does not become -0.0.
    mean, *by_seed = (f"{round(value, 1) + 0.0:.1f}" for value in (float(np.mean(saved)), *saved))
    return f"{mean} ({', '.join(by_seed)})"


def against_table(results: Results, against: str) -> str:
    """Every method against the method `against`, paired by seed; "" without a pair of finished runs."""
    key = headline(results)
    theirs = {run.seed: run for run in results[against]}
    lines = []
    for method, runs in results.items():
        ours = [run for run in runs if run.seed in theirs]
        if method == against or not ours:
            continue
        others = [theirs[run.seed] for run in ours]
        places = [(stage, (*STAGES[stage], str(key))) for stage in ("before", "after")]
        points = [_difference(ours, others, *path) for _, path in places]
        ratios = [_ratio(ours, others, name) for name in ("average_precisions", "average_precisions_after")]
        lines.append(markdown_row(method, len(ours), *points, *(ratios if key == "map" else ()), _fewer(ours, others)))
    if not lines or key is None:
        return ""
    name = METRIC_TITLES[key]
    ratio_names = (f"{name} ratio (95 % interval)", f"{name} ratio after (95 % interval)") if key == "map" else ()
    head = markdown_header(
        f"against {against}", "seeds", f"{name} difference", f"{name} difference after", *ratio_names,
        "fewer bytes % (by seed)",
    )  # fmt: skip
    return "\n".join([head, *lines])


def unseen_table(data: Mapping[str, Results]) -> str:
    """Every method at the sites that no client trained on, over all data sets; "" if no run has any."""
    sites: dict[tuple[str, str, str], None] = {}
    for name, results in data.items():
        for run in (run for runs in results.values() for run in runs):
            for site, row in (look_up(run.summary, "unseen", "clients") or {}).items():
                sites |= {(name, site, key): None for key in (*HEADLINES, "rank1") if row.get(key) is not None}
    if not sites:
        return ""
    lines = [markdown_header("unseen sites", *(f"{site} ({name}) {METRIC_TITLES[key]}" for name, site, key in sites))]
    for method in dict.fromkeys(method for results in data.values() for method in results):
        cells = [
            spread(numbers(data[name].get(method, ()), "unseen", "clients", site, key, scale=100))
            for name, site, key in sites
        ]
        if any(cell != "-" for cell in cells):
            lines.append(markdown_row(method, *cells))
    return "\n".join(lines)


def _csv_rows(name: str, run: Result, out: Path) -> Iterable[dict[str, Any]]:
    summary = run.summary

    def row(kind: str, client: str, stages: Mapping[str, Any], sent: Any, **more: Any) -> dict[str, Any]:
        keys = (*METRIC_TITLES, "density")
        metrics = {f"{stage}_{key}": look_up(values, key) for stage, values in stages.items() for key in keys}
        ways = {f"bytes_{way}": look_up(sent, way) for way in ("down", "up", "total")}
        place = {"data": name, "method": run.method, "seed": run.seed, "kind": kind, "client": client}
        return place | metrics | ways | more | {"run": run.directory.relative_to(out)}

    per_client = look_up(summary, "bytes", "per_client") or {}
    for client in summary["clients"]:
        stages = {stage: look_up(summary, *path, client) for stage, path in CLIENTS.items()}
        sent = per_client.get(client)
        yield row("client", client, stages, sent and sent | {"total": sent["down"] + sent["up"]})
    stages = {stage: look_up(summary, *path) for stage, path in STAGES.items()}
    yield row("mean", "", stages, summary.get("bytes"), seconds=summary.get("seconds"))
    for site, values in (look_up(summary, "unseen", "clients") or {}).items():
        yield row("unseen", site, {"before": values}, None)


def csv_text(data: Mapping[str, Results], out: Path) -> str:
    """A line a client of every finished run, one for their mean and one a site that nobody trained on, as CSV.

    Args:
      data: per data set its runs; columns that none of them fills are left out.
      out: the folder that the column `run` starts from.
    """
    rows = [
        row for name, results in data.items() for runs in results.values() for run in runs
        for row in _csv_rows(name, run, out)
    ]  # fmt: skip
    columns = dict.fromkeys(column for row in rows for column, value in row.items() if value is not None)
    text = io.StringIO()
    # The place of a run is its last column; a later kind of line may have brought others.
    order = [column for column in columns if column != "run"] + ["run"]
    writer = csv.DictWriter(text, order, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
