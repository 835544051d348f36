"""The main job: a simulated federation run to its end, with a log, checkpoints, a summary and a report on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from fedklpr_jax import checkpoint, curves, dry_run, hosts, pictures, trained
from fedklpr_jax import config as settings
from fedklpr_jax.assembly import Federation, cache_directory, make_federation
from fedklpr_jax.client_states import ClientStates, Shelf
from fedklpr_jax.console import Console
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import Method, ServerState, Task
from fedklpr_jax.methods import METHODS
from fedklpr_jax.metrics import METRIC_TITLES, Ledger, MetricsLog, duration, heading, mean, read_metrics, write_json
from fedklpr_jax.round import start
from fedklpr_jax.simulation import Examination, RunState, examine, headline, run_round
from fedklpr_jax.summary import summary_of

# Settings that may differ between the runs before and after an interruption: they change no number.
FREE = frozenset({
    "out", "name", "compilation_cache", "data.cache", "checkpoint.keep", "checkpoint.every", "client_states", "hosts",
    "deploy.least", "deploy.wait", "deploy.deadline", "tensorboard",
})  # fmt: skip

# Bytes of all clients' states from which each is kept in a file of its own.
ON_DISK_FROM = 1 << 30


def fingerprint(config: ml_collections.ConfigDict) -> str:
    """Hash of every setting that changes a number."""
    fixed = {path: value for path, value in settings.flat(config).items() if path not in FREE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def directory_of(config: ml_collections.ConfigDict) -> Path:
    """Where the results of a run go."""
    return Path(config.out or Path("runs") / (config.name or config.method.name))


def prepare_directory(config: ml_collections.ConfigDict, command: str) -> Path:
    """The run's directory with its `config.json`; refuses one that holds a finished or another run.

    Raises:
      InputError: what is in the way, and what to type instead.
    """
    directory = directory_of(config)
    known = directory / "config.json"
    if (directory / "report.html").exists():
        raise InputError(
            f"{directory}: holds a finished run; read {directory / 'report.html'}, give --config.out=OTHER, "
            f"or delete it with: rm -r {directory}"
        )
    if known.exists():
        try:
            before = dict(json.loads(known.read_text())["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{known}: no readable configuration of a run; give --config.out=OTHER") from error
        now = json.loads(json.dumps(settings.flat(config)))
        for path in sorted((before.keys() | now.keys()) - FREE):
            if before.get(path) != now.get(path):
                raise InputError(
                    f"{directory}: holds a run with --config.{path}={before.get(path)!r}, not {now.get(path)!r}; "
                    "continue it with its own settings or give --config.out=OTHER"
                )
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(known, {"command": command, "settings": settings.flat(config)})
    except OSError as error:
        raise InputError(f"config.out: {directory} cannot be written ({error.strerror}); give another") from error
    return directory


def _directory(config: ml_collections.ConfigDict, command: str) -> tuple[Path, contextlib.ExitStack]:
    """Where this host writes, and what to close in the end: on the first host the run's directory, on another one that
    is deleted."""
    closing = contextlib.ExitStack()
    if hosts.index() == 0:
        return prepare_directory(config, command), closing
    return Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="fedklpr-"))), closing


def split_processor(devices: int) -> None:
    """Makes so many devices of a CPU, each at work on clients of its own: small networks leave cores idle otherwise.

    Changes nothing below 2, where `XLA_FLAGS` says how many there are, or once JAX has begun (in a notebook).
    """
    if devices < 2 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def _save(federation: Federation, directory: Path, state: RunState, log: MetricsLog) -> None:
    if hosts.index():
        return
    clients, folder = state.clients, directory / "checkpoints"
    meta = {
        "ledger": state.ledger.to_json(),
        "seconds": state.seconds,
        "offset": log.offset,
        "fingerprint": fingerprint(federation.config),
        "clients": clients.record(),
        "trained": trained.note(federation.task, state.server, clients.firsts[0]),
    }
    tree = jax.device_get({"server": state.server, "clients": clients.in_memory()})
    checkpoint.save(folder, int(state.server.round), tree, meta, federation.config.checkpoint.keep)
    if clients.shelf:
        clients.shelf.sweep({name for kept in checkpoint.metas(folder).values() for name in kept["clients"].values()})


class Course(NamedTuple):
    """How a federation comes from round to round: `start(task, method, seed)` gives the first states of server and
    clients, `run_round(federation, state)` the state after a round and its event, and `examine(federation, state,
    *stages)` an `Examination`."""

    start: Callable[[Task, Method, int], tuple[ServerState, ClientStates]]
    run_round: Callable[[Federation, RunState], tuple[RunState, dict[str, Any]]]
    examine: Callable[..., Examination]


SIMULATED = Course(start, run_round, examine)


def _load_or_start(
    federation: Federation, directory: Path, course: Course = SIMULATED
) -> tuple[RunState, int | None]:
    """The newest checkpoint's state and its place in the log, or the start of a run and None."""
    config, folder = federation.config, directory / "checkpoints"
    server, clients = course.start(federation.task, federation.engine.method, config.seed)
    metas = checkpoint.metas(folder)
    # Another host could not read the first one's files.
    on_disk = config.client_states == "disk" or (
        config.client_states == "auto" and clients.bytes_in_all() > ON_DISK_FROM and hosts.count() == 1
    )
    if on_disk or any(name for meta in metas.values() for name in meta["clients"].values()):
        if hosts.count() > 1:
            raise InputError(f"{directory}: keeps its clients' states on disk; continue it on one host")
        clients = dataclasses.replace(clients, shelf=Shelf(directory / "clients"))
    if not metas:
        return RunState(server, clients, Ledger(), 0.0), None
    step, meta = max(metas.items())
    if meta["fingerprint"] != fingerprint(config):
        raise InputError(f"{directory}: its checkpoint belongs to other settings; give --config.out=OTHER")
    template = {"server": server, "clients": clients.recorded(meta["clients"])}
    tree, _ = checkpoint.restore(folder, step, template)
    server = jax.tree.map(jax.numpy.array, tree["server"])
    clients = clients.restored(meta["clients"], tree["clients"])
    return RunState(server, clients, Ledger.from_json(meta["ledger"]), meta["seconds"]), meta["offset"]


