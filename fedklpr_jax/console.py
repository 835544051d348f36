"""What the terminal shows of a run: lines, the progress over rounds and the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import rich.console
import rich.progress
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from fedklpr_jax.metrics import (
    METRIC_TITLES,
    MOST_ROWS,
    accuracy_note,
    best_first,
    duration,
    headline_metric,
    known_metrics,
    mean,
    privacy_note,
    show,
)

Item = TypeVar("Item")

_ENDS = 3  # of the best and of the worst of many clients


class RoundBar:
    """Progress over rounds; `Console.progress` makes it."""

    def __init__(self, total: int, done: int, clock: Callable[[], float], draw: Callable[[int, str, str], None]):
        self._total, self._done, self._clock, self._draw = total, done, clock, draw
        self._ends = [clock()]

    def advance(self, text: str = "") -> None:
        """One round more is done; `text` says in a few words how it went."""
        self._done += 1
        self._ends.append(self._clock())
        # The first round compiles, so that it tells the pace only as long as there is no other.
        timed = self._ends[1:] if len(self._ends) > 2 else self._ends
        left = (timed[-1] - timed[0]) / (len(timed) - 1) * (self._total - self._done)
        self._draw(self._done, text, duration(left))


class Console:
    """What a run says on the terminal; plain lines where there is no terminal (a file, CI).

    Args:
        file: where to print; None is standard output.
        clock: seconds, as `time.monotonic` gives them.
    """

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rich = rich.console.Console(file=file, highlight=False, markup=False, emoji=False)
        self._clock = clock

    def line(self, text: str) -> None:
        """Prints one line, as it is."""
        self._rich.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, total: int, done: int = 0) -> Iterator[RoundBar]:
        """A bar over rounds, with the time used and the time left; without a terminal one line a round.

        Args:
            total: rounds of the whole run.
            done: rounds an earlier, resumed run has finished.
        """
        if not self._rich.is_terminal or self._rich.is_dumb_terminal:
            start = self._clock()

            def print_line(now: int, text: str, left: str) -> None:
                used = duration(self._clock() - start)
                self.line(f"round {now}/{total} {now / total:4.0%} | {used} | {left} left | {text}".rstrip(" |"))

            yield RoundBar(total, done, self._clock, print_line)
            return
        # The text takes the room that is left, so that it never squeezes the other columns.
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        display = Progress(
            TextColumn("round", markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:3.0f} %", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left", markup=False),
            TextColumn("{task.description}", markup=False, table_column=rest),
            console=self._rich,
            expand=True,
        )
        with display:
            task = display.add_task("", total=total, completed=done, left="?")
            yield RoundBar(
                total, done, self._clock,
                lambda now, text, left: display.update(task, completed=now, description=text, left=left),
            )

    def track(self, items: Iterable[Item], total: int, text: str) -> Iterator[Item]:
        """The items as they come, with a bar that tells how long the rest takes; without a terminal one line before."""
        if not self._rich.is_terminal or self._rich.is_dumb_terminal:
            self.line(f"{text}: {total}")
            yield from items
            return
        yield from rich.progress.track(items, text, total, console=self._rich, transient=True)

    def table(self, summary: Mapping[str, Any], paths: Sequence[Path] = ()) -> None:
        """Prints the result of a run: a row per client (the best and the worst of many), the mean, sites nobody trained
        on, the bytes, the files written, what it fell short of.

        Args:
            summary: what `summary.json` holds.
            paths: files to name below the table.
        """
        clients, result, sent = summary["clients"], summary["mean"], summary["bytes"]
        counts = sent.get("per_client") or {}
        self._results(clients, result, counts)
        if len(clients) > MOST_ROWS:
            title = METRIC_TITLES[headline_metric(result)]
            self.line(f"the {_ENDS} best and the {_ENDS} worst of {len(clients)} clients by {title}; "
                      f"{len(clients) - 2 * _ENDS} are left out here, report.html has all")
        unseen = summary.get("unseen") or {}
        if unseen.get("clients"):
            self.line("sites nobody trained on, the server's model:")
            self._results(unseen["clients"], unseen["mean"], {})
        for line in _course(summary):
            self.line(line)
        saving = summary.get("saving")
        self.line(
            f"sent: {show(sent['total'], 1e-6)} MB; dense: {show(sent['dense_total'], 1e-6)} MB"
            + (f"; saving {show(saving, 100)} %" if saving is not None else "")
            if sent["total"] else "sent: nothing"
        )
        if note := privacy_note(summary.get("privacy")):
            self.line(note)
        if sent.get("examinations"):
            self.line(f"and for examinations during the run: {show(sent['examinations'], 1e-6)} MB")
        for path in paths:
            self.line(f"wrote {path}")
        for failure in summary.get("failures") or []:
            self.line(f"failed: {failure}")

    def _results(
        self, clients: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any], counts: Mapping[str, Any]
    ) -> None:
        """A table of results with their mean `result`; `counts` are the bytes of each client, empty for no such."""
        keys = known_metrics(clients, {"mean": result})
        ways = ("down", "up") if counts else ()
        titles = ["Client", *(METRIC_TITLES[key] for key in keys), "Density", *(f"MB {way}" for way in ways)]

        def row(name: str, of: Mapping[str, Any], sizes: Mapping[str, float | None]) -> list[str]:
            numbers = [show(of.get(key), 100) for key in keys]
            return [name, *numbers, show(of.get("density"), digits=3), *(show(sizes.get(way), 1e-6) for way in ways)]

        names = list(clients)
        if len(names) > MOST_ROWS:
            ordered = best_first(clients, headline_metric(result))
            names = [*ordered[:_ENDS], *ordered[-_ENDS:]]
        rows = [row(name, clients[name], counts.get(name, {})) for name in names]
        rows.append(row("mean", result, {way: mean([sizes[way] for sizes in counts.values()]) for way in ways}))
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        # Only names are cropped: rich by itself would take room from the numbers too.
        room = max(self._rich.width - sum(widths[1:]) - len(titles) - 1, 6)
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        table.add_column(titles[0], no_wrap=True, overflow="ellipsis", max_width=room)
        for title in titles[1:]:
            table.add_column(title, justify="right", no_wrap=True)
        for number, cells in enumerate(rows, start=1):
            # A line parts the best from the worst, and all from the mean.
            ends = number == len(names) or (len(clients) > MOST_ROWS and number == _ENDS)
            table.add_row(*map(Text, cells), end_section=ends)
        self._rich.print(table)


def _course(summary: Mapping[str, Any]) -> list[str]:
    """How the mean came about, a line for each comparison that the summary knows."""

    def at(stage: str, key: str) -> float | None:
        return ((summary.get(stage) or {}).get("mean") or {}).get(key)

    result, lines = summary["mean"], []
    after = (summary.get("after") or {}).get("mean") or {}
    if accuracy_note(result):
        lines += [f"{when} local fine-tuning: {note}" for when, row in (("before", result), ("after", after))
                  if (note := accuracy_note(row))]
    elif after.get("map") is not None:
        lines.append(f"mAP mean: {show(result.get('map'), 100)} % before, {show(after['map'], 100)} % after "
                     "local fine-tuning")
    key, name = ("pooled", "accuracy over all images") if accuracy_note(result) else ("map", "mAP mean")
    stages = (("start", "at the start"), ("before_last_round", "before the last round"))
    earlier = [(value, where) for stage, where in stages if (value := at(stage, key)) is not None]
    if earlier:
        course = [*earlier, (result.get(key), "at the end")]
        lines.append(f"{name}: " + ", ".join(f"{show(value, 100)} % {where}" for value, where in course))
    best = summary.get("best") or {}
    maxima = [f"{show(row['pooled'], 100)} % {stage}" for stage, row in best.items() if row.get("pooled") is not None]
    if maxima:
        lines.append(f"{name}, maximum over the tests (chooses the round on test data): {', '.join(maxima)}")
    return lines
