"""Convolution of stride 1 or 2 by small tiles, which takes a fraction of the products: Winograd's minimal filtering.

A tile of `m x m` outputs of a `k x k` kernel needs `(m + k - 1)^2` products a channel pair instead of `m^2 k^2`: 36
instead of 144 for m = 4, k = 3 (Winograd, "Arithmetic complexity of computations", 1980; Lavin and Gray, "Fast
algorithms for convolutional neural networks", CVPR 2016, equation 8):

    Y = A^T [ (G g G^T) * (B^T d B) ] A

for each tile `d` of the images and kernel `g`, the product summed over the channels: one matrix product for each of
the `(m + k - 1)^2` places. The three transforms are additions, so the form pays where the channels are many; `tile_for`
says where. Sums run in float32; with m = 4 the result differs from the direct one by some 1e-5 of its largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILES = (2, 4)
# Where the transforms evaluate the polynomials: small numbers, each with its negative, lose the least to rounding.
_POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))
# How many products of a matrix product take the time of moving one number in or out of a transform. With 32 the form
# chosen was within 16 % of the best of the three, forward and backward, for each of 23 shapes of the networks here, on
# one AVX-512 core that makes 45e9 products a second; with 16 or 64 some choices were worse.
_MOVE = 32
# Tiles have to save as many products, some 0.1 ms: their programs are larger and take longer to compile.
_LEAST = 5_000_000

Pads = tuple[tuple[int, int], tuple[int, int]]


@cache
def transforms(tile: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices `A^T`, `G` and `B^T` of Lavin and Gray for outputs `tile` and a kernel of `size`, in one dimension.

    By Toom and Cook: the polynomials are evaluated at the points 0, 1, -1, 2, -2, ... and at infinity.

    Returns:
      float32 `[m, a]`, `[a, k]`, `[a, a]` with m = tile, k = size, a = m + k - 1.

    Raises:
      ValueError: where tile and kernel need more points than there are.

    >>> transforms(2, 3)[0].tolist()
    [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, -1.0, 1.0]]
    """
    points = [Fraction(point) for point in _POINTS[: tile + size - 2]]
    if len(points) < tile + size - 2:
        raise ValueError(f"a tile of {tile} under a kernel of {size} needs more than {len(_POINTS) + 1} points")
    others = [[q for q in points if q != p] for p in points]
    scales = [prod((p - q for q in rest), start=Fraction(1)) for p, rest in zip(points, others, strict=True)]
    outputs = [[p**i for p in points] + [Fraction(i == tile - 1)] for i in range(tile)]
    kernel = [[p**i / scale for i in range(size)] for p, scale in zip(points, scales, strict=True)]
    kernel.append([Fraction(i == size - 1) for i in range(size)])
    images = [[*_expanded(rest), Fraction(0)] for rest in others]
    images.append(_expanded(points))
    a, g, b = (np.array(matrix, np.float32) for matrix in (outputs, kernel, images))
    return a, g, b


