"""What the benchmarks share: the machine in one line, Markdown tables, calls timed in turn, memory of a process."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
Prepare = Callable[[], Callable[[], Any]]
Result = TypeVar("Result")


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


def markdown_header(*names: str, words: int = 1) -> str:
    """The head of a Markdown table, two lines: the first columns, which hold words, to the left, numbers to the right.

    >>> print(markdown_header("row", "what changes", "mAP %", words=2))
    | row | what changes | mAP % |
    |---|---|---:|
    """
    return f"{markdown_row(*names)}\n|" + "---|" * words + "---:|" * (len(names) - words)


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


def alone(call: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a call in a new process, so that its memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def process_memory(entry: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`) or at its peak (`VmHWM`); where the system has no /proc, at its
    peak either way."""
    known = Path("/proc/self/status")
    for line in known.read_text().splitlines() if known.is_file() else ():
        if line.startswith(f"{entry}:"):
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak() -> int:
    """Lets the peak of this process's memory count from now on, where the system can; bytes held now."""
    with contextlib.suppress(OSError, AttributeError):
        # What was freed and kept for later would hide as much of what comes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent b of cost = a size^b by least squares over the logarithms; NaN for a single size.

    >>> round(slope([1, 2, 4], [3, 6, 12]), 6)
    1.0
    """
    if len(sizes) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
