from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedklpr_jax import checkpoint
from fedklpr_jax.errors import InputError

pytestmark = pytest.mark.short


class Counts(NamedTuple):
    rounds: Any
    flips: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Server:
    params: Any
    counts: Any


def small_state() -> Server:
    return Server(
        params={
            "kernel": jnp.arange(6, dtype=jnp.float32).reshape(2, 3),
            "mask": np.array([True, False, True]),
            "half": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16),
            "scalar": np.float32(0.1),
            "none_kept": np.zeros((0, 4), np.float32),
        },
        counts=Counts(rounds=np.int32(7), flips=jax.random.key_data(jax.random.key(3))),
    )


def assert_bitwise_equal(left: Any, right: Any) -> None:
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def error_line(action: Any) -> str:
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_of(directory: Path, step: int) -> list[Path]:
    """The files of a checkpoint's data, largest first."""
    record = json.loads((directory / f"step-{step:08d}.json").read_text())
    files = [directory / record["data"] / name for name in record["files"]]
    return sorted(files, key=lambda path: -path.stat().st_size)


def test_comes_back_bitwise_with_its_meta(tmp_path: Path) -> None:
    state = small_state()
    meta = {"round": 7, "ledger": {"up": [10, 2**60]}, "loss": 0.1 + 0.2, "name": "ünï"}
    checkpoint.save(tmp_path / "made" / "here", 7, state, meta)
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    restored, restored_meta = checkpoint.restore(tmp_path / "made" / "here", 7, template)
    assert_bitwise_equal(restored, state)
    assert restored_meta == meta
    by_path = checkpoint.leaves(tmp_path / "made" / "here", 7)
    assert_bitwise_equal(list(by_path.values()), jax.tree.leaves(state))
    assert list(by_path) == [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    assert all(leaf.flags.aligned and leaf.flags.writeable for leaf in jax.tree.leaves(restored))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.sampled_from([np.float32, np.bool_, np.int32, np.uint32, np.uint8, jnp.bfloat16]).flatmap(
            lambda dtype: hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)).map(
                lambda bits: (bits % 2).astype(dtype) if dtype is np.bool_ else bits.astype(dtype) / dtype(1)
            )
        ),
        max_size=6,
    )
)
def test_any_leaves_come_back_bitwise(tmp_path_factory: pytest.TempPathFactory, leaves: list[np.ndarray]) -> None:
    directory = tmp_path_factory.mktemp("any")
    state = {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
    checkpoint.save(directory, 0, state, {})
    assert_bitwise_equal(checkpoint.restore(directory, 0, state)[0], jax.tree.map(np.asarray, state))


def test_every_bit_pattern_of_a_float_survives(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32)
    state = {"float32": bits.view(np.float32), "transposed": bits.reshape(100, 100).T}
    checkpoint.save(tmp_path, 0, state, {})
    assert_bitwise_equal(checkpoint.restore(tmp_path, 0, state)[0], state)


def test_an_array_spread_over_devices_is_gathered(tmp_path: Path) -> None:
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(
        np.arange(8, dtype=np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("clients"))
    )
    checkpoint.save(tmp_path, 0, spread, {})
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, 0, spread)[0], np.arange(8, dtype=np.float32))


def test_old_ones_go_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "step-notes.txt").write_text("mine")
    for step in (1, 5, 9, 10):
        checkpoint.save(tmp_path, step, {"w": np.full(3, step)}, {}, keep=2)
    assert checkpoint.latest(tmp_path) == 10
    assert sorted(path.name.split(".")[0] for path in tmp_path.iterdir()) == [
        *["step-00000009"] * 2,
        *["step-00000010"] * 2,
        "step-notes",
    ]
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, 9, {"w": np.zeros(3, int)})[0]["w"], [9, 9, 9])
    assert "no complete checkpoint of step 5; complete ones: 9, 10" in error_line(
        lambda: checkpoint.restore(tmp_path, 5, {"w": np.zeros(3, int)})
    )


def test_a_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, 4, np.float32(value), {"value": value}, keep=1)
    assert checkpoint.restore(tmp_path, 4, np.float32(0)) == (2.0, {"value": 2.0})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ({"a": np.zeros((3, 3), np.float32)}, "a is float32[2, 3] in the file but float32[3, 3] in this run"),
        ({"a": np.zeros((2, 3), np.int32)}, "a is float32[2, 3] in the file but int32[2, 3] in this run"),
        ({"b": np.zeros((2, 3), np.float32)}, "a is float32[2, 3] in the file but missing in this run"),
        (
            {"a": np.zeros((2, 3), np.float32), "c": {"d": np.int32(1)}},
            "c/d is missing in the file but int32[] in this run",
        ),
    ],
)
def test_another_structure_is_told_in_one_line(tmp_path: Path, template: Any, told: str) -> None:
    checkpoint.save(tmp_path, 2, {"a": np.zeros((2, 3), np.float32)}, {})
    line = error_line(lambda: checkpoint.restore(tmp_path, 2, template))
    assert line.startswith(f"{tmp_path}: checkpoint 2") and told in line


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    assert "step: -1" in error_line(lambda: checkpoint.save(tmp_path, -1, {}, {}))
    assert "keep: 0" in error_line(lambda: checkpoint.save(tmp_path, 1, {}, {}, keep=0))
    checkpoint.save(tmp_path, 3, {}, {})
    assert "step 2 lies before the newest checkpoint 3" in error_line(lambda: checkpoint.save(tmp_path, 2, {}, {}))
    assert checkpoint.latest(tmp_path) == 3


