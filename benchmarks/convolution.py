"""Stock convolution against patches and tiles, for the train step of a re-ID network: prints one Markdown table.

    python -m benchmarks.convolution

Each row is one way to run a step (forward, gradient, SGD): alone under `jit`, in the body of a `lax.scan` inside a
`lax.map` over clients, and under `vmap` over two clients with kernels of their own. On a CPU the last two are where a
stock convolution falls off; the ratios say how much the choice of `fedklpr_jax/models/convolution.py` avoids.
All forms of a row are timed in turn, so that other work on the machine meets them alike; the medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._common import again, machine, print_header, print_row, timed_in_turn
from fedklpr_jax.models import ModelSpec, make_spec

HEIGHT, WIDTH, CLIENTS = 64, 32, 2

Step = Callable[[Any, jax.Array], Any]
WAYS = ("jit", "map + scan", "vmap")


def train_step(spec: ModelSpec) -> Step:
    """One SGD step on `images [n, h, w, 3]`; the loss is any function of the embedding that has a gradient."""

    def step(variables: Any, images: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            outputs, stats = spec.apply({"params": params, "batch_stats": variables["batch_stats"]}, images, train=True)
            return jnp.mean(jnp.square(outputs["embedding"] - 1.0)), stats

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradients)
        return {"params": params, "batch_stats": stats}

    return step


def program(spec: ModelSpec, way: str, batch: int, steps: int) -> tuple[Callable[[], Any], int]:
    """A compiled and warmed call, and the number of steps in it."""
    step = train_step(spec)

    def scanned(variables: Any, images: jax.Array) -> Any:
        return jax.lax.scan(lambda state, _: (step(state, images), None), variables, length=steps)[0]

    variables = spec.init(jax.random.key(0), HEIGHT, WIDTH)
    images = jax.random.normal(jax.random.key(1), (batch, HEIGHT, WIDTH, 3))
    clients = jax.tree.map(lambda leaf: jnp.stack([leaf] * CLIENTS), (variables, images))
    compiled, arguments, count = {
        "jit": (jax.jit(step), (variables, images), 1),
        "map + scan": (jax.jit(lambda v, x: jax.lax.map(lambda c: scanned(*c), (v, x))), clients, CLIENTS * steps),
        "vmap": (jax.jit(jax.vmap(step)), clients, CLIENTS),
    }[way]

    def call() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    call()
    return call, count


def compare(spec: ModelSpec, way: str, batch: int, steps: int, repetitions: int) -> dict[str, float]:
    """Median milliseconds a step, by convolution."""
    choices = ("stock", "patches", "winograd")
    programs = {c: program(make_spec(spec.name, convolution=c), way, batch, steps) for c in choices}
    count = programs["stock"][1]
    times = timed_in_turn({c: again(call) for c, (call, _) in programs.items()}, repetitions)
    return {choice: statistics.median(values) / count * 1e3 for choice, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls of each cell (thin; resnet18 takes 3)")
    repetitions = parser.parse_args(arguments).repetitions

    print(f"{machine()}; images {HEIGHT}x{WIDTH}\n", flush=True)
    print_header("network", "batch", "step under", "stock ms", "patches ms", "winograd ms", "stock / winograd",
                 "patches / winograd", "winograd images/s")  # fmt: skip
    for name, batch, steps, times in (("thin", 32, 3, repetitions), ("resnet18", 8, 1, min(repetitions, 3))):
        for way in WAYS:
            ms = compare(make_spec(name), way, batch, steps, times)
            best = ms["winograd"]
            ratios = (f"{ms[other] / best:.1f}" for other in ("stock", "patches"))
            cells = (f"{ms[form]:.1f}" for form in ("stock", "patches", "winograd"))
            print_row(name, batch, way, *cells, *ratios, f"{batch / best * 1e3:.0f}")


if __name__ == "__main__":
    main()
