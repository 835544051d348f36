"""What a setting is, and the tests of its value; the settings themselves stand in `config.py`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
    """A setting: its default (a `ByTask` where tasks differ), what it means, and a test of its value with the words for
    what would be right."""

    default: Any
    meaning: str
    right: str = ""
    test: Callable[[Any], bool] = lambda value: True

    @property
    def type(self) -> type:
        """What a value of this setting must be."""
        return type(self.default.supervised if isinstance(self.default, ByTask) else self.default)


@dataclasses.dataclass(frozen=True)
class ByTask:
    """The defaults of a setting in which the tasks differ: of both re-ID tasks, and of classification (None = as in
    supervised re-ID)."""

    supervised: Any
    unsupervised: Any
    classification: Any = None

    def of(self, task: str) -> Any:
        """The default for the task of that name."""
        if task == "classification":
            return self.supervised if self.classification is None else self.classification
        return self.supervised if task == "supervised" else self.unsupervised


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def at_least(low: float) -> tuple[str, Callable[[Any], bool]]:
    """Finite numbers from `low`: the words for them, and the test."""
    return f"a number from {low:g}", lambda value: _finite(value) and value >= low


def between(low: float, high: float) -> tuple[str, Callable[[Any], bool]]:
    """Finite numbers from `low` to `high`."""
    return f"a number from {low:g} to {high:.10g}", lambda value: _finite(value) and low <= value <= high


def above(low: float) -> tuple[str, Callable[[Any], bool]]:
    """Finite numbers above `low`."""
    return f"a number above {low:g}", lambda value: _finite(value) and value > low


def copies(value: str) -> bool:
    """Whether `value` is a count, or counts of clients: `2`, or `2,viper:10`."""
    pairs = [entry.strip().rpartition(":") for entry in value.split(",")]
    return all(
        bool(name) == bool(colon) and count.isdecimal() and len(count) < 4 and 1 <= int(count) <= 100
        for name, colon, count in pairs
    )


def identities(value: str) -> bool:
    """Whether `value` is empty, or numbers above 0 as `copies` has them."""
    pairs = [entry.strip().rpartition(":") for entry in value.split(",")] if value else []
    return all(bool(name) == bool(colon) and _positive(number) for name, colon, number in pairs)


def _positive(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal() and 0 < float(text) < math.inf


def layers(value: str) -> bool:
    """Whether `value` is parts of paths: `classifier,bnneck`."""
    return all(name.strip().isidentifier() for name in value.split(","))


def hosts(value: str) -> bool:
    """Whether `value` is empty, `auto`, or `HOST:PORT,COUNT,INDEX` with an index below the count."""
    found = re.fullmatch(r"[^\s,]+:\d{1,5},(\d{1,9}),(\d{1,9})", value)
    return value in ("", "auto") or bool(found and int(found[2]) < int(found[1]))


def shares(value: str) -> bool:
    """Whether `value` is shares above 0 and at most 1: `1.0,0.5`."""
    try:
        return all(0 < float(share) <= 1 for share in value.split(","))
    except ValueError:
        return False


def one_of(*names: str) -> tuple[str, Callable[[Any], bool]]:
    """These names."""
    return "one of " + ", ".join(names), lambda value: value in names
