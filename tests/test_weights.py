"""Weight files: what is written is what is read, and every fault of a file is one line that names it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import weights
from fedklpr_jax.errors import InputError
from fedklpr_jax.models.spec import ModelSpec
from tests.federations import TINY

LEAF = "params/norm/scale"
LIKE = {
    "params": {"norm": {"scale": np.zeros(3, np.float32)}},
    "batch_stats": {"norm": {"mean": np.zeros(2, np.float32)}},
}


def flat(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """The arrays of a good file for `LIKE`; `scale` or `mean` replaced, or left out where None."""
    found = {"scale": np.float32([1, 2, 3]), "mean": np.float32([4, 5])} | changes
    names = {"scale": LEAF, "mean": "batch_stats/norm/mean"}
    return {names.get(key, key): value for key, value in found.items() if value is not None}


def test_a_trunk_comes_back_bit_for_bit(tmp_path):
    trunk = TINY.init(jax.random.key(3), 32, 16)
    weights.save(tmp_path / "trunk.npz", trunk)
    back = weights.load(tmp_path / "trunk.npz", TINY.init(jax.random.key(4), 32, 16))
    assert jax.tree.structure(back) == jax.tree.structure(trunk)
    for old, new in zip(jax.tree.leaves(trunk), jax.tree.leaves(back), strict=True):
        assert isinstance(new, np.ndarray) and new.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(old), new)
    assert [file.name for file in tmp_path.iterdir()] == ["trunk.npz"]


def test_plain_numpy_reads_and_writes_it(tmp_path):
    path = tmp_path / "trunk.npz"
    weights.save(path, {"params": {"norm": {"scale": jnp.arange(3, dtype=jnp.bfloat16)}}})
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == [LEAF] and archive[LEAF].dtype == np.float32
        assert archive[LEAF].tolist() == [0, 1, 2]
    np.savez(path, **flat())
    assert weights.load(path, LIKE)["batch_stats"]["norm"]["mean"].tolist() == [4, 5]


def test_shapes_are_enough_to_load(tmp_path):
    trunk = TINY.init(jax.random.key(0), 32, 16)
    weights.save(tmp_path / "trunk.npz", trunk)
    weights.load(tmp_path / "trunk.npz", jax.eval_shape(lambda: TINY.init(jax.random.key(0), 32, 16)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scale": None}, [LEAF, "missing"]),
        ({"params/extra": np.float32(1)}, ["params/extra", "belongs to no leaf"]),
        ({"scale": np.float32([1, 2])}, [LEAF, "(2,)", "(3,)"]),
        ({"scale": np.float64([1, 2, 3])}, [LEAF, "float64", "float32"]),
        ({"mean": np.float32([1, np.nan])}, ["batch_stats/norm/mean", "not finite"]),
        ({"mean": np.float32([1, np.inf])}, ["batch_stats/norm/mean", "not finite"]),
        ({"mean": np.array([1, "two"], object)}, ["damaged"]),
    ],
)
def test_a_leaf_that_does_not_fit_is_named(tmp_path, changes, words):
    path = tmp_path / "trunk.npz"
    np.savez(path, **flat(**changes))
    with pytest.raises(InputError) as caught:
        weights.load(path, LIKE)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]) and "\n" not in message


def test_another_networks_file_is_refused(tmp_path):
    weights.save(tmp_path / "trunk.npz", TINY.init(jax.random.key(0), 32, 16))
    wider = ModelSpec("wider", (16, 16), (1, 1), stem="3x3/2")
    with pytest.raises(InputError, match=r"trunk.npz: .*: shape .* give weights of the same config.model"):
        weights.load(tmp_path / "trunk.npz", wider.init(jax.random.key(0), 32, 16))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 30, 100, -1, -30, -200])
def test_a_truncated_file_is_damaged(tmp_path, length):
    path = tmp_path / "trunk.npz"
    weights.save(path, LIKE)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="trunk.npz: damaged"):
        weights.load(path, LIKE)


def test_every_changed_value_byte_is_found(tmp_path):
    path = tmp_path / "trunk.npz"
    weights.save(path, LIKE | {"params": {"norm": {"scale": np.float32([7, 7, 7])}}})
    data = path.read_bytes()
    place = data.index(np.float32([7, 7, 7]).tobytes())
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    with pytest.raises(InputError, match="damaged"):
        weights.load(path, LIKE)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "trunk.npz"
    with pytest.raises(InputError, match=r"trunk.npz: no such file; make it: python -m fedklpr_jax.pretrain --out"):
        weights.load(path, LIKE)
    with pytest.raises(InputError, match="no such file"):
        weights.load(tmp_path, LIKE)
    path.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="damaged"):
        weights.load(path, LIKE)
    with path.open("wb") as file:
        np.save(file, np.zeros(3, np.float32))
    with pytest.raises(InputError, match="one array, not an .npz archive"):
        weights.load(path, LIKE)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere/trunk.npz: cannot be written"):
        weights.save(tmp_path / "nowhere" / "trunk.npz", LIKE)
