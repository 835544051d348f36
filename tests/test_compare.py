"""The comparison: tables, CSV and figures of results made by hand, and the command on two tiny methods."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import _comparison as shown
from benchmarks import _comparison_figures as figures
from benchmarks import _comparison_plan as planned
from benchmarks._comparison_progress import seconds_left
from benchmarks._runs import Job, execute, markers
from experiments import compare
from fedklpr_jax import checkpoint
from fedklpr_jax.errors import InputError
from fedklpr_jax.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
TINY = (
    "--config.task.name=supervised", "--config.data.clients=harbour", "--config.data.height=32",
    "--config.data.width=16", "--config.rounds=2", "--config.eval.every=1", "--config.epochs=1",
    "--config.task.people=4", "--config.task.shots=2", f"--config.compilation_cache={CACHE}",
)  # fmt: skip
PAGE = f"above\n{markers('comparison')[0]}\nold\n{markers('comparison')[1]}\nbelow\n"


def made(method: str, seed: int, rows: dict[str, float], megabytes: float, **more: Any) -> shown.Result:
    """A re-ID run: `rows` are mAP by client; "after" is 0.1 more, the start 0.2; Rank-1 is mAP + 0.05."""

    def stage(add: float) -> dict[str, Any]:
        clients = {name: {"map": v + add, "rank1": v + add + 0.05, "density": 0.5} for name, v in rows.items()}
        means = {key: sum(row[key] for row in clients.values()) / len(clients) for key in ("map", "rank1", "density")}
        return {"clients": clients, "mean": means}

    sent = {"down": megabytes * 6e5, "up": megabytes * 4e5, "total": megabytes * 1e6}
    each = {name: {way: sent[way] / len(rows) for way in ("down", "up")} for name in rows}
    summary = {
        **stage(0), "after": stage(0.1), "start": {"clients": {}, "mean": {"map": 0.2}}, "rounds": 10,
        "bytes": {**sent, "per_client": each}, "saving": None, "seconds": 90.0,
        "average_precisions": {name: [v, v, None] for name, v in rows.items()},
        "average_precisions_after": {name: [v + 0.1, v + 0.1, None] for name, v in rows.items()},
    }  # fmt: skip
    return shown.Result(method, seed, Path(f"out/set/{method}-{seed}"), summary | more, {0: {"map": 0.2}})


def classified(method: str, seed: int, accuracy: float, best: float | None = None) -> shown.Result:
    """A classification run as summaries of that task are: pooled is 0.01 more, the best test `best`."""

    def stage(value: float) -> dict[str, Any]:
        return {"clients": {"a": {"accuracy": value}}, "mean": {"accuracy": value, "pooled": value + 0.01}}

    summary = {**stage(accuracy), "after": stage(accuracy + 0.02), "bytes": {"total": 5e6}, "seconds": 60.0}
    if best is not None:
        summary["best"] = {"before": {"pooled": best, "accuracy": 1.0}, "after": {"pooled": best + 0.02}}
    return shown.Result(method, seed, Path(f"out/set/{method}-{seed}"), summary, {})


def cells(text: str) -> dict[str, dict[str, str]]:
    """The lines of the one table in `text` by their first cell, each by column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


@pytest.fixture
def results() -> dict[str, list[shown.Result]]:
    """mAP 0.5 and 0.6 of "ours" at 10 and 12 MB; FedAvg 0.4 and 0.4 at 20 MB."""
    fedavg = [made("fedavg", seed, {"a": 0.3, "b": 0.5}, 20) for seed in (0, 1)]
    return {
        "ours": [made("ours", 0, {"a": 0.4, "b": 0.6}, 10), made("ours", 1, {"a": 0.5, "b": 0.7}, 12)],
        "fedavg": fedavg,
        "fedavg + fine-tuning": [tuned for run in fedavg if (tuned := shown.fine_tuned(run))],
    }


