"""One training step of a re-ID network here and in PyTorch: prints one Markdown table.

Run from the repository root, on a machine with nothing else to do:

    python -m benchmarks.step --python /path/of/a/python/with/torch

Forward, backward and SGD of the same network on the same shapes, float32, in a loop of steps: ours compiled with
`model.convolution=auto` and, on a CPU, with patches; PyTorch as it comes, with channels last, and compiled, on a GPU
with both too. All are timed in turn, in one run, each with all cores; the ratio is ours to PyTorch's fastest. Without
`--python` only ours are timed. The floor is the step's operations as direct convolutions (XLA's count) over the rate of
a large matrix product, measured first; tiles need fewer operations, so it can be passed. On a GPU:

    python -m benchmarks.step --python PYTHON --networks resnet50 --sizes 256x128 --batches 64 --dtype bfloat16

With bfloat16 ours computes the trunk in it (`model.dtype`), PyTorch runs under automatic mixed precision, and the
matrix product is one of bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from benchmarks._common import machine, print_header, print_row
from benchmarks._peer import Peer
from benchmarks.convolution import train_step
from fedklpr_jax.models import make_spec

BLOCKS = {"resnet18": [2, 2, 2, 2], "resnet50": [3, 4, 6, 3]}
ROWS = (("resnet18", 64, 32), ("resnet18", 128, 64), ("resnet50", 128, 64), ("resnet50", 256, 128))
FORMS = ("default", "channels_last", "compile", "both")
OURS = ("auto", "patches")
DTYPES = ("float32", "bfloat16")
LEAST_STEPS = 4

Timed = Callable[[int], float]


def forms_here() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ours and PyTorch's on this backend: patches are for CPUs, compiled and channels last at once for GPUs."""
    return (OURS, FORMS[:3]) if jax.default_backend() == "cpu" else (OURS[:1], FORMS)


def matmul_rate(size: int, dtype: str = "float32", repetitions: int = 5) -> float:
    """Operations a second of the best of some products of square matrices, all cores at work."""
    product = jax.jit(jnp.matmul)
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    jax.block_until_ready(product(matrix, matrix))
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def operations(name: str, height: int, width: int, batch: int) -> float:
    """Of a step with direct convolutions, as XLA counts them."""
    spec = make_spec(name, convolution="stock")
    variables = jax.eval_shape(lambda: spec.init(jax.random.key(0), height, width))
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
    return float(jax.jit(train_step(spec)).lower(variables, images).cost_analysis()["flops"])


def ours(name: str, convolution: str, height: int, width: int, batch: int, dtype: str = "float32") -> Timed:
    """Seconds of a step among so many, all in one compiled loop."""
    spec = make_spec(name, convolution=convolution, dtype=dtype)
    step = train_step(spec)
    images = jax.random.normal(jax.random.key(1), (batch, height, width, 3))
    loop = jax.jit(lambda state, count: jax.lax.fori_loop(0, count, lambda _, s: step(s, images), state))
    variables = spec.init(jax.random.key(0), height, width)

    def timed(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(loop(variables, jnp.int32(count)))
        return (time.perf_counter() - began) / count

    timed(1)
    return timed


class Steps:
    """PyTorch's steps in a process of its own, one network in it: called with a count, seconds of one of so many."""

    def __init__(self, python: str, build: list[object]) -> None:
        self.peer = Peer(python, "pytorch_steps")
        self.peer.ask({"build": build})

    def __call__(self, count: int) -> float:
        return float(self.peer.ask({"steps": count}))


def compare(
    name: str, size: tuple[int, int], batch: int, dtype: str, python: str | None, repetitions: int
) -> dict[str, float]:
    """Median milliseconds a step by form."""
    own, others = forms_here()
    forms: dict[str, Timed] = {form: ours(name, form, *size, batch, dtype) for form in own}
    peers = {}
    for form in others if python else ():
        try:
            peers[form] = Steps(python or "", [BLOCKS[name], name == "resnet50", *size, batch, form, dtype])
        except RuntimeError as error:
            print(f"{name} {form}: {error}", file=sys.stderr)
    forms |= peers
    once = forms["auto"](1)
    # A second each and several steps, so that a call, which has its memory given anew by the system, is hardly a part
    # of what is measured: epochs are steps in a row too.
    count = max(LEAST_STEPS, round(1 / once))
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(repetitions):
        for form, timed in forms.items():
            seconds[form].append(timed(count))
    for steps in peers.values():
        steps.peer.close()
    return {form: 1e3 * statistics.median(values) for form, values in seconds.items()}


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="a Python with PyTorch")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32])
    sizes = [f"{height}x{width}" for _, height, width in ROWS]
    parser.add_argument("--sizes", nargs="+", default=sizes, choices=sorted(set(sizes)), help="height x width")
    parser.add_argument("--networks", nargs="+", default=sorted(BLOCKS), choices=sorted(BLOCKS))
    options = parser.parse_args(given)
    own, others = forms_here()
    rate = matmul_rate(2048 if "patches" in own else 8192, options.dtype)
    print(f"{machine()}; {options.dtype}, matrix products at {rate / 1e9:.0f} GFLOP/s\n", flush=True)
    names = ["ours ms", "patches ms"][: len(own)] + [f"PyTorch {form} ms" for form in others]
    print_header("step", "batch", "floor ms", *names, "ours / PyTorch", "floor / ours")
    rows = [row for row, size in zip(ROWS, sizes, strict=True) if row[0] in options.networks and size in options.sizes]
    for name, height, width in rows:
        for batch in options.batches:
            ms = compare(name, (height, width), batch, options.dtype, options.python, options.repetitions)
            cells = [f"{ms[form]:.1f}" if form in ms else "-" for form in (*own, *others)]
            best = min((ms[form] for form in others if form in ms), default=None)
            ratio = "-" if best is None else f"{ms['auto'] / best:.2f}"
            floor = 1e3 * operations(name, height, width, batch) / rate
            print_row(f"{name} {height}x{width}", batch, f"{floor:.1f}", *cells, ratio, f"{floor / ms['auto']:.2f}")


if __name__ == "__main__":
    main()
