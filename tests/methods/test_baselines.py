"""FedAvg, FedPAV, FedProx and Local: what each shares, and one or two rounds of each by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedklpr_jax import exchange
from fedklpr_jax import round as rounds
from fedklpr_jax.config import FIELDS
from fedklpr_jax.federated import Step
from fedklpr_jax.methods import METHODS, fedavg, fedpav, fedprox, local, make_method
from tests.federations import tiny_config, tiny_task, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

# Two clients with one and two images: n_k / n is 1/3 and 2/3.
TARGETS = [[6.0, 0.0], [0.0, 12.0]]


def simulate(task, method, rounds_=1):
    engine = rounds.make_engine(task, method, epochs=1)
    server, clients = rounds.start(task, method, seed=0)
    for _ in range(rounds_):
        server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    return server, clients, logs


def weights(tree, name="trunk"):
    return np.asarray(tree["params"][name]["kernel"]).tolist()


@pytest.mark.short
def test_the_configuration_offers_the_methods_there_are():
    allowed = FIELDS["method.name"].right
    for name in METHODS:
        assert name in allowed and make_method(tiny_config(name).method).name == name


def test_fedavg_averages_everything_by_images():
    # One step takes each client half of the way, the classifiers to 5, and counts one batch.
    server, clients, logs = simulate(toy_task(TARGETS), fedavg.make())
    np.testing.assert_allclose(logs["weight"], [1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(weights(server.model), [1.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(weights(server.model, "classifier"), [5.0], rtol=1e-6)
    assert float(server.model["batch_stats"]["trunk"]["count"]) == pytest.approx(1.0)
    assert int(server.round) == 1 and not jax.tree.leaves(clients)


def test_fedpav_keeps_the_classifier_at_the_client():
    # Client 0's classifier is drawn to 10, client 1's to 20.
    task = toy_task(TARGETS)
    task = dataclasses.replace(
        task,
        loss=lambda arrays, outputs, rows, client: (
            0.5 * jnp.mean(jnp.sum(outputs["embedding"] ** 2, axis=1))
            + 0.5 * jnp.sum((outputs["logits"] - 10.0 * (1 + client.index)) ** 2)
        ),
    )
    server, clients, _ = simulate(task, fedpav.make(), rounds_=2)
    # Round 1: (3, 0) and (0, 6) make (1, 4). Round 2: (3.5, 2) and (0.5, 8) make (1.5, 6).
    np.testing.assert_allclose(weights(server.model), [1.5, 6.0], rtol=1e-6)
    assert "classifier" not in server.model["params"]
    assert [weights(client.local, "classifier") for client in clients] == [[7.5], [15.0]]
    assert float(server.model["batch_stats"]["trunk"]["count"]) == pytest.approx(2.0)


@pytest.mark.short
def test_the_proximal_gradient_is_mu_times_the_way_gone():
    def refused():
        raise AssertionError("the reference model is not needed")

    received = {"params": {"trunk": {"kernel": jnp.array([1.0, 2.0])}}, "batch_stats": {"trunk": {"count": 3.0}}}
    params = {"trunk": {"kernel": jnp.array([4.0, -2.0])}}
    method = fedprox.make(0.1)

    def penalty(params):
        return method.penalty(Step(jnp.int32(0), params, received, {}, refused))

    assert float(penalty(params)) == pytest.approx(0.1 / 2 * (9 + 16))
    np.testing.assert_allclose(jax.grad(penalty)(params)["trunk"]["kernel"], [0.3, -0.4], rtol=1e-6)
    assert make_method(tiny_config("fedprox", method__prox__mu=0.1).method).penalty(
        Step(jnp.int32(0), params, received, {}, refused)
    ) == pytest.approx(1.25)


def test_fedprox_holds_the_trunk_back_and_not_the_classifier():
    # mu = 1: the second step's gradient is (2 - 4) + 1 * (2 - 0) = 0, without the proximal term -2.
    task = toy_task([[4.0, 8.0]], steps=2)
    server, clients, _ = simulate(task, fedprox.make(1.0))
    assert weights(server.model) == [2.0, 4.0] and weights(clients[0].local, "classifier") == [7.5]
    server, clients, _ = simulate(task, fedprox.make(0.0))
    assert weights(server.model) == [3.0, 6.0] and weights(clients[0].local, "classifier") == [7.5]
    # The anchor is the model of this round's download: from (2, 4) the next round goes to (3, 6).
    server, _, _ = simulate(task, fedprox.make(1.0), rounds_=2)
    assert weights(server.model) == [3.0, 6.0]


def test_local_shares_nothing_and_sends_no_byte():
    task, method = toy_task(TARGETS, optimizer=optax.sgd(1.0)), local.make()
    server, clients, _ = simulate(task, method, rounds_=2)
    assert not jax.tree.leaves(server.model) and int(server.round) == 2
    assert [weights(client.local) for client in clients] == [[4.5, 0.0], [0.0, 9.0]]
    assert [weights(client.local, "classifier") for client in clients] == [[7.5], [7.5]]
    # Alone, the other one gone, a client comes to the same.
    _, (alone,), _ = simulate(toy_task(TARGETS[:1]), method, rounds_=2)
    for left, right in zip(jax.tree.leaves(alone), jax.tree.leaves(clients[0]), strict=True):
        np.testing.assert_array_equal(left, right)
    message = method.download(server, jnp.int32(0))
    assert exchange.pack(message.model, message.mask, {}, None) == b""


def test_fedavg_learns_the_union_of_identities_and_the_others_their_own():
    task, _ = tiny_task(tiny_config("fedavg"))
    spans = np.cumsum([0, 57, 42, 38])
    per_client = [np.unique(task.arrays.labels[a:b]) for a, b in zip(spans[:-1], spans[1:], strict=True)]
    trained = [labels[labels >= 0] for labels in per_client]
    # 14, 10 and 10 people less the four held out; every class at one client only, none missing.
    assert [labels.tolist() for labels in trained] == [[*range(10)], [*range(10, 16)], [*range(16, 22)]]
    assert [int(client.task.classes) for client in task.clients] == [22, 22, 22]
    assert task.init(jax.random.key(0))["params"]["classifier"]["kernel"].shape[1] == 22
    for name in ("fedpav", "fedprox", "local", "fedklpr"):
        other, _ = tiny_task(tiny_config(name))
        assert [int(client.task.classes) for client in other.clients] == [10, 6, 6], name
        own = [np.unique(other.arrays.labels[a:b])[1:].tolist() for a, b in zip(spans[:-1], spans[1:], strict=True)]
        assert own == [[*range(10)], [*range(6)], [*range(6)]], name
