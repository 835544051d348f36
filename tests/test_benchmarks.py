"""The benchmarks run: their numbers are nobody's business here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import clustering, many_clients, server, step, wire
from benchmarks import round as benchmark
from benchmarks._common import timed_in_turn
from benchmarks.competitors._work import Work, save
from fedklpr_jax.simulation import participants

SCRIPTS = sorted(
    path.stem for path in (Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py") if path.stem[0] != "_"
)


def tables(text):
    """The Markdown tables in `text`: lists of rows, each a list of cells, the head first."""
    found = []
    for block in text.split("\n\n"):
        rows = [line.strip("|").split("|") for line in block.splitlines() if line.startswith("|")]
        if rows:
            found.append([[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= {"-", ":"}])
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_explains_itself(name, capsys):
    script = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m benchmarks.{name}" in shown and script.__doc__.splitlines()[0] in shown


def test_libraries_do_the_same_work(tmp_path):
    rng = np.random.default_rng(0)
    chosen = [participants(0, round_, 6, 0.5) for round_ in range(3)]
    work = Work(rng.normal(size=(40, 28, 28)).astype(np.float32), rng.integers(0, 10, 40), np.arange(40),
                np.array([0, 7, 14, 20, 27, 35, 40]), np.array(chosen), 2, 4, 0.05, 0.5)  # fmt: skip
    save(tmp_path / "work.npz", work)
    told = [many_clients.play(script, sys.executable, {}, tmp_path / "work.npz")
            for script in ("fedklpr_jax_rounds", "jax_loop")]  # fmt: skip
    assert all(len(one["seconds"]) == 3 and min(one["seconds"]) > 0 for one in told)
    # They draw first weights and batches on their own, so that the two move alike, not the same way.
    assert told[0]["moved"] == pytest.approx(told[1]["moved"], rel=0.3)
    with pytest.raises(RuntimeError, match="jax_loop: .*nowhere.npz"):
        many_clients.play("jax_loop", sys.executable, {}, tmp_path / "nowhere.npz")


def test_the_step_is_timed_against_its_floor_and_a_peer_that_fails_is_told():
    assert step.matmul_rate(64, 1) > 0
    assert step.operations("thin", 32, 16, 4) == pytest.approx(2 * step.operations("thin", 32, 16, 2), rel=0.1)
    assert step.ours("thin", "auto", 32, 16, 4)(2) > 0
    with pytest.raises(RuntimeError, match="pytorch_steps.py ended with status 1"):
        step.Peer(sys.executable, [[1, 1, 1, 1], False, 32, 16, 4, "default"])


def test_the_small_server_fills_both_tables(capsys):
    server.main(["--small"])
    step_table, threshold = tables(capsys.readouterr().out)
    (head, row), times = step_table, threshold[1:]
    assert len(row) == len(head) and float(row[-1]) > 0 and len(times) == 3
    assert all(float(cell) >= 0 for time in times for cell in time[1:])


def test_the_small_round_fills_both_tables(capsys):
    benchmark.main(["--small"])
    overhead, parts = tables(capsys.readouterr().out)
    assert [row[0] for row in overhead[1:]] == ["fedpav"]
    head, *rows = parts
    assert len(rows) == 11 and all(len(row) == len(head) for row in rows)
    # Only a difference may be negative, and none of the parts is as long as no time at all.
    timed = {row[0]: float(row[1]) for row in rows if row[0] != "difference of the two"}
    assert all(ms > 0 for ms in timed.values()), timed


def test_the_bare_steps_do_the_work_of_a_round():
    _, rounds = benchmark.make_rounds("fedpav", small=True)
    task = rounds.engine.task
    works = benchmark.round_work(rounds.engine, rounds.server, rounds.clients)
    trained = benchmark.run_steps(
        benchmark.bare_step(task), jax.device_put(task.arrays), works, jnp.float32(task.learning_rate(0, 0))
    )
    mail = benchmark.one_mail(rounds)
    start = jax.device_get(rounds.server.model)["params"]["trunk"]
    for training, upload in zip(trained, mail.uploads, strict=True):
        bare, engine, before = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (training.params["trunk"], upload.model["params"]["trunk"], start)
        )
        # Another batch, key or step count would set them apart by about as far as they moved.
        assert np.linalg.norm(bare - engine) < 0.02 * np.linalg.norm(engine - before)


def test_calls_are_timed_in_turn():
    seen = []

    def prepare(name):
        seen.append(f"prepare {name}")
        return lambda: seen.append(f"call {name}")

    seconds = timed_in_turn({"a": lambda: prepare("a"), "b": lambda: prepare("b")}, 2)
    assert seen == ["prepare a", "prepare b", "call a", "call b"] * 2
    assert [len(seconds[name]) for name in "ab"] == [2, 2]


def test_the_wire_benchmark_prints_its_tables(capsys):
    wire.main(["0.05"])
    sizes, changes = tables(capsys.readouterr().out)
    assert (len(sizes), len(changes)) == (1 + len(wire.SPARSITIES), 1 + len(wire.FLIPS))


def test_the_clustering_benchmark_finds_the_same_clusters_in_every_form(capsys):
    clustering.main(["--small"])
    ((head, *rows),) = tables(capsys.readouterr().out)
    assert [row[1] for row in rows] == list(clustering.FORMS) and all(len(row) == len(head) for row in rows)
    found = [(int(row[head.index("clusters")]), float(row[head.index("agreement")])) for row in rows]
    assert found == [(found[0][0], 1.0)] * 3 and found[0][0] > 1
