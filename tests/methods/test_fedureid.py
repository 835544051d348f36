"""FedUReID's personalised update, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import round as rounds
from fedklpr_jax.federated import ClientContext, ClientState, Message
from fedklpr_jax.methods import fedureid, make_method
from fedklpr_jax.methods.fedureid import Memory
from tests.federations import tiny_config, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")


def model(value):
    trunk = {"kernel": jnp.float32(value)}
    return {"params": {"trunk": trunk}, "batch_stats": {"trunk": {"mean": jnp.float32(-value)}}}


def values(tree):
    return [float(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("trained", [True, False])
def test_a_client_starts_from_and_is_tested_with_the_mixture(trained):
    method = fedureid.make(0.25)
    client = ClientState({}, None, Memory(model(8.0), jnp.bool_(trained)))
    # 0.25 x 8 + 0.75 x 4; a client that has not trained takes the download.
    expected = values(model(5.0 if trained else 4.0))
    context = ClientContext(jnp.int32(3), model(4.0), {}, jnp.float32(7), lambda m: jnp.float32(0), lambda v: {})
    begun, same = method.begin(client, context)
    assert values(begun) == expected and same is client
    assert values(method.personalise(Message(model(4.0), None), client)) == expected


def test_what_a_client_trained_is_what_it_keeps_and_sends():
    method = fedureid.make(0.25)
    client = ClientState({}, None, method.client_memory(model(1.0), None))
    assert not client.memory.trained
    context = ClientContext(jnp.int32(0), model(1.0), {}, jnp.float32(7), lambda m: jnp.float32(0), lambda v: {})
    upload, kept, logs = method.finish(model(2.0), client, context)
    assert values(upload.model) == values(kept.memory.model) == values(model(2.0)) and bool(kept.memory.trained)
    assert upload.mask is None and float(upload.scalars["images"]) == 7.0 and logs == {}


@pytest.mark.parametrize("client_map", ["map", "loop"])
def test_rounds_by_hand(client_map):
    # Two clients pulled to 8 and -4, half of the way a round; one has 1 image, the other 2.
    config = tiny_config("fedureid", method__ureid__mu=0.25)
    method = make_method(config.method)
    task = toy_task([[8.0, 8.0], [-4.0, -4.0]])
    engine = rounds.make_engine(task, method, epochs=1, client_map=client_map)
    server, clients = rounds.start(task, method, 0)
    own, mean = np.zeros(2), 0.0
    for round_ in range(3):
        server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
        begun = 0.25 * own + 0.75 * mean if round_ else np.zeros(2)
        own = 0.5 * (begun + np.array([8.0, -4.0]))
        mean = (own[0] + 2 * own[1]) / 3
        np.testing.assert_allclose(logs["weight"], [1 / 3, 2 / 3], rtol=1e-6)
        np.testing.assert_allclose(server.model["params"]["trunk"]["kernel"], [mean, mean], rtol=1e-5, atol=1e-6)
        for k, client in enumerate(clients):
            np.testing.assert_allclose(client.memory.model["params"]["trunk"]["kernel"], own[k], rtol=1e-5)
            deployed = method.personalise(engine.download(server, np.int32(k)), client)
            np.testing.assert_allclose(deployed["params"]["trunk"]["kernel"], 0.25 * own[k] + 0.75 * mean, rtol=1e-5)
    # The classifier never left.
    assert "classifier" not in server.model["params"]
    assert clients[0].local["params"]["classifier"]["kernel"].tolist() == [8.75]


@pytest.mark.short
def test_without_a_share_of_their_own_it_is_fedpav():
    task = toy_task([[8.0, 8.0], [-4.0, -4.0]])
    ends = []
    for name in ("fedureid", "fedpav"):
        method = make_method(tiny_config(name, method__ureid__mu=0.0).method)
        engine = rounds.make_engine(task, method, epochs=2)
        server, clients = rounds.start(task, method, 0)
        for _ in range(2):
            server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
        ends.append(np.asarray(server.model["params"]["trunk"]["kernel"]))
    np.testing.assert_array_equal(*ends)
