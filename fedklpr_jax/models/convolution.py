"""The one place that chooses how a convolution is computed.

On a CPU a convolution is written as matrix products, because XLA:CPU is slow where federated training lives: the
gradient of a stock convolution inside `lax.scan` or `lax.map`, a convolution whose map is smaller than its kernel, and
`vmap` over per-client kernels (a grouped convolution). Strides 1 and 2 go by Winograd's tiles where they pay
(`fedklpr_jax/models/winograd.py`), all else as patches and one product (im2col). On an accelerator the stock
convolution stays. All forms give the same numbers from the same parameters, but for rounding;
`python -m benchmarks.convolution` prints what each costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedklpr_jax.errors import InputError
from fedklpr_jax.models.winograd import Pads, by_tiles, tile_for, unstrided

Convolution = Callable[..., jax.Array]
Padding = str | Sequence[tuple[int, int]]

CONVOLUTIONS = ("auto", "winograd", "patches", "stock")
# What the two forms for CPUs cover of the arguments of `lax.conv_general_dilated`.
_PLAIN: dict[str, Any] = {
    "lhs_dilation": None,
    "rhs_dilation": None,
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    "feature_group_count": 1,
    "batch_group_count": 1,
}
_LAYOUT = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def patches_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = ("NHWC", "HWIO", "NHWC"),
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Two-dimensional convolution as patches times one matrix; a drop-in for `lax.conv_general_dilated`.

    Hand it to `flax.linen.Conv(conv_general_dilated=patches_convolution)`. Its gradient is plain autodiff: the two
    gradient products are matrix products too, so it is as fast in a loop body as outside one, and a `vmap` over
    kernels is a batched matrix product.

    Args:
        lhs: images `[n, h, w, c]`.
        rhs: kernel `[kh, kw, c, o]`, of the dtype of `lhs`.
        window_strides: `(sh, sw)`.
        padding: `"SAME"`, `"VALID"`, or `((top, bottom), (left, right))`, none negative.
        lhs_dilation: only 1 (or None).
        rhs_dilation: only 1 (or None).
        dimension_numbers: only NHWC, HWIO, NHWC, in any form that `lax.conv_dimension_numbers` takes.
        feature_group_count: only 1.
        batch_group_count: only 1.
        precision: of the matrix product, as in `lax.dot`.
        preferred_element_type: dtype of the result; default that of `lhs`. Sums run in at least float32.

    Returns:
        `[n, h', w', o]`.

    Raises:
        ValueError: for a layout, a dilation, a grouping or a shape that this form does not cover.

    >>> ones = jnp.ones((1, 3, 3, 1))
    >>> patches_convolution(ones, ones[0, :, :, :, None], (1, 1), "SAME")[0, :, :, 0].astype(int).tolist()
    [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
    """
    _refuse_unsupported(lhs, rhs, window_strides, lhs_dilation, rhs_dilation, dimension_numbers,
                        feature_group_count, batch_group_count)  # fmt: skip
    out_dtype = jnp.dtype(preferred_element_type or lhs.dtype)
    windows = _windows(lhs, rhs.shape[:2], window_strides, padding, fill=0)
    # One window means a 1x1 kernel: the strided map itself is the patch matrix.
    patches = windows[0] if len(windows) == 1 else lax.concatenate(windows, dimension=3)
    product = jnp.matmul(
        patches.reshape(-1, patches.shape[3]),
        rhs.reshape(-1, rhs.shape[3]),
        precision=precision,
        preferred_element_type=jnp.promote_types(out_dtype, jnp.float32),
    )
    return product.reshape(*patches.shape[:3], rhs.shape[3]).astype(out_dtype)


