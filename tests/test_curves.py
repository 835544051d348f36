"""Curves for other programs: what stands in the tables and event files of a run."""

import csv
import json
import sys

import pytest

from fedklpr_jax import config as settings
from fedklpr_jax import curves, train
from fedklpr_jax.console import Console
from fedklpr_jax.errors import InputError
from tests.federations import write_shapes

EVENTS = [
    {"event": "note", "text": "a start"},
    {"event": "eval", "round": 0, "stage": "before", "clients": {"a": {"map": 0.25}}, "mean": {"map": 0.25}},
    {"event": "round", "round": 0, "seconds": 2.0,
     "clients": {"a": {"loss": 1.5, "decision": "none", "clusters": [4, 3], "purity": [None, None]},
                 "b": {"loss": None, "bytes_up": 7}}},
    {"event": "eval", "round": 1, "stage": "after", "clients": {"a": {"map": 0.5}}, "mean": {"map": 0.5}},
]  # fmt: skip


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_hold_a_row_a_round_and_client(tmp_path):
    curves.write_csv(tmp_path, EVENTS)
    assert table(tmp_path / "rounds.csv") == [
        {"round": "1", "client": "a", "loss": "1.5", "decision": "none", "clusters": "3", "bytes_up": ""},
        {"round": "1", "client": "b", "loss": "", "decision": "", "clusters": "", "bytes_up": "7"},
    ]
    assert table(tmp_path / "evaluations.csv") == [
        {"round": "0", "stage": "before", "client": "a", "map": "0.25"},
        {"round": "0", "stage": "before", "client": "mean", "map": "0.25"},
        {"round": "1", "stage": "after", "client": "a", "map": "0.5"},
        {"round": "1", "stage": "after", "client": "mean", "map": "0.5"},
    ]


def shown(folder):
    """What TensorBoard shows: `{tag: {step: value}}`, later event files over earlier ones, purged steps gone."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                found = {tag: {s: v for s, v in line.items() if s < event.step} for tag, line in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_event_files_hold_every_number_and_those_of_a_run_that_goes_on_what_was_kept(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    first = curves.TensorBoard(tmp_path)
    for event in [*EVENTS, {"event": "round", "round": 1, "clients": {"a": {"loss": 9.0}}}]:
        first.write(event)
    first.close()
    lines = shown(tmp_path)
    assert lines["round/a/loss"] == {1: 1.5, 2: 9.0}
    assert lines["before/mean/map"] == {0: 0.25} and lines["after/a/map"] == {1: 0.5}
    assert {"round/a/clusters", "round/seconds", "round/b/bytes_up"} <= lines.keys()
    # The process was killed before the checkpoint of round 2, and the next one goes on after round 1.
    again = curves.TensorBoard(tmp_path, EVENTS)
    again.write({"event": "round", "round": 1, "clients": {"a": {"loss": 1.0}}})
    again.close()
    assert shown(tmp_path) == lines | {"round/a/loss": {1: 1.5, 2: 1.0}}


def test_a_run_writes_both(tmp_path):
    config = settings.default_config()
    config.method.name, config.task.name, config.model.arch = "fedavg", "classification", "cnn"
    config.data.source, config.data.root = "folder", write_shapes(tmp_path / "pictures")
    config.data.count, config.data.least, config.out = 2, 20, str(tmp_path / "run")
    config.rounds, config.epochs, config.eval.every, config.tensorboard = 2, 1, 1, True
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    summary = train.run(config, Console((tmp_path / "said").open("w")))
    rows = table(tmp_path / "run" / "evaluations.csv")
    last = [row for row in rows if (row["round"], row["stage"], row["client"]) == ("2", "before", "mean")]
    assert float(last[0]["accuracy"]) == summary["mean"]["accuracy"]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in logged if event["event"] == "round"]
    assert [float(row["loss"]) for row in table(tmp_path / "run" / "rounds.csv")] == [
        row["loss"] for event in rounds for row in event["clients"].values()
    ]
    lines = shown(tmp_path / "run" / "tensorboard")
    assert lines["round/c0/loss"] == pytest.approx({n: e["clients"]["c0"]["loss"] for n, e in enumerate(rounds, 1)})
    assert lines["before/mean/accuracy"][2] == pytest.approx(summary["mean"]["accuracy"])


def test_without_tensorboardx_the_run_ends_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = settings.default_config()
    config.tensorboard, config.out = True, str(tmp_path / "run")
    with pytest.raises(InputError, match=r"not installed; type: pip install 'fedklpr_jax\[tensorboard\]'"):
        train.run(config, Console((tmp_path / "said").open("w")))
    assert not (tmp_path / "run").exists()
