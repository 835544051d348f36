"""The wire format: exact round trips, exact bytes, and refusal of everything else."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
import zlib
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import wire_sections
from fedklpr_jax.wire import WireError, decode, encode, mask_hash, peek

HEADER = struct.Struct("<4sBBBxIIIQQ16s16s")
DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", jnp.bfloat16]


def assert_same(left: Any, right: Any) -> None:
    """Same structure, shapes, dtypes and bits (so NaN payloads and the sign of zero count)."""
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for a, b in zip(map(np.asarray, jax.tree.leaves(left)), map(np.asarray, jax.tree.leaves(right)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes()


def masked(tree: Any, mask: Any) -> Any:
    """What a receiver should hold: the tree with zeros where nothing was kept."""
    return jax.tree.map(lambda x, m: np.where(m, x, np.zeros((), np.asarray(x).dtype)), tree, mask)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Nested dicts of one to six leaves of any dtype, 0 to 3 dimensions, random bits (many NaN among them)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tree: dict[str, Any] = {}
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        size = int(np.prod(shape))
        leaf = rng.integers(0, 2 if dtype == np.bool_ else 256, size * dtype.itemsize, np.uint8).view(dtype)
        branch = tree.setdefault(draw(st.sampled_from("abc")), {})
        branch[f"leaf{number}"] = leaf.reshape(shape)
    return tree


@st.composite
def masks_for(draw: st.DrawFn, tree: Any) -> Any:
    """A mask for a tree; each leaf is kept whole, dropped whole or kept in part."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return jax.tree.map(lambda leaf: rng.random(leaf.shape) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])), tree)


def small() -> tuple[dict[str, Any], dict[str, Any]]:
    """A little network and a mask that keeps about half of its kernel."""
    rng = np.random.default_rng(5)
    tree = {"dense": {"kernel": rng.standard_normal((9, 7)).astype(np.float32), "bias": np.ones(7, np.float32)}}
    return tree, {"dense": {"kernel": rng.random((9, 7)) < 0.5, "bias": np.ones(7, np.bool_)}}


def reseal(body: bytes) -> bytes:
    """Puts a correct checksum behind a crafted body."""
    return body + struct.pack("<I", zlib.crc32(body))


def craft(payload: bytes, *, schema: bytes | None = None, mask: bytes | None = None, values: bytes | None = None,
          **fields: Any) -> bytes:  # fmt: skip
    """Replaces sections or header fields of a payload; lengths and checksum are made right unless given."""
    names = ("magic", "version", "mode", "value_dtype", "leaves", "raw", "schema_length", "mask_length",
             "values_length", "digest", "previous")  # fmt: skip
    header = dict(zip(names, HEADER.unpack_from(payload), strict=True))
    a = HEADER.size + header["schema_length"]
    b = a + header["mask_length"]
    parts = [payload[HEADER.size : a], payload[a:b], payload[b:-4]]
    parts = [old if new is None else new for old, new in zip(parts, (schema, mask, values), strict=True)]
    header |= dict(zip(("schema_length", "mask_length", "values_length"), map(len, parts), strict=True)) | fields
    return reseal(HEADER.pack(*header.values()) + b"".join(parts))


def plane(data: bytes) -> bytes:
    """One length-prefixed zstd frame, made without the code under test."""
    frame = zstandard.ZstdCompressor().compress(data)
    return struct.pack("<I", len(frame)) + frame


