"""Encoded and direct messages: the same round, bytes counted by hand, one download for all where all get the same."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import client_maps, refusals, simulation
from fedklpr_jax import round as rounds
from fedklpr_jax.assembly import Federation
from fedklpr_jax.federated import Method, average, send_all, send_global
from fedklpr_jax.methods import fedprox
from fedklpr_jax.methods.fedpav import is_classifier
from fedklpr_jax.metrics import Ledger
from fedklpr_jax.pruning import apply_mask
from tests.federations import tiny_config, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")
TARGETS = ((1.0, 3.0), (2.0, -1.0), (4.0, 0.5))


def first_weight_alone(model):
    """Of the two weights of the trunk the first; everything else stays."""
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool).at[1:].set(False) if leaf.ndim else True, model)


def pruning(model, client, context):
    upload, client, logs = send_all(model, client, context)
    mask = jax.tree.map(jnp.asarray, first_weight_alone(model))
    return upload._replace(model=apply_mask(model, mask), mask=mask), client, logs


def begin(method, devices=1, **settings):
    config = tiny_config("fedpav", epochs=1, **settings)
    engine = rounds.make_engine(toy_task(TARGETS), method, epochs=1, devices=devices)
    server, clients = rounds.start(engine.task, method, 0)
    return Federation(config, [], engine, ()), simulation.RunState(server, clients, Ledger(), 0.0)


def two_rounds(method, devices=1, **settings):
    federation, state = begin(method, devices, **settings)
    events = []
    for _ in range(2):
        state, event = simulation.run_round(federation, state)
        events.append(event)
    return state, events


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("method", [
    Method("fedavg"),
    Method("fedpav", is_local=is_classifier),
    Method("pruned", client_mask=first_weight_alone, finish=pruning),
    Method("its own mean", client_mask=first_weight_alone, finish=pruning, aggregate=lambda *args: average(*args)),
], ids=lambda method: method.name)  # fmt: skip
def test_direct_messages_give_the_same_round(method, devices):
    encoded, events = two_rounds(method)
    direct, others = two_rounds(method, devices, wire__encode=False)
    for a, b in zip(jax.tree.leaves((encoded.server, list(encoded.clients))),
                    jax.tree.leaves((direct.server, list(direct.clients))), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for event, other in zip(events, others, strict=True):
        assert event["refused"] == other["refused"] == []
        for name, row in event["clients"].items():
            for key in row.keys() - {"bytes_up", "bytes_down"}:
                assert row[key] == pytest.approx(other["clients"][name][key], rel=1e-6)


def test_the_mean_is_taken_on_the_way_where_it_is_fedavgs():
    assert begin(Method("fedavg"))[0].engine.update_summed
    assert not begin(Method("other", aggregate=lambda *args: average(*args)))[0].engine.update_summed
    engine = rounds.make_engine(toy_task(TARGETS), Method("fedavg"), epochs=1, client_map="vmap")
    assert engine.update_summed is None


def test_the_bytes_of_direct_messages_by_hand():
    # Two weights of the trunk, one of the classifier, one statistic; up goes the number of images too.
    _, (event, _) = two_rounds(Method("fedavg"), wire__encode=False)
    assert {(row["bytes_down"], row["bytes_up"]) for row in event["clients"].values()} == {(16, 20)}
    # Of the four one is pruned; four entries take one byte of mask.
    state, (event, _) = two_rounds(Method("pruned", finish=pruning), wire__encode=False)
    assert {(row["bytes_down"], row["bytes_up"]) for row in event["clients"].values()} == {(16, 17)}
    assert state.ledger.dense_total == 3 * 4 * 20

    def masked(server, client):
        message = send_global(server, client)
        mask = jax.tree.map(jnp.asarray, first_weight_alone(message.model))
        return message._replace(model=apply_mask(message.model, mask), mask=mask)

    _, (event, _) = two_rounds(Method("pruned down", download=masked), wire__encode=False)
    assert {row["bytes_down"] for row in event["clients"].values()} == {13}
    nothing, (event, _) = two_rounds(Method("local", is_local=lambda path: True), wire__encode=False)
    assert nothing.ledger == Ledger() and not event["refused"]


@pytest.mark.parametrize("aggregate", [average, lambda *args: average(*args)], ids=["summed", "stacked"])
def test_a_direct_upload_that_is_not_finite_is_refused(aggregate):
    def spoil(model, client, context):
        upload, client, logs = send_all(model, client, context)
        bad = context.images == 2
        return upload._replace(model=jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), upload.model)), client, logs

    state, events = two_rounds(Method("spoilt", finish=spoil, aggregate=aggregate), wire__encode=False)
    assert [event["refused"] for event in events] == [
        [{"client": "client 1", "reason": refusals.NOT_FINITE}]
    ] * 2
    # Each round half of the way to the mean of the other two, weighted 1 to 3.
    np.testing.assert_allclose(state.server.model["params"]["trunk"]["kernel"], np.array([3.25, 1.125]) * 0.75)
    assert [row["weight"] for row in events[1]["clients"].values()] == [0.25, 0.0, 0.75]


@pytest.mark.parametrize(
    "how",
    [{}, {"client_map": "vmap"}, {"client_map": "loop"}, {"client_map": "pmap", "devices": 2}, {"devices": 2}],
    ids=lambda how: "-".join(map(str, how.values())) or "map",
)
def test_one_download_for_all_is_as_good_as_one_for_each(how):
    task, method = toy_task(TARGETS, steps=2), fedprox.make(0.5)
    assert method.broadcasts and not dataclasses.replace(method, download=lambda *a: send_global(*a)).broadcasts
    engine = rounds.make_engine(task, method, epochs=1, **how)
    server, clients = rounds.start(task, method, 3)
    message = engine.download(server, np.int32(0))
    for update in (lambda inputs: engine.update(0, np.ones(1), inputs)[0].model,
                   lambda inputs: engine.fine_tune(0, np.ones(1), inputs)):  # fmt: skip
        each, common = (
            update(rounds.round_inputs(engine, messages, clients, range(3), seed=3, round_=0))
            for messages in ([message] * 3, client_maps.Common(message))
        )
        for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(common), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encode", [True, False])
@pytest.mark.parametrize("method", [
    Method("fedpav", is_local=is_classifier),
    Method("pruned", client_mask=first_weight_alone, finish=pruning, aggregate=lambda *args: average(*args)),
], ids=lambda method: method.name)  # fmt: skip
def test_only_the_first_round_compiles(method, encode):
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        federation, state = begin(method, wire__encode=encode, participation=0.67)
        counts = []
        for _ in range(4):
            state, event = simulation.run_round(federation, state)
            counts.append((len(compiled), tuple(event["clients"])))
    finally:
        jax.monitoring.clear_event_listeners()
    assert len({clients for _, clients in counts}) > 1, "other clients take part"
    assert counts[0][0] > 0 and {count for count, _ in counts} == {counts[0][0]}
