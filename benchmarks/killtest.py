"""Kills the main job at random moments, lets the same command go on with it, and compares the ends bit by bit.

Run from the repository root, on a machine with nothing else to do; a trial is two processes or three:

    python -m benchmarks.killtest --trials 50

The job is `experiments/run.py` with the default configuration on its two smallest sites. It is first run twice without
a break: once that everything is compiled and cached, and for comparison, and once for its length. Every trial is then
killed (SIGKILL) at a moment drawn evenly from that length, its start-up included, every fifth a second time while it
goes on, and ended by the same command. Equal are: every leaf of the last checkpoint, what it says beside them,
`summary.json` and `metrics.jsonl`, but for times and counts of compiled programs. Prints Markdown; ends with status 1
unless all are equal. What differs stays in --out. More settings, such as `--config.rounds=2`, go to the job.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import ROOT, machine, print_header, print_row
from fedklpr_jax import checkpoint
from fedklpr_jax.errors import InputError
from fedklpr_jax.metrics import read_metrics

JOB = (f"--config={ROOT / 'experiments' / 'fedklpr.py'}", "--config.data.clients=harbour,arena")
# Lines of the command, which buffers nothing here.
READY, CONCLUDING = "results go to", "evaluating before and after"
_UNEQUAL_BY_NATURE = ("seconds", "split", "programs", "offset")
_LONGEST = 3600.0

# Whether the moment has come: from the run's directory, what its process has said, and how many seconds that ran.
Moment = Callable[[Path, str, float], bool]


@dataclass(frozen=True)
class Played:
    """A process of the job: where it was killed (empty: it ended by itself), after how many seconds, and how many it
    took to be ready for its rounds."""

    where: str
    seconds: float
    ready: float


def play(directory: Path, settings: Sequence[str], moment: Moment | None = None) -> Played:
    """Starts the job, or goes on with it, and kills it at `moment`.

    Args:
      directory: of the run; what its processes say goes to a file beside it.
      settings: of the job.
      moment: asked several hundred times a second; None is never.

    Raises:
      RuntimeError: the process ended badly, or not within an hour.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    log = directory.with_name(f"{directory.name}.log")
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), *settings, f"--config.out={directory}"]
    began, ready = time.monotonic(), 0.0
    with log.open("wb") as file, subprocess.Popen(
        command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:  # fmt: skip
        try:
            while process.poll() is None:
                seconds, said = time.monotonic() - began, log.read_text(encoding="utf-8", errors="replace")
                ready = ready or seconds * (READY in said)
                if moment and moment(directory, said, seconds):
                    process.kill()
                    if process.wait() < 0:
                        said = log.read_text(encoding="utf-8", errors="replace")
                        return Played(where(directory, said), seconds, ready)
                if seconds > _LONGEST:
                    raise RuntimeError(f"{directory}: not ended after {seconds:.0f} s; see {log}")
                time.sleep(0.002)
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"{directory}: ended with status {process.returncode}; see {log}")
    return Played("", time.monotonic() - began, ready)


def where(directory: Path, said: str) -> str:
    """Where a killed run stood, by what its process had said and what it left on disk."""
    if (directory / "report.html").exists():
        return "after the report"
    if CONCLUDING in said:
        return "in the conclusion"
    if READY not in said:
        return "in the start-up"
    folder = directory / "checkpoints"
    newest = checkpoint.latest(folder) or 0
    # What no record names is half of a checkpoint being written, or of one being dropped.
    drafts = [int(path.name[5:13]) for path in folder.glob("step-*") if not _named(path)]
    if drafts:
        step = max(drafts)
        return f"writing checkpoint {step}" if step > newest else f"dropping checkpoint {step}"
    log = directory / "metrics.jsonl"
    events = read_metrics(log) if log.exists() else []
    rounds = sum(event["event"] == "round" for event in events)
    if rounds > newest:
        return f"between round {rounds} and its checkpoint"
    if not any(event["event"] == "eval" for event in events):
        return "before round 1"
    return f"in round {newest + 1}"