def refuse_cheaply(payload: bytes, template: Any, limit: int = 1 << 20, **masks: Any) -> WireError:
    """Asserts that decoding raises WireError without allocating more than `limit` bytes beyond the schema's cap."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            decode(payload, template, **masks)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    return caught.value


# --- round trips -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(trees())
def test_dense_round_trip_is_bitwise(tree: Any) -> None:
    payload = encode(tree)
    got, mask = decode(payload, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree))
    assert mask is None
    assert_same(got, tree)
    assert encode(tree) == payload


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from(["full", "change", "held"]))
def test_masked_round_trip_is_bitwise(data: st.DataObject, mode: str) -> None:
    tree = data.draw(trees())
    mask, previous = data.draw(masks_for(tree)), data.draw(masks_for(tree))
    payload = encode(tree, mask, previous_mask=previous if mode == "change" else None, receiver_has_mask=mode == "held")
    got, got_mask = decode(payload, tree, mask=mask if mode == "held" else None, previous_mask=previous)
    assert_same(got, masked(tree, mask))
    assert_same(got_mask, mask)
    assert peek(payload)["mask_mode"] in ((mode, "full") if mode == "change" else (mode,))
    assert peek(payload)["mask_hash"] == mask_hash(mask)


def test_special_floats_keep_their_bits() -> None:
    bits = np.array([0x7FC00001, 0xFF800123, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    tree = {"w": bits.view(np.float32)}
    got, _ = decode(encode(tree), tree)
    assert got["w"].view(np.uint32).tolist() == bits.tolist()


def test_accepts_jax_arrays_python_numbers_other_trees_and_layouts() -> None:
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = [jnp.asarray(plain), (2.5, 7), {"t": plain.T, "swapped": plain.astype(">f4"), "half": jnp.bfloat16(1.5)}]
    got, _ = decode(encode(tree), tree)
    numbers = (np.float64(2.5), np.int64(7))
    assert_same(got, [plain, numbers, {"t": plain.T, "swapped": plain, "half": jnp.bfloat16(1.5)}])
    assert got[0].flags.writeable


@pytest.mark.parametrize("tree", [{}, {"empty": np.zeros((0, 3), np.float32)}, {"scalar": np.float32(4)}])
@pytest.mark.parametrize("previous", [False, True])
def test_degenerate_trees(tree: Any, previous: bool) -> None:
    mask = jax.tree.map(lambda x: np.ones(x.shape, np.bool_), tree)
    payload = encode(tree, mask, previous_mask=mask if previous else None)
    got, got_mask = decode(payload, tree, previous_mask=mask)
    assert_same(got, tree)
    assert_same(got_mask, mask)


def test_several_blocks_and_unequal_leaves() -> None:
    size = wire_sections.BLOCK
    rng = np.random.default_rng(1)
    tree = {"a": rng.standard_normal(size + 1, np.float32), "b": rng.integers(0, 9, 2 * size), "c": np.float32(3)}
    mask = {"a": rng.random(size + 1) < 0.9, "b": rng.random(2 * size) < 0.6, "c": np.bool_(True)}
    got, got_mask = decode(encode(tree, mask), tree)
    assert_same(got, masked(tree, mask))
    assert_same(got_mask, mask)


def test_decoded_leaves_do_not_share_memory() -> None:
    tree = {"a": np.ones(3, np.float32), "b": np.ones(4, np.float32)}
    got, _ = decode(encode(tree), tree)
    assert got["a"].base is None or not np.shares_memory(got["a"], got["b"])
    got["a"][:] = 7
    assert got["b"].tolist() == [1, 1, 1, 1]


# --- the bytes themselves --------------------------------------------------------------------------------------------


def test_hand_written_payload() -> None:
    # Kept of [1, 2, 3, -2] are 1.0 = 3f800000 and -2.0 = c0000000; bits 1001 make the byte 0x90.
    tree = {"w": np.array([1, 2, 3, -2], np.float32)}
    mask = {"w": np.array([True, False, False, True])}
    schema = b"float32 4 ['w']"
    digest = hashlib.blake2b(b"4 ['w']\n\x90", digest_size=16, person=b"fedklpr mask").digest()
    sections = [
        plane(schema),
        b"\x00" + plane(b"\x90"),
        plane(b"\x00\x00") + plane(b"\x00\x00") + plane(b"\x80\x00") + plane(b"\x3f\xc0"),
    ]
    header = HEADER.pack(b"FKPW", 2, 1, 0, 1, len(schema), *map(len, sections), digest, bytes(16))
    payload = reseal(header + b"".join(sections))
    got, got_mask = decode(payload, tree)
    assert got["w"].tolist() == [1, 0, 0, -2]
    assert_same(got_mask, mask)
    assert encode(tree, mask) == payload
    assert mask_hash(mask) == digest.hex()


def test_hand_written_change() -> None:
    # Elements 1 and 6 flip: gaps 1 and 4; the bitmap of 4096 random bits is far longer.
    rng = np.random.default_rng(0)
    old = {"m": rng.random(4096) < 0.5}
    new = {"m": old["m"] ^ np.isin(np.arange(4096), [1, 6])}
    tree = {"m": np.ones(4096, np.float32)}
    payload = encode(tree, new, previous_mask=old)
    change = struct.pack("<Q", 2) + plane(b"\x01\x04") + 3 * plane(b"\x00\x00")
    assert craft(payload, mask=change) == payload


def test_peek_reports_the_header() -> None:
    tree, mask = small()
    payload = encode(tree, mask, receiver_has_mask=True, value_dtype="bfloat16")
    sizes = HEADER.unpack_from(payload)[6:9]
    assert peek(payload) == {
        "version": 2, "mask_mode": "held", "mask_hash": mask_hash(mask), "previous_mask_hash": None,
        "value_dtype": "bfloat16", "leaves": 2, "schema_bytes": sizes[0], "mask_bytes": 0, "value_bytes": sizes[2],
        "total_bytes": len(payload),
    }  # fmt: skip
    dense = peek(encode(tree))
    assert (dense["mask_mode"], dense["mask_hash"], dense["value_dtype"]) == ("none", None, None)


def test_mask_hash_depends_on_bits_shape_and_path_only() -> None:
    mask = {"a": np.array([[True, False], [True, True]])}
    assert mask_hash(mask) == mask_hash({"a": jnp.asarray(mask["a"])})
    others = [{"a": ~mask["a"]}, {"a": mask["a"].reshape(4)}, {"b": mask["a"]}]
    assert len({mask_hash(other) for other in [mask, *others]}) == 4


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_on_random_weights() -> None:
    rng = np.random.default_rng(2)
    tree = {"kernel": 0.02 * rng.standard_normal((512, 1024), np.float32)}
    dense = tree["kernel"].nbytes
    for sparsity, bound in ((0.0, 0.85), (0.3, 0.62), (0.5, 0.46), (0.7, 0.285), (0.9, 0.105)):
        mask = {"kernel": rng.random((512, 1024)) >= sparsity}
        assert len(encode(tree, mask)) < bound * dense
    # A mask that the receiver holds costs nothing, and one with few flips costs little.
    full, held = peek(encode(tree, mask)), peek(encode(tree, mask, receiver_has_mask=True))
    assert held["total_bytes"] == full["total_bytes"] - full["mask_bytes"]
    flipped = {"kernel": mask["kernel"] ^ (rng.random((512, 1024)) < 0.001)}
    change = peek(encode(tree, flipped, previous_mask=mask))
    assert change["mask_mode"] == "change"
    assert change["mask_bytes"] < peek(encode(tree, flipped))["mask_bytes"] / 20


def test_whole_leaves_cost_one_flag_bit() -> None:
    tree = {f"{i:02d}": np.ones(4000, np.float32) for i in range(16)}
    assert peek(encode(tree, jax.tree.map(lambda x: x > 0, tree)))["mask_bytes"] == 2


def test_the_bitmap_is_sent_where_it_is_shorter() -> None:
    rng = np.random.default_rng(3)
    tree = {"w": np.ones(20_000, np.float32)}
    mask = {"w": np.arange(20_000) < 10_000}
    payload = encode(tree, mask, previous_mask={"w": rng.random(20_000) < 0.5})
    assert peek(payload)["mask_mode"] == "full"
    assert_same(decode(payload, tree)[1], mask)


def test_masks_too_long_for_gaps_go_as_bitmaps(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    tree, mask = {"w": np.ones(4096, np.float32)}, {"w": rng.random(4096) < 0.5}
    assert peek(encode(tree, mask, previous_mask=mask))["mask_mode"] == "change"
    monkeypatch.setattr(wire_sections, "MAX_CHANGE_ELEMENTS", 4095)
    assert peek(encode(tree, mask, previous_mask=mask))["mask_mode"] == "full"


# --- rounded values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_dtype", ["bfloat16", "float16", jnp.bfloat16, np.dtype("float16")])
def test_value_dtype_rounds_kernels_only(value_dtype: Any) -> None:
    tree, mask = small()
    tree["stats"] = {"mean": np.array([1 / 3], np.float64), "count": np.float32(1 / 3)}
    tree["wide"], tree["ids"] = np.full((2, 2), 1 / 3, np.float64), np.full((2, 2), 7**7, np.int32)
    mask |= {"stats": {"mean": np.ones(1, bool), "count": np.bool_(True)}}
    mask |= {"wide": np.ones((2, 2), bool), "ids": np.ones((2, 2), bool)}
    got, _ = decode(encode(tree, mask, value_dtype=value_dtype), tree)
    want = masked(tree, mask)
    want["dense"]["kernel"] = want["dense"]["kernel"].astype(value_dtype).astype(np.float32)
    want["wide"] = want["wide"].astype(value_dtype).astype(np.float64)
    assert_same(got, want)
    assert (want["dense"]["kernel"] != masked(tree, mask)["dense"]["kernel"]).any()


def test_value_dtype_refuses_overflow_but_passes_infinity() -> None:
    tree = {"k": np.array([[1e6, np.inf, np.nan]], np.float32)}
    with pytest.raises(ValueError, match=r"tree\['k'\]: has values too large for float16"):
        encode(tree, value_dtype="float16")
    assert np.isposinf(decode(encode(tree, value_dtype="bfloat16"), tree)[0]["k"][0, 1])
    dropped = {"k": np.array([[False, True, True]])}
    got, _ = decode(encode(tree, dropped, value_dtype="float16"), tree)
    np.testing.assert_array_equal(got["k"], np.array([[0, np.inf, np.nan]], np.float32))


# --- misuse ----------------------------------------------------------------------------------------------------------


def test_encoder_misuse_is_named() -> None:
    tree, mask = small()
    short = {"dense": {"kernel": mask["dense"]["kernel"][:3], "bias": mask["dense"]["bias"]}}
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("need a mask", (tree,), {"receiver_has_mask": True}),
        ("need a mask", (tree,), {"previous_mask": mask}),
        ("exclude each other", (tree, mask), {"previous_mask": mask, "receiver_has_mask": True}),
        ("value_dtype float32 cannot be used", (tree,), {"value_dtype": "float32"}),
        ("value_dtype nonsense cannot be used", (tree,), {"value_dtype": "nonsense"}),
        (r"mask\['dense'\]\['bias'\]: has dtype float32", (tree, tree), {}),
        (r"mask\['dense'\]\['kernel'\]: has shape \(3, 7\)", (tree, short), {}),
        (r"previous_mask\['dense'\]\['kernel'\]: has shape \(3, 7\)", (tree, mask), {"previous_mask": short}),
        ("mask: has leaf None where the tree has", (tree, {"dense": {"bias": mask["dense"]["bias"]}}), {}),
        (r"tree\['c'\]: dtype complex64 cannot travel", ({"c": np.ones(1, np.complex64)},), {}),
        (r"tree\['o'\]: dtype object cannot travel", ({"o": np.array([{}])},), {}),
        (r"tree\['k'\]: dtype key<fry> cannot travel", ({"k": jax.random.key(0)},), {}),
        ("at most 16777216 can travel", ({"x" * (1 << 24): np.ones(1)},), {}),
    ]
    for message, args, options in cases:
        with pytest.raises(ValueError, match=message) as caught:
            encode(*args, **options)
        assert not isinstance(caught.value, WireError)
        assert "\n" not in str(caught.value)


def test_other_templates_are_refused() -> None:
    tree, mask = small()
    payload = encode(tree, mask)
    kernel, bias = tree["dense"]["kernel"], tree["dense"]["bias"]
    others = [
        {"dense": {"kernel": kernel, "biases": bias}},
        {"dense": {"kernel": kernel.T, "bias": bias}},
        {"dense": {"kernel": kernel.reshape(63), "bias": bias}},
        {"dense": {"kernel": kernel.view(np.int32), "bias": bias}},
        {"dense": {"kernel": kernel}},
        {"dense": {"kernel": kernel, "bias": bias, "more": bias}},
        {},
    ]
    for other in others:
        refuse_cheaply(payload, other)
    with pytest.raises(WireError, match="has a leaf .*9x7.* where the template has .*7x9"):
        decode(payload, others[1])


def test_other_masks_are_refused() -> None:
    tree, mask = small()
    other = {"dense": {"kernel": ~mask["dense"]["kernel"], "bias": mask["dense"]["bias"]}}
    smaller = {"dense": {"kernel": mask["dense"]["kernel"]}}
    held = encode(tree, mask, receiver_has_mask=True)
    big = {"w": np.ones(4096, np.float32)}
    old = {"w": np.random.default_rng(0).random(4096) < 0.5}
    change = encode(big, old, previous_mask=old)
    assert peek(change)["previous_mask_hash"] == mask_hash(old)
    wrongs: list[Any] = [None, other, smaller]
    for wrong in wrongs:
        with pytest.raises(WireError, match="^mask: "):
            decode(held, tree, mask=wrong, previous_mask=mask)
    wrongs = [None, {"w": ~old["w"]}, {"w": old["w"].reshape(64, 64)}]
    for wrong in wrongs:
        with pytest.raises(WireError, match="^previous_mask: "):
            decode(change, big, mask=old, previous_mask=wrong)
    # A crafted hash may name a mask that is held but belongs to another tree.
    foreign = {"w": np.ones(3, np.bool_)}
    with pytest.raises(WireError, match="has leaf"):
        decode(craft(held, digest=bytes.fromhex(mask_hash(foreign))), tree, mask=foreign)


# --- damage and malice -----------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_refused() -> None:
    tree, mask = small()
    payload = encode(tree, mask)
    for at in range(len(payload)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[at] ^= flip
            with pytest.raises(WireError):
                decode(bytes(damaged), tree)
            with pytest.raises(WireError):
                peek(damaged)


def test_every_truncation_and_any_appendix_is_refused() -> None:
    tree, mask = small()
    payload = encode(tree, mask)
    longer = [payload + b"\0", payload + payload, b"\0" + payload]
    for other in [payload[:length] for length in range(len(payload))] + longer:
        with pytest.raises(WireError):
            decode(other, tree)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    tree, _ = small()
    for payload in (data, b"FKPW\x02" + data, reseal(b"FKPW\x02" + data)):
        with pytest.raises(WireError):
            decode(payload, tree)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(["none", "full", "change", "held"]))
def test_resealed_damage_never_escapes_as_another_error(data: st.DataObject, mode: str) -> None:
    # With a correct checksum the parser itself has to cope. A change may still be harmless, for instance to a value.
    rng = np.random.default_rng(0)
    tree = {"k": rng.standard_normal((64, 64)).astype(np.float32), "f": rng.random(40) < 0.5, "n": np.int32(3)}
    mask = {"k": rng.random((64, 64)) < 0.5, "f": rng.random(40) < 0.5, "n": np.bool_(True)}
    payload = encode(
        tree, None if mode == "none" else mask,
        previous_mask=mask if mode == "change" else None, receiver_has_mask=mode == "held",
    )  # fmt: skip
    assert peek(payload)["mask_mode"] == mode
    body = bytearray(payload[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from([HEADER.size, 200, len(body)]))
        body[data.draw(st.integers(0, min(near, len(body)) - 1))] = data.draw(st.integers(0, 255))
    try:
        got, got_mask = decode(reseal(bytes(body)), tree, mask=mask, previous_mask=mask)
    except WireError:
        return
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    if got_mask is not None:
        assert_same(got_mask, mask)


@pytest.mark.parametrize("wrong", [None, 5, "FKPW", [1], np.ones((4, 4))[:, ::2]])
def test_things_that_are_no_bytes_are_refused(wrong: Any) -> None:
    for reader in (peek, lambda payload: decode(payload, {})):
        with pytest.raises(WireError, match="bytes expected"):
            reader(wrong)


def test_header_lies_are_refused() -> None:
    tree, mask = small()
    payload = encode(tree, mask)
    lies: list[tuple[str, dict[str, Any]]] = [
        ("announced", {"mask_length": 1 << 42}),
        ("announced", {"values_length": (1 << 64) - 1}),
        ("announced", {"schema_length": (1 << 32) - 1}),
        ("at most 16777216 allowed", {"raw": (1 << 32) - 1}),
        ("zstd frame claims", {"raw": 1 << 24}),
        ("4294967295 leaves, the template has 2", {"leaves": (1 << 32) - 1}),
        ("no FedKLPR payload", {"magic": b"PK\x03\x04"}),
        ("version 1; this program reads version 2", {"version": 1}),
        ("unknown", {"mode": 4}),
        ("unknown", {"value_dtype": 3}),
        ("its hash is not the announced one", {"digest": bytes(16)}),
        ("bytes too many", {"mode": 0}),
        ("previous_mask: the payload was coded", {"mode": 2}),
        ("values: ", {"value_dtype": 1}),
    ]
    for message, fields in lies:
        limit = (1 << 24) + (1 << 20) if fields.get("raw") == 1 << 24 else 1 << 20
        error = refuse_cheaply(craft(payload, **fields), tree, limit)
        if "values" not in message:
            assert message in str(error)


def test_bombs_are_refused_without_memory() -> None:
    tree, mask = small()
    payload = encode(tree, mask)
    zeros = bytes(1 << 28)
    bomb = plane(zeros)  # 256 MiB in a few kilobytes, and it says so
    assert len(bomb) < 1 << 16
    silent_frame = zstandard.ZstdCompressor(write_content_size=False).compress(zeros)
    silent = struct.pack("<I", len(silent_frame)) + silent_frame
    for section in ("schema", "mask", "values"):
        for evil in (bomb, silent, struct.pack("<I", (1 << 32) - 1)):
            refuse_cheaply(craft(payload, **{section: (b"\0" if section == "mask" else b"") + evil}), tree)


def test_a_schema_of_line_breaks_is_refused_without_a_list_of_lines() -> None:
    tree, _ = small()
    lines = np.full(1 << 24, ord("\n"), np.uint8)
    payload = craft(encode(tree), schema=b"".join(wire_sections.pack_planes(lines)), raw=1 << 24)
    assert len(payload) < 1 << 13
    error = refuse_cheaply(payload, tree, (1 << 24) + (1 << 20))
    assert "has a leaf '' where the template has \"float32 7 ['dense']['bias']\"" in str(error)


def test_a_change_of_every_element_takes_no_more_memory_than_any_payload() -> None:
    size = 1 << 20
    held, turned = {"w": np.zeros(size, np.bool_)}, {"w": np.arange(size) > 0}
    tree = {"w": np.ones(size, np.bool_)}
    section = wire_sections.pack_mask_change([turned["w"]], [held["w"]])
    assert len(section) < 1 << 10
    payload = craft(encode(tree, turned), mask=section, mode=2, previous=bytes.fromhex(mask_hash(held)))
    tracemalloc.start()
    try:
        _, mask = decode(payload, tree, previous_mask=held)
        assert tracemalloc.get_traced_memory()[1] < 15 * size
    finally:
        tracemalloc.stop()
    assert_same(mask, turned)


def test_lying_frames_are_refused_without_memory() -> None:
    tree = {"u": np.zeros(45, np.uint8)}
    payload = encode(tree)
    magic = b"\x28\xb5\x2f\xfd"
    frames = {
        # Claims 45 bytes, and its only block repeats one byte 100000 times.
        "broken": magic + b"\x20" + bytes([45]) + struct.pack("<I", 100_000 << 3 | 0b011)[:3] + b"\0",
        # Claims 45 bytes, asks for a window of 64 MiB, and stops in the middle of its block.
        "too much memory": magic + b"\x80\x80" + struct.pack("<I", 45) + struct.pack("<I", 45 << 3 | 1)[:3] + bytes(20),
        "claims 0 bytes": b"\x50\x2a\x4d\x18" + struct.pack("<I", 0),
        "claims 46 bytes": zstandard.ZstdCompressor().compress(bytes(46)),
        "a zstd frame is broken": b"",
        "a zstd frame is": zstandard.ZstdCompressor().compress(bytes(45))[:-1],
    }
    for lie in ("broken", "too much memory"):
        assert zstandard.frame_content_size(frames[lie]) == 45
    for message, frame in frames.items():
        section = struct.pack("<I", len(frame)) + frame
        assert message in str(refuse_cheaply(craft(payload, values=section), tree))


def test_two_frames_in_the_place_of_one_are_refused() -> None:
    tree = {"u": np.arange(4, dtype=np.uint8)}
    payload = encode(tree)
    one = zstandard.ZstdCompressor().compress(bytes(4))
    assert decode(craft(payload, values=struct.pack("<I", len(one)) + one), tree)[0]["u"].tolist() == [0, 0, 0, 0]
    for tail in (one, b"x"):
        refuse_cheaply(craft(payload, values=struct.pack("<I", len(one + tail)) + one + tail), tree)
    refuse_cheaply(craft(payload, values=2 * (struct.pack("<I", len(one)) + one)), tree)


def test_crafted_mask_changes_are_refused() -> None:
    old = {"m": np.random.default_rng(0).random(4096) < 0.5}
    tree = {"m": np.ones(4096, np.float32)}
    payload = encode(tree, old, previous_mask=old)

    def changes(*gaps: int) -> bytes:
        planes = np.array(gaps, "<u4").view(np.uint8).reshape(-1, 4).T
        return struct.pack("<Q", len(gaps)) + b"".join(plane(p.tobytes()) for p in planes)

    evil = {
        "changes in a mask of 4096": struct.pack("<Q", 1 << 60),
        "a change at element 4096 of 4096": changes(4096),
        "a change at element 8589934591": changes((1 << 32) - 1, (1 << 32) - 1),
        "its hash is not": changes(4095),
        "8 bytes expected": b"1234",
        "too many": changes() + b"0",
    }
    for message, section in evil.items():
        assert message in str(refuse_cheaply(craft(payload, mask=section), tree, previous_mask=old))


def test_impossible_booleans_are_refused() -> None:
    tree = {"b": np.array([True, False])}
    payload = encode(tree)
    assert decode(craft(payload, values=plane(b"\0\1")), tree)[0]["b"].tolist() == [False, True]
    with pytest.raises(WireError, match="boolean"):
        decode(craft(payload, values=plane(b"\0\2")), tree)


def test_schema_of_an_empty_tree_may_not_hold_more() -> None:
    payload = encode({})
    with pytest.raises(WireError, match="more than it should|has a leaf"):
        decode(craft(payload, schema=plane(b"float32 3 ['w']"), raw=15), {})


def test_leaves_in_another_order_are_named() -> None:
    tree = OrderedDict(b=np.ones(2), a=np.ones(2))
    mask = OrderedDict(a=np.ones(2, np.bool_), b=np.ones(2, np.bool_))
    with pytest.raises(ValueError, match=r"mask: has leaf \['a'\] where the tree has \['b'\]"):
        encode(tree, mask)
