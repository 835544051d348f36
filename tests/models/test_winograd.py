"""Convolution by tiles: the published matrices, and the direct convolution with both its gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from fedklpr_jax.models.convolution import patches_convolution, winograd_convolution
from fedklpr_jax.models.winograd import TILES, by_tiles, tile_for, transforms, unstrided
from tests.convolutions import assert_clients_agree, with_gradients

PAIR = st.tuples(st.integers(0, 5), st.integers(0, 5))


def test_the_matrices_of_two_outputs_and_three_weights_are_the_published_ones_but_for_scales() -> None:
    """Lavin and Gray, equation 7, whose rows of G and B^T may trade a factor, and whose last ones a sign."""
    outputs, weigh, move = transforms(2, 3)
    np.testing.assert_array_equal(abs(outputs), [[1, 1, 1, 0], [0, 1, 1, 1]])
    np.testing.assert_array_equal(abs(weigh), [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]])
    np.testing.assert_array_equal(abs(move), [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("tile", TILES)
def test_one_tile_is_the_correlation(tile: int, size: int) -> None:
    outputs, weigh, move = (matrix.astype(np.float64) for matrix in transforms(tile, size))
    signal, kernel = np.arange(1.0, tile + size) ** 2, np.arange(3.0, 3 + size)
    found = outputs @ ((weigh @ kernel) * (move @ signal))
    np.testing.assert_allclose(found, np.correlate(signal, kernel, "valid"), rtol=1e-6)


def test_more_points_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="a tile of 4 under a kernel of 7 needs more than 8 points"):
        transforms(4, 7)
    assert tile_for((32, 64, 64), 64, 64, 7) is None


@settings(deadline=None, max_examples=6)
@given(
    maps=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(1, 5),
    pads=st.tuples(PAIR, PAIR),
    tile=st.sampled_from(TILES),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
@example((12, 12), 5, ((0, 0), (0, 0)), 4, (3, 2), 0)  # overlaps as wide as a tile
@example((7, 6), 5, ((2, 2), (2, 2)), 2, (2, 3), 0)  # and over two tiles
@example((4, 2), 3, ((1, 1), (1, 1)), 4, (2, 2), 0)  # a tile larger than its map
def test_equals_patches_forward_and_gradients(
    maps: Any, size: int, pads: Any, tile: int, channels: Any, seed: int
) -> None:
    pads = tuple((max(a, size - length), b) for length, (a, b) in zip(maps, pads, strict=True))
    x = jax.random.normal(jax.random.key(seed), (2, *maps, channels[0]))
    w = jax.random.normal(jax.random.key(seed + 1), (size, size, *channels))

    # Not the stock form: where pads exceed the kernel, its gradient on a CPU is wrong (jaxlib 0.10.2; right in 0.12).
    def direct(x: jax.Array, w: jax.Array) -> jax.Array:
        return patches_convolution(x, w, (1, 1), pads)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return by_tiles(x, w, pads, tile)

    def everything(x: jax.Array, w: jax.Array) -> Any:
        # Sums may cancel; rounding is measured against what was summed.
        summed, back = jax.vjp(direct, abs(x), abs(w))
        return with_gradients(ours, x, w), with_gradients(direct, x, w), (summed, *back(jnp.ones_like(summed)))

    for found, wanted, terms in zip(*jax.jit(everything)(x, w), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(terms.max()))


@settings(deadline=None, max_examples=5)
@given(
    maps=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.sampled_from([1, 2, 3, 5, 7]),
    pads=st.tuples(PAIR, PAIR),
    seed=st.integers(0, 1000),
)
@example((8, 6), 7, ((3, 3), (3, 3)), 0)  # the stem of a ResNet
@example((4, 5), 1, ((0, 0), (0, 0)), 0)  # last rows that no output looks at
def test_stride_two_is_stride_one_of_blocks(maps: Any, size: int, pads: Any, seed: int) -> None:
    pads = tuple((max(a, size - length), b) for length, (a, b) in zip(maps, pads, strict=True))
    x = jax.random.normal(jax.random.key(seed), (2, *maps, 3))
    w = jax.random.normal(jax.random.key(seed + 1), (size, size, 3, 2))

    def blocks(x: jax.Array, w: jax.Array) -> jax.Array:
        return patches_convolution(*unstrided(x, w, pads), (1, 1), "VALID")

    def direct(x: jax.Array, w: jax.Array) -> jax.Array:
        return patches_convolution(x, w, (2, 2), pads)

    both = jax.jit(lambda x, w: [with_gradients(f, x, w) for f in (blocks, direct)])
    for ours, wanted in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


def test_vmap_over_client_kernels_and_scan_equal_separate_calls() -> None:
    assert_clients_agree(by_tiles, ((1, 1), (1, 1)), 2)


def test_rounding_stays_small_on_the_largest_tile() -> None:
    """Against float64 the largest error of four outputs at a time is some 1e-5 of the largest value."""
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 64)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(5, 5, 64, 8)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (5, 5), axis=(1, 2))
    exact = np.einsum("nhwcij,ijco->nhwo", windows, w.astype(np.float64))
    found = by_tiles(jnp.asarray(x), jnp.asarray(w), ((0, 0), (0, 0)), 4)
    assert np.abs(found - exact).max() < 5e-5 * np.abs(exact).max()


def test_small_convolutions_stay_patches() -> None:
    assert tile_for((4, 8, 8), 16, 16, 3) is None and tile_for((64, 8, 8), 16, 16, 3) == 4
    assert tile_for((32, 0, 4), 64, 64, 3) is None and tile_for((10**6, -1, -1), 64, 64, 3) is None


def test_what_is_not_covered_goes_by_patches() -> None:
    """Seen in the program: only tiles have a gradient of their own."""
    images, kernel = jax.ShapeDtypeStruct((32, 16, 16, 64), jnp.float32), (3, 3, 64, 64)

    def program(strides: Any = (1, 1), dtype: Any = jnp.float32, size: Any = kernel, **kinds: Any) -> tuple[str, str]:
        x, w = jax.ShapeDtypeStruct(images.shape, dtype), jax.ShapeDtypeStruct(size, dtype)
        forms = (winograd_convolution, patches_convolution)
        one, other = (str(jax.make_jaxpr(lambda x, w, f=f: f(x, w, strides, "SAME", **kinds))(x, w)) for f in forms)
        return one, other

    one, other = program()
    assert "custom_vjp" in one and "custom_vjp" not in other
    for changed in (
        program(strides=(2, 2)), program(strides=(3, 3)), program(dtype=jnp.bfloat16),
        program(size=(3, 1, 64, 64)), program(size=(1, 1, 64, 64)),
        program(precision=lax.Precision.HIGHEST), program(preferred_element_type=jnp.float32),
    ):  # fmt: skip
        assert changed[0] == changed[1]
    with pytest.raises(ValueError, match="no dilation"):
        program(rhs_dilation=(2, 2))
