"""Drawn stand-in for a classification set: grey pictures of ten simple shapes and patterns, for use without data."""

from __future__ import annotations

import numpy as np

from fedklpr_jax.data.labelled import Labelled
from fedklpr_jax.errors import InputError

NAMES = ("disc", "ring", "square", "frame", "triangle", "cross", "stripes", "checks", "half-disc", "dots")

_CHUNK = 2048


def make_shapes(seed: int, *, per_class: int = 1000, size: int = 28, classes: int = 10) -> Labelled:
    """Draws `per_class` pictures of each class; equal arguments give equal pictures.

    Place, size, brightness and background of a shape are random, its turn is within 20 degrees of upright, some are
    dark on light, and noise lies over all.

    Args:
      seed: whole number from 0.
      per_class: pictures of each class, from 1.
      size: rows and columns of a picture, pixels, from 12.
      classes: how many classes, 2 to 10: the first of `NAMES`.

    Returns:
      Pictures [per_class * classes, size, size, 1], class by class.

    Raises:
      InputError: an argument out of range.

    >>> shapes = make_shapes(0, per_class=3, classes=2)
    >>> shapes.pixels.shape, shapes.labels.tolist(), shapes.classes
    ((6, 28, 28, 1), [0, 0, 0, 1, 1, 1], ('disc', 'ring'))
    """
    for field, value, least, most in (
        ("seed", seed, 0, None),
        ("per_class", per_class, 1, None),
        ("size", size, 12, None),
        ("classes", classes, 2, len(NAMES)),
    ):
        if value < least or (most is not None and value > most):
            until = "" if most is None else f" to {most}"
            raise InputError(f"shapes: {field} is {value}; give a whole number from {least}{until}")
    labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    rng = np.random.default_rng(seed)
    # In chunks, because a picture takes some fifty times its size in floats while it is drawn.
    pixels = np.concatenate(
        [_draw(rng, labels[start : start + _CHUNK], size) for start in range(0, len(labels), _CHUNK)]
    )
    return Labelled(pixels, labels, NAMES[:classes])


def _draw(rng: np.random.Generator, labels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, size, size, 1]."""
    n = len(labels)

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    # Coordinates in radii of the shape, turned about its centre; the picture is 2 wide.
    radius, turn = uniform(0.35, 0.75), uniform(-np.pi / 9, np.pi / 9)
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1)[None]
    across = axis[:, None, :] - uniform(-1, 1) * (0.95 - radius)
    down = axis[:, :, None] - uniform(-1, 1) * (0.95 - radius)
    x = (across * np.cos(turn) + down * np.sin(turn)) / radius
    y = (down * np.cos(turn) - across * np.sin(turn)) / radius
    shape = np.empty((n, size, size), np.float32)
    # A pixel is this wide in radii: edges are drawn one pixel soft, or small shapes would only be a few blocks.
    pixel = 2 / size / radius
    for label in np.unique(labels):
        rows = labels == label
        shape[rows] = np.clip(0.5 - _edge(int(label), x[rows], y[rows]) / pixel[rows], 0, 1)
    back = uniform(0, 1)
    contrast = uniform(0.25, 0.5) * np.where(back < 0.5, 1, -1)
    noise = uniform(0.02, 0.12) * rng.standard_normal(shape.shape, np.float32)
    grey = np.clip(back + contrast * shape + noise, 0, 1)
    return np.round(grey * 255).astype(np.uint8)[..., None]


def _bands(along: np.ndarray, period: float) -> np.ndarray:
    """Bands of half a period across `along`, below 0 inside."""
    return np.abs(along / period % 1 - 0.5) * period - period / 4


def _edge(label: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far (x, y) lies outside the shape, in its radii; below 0 inside. Right near the edge, which is enough."""
    box = np.maximum(np.abs(x), np.abs(y))
    match NAMES[label]:
        case "disc":
            return np.hypot(x, y) - 1
        case "ring":
            return np.abs(np.hypot(x, y) - 0.78) - 0.22
        case "square":
            return box - 0.88
        case "frame":
            return np.abs(box - 0.7) - 0.2
        case "triangle":
            # The slanted sides run from (0, -1) to (+-1, 0.75), a direction of length 2.016.
            return np.maximum(y - 0.75, (1.75 * np.abs(x) - y - 1) / 2.016)
        case "cross":
            return np.maximum(np.minimum(np.abs(x), np.abs(y)) - 0.28, box - 0.95)
        case "stripes":
            return np.maximum(_bands(y, 0.8), box - 0.95)
        case "checks":
            across, down = _bands(x, 0.9), _bands(y, 0.9)
            return np.maximum(np.maximum(np.minimum(across, down), -np.maximum(across, down)), box - 0.95)
        case "half-disc":
            return np.maximum(np.hypot(x, y) - 1, y)
        case _:  # dots
            spacing = 0.7
            near = np.hypot((x / spacing + 0.5) % 1 - 0.5, (y / spacing + 0.5) % 1 - 0.5) * spacing
            return np.maximum(near - 0.22, box - 1.05)
