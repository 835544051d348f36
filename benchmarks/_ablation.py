"""Runs of an ablation, read and shown: ranking, Markdown tables and a figure. `experiments/ablate.py` makes the runs.

Numbers of a run are fractions and bytes by column name; results are keyed by the row that owns the runs, then by seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import markdown_header, markdown_row, spread
from benchmarks._figures import Name, dress, names_beside, new_page, png
from benchmarks._runs import finished_summary
from fedklpr_jax.figures import COLOURS, LIGHT, MARKERS
from fedklpr_jax.metrics import mean, read_metrics

BASE, REFERENCE = "base", "fedcapr"
SEEDS = (0, 1, 2)
"""Every seed of a row that gets several; the first is the one of all rows."""
COLUMNS = (
    "row", "what changes", "validation mAP %", "delta", "test mAP % before / after (not used)", "density", "MB",
    "MB / FedCAPR", "purity", "clustered", "seconds",
)  # fmt: skip
Numbers = Mapping[str, float | None]
Results = Mapping[str, Mapping[int, Numbers]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: as the command line calls it.
      group: the factor it belongs to.
      changes: settings in which it differs from the base.
      owner: the first row with the same settings in effect, whose runs it shares; often itself.
    """

    name: str
    group: str
    changes: Mapping[str, Any]
    owner: str


def read_result(directory: Path) -> dict[str, float | None] | None:
    """The numbers of a finished run, None where it wrote none; None for an unfinished run.

    Purity and the share of clustered images are those of each client's last epoch, averaged over clients.
    """
    summary = finished_summary(directory)
    if summary is None:
        return None

    def number(*path: str) -> float | None:
        node: Any = summary
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    latest: dict[str, Mapping[str, Any]] = {}
    for event in read_metrics(directory / "metrics.jsonl"):
        if event["event"] == "round":
            latest |= event["clients"]

    def of_last_epoch(key: str) -> float | None:
        return mean([value for row in latest.values() if key in row for value in np.ravel(row[key])[-1:]])

    return {
        "validation": number("validation", "mean"),
        "before": number("mean", "map"),
        "after": number("after", "mean", "map"),
        "density": number("mean", "density"),
        "bytes": number("bytes", "total"),
        "purity": of_last_epoch("purity"),
        "clustered": of_last_epoch("clustered"),
        "seconds": number("seconds"),
    }


def over_seeds(results: Results, owner: str, key: str, seeds: Iterable[int]) -> dict[int, float]:
    """The numbers of one column that are there, by seed."""
    runs = results.get(owner, {})
    return {seed: value for seed in seeds if seed in runs and (value := runs[seed].get(key)) is not None}


def ranking(results: Results) -> list[str]:
    """Owners of runs but the base, best validation score at the first seed first; those without a score left out."""
    scores = {owner: over_seeds(results, owner, "validation", SEEDS[:1]) for owner in results if owner != BASE}
    return sorted((owner for owner in scores if scores[owner]), key=lambda owner: -scores[owner][SEEDS[0]])


def base_spread(results: Results) -> float | None:
    """Sample standard deviation of the base's validation score over seeds; None for under two of them."""
    scores = list(over_seeds(results, BASE, "validation", SEEDS).values())
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def delta(results: Results, owner: str, seeds: Iterable[int]) -> str:
    """Validation score minus the base's in points, paired by seed; `≈` where it is inside the base's spread."""
    seeds = list(seeds)
    ours, theirs = (over_seeds(results, of, "validation", seeds) for of in (owner, BASE))
    # Rounded, so that no difference does not become -0.0 by the last bit.
    pairs = [round(100 * (ours[seed] - theirs[seed]), 9) for seed in ours if seed in theirs]
    if owner == BASE or not pairs:
        return "-"
    limit = base_spread(results)
    inside = limit is not None and abs(np.mean(pairs)) <= 100 * limit
    return f"{'+' if np.mean(pairs) >= 0 else ''}{spread(pairs)}{' ≈' if inside else ''}"


def table_row(results: Results, row: Row, seeds: Sequence[int]) -> str:
    """One line of the table: means and deviations over `seeds`."""

    def cell(key: str, scale: float = 1.0, digits: int = 1) -> str:
        return spread([scale * value for value in over_seeds(results, row.owner, key, seeds).values()], digits)

    ours, theirs = (over_seeds(results, of, "bytes", seeds) for of in (row.owner, REFERENCE))
    changes = ", ".join(f"`{path.removeprefix('method.')}={value}`" for path, value in row.changes.items())
    return markdown_row(
        row.name if row.owner == row.name else f"{row.name} (= {row.owner})", changes or "-",
        cell("validation", 100), delta(results, row.owner, seeds), f"{cell('before', 100)} / {cell('after', 100)}",
        cell("density", digits=2), cell("bytes", 1e-6),
        spread([ours[seed] / theirs[seed] for seed in ours if seed in theirs], 2),
        cell("purity", digits=2), cell("clustered", digits=2), cell("seconds", digits=0),
    )  # fmt: skip


def finished(results: Results, rows: Iterable[Row], seeds: Iterable[int]) -> list[Row]:
    """Those of `rows` that have a result of every seed."""
    return [row for row in rows if set(seeds) <= results.get(row.owner, {}).keys()]


def table(results: Results, rows: Sequence[Row], seeds: Sequence[int], claims: Mapping[str, str] | None = None) -> str:
    """The finished rows as a Markdown table, and a line with the names of the others.

    Args:
      results: of all runs that are finished.
      rows: what to show, in this order.
      seeds: the runs that make a row; it is finished with all of them.
      claims: per group what it tests: a line above its rows. None: no such lines.
    """
    done = finished(results, rows, seeds)
    lines, group = [markdown_header(*COLUMNS, words=2)], None
    for row in done:
        if claims is not None and row.group != group:
            group = row.group
            lines.append(markdown_row(f"**{group}**", claims[group], *[""] * (len(COLUMNS) - 2)))
        lines.append(table_row(results, row, seeds))
    missing = [row.name for row in rows if row not in done]
    return "\n".join(lines) + (f"\n\nNot finished: {', '.join(missing)}." if missing else "")


def figure(results: Results, rows: Sequence[Row], seeds: Sequence[int], title: str) -> bytes:
    """Validation mAP against bytes as a PNG, a labelled point a finished row that has runs of its own."""
    groups = list(dict.fromkeys(row.group for row in rows))
    markers = tuple(MARKERS)
    points = []
    for row in finished(results, rows, seeds):
        scores, sizes = (list(over_seeds(results, row.owner, key, seeds).values()) for key in ("validation", "bytes"))
        if row.owner == row.name and scores and sizes:
            points.append((100 * np.mean(scores), np.mean(sizes) / 1e6, row))
    page = new_page(8, max(4.0, 0.2 * len(points) + 1))
    axes = page.subplots()
    dress(axes, title, "MB exchanged", "validation mAP (%)")
    names = []
    for score, size, row in points:
        number = groups.index(row.group)
        colour = LIGHT.ink if row.name == BASE else COLOURS[number % len(COLOURS)]
        axes.plot(size, score, marker=markers[number % len(markers)], color=colour, markersize=6, linestyle="")
        names.append(Name(row.name, float(size), float(score), colour))
    names_beside(axes, names)
    return png(page)
