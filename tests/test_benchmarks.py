"""The benchmarks run: their numbers are nobody's business here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import clustering, fedreid, many_clients, maps, reranking, scaling, server, step, wire
from benchmarks import round as benchmark
from benchmarks._common import forget_peak, process_memory, slope, timed_in_turn
from benchmarks._peer import Peer
from benchmarks.competitors import numpy_reranking
from benchmarks.competitors._work import ReIDWork, Work, load, save
from fedklpr_jax.client_maps import CLIENT_MAPS
from fedklpr_jax.evaluation import euclidean_distances, rerank
from fedklpr_jax.models import make_spec
from fedklpr_jax.simulation import participants

SCRIPTS = sorted(
    path.stem for path in (Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py") if path.stem[0] != "_"
)
TORCH = os.environ.get("TORCH") or (sys.executable if importlib.util.find_spec("torch") else "")
needs_torch = pytest.mark.skipif(not TORCH, reason="no PyTorch in this Python; TORCH=PYTHON names one that has it")


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
    assert step.matmul_rate(64, repetitions=1) > 0
    assert step.operations("thin", 32, 16, 4) == pytest.approx(2 * step.operations("thin", 32, 16, 2), rel=0.1)
    assert step.ours("thin", "auto", 32, 16, 4)(2) > 0 and step.ours("thin", "auto", 32, 16, 4, "bfloat16")(1) > 0
    with pytest.raises(RuntimeError, match="pytorch_steps.py ended with status 1"):
        step.Steps(sys.executable, [[1, 1, 1, 1], False, 32, 16, 4, "default", "float32"])


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


def test_the_reranking_that_ours_is_timed_against_gives_the_same_numbers():
    features = clustering.synthetic_features(300, 32)
    matrices = [euclidean_distances(a, b) for a, b in
                ((features[:60], features[60:]), (features[:60], features[:60]), (features[60:], features[60:]))]
    for settings in ((20, 6, 0.3), (7, 1, 0.0)):
        theirs = numpy_reranking.rerank(*matrices, *settings)
        ours = rerank(*matrices, k1=settings[0], k2=settings[1], lambda_value=settings[2])
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.ptp(theirs) > 0.5


def test_the_small_reranking_fills_its_table(capsys):
    # Enough for the dense form's arrays at the first size alone.
    reranking.main(["--small", "--memory", "0.0003"])
    ((head, *rows),) = tables(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["100", "ours"], ["100", "dense NumPy"], ["200", "ours"],
                                         ["200", "dense NumPy: about 0.0 GiB, more than 0.0003"]]  # fmt: skip
    assert all(len(row) == len(head) for row in rows)
    assert all(float(row[head.index("difference")]) < 1e-5 for row in rows[:3])
    assert [bool(row[head.index("growth")]) for row in rows[:3]] == [False, False, True]


def test_the_small_maps_fill_both_tables(capsys):
    maps.main(["--small", "--batch", "4", "--steps", "1", "--longest", "2", "--chunk", "2"])
    (head, row), (_, *choices) = tables(capsys.readouterr().out)
    names = [*CLIENT_MAPS, "vmap, 2 at once"]
    assert head[2:-1] == [*names, maps.SUMMED] and all(float(cell) > 0 for cell in row[2:-1])
    assert [choice[1] for choice in choices] == names
    over = {name: float(mean) for _, name, mean, _ in choices}
    assert over[row[-1]] == 1 == min(over.values())


def test_the_small_scaling_fills_both_tables_and_draws(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", images=rng.integers(0, 256, (80, 28, 28), np.uint8), labels=np.arange(80) % 10)
    given = ["--root", str(tmp_path), "--small", "--methods", "fedper"]
    scaling.main([*given, "--out", str(tmp_path / "out.png")])
    (head, *rows), (memory_head, memory) = tables(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["clients", "clients", "clients: slopes", "parameters", "parameters",
                                        "parameters: slopes"]  # fmt: skip
    assert all(len(row) == len(head) for row in rows)
    assert [row[1] for row in rows[:2]] == ["4", "8"] and {row[-1] for row in rows[2::3]} <= {"yes", "no"}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    told = dict(zip(memory_head, memory, strict=True))
    assert [name for name in told if name.startswith("round")] == [f"round {n}" for n in (1, 2, 3, 4)]
    assert float(told["on disk"]) > 0 and told["flat"] in ("yes", "no") and float(told["device, last"]) > 0


def test_memory_is_read_and_its_peak_forgotten():
    held = np.ones(1 << 23)
    assert process_memory("VmHWM") >= process_memory("VmRSS") > held.nbytes
    del held
    before = forget_peak()
    if Path("/proc/self/clear_refs").exists():
        assert process_memory("VmHWM") < before + (1 << 25)


def test_a_slope_is_the_exponent():
    assert slope([1, 10, 100], [2, 200, 20000]) == pytest.approx(2)
    assert np.isnan(slope([1], [2]))


def test_the_small_fedreid_fills_its_table(capsys):
    fedreid.main(["--small", "--rounds", "2"])
    ((head, row),) = tables(capsys.readouterr().out)
    assert len(row) == len(head) and row[:2] == ["small", "ours"]
    first, timed = map(float, row[2:4]), map(float, row[4:-1:2])
    assert min(*first, *timed) > 0


def test_fedreid_takes_real_sites_or_the_small_ones(tmp_path, capsys):
    for given, said in (([], "--root DIR or --small"), (["--root", str(tmp_path), "--arch", "thin"], "--arch takes"),
                        (["--root", str(tmp_path / "nowhere")], "nowhere: no such folder")):  # fmt: skip
        with pytest.raises(SystemExit):
            fedreid.main(given)
        assert said in capsys.readouterr().err


def test_values_are_listed_as_pytorch_lists_them():
    norm = {"scale": np.full(2, 1.0), "bias": np.full(2, 2.0)}
    kernel = np.arange(6.0).reshape(1, 1, 3, 2)
    params = {"bn1": norm, "conv1": {"kernel": kernel}, "embedding": {"bias": np.full(2, 5.0), "kernel": kernel[0, 0]},
              "layer1_0": {"downsample_conv": {"kernel": kernel + 10}, "conv1": {"kernel": kernel + 20}}}  # fmt: skip
    stats = {"bn1": {"mean": np.full(2, 3.0), "var": np.full(2, 4.0)}}
    values = fedreid.torch_values(params, stats)
    assert [value.ravel()[0] for value in values] == [0, 1, 2, 3, 4, 20, 10, 0, 5]
    assert values[0].shape == (2, 3, 1, 1) and values[-2].tolist() == [[0, 2, 4], [1, 3, 5]]


def trained(spec):
    """Variables of a network as after some training: no two norms are alike."""
    rng = np.random.default_rng(0)
    found = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) if leaf.ndim == 1 else leaf,
        jax.jit(spec.init, static_argnums=(1, 2))(jax.random.key(0), 32, 16),
    )
    return {kind: {"trunk": values} for kind, values in found.items()}


def test_the_work_of_fedreid_is_read_as_it_was_written(tmp_path):
    federation, spec = fedreid.make_federation("small", None, (0, 0), 2)
    work = fedreid.make_work(federation, spec, trained(spec))
    save(tmp_path / "work.npz", work)
    for name, value, found in zip(ReIDWork._fields, work, load(tmp_path / "work.npz", ReIDWork), strict=True):
        assert np.array_equal(value, found), name
    # Rows of the second client's pictures, whose labels count from 0 again.
    first, second = np.split(work.batches, [work.steps[0]], axis=1)
    assert len(first) == 2 and first.max() < second.min()
    assert [work.labels[rows].max() + 1 for rows in (first, second)] == work.classes.tolist()
    assert work.tests.sum() == len(work.test_pixels) == len(work.test_ids) == len(work.test_cams)
    # What PyTorch's side takes for granted.
    config = federation.config
    assert (config.data.erase, config.task.smoothing, config.task.triplet, config.task.identity) == (0, 0, 0, 1)
    assert (config.epochs, config.optimizer.name, config.optimizer.nesterov, config.method.reid.cdw) == (
        1, "sgd", True, True
    )  # fmt: skip


@needs_torch
@pytest.mark.parametrize("network", fedreid.NETWORKS)
def test_pytorch_has_the_same_network(network, tmp_path):
    federation, _ = fedreid.make_federation("small", None, (0, 0), 1)
    spec = make_spec(network, embedding_dim=16)
    work = fedreid.make_work(federation, spec, trained(spec))
    save(tmp_path / "work.npz", work)
    peer = Peer(TORCH, "pytorch_fedreid", str(tmp_path / "work.npz"))
    np.testing.assert_allclose(peer.ask("features")["told"], fedreid.features_of(federation, spec, trained(spec)),
                               atol=1e-4)  # fmt: skip
    peer.close()
    # One value fewer is another network, and the process says so by ending.
    save(tmp_path / "work.npz", work._replace(start=work.start[:-1]))
    with pytest.raises(RuntimeError, match="pytorch_fedreid.py ended with status 1"):
        Peer(TORCH, "pytorch_fedreid", str(tmp_path / "work.npz")).ask("features")


@needs_torch
def test_pytorch_tests_the_same_and_fills_its_rows(tmp_path, capsys):
    federation, spec = fedreid.make_federation("small", None, (0, 0), 1)
    ours = fedreid.Ours(federation, spec)
    save(tmp_path / "work.npz", fedreid.make_work(federation, spec, ours.variables()))
    peer = Peer(TORCH, "pytorch_fedreid", str(tmp_path / "work.npz"))
    assert peer.ask("evaluate")["told"] == pytest.approx(ours.ask("evaluate")["told"], abs=1e-3)
    peer.close()
    fedreid.main(["--small", "--rounds", "1", "--python", TORCH])
    ((head, *rows),) = tables(capsys.readouterr().out)
    assert [row[1] for row in rows] == ["ours", "PyTorch", "ours / PyTorch"]
    assert all(len(row) == len(head) and float(row[4]) > 0 for row in rows)
