"""The real command from end to end: what it writes, kills and Ctrl-C, resuming, and every bad input.

One run is made without a break; most tests start another one and compare. Compiling takes most of their time.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fedklpr_jax import assembly, checkpoint, cli, exchange, train, weights
from fedklpr_jax.config import resolved
from fedklpr_jax.console import Console
from fedklpr_jax.data import synthetic
from fedklpr_jax.data.folder import SPLITS
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientState, ServerState
from fedklpr_jax.metrics import read_metrics
from fedklpr_jax.models.spec import make_spec
from fedklpr_jax.trees import parameter_count

ROOT = Path(__file__).resolve().parents[1]
CONFIG = f"--config={ROOT}/experiments/fedklpr.py"
CLIENTS = ("harbour", "arena")
ROUNDS = 4
TINY = (
    "--config.data.clients=" + ",".join(CLIENTS), "--config.data.height=32", "--config.data.width=16",
    "--config.task.name=supervised", "--config.model.arch=thin", f"--config.rounds={ROUNDS}", "--config.epochs=1",
    "--config.eval.every=3",
    "--config.method.prune.step=0.2", "--config.method.prune.target=0.3", "--config.method.crr.drop=1",
    "--config.method.crr.recover=1",
)  # fmt: skip


def settings(out: Path, *more: str) -> list[str]:
    """Arguments of a tiny run; a later setting overrides an earlier one."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(out.parent / "xla"))
    return [CONFIG, *TINY, f"--config.out={out}", f"--config.compilation_cache={cache}", *more]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command in a process of its own, on one device."""
    # A process that ignores SIGINT (a job in the background) hands that on to its children; a handler it does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    # The runs are short and their programs large.
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "run.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(arguments: list[str]) -> str:
    """Runs the command to its end, which must be a good one; returns what it said."""
    out, err = start(arguments).communicate(timeout=600)
    assert "Traceback" not in err, err
    assert "report.html" in out, out + err
    return out


def stop(process: subprocess.Popen[str], number: signal.Signals, when: Callable[[], bool]) -> tuple[int, str, float]:
    """Sends a signal as soon as `when` holds; returns exit status, output and the seconds it took to end."""
    until = time.monotonic() + 300
    while not when():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "the moment never came"
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=60)
    seconds = time.monotonic() - began
    out, err = process.communicate()
    assert "Traceback" not in err, err
    return process.returncode, out, seconds


def logged(directory: Path, kind: str, **fields: object) -> bool:
    """Whether the log holds an event of this kind with these fields."""
    log = directory / "metrics.jsonl"
    events = read_metrics(log) if log.exists() else []
    return any(event["event"] == kind and fields.items() <= event.items() for event in events)


def saved(directory: Path, step: int) -> bool:
    """Whether the checkpoint after `step` rounds is there."""
    return (directory / "checkpoints" / f"step-{step:08d}.json").exists()


def timeless(value: object) -> object:
    """The same without any `seconds`, their `split`, and what was compiled."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "split", "programs")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def summary_of(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


def final_state(directory: Path) -> tuple[ServerState, list[ClientState], assembly.Federation]:
    """Server and clients of the last checkpoint, and the federation they belong to."""
    federation = assembly.make_federation(resolved(cli.parse(settings(directory))), Console())
    state, _ = train._load_or_start(federation, directory)
    assert int(state.server.round) == ROUNDS
    return *jax.device_get((state.server, list(state.clients))), federation


def assert_same_run(left: Path, right: Path) -> None:
    assert timeless(read_metrics(left / "metrics.jsonl")) == timeless(read_metrics(right / "metrics.jsonl"))
    assert timeless(summary_of(left)) == timeless(summary_of(right))
    one, other = (jax.tree.leaves(final_state(directory)[:2]) for directory in (left, right))
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    (directory.parent / "said.txt").write_text(finish(settings(directory)))
    return directory