def _told(state: RunState) -> RunState:
    """The first host's state on every host."""
    if hosts.count() == 1:
        return state
    clients = state.clients
    note = hosts.told_text(json.dumps([clients.record(), state.ledger.to_json(), state.seconds]))
    record, ledger, seconds = json.loads(note)
    held = clients.in_memory() if hosts.index() == 0 else clients.recorded(record)
    server, firsts, held = hosts.told((state.server, clients.firsts, held))
    clients = dataclasses.replace(clients, firsts=firsts).restored(record, held)
    return RunState(jax.tree.map(jax.numpy.array, server), clients, Ledger.from_json(ledger), seconds)


def run(
    config: ml_collections.ConfigDict, console: Console, command: str = "", method: Method | None = None
) -> dict[str, Any]:
    """Runs, or goes on with, the run that `config` describes; returns what `summary.json` holds (on the first host, and
    nothing after a dry run).

    A `method` of one's own takes the place of the one that `config` names, as a name too: in `config.json`, in the
    summary and for where results go. By its name alone a later run with it is the same run, so that a changed method
    needs another name, or another `config.out`.

    Raises:
      InputError: bad settings, data or directory, or a method that has the name of one of the library's; nothing was
        changed then.
    """
    settings.validate(config)
    config = settings.resolved(config)
    if method:
        if method.name in METHODS:
            raise InputError(f"method {method.name!r}: one of the library's has this name; give it another")
        if not method.name or not settings.FIELDS["name"].test(method.name):
            raise InputError(f"method {method.name!r}: its folder cannot be named so; give a name without / in it")
        config.method.name = method.name
    if config.tensorboard:
        curves.check_tensorboard()
    if config.dry_run:
        return _tell(config, console, method)
    split_processor(config.devices)
    hosts.connect(config.hosts)
    hosts.check_same("settings", np.frombuffer(fingerprint(config).encode(), np.uint8))
    keep_programs(config)
    began = time.monotonic()
    console.line(f"{_title(config)}: reading the data")
    federation = make_federation(config, console, method)
    directory, closing = hosts.agreed(lambda: _directory(config, command))
    with closing:
        return follow(SIMULATED, federation, directory, console, began)


