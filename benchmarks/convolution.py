"""Stock convolution against patches, for the train step of a re-ID network: prints one Markdown table.

    python benchmarks/convolution.py

Each row is one way to run a step (forward, gradient, SGD): alone under `jit`, in the body of a `lax.scan` inside a
`lax.map` over clients, and under `vmap` over two clients with kernels of their own. On a CPU the last two are where a
stock convolution falls off; the ratio says how much the choice of `fedklpr_jax/models/convolution.py` avoids.
Both forms of a row are timed in turn, so that other work on the machine meets them alike; the medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
    choices = ("stock", "patches")
    calls = {c: program(make_spec(spec.name, convolution=c), way, batch, steps) for c in choices}
    times: dict[str, list[float]] = {c: [] for c in choices}
    for _ in range(repetitions):
        for choice, (call, count) in calls.items():
            start = time.perf_counter()
            call()
            times[choice].append((time.perf_counter() - start) / count * 1e3)
    return {choice: statistics.median(values) for choice, values in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls of each cell (thin; resnet18 takes 3)")
    repetitions = parser.parse_args().repetitions

    print(f"JAX {jax.__version__} on {jax.default_backend()}, {os.cpu_count()} cores, images {HEIGHT}x{WIDTH}\n")
    print("| network | batch | step under | stock ms | patches ms | stock / patches | patches images/s |")
    print("|---|---|---|---|---|---|---|")
    for name, batch, steps, times in (("thin", 32, 3, repetitions), ("resnet18", 8, 1, min(repetitions, 3))):
        for way in WAYS:
            ms = compare(make_spec(name), way, batch, steps, times)
            print(
                f"| {name} | {batch} | {way} | {ms['stock']:.1f} | {ms['patches']:.1f} "
                f"| {ms['stock'] / ms['patches']:.1f} | {batch / ms['patches'] * 1e3:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