def winograd_convolution(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Padding, **kinds: Any
) -> jax.Array:
    """`patches_convolution`, by tiles where `tile_for` says that they take less time.

    That is for float32, stride 1 or 2 and square kernels; there only reverse differentiation is defined.

    Args, Returns, Raises: as `patches_convolution`.

    >>> images, kernel = jnp.ones((16, 16, 8, 32)), jnp.ones((3, 3, 32, 32))
    >>> winograd_convolution(images, kernel, (1, 1), "SAME")[0, 0, :3, 0].round().astype(int).tolist()
    [128, 192, 192]
    """
    plain = {key: kinds.get(key, default) for key, default in _PLAIN.items()}
    _refuse_unsupported(lhs, rhs, window_strides, **plain)
    asked = any(kinds.get(key) is not None for key in ("precision", "preferred_element_type"))
    height, width, channels, features = rhs.shape
    square = height == width and len(set(window_strides)) == 1 and window_strides[0] in (1, 2)
    if square and lhs.dtype == rhs.dtype == jnp.float32 and not asked:
        stride, pads = window_strides[0], _pads(lhs, (height, width), window_strides, padding)
        rows, columns = (
            (length + sum(pad) - height) // stride + 1 for length, pad in zip(lhs.shape[1:3], pads, strict=True)
        )
        tile = tile_for((len(lhs), rows, columns), channels, features, height, stride)
        if tile and stride == 2:
            return by_tiles(*unstrided(lhs, rhs, pads), ((0, 0), (0, 0)), tile)
        if tile:
            return by_tiles(lhs, rhs, pads, tile)
    return patches_convolution(lhs, rhs, window_strides, padding, **kinds)


def depthwise_convolution(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Padding, **kinds: Any
) -> jax.Array:
    """Convolution of every channel by a kernel of its own, as a sum over the places of the kernel.

    A drop-in for `lax.conv_general_dilated` with as many groups as channels, which XLA:CPU runs without its fast
    kernels. Sums run in float32.

    Args:
        lhs: images `[n, h, w, c]`.
        rhs: kernels `[kh, kw, 1, c]`.
        window_strides: `(sh, sw)`.
        padding: as in `patches_convolution`.
        **kinds: the other arguments of `lax.conv_general_dilated`: `feature_group_count` must be c, and the rest as
            `patches_convolution` takes it.

    Returns:
        `[n, h', w', c]`.

    Raises:
        ValueError: for what this form does not cover.

    >>> ones = jnp.ones((1, 3, 3, 2))
    >>> depthwise_convolution(ones, ones[0, :, :, None], (1, 1), "SAME", feature_group_count=2)[0, :, :, 1].tolist()
    [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """
    plain = {key: kinds.get(key, default) for key, default in _PLAIN.items()}
    channels = lhs.shape[-1]
    if plain.pop("feature_group_count") != channels or rhs.shape[2:] != (1, channels):
        raise ValueError(f"a kernel {rhs.shape} is not one for each of {channels} channels; use another convolution")
    _refuse_unsupported(lhs, jnp.swapaxes(rhs, 2, 3), window_strides, feature_group_count=1, **plain)
    windows = _windows(lhs, rhs.shape[:2], window_strides, padding, fill=0)
    dtype = jnp.promote_types(lhs.dtype, jnp.float32)
    kernels = rhs.reshape(-1, channels).astype(dtype)
    total = reduce(jnp.add, (window.astype(dtype) * kernel for window, kernel in zip(windows, kernels, strict=True)))
    return total.astype(kinds.get("preferred_element_type") or lhs.dtype)


