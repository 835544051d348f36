"""What two hosts do in the time of one: the real command, in processes of their own. Prints one Markdown table.

Run from the repository root, on a machine with nothing else to do (Linux, for cores are given out):

    python -m benchmarks.hosts
    python -m benchmarks.hosts --rounds 6 -- --config.method.name=fedavg --config.task.name=supervised

Three ways of one job: one device on half of the cores; two hosts on loopback, each with a half of its own; and one
process that has the two halves as two devices. What follows `--` are settings of the job. Rounds are as
`metrics.jsonl` tells them, after the first, which compiles; evaluations and checkpoints lie outside. That hosts and
devices end with one model, bit by bit, is tested (`tests/test_hosts.py`); here a host has fewer threads, which round
otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks._common import ROOT, machine, print_header, print_row
from fedklpr_jax.deploy.loopback import free_port
from fedklpr_jax.metrics import read_metrics

WAYS = ("one device, half of the cores", "two hosts, half of the cores each", "one host, two devices, all cores")


def command(out: Path, rounds: int, settings: Sequence[str]) -> list[str]:
    """The main job, evaluated before and at its end."""
    return [
        sys.executable, "experiments/run.py", f"--config={ROOT}/experiments/fedklpr.py", f"--config.rounds={rounds}",
        f"--config.eval.every={rounds}", f"--config.out={out}", *settings,
    ]  # fmt: skip


def started(command: Sequence[str], cores: Sequence[int], devices: int) -> subprocess.Popen[bytes]:
    """The command on these cores, which JAX sees as so many devices."""
    pinned = ["taskset", "-c", ",".join(map(str, cores)), *command]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(pinned, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def ended(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits for all of them.

    Raises:
      SystemExit: one failed; it has said why.
    """
    if any([process.wait() for process in processes]):
        sys.exit("a run failed, as it says above")


def main(given: Sequence[str] | None = None) -> None:
    """Runs the three ways and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("settings", nargs="*", metavar="--config.…", help="of the job, after --")
    options = parser.parse_args(given)
    cores = sorted(os.sched_getaffinity(0))
    halves = cores[: len(cores) // 2], cores[len(cores) // 2 : len(cores) // 2 * 2]
    if not halves[0] or options.rounds < 2:
        parser.error("two hosts need two cores, and a round after the first one: give --rounds 2 or more")
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(way) for way in range(len(WAYS))]
        jobs = [command(out, options.rounds, options.settings) for out in outs]
        ended([started(jobs[0], halves[0], 1)])
        address = f"--config.hosts=127.0.0.1:{free_port()},2"
        ended([started([*jobs[1], f"{address},{index}"], half, 1) for index, half in enumerate(halves)])
        ended([started(jobs[2], cores, 2)])
        seconds = [
            [event["seconds"] for event in read_metrics(out / "metrics.jsonl") if event["event"] == "round"][1:]
            for out in outs
        ]
    print(f"{machine()}; rounds 2 to {options.rounds} of `{' '.join(options.settings) or 'the default job'}`\n")
    print_header("way", "s a round", "least", "most", "times as fast as one")
    alone = statistics.median(seconds[0])
    for way, rounds in zip(WAYS, seconds, strict=True):
        middle = statistics.median(rounds)
        print_row(way, f"{middle:.2f}", f"{min(rounds):.2f}", f"{max(rounds):.2f}", f"{alone / middle:.2f}")


if __name__ == "__main__":
    main()
