"""Rounds over the wire, their ledger, and what a run's directory accepts; the whole command is in `test_cli.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedklpr_jax import assembly, simulation, train, transport
from fedklpr_jax import round as rounds
from fedklpr_jax.config import default_config, flat, resolved
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.accuracy import Classified
from fedklpr_jax.federated import Method, Upload, send_all
from fedklpr_jax.methods import local
from fedklpr_jax.methods.fedpav import is_classifier
from fedklpr_jax.metrics import Ledger, MetricsLog, read_metrics
from fedklpr_jax.pruning import apply_mask
from fedklpr_jax.summary import best_of
from tests.federations import toy_task

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ((1.0, 3.0), (2.0, -1.0), (4.0, 0.5))


def begin(method, *, optimizer=None, **settings):
    """A federation of three toy clients with 1, 2 and 3 images, and the state that its run starts from."""
    config = default_config()
    config.epochs = 1
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in settings.items()})
    config = resolved(config)
    task = toy_task(TARGETS, optimizer=optimizer)
    engine = rounds.make_engine(
        task, method, epochs=1, clients=assembly.participation_count(len(TARGETS), config.participation)
    )
    server, clients = rounds.start(task, method, config.seed)
    return assembly.Federation(config, [], engine, ()), simulation.RunState(server, clients, Ledger(), 0.0)


def kernel(state):
    return np.asarray(state.server.model["params"]["trunk"]["kernel"])


def spoil(model, client, context):
    """In round 0, client 1 uploads a NaN, client 2 ends with one in the classifier that it keeps; all is well later."""
    upload, client, logs = send_all(model, client, context)
    first = context.round == 0
    params = upload.model["params"]["trunk"]["kernel"]
    bad = params.at[0].set(jnp.where(first & (context.images == 2), jnp.nan, params[0]))
    kept = jax.tree.map(lambda leaf: jnp.where(first & (context.images == 3), jnp.nan, leaf), client.local)
    model = {**upload.model, "params": {"trunk": {"kernel": bad}}}
    return upload._replace(model=model), client._replace(local=kept), logs


@pytest.mark.parametrize("encode", [True, False])
def test_a_client_that_is_not_finite_is_counted_and_left_out(encode):
    federation, state = begin(Method("spoilt", is_local=is_classifier, finish=spoil), wire__encode=encode)
    before = state.clients
    state, event = simulation.run_round(federation, state)
    assert event["refused"] == [
        {"client": "client 1", "reason": "values that are not finite"},
        {"client": "client 2", "reason": "local values that are not finite"},
    ]
    # One step halves the distance to the target; only client 0 is averaged.
    np.testing.assert_allclose(kernel(state), [0.5, 1.5])
    assert [event["clients"][f"client {k}"]["weight"] for k in range(3)] == [1.0, 0.0, 0.0]
    assert state.clients[1] is before[1] and state.clients[2] is before[2]
    assert state.clients[0].local["params"]["classifier"]["kernel"] == 5.0
    # What crossed the wire counts, but a refused upload is no measure of a dense one.
    assert dict(state.ledger.payloads) == {"client 0": 2, "client 1": 2, "client 2": 2}
    assert list(state.ledger.dense_payload) == ["client 0"]

    state, event = simulation.run_round(federation, state)
    assert event["refused"] == [] and int(state.server.round) == 2
    trained = [0.5 * np.array([0.5, 1.5]) + 0.5 * np.array(target) for target in TARGETS]
    np.testing.assert_allclose(kernel(state), sum(n * x for n, x in zip((1, 2, 3), trained, strict=True)) / 6)
    assert sorted(state.ledger.dense_payload) == ["client 0", "client 1", "client 2"]


def test_the_ledger_counts_the_payloads_of_the_events():
    federation, state = begin(Method("fedavg"))
    events = []
    for _ in range(2):
        state, event = simulation.run_round(federation, state)
        events.append(event)
    rows = [row for event in events for row in event["clients"].values()]
    assert state.ledger.total == sum(row["bytes_down"] + row["bytes_up"] for row in rows) > 0
    first = [events[0]["clients"][f"client {k}"]["bytes_up"] for k in range(3)]
    assert state.ledger.dense_total == sum(4 * length for length in first)
    # Two weights, one classifier weight, one statistic: 4 values of 4 bytes, 4 payloads, 3 clients.
    assert state.ledger.raw_total == 4 * 4 * 4 * 3


def test_a_round_in_which_everything_diverges_changes_nothing_and_can_be_logged(tmp_path):
    federation, state = begin(Method("fedavg"), optimizer=optax.sgd(float("inf")))
    after, event = simulation.run_round(federation, state._replace(server=jax.tree.map(jnp.array, state.server)))
    assert len(event["refused"]) == 3
    assert int(after.server.round) == 1 and (kernel(after) == 0).all()
    assert after.ledger.dense_total == after.ledger.total
    with MetricsLog.open(tmp_path / "metrics.jsonl") as log:
        log.write(event)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["refused"] == event["refused"]


def test_a_scalar_that_is_not_finite_is_refused():
    def finish(model, client, context):
        upload, client, logs = send_all(model, client, context)
        scalars = {"images": jnp.where(context.images == 2, jnp.inf, context.images)}
        return upload._replace(scalars=scalars), client, logs

    federation, state = begin(Method("boaster", finish=finish))
    state, event = simulation.run_round(federation, state)
    assert [entry["client"] for entry in event["refused"]] == ["client 1"]
    np.testing.assert_allclose(kernel(state), (np.array([0.5, 1.5]) + 3 * np.array([2.0, 0.25])) / 4)


def test_local_training_sends_nothing():
    federation, state = begin(local.make())
    state, event = simulation.run_round(federation, state)
    assert state.ledger == Ledger() and state.ledger.saving is None and event["refused"] == []
    assert {row["bytes_down"] + row["bytes_up"] for row in event["clients"].values()} == {0}
    for client, target in zip(state.clients, TARGETS, strict=True):
        np.testing.assert_allclose(client.local["params"]["trunk"]["kernel"], np.array(target) / 2)


def test_the_server_gets_what_the_wire_delivers():
    federation, state = begin(Method("fedavg"), wire__dtype="bfloat16")
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    upload = Upload({"params": {"kernel": values}}, None, {"images": np.float32(3)})
    wire = transport.make_transport(federation.engine, federation.config.wire)
    decoded, length, reason = wire.upload(upload, state.clients[2], 2)
    np.testing.assert_array_equal(decoded.model["params"]["kernel"], np.asarray(jnp.bfloat16(values), np.float32))
    assert reason == "" and 0.3 < length / values.nbytes < 0.55
    # Finite, but not in the form in which it has to travel.
    huge = upload._replace(model={"params": {"kernel": np.full((2, 2), np.finfo(np.float32).max)}})
    assert "too large for bfloat16" in wire.upload(huge, state.clients[2], 2)[2]


def test_only_participants_train():
    federation, state = begin(Method("fedpav", is_local=is_classifier), participation=0.34)
    before = state.clients
    for round_ in range(3):
        (chosen,) = simulation.participants(0, round_, 3, 0.34)
        state, event = simulation.run_round(federation, state)
        assert list(event["clients"]) == [f"client {chosen}"]
        moved = [k for k in range(3) if state.clients[k] is not before[k]]
        assert moved == [chosen]
        before = state.clients


@pytest.mark.short
def test_participants_are_a_pure_function_of_seed_and_round():
    drawn = [simulation.participants(seed, round_, 10, 0.35) for seed in range(2) for round_ in range(20)]
    assert drawn == [simulation.participants(seed, round_, 10, 0.35) for seed in range(2) for round_ in range(20)]
    assert all(len(set(row)) == 4 and row == sorted(row) and set(row) <= set(range(10)) for row in drawn)
    assert len({tuple(row) for row in drawn}) > 30
    assert set().union(*drawn) == set(range(10))
    assert [assembly.participation_count(6, share) for share in (1e-6, 0.25, 0.5, 1.0)] == [1, 2, 3, 6]


@pytest.mark.short
def test_the_fingerprint_follows_every_setting_that_changes_a_number():
    original = train.fingerprint(resolved(default_config()))
    for path, value in flat(resolved(default_config())).items():
        config = resolved(default_config())
        changed = (not value) if isinstance(value, bool) else value + "x" if isinstance(value, str) else value + 1
        config.update_from_flattened_dict({path: changed})
        assert (train.fingerprint(config) == original) == (path in train.FREE), path


def directory_of(tmp_path: Path, **settings: object) -> Path:
    config = resolved(default_config())
    config.out = str(tmp_path / "run")
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in settings.items()})
    return train.prepare_directory(config, "the command")


@pytest.mark.short
def test_a_directory_takes_one_run_and_takes_it_again_until_it_is_finished(tmp_path):
    directory = directory_of(tmp_path)
    known = json.loads((directory / "config.json").read_text())
    assert known["command"] == "the command" and known["settings"]["rounds"] == resolved(default_config()).rounds
    # What changes no number may differ; what changes one may not, and is named with both values.
    assert directory_of(tmp_path, checkpoint__keep=5, name="other") == directory
    rest = r"=0\.5, not 0\.25; continue it with its own settings or give --config\.out=OTHER"
    with pytest.raises(InputError, match=r"holds a run with --config\.method\.klpwa\.mix" + rest):
        directory_of(tmp_path, method__klpwa__mix=0.25)
    (directory / "report.html").touch()
    with pytest.raises(InputError, match=r"finished run; read .*report\.html, give --config\.out=OTHER, or .* rm -r"):
        directory_of(tmp_path)
    assert json.loads((directory / "config.json").read_text()) == known


@pytest.mark.short
@pytest.mark.parametrize(("name", "directory"), [("", "fedpav"), ("mine", "mine")])
def test_results_go_to_runs(tmp_path, monkeypatch, name, directory):
    monkeypatch.chdir(tmp_path)
    assert directory_of(tmp_path, out="", name=name, method__name="fedpav") == Path("runs") / directory
    assert (tmp_path / "runs" / directory / "config.json").is_file()


@pytest.mark.short
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": 3}', '{"settings": ["a"]}'])
def test_an_unreadable_configuration_is_not_overwritten(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: no readable configuration of a run"):
        directory_of(tmp_path)
    assert (tmp_path / "run" / "config.json").read_text() == content


@pytest.mark.short
def test_directories_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match=r"config\.out: .*run cannot be written \(File exists\); give another"):
        directory_of(tmp_path)
    with pytest.raises(InputError, match=r"x: cannot be made as the cache of xla \(Not a directory\)"):
        assembly.cache_directory(str(tmp_path / "run" / "x"), "xla")
    assert (tmp_path / "run").read_text() == "a file"


def test_states_on_disk_give_the_same_run_and_go_on_from_either_place(tmp_path):
    method = Method("fedpav", is_local=is_classifier)

    def some_rounds(directory, count, where, last=None):
        federation, _ = begin(method, participation=0.67, client_states=where, checkpoint__keep=1)
        with MetricsLog.open(directory / "metrics.jsonl") as log:
            state, _ = train._load_or_start(federation, directory)
            for _ in range(count):
                state, _ = simulation.run_round(federation, state)
                train._save(federation, directory, state, log)
        return jax.tree.map(np.array, (state.server, list(state.clients)))

    for name in ("memory", "disk", "moved", "back"):
        (tmp_path / name).mkdir()
    reference = some_rounds(tmp_path / "memory", 4, "memory")
    runs = [some_rounds(tmp_path / "disk", 2, "disk"), some_rounds(tmp_path / "moved", 2, "memory"),
            some_rounds(tmp_path / "back", 2, "disk")]  # fmt: skip
    runs = [some_rounds(tmp_path / "disk", 2, "disk"), some_rounds(tmp_path / "moved", 2, "disk"),
            some_rounds(tmp_path / "back", 2, "auto")]  # fmt: skip
    for found in runs:
        jax.tree.map(np.testing.assert_array_equal, found, reference)
    # Of each client one state stays: that of the one checkpoint kept.
    assert not (tmp_path / "memory" / "clients").exists()
    names = [path.name[:8] for path in (tmp_path / "disk" / "clients").iterdir()]
    assert sorted(names) == sorted(set(names)) and 2 <= len(names) <= 3
    # A round that no checkpoint has seen leaves nothing behind once the run goes on.
    federation, _ = begin(method, participation=0.67, client_states="disk", checkpoint__keep=1)
    state, _ = train._load_or_start(federation, tmp_path / "disk")
    simulation.run_round(federation, state)
    assert len(list((tmp_path / "disk" / "clients").iterdir())) == len(names) + 2
    some_rounds(tmp_path / "disk", 1, "disk")
    assert len(list((tmp_path / "disk" / "clients").iterdir())) == 3


@pytest.mark.short
def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    federation, state = begin(Method("fedavg"), out=str(tmp_path))
    with MetricsLog.open(tmp_path / "metrics.jsonl") as log:
        train._save(federation, tmp_path, state, log)
    restored, offset = train._load_or_start(federation, tmp_path)
    assert offset == 0 and int(restored.server.round) == 0
    federation.config.seed = 1
    with pytest.raises(InputError, match="its checkpoint belongs to other settings"):
        train._load_or_start(federation, tmp_path)


def weight_of_the_kernel(federation):
    """The same federation, tested by the sum of a model's two weights, as an "accuracy" on as many images as n_k."""

    def evaluate(variables, test):
        images = int(federation.task.clients[test].images)
        value = float(np.sum(variables["params"]["trunk"]["kernel"]))
        return Classified({"accuracy": value, "images": images}, np.zeros(images, int), np.zeros(images, int))

    task = dataclasses.replace(federation.task, evaluate=evaluate)
    engine = federation.engine._replace(task=task)
    return dataclasses.replace(federation, engine=engine)