def test_the_table_of_results_made_by_hand(results):
    rows = cells(shown.table(results, (0, 1)))
    assert rows["ours"] == {
        "method": "ours", "seeds": "2", "mAP start": "20.0 ± 0.0", "Rank-1": "60.0 ± 7.1", "mAP": "55.0 ± 7.1",
        "Rank-1 after": "70.0 ± 7.1", "mAP after": "65.0 ± 7.1", "density": "0.50 ± 0.00", "MB": "11.0 ± 1.4",
        "saving %": "-", "minutes": "1.5 ± 0.0",
    }  # fmt: skip
    tuned = rows["fedavg + fine-tuning"]
    assert (tuned["mAP"], tuned["mAP after"], tuned["MB"]) == (rows["fedavg"]["mAP after"], "-", "20.0 ± 0.0")


def test_what_is_missing_is_named(results):
    text = shown.table(results | {"ours": results["ours"][1:], "late": []}, (0, 1))
    assert cells(text)["ours"]["seeds"] == "1 of 2" and "late" not in cells(text)
    assert text.endswith("Not finished (seeds): ours (0), late (0, 1).")


def test_classification_has_pooled_columns_and_the_maximum_over_tests():
    runs = {"old": [classified("old", 0, 0.8)], "new": [classified("new", 0, 0.9, best=0.95)]}
    rows = cells(shown.table(runs, (0,)))
    assert rows["new"]["Accuracy"] == "90.0" and rows["new"]["Accuracy (pooled)"] == "91.0"
    assert rows["new"]["Accuracy after"] == "92.0" and rows["new"]["Accuracy (pooled) after"] == "93.0"
    assert rows["new"]["Accuracy (pooled), max over tests"] == "95.0"
    assert rows["new"]["Accuracy (pooled) after, max over tests"] == "97.0"
    assert "Accuracy, max over tests" not in rows["new"]
    assert rows["old"]["Accuracy (pooled), max over tests"] == rows["old"]["density"] == "-"
    tuned = shown.fine_tuned(runs["new"][0])
    assert tuned is not None
    row = cells(shown.table({"tuned": [tuned]}, (0,)))["tuned"]
    assert (row["Accuracy (pooled)"], row["Accuracy (pooled), max over tests"]) == ("93.0", "97.0")


def test_methods_are_paired_by_seed(results):
    rows = cells(shown.against_table(results, "fedavg"))
    assert list(rows) == ["ours", "fedavg + fine-tuning"]
    # +10 and +20 points; the ratio is 0.55 / 0.4 of queries that all have their client's mean.
    assert rows["ours"]["mAP difference"] == rows["ours"]["mAP difference after"] == "+15.0 ± 7.1"
    assert rows["ours"]["mAP ratio (95 % interval)"] == "1.375 (1.375 to 1.375)"
    assert rows["ours"]["mAP ratio after (95 % interval)"] == "1.300 (1.300 to 1.300)"
    assert rows["ours"]["fewer bytes % (by seed)"] == "45.0 (50.0, 40.0)"
    tuned = rows["fedavg + fine-tuning"]
    assert tuned["mAP difference"] == "+10.0 ± 0.0" and tuned["mAP difference after"] == "-"
    assert tuned["fewer bytes % (by seed)"] == "0.0 (0.0, 0.0)"
    # Other clients make no pairs of queries, and another seed no pair of runs.
    other = {"fedavg": results["fedavg"], "x": [made("x", 1, {"c": 0.5}, 0)], "y": [made("y", 7, {"a": 0.5}, 0)]}
    rows = cells(shown.against_table(other, "fedavg"))
    assert list(rows) == ["x"] and rows["x"]["mAP ratio (95 % interval)"] == "-"
    assert shown.against_table({"a": [], "b": results["ours"]}, "a") == ""


def test_sites_that_nobody_trained_at_have_a_table_over_all_data_sets(results):
    def unseen(**rows: float) -> dict[str, Any]:
        return {"unseen": {"clients": {name: {"map": v, "rank1": v + 0.1} for name, v in rows.items()}, "mean": {}}}

    assert shown.unseen_table({"set": results}) == ""
    one = {"m": [made("m", 0, {"a": 0.5}, 1, **unseen(ward=0.3)), made("m", 1, {"a": 0.5}, 1, **unseen(ward=0.5))]}
    two = {"m": [made("m", 0, {"a": 0.5}, 1, **unseen(viper=0.2))], "k": [made("k", 0, {"a": 0.5}, 1)]}
    rows = cells(shown.unseen_table({"one": one, "two": two}))
    assert rows == {"m": {
        "unseen sites": "m", "ward (one) mAP": "40.0 ± 14.1", "ward (one) Rank-1": "50.0 ± 14.1",
        "viper (two) mAP": "20.0", "viper (two) Rank-1": "30.0",
    }}  # fmt: skip


