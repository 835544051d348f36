"""What the server refuses of an upload that can be read: values, and scalars that no honest client tells.

Weights follow from what clients tell of themselves, so that one scalar out of its range would be the whole mean:

    images    n_k of FedAvg's n_k / n           0 to what the client registered with; fewer only take weight away
    cdw       mean(1 - cos) of CDW              0 to 2
    klaw      mean KL divergence, in nats       0 to 1e6, where no softmax over features comes near

Within these ranges KLPWA's weights are finite and stay under their cap, whatever one client tells; CDW has no cap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

NOT_FINITE = "values that are not finite"

# Between all but equal models rounding takes distances and divergences a little out of their ranges.
_ROUNDING = 1e-3
_HIGHEST = {"cdw": 2.0, "klaw": 1e6}


def scalar_range(name: str, images: Any) -> tuple[Any, Any]:
    """The lowest and the highest value that the scalar `name` of a client with so many `images` may have.

    >>> scalar_range("images", 24), scalar_range("temperature", 24)
    ((0, 24), (-inf, inf))
    """
    if name == "images":
        return 0, images
    return (-_ROUNDING, _HIGHEST[name] + _ROUNDING) if name in _HIGHEST else (-math.inf, math.inf)


def scalars_hold(scalars: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
    """Whether all scalars are in their ranges, traced: bool scalar."""
    held = [
        (low <= value) & (value <= high)
        for name, value in scalars.items() for low, high in [scalar_range(name, images)]
    ]  # fmt: skip
    return functools.reduce(jnp.logical_and, held, jnp.bool_(True))


def upload_fault(finite: bool, scalars: Mapping[str, Any], images: float) -> str:
    """Why the server refuses an upload; "" = it does not.

    Args:
      finite: whether all of its values, the scalars among them, are.
      scalars: what the client tells beside its model, by name.
      images: what it registered with: the images that it trains on.

    >>> upload_fault(True, {"images": 24.0}, 24), upload_fault(True, {"images": 1e6}, 24)
    ('', "scalar 'images' is 1e+06; from 0 to 24 is allowed")
    """
    for name, value in scalars.items():
        low, high = scalar_range(name, images)
        if not low <= value <= high:
            return f"scalar {name!r} is {float(value):g}; from {float(low):g} to {float(high):g} is allowed"
    return "" if finite else NOT_FINITE
