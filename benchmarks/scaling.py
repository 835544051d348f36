"""Time of a round against clients, participants, parameters and local steps, and memory over many rounds.

Run from the repository root, on a machine with nothing else to do:

    python -m benchmarks.scaling --root ../shared/data/fashion_mnist --out scaling.png
    python -m benchmarks.scaling --root ../shared/data/fashion_mnist --small    seconds; its numbers mean nothing

Rounds of the `cross-device` work of `benchmarks.many_clients`: FedAvg, 100 of 10,000 clients with 7 images each, one
local step of the small network of FedOBP.

The first table changes one of these at a time; its sizes are timed in turn. `fitted` is the slope of the logarithms
of all sizes, `last` that of the last two, where what a round costs in any case weighs least. "linear" says whether
neither is above 1.1. `--out` draws it.

The second table is the memory of a process of its own for each row, in MB. Where a method keeps something of each
client (`fedper`, `fedobp`), that lies in a file each, in the system's folder for temporary files: FedOBP's take 4.7 MB
a client that took part. "flat" says whether memory grew by at most 2 % from the second reading to the last; "device"
are the buffers there after the first reading and the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks._common import again, alone, machine, print_header, print_row, process_memory, slope, timed_in_turn
from benchmarks._figures import dress, new_page, png
from benchmarks.competitors.fedklpr_jax_rounds import Rounds, make_federation
from benchmarks.many_clients import cross_device
from fedklpr_jax.client_states import Shelf
from fedklpr_jax.data import labelled
from fedklpr_jax.figures import COLOURS, LIGHT, MARKERS
from fedklpr_jax.models import make_spec
from fedklpr_jax.trees import parameter_count

WARM = 2
LINEAR, FLAT = 1.1, 1.02
METHODS = ("fedavg", "fedper", "fedobp")


class Point(NamedTuple):
    """One federation: `clients`, `together` of them a round, `steps` local ones, `width` times the network's width."""

    clients: int = 10_000
    together: int = 100
    steps: int = 1
    width: float = 1.0


# What changes, and the federations in which it does.
AXES = {
    "clients": [Point(clients=n) for n in (100, 300, 1000, 3000, 10_000)],
    "clients a round": [Point(together=n) for n in (10, 30, 100, 300, 1000)],
    "parameters": [Point(width=share) for share in (0.25, 0.5, 1.0, 2.0, 4.0)],
    "local steps": [Point(steps=n) for n in (1, 2, 4, 8, 16, 32)],
}
SMALL = {
    "clients": [Point(clients=n, together=2, width=0.25) for n in (4, 8)],
    "parameters": [Point(clients=4, together=2, width=share) for share in (0.25, 0.5)],
}


class Grown(NamedTuple):
    """Of one federation: bytes of the process after each of some rounds, buffers on the device then, bytes on disk."""

    process: list[int]
    device: list[int]
    disk: int


def make_rounds(data: labelled.Labelled, point: Point, method: str = "fedavg") -> Rounds:
    """A federation at its start."""
    work = cross_device(data, 1, clients=point.clients, together=point.together, steps=point.steps)
    widths = [round(width * point.width) for width in make_spec("cnn").widths]
    return Rounds(make_federation(work, method, widths))


def size_of(axis: str, point: Point, rounds: Rounds) -> int:
    """What an axis counts."""
    if axis == "parameters":
        return parameter_count(rounds.state.server.model)
    return {"clients": point.clients, "clients a round": point.together, "local steps": point.steps}[axis]


def time_axis(
    data: labelled.Labelled, axis: str, points: Sequence[Point], repetitions: int
) -> dict[int, list[float]]:
    """Seconds of a round by size."""
    federations = [make_rounds(data, point) for point in points]
    sizes = [size_of(axis, point, rounds) for point, rounds in zip(points, federations, strict=True)]
    prepare = {str(size): again(rounds.run) for size, rounds in zip(sizes, federations, strict=True)}
    timed_in_turn(prepare, WARM)
    return {int(size): seconds for size, seconds in timed_in_turn(prepare, repetitions).items()}


def time_table(data: labelled.Labelled, axes: Mapping[str, Sequence[Point]], repetitions: int) -> dict[str, dict]:
    """Prints the table of times; median seconds of a round by axis and size."""
    print_header("of a round", "size", "ms", "least", "most", "fitted", "last", "linear")
    medians: dict[str, dict[int, float]] = {}
    for axis, points in axes.items():
        seconds = time_axis(data, axis, points, repetitions)
        found = medians[axis] = {size: statistics.median(values) for size, values in seconds.items()}
        for size, values in seconds.items():
            cells = (found[size], min(values), max(values))
            print_row(axis, f"{size:,}", *(f"{1e3 * cell:.0f}" for cell in cells), *[""] * 3)
        sizes, costs = list(found), list(found.values())
        slopes = slope(sizes, costs), slope(sizes[-2:], costs[-2:])
        verdict = "yes" if max(slopes) <= LINEAR else "no"
        print_row(f"{axis}: slopes", *[""] * 4, *(f"{one:.2f}" for one in slopes), verdict)
    return medians