def test_what_cannot_be_saved_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a/key.*key_data"):
        checkpoint.save(tmp_path / "new", 0, {"a": {"key": jax.random.key(0)}}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path / "new", 0, {}, {"scores": np.zeros(2)})
    assert not (tmp_path / "new").exists()


def test_latest_passes_over_half_a_checkpoint(tmp_path: Path) -> None:
    state = {"w": np.arange(1000.0)}
    whole = tmp_path / "whole"
    for step in (1, 2):
        checkpoint.save(whole, step, state, {})
    for damage in ("no record", "record cut", "file cut", "file gone", "data gone", "empty record"):
        directory = tmp_path / damage
        shutil.copytree(whole, directory)
        record = directory / "step-00000002.json"
        largest = files_of(directory, 2)[0]
        if damage == "no record":
            record.unlink()
        elif damage == "record cut":
            record.write_bytes(record.read_bytes()[:-20])
        elif damage == "empty record":
            record.write_bytes(b"")
        elif damage == "file cut":
            os.truncate(largest, 10)
        elif damage == "file gone":
            largest.unlink()
        else:
            shutil.rmtree(directory / json.loads(record.read_text())["data"])
        assert checkpoint.latest(directory) == 1, damage
        assert_bitwise_equal(checkpoint.restore(directory, 1, state)[0], state)
        checkpoint.save(directory, 2, state, {"again": True})
        assert checkpoint.restore(directory, 2, state)[1] == {"again": True}, damage
        assert len(list(directory.iterdir())) == 4, damage


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    state = {"w": np.arange(1000.0)}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state, {})
    largest = files_of(tmp_path, 2)[0]
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    line = error_line(lambda: checkpoint.restore(tmp_path, 2, state))
    assert line == error_line(lambda: checkpoint.leaves(tmp_path, 2))
    assert "checkpoint 2 is damaged" in line and "continue from 1" in line


def test_a_later_format_is_neither_read_nor_swept(tmp_path: Path) -> None:
    record = tmp_path / "step-00000001.json"
    record.write_text(json.dumps({"format": 99}))
    assert "its format is 99" in error_line(lambda: checkpoint.latest(tmp_path))
    assert "its format is 99" in error_line(lambda: checkpoint.save(tmp_path, 2, {}, {}))
    assert record.exists()


def test_a_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    line = error_line(lambda: checkpoint.save(tmp_path / "file" / "runs", 0, {}, {}))
    assert line.startswith(f"{tmp_path}/file/runs: the checkpoint of step 0 cannot be written (Not a directory)")


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from fedklpr_jax import checkpoint
from fedklpr_jax.errors import InputError
directory = Path(sys.argv[1])
checkpoint.save(directory, 1, {"w": np.arange(10)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for step, size, note in [(2, 1 << 20, ""), (1, 10, "x" * (1 << 21))]:
    try:
        checkpoint.save(directory, step, {"w": np.arange(size)}, {"note": note})
    except InputError as error:
        print(error)
print(checkpoint.latest(directory), checkpoint.restore(directory, 1, {"w": np.arange(10)})[0]["w"].sum())
"""


def test_a_write_error_is_one_line_and_leaves_the_old_ones(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False)
    data, record, after = done.stdout.splitlines()
    assert data.startswith(f"{tmp_path}: the checkpoint of step 2 cannot be written (File too large)")
    assert record.startswith(f"{tmp_path}: the checkpoint of step 1 cannot be written (File too large)")
    assert after == "1 45"
    assert done.stderr == ""
    assert len(list(tmp_path.iterdir())) == 2


SAVING_LOOP = """
import itertools, sys
from pathlib import Path
import numpy as np
from fedklpr_jax import checkpoint
directory = Path(sys.argv[1])
newest = checkpoint.latest(directory)
for step in itertools.count(0 if newest is None else newest + 1):
    checkpoint.save(directory, step, {"w": np.full(300_000, step), "b": np.full(7, -step)}, {"round": step}, keep=1)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    template = {"w": np.zeros(300_000, np.int64), "b": np.zeros(7, np.int64)}
    moments = random.Random(0)
    told = -1
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", SAVING_LOOP, str(tmp_path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            told = int(child.stdout.readline())
            time.sleep(moments.uniform(0.0, 0.15))
            child.send_signal(signal.SIGKILL)
            told = max([told, *map(int, child.stdout.read().split())])
        step = checkpoint.latest(tmp_path)
        # The last save may have been complete before it could say so.
        assert step in (told, told + 1)
        state, meta = checkpoint.restore(tmp_path, step, template)
        assert meta == {"round": step}
        assert (state["w"] == step).all() and (state["b"] == -step).all()
    checkpoint.save(tmp_path, told + 2, template, {}, keep=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_length_of_a_state_makes_many_files(tmp_path):
    # A prime number of bytes with the one behind it: no equal chunks but of a single byte.
    state = {"w": np.arange(8650813 - 1, dtype=np.uint8)}
    checkpoint.save(tmp_path, 1, state, {})
    assert sum(path.is_file() for path in tmp_path.rglob("*")) < 20
    restored, _ = checkpoint.restore(tmp_path, 1, state)
    np.testing.assert_array_equal(restored["w"], state["w"])
