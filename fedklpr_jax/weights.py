"""Trunk weights as one file: an `.npz` with one float32 array a leaf, named by the leaf's path.

It holds what `ModelSpec.init` makes, so `params/conv/kernel` and `batch_stats/norm/mean` stand side by side and NumPy
alone can read and write it. A classifier or a pruning mask is no part of it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from fedklpr_jax.errors import BROKEN_NPZ, InputError
from fedklpr_jax.metrics import write_atomically
from fedklpr_jax.trees import PyTree


def save(path: Path, variables: PyTree) -> None:
    """Writes the leaves of `variables` to `path`, whole or not at all.

    Args:
      path: the file; an older one is replaced.
      variables: a nested dict of arrays, such as `ModelSpec.init` makes; stored as float32.

    Raises:
      InputError: the file cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "trunk.npz"
    >>> save(path, {"params": {"norm": {"scale": np.float32([1, 2])}}})
    >>> load(path, {"params": {"norm": {"scale": np.zeros(2, np.float32)}}})
    {'params': {'norm': {'scale': array([1., 2.], dtype=float32)}}}
    """
    leaves: dict[str, Any] = jax.tree.map(np.float32, traverse_util.flatten_dict(variables, sep="/"))
    buffer = io.BytesIO()
    np.savez(buffer, **leaves)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give a path in an existing folder") from error


def load(path: Path, like: PyTree) -> PyTree:
    """The variables in `path`, checked against `like`.

    Args:
      path: a file of `save`.
      like: a tree of arrays (or of `jax.ShapeDtypeStruct`) with exactly the leaves that are wanted.

    Returns:
      A nested dict of float32 host arrays with the structure of `like`.

    Raises:
      InputError: no such file, no such archive, or a leaf that is missing, unknown, of another type or shape, or not
        finite.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in traverse_util.flatten_dict(like, sep="/").items()}
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it: python -m fedklpr_jax.pretrain --out {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            leaves = {name: archive[name] for name in archive.files}
    except BROKEN_NPZ as error:
        raise InputError(f"{path}: damaged or no .npz archive of plain arrays; make it again") from error
    except TypeError as error:
        raise InputError(f"{path}: one array, not an .npz archive of arrays by leaf; make it again") from error
    for name in sorted(shapes.keys() ^ leaves.keys()):
        fault = "is missing in it" if name in shapes else "belongs to no leaf of this network"
        raise InputError(f"{path}: {name}: {fault}; give weights of the same config.model")
    for name, shape in shapes.items():
        leaf = leaves[name]
        if leaf.dtype != np.float32:
            raise InputError(f"{path}: {name}: holds {leaf.dtype}; give float32")
        if leaf.shape != shape:
            raise InputError(f"{path}: {name}: shape {leaf.shape}, not {shape}; give weights of the same config.model")
        if not np.isfinite(leaf).all():
            raise InputError(f"{path}: {name}: holds values that are not finite; make it again")
    return traverse_util.unflatten_dict({name: leaves[name] for name in shapes}, sep="/")