def tile_for(maps: tuple[int, int, int], channels: int, features: int, size: int, stride: int = 1) -> int | None:
    """The tile that takes the least time, forward and for the gradients alike; None where patches take hardly more.

    Args:
      maps: images, rows and columns of the output.
      channels: of the images.
      features: of the output.
      size: of the square kernel.
      stride: 1, or 2 for a convolution that `unstrided` turns into one of stride 1.

    >>> tile_for((32, 16, 8), 64, 64, 3), tile_for((16, 4, 2), 192, 192, 3), tile_for((32, 24, 24), 1, 32, 5)
    (4, 2, None)
    >>> tile_for((16, 64, 32), 3, 64, 7, stride=2), tile_for((16, 16, 8), 64, 128, 3, stride=2)
    (4, None)
    """
    count, height, width = maps
    outputs = count * height * width
    least, best = size**2 * outputs * (channels * features + _MOVE * channels) - _LEAST, None
    # Into the blocks once, and the gradient out of them.
    rearranged = 2 * _MOVE * channels * stride**2 * outputs if stride > 1 else 0
    channels, size = channels * stride**2, -(-size // stride)
    if min(maps) < 1 or size + max(TILES) - 2 > len(_POINTS):
        return None
    pairs = channels * features
    for tile in TILES if size > 1 else ():
        tiles = count * -(-height // tile) * -(-width // tile)
        moved = tiles * (channels + features) + pairs
        time = (tile + size - 1) ** 2 * (tiles * pairs + _MOVE * moved) + rearranged
        if time < least:
            least, best = time, tile
    return best


def unstrided(images: jax.Array, kernel: jax.Array, pads: Pads) -> tuple[jax.Array, jax.Array]:
    """Images and kernel whose convolution of stride 1, without pads, is that of stride 2 of the given ones.

    Each 2 x 2 block of pixels becomes one with four times the channels; the kernel is cut likewise.

    Args:
      images: `[n, h, w, c]`.
      kernel: `[k, k, c, o]`.
      pads: zeros before and after the rows, and the columns.

    Returns:
      `[n, h', w', 4 c]` and `[k', k', 4 c, o]` with k' = ceil(k / 2).

    >>> [x.shape for x in unstrided(jnp.ones((1, 8, 6, 3)), jnp.ones((7, 7, 3, 5)), ((3, 3), (3, 3)))]
    [(1, 7, 6, 12), (4, 4, 12, 5)]
    """
    size, _, channels, features = kernel.shape
    half = -(-size // 2)
    lengths = [(length + sum(pad) - size) // 2 + half for length, pad in zip(images.shape[1:3], pads, strict=True)]
    # As much as the kernel made even reaches; what no output looks at is cut off.
    reach = [(before, 2 * blocks - length - before)
             for (before, _), blocks, length in zip(pads, lengths, images.shape[1:3], strict=True)]  # fmt: skip
    padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *((*pair, 0) for pair in reach), (0, 0, 0)])
    blocks = padded.reshape(len(images), lengths[0], 2, lengths[1], 2, channels).transpose(0, 1, 3, 2, 4, 5)
    even = jnp.pad(kernel, [(0, 2 * half - size)] * 2 + [(0, 0)] * 2)
    cut = even.reshape(half, 2, half, 2, channels, features).transpose(0, 2, 1, 3, 4, 5)
    return blocks.reshape(*blocks.shape[:3], 4 * channels), cut.reshape(half, half, 4 * channels, features)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def by_tiles(images: jax.Array, kernel: jax.Array, pads: Pads, tile: int) -> jax.Array:
    """The convolution itself, stride 1; only reverse differentiation is defined.

    Args:
      images: float32 `[n, h, w, c]`.
      kernel: float32 `[k, k, c, o]`.
      pads: zeros before and after the rows, and the columns.
      tile: side m of a tile of outputs.

    Returns:
      float32 `[n, h', w', o]`.

    >>> ones = jnp.ones((1, 3, 3, 1))
    >>> by_tiles(ones, ones[0, :, :, :, None], ((1, 1), (1, 1)), 2)[0, :, :, 0].astype(int).tolist()
    [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
    """
    return _forward(images, kernel, pads, tile)[0]


def _forward(images: jax.Array, kernel: jax.Array, pads: Pads, tile: int) -> tuple[jax.Array, Any]:
    size = kernel.shape[0]
    outputs, weigh, move = transforms(tile, size)
    lengths = [length + sum(pad) - size + 1 for length, pad in zip(images.shape[1:3], pads, strict=True)]
    count = [-(-length // tile) for length in lengths]
    # The last tiles may reach beyond the pads.
    reach = [
        (before, tiles * tile + size - 1 - length - before)
        for (before, _), tiles, length in zip(pads, count, images.shape[1:3], strict=True)
    ]
    padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *((*pair, 0) for pair in reach), (0, 0, 0)])
    rows = jnp.stack(_combined(move, _places(padded, 1, count[0], tile, size)))
    moved = jnp.stack(_combined(move, _places(rows, 3, count[1], tile, size)), axis=1)
    weighed = _both(weigh, kernel)
    # One axis of tiles: over several, XLA copies what it sums over.
    product = jnp.einsum("abtc,abco->abto", _joined(moved), weighed).reshape(*moved.shape[:-1], -1)
    # Across, then down; each new place lies where it belongs in the map, so that nothing is moved afterwards.
    across = jnp.stack(_combined(outputs, [product[:, b] for b in range(product.shape[1])]), axis=4)
    wide = across.reshape(len(product), len(images), count[0], count[1] * tile, -1)
    maps = jnp.stack(_combined(outputs, list(wide)), axis=2).reshape(len(images), count[0] * tile, *wide.shape[3:])
    return maps[:, : lengths[0], : lengths[1]], (moved, weighed)


def _backward(pads: Pads, tile: int, kept: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both gradients in the place of the products: `D = A dY A^T`, then `G^T (V^T D) G` and `B (D U^T) B^T`."""
    moved, weighed = kept
    size = moved.shape[0] - tile + 1
    outputs, weigh, move = transforms(tile, size)
    count, rows, columns = moved.shape[2:5]
    height, width = (length - sum(pad) + size - 1 for length, pad in zip(cotangent.shape[1:3], pads, strict=True))
    excess = [(0, tiles * tile - length) for tiles, length in zip((rows, columns), cotangent.shape[1:3], strict=True)]
    grid = jnp.pad(cotangent, [(0, 0), *excess, (0, 0)]).reshape(count, rows, tile, columns * tile, -1)
    down = jnp.stack(_combined(outputs.T, [grid[:, :, i] for i in range(tile)]))
    down = down.reshape(len(down), count, rows, columns, tile, -1)
    spread = jnp.stack(_combined(outputs.T, [down[:, :, :, :, i] for i in range(tile)]), axis=1)
    of_kernel = _both(weigh.T, jnp.einsum("abtc,abto->abco", _joined(moved), _joined(spread)))
    of_tiles = jnp.einsum("abto,abco->abtc", _joined(spread), weighed).reshape(moved.shape)
    of_rows = _overlapped(move, [of_tiles[:, b] for b in range(len(move))], 3, tile)
    padded = _overlapped(move, list(of_rows), 1, tile)
    (top, _), (left, _) = pads
    return padded[:, top : top + height, left : left + width], of_kernel


by_tiles.defvjp(_forward, _backward)


def _joined(x: jax.Array) -> jax.Array:
    """`[a, b, n, h, w, c]` to `[a, b, n h w, c]`."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _places(x: jax.Array, axis: int, count: int, tile: int, size: int) -> list[jax.Array]:
    """Place by place in a tile, that place of each of the `count` tiles along an axis."""
    last = (count - 1) * tile + 1
    return [lax.slice_in_dim(x, i, i + last, tile, axis=axis) for i in range(tile + size - 1)]


def _overlapped(move: np.ndarray, parts: Sequence[jax.Array], axis: int, tile: int) -> jax.Array:
    """The transpose of `_places` and `move`: the tiles added up where they overlap, along an axis of tiles."""
    places = _combined(move.T, parts)
    reach = -(-len(places) // tile)
    blocks = []
    for place in range(tile):
        # A pixel lies at `place` of its own tile, at `place + tile` of the one before it, and so on.
        several = [
            jnp.pad(x, [(back, reach - 1 - back) if i == axis else (0, 0) for i in range(x.ndim)])
            for back, x in enumerate(places[place::tile])
        ]
        blocks.append(sum(several[1:], start=several[0]))
    together = jnp.stack(blocks, axis=axis + 1)
    return together.reshape(*together.shape[:axis], -1, *together.shape[axis + 2 :])


def _both(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """`matrix x matrix^T` over the first two axes of `x`."""
    rows = jnp.stack(_combined(matrix, list(x)))
    return jnp.stack(_combined(matrix, [rows[:, i] for i in range(x.shape[1])]), axis=1)


def _combined(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """`matrix @ parts`, as additions that fuse with what is around them, without the products by 0 and by 1."""
    sums = []
    for row in matrix:
        terms = [part if c == 1 else c * part for c, part in zip(row, parts, strict=True) if c]
        sums.append(sum(terms[1:], start=terms[0]))
    return sums


def _expanded(roots: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients of the product of `(x - root)`, the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [*coefficients, Fraction(0)]
        coefficients = [a - root * b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients
