"""The runs of a comparison made one after the other, with bars and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from benchmarks._comparison_plan import Run
from benchmarks._runs import execute, finished_summary
from fedklpr_jax import checkpoint
from fedklpr_jax.metrics import duration, mean

_LOOK = 1.0  # seconds between looks at the rounds of a run


def seconds_left(left: Mapping[Run, int], pace: Mapping[Run, float], workers: int) -> float | None:
    """How long the rounds that are left will take; None while there is no pace.

    Args:
      left: rounds that are left of the runs that are not finished.
      pace: seconds a round of runs that were timed. A run is taken to be like those of its method on its data, else
        like all of them.
      workers: runs at a time.
    """
    kinds: dict[tuple[str, str], list[float | None]] = {}
    for run, seconds in pace.items():
        kinds.setdefault((run.data, run.method), []).append(seconds)
    means = {kind: mean(values) or 0.0 for kind, values in kinds.items()}
    if not means:
        return None
    usual = sum(means.values()) / len(means)
    total = sum(rounds * means.get((run.data, run.method), usual) for run, rounds in left.items())
    return total / max(1, min(workers, len(left)))


def _rounds_done(run: Run) -> int:
    return checkpoint.latest(run.job.directory / "checkpoints") or 0


def run_all(runs: Sequence[Run], workers: int, finished: Callable[[], object]) -> int:
    """Makes the runs that are not finished, telling on standard error how far it is; returns how many did not end well.

    Args:
      runs: what to see to.
      workers: processes at a time.
      finished: called after each run that ended well.
    """
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    pace: dict[Run, float] = {}
    left: dict[Run, int] = {}
    for run in runs:
        summary = finished_summary(run.job.directory)
        if summary is None:
            left[run] = run.settings["rounds"] - _rounds_done(run)
        else:
            pace[run] = summary["seconds"] / summary["rounds"]
    of = {run.job: run for run in left}
    began: dict[Run, tuple[float, int]] = {}
    looked: dict[Run, float] = {}
    bars: dict[Run, TaskID] = {}
    failed = 0

    def time_left() -> str:
        seconds = seconds_left(left, pace, workers)
        return "" if not left else f"{'?' if seconds is None else duration(seconds)} left"

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), MofNCompleteColumn(),
               TextColumn("{task.fields[text]}", markup=False))
    display = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with display, closing(execute(list(of), workers)) as news:
        whole = display.add_task("runs", total=len(runs), completed=len(runs) - len(left), text=time_left())
        for event in news:
            run, now = of[event.job], time.monotonic()
            if event.kind == "started":
                rounds = run.settings["rounds"]
                began[run], looked[run] = (now, left[run]), now
                bars[run] = display.add_task(run.job.name, total=rounds, completed=rounds - left[run], text="rounds")
                console.print(f"{run.job.name}: {rounds - left[run]}/{rounds} rounds done", soft_wrap=True)
                continue
            if event.kind == "running":
                if now - looked[run] < _LOOK:
                    continue
                looked[run] = now
                rest = run.settings["rounds"] - _rounds_done(run)
            else:
                rest = left[run] if event.problem else 0
            start, at_start = began.get(run, (now, rest))
            if rest < at_start:
                pace[run] = (now - start) / (at_start - rest)
            left[run] = rest
            if run in bars:
                display.update(bars[run], completed=run.settings["rounds"] - rest)
            if event.kind == "ended":
                del left[run]
                if run in bars:
                    display.remove_task(bars.pop(run))
                display.advance(whole)
                failed += bool(event.problem)
                done = f"{run.job.name}: done in {duration(now - start)}"
                text = " | ".join(filter(None, (event.problem or done, f"runs to do: {len(left)}", time_left())))
                console.print(text, soft_wrap=True)
                if not event.problem:
                    finished()
            display.update(whole, text=time_left())
    return failed