@pytest.fixture
def command(capsys, tmp_path) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs `main` in this process, and leaves no trace in it: exit status and the one line it may say on stderr."""
    handler = signal.getsignal(signal.SIGTERM)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    cache = {name: getattr(jax.config, name) for name in names}

    def run(*arguments: str) -> tuple[int, str]:
        status = cli.main(list(arguments))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return status, lines[0]

    yield run
    signal.signal(signal.SIGTERM, handler)
    for name, value in cache.items():
        jax.config.update(name, value)


def test_an_unsupervised_run_starts_from_a_file_tells_its_clusters_and_goes_on_after_a_stop(tmp_path):
    spec = make_spec("thin", dropout=0.0)
    weights.save(tmp_path / "trunk.npz", jax.device_get(spec.init(jax.random.key(1), 32, 16)))
    arguments = [
        "--config.task.name=unsupervised", f"--config.model.weights={tmp_path / 'trunk.npz'}", "--config.cluster.k1=6",
        "--config.cluster.min_samples=2", "--config.last.epochs=2", "--config.rounds=3", "--config.eval.every=2",
    ]  # fmt: skip
    directory, other = tmp_path / "run", tmp_path / "stopped"
    said = finish(settings(directory, *arguments))
    assert ", clusters " in said and "start" in said
    summary, events = summary_of(directory), read_metrics(directory / "metrics.jsonl")
    rows = [event for event in events if event["event"] == "round"]
    assert [len(row["clients"]["arena"]["purity"]) for row in rows] == [1, 1, 2]
    assert rows[0]["split"].keys() == {"embedding", "clustering", "training", "pruning", "aggregation", "wire"}
    for row in rows:
        for client in row["clients"].values():
            assert client["steps"] > 0 and all(0 < share <= 1 for share in client["clustered"])
    assert summary["task"] == "unsupervised" and summary["start"]["mean"] != summary["mean"]
    assert summary["before_last_round"]["mean"].keys() == summary["mean"].keys()
    assert 0 < summary["validation"]["mean"] <= 1
    better = summary["mean"]["map"] > summary["start"]["mean"]["map"]
    assert any("no better" in line for line in summary["failures"]) != better
    report = (directory / "report.html").read_text(encoding="utf-8")
    assert all(title in report for title in ("Pseudo labels", "Time per round", "Before the last round"))

    status, _, _ = stop(start(settings(other, *arguments)), signal.SIGTERM, lambda: saved(other, 1))
    assert status == 130
    finish(settings(other, *arguments))
    assert timeless(read_metrics(directory / "metrics.jsonl")) == timeless(read_metrics(other / "metrics.jsonl"))
    assert timeless(summary) == timeless(summary_of(other))


def test_a_run_writes_what_it_promises(whole):
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "report.html", "rounds.csv", "evaluations.csv", "checkpoints",
    }  # fmt: skip
    assert checkpoint.latest(whole / "checkpoints") == ROUNDS
    assert len(list((whole / "checkpoints").glob("*.json"))) == 2
    summary = summary_of(whole)
    assert (summary["method"], summary["seed"], summary["rounds"]) == ("fedklpr", 0, ROUNDS)
    assert 0 < summary["seconds"] < 3600 and summary["refused"] == [] and summary["notes"] == []
    for part in (summary, summary["after"]):
        assert tuple(part["clients"]) == CLIENTS
        for key in ("rank1", "rank5", "rank10", "map", "minp", "density"):
            values = [part["clients"][name][key] for name in CLIENTS]
            assert all(0 < value <= 1 for value in values), key
            assert part["mean"][key] == pytest.approx(sum(values) / 2)
    for name in CLIENTS:
        precisions = [value for value in summary["average_precisions"][name] if value is not None]
        assert np.mean(precisions) == pytest.approx(summary["clients"][name]["map"])
    made = [event["programs"] for event in read_metrics(whole / "metrics.jsonl") if event["event"] == "round"]
    assert made[0] > 0 and made[1:] == [0] * (ROUNDS - 1), "only the first round compiles"
    said = (whole.parent / "said.txt").read_text()
    expected = r"^evaluating before and after local fine-tuning, about 0:0\d:\d\d once compiled$"
    assert re.search(expected, said, re.MULTILINE), said
    known = json.loads((whole / "config.json").read_text())
    assert known["settings"]["rounds"] == ROUNDS and f"--config.out={whole}" in known["command"]


def test_the_bytes_of_the_summary_are_those_that_were_sent(whole):
    summary, events = summary_of(whole), read_metrics(whole / "metrics.jsonl")
    played = [event["clients"] for event in events if event["event"] == "round"]
    assert len(played) == ROUNDS
    up = {name: [row[name]["bytes_up"] for row in played] for name in CLIENTS}
    down = {name: [row[name]["bytes_down"] for row in played] for name in CLIENTS}
    # The final downloads are in no round; encode them once more from the last checkpoint.
    server, clients, federation = final_state(whole)
    for index, name in enumerate(CLIENTS):
        message = jax.device_get(federation.engine.download(server, np.int32(index)))
        down[name].append(len(exchange.pack(message.model, message.mask, {}, clients[index].mask)))
    sent = summary["bytes"]
    assert sent["per_client"] == {name: {"down": sum(down[name]), "up": sum(up[name])} for name in CLIENTS}
    assert sent["down"] == sum(map(sum, down.values())) and sent["up"] == sum(map(sum, up.values()))
    assert sent["total"] == sent["down"] + sent["up"] == events[-1]["bytes_total"]
    payloads = 2 * ROUNDS + 1
    assert sent["dense_total"] == payloads * sum(up[name][0] for name in CLIENTS)
    assert sent["raw_total"] == payloads * len(CLIENTS) * 4 * parameter_count(server.model)
    assert summary["saving"] == 1 - sent["total"] / sent["dense_total"] > 0.1


def test_the_first_upload_is_never_pruned_and_the_later_ones_are(whole):
    played = [event["clients"] for event in read_metrics(whole / "metrics.jsonl") if event["event"] == "round"]
    for name in CLIENTS:
        rows = [row[name] for row in played]
        assert [row["decision"] for row in rows] == ["none", "accepted", "accepted", "accepted"]
        assert [row["density"] for row in rows] == pytest.approx([1, 0.8, 0.64, 0.512], abs=1e-3)
        assert rows[0]["bytes_up"] > rows[1]["bytes_up"] > rows[2]["bytes_up"] > rows[3]["bytes_up"]
    for row in played:
        assert sum(row[name]["weight"] for name in CLIENTS) == pytest.approx(1)


def test_stopped_at_any_moment_a_run_goes_on_to_the_same_end(whole, tmp_path):
    directory = tmp_path / "run"
    arguments = settings(directory)
    written: list[float] = []

    def compiling() -> bool:
        if logged(directory, "eval", round=0):
            written.append(time.monotonic())
        return bool(written) and time.monotonic() - written[0] > 2

    # An empty cache, so that the first round has to be compiled.
    process = start([*arguments, f"--config.compilation_cache={tmp_path / 'empty'}"])
    status, out, seconds = stop(process, signal.SIGINT, compiling)
    assert status == 130 and seconds < 2 and "Go on with the same command" in out
    assert not logged(directory, "round") and not saved(directory, 1)

    stop(start(arguments), signal.SIGKILL, lambda: saved(directory, 1))
    # As if it had died between the log and the checkpoint, in the middle of a line.
    with (directory / "metrics.jsonl").open("a") as log:
        log.write('{"event": "round", "round": 77, "clients": {}, "refused": []}\n{"event": "rou')

    status, out, seconds = stop(start(arguments), signal.SIGINT, lambda: saved(directory, 2))
    assert status == 130 and seconds < 2
    assert "interrupted: the round in progress is dropped. Go on with the same command: python experiments" in out
    assert f"--config.out={directory}" in out

    stop(start(arguments), signal.SIGKILL, lambda: saved(directory, ROUNDS))
    assert not (directory / "report.html").exists() and not logged(directory, "eval", round=ROUNDS)
    # As if it had died between the two lines of the final evaluation, which come one right after the other.
    with (directory / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"event": "eval", "round": ROUNDS, "stage": "before", "bytes_total": 0}) + "\n")

    assert f"continuing after round {ROUNDS}" in finish(arguments)
    assert_same_run(directory, whole)


@pytest.mark.short
@pytest.mark.parametrize(
    ("job", "status", "said"),
    [
        ("None", 0, ""),
        ("(_ for _ in ()).throw(InputError('x: wrong'))", 2, "error: x: wrong\n"),
        ("1 / 0", 1, "Exception in thread run:\nTraceback"),
        ("time.sleep(60)", 130, ""),
    ],
    ids=["done", "bad input", "our mistake", "terminated"],
)
def test_every_end_has_its_status(job, status, said):
    program = (
        "import sys, time; from fedklpr_jax import cli; from fedklpr_jax.errors import InputError\n"
        f"def job():\n    print('on', flush=True)\n    {job}\n"
        "sys.exit(cli.interruptible(job, lambda: 'the hint'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    if status == 130:
        process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and err.startswith(said) and bool(err) == bool(said)
    assert ("the hint" in out) == (status == 130)


def test_a_finished_run_is_not_overwritten(whole, command):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    status, line = command(*settings(whole))
    assert status == 2
    assert line == (
        f"error: {whole}: holds a finished run; read {whole / 'report.html'}, give --config.out=OTHER, "
        f"or delete it with: rm -r {whole}"
    )
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_another_setting_does_not_continue_a_run(whole, command, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    (directory / "report.html").unlink()
    log = (directory / "metrics.jsonl").read_bytes()
    status, line = command(*settings(directory, "--config.seed=1"))
    assert status == 2 and "holds a run with --config.seed=0, not 1; continue it with its own settings" in line
    assert (directory / "metrics.jsonl").read_bytes() == log


def test_bfloat16_halves_the_bytes(whole, tmp_path):
    directory = tmp_path / "run"
    finish(settings(directory, "--config.wire.dtype=bfloat16", "--config.rounds=1"))
    halves, wholes = (
        next(event for event in read_metrics(path / "metrics.jsonl") if event["event"] == "round")["clients"]
        for path in (directory, whole)
    )
    for name in CLIENTS:
        for way in ("bytes_down", "bytes_up"):
            assert 0.3 < halves[name][way] / wholes[name][way] < 0.55


def test_a_run_in_which_everything_diverges_ends_and_says_so(tmp_path):
    directory = tmp_path / "run"
    diverging = ("--config.method.name=local", "--config.optimizer.learning_rate=1e30", "--config.rounds=2")
    out = finish(settings(directory, *diverging))
    assert "2 refused" in out
    summary = summary_of(directory)
    assert [(entry["round"], entry["client"]) for entry in summary["refused"]] == [
        (round_, name) for round_ in range(2) for name in CLIENTS
    ]
    # Each client kept the model it had, the first one.
    events = read_metrics(directory / "metrics.jsonl")
    assert summary["clients"] == events[0]["clients"] and summary["mean"]["map"] > 0
    # Fine-tuning diverges as well, and is no reason to end without a result.
    assert summary["after"]["clients"] == summary["clients"]
    assert summary["failures"] == ["local fine-tuning diverged at harbour, arena: tested after it as before it"]
    assert f"failed: {summary['failures'][0]}" in out
    # Local training, what is more, sends nothing.
    assert summary["saving"] is None
    assert {key: summary["bytes"][key] for key in ("down", "up", "total", "dense_total", "raw_total")} == dict.fromkeys(
        ("down", "up", "total", "dense_total", "raw_total"), 0
    )


def write_folder(root: Path) -> None:
    """The synthetic clients as folders of PNG files, which lose nothing."""
    specs = {spec.name: spec for spec in synthetic.DEFAULT_SITES}
    for site in synthetic.make_sites(0, specs=[specs[name] for name in CLIENTS], height=32, width=16):
        for split, images in zip(SPLITS, (site.train, site.query, site.gallery), strict=True):
            folder = root / site.name / split
            folder.mkdir(parents=True)
            for row in range(len(images)):
                name = f"{images.ids[row]:04d}_c{images.cams[row]}s1_{row:06d}_00.png"
                Image.fromarray(np.asarray(images.pixels[row])).save(folder / name)


def test_bad_images_are_counted_and_the_run_goes_on_as_without_them(whole, tmp_path):
    root, directory = tmp_path / "sites", tmp_path / "run"
    write_folder(root)
    (root / "notes").mkdir()
    train_folder, query_folder = root / CLIENTS[0] / SPLITS[0], root / CLIENTS[0] / SPLITS[1]
    (train_folder / "0001_c1s1_000000_99.png").write_bytes(b"no picture")
    (train_folder / "0001_c2s1_000000_99.png").touch()
    # A person whom no other camera saw.
    shutil.copy(next(query_folder.iterdir()), query_folder / "9999_c1s1_000000_00.png")
    out = finish(
        settings(directory, "--config.data.source=folder", f"--config.data.root={root}",
                 f"--config.data.cache={tmp_path / 'images'}")
    )  # fmt: skip
    queries = summary_of(whole)["clients"][CLIENTS[0]]["valid_queries"]
    notes = [
        "harbour: bounding_box_train/0001_c1s1_000000_99.png: not a JPEG or PNG picture",
        "harbour: bounding_box_train/0001_c2s1_000000_99.png: 0 bytes",
        f"harbour: 1 of {queries + 1} queries have no second camera; not counted",
    ]
    assert [line for line in out.splitlines() if line.startswith("note: ")] == [f"note: {note}" for note in notes]
    assert summary_of(directory)["notes"] == notes
    events = read_metrics(directory / "metrics.jsonl")
    assert [event["text"] for event in events if event["event"] == "note"] == notes
    played, expected = (
        timeless([event for event in read_metrics(path / "metrics.jsonl") if event["event"] == "round"])
        for path in (directory, whole)
    )
    assert played == expected
    assert summary_of(directory)["clients"][CLIENTS[0]]["valid_queries"] == queries


def test_broken_folders_are_refused_with_one_line(command, tmp_path):
    def said(source: Path, *more: str) -> str:
        status, line = command(
            *settings(tmp_path / "run", "--config.data.source=folder", f"--config.data.root={source}",
                      "--config.data.clients=", f"--config.data.cache={tmp_path / 'images'}", *more)
        )  # fmt: skip
        assert status == 2 and not (tmp_path / "run").exists()
        return line.replace(str(tmp_path), "")

    assert said(tmp_path / "gone") == "error: /gone: no such folder; give the folder that holds one sub-folder a site"
    site = tmp_path / "sites" / "gate"
    for split in SPLITS:
        (site / split).mkdir(parents=True)
        for name in ("0001_c1s1_000001_00.png", "0002_c1s1_000001_00.png"):
            Image.new("RGB", (16, 32)).save(site / split / name)
    assert "gate: none of its 2 queries has its person in bounding_box_test/ under another" in said(site.parent)
    assert "moon is not there; there is gate" in said(site.parent, "--config.data.clients=moon")
    for name in ("0001_c1s1_000001_00.png", "0002_c1s1_000001_00.png"):
        (site / SPLITS[2] / name).rename(site / SPLITS[2] / name.replace("c1", "c2"))
    assert "gate: 2 training identities are too few" in said(site.parent)
    for path in (site / SPLITS[0]).iterdir():
        path.write_bytes(b"no picture")
    assert "gate: bounding_box_train/ holds no readable picture of a person (2 refused, " in said(site.parent)
    for path in (site / SPLITS[1]).iterdir():
        path.unlink()
    assert "gate: query/ holds no readable picture of a person; all three splits need some" in said(site.parent)


@pytest.mark.short
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--config: missing; usage: python experiments/run.py"),
        (["--config=nowhere.py"], "--config: nowhere.py is no file; usage: "),
        ([CONFIG, "--config.rond=3"], "--config.rond: there is no such setting; perhaps --config.rounds"),
        ([CONFIG, "--config.method.kll=3"], "--config.method.kll: there is no such setting; perhaps --config"),
        ([CONFIG, "--config.rounds=many"], "flag --config.rounds=many: invalid literal for int"),
        ([CONFIG, "--config.rounds=1.5"], "flag --config.rounds=1.5: invalid literal for int"),
        ([CONFIG, "--config.eval.rerank=perhaps"], "flag --config.eval.rerank=perhaps: "),
        ([CONFIG, "--rounds=3"], "--rounds: there is no such setting; usage: "),
        ([CONFIG, "rounds=3"], "rounds=3: not understood; settings look like --config.rounds=3"),
        (["--config.rounds=3", CONFIG], "Found --config.rounds=3 in argv before a value for --config"),
        ([CONFIG + ":5"], "TypeError: get_config() takes 0 positional arguments but 1 was given"),
        ([CONFIG, "--config.rounds=0"], "config.rounds: 0 is not allowed; give a number from 1"),
        ([CONFIG, "--config.method.name=fedsgd"], "config.method.name: 'fedsgd' is not allowed; give one of fedklpr, "),
        ([CONFIG, "--config.optimizer.learning_rate=nan"], "config.optimizer.learning_rate: nan is not allowed"),
        ([CONFIG, "--config.name=.."], "config.name: '..' is not allowed; give a name without / in it"),
        ([CONFIG, "--config.data.clients=moon"], "config.data.clients: 'moon' is no synthetic site; there are mall"),
        ([CONFIG, "--config.data.clients=arena,arena"], "site 'arena': the name is used twice"),
        ([CONFIG, "--config.data.source=folder"], "config.data.root: empty; the folder source needs the directory"),
        ([CONFIG, "--config.compilation_cache=/dev/null/x"], "/dev/null/x: cannot be made as the cache of xla"),
        ([CONFIG, *TINY, "--config.out=/dev/null/x"], "config.out: /dev/null/x cannot be written (Not a directory)"),
    ],
    ids=lambda value: " ".join(value).replace(CONFIG, "") if isinstance(value, list) else "",
)
def test_typing_errors_are_answered_with_one_line(command, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    status, line = command(*given)
    assert status == 2 and line.startswith(f"error: {said}") and len(line) < 400
    assert not (tmp_path / "runs").exists()


@pytest.mark.short
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:", "invalid syntax"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def get_config():\n    return 1", "get_config() returns no ConfigDict"),
    ],
)
def test_a_broken_configuration_file_is_named(tmp_path, text, said):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        cli.parse([f"--config={file}"])
    assert str(caught.value).startswith(f"--config: {file}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.short
def test_parse_reads_its_arguments_and_not_the_process_s(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", CONFIG, "--config.rounds=9"])
    config = cli.parse([CONFIG, "--config.rounds=2", "--config.data.clients=a,b", "--config.eval.rerank"])
    assert (config.rounds, config.data.clients, config.eval.rerank) == (2, "a,b", True)
    assert math.isclose(cli.parse([CONFIG, "--config.optimizer.learning_rate=1e-3"]).optimizer.learning_rate, 1e-3)


@pytest.mark.short
def test_help(capsys):
    assert cli.main(["--help"]) == 0
    assert "usage: python experiments/run.py --config=" in capsys.readouterr().out
