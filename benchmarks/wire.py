"""What the wire format costs: bytes and seconds, on weights of the shape and scale of a ResNet.

Run from the repository root, optionally with the size in millions of parameters (default 25, about 15 seconds):

    python -m benchmarks.wire 5

Prints Markdown. Sizes are percentages of the dense float32 tree, masks included; the reference is the entropy of the
mask, layer by layer, and zstd over the shuffled bytes of the kept values. Speeds are dense megabytes (10**6 bytes) a
second of processor time (everything runs on one core), the best of three runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import zstandard

from benchmarks._common import machine, print_header, print_row
from fedklpr_jax.wire import decode, encode, peek

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
FLIPS = (0.001, 0.01, 0.05, 0.2)


def weights(millions: float, rng: np.random.Generator) -> dict[str, Any]:
    """Returns He-normal 3x3 kernels of several widths with norm scales, about `millions` of float32 parameters."""
    tree: dict[str, Any] = {}
    size = 0
    while size < millions * 1e6:
        width = (64, 128, 256, 512)[len(tree) % 4]
        kernel = rng.standard_normal((3, 3, width, width), np.float32) * np.float32((2 / (9 * width)) ** 0.5)
        tree[f"block{len(tree):03d}"] = {"kernel": kernel, "scale": np.ones(width, np.float32)}
        size += kernel.size + width
    return tree


def keep(block: dict[str, np.ndarray], kernel_mask: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the mask of a block: the given one for its kernel, all True for its norm scale."""
    return {"kernel": kernel_mask, "scale": np.ones(block["scale"].shape, np.bool_)}


def magnitude_mask(tree: dict[str, Any], sparsity: float) -> dict[str, Any]:
    """Keeps the largest kernel weights under one threshold for the whole tree, and every norm scale."""
    largest = np.concatenate([np.abs(block["kernel"]).ravel() for block in tree.values()])
    threshold = np.quantile(largest[:: max(1, largest.size // 1_000_000)], sparsity)
    least = threshold if sparsity else 0.0
    return {name: keep(block, np.abs(block["kernel"]) >= least) for name, block in tree.items()}


def random_mask(tree: dict[str, Any], sparsity: float, rng: np.random.Generator) -> dict[str, Any]:
    """Keeps random kernel weights, and every norm scale."""
    return {
        name: keep(block, rng.random(block["kernel"].shape, np.float32) >= sparsity) for name, block in tree.items()
    }


def flip(mask: dict[str, Any], share: float, rng: np.random.Generator) -> dict[str, Any]:
    """Returns a copy of a mask with a random share of the kernel bits turned over."""
    return {
        name: keep(block, block["kernel"] ^ (rng.random(block["kernel"].shape, np.float32) < share))
        for name, block in mask.items()
    }


def reference(tree: dict[str, Any], mask: dict[str, Any]) -> float:
    """Bytes that a usual way would take: the entropy of the mask's bits, layer by layer, and the kept values with their
    bytes shuffled, by zstd at its default level."""
    entropy, kept = 0.0, []
    for name, block in tree.items():
        for key, leaf in block.items():
            share = mask[name][key].mean()
            if 0 < share < 1:
                entropy -= leaf.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
            kept.append(leaf[mask[name][key]])
    values = np.concatenate(kept)
    shuffled = np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T)
    return entropy / 8 + len(zstandard.ZstdCompressor().compress(shuffled))


def best(function: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the value of a call and the least processor time of three runs in seconds."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        value = function()
        seconds.append(time.process_time() - start)
    return value, min(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("millions", type=float, nargs="?", default=25.0, help="millions of parameters (default: 25)")
    millions = parser.parse_args(arguments).millions
    if not millions > 0:
        parser.error("the size is a number of millions above 0")
    rng = np.random.default_rng(0)
    tree = weights(millions, rng)
    dense = sum(leaf.nbytes for block in tree.values() for leaf in block.values())
    print(machine())
    print(f"{dense / 4e6:.1f} million float32 parameters, {dense / 1e6:.0f} MB dense, {2 * len(tree)} leaves\n")
    print_header(
        "sparsity", "by magnitude", "of the reference", "random mask", "mask held", "bfloat16", "encode MB/s",
        "decode MB/s",
    )  # fmt: skip
    for sparsity in SPARSITIES:
        mask = magnitude_mask(tree, sparsity)
        payload, encoding = best(partial(encode, tree, mask))
        _, decoding = best(partial(decode, payload, tree))
        sizes = [
            len(payload),
            len(encode(tree, random_mask(tree, sparsity, rng))),
            len(encode(tree, mask, receiver_has_mask=True)),
            len(encode(tree, mask, value_dtype="bfloat16")),
        ]
        shares = [f"{100 * size / dense:.1f} %" for size in sizes]
        shares.insert(1, f"{len(payload) / reference(tree, mask):.3f}")
        print_row(f"{sparsity:.0%}", *shares, f"{dense / 1e6 / encoding:.0f}", f"{dense / 1e6 / decoding:.0f}")
    print()
    print_header("bits changed", "mask sent as", "mask bytes", "bitmap bytes")
    previous = magnitude_mask(tree, 0.5)
    for share in FLIPS:
        mask = flip(previous, share, rng)
        header, full = peek(encode(tree, mask, previous_mask=previous)), peek(encode(tree, mask))
        print_row(f"{share:.1%}", header["mask_mode"], f"{header['mask_bytes']:,}", f"{full['mask_bytes']:,}")


if __name__ == "__main__":
    main()