def reopen(
    directory: Path, console: Console, method: Method | None = None
) -> tuple[Federation, RunState]:
    """The federation of the run in `directory`, and its state after the last round that was kept: to look at what was
    trained. Nothing there is changed.

    Args:
      directory: of a run on one host, finished or not.
      console: shows the training of starting weights that are gone.
      method: the one that the run was given, if it was.

    Raises:
      InputError: no run, or no round of it yet; or its data, or method, are not here.
    """
    config = trained.settings_of(directory)
    if config.method.name not in ([method.name] if method else METHODS):
        raise InputError(f"{directory}: its run is of a method {config.method.name!r}; give that one")
    if not checkpoint.metas(directory / "checkpoints"):
        raise InputError(f"{directory}: has no checkpoint yet; let its run finish a round")
    federation = make_federation(config, console, method)
    return federation, _load_or_start(federation, directory)[0]


def _tell(config: ml_collections.ConfigDict, console: Console, method: Method | None) -> dict[str, Any]:
    """Shows what the run would be; nothing is written."""
    split_processor(config.devices)
    if config.model.weights == "synthetic":
        # They have the same shapes, and may take a minute to train.
        config.model.weights = "random"
    console.line(f"{_title(config)}: reading the data")
    federation = make_federation(config, console, method)
    for line in (*(f"note: {note}" for note in federation.notes), *(f"  {line}" for line in federation.lines)):
        console.line(line)
    for line in dry_run.told(federation, dry_run.matmul_rate()):
        console.line(line)
    console.line("nothing was run or written; leave out --config.dry_run to run it")
    return {}


def _title(config: ml_collections.ConfigDict) -> str:
    return f"{heading(config.method.name, config.task.name)}, seed {config.seed}"


