"""Feeds a target with hostile input until it breaks or the time is over.

    python -m fuzz decode --minutes 30

Inputs grow out of those in `tests/fuzz_seeds/TARGET`, guided by coverage where atheris is installed (`pip install
atheris`), else drawn by Hypothesis. A finding is any error but a refusal (WireError, InputError) of one line, more than
a second of processor time for one input, or more memory than allowed: the process may grow by {ROOM} MiB in all, and
every {TRACED}th input is measured exactly. The input is then left in --out; put it beside the seeds as `found-NAME`,
where `tests/test_fuzz_seeds.py` plays it again for ever. Needs Linux, whose /proc tells the size of the process.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz._mutation import Target, change, judge

SEEDS = Path(__file__).resolve().parents[1] / "tests" / "fuzz_seeds"
# Where a target stands, and what coverage is measured of.
TARGETS = {
    "decode": ("payloads", ["fedklpr_jax.wire", "fedklpr_jax.wire_sections"]),
    "folder": ("folders", [f"fedklpr_jax.data.{name}"
                           for name in ("folder", "finding", "layouts", "listing", "decoding", "image_cache",
                                        "labelled")]),
    "command": ("settings", ["fedklpr_jax.cli", "fedklpr_jax.config", "fedklpr_jax.fields"]),
    "settings": ("settings", ["fedklpr_jax.config", "fedklpr_jax.fields"]),
}
ROOM = 1024
TRACED = 64
_TELL_EVERY = 30.0


def load(name: str) -> Target:
    """The target of that name; imported late, for atheris has to see what it measures being imported."""
    return getattr(importlib.import_module(f"fuzz.{TARGETS[name][0]}"), name.upper())


def seeds(name: str) -> list[bytes]:
    """The inputs kept for a target."""
    return [path.read_bytes() for path in sorted((SEEDS / name).iterdir())]


class Session:
    """Executions of one target: how many, and what came of them."""

    def __init__(self, target: Target, minutes: float) -> None:
        self._target, self._limit = target, 60 * minutes
        self._accepted = self._done = 0
        self._told = time.monotonic()

    def execute(self, data: bytes) -> None:
        """One of them; ends the process when the time is over."""
        self._done += 1
        self._accepted += judge(self._target, data, traced=self._done % TRACED == 0)
        if self._done % 256 == 0:
            spent = time.process_time()
            over = spent > self._limit
            if over or time.monotonic() - self._told > _TELL_EVERY:
                self._told = time.monotonic()
                left = "" if over else f", {max(0.0, self._limit - spent) / 60:.1f} CPU minutes to go"
                print(f"{self._done:,} executions, {self._accepted:,} accepted, {spent / 60:.1f} CPU minutes{left}")
                sys.stdout.flush()
            if over:
                print("nothing found", flush=True)
                os._exit(0)


def _limit_memory() -> None:
    """Lets the process grow by `ROOM` MiB and no more: what asks for more meets a MemoryError."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (ROOM << 20),) * 2)


def _guided(atheris: Any, name: str, minutes: float, out: Path) -> None:
    with atheris.instrument_imports(include=TARGETS[name][1]):
        target = load(name)
    session = Session(target, minutes)

    def basic(data: bytes, rng: random.Random) -> bytes:
        return change(data, rng) if not data or rng.random() < 0.5 else atheris.Mutate(data, len(data) + 64)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        return target.mutate(data, random.Random(seed), basic)[:largest]

    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    options = ["-timeout=20", "-max_len=65536", "-len_control=0", "-rss_limit_mb=4096", "-print_final_stats=1"]
    arguments = [*options, f"-artifact_prefix={out}/", str(corpus), str(SEEDS / name)]
    atheris.Setup(["fuzz", *arguments], session.execute, custom_mutator=mutate)
    _limit_memory()
    atheris.Fuzz()


def _drawn(name: str, minutes: float, out: Path) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    target = load(name)
    session = Session(target, minutes)

    @settings(max_examples=10**9, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(seeds(name)), st.integers(0, 2**64 - 1), st.integers(1, 5))
    def play(data: bytes, seed: int, changes: int) -> None:
        rng = random.Random(seed)
        for _ in range(changes):
            data = target.mutate(data, rng, change)
        try:
            session.execute(data)
        except Exception:
            (out / f"crash-{seed:016x}").write_bytes(data)
            raise

    _limit_memory()
    play()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one target."""
    text = (__doc__ or "").format(ROOM=ROOM, TRACED=TRACED)
    parser = argparse.ArgumentParser("python -m fuzz", description=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=30.0, help="of processor time (default: 30)")
    parser.add_argument("--out", type=Path, help="for findings, and the corpus (default: runs/fuzz-TARGET)")
    given = parser.parse_args(arguments)
    out = (given.out or Path("runs") / f"fuzz-{given.target}").absolute()
    out.mkdir(parents=True, exist_ok=True)
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        print("atheris is not installed: inputs are drawn by Hypothesis, without looking at coverage", flush=True)
        _drawn(given.target, given.minutes, out)
    else:
        _guided(atheris, given.target, given.minutes, out)


if __name__ == "__main__":
    main()
