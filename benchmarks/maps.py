"""Time of a client's step by `client_map`, network and number of clients: prints two Markdown tables.

Run from the repository root, on a machine with nothing else to do:

    python -m benchmarks.maps
    python -m benchmarks.maps --longest 4         unequal clients
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m benchmarks.maps      two devices out of one processor
    python -m benchmarks.maps --small             seconds; its numbers mean nothing

One round of FedAvg's clients (classification of noise, SGD with momentum, messages handed over) under every choice of
`client_map`, on all devices there are; the choices are timed in turn. A cell is the median time of a round over the
training steps of all its clients, in milliseconds. "map, summed" is how a run with `wire.encode=False` maps FedAvg: its
uploads are added up as each client is done.

The second table is what `client_map=auto` would go by: for every choice its time over that of the row's fastest, as a
geometric mean over a network's rows and at worst. "map, summed" is left out of it, for it is no choice.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks._common import again, machine, print_header, print_row, timed_in_turn
from benchmarks.round import TINY
from fedklpr_jax.client_maps import CLIENT_MAPS, Common
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.data.labelled import Labelled
from fedklpr_jax.federated import Task
from fedklpr_jax.methods import make_method
from fedklpr_jax.models import make_spec
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.round import make_engine, rates, round_inputs, start
from fedklpr_jax.tasks import classification
from fedklpr_jax.tasks.classification import Share

CLASSES = 10
SUMMED = "map, summed"


class Network(NamedTuple):
    """A network, height, width and channels of its images, and numbers of clients."""

    spec: ModelSpec
    shape: tuple[int, int, int]
    clients: tuple[int, ...]


NETWORKS = {
    "cnn": Network(make_spec("cnn"), (28, 28, 1), (10, 100)),
    "thin": Network(make_spec("thin"), (64, 32, 3), (4, 16)),
    "resnet18": Network(make_spec("resnet18"), (64, 32, 3), (2, 8)),
}
SMALL = {"tiny": Network(TINY, (16, 16, 1), (4,))}


def noise_task(network: Network, config: Any, steps: Sequence[int]) -> Task:
    """Classification of noise over clients that make so many steps an epoch."""
    random = np.random.default_rng(0)
    ends = np.cumsum([0, *steps]) * config.task.batch
    pixels = random.integers(0, 256, (ends[-1], *network.shape), np.uint8)
    labels = random.integers(0, CLASSES, ends[-1], np.int32)
    data = Labelled(pixels, labels, tuple(map(str, range(CLASSES))))
    none = np.arange(0)
    shares = [Share(np.arange(a, b), none, none) for a, b in zip(ends, ends[1:], strict=False)]
    return classification.make_task(data, shares, network.spec, config)


def choices_of(chunk: int) -> dict[str, tuple[str, int]]:
    """By name the values of `client_map` and `client_chunk`."""
    return {name: (name, 0) for name in CLIENT_MAPS} | {f"vmap, {chunk} at once": ("vmap", chunk)}


def time_choices(task: Task, config: Any, chunk: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of a round of all clients under every choice, timed in turn."""
    method = make_method(config.method)
    everyone, factors = range(len(task.clients)), rates(task, 0, 1)
    calls = {}
    for name, (client_map, together) in choices_of(chunk).items():
        engine = make_engine(task, method, epochs=1, client_map=client_map, chunk=together, devices=0)
        server, clients = start(task, method, config.seed)
        message = Common(engine.download(engine.place(server), np.int32(0)))
        inputs = round_inputs(engine, message, list(clients), everyone, seed=config.seed, round_=0)
        calls[name] = again(partial(engine.update, 0, factors, inputs))
        if engine.update_summed:
            calls[SUMMED] = again(partial(engine.update_summed, 0, factors, inputs))
    timed_in_turn(calls, 1)
    return timed_in_turn(calls, repetitions)


def steps_of(clients: int, steps: int, longest: float) -> list[int]:
    """Steps of every client, evenly from `steps` to `longest` times as many.

    >>> steps_of(3, 2, 4)
    [2, 5, 8]
    """
    return [round(steps * factor) for factor in np.linspace(1, longest, clients)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--clients", type=int, nargs="+", help="of every network (default: those of each)")
    parser.add_argument("--batch", type=int, default=32, help="images of a step (default: 32)")
    parser.add_argument("--steps", type=int, default=4, help="of the shortest client (default: 4)")
    parser.add_argument("--longest", type=float, default=1, help="steps of the longest client over these (default: 1)")
    parser.add_argument("--chunk", type=int, default=4, help="clients at once of the vmap in chunks (default: 4)")
    parser.add_argument("--repetitions", type=int, default=3, help="timed rounds of each choice (default: 3)")
    parser.add_argument("--small", action="store_true", help="a tiny network and four clients, in seconds")
    options = parser.parse_args(arguments)
    if min(options.batch, options.steps, options.longest, options.chunk, options.repetitions) < 1:
        parser.error("--batch, --steps, --longest, --chunk and --repetitions take numbers from 1")
    networks = {name: NETWORKS[name] for name in options.networks}
    if options.small:
        networks, options.repetitions = SMALL, 1

    config = default_config()
    config.method.name, config.task.name, config.task.batch = "fedavg", "classification", options.batch
    config.optimizer.name = "sgd"
    config = resolved(config)
    names = list(choices_of(options.chunk))
    print(
        f"{machine()}; devices {len(jax.devices())}; batch {options.batch}, {options.steps} steps, of the longest "
        f"client {options.longest:g} times as many, medians of {options.repetitions}\n",
        flush=True,
    )
    print_header("network", "clients", *names, SUMMED, "fastest")
    over: dict[str, dict[str, list[float]]] = {}
    for label, network in networks.items():
        for clients in options.clients or network.clients:
            steps = steps_of(clients, options.steps, options.longest)
            seconds = time_choices(noise_task(network, config, steps), config, options.chunk, options.repetitions)
            ms = {name: 1e3 * statistics.median(values) / sum(steps) for name, values in seconds.items()}
            fastest = min(names, key=ms.__getitem__)
            cells = [f"{ms[name]:.2f}" if name in ms else "" for name in (*names, SUMMED)]
            print_row(label, clients, *cells, fastest)
            for name in names:
                over.setdefault(label, {}).setdefault(name, []).append(ms[name] / ms[fastest])
    print()
    print_header("network", "choice", "of the fastest", "at worst")
    for label, ratios in over.items():
        for name, values in ratios.items():
            print_row(label, name, f"{statistics.geometric_mean(values):.2f}", f"{max(values):.2f}")


if __name__ == "__main__":
    main()
