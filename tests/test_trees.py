"""Partitions, selects and stacks of small trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import trees

pytestmark = pytest.mark.short

NESTED = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@settings(deadline=None, max_examples=50)
@given(NESTED, st.sets(st.sampled_from("abc")))
def test_split_and_merge_are_inverses(tree, letters):
    rest, taken = trees.split(tree, lambda path: path[-1] in letters)
    assert trees.merge(rest, taken) == tree == trees.merge(taken, rest)
    paths = []
    trees.path_map(lambda path, leaf: paths.append(path), taken)
    assert all(path[-1] in letters for path in paths)
    assert len(jax.tree.leaves(rest)) + len(paths) == len(jax.tree.leaves(tree))


def test_merge_takes_the_second_and_gives_one_order():
    one, other = {"b": {"x": 1}, "a": 2}, {"a": 3}
    assert trees.merge(one, other) == {"a": 3, "b": {"x": 1}}
    assert list(trees.merge(one, {})) == list(trees.merge({}, one)) == ["a", "b"]


def test_path_map_takes_more_trees():
    tree = {"a": {"kernel": 1}, "b": (2, 3)}
    doubled = jax.tree.map(lambda x: 2 * x, tree)
    got = trees.path_map(lambda path, x, y: (path, x + y), tree, doubled)
    assert got == {"a": {"kernel": ("a/kernel", 3)}, "b": (("b/0", 6), ("b/1", 9))}


def test_select_follows_a_traced_choice():
    pick = jax.jit(trees.select)
    left, right = {"w": jnp.array([1.0, jnp.nan]), "n": jnp.int32(1)}, {"w": jnp.array([3.0, 4.0]), "n": jnp.int32(2)}
    np.testing.assert_array_equal(pick(False, left, right)["w"], [3, 4])
    assert pick(True, left, right)["n"] == 1 and pick(True, left, right)["n"].dtype == jnp.int32


def test_pair_stack_and_unstack():
    rows = [{"w": np.arange(3) + k, "b": np.float32(k)} for k in range(4)]
    together = trees.stack(rows)
    assert together["w"].shape == (4, 3) and together["b"].dtype == np.float32
    back = trees.unstack(together, 3)
    assert len(back) == 3
    for row, original in zip(back, rows[:3], strict=True):
        jax.tree.map(np.testing.assert_array_equal, row, original)
    both = trees.pair(rows[0], rows[3])
    assert both["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite_looks_at_every_float(bad):
    tree = {"w": np.ones((2, 3), np.float32), "mask": np.array([True]), "n": np.int32(3), "x": 1.0}
    assert trees.all_finite(tree) and trees.all_finite({})
    tree["w"][1, 2] = bad
    assert not trees.all_finite(tree)
    assert not trees.all_finite({"x": np.float32(bad)})


def test_parameter_count():
    assert trees.parameter_count({"a": np.zeros((2, 3)), "b": np.float32(1), "c": np.zeros((0, 5))}) == 7
    assert trees.parameter_count({}) == 0
