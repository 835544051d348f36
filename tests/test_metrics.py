from __future__ import annotations

import doctest
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import metrics
from fedklpr_jax.errors import InputError
from fedklpr_jax.metrics import Ledger, MetricsLog, read_metrics, write_json


def test_examples_in_the_docs():
    result = doctest.testmod(metrics)
    assert result.attempted > 5 and result.failed == 0


# ------------------------------------------------------------------------------------------------ log
def test_lines_are_read_back_and_are_on_disk_before_close(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog.open(path)
    log.write({"event": "note", "text": "naïve\nname"})
    assert read_metrics(path) == [{"event": "note", "text": "naïve\nname"}]
    assert log.offset == path.stat().st_size
    log.close()


def test_numbers_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog.open(path) as log:
        log.write({"a": float("nan"), "b": [np.float32("inf"), np.int64(3)], "c": np.array([1.0, np.nan]), "d": True})
    assert read_metrics(path) == [{"a": None, "b": [None, 3], "c": [1.0, None], "d": True}]
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_what_json_cannot_hold_leaves_the_log_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog.open(path) as log:
        log.write({"a": 1})
        with pytest.raises(TypeError):
            log.write({"a": object()})
    assert read_metrics(path) == [{"a": 1}]


def test_torn_last_line_is_ignored_and_removed_on_append(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "te')
    assert read_metrics(path) == [{"a": 1}]
    with MetricsLog.open(path) as log:
        log.write({"a": 3})
    assert read_metrics(path) == [{"a": 1}, {"a": 3}]


def test_two_cannot_write_one_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog.open(path) as log:
        log.write({"a": 1})
        with pytest.raises(InputError, match=r"metrics.jsonl: another process is at work on this run"):
            MetricsLog.open(path, 0)
        log.write({"a": 2})
    with MetricsLog.open(path) as log:
        log.write({"a": 3})
    assert read_metrics(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_resume_cuts_to_the_offset(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog.open(path) as log:
        log.write({"round": 0})
        offset = log.offset
        log.write({"round": 1})
    with MetricsLog.open(path, offset) as log:
        assert log.offset == offset
        log.write({"round": 2})
    assert read_metrics(path) == [{"round": 0}, {"round": 2}]
    MetricsLog.open(path, 0).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("offset", [-1, 3, 100])
def test_offset_that_is_no_end_of_a_line_is_refused_and_nothing_is_lost(tmp_path, offset):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(InputError, match="metrics.jsonl.*byte"):
        MetricsLog.open(path, offset)
    assert path.read_bytes() == b'{"a": 1}\n'


def test_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a":\n{"a": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)
    with pytest.raises(InputError, match="no such file"):
        read_metrics(tmp_path / "none")


def test_write_json_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1, "b": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1, "b": None}

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text())["a"] == 1
    assert os.listdir(tmp_path) == ["summary.json"]


# ------------------------------------------------------------------------------------------------ ledger
def test_ledger_by_hand():
    empty = Ledger()
    ledger = empty.add({"a": (100, 100)}).measured({"a": 100}, 20).measured({"a": 7}, 7)
    ledger = ledger.measured({"b": 50}, 10).add({"a": (40, 30), "b": (50, None)})
    assert empty == Ledger()
    assert (ledger.down, ledger.up) == ({"a": 140, "b": 50}, {"a": 130, "b": 0})
    assert ledger.payloads == {"a": 4, "b": 1}
    assert ledger.total == 320
    assert ledger.dense_total == 4 * 100 + 1 * 50
    assert ledger.raw_total == 4 * (4 * 20 + 1 * 10)
    assert ledger.saving == pytest.approx(1 - 320 / 450)
    assert ledger.summary() == {
        "down": 190, "up": 130, "total": 320, "dense_total": 450, "raw_total": 360,
        "per_client": {"a": {"down": 140, "up": 130}, "b": {"down": 50, "up": 0}},
    }


def test_ledger_of_nothing_saves_nothing_and_unmeasured_clients_claim_nothing():
    assert Ledger().saving is None and Ledger().total == 0
    assert Ledger().add({"a": (9, None)}).saving == 0
    with pytest.raises(ValueError, match="-1"):
        Ledger().add({"a": (None, -1)})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_ledger_survives_json_and_adds_up(messages):
    ledger = Ledger().measured({"a": 9}, 2)
    for client, down, up in messages:
        ledger = ledger.add({client: (down, up)})
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    assert ledger.total == sum(down + up for _, down, up in messages)
    assert sum(ledger.payloads.values()) == 2 * len(messages)
