"""What a site tells beside its payload, as far as the server uses it. A site may tell anything: what the log, the
summary or the report could stumble over is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedklpr_jax.pruning import DECISIONS
from fedklpr_jax.simulation import Examination, Reported

# Letters of a site's reason that are shown.
_SHOWN = 300
# More pictures, people or cameras no site has; the shapes of the model follow from some of them.
_MOST = 1 << 24
# What `Labelling.describe` tells of every epoch; the purity of no clusters is None.
_OF_EPOCHS = ("clusters", "clustered", "purity")


def one_line(text: str) -> str:
    """What a site tells as one line of a reasonable length.

    >>> one_line("Traceback:\\n  boom")
    'Traceback: boom'
    """
    return " ".join(text.split())[:_SHOWN]


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None.

    >>> number(3), number(True), number(float("inf")), number(10**400)
    (3.0, None, None, None)
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def counts(told: Any) -> dict[str, int] | None:
    """Whole numbers by name that sizes may be, else None.

    >>> counts({"images": 5}), counts({"images": -1}), counts([5])
    ({'images': 5}, None, None)
    """
    if not isinstance(told, dict):
        return None
    good = (type(value) is int and 0 <= value < _MOST for value in told.values())
    return dict(told) if all(good) else None


def entry_of(told: Any) -> dict[str, Any]:
    """What a site tells of its round: numbers, of every epoch a few, and the decision.

    >>> entry_of({"loss": 0.5, "decision": "accepted", "clusters": [3, 4], "density": "high", "purity": []})
    {'loss': 0.5, 'decision': 'accepted', 'clusters': [3, 4], 'purity': []}
    """

    def known(key: str, value: Any) -> bool:
        if key == "decision":
            return isinstance(value, str) and value in DECISIONS
        if key in _OF_EPOCHS:
            found = isinstance(value, list) and all(v is None or number(v) is not None for v in value)
            return found and (key == "purity" or (bool(value) and None not in value))
        return number(value) is not None

    entries = told.items() if isinstance(told, dict) else ()
    return {key: value for key, value in entries if known(key, value)}


def add_results(found: Examination, name: str, answer: Mapping[str, Any], classifies: bool) -> None:
    """Adds a site's results to an examination, those of a test only where they are whole."""
    results, validation = answer.get("results"), answer.get("validation")
    for stage, tests in found.results.items():
        of_stage = results.get(stage) if isinstance(results, dict) else None
        told = of_stage.get(name) if isinstance(of_stage, dict) else None
        metrics = {key: number(value) for key, value in told.items()} if isinstance(told, dict) else {}
        known = {key: value for key, value in metrics.items() if value is not None}
        if known.keys() >= ({"accuracy", "images"} if classifies else {"map", "rank1"}) and known.get("images", 1) > 0:
            tests[name] = Reported(known)
    score = number(validation.get(name)) if isinstance(validation, dict) else None
    if "validation" in found.stages and score is not None:
        found.validation[name] = score