def figure(medians: Mapping[str, Mapping[int, float]]) -> bytes:
    """Times against sizes, both as multiples of the smallest, over logarithmic axes, as a PNG."""
    page = new_page(7, 4.5)
    axes = page.subplots()
    dress(axes, "Time of a round", "size, times the smallest", "time, times that of the smallest")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    widest = max(max(found) / min(found) for found in medians.values())
    axes.plot([1, widest], [1, widest], color=LIGHT.ink, linestyle="--", linewidth=1, label="linear")
    for (axis, found), colour, marker in zip(medians.items(), COLOURS, MARKERS, strict=False):
        sizes, costs = list(found), list(found.values())
        axes.plot(
            [size / sizes[0] for size in sizes], [cost / costs[0] for cost in costs], color=colour, marker=marker,
            markersize=5, linewidth=1.2, label=f"{axis}: slope {slope(sizes, costs):.2f}",
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, labelcolor=LIGHT.ink)
    return png(page)


def readings(rounds: int) -> list[int]:
    """After which of so many rounds memory is read.

    >>> readings(200)
    [10, 50, 100, 150, 200]
    """
    return sorted({max(1, round(rounds * share)) for share in (0.05, 0.25, 0.5, 0.75, 1)})


def grow(root: Path, method: str, point: Point, rounds: int) -> Grown:
    """Plays so many rounds in the process it is called in."""
    running = make_rounds(labelled.read_folder(root), point, method)
    grown = Grown([], [], 0)
    with tempfile.TemporaryDirectory() as folder:
        if running.state.clients.bytes_in_all():
            states = dataclasses.replace(running.state.clients, shelf=Shelf(Path(folder)))
            running.state = running.state._replace(clients=states)
        for round_ in range(1, rounds + 1):
            running.run()
            clients = running.state.clients
            if clients.shelf:
                clients.shelf.sweep(set(clients.record().values()))
            if round_ in readings(rounds):
                grown.process.append(process_memory("VmRSS"))
                grown.device.append(sum(array.nbytes for array in jax.live_arrays()))
        return grown._replace(disk=sum(path.stat().st_size for path in Path(folder).iterdir()))


def memory_table(root: Path, methods: Sequence[str], points: Sequence[Point], rounds: int) -> None:
    """Prints the table of memory."""
    after = [f"round {round_}" for round_ in readings(rounds)]
    print_header("method", "clients", "a round", *after, "growth", "flat", "device, first", "device, last", "on disk")
    for method in methods:
        for point in points:
            grown = alone(grow, root, method, point, rounds)
            growth = grown.process[-1] / grown.process[min(1, len(grown.process) - 1)]
            print_row(
                method, f"{point.clients:,}", point.together, *(f"{size / 1e6:.0f}" for size in grown.process),
                f"{100 * (growth - 1):+.1f} %", "yes" if growth <= FLAT else "no",
                *(f"{size / 1e6:.2f}" for size in (grown.device[0], grown.device[-1], grown.disk)),
            )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the .npz of Fashion-MNIST")
    parser.add_argument("--repetitions", type=int, default=5, help="timed rounds of each size (default: 5); 0 = none")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the second table (default: 200); 0 = none")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fedavg", "fedper"],
                        help="of the second table (default: fedavg fedper)")  # fmt: skip
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000], help="of the second table")
    parser.add_argument("--out", type=Path, help="file for the figure of the first table, a PNG")
    parser.add_argument("--small", action="store_true", help="few clients and narrow networks, in seconds")
    options = parser.parse_args(arguments)
    if options.repetitions < 0 or options.rounds < 0:
        parser.error("--repetitions and --rounds take whole numbers from 0")
    points = [Point(clients=count) for count in options.clients]
    repetitions, rounds = options.repetitions, options.rounds
    if options.small:
        points, repetitions, rounds = [SMALL["clients"][0]], min(repetitions, 1), min(rounds, 4)

    print(f"{machine()}; times are medians of {repetitions} rounds\n", flush=True)
    if repetitions:
        medians = time_table(labelled.read_folder(options.root), SMALL if options.small else AXES, repetitions)
        if options.out:
            options.out.write_bytes(figure(medians))
        print()
    if rounds:
        memory_table(options.root, options.methods, points, rounds)


if __name__ == "__main__":
    main()