def max_pool(images: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Padding) -> jax.Array:
    """Maximum over windows, as a maximum over strided slices, or over axes of the map where windows just tile it.

    The gradient of `flax.linen.max_pool` is a select-and-scatter, which XLA:CPU runs element by element on one
    thread. Here equal maxima share the gradient, where the stock form gives it to the first.

    Args:
        images: `[n, h, w, c]`, floating.
        window: `(kh, kw)`.
        strides: `(sh, sw)`.
        padding: as in `patches_convolution`; padded places never win.

    Returns:
        `[n, h', w', c]`.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2), "VALID")[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    if padding == "VALID" and tuple(window) == tuple(strides):
        # XLA:CPU repeats the maximum over slices in each patch of the next convolution; a reduction it does not.
        n, height, width, c = images.shape
        (kh, kw), rows, columns = window, height // window[0], width // window[1]
        tiles = images[:, : rows * kh, : columns * kw].reshape(n, rows, kh, columns, kw, c)
        return jnp.max(tiles, axis=(2, 4))
    # First down, then across: kh + kw slices instead of kh * kw.
    (kh, kw), (sh, sw) = window, strides
    vertical, horizontal = _pads(images, window, strides, padding)
    down = reduce(jnp.maximum, _windows(images, (kh, 1), (sh, 1), (vertical, (0, 0)), fill=-jnp.inf))
    return reduce(jnp.maximum, _windows(down, (1, kw), (1, sw), ((0, 0), horizontal), fill=-jnp.inf))


def convolution_for(backend: str) -> Convolution:
    """The convolution for a backend name as `jax.default_backend()` gives it.

    >>> convolution_for("cpu") is winograd_convolution, convolution_for("gpu") is lax.conv_general_dilated
    (True, True)
    """
    return winograd_convolution if backend == "cpu" else lax.conv_general_dilated


def choose_convolution(choice: str = "auto") -> Convolution:
    """The convolution a `ModelSpec` asks for; `"auto"` looks at the backend when the model is traced.

    Args:
        choice: `"auto"`, `"winograd"`, `"patches"` or `"stock"`.

    Raises:
        InputError: for any other choice.

    >>> choose_convolution("stock") is lax.conv_general_dilated
    True
    """
    if choice not in CONVOLUTIONS:
        raise InputError(f"model.convolution: {choice!r} is unknown; give one of {', '.join(CONVOLUTIONS)}")
    if choice == "auto":
        return convolution_for(jax.default_backend())
    forms: dict[str, Convolution] = {"winograd": winograd_convolution, "patches": patches_convolution}
    return forms.get(choice, lax.conv_general_dilated)


def choose_depthwise(choice: str = "auto") -> Convolution:
    """The same for a convolution of every channel by itself.

    Args:
        choice: as of `choose_convolution`; tiles and patches have no place here, so both mean the sum over the kernel.

    Raises:
        InputError: as `choose_convolution`.

    >>> choose_depthwise("patches") is depthwise_convolution
    True
    """
    stock = choose_convolution(choice) is lax.conv_general_dilated
    return lax.conv_general_dilated if stock else depthwise_convolution


def _windows(
    images: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Padding, fill: float
) -> list[jax.Array]:
    """The kh*kw strided slices `[n, h', w', c]` of the padded images, row by row of the window."""
    (kh, kw), (sh, sw) = window, strides
    pads = _pads(images, window, strides, padding)
    padded = lax.pad(images, jnp.asarray(fill, images.dtype), [(0, 0, 0), *((a, b, 0) for a, b in pads), (0, 0, 0)])
    n, height, width, c = padded.shape
    rows, columns = (height - kh) // sh * sh + 1, (width - kw) // sw * sw + 1
    if rows < 1 or columns < 1:
        raise ValueError(f"a {kh}x{kw} window does not fit a padded map of {height}x{width}")
    return [
        lax.slice(padded, (0, i, j, 0), (n, i + rows, j + columns, c), (1, sh, sw, 1))
        for i in range(kh)
        for j in range(kw)
    ]


def _pads(images: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Padding) -> Pads:
    """Zeros before and after rows and columns."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], tuple(window), tuple(strides), padding)
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)


def _refuse_unsupported(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
) -> None:
    """Raise ValueError, with what would do instead, for every case `patches_convolution` does not cover."""
    wanted = "use lax.conv_general_dilated for it"
    if lhs.ndim != 4 or rhs.ndim != 4 or len(window_strides) != 2:
        raise ValueError(f"patches_convolution is two-dimensional, got {lhs.shape} and {rhs.shape}; {wanted}")
    if lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != _LAYOUT:
        raise ValueError(f"patches_convolution takes NHWC, HWIO, NHWC, got {dimension_numbers}; {wanted}")
    if any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ()))):
        raise ValueError(f"patches_convolution has no dilation, got {lhs_dilation} and {rhs_dilation}; {wanted}")
    if feature_group_count != 1 or batch_group_count != 1:
        raise ValueError(f"patches_convolution has no groups, got {feature_group_count}, {batch_group_count}; {wanted}")
    if lhs.shape[3] != rhs.shape[2]:
        raise ValueError(f"images have {lhs.shape[3]} channels, the kernel {rhs.shape} takes {rhs.shape[2]}")