def _named(path: Path) -> bool:
    """Whether a record is there and names this entry of a checkpoint folder, or is it."""
    record = path.with_name(f"{path.name[:13]}.json")
    return path == record or (record.exists() and json.loads(record.read_text())["data"] == path.name)


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ; empty where they are equal."""
    steps = [checkpoint.latest(run / "checkpoints") for run in (one, other)]
    if steps[0] is None or steps[0] != steps[1]:
        return [f"last checkpoint {steps[0]} and {steps[1]}"]
    state, state_ = (checkpoint.leaves(run / "checkpoints", steps[0]) for run in (one, other))
    meta, meta_ = (checkpoint.metas(run / "checkpoints")[steps[0]] for run in (one, other))
    found = [path for path in state.keys() | state_.keys() if not _same(state.get(path), state_.get(path))]
    if _timeless(meta) != _timeless(meta_):
        found.append("what the checkpoint says beside its leaves")
    if _timeless(json.loads((one / "summary.json").read_text())) != _timeless(
        json.loads((other / "summary.json").read_text())
    ):
        found.append("summary.json")
    if _timeless(read_metrics(one / "metrics.jsonl")) != _timeless(read_metrics(other / "metrics.jsonl")):
        found.append("metrics.jsonl")
    return found


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return False
    return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _UNEQUAL_BY_NATURE}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def after(seconds: float) -> Moment:
    """The moment so many seconds after the start of the process."""
    return lambda directory, said, passed: passed >= seconds


def killed(directory: Path, settings: Sequence[str], whole: Played, twice: bool, rng: random.Random) -> list[Played]:
    """Kills a run once or twice and lets it end; its processes.

    A draw that the run outpaces is no trial: everything is drawn again.
    """
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        played = [play(directory, settings, after(rng.uniform(0, whole.seconds)))]
        if twice and played[0].where:
            # What is left at least: the first kill may have cost most of a round.
            left = whole.seconds - max(0.0, played[0].seconds - whole.ready)
            played.append(play(directory, settings, after(rng.uniform(0, left))))
        if all(part.where for part in played) and not (directory / "report.html").exists():
            return [*played, play(directory, settings)]
        _tell(f"{directory.name}: over before it was killed, so drawn anew")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the trials and how often each kind of moment was hit; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs") / "killtest", help="default: runs/killtest")
    given, more = parser.parse_known_args(arguments)
    if given.trials < 1:
        parser.error("--trials: give a number from 1")
    if not all(setting.startswith("--config.") for setting in more):
        parser.error(f"{' '.join(more)}: not understood; settings look like --config.rounds=2")
    if given.out.exists() and any(given.out.iterdir()):
        parser.error(f"--out: {given.out} is not empty; give another")
    settings, reference = [*JOB, *more], given.out.absolute() / "whole"
    print(machine())
    _tell("twice without a break, the first time compiling what is not cached")
    play(reference, settings)
    again = given.out.absolute() / "again"
    whole = play(again, settings)
    if unlike := differences(reference, again):
        raise RuntimeError(f"two runs without a break differ in {', '.join(unlike[:5])}")
    print(f"an undisturbed run: {whole.seconds:.1f} s, of these {whole.ready:.1f} s of start-up\n")
    return trials(given.out.absolute(), settings, reference, whole, given.trials, random.Random(given.seed))


def trials(
    out: Path, settings: Sequence[str], reference: Path, whole: Played, count: int, rng: random.Random
) -> int:
    """All trials; returns the exit status."""
    hit: Counter[str] = Counter()
    equal, began = 0, time.monotonic()
    print_header("trial", "killed after s", "where", "end")
    for number in range(1, count + 1):
        directory = out / f"trial-{number:03d}"
        try:
            *kills, _ = killed(directory, settings, whole, number % 5 == 0, rng)
            unlike = differences(reference, directory)
        except (RuntimeError, InputError) as error:
            # A run that cannot be gone on with, or left something that cannot be read, is what is looked for here.
            kills, unlike = [], [str(error)]
        hit.update(re.sub(r" \d+", "", kill.where) for kill in kills)
        end = f"differs: {', '.join(unlike[:3])}" if unlike else "equal"
        seconds, places = ([getattr(kill, name) for kill in kills] for name in ("seconds", "where"))
        print_row(number, ", ".join(f"{value:.1f}" for value in seconds), ", ".join(places), end)
        if not unlike:
            equal += 1
            shutil.rmtree(directory)
        left = (time.monotonic() - began) / number * (count - number)
        _tell(f"{number} of {count} done, {equal} equal, about {left / 60:.0f} min to go")
    print()
    print_header("killed", "times")
    for name, times in sorted(hit.items(), key=lambda item: -item[1]):
        print_row(name, times)
    print(f"\n{equal}/{count} equal")
    return int(equal != count)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
