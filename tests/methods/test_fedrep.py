"""FedRep: the head moves first, then the body, and every client counts the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import round as rounds
from fedklpr_jax.client_update import ClientUpdate
from fedklpr_jax.config import validate
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ServerContext, ServerState, Uploads
from fedklpr_jax.methods import fedrep, make_method
from tests.federations import tiny_config, tiny_task, tiny_unsupervised_task, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

TARGETS = [[6.0, 0.0], [0.0, 12.0]]


def kernel(tree, name="trunk"):
    return np.asarray(tree["params"][name]["kernel"]).tolist()


def simulate(task, method, epochs, rounds_=1):
    engine = rounds.make_engine(task, method, epochs=epochs)
    server, clients = rounds.start(task, method, seed=0)
    for _ in range(rounds_):
        server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    return server, clients, logs


@pytest.mark.short
def test_the_head_trains_in_the_first_epochs_and_the_body_in_the_others():
    trains = fedrep.make("classifier,bnneck", 2).trains
    for path, expected in (
        ("params/classifier/kernel", [True, True, False, False]),
        ("params/trunk/bnneck/scale", [True, True, False, False]),
        ("params/trunk/conv1/kernel", [False, False, True, True]),
    ):
        assert [bool(trains(path, jnp.int32(epoch))) for epoch in range(4)] == expected, path


@pytest.mark.short
def test_settings_that_would_train_no_body_are_refused():
    validate(tiny_config("fedrep", epochs=11, method__rep__head_epochs=10))
    with pytest.raises(InputError) as caught:
        validate(tiny_config("fedrep", epochs=2, method__rep__head_epochs=2))
    assert str(caught.value).startswith("config.method.rep.head_epochs: 2 is not allowed; give a number below")
    assert tiny_config("fedrep").method.rep.layers == "classifier"
    assert tiny_config("fedrep", task__name="unsupervised").method.rep.layers == "bnneck"


def test_a_round_without_body_epochs_leaves_the_body_as_it_was():
    server, clients, _ = simulate(toy_task(TARGETS), fedrep.make("classifier", 2), epochs=2)
    assert kernel(server.model) == [0.0, 0.0]
    assert [kernel(client.local, "classifier") for client in clients] == [[7.5], [7.5]]


def test_two_rounds_of_one_epoch_each():
    task, method = toy_task(TARGETS), fedrep.make("classifier", 1)
    server, clients, logs = simulate(task, method, epochs=2)
    # The heads go to 5; then the bodies to (3, 0) and (0, 6), whose plain mean it is: one has twice the images.
    assert logs["weight"].tolist() == [0.5, 0.5] and kernel(server.model) == [1.5, 3.0]
    assert [kernel(client.local, "classifier") for client in clients] == [[5.0], [5.0]]
    # The statistics have followed the images of both epochs.
    assert float(server.model["batch_stats"]["trunk"]["count"]) == 2.0
    server, clients, _ = simulate(task, method, epochs=2, rounds_=2)
    # (3.75, 1.5) and (0.75, 7.5).
    assert kernel(server.model) == [2.25, 4.5]
    assert [kernel(client.local, "classifier") for client in clients] == [[7.5], [7.5]]


@pytest.mark.short
def test_a_refused_client_has_no_weight_and_an_absent_one_none_either():
    method = fedrep.make("classifier", 1)
    nan = float("nan")
    uploads = Uploads(
        {"w": jnp.array([1.0, nan, 5.0])}, None, {"images": jnp.array([1.0, 50.0, 9.0])},
        jnp.array([4, 2, 0]), jnp.array([True, False, True]),
    )  # fmt: skip
    server, logs = method.aggregate(ServerState({"w": jnp.float32(7)}, (), jnp.int32(0)), uploads, ServerContext())
    assert logs["weight"].tolist() == [0.5, 0.0, 0.5] and float(server.model["w"]) == 3.0 and int(server.round) == 1
    nobody = uploads._replace(accepted=jnp.zeros(3, bool))
    server, _ = method.aggregate(ServerState({"w": jnp.float32(7)}, (), jnp.int32(0)), nobody, ServerContext())
    assert float(server.model["w"]) == 7.0


def test_on_re_id_what_is_frozen_stays_bit_for_bit():
    task, method = tiny_task(tiny_config("fedrep", method__rep__head_epochs=1))
    stages = ClientUpdate(task, method)
    server, clients = rounds.start(task, method, seed=0)
    engine = rounds.make_engine(task, method, epochs=2)
    message = method.download(server, jnp.int32(0))
    inputs = rounds.round_inputs(engine, [message], clients[:1], [0], seed=0, round_=0)
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    epoch, round_, rate = jax.jit(stages.train_epoch), jnp.int32(0), jnp.float32(1)
    states = [stages.begin(task.arrays, round_, inputs)]
    for number in range(2):
        states.append(epoch(task.arrays, round_, rate, jnp.int32(number), inputs, states[-1]))

    def same(first, second):
        return [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)]

    params, stats = ([state.variables[part] for state in states] for part in ("params", "batch_stats"))
    assert all(same(params[0]["trunk"], params[1]["trunk"]))
    assert not any(same(params[0]["classifier"], params[1]["classifier"]))
    assert all(same(params[1]["classifier"], params[2]["classifier"]))
    assert not any(same(params[1]["trunk"], params[2]["trunk"]))
    assert not any(same(stats[0], stats[1])) and not any(same(stats[1], stats[2]))


def test_a_round_without_labels():
    settings = tiny_config("fedrep", task__name="unsupervised")
    task, method = tiny_unsupervised_task(settings, make_method(settings.method))
    server, clients, logs = simulate(task, method, epochs=2)
    np.testing.assert_allclose(logs["weight"], [1 / 3] * 3, rtol=1e-6)
    scales = [client.local["params"]["trunk"]["bnneck"]["scale"] for client in clients]
    assert all(not np.array_equal(a, b) for k, a in enumerate(scales) for b in scales[:k])
    assert "bnneck" not in server.model["params"]["trunk"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(server.model))