def test_the_csv_holds_every_client_and_the_mean(results):
    site = made("ours", 0, {"a": 0.4}, 10, unseen={"clients": {"x, \"y\"": {"map": 0.25}}, "mean": {}})
    text = shown.csv_text({"set": results, "other": {"ours": [site]}}, Path("out"))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 6 * 3 + 3
    client = next(row for row in rows if (row["method"], row["seed"], row["client"]) == ("ours", "1", "b"))
    assert (client["kind"], client["run"]) == ("client", "set/ours-1")
    numbers = ("before_map", "after_map", "before_density", "bytes_down", "bytes_up", "bytes_total")
    assert [float(client[key]) for key in numbers] == pytest.approx([0.7, 0.8, 0.5, 3.6e6, 2.4e6, 6e6])
    average = next(row for row in rows if row["kind"] == "mean" and row["method"] == "fedavg + fine-tuning")
    assert float(average["before_map"]) == pytest.approx(0.5) and average["after_map"] == ""
    assert (float(average["bytes_total"]), float(average["seconds"])) == (20e6, 90.0)
    assert (rows[-1]["kind"], rows[-1]["client"], rows[-1]["before_map"]) == ("unseen", 'x, "y"', "0.25")
    assert "before_accuracy" not in rows[0]


def test_the_front_holds_what_nothing_beats():
    points = {"cheap": (0.0, 0.3), "worse": (1.0, 0.2), "middle": (1.0, 0.5), "twin": (1.0, 0.5), "best": (9.0, 0.6)}
    assert figures.pareto_front(points) == ["cheap", "middle", "twin", "best"]
    assert figures.pareto_front({"dear": (2.0, 0.5), "cheap": (1.0, 0.5)}) == ["cheap"]


def test_curves_meet_at_the_rounds_that_all_seeds_have():
    runs = [made("m", seed, {"a": 0.5}, 1) for seed in (0, 1)]
    ends = zip(runs, (4, 8), strict=True)
    runs = [replace(run, curve={0: {"map": 0.1}, end: {"map": 0.5}}) for run, end in ends]
    rounds, values = figures._curves(runs, "map")
    assert rounds.tolist() == [0] and values.tolist() == [[10.0], [10.0]]


def test_figures_grow_with_methods_and_clients_and_are_none_without_results(results):
    many = {f"m{i}": [made(f"m{i}", 0, {f"client {k}": 0.5 for k in range(30)}, i)] for i in range(18)}
    for figure in (figures.front_figure, figures.rounds_figure, figures.clients_figure):
        assert figure({"m": []}, "title") is None
        sizes = []
        for runs in (results, many):
            with Image.open(io.BytesIO(figure(runs, "title") or b"")) as picture:
                assert picture.format == "PNG" and len(picture.getcolors(1 << 22)) > 10
                sizes.append(picture.height)
        assert sizes[1] > sizes[0]


def test_the_time_left_knows_the_pace_of_each_method():
    def run(method: str, seed: int) -> planned.Run:
        return planned.Run("set", method, seed, Job(f"{method} {seed}", Path(f"{method}-{seed}"), ()), {})

    pace = {run("a", 0): 10.0, run("a", 1): 14.0, run("b", 0): 2.0}
    # 3 rounds of 12 s, 5 of 2 s, and 2 at the mean of the two methods, 7 s; then two at a time.
    left = {run("a", 2): 3, run("b", 1): 5, run("c", 0): 2}
    assert seconds_left(left, pace, workers=1) == 60 and seconds_left(left, pace, workers=2) == 30
    assert seconds_left({run("a", 2): 3}, pace, workers=4) == 36
    assert seconds_left(left, {}, workers=1) is None


