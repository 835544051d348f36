from __future__ import annotations

import doctest
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import metrics
from fedklpr_jax.errors import InputError
from fedklpr_jax.metrics import Console, Ledger, MetricsLog, read_metrics, write_json


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
    ledger = empty.add("a", down=100, up=100).measured("a", 100, 20).measured("a", 7, 7).add("a", down=40, up=30)
    ledger = ledger.measured("b", 50, 10).add("b", down=50)
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
    assert Ledger().add("a", down=9).saving == 0
    with pytest.raises(ValueError, match="-1"):
        Ledger().add("a", up=-1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_ledger_survives_json_and_adds_up(messages):
    ledger = Ledger().measured("a", 9, 2)
    for client, down, up in messages:
        ledger = ledger.add(client, down=down, up=up)
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    assert ledger.total == sum(down + up for _, down, up in messages)
    assert sum(ledger.payloads.values()) == 2 * len(messages)


# ------------------------------------------------------------------------------------------------ console
class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_and_its_estimate():
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock)
    with console.progress(5, done=1) as bar:
        for seconds in (100, 10, 20):
            clock.now += seconds
            bar.advance("loss [red]1.5")
    # 100 s compiles: three rounds of it are left at first; then 10 s, then (10 + 20) / 2 s a round.
    assert out.getvalue().splitlines() == [
        "round 2/5  40% | 0:01:40 | 0:05:00 left | loss [red]1.5",
        "round 3/5  60% | 0:01:50 | 0:00:20 left | loss [red]1.5",
        "round 4/5  80% | 0:02:10 | 0:00:15 left | loss [red]1.5",
    ]


def test_live_progress_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with Console(out).progress(4) as bar:
        bar.advance("loss 1.5 " + "and much more text " * 9)
    last = out.getvalue()
    assert "\x1b[" in last and "1/4" in last and " 25 %" in last and "left" in last and "loss 1.5" in last


def _summary() -> dict:
    row = {"rank1": 0.7, "rank5": 1.0, "rank10": 1.0, "map": 0.5, "minp": 0.25, "density": 0.5}
    return {
        "clients": {"a [bold]name that is far too long for a table": row, "b": {**row, "map": None}},
        "mean": row,
        "after": {"clients": {}, "mean": {"map": 0.55}},
        "bytes": {
            "down": 1, "up": 2, "total": 12_345_678_901, "dense_total": 20_000_000_000,
            "per_client": {
                "a [bold]name that is far too long for a table": {"down": 12_345_600_000, "up": 4_000_000_000},
                "b": {"down": 0, "up": 200_000},
            },
        },
        "saving": 0.383,
    }


def test_table_fits_80_columns_and_crops_only_names(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    Console(out).table(_summary(), [Path("run/report.html")])
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert rows[0] == ["Client", *"Rank-1 Rank-5 Rank-10 mAP mINP Density MB down MB up".split()]
    assert rows[2][-8:] == ["70.0", "100.0", "100.0", "50.0", "25.0", "0.500", "12345.6", "4000.0"]
    assert "a [bold]name" in text and "…" in text
    assert rows[3] == ["b", "70.0", "100.0", "100.0", "-", "25.0", "0.500", "0.0", "0.2"]
    assert rows[4][-2:] == ["6172.8", "2000.1"]
    assert "mAP mean: 50.0 % before, 55.0 % after" in text
    assert "12345.7 MB; dense: 20000.0 MB; saving 38.3 %" in text
    assert "wrote run/report.html" in text


def test_table_tells_start_and_failures():
    out = io.StringIO()
    start = {"clients": {"b": {"map": 0.1}}, "mean": {"map": 0.4123}}
    failures = ["fewer than half of the images clustered at the end (0.41)", "mAP [red]31.0 % is no better"]
    Console(out).table({**_summary(), "start": start, "before_last_round": None, "failures": failures}, [Path("x")])
    lines = out.getvalue().splitlines()
    assert "mAP mean: 41.2 % at the start, 50.0 % at the end" in lines
    assert lines[-2:] == [f"failed: {text}" for text in failures]
    out = io.StringIO()
    Console(out).table({**_summary(), "start": start, "before_last_round": {"clients": {}, "mean": {"map": 0.45}}})
    assert "mAP mean: 41.2 % at the start, 45.0 % before the last round, 50.0 % at the end\n" in out.getvalue()


def test_table_of_a_supervised_run_is_as_before():
    outs = [io.StringIO(), io.StringIO()]
    empty = {"start": None, "before_last_round": None, "failures": [], "validation": None}
    for out, more in zip(outs, ({}, empty), strict=True):
        Console(out).table({**_summary(), **more})
    assert outs[0].getvalue() == outs[1].getvalue()
    assert "start" not in outs[0].getvalue() and "failed" not in outs[0].getvalue()


def test_table_of_a_run_that_sent_nothing():
    summary = {**_summary(), "after": None, "saving": None, "clients": {"b": {"rank1": 0.5}}, "mean": {"rank1": 0.5},
               "bytes": {"total": 0, "dense_total": 0, "per_client": {}}}
    out = io.StringIO()
    Console(out).table(summary)
    assert "saving" not in out.getvalue() and "before" not in out.getvalue() and "mINP" not in out.getvalue()
