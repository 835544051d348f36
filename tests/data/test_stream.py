"""Pictures read from disk a batch at a time: the same batches, and the same models, as from an array on the device."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from PIL import Image

from fedklpr_jax.data import stream
from fedklpr_jax.data.folder import read_site
from fedklpr_jax.data.plans import identity_plan, shuffled_plan
from fedklpr_jax.data.stream import PlannedBatches, Streamed, batches
from tests.data.site_files import plain

NOISE = np.random.default_rng(0).integers(0, 256, (50, 4, 3, 3), np.uint8)


def on_disk(folder: Path, *counts: int) -> list[np.ndarray]:
    """`NOISE` as memory maps, cut into so many pictures each."""
    ends = np.cumsum([0, *counts])
    for number, (first, last) in enumerate(zip(ends, ends[1:], strict=False)):
        np.save(folder / f"{number}.npy", NOISE[first:last])
    return [np.load(folder / f"{number}.npy", mmap_mode="r") for number in range(len(counts))]


def plans() -> list[np.ndarray]:
    """Three clients' plans of a round of two epochs."""
    labels = np.random.default_rng(1).integers(0, 4, 20)
    identities = [identity_plan(labels, people=2, shots=3, key=(0, 0, 0, epoch)) for epoch in range(2)]
    shuffled = [[shuffled_plan(np.arange(*span), 6, key=(0, 0, 1, epoch)) for epoch in range(2)]
                for span in ((20, 31), (31, 50))]  # fmt: skip
    return [np.concatenate(epochs) for epochs in (identities, *shuffled)]


def test_elements_are_the_planned_batches(tmp_path: Path) -> None:
    read = Streamed(on_disk(tmp_path, 20, 30), (4, 3, 3)).read
    for plan in plans():
        source = PlannedBatches(read, plan)
        assert isinstance(source, grain.sources.RandomAccessDataSource) and len(source) == len(plan)
        for element, row in zip(map(source.__getitem__, range(len(source))), plan, strict=True):
            assert np.array_equal(element, NOISE[stream.pictures(row)])
        assert source[0].dtype == np.uint8 and source[0].shape == (plan.shape[1], 4, 3, 3)
        for taken, row in zip(batches(read, plan), plan, strict=True):
            assert np.array_equal(taken, NOISE[stream.pictures(row)])


def test_batches_from_a_cache_of_decoded_files_are_those_of_the_array(tmp_path: Path) -> None:
    def blob(value: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(NOISE[value]).save(file, "PNG")
        return file.getvalue()

    files = {f"bounding_box_train/{n // 4 + 1:04d}_c{n % 2 + 1}s1_{n:06d}_00.png": blob(n) for n in range(16)}
    files |= {"query/0009_c1s1_000000_00.png": blob(20), "bounding_box_test/0009_c2s1_000000_00.png": blob(21)}
    train = read_site(plain(tmp_path / "gate", files), height=8, width=4, cache=tmp_path / "cache").train
    assert isinstance(train.pixels, np.memmap)
    array, streamed = np.array(train.pixels), Streamed([train.pixels], (8, 4, 3))
    plan = identity_plan(train.ids, people=2, shots=4, key=(0, 0, 0, 0))
    for taken, row in zip(batches(streamed.read, plan), plan, strict=True):
        assert np.array_equal(taken, array[row])


def test_rows_are_taken_as_jax_takes_those_of_an_array(tmp_path: Path) -> None:
    streamed = Streamed(on_disk(tmp_path, 1, 0, 19, 30), (4, 3, 3))
    assert streamed.shape == (50, 4, 3, 3) and len(streamed) == 50 and jax.tree.leaves(streamed) == []
    rows = np.array([[0, 49, 50, 1000], [-1, -50, -51, 7], [19, 20, 1, 1]], np.int32)
    take = jax.jit(lambda pixels, rows: pixels[rows])
    wanted = np.asarray(take(NOISE, rows))
    assert np.array_equal(take(streamed, rows), wanted)
    assert np.array_equal(jax.vmap(lambda row: streamed[row])(rows), wanted)
    assert np.array_equal(jax.lax.map(lambda row: streamed[row], rows), wanted)


@pytest.mark.parametrize("together", [False, True])
def test_planned_batches_are_read_ahead_in_any_order_of_the_clients(tmp_path: Path, together, monkeypatch) -> None:
    streamed, asked, read = Streamed(on_disk(tmp_path, 50), (4, 3, 3)), [], []
    direct = streamed.read
    monkeypatch.setattr(streamed, "read", lambda rows: read.append(rows.tobytes()) or direct(rows))
    take = jax.jit(lambda rows: streamed[rows])
    three = [stream.pictures(plan).astype(np.int32) for plan in plans()]
    if together:
        least = min(map(len, three))
        order = [np.stack([plan[step] for plan in three]) for step in range(least)]
        order += [row for plan in three for row in plan[least:]]
    else:
        order = [row for plan in three for row in plan]
    with streamed.ahead(plans()):
        for rows in order:
            # What no plan says comes in between.
            other = np.array([3, 1, 4, 1, 5, 9], np.int32)
            assert np.array_equal(take(other), NOISE[other])
            assert np.array_equal(take(rows), NOISE[rows])
            asked.append(other.tobytes())
        assert streamed._due == {}
    # Each planned batch was read once, and no other than was asked for.
    assert sorted(read) == sorted([*asked, *(row.tobytes() for plan in three for row in plan)])


def test_a_plan_that_is_left_is_forgotten(tmp_path: Path) -> None:
    streamed = Streamed(on_disk(tmp_path, 50), (4, 3, 3))
    with pytest.raises(ZeroDivisionError), streamed.ahead(plans()):
        streamed[plans()[0][0]]
        raise ZeroDivisionError
    assert streamed._due == {}
    with streamed.ahead([np.zeros((0, 4), np.int32)]):
        assert np.array_equal(streamed[np.array([1, 2])], NOISE[1:3])


def test_grain_is_imported_only_where_needed() -> None:
    code = "import sys, fedklpr_jax.assembly; sys.exit('grain' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