def keep_programs(config: ml_collections.ConfigDict) -> None:
    """Has JAX keep what it compiles for the next start.

    Raises:
      InputError: the folder of `config.compilation_cache` cannot be made.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_directory(config.compilation_cache, "xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def follow(
    course: Course, federation: Federation, directory: Path, console: Console, began: float
) -> dict[str, Any]:
    """Takes a federation from where the run in `directory` is to its end; returns what `summary.json` holds.

    `began` is when the work began, by `time.monotonic`.

    Raises:
      InputError: as `run`.
    """
    config = federation.config
    state, offset = hosts.agreed(lambda: _load_or_start(federation, directory, course))
    state = _told(state)
    spent = state.seconds

    def timed(state: RunState) -> RunState:
        return state._replace(seconds=spent + time.monotonic() - began)

    done = int(state.server.round)
    with contextlib.ExitStack() as closing:
        log = closing.enter_context(hosts.agreed(lambda: MetricsLog.open(directory / "metrics.jsonl", offset or 0)))
        if config.tensorboard and not hosts.index():
            earlier = read_metrics(directory / "metrics.jsonl")
            shown = closing.enter_context(contextlib.closing(curves.TensorBoard(directory / "tensorboard", earlier)))
            log.listen(shown.write)
        for note in federation.notes:
            console.line(f"note: {note}")
            if not done:
                log.write({"event": "note", "text": note})
        for line in federation.lines:
            console.line(f"  {line}")
        results = f"results go to {directory}"
        if hosts.index():
            results = f"host {hosts.index()} of {hosts.count()}, counted from 0; host 0 writes the results"
        console.line(f"{'continuing after round ' + str(done) if done else 'compiling'}; {results}")
        # Seconds of the last evaluation and of the last round, which tell how long the final evaluation takes.
        tests, training = 0.0, 0.0
        with console.progress(config.rounds, done) as bar:
            if not done:
                _, tests = _examine(course, federation, state, log)
            for round_ in range(done, config.rounds):
                if config.last.epochs and 0 < round_ == config.rounds - 1 and round_ % config.eval.every:
                    # The long last round is reported with and without.
                    _, tests = _examine(course, federation, state, log)
                state, event = course.run_round(federation, state)
                log.write(event)
                training, text = event.get("seconds", 0.0), _round_text(event)
                if (round_ + 1) % config.eval.every == 0 and round_ + 1 < config.rounds:
                    # In front, for a narrow terminal cuts the line.
                    found, tests = _examine(course, federation, state, log)
                    text = f"{found}, {text}"
                state = timed(state)
                if (round_ + 1) % config.checkpoint.every == 0 or round_ + 1 == config.rounds:
                    _save(federation, directory, state, log)
                bar.advance(text)
        # With `eval.after` the tests between rounds are as long as the final ones.
        left = tests if config.eval.after and config.eval.every < config.rounds else 2 * tests + training
        about = f", about {duration(left)} once compiled" if tests and training else ""
        console.line(f"evaluating before and after local fine-tuning{about}")
        return _conclude(course, federation, timed(state), directory, log, console)


def _round_text(event: dict[str, Any]) -> str:
    rows = event["clients"].values()
    loss = mean([row.get("loss") for row in rows])
    text = "no loss" if loss is None else f"loss {loss:.3f}"
    if all("clusters" in row for row in rows):
        text += f", clusters {sum(row['clusters'][-1] for row in rows)}"
    if all("density" in row for row in rows):
        text += f", density {mean([row['density'] for row in rows]):.2f}"
    return text + (f", {len(event['refused'])} refused" if event["refused"] else "")


def _examine(course: Course, federation: Federation, state: RunState, log: MetricsLog) -> tuple[str, float]:
    """Evaluates in the middle of a run and logs it; returns the result in a few words, and how many seconds it took."""
    began = time.monotonic()
    stages = ("before", "after") if federation.config.eval.after and int(state.server.round) else ("before",)
    found = course.examine(federation, state, *stages)
    events = [_eval_event(federation, found, state, stage) for stage in stages]
    if found.sent:
        # Beside the ledger, which holds what the method needs; the download of the final examination is part of that.
        events[0]["bytes_sent"] = sum(found.sent)
    for event in events:
        log.write(event)
    means = events[0]["mean"]
    key = next(key for key in ("map", "pooled") if key in means)
    return f"{METRIC_TITLES[key]} {100 * means[key]:.1f} %", time.monotonic() - began


def _eval_event(federation: Federation, found: Examination, state: RunState, stage: str) -> dict[str, Any]:
    return {
        "event": "eval",
        "round": int(state.server.round),
        "stage": stage,
        "bytes_total": state.ledger.total,
        **headline(federation, found.results[stage], found.densities),
    }


def _conclude(
    course: Course, federation: Federation, state: RunState, directory: Path, log: MetricsLog, console: Console
) -> dict[str, Any]:
    """The final download, both evaluations, and on the first host `summary.json`, the report and the table."""
    # Imported late, as Matplotlib takes a second, which a run has here and a site of a deployment never needs.
    from fedklpr_jax import report

    began = time.monotonic()
    found = course.examine(federation, state, "before", "after", "validation")
    lengths = zip(federation.task.client_names, found.lengths, strict=True)
    ledger = state.ledger.add({name: (length, None) for name, length in lengths if length})
    state = state._replace(ledger=ledger)
    for stage in ("before", "after"):
        log.write(_eval_event(federation, found, state, stage))
    if hosts.index():
        return {}
    before = found.results["before"]
    events = read_metrics(directory / "metrics.jsonl")
    summary = summary_of(federation, state, found, events, state.seconds + time.monotonic() - began)
    write_json(directory / "summary.json", summary)
    curves.write_csv(directory, events)
    # Written last, the report marks the run as finished.
    report.write_report(
        directory, pictures.ranked_lists(federation, before), pictures.classified_pictures(federation, before)
    )
    names = ("report.html", "summary.json", "metrics.jsonl", "rounds.csv", "evaluations.csv", "checkpoints")
    console.table(summary, [directory / name for name in names])
    return summary
