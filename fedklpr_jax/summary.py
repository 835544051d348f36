"""What `summary.json` says of a run: its last evaluation, beside the first and the largest, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedklpr_jax.assembly import Federation, privacy_spent
from fedklpr_jax.evaluation.features import Evaluation
from fedklpr_jax.metrics import METRIC_TITLES, mean
from fedklpr_jax.simulation import Evaluations, Examination, RunState, headline


def summary_of(
    federation: Federation, state: RunState, found: Examination, events: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """The summary of a run.

    Args:
      federation: the run's.
      state: at its end, the final download in its ledger.
      found: the examination `before`, `after` and by `validation`.
      events: of its log, that examination's among them.
      seconds: that it took.
    """
    config, ledger = federation.config, state.ledger
    before, after = found.results["before"], found.results["after"]
    table_before, table_after = (headline(federation, stage, found.densities) for stage in (before, after))
    start = _evaluated_at(events, 0)
    return {
        "method": config.method.name,
        "task": config.task.name,
        "seed": config.seed,
        "rounds": config.rounds,
        "seconds": seconds,
        "clients": table_before["clients"],
        "mean": table_before["mean"],
        "unseen": table_before.get("unseen"),
        "after": table_after,
        "best": best_of(events),
        "start": start,
        "before_last_round": _evaluated_at(events, config.rounds - 1) if config.last.epochs else None,
        "validation": _validated(found.validation),
        "failures": [*_failures(events, start, table_before["mean"]), *_diverged(found.diverged)],
        "bytes": ledger.summary() | {"examinations": sum(event.get("bytes_sent", 0) for event in events)},
        "saving": ledger.saving,
        "average_precisions": _average_precisions(before),
        "average_precisions_after": _average_precisions(after),
        "refused": [
            {"round": event["round"], **entry} for event in events if event["event"] == "round"
            for entry in event["refused"]
        ],
        "privacy": privacy_spent(config, len(federation.task.clients)),
        "notes": list(federation.notes),
    }  # fmt: skip


def _validated(scores: Mapping[str, float]) -> dict[str, Any] | None:
    return {"clients": dict(scores), "mean": mean(list(scores.values()))} if scores else None


def _average_precisions(evaluations: Evaluations) -> dict[str, np.ndarray]:
    return {name: result.average_precisions for name, result in evaluations.items() if isinstance(result, Evaluation)}


def best_of(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each stage the largest mean of every metric over all tests after round 0: the usual way of publishing, which
    chooses the round on test data. No number of ours is taken from here unless it says so."""
    best: dict[str, dict[str, float]] = {}
    for event in events:
        if event["event"] == "eval" and event["round"]:
            row = best.setdefault(event["stage"], {})
            for key, value in event["mean"].items():
                if key in METRIC_TITLES and value is not None:
                    row[key] = max(value, row.get(key, value))
    return best


def _evaluated_at(events: Sequence[Mapping[str, Any]], round_: int) -> dict[str, Any] | None:
    """The logged evaluation "before" after so many rounds."""
    for event in events:
        if event["event"] == "eval" and event["stage"] == "before" and event["round"] == round_:
            return {key: event[key] for key in ("clients", "mean")}
    return None


def _diverged(names: Sequence[str]) -> list[str]:
    return [f"local fine-tuning diverged at {', '.join(names)}: tested after it as before it"] if names else []


def _failures(
    events: Sequence[Mapping[str, Any]], start: Mapping[str, Any] | None, end: Mapping[str, Any]
) -> list[str]:
    """Why an unsupervised run counts as failed: it clusters too little, or ends no better than it began."""
    rows = [event["clients"].values() for event in events if event["event"] == "round"][-1]
    clustered = [(row["images"], row["clustered"][-1]) for row in rows if "clustered" in row]
    if not clustered:
        return []
    share = sum(images * part for images, part in clustered) / sum(images for images, _ in clustered)
    failures = []
    if share < 0.5:
        failures.append(f"fewer than half of the images are clustered at the end ({100 * share:.0f} %)")
    first = start["mean"]["map"] if start else None
    if first is not None and end["map"] <= first:
        failures.append(f"mAP {100 * end['map']:.1f} % is no better than the {100 * first:.1f} % it started from")
    return failures
