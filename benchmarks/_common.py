"""What the benchmarks share: the machine in one line, Markdown tables, and calls timed in turn."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
Prepare = Callable[[], Callable[[], Any]]


def machine() -> str:
    """Versions, backend, cores and processor: the line that belongs above every table."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f" ({device.device_kind} x {jax.device_count()})"
    return (
        f"Python {platform.python_version()}, JAX {jax.__version__} on {device.platform}{accelerator}; "
        f"{cores} cores, {_processor()}"
    )


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    known = Path("/proc/cpuinfo")
    if known.is_file():
        for line in known.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown_row(*cells: object) -> str:
    """One row of a Markdown table.

    >>> markdown_row("a", 1)
    '| a | 1 |'
    """
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def markdown_header(*names: str) -> str:
    """The head of a Markdown table, two lines: the first column to the left, numbers to the right."""
    return f"{markdown_row(*names)}\n|---|" + "---:|" * (len(names) - 1)


def print_row(*cells: object) -> None:
    """One row of a Markdown table, shown at once."""
    print(markdown_row(*cells), flush=True)


def print_header(*names: str) -> None:
    """The head of a Markdown table, shown at once."""
    print(markdown_header(*names), flush=True)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation; of one value just the value, of none a dash.

    >>> spread([1.0, 3.0]), spread([2.0]), spread([])
    ('2.0 ± 1.4', '2.0', '-')
    """
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def again(call: Callable[[], Any]) -> Prepare:
    """The preparation of a call that needs none."""
    return lambda: call


def timed_in_turn(prepare: Mapping[str, Prepare], repetitions: int) -> dict[str, list[float]]:
    """Seconds of several calls by name, each measured `repetitions` times: A B C, A B C, ...

    In turn, so that a slow moment of the machine meets all of them alike and ratios within a repetition stay fair.

    Args:
      prepare: by name a function that makes the next call. It runs untimed, all of them before the first call of a
        repetition; a call is timed until its result is ready.
      repetitions: rows of measurements.
    """
    seconds: dict[str, list[float]] = {name: [] for name in prepare}
    for _ in range(repetitions):
        calls = {name: jax.block_until_ready(make()) for name, make in prepare.items()}
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    return seconds
