"""A message packed and unpacked is the same message, and masks that both sides hold do not travel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import exchange
from fedklpr_jax.pruning import apply_mask
from fedklpr_jax.wire import WireError

pytestmark = pytest.mark.short


def model_of(seed, rows=40):
    random = np.random.default_rng(seed)
    return {
        "params": {
            "conv": {"kernel": random.normal(size=(rows, 30)).astype(np.float32)},
            "bn": {"scale": random.normal(size=30).astype(np.float32)},
        },
        "batch_stats": {"count": np.float32(seed)},
    }


def mask_of(model, seed, share):
    """Keeps about `share` of the kernel's entries and everything else."""
    mask = jax.tree.map(lambda leaf: np.ones(np.shape(leaf), bool), model)
    kernel = mask["params"]["conv"]["kernel"]
    mask["params"]["conv"]["kernel"] = np.random.default_rng(seed).random(kernel.shape) < share
    return mask


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99), rows=st.integers(1, 12), share=st.none() | st.floats(0, 1),
    held=st.none() | st.floats(0, 1) | st.just("the same"), dtype=st.sampled_from(["float32", "bfloat16"]),
    scalars=st.dictionaries(st.sampled_from(["images", "klaw"]), st.floats(width=32, allow_nan=False)),
)  # fmt: skip
def test_what_comes_out_is_what_went_in(seed, rows, share, held, dtype, scalars):
    model = model_of(seed, rows)
    mask = None if share is None else mask_of(model, seed, share)
    known = mask if held == "the same" else None if held is None else mask_of(model, seed + 1, held)
    model = apply_mask(model, mask)
    payload = exchange.pack(model, mask, scalars, known, dtype)
    blank = jax.tree.map(np.zeros_like, model)
    got, got_mask, got_scalars = exchange.unpack(payload, blank, dict.fromkeys(scalars, 0.0), known)
    expected = model
    if dtype == "bfloat16":
        kernel = np.asarray(jnp.asarray(model["params"]["conv"]["kernel"]).astype(jnp.bfloat16), np.float32)
        expected = {**model, "params": {**model["params"], "conv": {"kernel": kernel}}}
    assert_same(got, expected)
    assert got_scalars == {name: np.float32(value) for name, value in scalars.items()}
    assert (got_mask is None) == (mask is None)
    assert mask is None or exchange.same_mask(got_mask, mask)


def test_masks_that_are_known_cost_next_to_nothing():
    model = model_of(0, 200)
    old = mask_of(model, 1, 0.6)
    new = jax.tree.map(np.copy, old)
    kernel = new["params"]["conv"]["kernel"]
    kernel[np.random.default_rng(2).random(kernel.shape) < 0.01] = False
    sizes = {
        name: len(exchange.pack(apply_mask(model, new), new, {}, held))
        for name, held in {"nothing": None, "another": old, "the same": new}.items()
    }
    dense = len(exchange.pack(model, None, {}, old))
    # The bitmap takes a bit an entry, a change about a byte, and a hash some ten bytes.
    assert sizes["the same"] < sizes["another"] < sizes["nothing"] < dense
    assert sizes["another"] - sizes["the same"] < 200
    assert sizes["nothing"] - sizes["the same"] > 500


def test_nothing_to_send_is_an_empty_payload():
    assert exchange.pack({}, None, {"images": 3.0}, None) == b""
    assert exchange.unpack(b"", {}, {"images": 3.0}, None) == ({}, None, {"images": 3.0})
    with pytest.raises(WireError, match="1 bytes for a model without shared leaves; expected none"):
        exchange.unpack(b"x", {}, {}, None)


def test_what_does_not_fit_is_refused():
    model = model_of(0)
    mask = mask_of(model, 1, 0.5)
    payload = exchange.pack(apply_mask(model, mask), mask, {"images": 1.0}, mask)
    with pytest.raises(WireError):
        exchange.unpack(payload, model, {"images": 0.0}, mask_of(model, 2, 0.5))
    with pytest.raises(WireError):
        exchange.unpack(payload, model, {"images": 0.0}, None)
    with pytest.raises(WireError):
        exchange.unpack(payload, model, {"klaw": 0.0}, mask)
    with pytest.raises(WireError):
        exchange.unpack(payload, model_of(0, 41), {"images": 0.0}, mask_of(model_of(0, 41), 1, 0.5))
    for place in (0, len(payload) // 2, len(payload) - 1):
        damaged = bytearray(payload)
        damaged[place] ^= 4
        with pytest.raises(WireError):
            exchange.unpack(bytes(damaged), model, {"images": 0.0}, mask)


def test_same_mask():
    model = model_of(0)
    mask = mask_of(model, 1, 0.5)
    other = jax.tree.map(np.copy, mask)
    assert exchange.same_mask(mask, other)
    other["params"]["conv"]["kernel"][0, 0] ^= True
    assert not exchange.same_mask(mask, other)
