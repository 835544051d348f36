"""What the commands that make many runs share: their options, processes that make the runs, and runs on disk."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from ml_collections import ConfigDict

from benchmarks._common import ROOT
from fedklpr_jax.config import flat
from fedklpr_jax.errors import InputError
from fedklpr_jax.train import FREE


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are an `InputError` each."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def part(text: str) -> tuple[int, int]:
    """The i and n of "i/n".

    >>> part("1/2")
    (1, 2)
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; give one like 1/2")
    return int(found[1]), int(found[2])


def count(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def markers(name: str) -> tuple[str, str]:
    """The lines between which a page holds what a command writes.

    >>> markers("ablation")
    ('<!-- ablation:begin -->', '<!-- ablation:end -->')
    """
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between_markers(page: Path, text: str, name: str) -> str:
    """What `page` holds with `text` put between the two markers of that name.

    Raises:
      InputError: no such file, or not one pair of markers in it.
    """
    begin, end = markers(name)
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    parts = re.split(f"({begin}|{end})", before)
    if parts[1::2] != [begin, end]:
        raise InputError(f"--write: {page} must hold {begin} and after it {end}, once each")
    return f"{parts[0]}{begin}\n{text}\n{end}{parts[4]}"


def arguments(changes: Mapping[str, Any]) -> list[str]:
    """Settings as the command line takes them.

    >>> arguments({"rounds": 3})
    ['--config.rounds=3']
    """
    return [f"--config.{path}={value}" for path, value in changes.items()]


def make_folder(out: Path) -> None:
    """Makes the folder that `--out` names.

    Raises:
      InputError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be made ({error.strerror}); give another") from error


def finished_summary(directory: Path) -> dict[str, Any] | None:
    """`summary.json` of a finished run, None for one that is missing or broke off.

    The report is written last, so it tells that all the rest is there.

    Raises:
      InputError: there is a report, but no readable summary.
    """
    if not (directory / "report.html").exists():
        return None
    try:
        return json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / 'summary.json'}: cannot be read; delete the run: rm -r {directory}") from error


def check_settings(directory: Path, config: ConfigDict) -> None:
    """Compares the settings of the run in `directory` with those it should have; nothing there is right too.

    Raises:
      InputError: another value of a setting that changes numbers, or no readable settings.
    """
    known = directory / "config.json"
    if not known.exists():
        return
    wanted = json.loads(json.dumps(flat(config)))
    try:
        stored = dict(json.loads(known.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{known}: no readable settings; delete the run: rm -r {directory}") from error
    for path in sorted(stored.keys() - FREE):
        # A setting that is empty in the file had the value of its task, which is compared by itself.
        if stored[path] is not None and stored[path] != wanted.get(path):
            raise InputError(
                f"{directory}: holds a run with --config.{path}={stored[path]!r}, not {wanted.get(path)!r}; "
                f"give another --out, or delete it with: rm -r {directory}"
            )


@dataclass(frozen=True)
class Job:
    """A run to make, or to go on with.

    Attributes:
      name: what to call it.
      directory: where it lies; its log lies beside it.
      settings: its command line.
    """

    name: str
    directory: Path
    settings: tuple[str, ...]

    @property
    def log(self) -> Path:
        """What its process says."""
        return self.directory.with_name(f"{self.directory.name}.log")


@dataclass(frozen=True)
class News:
    """What happened to a job; `problem` is a line that says why one did not end well."""

    job: Job
    kind: Literal["started", "running", "ended"]
    problem: str = ""


def _start(job: Job) -> subprocess.Popen[bytes] | None:
    """The process of a job, or None if another command has one for it."""
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), *job.settings]
    with job.log.open("ab") as log:
        try:
            # The process inherits the lock and holds it to its end, also where this command was killed.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        log.truncate(0)
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _ending(job: Job, status: int) -> str:
    if not status:
        return ""
    said = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{job.name}: {''.join(said[-1:]) or f'ended with status {status}'} (all of it: {job.log})"


def execute(jobs: Sequence[Job], workers: int, seconds: float = math.inf) -> Generator[News, None, None]:
    """Runs jobs through the real command, each in a process of its own; closing the iterator stops the processes.

    Args:
      jobs: what to run, in this order; one that is finished by then is left alone.
      workers: processes at a time.
      seconds: a longer process is stopped.

    Yields:
      `started` and `ended` of every job, and several times a second `running` of each that is.
    """
    waiting = deque(jobs)
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                if finished_summary(job.directory) is not None:
                    yield News(job, "ended")
                elif child := _start(job):
                    running[job] = child, time.monotonic()
                    yield News(job, "started")
                else:
                    yield News(job, "ended", f"{job.name}: another command is at it")
            time.sleep(0.1)
            for job, (child, began) in list(running.items()):
                status = child.poll()
                if status is None and time.monotonic() - began < seconds:
                    yield News(job, "running")
                    continue
                if status is None:
                    child.kill()
                    child.wait()
                    problem = f"{job.name}: stopped after {seconds:g} s; the same command goes on with it"
                else:
                    problem = _ending(job, status)
                del running[job]
                yield News(job, "ended", problem)
    finally:
        for child, _ in running.values():
            child.terminate()
        for child, _ in running.values():
            child.wait()
