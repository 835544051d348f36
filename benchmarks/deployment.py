"""One federation three times: over Flower on this machine, simulated client by client, and simulated with `map`.

Run from the repository root, with the extra `flower` installed:

    python -m benchmarks.deployment

The job is `experiments/fedklpr.py` on three drawn sites for two rounds, which cut once: over a SuperLink and three
SuperNodes with TLS and authentication; with `client_map=loop`, which shares the compiled stages with it and has to end
with its bits; and with `client_map=map`, whose compiled program rounds in another order. Prints Markdown; ends with
status 1 where the first two differ. More settings, such as `--config.data.clients=mall,plaza`, go to all three.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import ROOT, machine, print_header, print_row
from fedklpr_jax import checkpoint, train
from fedklpr_jax import config as settings
from fedklpr_jax.cli import parse
from fedklpr_jax.console import Console
from fedklpr_jax.deploy.loopback import Loopback, federate, loopback

FILE = str(ROOT / "experiments" / "fedklpr.py")
JOB = ("--config.data.clients=station,arena,harbour", "--config.rounds=2", "--config.eval.every=2")
# What both kinds of run tell of their results.
_RESULTS = ("clients", "mean", "after", "validation")

Leaves = Mapping[str, np.ndarray]


def deployed(out: Path, flags: Sequence[str]) -> Loopback:
    """Runs the job over Flower and gives the federation, whose counter knows the bytes.

    Raises:
      RuntimeError: it did not end well.
    """
    flags = [*flags, f"--config.out={out}"]
    config = parse([f"--config={FILE}", *flags])
    settings.validate(config)
    with loopback(out.with_name("flower"), out.with_name("sites")) as net:
        if federate(net, settings.resolved(config), FILE, flags):
            raise RuntimeError("the federation failed; what its server said stands above")
    return net


def simulated(out: Path, flags: Sequence[str], how: str) -> None:
    """Runs the job in this process."""
    config = parse([f"--config={FILE}", *flags, f"--config.client_map={how}", f"--config.out={out}"])
    train.run(config, Console(sys.stderr), "")


def end(out: Path) -> tuple[Leaves, dict[str, Any]]:
    """The last checkpoint of a run, by path, and its summary."""
    step = checkpoint.latest(out / "checkpoints")
    assert step is not None
    return checkpoint.leaves(out / "checkpoints", step), json.loads((out / "summary.json").read_text())


def different_bits(one: Leaves, other: Leaves) -> tuple[int, int]:
    """How many bits of the clients' masks differ, and how many there are."""
    masks = [path for path, value in one.items() if path.startswith("clients/") and value.dtype == bool]
    return sum(int((one[path] != other[path]).sum()) for path in masks), sum(one[path].size for path in masks)


def distance(one: Leaves, other: Leaves) -> float:
    """The length of the difference of two global models over the length of the first."""
    paths = [path for path, value in one.items() if path.startswith("server/model") and value.dtype == np.float32]
    apart = sum(float(np.square(one[path].astype(np.float64) - other[path]).sum()) for path in paths)
    return float(np.sqrt(apart / sum(float(np.square(one[path].astype(np.float64)).sum()) for path in paths)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, more = parser.parse_known_args(arguments)
    flags = [*JOB, *more]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        # The tables of the runs are not this one's.
        with contextlib.redirect_stdout(sys.stderr):
            counter = deployed(root / "deployed", flags).counter
            simulated(root / "loop", flags, "loop")
            simulated(root / "map", flags, "map")
        (there, told), (loop, told_loop), (mapped, _) = (end(root / run) for run in ("deployed", "loop", "map"))
    server = [path for path in loop if path.startswith("server")]
    equal = [path for path in server if there[path].tobytes() == loop[path].tobytes()]
    results = [key for key in _RESULTS if told[key] == told_loop[key]]
    payloads = told["bytes"]["total"] + told["bytes"]["examinations"]
    passed = counter.down + counter.up
    print(f"{machine()}\n")
    print_header("compared", "")
    print_row("leaves of the server's state with the bits of `loop`", f"{len(equal)} of {len(server)}")
    print_row(f"of {', '.join(_RESULTS)} equal to `loop`", f"{len(results)} of {len(_RESULTS)}")
    print_row("bytes of the rounds as `loop` counts them", f"{told_loop['bytes']['total']:,}")
    print_row("bytes of all payloads", f"{payloads:,}")
    print_row("... without the examinations, which a simulation has for nothing", f"{told['bytes']['total']:,}")
    print_row("bytes through the connections, Flower, HTTP and TLS included", f"{passed:,}")
    print_row("overhead, %", f"{100 * (passed / payloads - 1):.1f}")
    for other, leaves in (("loop", loop), ("map", mapped)):
        wrong, all_ = different_bits(there, leaves)
        print_row(f"mask bits unlike `{other}`'s", f"{wrong:,} of {all_:,} ({100 * wrong / all_:.3g} %)")
        print_row(f"distance of the global model from `{other}`'s, relative", f"{distance(there, leaves):.2g}")
    same = len(equal) == len(server) and len(results) == len(_RESULTS)
    return int(not same or told["bytes"]["total"] != told_loop["bytes"]["total"])


if __name__ == "__main__":
    sys.exit(main())
