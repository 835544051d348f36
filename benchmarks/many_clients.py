"""Federated rounds with many clients, timed against other libraries on the same work: prints two Markdown tables.

Run from the repository root, on a machine with nothing else to do:

    python -m benchmarks.many_clients --root ../shared/data/fashion_mnist \\
        --python torch=/path/of/a/python --python fedjax=/path/of/another

FedAvg on Fashion-MNIST with the small network of FedOBP. `cross-device`: 100 of 10,000 clients with 7 images each, one
local step. `cross-silo`: 10 of 100 clients by a Dirichlet(0.1) draw, 5 epochs in batches of 32. Every library plays the
same rounds in a process of its own, in turn, `--repetitions` times; the first rounds, in which things are compiled, are
left out. PyTorch, pfl-research and Flower run under the Python given as `torch`, FedJAX under `fedjax` (it needs an old
JAX); those without a Python are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import machine, print_header, print_row
from benchmarks.competitors._work import Work, save
from fedklpr_jax.data import labelled, partition
from fedklpr_jax.simulation import participants

HERE = Path(__file__).resolve().parent / "competitors"
OURS = "fedklpr_jax"
TWO = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
# Script, which of the given Pythons runs it, and what it needs in the environment.
LIBRARIES = {
    OURS: ("fedklpr_jax_rounds", "", {}),
    f"{OURS}, two devices": ("fedklpr_jax_rounds", "", TWO),
    "plain JAX loop": ("jax_loop", "", {}),
    "plain PyTorch loop": ("pytorch_loop", "torch", {}),
    "pfl-research": ("pfl_research", "torch", {}),
    "FedJAX": ("fedjax_rounds", "fedjax", {}),
    "Flower simulation": ("flower_simulation", "torch", {}),
}
WARM = 3
# That a client of `cross-device` holds.
IMAGES = 7


def make_work(data: labelled.Labelled, setting: str, rounds: int) -> Work:
    """The work of one of the two settings."""
    if setting == "cross-device":
        return cross_device(data, rounds)
    hands = partition.dirichlet(data.labels, 100, 0.1, seed=42, least=10)
    return _work(data, rounds, hands, together=10, epochs=5, batch=32, momentum=0.7)


def cross_device(
    data: labelled.Labelled, rounds: int, *, clients: int = 10_000, together: int = 100, steps: int = 1
) -> Work:
    """The work of the setting of that name, or the same with other sizes; a local step is an epoch."""
    hands = np.random.default_rng(0).permutation(len(data))[: clients * IMAGES].reshape(clients, IMAGES)
    return _work(data, rounds, list(hands), together=together, epochs=steps, batch=IMAGES, momentum=0.0)


def _work(
    data: labelled.Labelled, rounds: int, hands: Sequence[np.ndarray], *, together: int, epochs: int, batch: int,
    momentum: float,
) -> Work:  # fmt: skip
    """Work over clients that hold the rows of each hand, `together` of them a round."""
    scaled = data.pixels[..., 0] / np.float32(255)
    images = ((scaled - scaled.mean()) / scaled.std()).astype(np.float32)
    clients = len(hands)
    chosen = [participants(0, round_, clients, together / clients) for round_ in range(rounds)]
    starts = np.cumsum([0, *map(len, hands)])
    return Work(
        images, data.labels.astype(np.int64), np.concatenate(hands), starts, np.array(chosen), epochs, batch, 0.01,
        momentum,
    )  # fmt: skip


def play(script: str, python: str, environment: dict[str, str], work: Path) -> dict[str, Any]:
    """What a library tells of the work.

    Raises:
      RuntimeError: it did not get to the end.
    """
    done = subprocess.run(
        [python, str(HERE / f"{script}.py"), str(work)],
        capture_output=True,
        text=True,
        env=os.environ | environment | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no word'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(work: Work, pythons: dict[str, str], repetitions: int) -> None:
    """Prints the table of one setting."""
    steps = sum(-(-len(work.of(k)) // work.batch) * work.epochs for k in work.participants[WARM:].reshape(-1))
    steps //= len(work.participants) - WARM
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.npz"
        save(path, work)
        told: dict[str, list[dict]] = {}
        for _ in range(repetitions):
            for name, (script, kind, environment) in LIBRARIES.items():
                python = pythons.get(kind) if kind else sys.executable
                if not python:
                    continue
                try:
                    run = play(script, python, environment, path)
                except RuntimeError as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    continue
                if len(run["seconds"]) == len(work.participants):
                    told.setdefault(name, []).append(run)
                else:
                    print(f"{name}: {len(run['seconds'])} of {len(work.participants)} rounds", file=sys.stderr)
    best = min(statistics.median(run["seconds"][WARM:]) for name, runs in told.items() if name.startswith(OURS)
               for run in runs)  # fmt: skip
    print_header("library", "ms a round", "least", "most", "ms a step", "times ours", "MB")
    for name, runs in told.items():
        seconds = [one for run in runs for one in run["seconds"][WARM:]]
        middle = statistics.median(seconds)
        cells = (1e3 * middle, 1e3 * min(seconds), 1e3 * max(seconds))
        print_row(name, *(f"{cell:.0f}" for cell in cells), f"{1e3 * middle / steps:.2f}", f"{middle / best:.2f}",
                  f"{max(run['megabytes'] for run in runs):.0f}")  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    """The whole command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the .npz of Fashion-MNIST")
    parser.add_argument("--python", action="append", default=[], help="torch=PATH or fedjax=PATH")
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--setting", choices=("cross-device", "cross-silo"), action="append", default=[])
    options = parser.parse_args(given)
    pythons = dict(given.split("=", 1) for given in options.python)
    data = labelled.read_folder(options.root)
    print(machine())
    for setting in options.setting or ("cross-device", "cross-silo"):
        print(f"\n{setting}\n")
        compare(make_work(data, setting, options.rounds), pythons, options.repetitions)


if __name__ == "__main__":
    main()
