"""One convolution of stride 1 by patches and by tiles, forward and backward: prints one Markdown table.

    taskset -c 0 python -m benchmarks.tiles

Each is timed in a loop inside one program, as in training; the least of `--repetitions` is printed, and which form
`fedklpr_jax/models/winograd.py` chooses for the shape.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks._common import machine, print_header, print_row
from fedklpr_jax.models.convolution import patches_convolution
from fedklpr_jax.models.winograd import TILES, Pads, by_tiles, tile_for

# Images, rows and columns of the map, channels, features, side of the kernel, padding on each side.
SHAPES = (
    (32, 12, 12, 32, 64, 5, 0), (7, 12, 12, 32, 64, 5, 0), (32, 28, 28, 16, 16, 3, 1), (32, 14, 14, 32, 32, 3, 1),
    (32, 32, 16, 64, 64, 3, 1), (32, 16, 8, 128, 128, 3, 1), (32, 8, 4, 256, 256, 3, 1), (32, 8, 4, 512, 512, 3, 1),
    (16, 4, 2, 192, 192, 3, 1), (16, 2, 1, 512, 512, 3, 1),
)  # fmt: skip

Convolution = Callable[[jax.Array, jax.Array], jax.Array]


def seconds(convolution: Convolution, images: jax.Array, kernel: jax.Array, repetitions: int, times: int = 6) -> float:
    """The least time of a convolution with both its gradients, among `times` in a loop."""

    def once(_: int, carry: jax.Array) -> jax.Array:
        # Every pass hangs on the one before it, so that nothing is taken out of the loop: not the kernel's transform
        # either, for training has another kernel at every step.
        result, back = jax.vjp(convolution, images + carry * 1e-30, kernel + carry * 1e-30)
        return carry + 1e-30 * sum(jnp.sum(leaf) for leaf in (result, *back(jnp.cos(result))))

    loop = jax.jit(lambda: lax.fori_loop(0, times, once, jnp.float32(0)))
    jax.block_until_ready(loop())
    took = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(loop())
        took.append(time.perf_counter() - began)
    return min(took) / times


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    repetitions = parser.parse_args(given).repetitions
    print(f"{machine()}\n", flush=True)
    print_header("images, map, channels, kernel", "patches ms", *(f"tiles of {tile} ms" for tile in TILES), "chosen")
    for count, height, width, channels, features, size, pad in SHAPES:
        images = jax.random.normal(jax.random.key(0), (count, height, width, channels))
        kernel = jax.random.normal(jax.random.key(1), (size, size, channels, features))
        pads: Pads = ((pad, pad), (pad, pad))
        forms: list[Convolution] = [lambda x, w, pads=pads: patches_convolution(x, w, (1, 1), pads)]
        forms += [lambda x, w, pads=pads, tile=tile: by_tiles(x, w, pads, tile) for tile in TILES]
        cells = [f"{1e3 * seconds(form, images, kernel, repetitions):.1f}" for form in forms]
        maps = (count, height + 2 * pad - size + 1, width + 2 * pad - size + 1)
        tile = tile_for(maps, channels, features, size)
        name = f"{count}, {height}x{width}, {channels} to {features}, {size}x{size}"
        print_row(name, *cells, f"tiles of {tile}" if tile else "patches")


if __name__ == "__main__":
    main()
