"""One message between server and client as one payload of the wire format, both ways.

Sender and receiver both know the last mask they exchanged (`held`): an unchanged mask then travels as its hash, a
changed one as the difference. Simulation and deployment train on what `unpack` gives back, never on the original.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax import wire
from fedklpr_jax.trees import PyTree


def same_mask(left: PyTree, right: PyTree) -> bool:
    """Whether two masks keep the same entries."""
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def _envelope(model: PyTree, scalars: dict[str, Any]) -> dict[str, PyTree]:
    return {"model": model, "scalars": {name: np.float32(value) for name, value in scalars.items()}}


def _envelope_mask(mask: PyTree, scalars: dict[str, Any]) -> dict[str, PyTree]:
    return {"model": mask, "scalars": {name: np.bool_(True) for name in scalars}}


def pack(
    model: PyTree, mask: PyTree | None, scalars: dict[str, Any], held: PyTree | None, value_dtype: str = "float32"
) -> bytes:
    """A model, its mask and scalars as one payload; empty where there is no leaf to send.

    Args:
      model: variable tree, zero where the mask is False.
      mask: bool tree of its structure, or None for a dense message.
      scalars: named floats.
      held: the mask the receiver holds from the last message; ignored for a dense one.
      value_dtype: `float32` (lossless) or `bfloat16`.
    """
    if not jax.tree.leaves(model):
        return b""
    dtype = None if value_dtype == "float32" else jnp.dtype(value_dtype)
    tree = _envelope(model, scalars)
    if mask is None:
        return wire.encode(tree, value_dtype=dtype)
    unchanged = held is not None and same_mask(mask, held)
    previous = None if unchanged or held is None else _envelope_mask(held, scalars)
    return wire.encode(
        tree,
        _envelope_mask(mask, scalars),
        previous_mask=previous,
        receiver_has_mask=unchanged,
        value_dtype=dtype,
    )


def unpack(
    payload: bytes, model: PyTree, scalars: dict[str, Any], held: PyTree | None
) -> tuple[PyTree, PyTree | None, dict[str, Any]]:
    """The inverse of `pack`: `(model, mask, scalars)` as host arrays.

    Args:
      payload: what `pack` gave.
      model: a tree of the shapes and dtypes expected (its values do not matter).
      scalars: the names expected.
      held: the mask this side holds from the last message.

    Raises:
      WireError: the payload is damaged, or not for this model, or under a mask this side does not hold.
    """
    if not jax.tree.leaves(model):
        if payload:
            raise wire.WireError(f"{len(payload)} bytes for a model without shared leaves; expected none")
        return model, None, scalars
    held_mask = None if held is None else _envelope_mask(held, scalars)
    tree, mask = wire.decode(payload, _envelope(model, scalars), mask=held_mask, previous_mask=held_mask)
    return tree["model"], None if mask is None else mask["model"], tree["scalars"]
