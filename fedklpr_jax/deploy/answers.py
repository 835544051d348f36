"""What a site tells beside its payload, as far as the server uses it: a site may tell anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedklpr_jax.pruning import DECISIONS
from fedklpr_jax.simulation import Examination, Reported

# Letters of a site's reason that are shown.
_SHOWN = 300


def one_line(text: str) -> str:
    """What a site tells as one line of a reasonable length."""
    return " ".join(text.split())[:_SHOWN]


def number(value: Any, other: float) -> float:
    """`value` if it is a finite number, else `other`."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else other


def entry_of(told: Any) -> dict[str, Any]:
    """What a site tells of its round, as far as it is of a kind that the log has: numbers, lists of them, and the
    decision."""

    def good(value: Any) -> bool:
        return value is None or not math.isnan(number(value, math.nan))

    def known(value: Any) -> bool:
        return all(map(good, value)) if isinstance(value, list) else good(value) or value in DECISIONS

    entries = told.items() if isinstance(told, dict) else ()
    return {key: value for key, value in entries if known(value)}


def add_results(found: Examination, name: str, answer: Mapping[str, Any]) -> None:
    """Adds a site's results to an examination."""
    results, validation = answer.get("results"), answer.get("validation")
    for stage, tests in found.results.items():
        told = results.get(stage, {}).get(name) if isinstance(results, dict) else None
        if isinstance(told, dict):
            metrics = {str(key): number(value, math.nan) for key, value in told.items()}
            tests[name] = Reported({key: value for key, value in metrics.items() if not math.isnan(value)})
    score = validation.get(name) if isinstance(validation, dict) else None
    if "validation" in found.stages and score is not None:
        found.validation[name] = number(score, 0.0)