def test_accuracy_is_told_as_the_mean_over_clients_and_over_all_images():
    federation, state = begin(local.make())
    results = {name: Classified({"accuracy": a, "images": n}, np.zeros(n, int), np.zeros(n, int))
               for name, a, n in (("client 0", 0.5, 10), ("client 1", 1.0, 30), ("client 2", 0.75, 20))}  # fmt: skip
    event = simulation.headline(federation, results, [1.0] * 3)
    assert event["mean"]["accuracy"] == pytest.approx(0.75)
    assert event["mean"]["pooled"] == pytest.approx((0.5 * 10 + 1.0 * 30 + 0.75 * 20) / 60)
    assert "pooled" not in event["clients"]["client 0"] and "unseen" not in event


def test_local_epochs_after_the_last_download_are_the_same_for_few_clients_at_a_time():
    found = []
    for share in (1.0, 0.34, 0.67):
        federation, state = begin(Method("fedavg", is_local=is_classifier), participation=share, rounds=1)
        federation = weight_of_the_kernel(federation)
        state = state._replace(server=state.server._replace(round=jnp.int32(1)))
        results = simulation.examine(federation, state, "after").results["after"]
        found.append({name: result.metrics["accuracy"] for name, result in results.items()})
    # One step from (0, 0) goes half of the way to each client's own target.
    assert found[0] == {"client 0": 2.0, "client 1": 0.5, "client 2": 2.25}
    assert found[1] == found[0] == found[2]


