"""Kills that the other tests leave out: in the middle of a round, and while a checkpoint of the run is being written.

`test_cli.py` kills between the two, `test_checkpoint.py` a process that does nothing but save; the large form, with
moments drawn at random, is `python -m benchmarks.killtest`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import killtest
from fedklpr_jax import checkpoint
from tests.test_cli import ROUNDS, TINY

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla")))
    return [killtest.JOB[0], *TINY, f"--config.compilation_cache={cache}"]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """One device, and programs compiled in a hurry, as in `test_cli.py`, whose cache is shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="module")
def whole(settings, environment, tmp_path_factory) -> Path:
    """The directory of a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    played = killtest.play(directory, settings)
    assert played.where == "" and 0 < played.ready < played.seconds
    return directory


def in_round_2() -> killtest.Moment:
    """A tenth of a second behind the first checkpoint."""
    seen: list[float] = []

    def come(directory: Path, said: str, seconds: float) -> bool:
        if (directory / "checkpoints" / "step-00000001.json").exists():
            seen.append(seconds)
        return bool(seen) and seconds > seen[0] + 0.1

    return come


def writing_checkpoint_3(directory: Path, said: str, seconds: float) -> bool:
    """Its bytes are on their way, its record is not there."""
    folder = directory / "checkpoints"
    return any(folder.glob("step-00000003.?*")) and not (folder / "step-00000003.json").exists()


def test_killed_in_a_round_and_while_writing_a_checkpoint_a_run_ends_the_same(settings, whole, tmp_path):
    directory = tmp_path / "run"
    assert killtest.play(directory, settings, in_round_2()).where == "in round 2"
    assert killtest.play(directory, settings, writing_checkpoint_3).where == "writing checkpoint 3"
    assert checkpoint.latest(directory / "checkpoints") == 2
    assert killtest.play(directory, settings).where == ""
    assert killtest.differences(whole, directory) == []


def test_what_differs_is_named(whole, tmp_path):
    def changed(name: str) -> Path:
        shutil.copytree(whole, tmp_path / name)
        return tmp_path / name

    leaf = changed("leaf")
    folder = leaf / "checkpoints"
    state, meta = checkpoint.leaves(folder, ROUNDS), checkpoint.metas(folder)[ROUNDS]
    path = next(path for path, array in state.items() if array.dtype == np.float32 and array.size)
    state[path].reshape(-1)[:1].view(np.uint32)[...] ^= 1
    checkpoint.save(folder, ROUNDS, state, meta)
    assert killtest.differences(whole, leaf) == [path]

    ledger = changed("ledger")
    state = checkpoint.leaves(whole / "checkpoints", ROUNDS)
    checkpoint.save(ledger / "checkpoints", ROUNDS, state, meta | {"ledger": {}})
    assert killtest.differences(whole, ledger) == ["what the checkpoint says beside its leaves"]

    files = changed("files")
    summary = json.loads((files / "summary.json").read_text())
    (files / "summary.json").write_text(json.dumps(summary | {"seconds": 1, "seed": 1}))
    log = (files / "metrics.jsonl").read_text().replace('"round": 2', '"round": 9')
    (files / "metrics.jsonl").write_text(log)
    assert killtest.differences(whole, files) == ["summary.json", "metrics.jsonl"]

    shorter = changed("shorter")
    (shorter / "checkpoints" / f"step-{ROUNDS:08d}.json").unlink()
    assert killtest.differences(whole, shorter) == [f"last checkpoint {ROUNDS} and {ROUNDS - 1}"]


@pytest.mark.short
def test_places_are_told_from_what_was_said_and_what_is_on_disk(tmp_path):
    folder, log = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    ready = f"compiling; {killtest.READY} here\n"
    assert killtest.where(tmp_path, "reading the data") == "in the start-up"
    assert killtest.where(tmp_path, ready) == "before round 1"
    log.write_text('{"event": "eval", "round": 0}\n')
    assert killtest.where(tmp_path, ready) == "in round 1"
    log.write_text(log.read_text() + '{"event": "round", "round": 0}\n{"event": "rou')
    assert killtest.where(tmp_path, ready) == "between round 1 and its checkpoint"
    (folder / "step-00000001.0123456789ab").mkdir(parents=True)
    assert killtest.where(tmp_path, ready) == "writing checkpoint 1"
    checkpoint.save(folder, 1, {"w": np.zeros(1)}, {})
    assert killtest.where(tmp_path, ready) == "in round 2"
    (folder / "step-00000000.0123456789ab").mkdir()
    assert killtest.where(tmp_path, ready) == "dropping checkpoint 0"
    assert killtest.where(tmp_path, f"{ready}{killtest.CONCLUDING} local") == "in the conclusion"
    (tmp_path / "report.html").touch()
    assert killtest.where(tmp_path, ready) == "after the report"