def test_a_data_set_is_a_name_and_settings():
    assert planned.data_sets([]) == {"default": ()}
    given = ["plain", "real: --config.data.root='a b' --config.rounds=3"]
    assert planned.data_sets(given) == {"plain": (), "real": ("--config.data.root=a b", "--config.rounds=3")}


def test_every_run_has_its_settings_and_fedavg_is_added(tmp_path, capsys):
    own = tmp_path / "fedpav_wide.py"
    own.write_text((ROOT / "experiments" / "fedpav.py").read_text().replace(
        "    return config", "    config.model.embedding = 512\n    config.method.prox.mu = 0.5\n    return config"
    ))
    data = ["one", "two: --config.data.seed=7{seed} --config.rounds=9"]
    plan = planned.make_plan(tmp_path, f"fedpav,{own}", "0,3", data, ["--config.rounds=5"])
    assert capsys.readouterr().err == "fedavg is added: FedAvg + fine-tuning belongs to every comparison\n"
    assert plan.methods == ["fedpav", "fedpav_wide", "fedavg"] and len(plan.runs) == 12
    assert [run.seed for run in plan.runs] == [0] * 6 + [3] * 6
    last = plan.runs[-1]
    settings = [last.settings[path] for path in ("seed", "data.seed", "rounds", "method.name")]
    assert settings == [3, 73, 9, "fedavg"] and last.job.directory == tmp_path / "two" / "fedavg-3"
    assert plan.runs[0].settings["rounds"] == 5
    assert planned.differences(plan.runs[:3]) == {"fedpav_wide": {"model.embedding": 512}}
    planned.make_plan(tmp_path, "fedavg", "0", [], [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--methods", ""], "--methods: empty; give some of "),
        (["--methods", "fedavg,nope"], "--methods: no configuration 'nope'; give paths, or names of "),
        (["--methods", "run"], "--methods: no configuration 'run'"),
        (["--methods", "absent/fedavg.py"], "no configuration 'absent/fedavg.py'"),
        (["--seeds", "0,x"], "--seeds: '0,x' is not allowed"),
        (["--seeds", "1,01"], "--seeds: '1,01' is not allowed"),
        (["--data", ": --config.rounds=1"], "has no name"),
        (["--data", "a/b"], "has no name"),
        (["--data", "real: rounds=1"], "--data real: 'rounds=1' is no setting"),
        (["--data", "real: --config.data.root='x"], "--data real: \"--config.data.root='x\" cannot be read"),
        (["--data", "a", "--data", "a"], "'a' is there twice"),
        (["--data", "real: --config.nosuch=1"], "--config.nosuch: there is no such setting"),
        (["--against", "fedprox"], "--against: 'fedprox' is not among the methods fedpav, fedavg"),
        (["--part", "0/2"], "is no part"),
        (["--workers", "0"], "--workers: 0 is not allowed"),
        (["--write", "absent.md"], "absent.md must hold"),
        (["--", "--config.rounds=0"], "config.rounds: 0 is not allowed"),
        (["--", "--config.rounds=x"], "rounds"),
        (["--", "--config.method.name=fedavg"], "after --: '--config.method.name=fedavg' is not allowed; --methods"),
        (["--", "--config.out=x"], "is not allowed; --out says it"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, given, words):
    methods = [] if "--methods" in given else ["--methods", "fedpav,fedavg"]
    assert compare.main(["--out", str(tmp_path / "runs"), *methods, *given]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compare.main(["--out", str(tmp_path / "file" / "runs"), "--methods", "fedavg", "--seeds", "0"]) == 2
    assert "cannot be made" in capsys.readouterr().err


def command(out: Path, *given: str) -> list[str]:
    """The command of the tests on real runs, as its `main` takes it."""
    return ["--out", str(out), "--methods", "fedpav", "--seeds", "0", *given, "--", *TINY]


@pytest.fixture(scope="module")
def one_device():
    """The command's processes see one device, whatever the suite's own see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        yield


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, one_device) -> tuple[Path, str, int]:
    """A comparison that was stopped in its first run: its folder, what it said, and the rounds that were on disk."""
    out = tmp_path_factory.mktemp("comparison") / "runs"
    first = out / "default" / "fedpav-0"
    script = str(ROOT / "experiments" / "compare.py")
    with subprocess.Popen([sys.executable, script, *command(out)], stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while checkpoint.latest(first / "checkpoints") is None and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    rounds = sum(event["event"] == "round" for event in read_metrics(first / "metrics.jsonl"))
    return out, said, rounds


@pytest.fixture(scope="module")
def compared(interrupted) -> Path:
    """The folder of that comparison, gone on with to its end, on a page as well."""
    out = interrupted[0]
    page = out / "page.md"
    page.write_text(PAGE)
    assert compare.main(command(out, "--workers", "2", "--against", "fedavg", "--write", str(page))) == 0
    return out


def test_an_interrupted_comparison_goes_on(interrupted, compared):
    out, said, rounds = interrupted
    assert said.splitlines()[0].startswith("fedavg is added")
    assert "default: fedpav, seed 0: 0/2 rounds done" in said
    assert said.endswith("interrupted: the same command goes on from here\n")
    log = (out / "default" / "fedpav-0.log").read_text()
    assert rounds >= 1 and "continuing after round" in log
    events = read_metrics(out / "default" / "fedpav-0" / "metrics.jsonl")
    assert [event["round"] for event in events if event["event"] == "round"] == [0, 1]


def test_the_tables_of_real_runs(compared):
    text = (compared / "comparison.md").read_text()
    head, paired = text.split("Paired by seed")
    rows, runs = cells(head), compared / "default"
    assert list(rows) == ["fedpav", "fedavg", "fedavg + fine-tuning"]
    summary = json.loads((runs / "fedavg-0" / "summary.json").read_text())
    assert rows["fedavg + fine-tuning"]["mAP"] == f"{100 * summary['after']['mean']['map']:.1f}"
    assert rows["fedavg"]["MB"] == f"{summary['bytes']['total'] / 1e6:.1f}" != "0.0"
    assert list(cells(paired)) == ["fedpav", "fedavg + fine-tuning"]
    for kind in compare.FIGURES:
        assert f"(default-{kind}.png)" in text
        with Image.open(compared / f"default-{kind}.png") as picture:
            assert picture.format == "PNG"
    page = (compared / "page.md").read_text()
    assert page.startswith(PAGE.split("old")[0]) and page.endswith(PAGE.split("old")[1])
    assert "| fedpav | 1 |" in page and ".png" not in page
    with (compared / "comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["seed"], line["client"]) for line in lines[:2]] == [
        ("fedpav", "0", "harbour"), ("fedpav", "0", "")
    ]  # fmt: skip
    assert float(lines[0]["before_map"]) == float(lines[1]["before_map"]) and len(lines) == 6


def test_finished_runs_are_read_and_failing_ones_told(compared, capsys):
    # The other data set fails at once; what is finished is shown all the same.
    data = ("--data", "default", "--data", "bad: --config.data.clients=nowhere")
    assert compare.main(command(compared, "--methods", "fedavg", *data)) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == "bad: fedavg, seed 0: 0/2 rounds done"
    assert said.err.splitlines()[1].startswith("bad: fedavg, seed 0: error: config.data.clients: 'nowhere'")
    assert said.err.endswith("not finished: 1 of 2 runs; the same command tries them again\n")
    assert "| fedavg | 1 |" in said.out and "Not finished (seeds): fedavg (0)" in said.out
    # A run with other settings is not taken for one of this comparison.
    assert compare.main([*command(compared), "--config.rounds=3"]) == 2
    assert "fedpav-0: holds a run with --config.rounds=2, not 3" in capsys.readouterr().err


def test_a_run_that_another_command_is_at_is_left_alone(one_device, tmp_path):
    job = Job("slow", tmp_path / "set" / "fedpav-0", (f"--config={ROOT / 'experiments' / 'fedpav.py'}", *TINY))
    first = execute([job], 1)
    assert next(first).kind == "started"
    (news,) = execute([job], 1)
    assert (news.kind, news.problem) == ("ended", "slow: another command is at it")
    first.close()


def test_a_folder_with_unreadable_settings_is_refused(tmp_path):
    directory = tmp_path / "default" / "fedavg-0"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{")
    with pytest.raises(InputError, match="no readable settings"):
        planned.make_plan(tmp_path, "fedavg", "0", [], [])