def test_the_best_of_the_tests_leaves_the_start_out():
    def event(round_, stage, **means):
        return {"event": "eval", "round": round_, "stage": stage, "mean": means}

    events = [
        event(0, "before", accuracy=0.99, density=1.0),
        event(1, "before", accuracy=0.3, pooled=0.6, density=1.0),
        {"event": "round", "round": 1},
        event(2, "before", accuracy=0.5, pooled=0.4, density=0.5),
        event(2, "after", accuracy=0.7, pooled=None),
    ]
    assert best_of(events) == {"before": {"accuracy": 0.5, "pooled": 0.6}, "after": {"accuracy": 0.7}}


def test_the_first_round_may_be_longer_by_the_tasks_wish():
    federation, _ = begin(local.make(), rounds=5, last__epochs=7)
    engine = federation.engine._replace(task=dataclasses.replace(federation.task, first_epochs=4))
    longer = dataclasses.replace(federation, engine=engine)
    assert [simulation.epochs_of(longer, round_) for round_ in (0, 1, 4)] == [4, 1, 7]
    assert [simulation.epochs_of(federation, round_) for round_ in (0, 1, 4)] == [1, 1, 7]


def test_a_first_upload_that_is_pruned_already_is_not_taken_for_a_dense_one():
    def prune(model, client, context):
        mask = jax.tree.map(lambda leaf: jnp.arange(leaf.size).reshape(leaf.shape) > 0, model)
        return send_all(apply_mask(model, mask), client, context)[0]._replace(mask=mask), client, {}

    sizes = {}
    for name, finish in (("dense", send_all), ("pruned", prune)):
        federation, state = begin(Method(name, is_local=is_classifier, finish=finish))
        state, _ = simulation.run_round(federation, state)
        sizes[name] = state.ledger
    # One float32 less beside the mask's bits; the frame around the values is the same.
    assert sizes["pruned"].up != sizes["dense"].up
    for client, dense in sizes["dense"].dense_payload.items():
        assert abs(sizes["pruned"].dense_payload[client] - dense) <= 8


@pytest.mark.parametrize(("flags", "counts"), [("", "3 3"), ("--xla_force_host_platform_device_count=4", "4 4")])
def test_a_processor_becomes_as_many_devices_as_are_asked_for_while_jax_has_not_begun(flags, counts):
    program = (
        "import jax; from fedklpr_jax.train import split_processor as split; "
        "split(3); first = jax.device_count(); split(2); print(first, jax.device_count())"
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == counts
