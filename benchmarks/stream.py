"""Pictures that stay on disk (`config.data.stream`) against the same on the device: a step's time, memory, models.

    python -m benchmarks.stream [--pictures 30000] [--steps 100] [--pairs 5]

One client, supervised, the network and the batches of a run by default. The pictures are noise in a memory map, as the
cache of decoded pictures is. Both ways run in processes of their own that train the same steps in turn, A B A B ...;
the model that each ends with is compared bit for bit. What a step waits for its batch is counted where it is read.
Memory is what the process holds that is no file (`RssAnon`), after training: a memory map's pages are the system's to
drop.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks._common import machine, print_header, print_row, process_memory
from fedklpr_jax import round as rounds
from fedklpr_jax.assembly import model_spec
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.data.stream import Streamed
from fedklpr_jax.federated import Method, Task
from fedklpr_jax.tasks import supervised

_SHOTS = 20  # pictures of a person



class Measured(NamedTuple):
    """Of some steps: how long they took and waited for pictures, seconds; bytes the process holds that are no file; a
    digest of the model."""

    seconds: float
    waited: float
    held: int
    digest: int


_run: Callable[[], Measured]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints its table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.stream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=30_000, help="of the client")
    parser.add_argument("--steps", type=int, default=100, help="that are timed at once")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each way")
    given = parser.parse_args(arguments)
    ways = {"on the device": False, "on disk": True}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pixels.npy"
        _draw(file, given.pictures)
        pools = {name: ProcessPoolExecutor(1, mp_context=spawn) for name in ways}
        for name, stream in ways.items():
            pools[name].submit(_prepare, file, given.steps, stream).result()
        rows = [{name: pool.submit(_measure).result() for name, pool in pools.items()} for _ in range(given.pairs)]
        for pool in pools.values():
            pool.shutdown()
    print(f"{machine()}; {given.pictures} pictures, {_bytes(given.pictures) / 1e6:.0f} MB\n")
    print_header("pictures", "ms a step", "least", "most", "ms waited", "MB that are no file")
    for name in ways:
        times = [1e3 * row[name].seconds / given.steps for row in rows]
        waited = statistics.median(1e3 * row[name].waited / given.steps for row in rows)
        print_row(name, f"{statistics.median(times):.1f}", f"{min(times):.1f}", f"{max(times):.1f}", f"{waited:.2f}",
                  f"{rows[-1][name].held / 1e6:.0f}")  # fmt: skip
    ratios = [row["on disk"].seconds / row["on the device"].seconds for row in rows]
    same = "equal" if all(row["on disk"].digest == row["on the device"].digest for row in rows) else "NOT equal"
    print(f"\non disk / on the device, by pair: {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f}); the models are {same}")  # fmt: skip


def _bytes(pictures: int) -> int:
    config = default_config()
    return pictures * config.data.height * config.data.width * 3


def _draw(file: Path, pictures: int) -> None:
    config, rng = default_config(), np.random.default_rng(0)
    shape = (pictures, config.data.height, config.data.width, 3)
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    for first in range(0, pictures, 1000):
        part = pixels[first : first + 1000]
        part[:] = rng.integers(0, 256, part.shape, np.uint8)
    pixels.flush()


def _prepare(file: Path, steps: int, stream: bool) -> None:
    """Builds and compiles, in a process of its own; leaves what runs the steps in `_run`."""
    global _run
    config = default_config()
    config.task.name, config.data.stream, config.epochs = "supervised", stream, 1
    config = resolved(config)
    pixels = np.load(file, mmap_mode="r")
    count = len(pixels)
    train = Images(pixels, (1 + np.arange(count) // _SHOTS).astype(np.int32), (np.arange(count) % 2).astype(np.int32),
                   ("",) * count)  # fmt: skip
    few = train.take(np.arange(2))
    task = supervised.make_task([Site("noise", train, few, few)], model_spec(config), config, union=True)
    del train, few, pixels
    engine = rounds.make_engine(task, Method("fedavg"), epochs=1)
    server, states = rounds.start(task, engine.method, 0)
    server = engine.place(server)
    message = engine.download(server, np.int32(0))
    inputs = rounds.round_inputs(engine, [message], [states[0]], [0], seed=0, round_=0)
    inputs = inputs._replace(steps=np.minimum(inputs.steps, steps).astype(np.int32))

    def run() -> Measured:
        began, before = time.perf_counter(), _waited(task)
        upload, _, _ = engine.update(0, rounds.rates(task, 0, 1), inputs)
        seconds = time.perf_counter() - began
        digest = 0
        for leaf in jax.tree.leaves(upload.model):
            digest = zlib.crc32(np.asarray(leaf).tobytes(), digest)
        return Measured(seconds, _waited(task) - before, process_memory("RssAnon"), digest)

    run()
    _run = run


def _waited(task: Task) -> float:
    return task.arrays.pixels.waited if isinstance(task.arrays.pixels, Streamed) else 0.0


def _measure() -> Measured:
    return _run()


if __name__ == "__main__":
    main()
