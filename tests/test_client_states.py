"""States in memory and on disk: the same values, whole files, and only what is used stays."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.client_states import ClientStates, Shelf
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientState
from fedklpr_jax.trees import unstack

pytestmark = pytest.mark.short


def state(value, masked=True):
    local = {"params": {"kernel": np.full((2, 3), value, np.float32)}}
    mask = {"params": {"kernel": np.arange(6).reshape(2, 3) > value}} if masked else None
    return ClientState(local, mask, np.int32(value), np.full(4, -1, np.int32))


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=25)
@given(rounds=st.lists(st.dictionaries(st.integers(0, 4), st.integers(0, 9), max_size=3), max_size=4))
def test_disk_and_memory_hold_the_same(tmp_path_factory, rounds):
    firsts = (state(0), state(1))
    memory = ClientStates(5, firsts)
    disk = ClientStates(5, firsts, shelf=Shelf(tmp_path_factory.mktemp("shelf")))
    expected = [firsts[k % 2] for k in range(5)]
    for round_, changed in enumerate(rounds):
        new = {k: state(value) for k, value in changed.items()}
        before = disk
        memory, disk = memory.after(round_, new), disk.after(round_, new)
        expected = [new.get(k, old) for k, old in enumerate(expected)]
        assert before is not disk and len(disk) == 5
    for k, (one, other, wanted) in enumerate(zip(memory, disk, expected, strict=True)):
        same(one, wanted)
        same(other, wanted)
        same(memory.restored(memory.record(), memory.in_memory())[k], wanted)
        same(disk.restored(disk.record(), {})[k], wanted)
    assert disk.in_memory() == {} and set(memory.recorded(memory.record())) == set(memory.in_memory())


def test_a_client_that_never_took_part_takes_no_place():
    states = ClientStates(10**6, (state(0),)).after(3, {7: state(2)})
    assert states[999_999] is states[0] and states.record() == {"7": ""} and list(states.in_memory()) == ["7"]
    # 6 values and 6 bits as bytes, two counts: what a million of them would take.
    assert states.bytes_in_all() == 10**6 * (24 + 6 + 4 + 16)
    with pytest.raises(IndexError, match="client 1000000 of 1000000"):
        states[10**6]


def test_the_shelf_keeps_what_is_named_and_clears_the_rest(tmp_path):
    states = ClientStates(3, (state(0),), shelf=Shelf(tmp_path / "clients"))
    older = states.after(0, {0: state(1), 1: state(2)})
    newer = older.after(1, {1: state(3)})
    (tmp_path / "clients" / ".00000001-00000002.npz.0123").write_bytes(b"half")
    (tmp_path / "clients" / "mine.txt").write_text("not ours")
    assert newer.shelf
    newer.shelf.sweep(newer.record().values())
    assert sorted(path.name for path in (tmp_path / "clients").iterdir()) == [
        "00000000-00000000.npz", "00000001-00000001.npz", "mine.txt"
    ]  # fmt: skip
    same(newer[0], state(1))
    same(newer[1], state(3))
    with pytest.raises(InputError, match=r"00000001-00000000.npz: no readable client state \(FileNotFoundError\)"):
        older[1]


@pytest.mark.parametrize("spoil", ["cut", "flip", "other"])
def test_a_damaged_or_foreign_file_is_told_by_name(tmp_path, spoil):
    states = ClientStates(2, (state(0),), shelf=Shelf(tmp_path)).after(0, {1: state(5)})
    path = tmp_path / "00000001-00000000.npz"
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif spoil == "flip":
        data = bytearray(path.read_bytes())
        data[data.index(np.float32(5).tobytes())] ^= 1
        path.write_bytes(data)
    else:
        Shelf(tmp_path).put(path.name, state(5, masked=False))
    with pytest.raises(InputError, match="00000001-00000000.npz: (no readable|holds another kind of) client state"):
        states[1]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "clients").write_text("a file in the way")
    with pytest.raises(InputError, match="clients: a client's state cannot be written"):
        ClientStates(2, (state(0),), shelf=Shelf(tmp_path / "clients")).after(0, {1: state(5)})


def test_a_kept_state_does_not_hold_those_of_its_round():
    rows = unstack({"w": np.zeros((20, 3), np.float32)}, 20)
    states = ClientStates(20, (ClientState(rows[0], None, ()),)).after(0, {4: ClientState(rows[4], None, ())})
    assert rows[4]["w"].base is not None and states[4].local["w"].base is None
