"""Small helpers over variable trees: paths, partitions, selects, stacks. Nothing here knows of models or methods.

A *variable tree* is a nested dict such as `{"params": {...}, "batch_stats": {...}}`; a *path* names one of its leaves,
`"params/trunk/conv1/kernel"`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

PyTree = Any


def path_map(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` whose function also gets the leaf's path as its first argument.

    >>> path_map(lambda path, x: path, {"a": {"kernel": 1.0}})
    {'a': {'kernel': 'a/kernel'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(jax.tree_util.keystr(keys, simple=True, separator="/"), *leaves), tree, *rest
    )


def split(tree: PyTree, chosen: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Cuts a nested dict in two by path: `(leaves not chosen, leaves chosen)`; `merge` puts them together again.

    >>> split({"a": {"x": 1, "y": 2}}, lambda path: path == "a/y")
    ({'a': {'x': 1}}, {'a': {'y': 2}})
    """
    flat = traverse_util.flatten_dict(tree, sep="/")
    rest = {path: leaf for path, leaf in flat.items() if not chosen(path)}
    taken = {path: leaf for path, leaf in flat.items() if chosen(path)}
    return traverse_util.unflatten_dict(rest, sep="/"), traverse_util.unflatten_dict(taken, sep="/")


def merge(first: PyTree, second: PyTree) -> PyTree:
    """The nested dict that holds the leaves of both; a path in both is taken from `second`.

    >>> merge({"a": {"x": 1}}, {"a": {"y": 2}})
    {'a': {'x': 1, 'y': 2}}
    """
    flat = traverse_util.flatten_dict(first, sep="/") | traverse_util.flatten_dict(second, sep="/")
    return traverse_util.unflatten_dict({path: flat[path] for path in sorted(flat)}, sep="/")


def select(choice: jax.Array, when_true: PyTree, when_false: PyTree) -> PyTree:
    """`when_true` where the boolean scalar `choice` holds, else `when_false`, leaf by leaf (no branch, vmap-safe)."""
    return jax.tree.map(lambda yes, no: jnp.where(choice, yes, no), when_true, when_false)


def pair(first: PyTree, second: PyTree) -> PyTree:
    """Two trees as one traced tree with a leading axis of length 2."""
    return jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """K trees of host or device arrays as one tree of host arrays with a leading axis of length K."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def unstack(tree: PyTree, count: int) -> list[PyTree]:
    """The inverse of `stack`: the first `count` entries of the leading axis, as trees of host arrays (views)."""
    host = jax.tree.map(np.asarray, tree)
    return [jax.tree.map(lambda leaf, row=row: leaf[row], host) for row in range(count)]


def all_finite(tree: PyTree) -> bool:
    """Whether every floating leaf (host arrays) is free of NaN and infinity."""
    return all(
        bool(np.isfinite(leaf).all())
        for leaf in map(np.asarray, jax.tree.leaves(tree))
        if np.issubdtype(leaf.dtype, np.floating)
    )


def finite(tree: PyTree) -> jax.Array:
    """`all_finite`, traced: bool scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, (jnp.isfinite(leaf).all() for leaf in leaves), jnp.bool_(True))


def parameter_count(tree: PyTree) -> int:
    """Number of elements in all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
