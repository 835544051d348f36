"""Masks, thresholds and the recovery decision, against hand-computed numbers and a NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import pruning


def kernel(*values):
    return {"layer": {"kernel": jnp.array(values, jnp.float32), "bias": jnp.zeros(2)}}


def test_only_kernels_outside_heads_are_prunable():
    assert pruning.is_prunable("params/trunk/layer1_0/conv1/kernel")
    for path in (
        "params/classifier/kernel",
        "params/proxies/kernel",
        "params/trunk/bnneck/kernel",
        "params/trunk/conv1/bias",
        "params/trunk/bn1/scale",
        "batch_stats/trunk/bn1/mean",
    ):
        assert not pruning.is_prunable(path), path


def test_a_step_removes_the_floor_of_its_share_and_the_smallest_first():
    model = kernel(0.1, -0.2, 0.3, -0.4, 0.5)
    mask = pruning.magnitude_mask(model, pruning.full_mask(model), 0.5)
    assert mask["layer"]["kernel"].tolist() == [False, False, True, True, True]
    assert mask["layer"]["bias"].tolist() == [True, True]
    assert float(pruning.density(mask)) == pytest.approx(0.6)


def test_ties_fall_in_flat_order_and_pruned_entries_do_not_count_as_alive():
    model = kernel(1.0, 0.0, -1.0, 1.0, 1.0)
    mask = pruning.full_mask(model)
    mask["layer"]["kernel"] = jnp.array([True, False, True, True, True])
    pruned = pruning.magnitude_mask(model, mask, 0.5)
    assert pruned["layer"]["kernel"].tolist() == [False, False, False, True, True]


def test_the_target_is_never_passed():
    model = kernel(1.0, 2.0, 3.0, 4.0, 5.0)
    mask = pruning.magnitude_mask(model, pruning.full_mask(model), 0.9, target=0.5)
    assert mask["layer"]["kernel"].tolist() == [False, False, True, True, True]  # ceil(0.5 * 5) = 3 stay
    again = pruning.magnitude_mask(model, mask, 0.9, target=0.5)
    assert again["layer"]["kernel"].tolist() == mask["layer"]["kernel"].tolist()


def test_global_scope_has_one_threshold_and_layer_scope_one_for_each():
    model = {"a": {"kernel": jnp.array([1.0, 2.0])}, "b": {"kernel": jnp.array([10.0, 20.0])}}
    full = pruning.full_mask(model)
    whole = pruning.magnitude_mask(model, full, 0.5, "global")
    assert [whole["a"]["kernel"].tolist(), whole["b"]["kernel"].tolist()] == [[False, False], [True, True]]
    each = pruning.magnitude_mask(model, full, 0.5, "layer")
    assert [each["a"]["kernel"].tolist(), each["b"]["kernel"].tolist()] == [[False, True], [False, True]]
    with pytest.raises(ValueError, match="scope"):
        pruning.magnitude_mask(model, full, 0.5, "channel")


def test_shares_are_exact_where_floats_are_not():
    # 0.2 * 5 and 0.7 * 10 must be 1 and 7; beyond 2**24 float32 could not even count.
    counts = jnp.array([5, 10, 20_000_003], jnp.int32)
    assert pruning._floor_share(counts[0], 0.2) == 1
    assert pruning._floor_share(counts[1], 0.7) == 7
    assert pruning._floor_share(counts[2], 0.3) == 6_000_000
    assert pruning._floor_share(jnp.int32(25_000_000), 1.0) == 25_000_000


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.5, 1e-30, -3.0, 7.0]), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_masks_equal_a_stable_sort(values, kept, step, target):
    weights = {"x": {"kernel": jnp.array(values[:4]).reshape(2, 2)}, "y": {"kernel": jnp.array(values[4:])}}
    mask = {"x": {"kernel": jnp.array(kept[:4]).reshape(2, 2)}, "y": {"kernel": jnp.array(kept[4:])}}
    found = jax.jit(lambda w, m: pruning.magnitude_mask(w, m, step, target=target))(weights, mask)
    found = np.concatenate([np.ravel(found["x"]["kernel"]), np.ravel(found["y"]["kernel"])])

    alive = np.flatnonzero(kept)
    remove = int(min(np.floor(step * len(alive) + 1e-9), max(len(alive) - np.ceil(target * 6 - 1e-9), 0)))
    order = alive[np.argsort(np.abs(np.float32(values))[alive], kind="stable")]
    expected = np.array(kept)
    expected[order[:remove]] = False
    np.testing.assert_array_equal(found, expected)
    assert not (found & ~np.array(kept)).any()


def memory_after_a_step(score=0.6):
    """A client that has pruned once: it kept two of three weights and remembers the third as 0.1."""
    before = kernel(0.1, 2.0, 3.0)
    full = pruning.full_mask(before)
    pruned = pruning.magnitude_mask(before, full, 0.34)
    memory = pruning.no_recovery(before, full)._replace(rounds=jnp.int32(1))
    mask, memory, decision = pruning.crr_accept(
        memory, before, full, pruned, jnp.float32(score), jnp.float32(0.7), jnp.float32(0.69), drop=0.02
    )
    assert pruning.DECISIONS[int(decision)] == "accepted"
    return mask, memory


def test_stage_one_accepts_up_to_the_drop_and_remembers_what_was():
    mask, memory = memory_after_a_step()
    assert mask["layer"]["kernel"].tolist() == [False, True, True]
    assert memory.mask["layer"]["kernel"].tolist() == [True, True, True]
    assert bool(memory.armed) and float(memory.score) == pytest.approx(0.6) and int(memory.rounds) == 2


@pytest.mark.parametrize(
    ("rounds", "halt", "candidate_score", "candidate_smaller", "expected"),
    [
        (1, 0, 0.68, True, "accepted"),
        (1, 0, 0.67, True, "rejected"),
        (1, 2, 0.70, True, "halted"),
        (0, 0, 0.70, True, "none"),
        (1, 0, 0.70, False, "target"),
    ],
)
def test_stage_one_decisions(rounds, halt, candidate_score, candidate_smaller, expected):
    model = kernel(0.1, 2.0, 3.0)
    full = pruning.full_mask(model)
    candidate = pruning.magnitude_mask(model, full, 0.34 if candidate_smaller else 0.0)
    memory = pruning.no_recovery(model, full)._replace(rounds=jnp.int32(rounds), halt=jnp.int32(halt))
    mask, after, decision = jax.jit(lambda m: pruning.crr_accept(
        m, model, full, candidate, jnp.float32(0.5), jnp.float32(0.7), jnp.float32(candidate_score), drop=0.02
    ))(memory)  # fmt: skip
    assert pruning.DECISIONS[int(decision)] == expected
    changed = mask["layer"]["kernel"].tolist() != [True, True, True]
    assert changed == (expected == "accepted")
    assert int(after.halt) == max(halt - 1, 0) and int(after.rounds) == rounds + 1


def test_stage_two_restores_mask_and_own_values_and_halts():
    mask, memory = memory_after_a_step(score=0.6)
    downloaded = kernel(0.0, 5.0, 6.0)
    recover = jax.jit(lambda score: pruning.crr_recover(memory, downloaded, mask, score, recover=0.05, halt=2))

    model, kept, after, recovered = recover(jnp.float32(0.56))
    assert not bool(recovered) and kept["layer"]["kernel"].tolist() == [False, True, True]
    assert bool(after.armed) and int(after.halt) == 0

    model, kept, after, recovered = recover(jnp.float32(0.54))
    assert bool(recovered) and kept["layer"]["kernel"].tolist() == [True, True, True]
    # The restored entry is the client's own 0.1; the others stay as they were downloaded.
    np.testing.assert_allclose(model["layer"]["kernel"], [0.1, 5.0, 6.0])
    assert not bool(after.armed) and int(after.halt) == 2
    # Nothing is left to undo, however bad the next download is.
    assert not bool(pruning.crr_recover(after, downloaded, kept, jnp.float32(0.0), recover=0.05, halt=2)[3])


@pytest.mark.parametrize("shape", [(), (1,), (127,), (128,), (3, 129), (2, 5, 999)])
def test_entries_are_counted_whatever_the_shape(shape):
    flags = np.random.default_rng(0).random(shape) < 0.7
    assert int(pruning.count_true({"x": flags, "y": np.ones(shape, bool)})) == flags.sum() + flags.size
    stacked = jax.vmap(pruning.count_true)(np.stack([flags, ~flags]))
    assert stacked.tolist() == [flags.sum(), flags.size - flags.sum()]


def test_a_column_of_nothing_but_kept_entries_does_not_overflow():
    assert int(pruning.count_true(jnp.ones((128, 3), bool))) == 384
