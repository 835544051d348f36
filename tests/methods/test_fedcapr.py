"""FedCAPR's penalty and its cosine distance weight, by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedklpr_jax import round as rounds
from fedklpr_jax.federated import ClientContext, ClientState, ServerContext, ServerState, Step, Uploads
from fedklpr_jax.methods import fedcapr, make_method
from tests.federations import tiny_config, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

# A right angle and the same direction: a mean distance of one half.
REFERENCE = jnp.array([[3.0, 0.0], [1.0, 1.0]])
LOCAL = jnp.array([[0.0, 2.0], [4.0, 4.0]])


def step(round_, local):
    return Step(jnp.int32(round_), {}, {}, {"embedding": local}, lambda: {"embedding": REFERENCE})


@pytest.mark.short
def test_the_penalty_by_hand_none_in_round_zero():
    method = make_method(tiny_config("fedcapr", method__capr__weight=0.13).method)
    assert float(method.penalty(step(0, LOCAL))) == 0.0
    for round_ in (1, 7):
        assert float(method.penalty(step(round_, LOCAL))) == pytest.approx(0.13 / 2, rel=1e-6)


@pytest.mark.short
def test_the_penalty_turns_features_towards_the_received_ones_from_round_one_on():
    gradient = jax.grad(lambda local, round_: fedcapr.make(2.0).penalty(step(round_, local)))
    assert gradient(LOCAL, 0).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    # d cos / d (0, 2) is (1/2, 0); of that 2 / 2, downhill.
    np.testing.assert_allclose(gradient(LOCAL, 1), [[-0.5, 0.0], [0.0, 0.0]], atol=1e-6)


def test_the_weight_of_a_client_is_how_far_its_features_turned_on_its_batch():
    # The classifier stays local: the received model is probed with the one the client had then.
    def probe(variables):
        params = variables["params"]
        return {"embedding": params["trunk"]["kernel"] + params["classifier"]["kernel"]}

    def tree(trunk, classifier):
        return {"params": {"trunk": {"kernel": trunk}}}, {"params": {"classifier": {"kernel": classifier}}}

    method = fedcapr.make(0.13)
    assert method.is_local("params/classifier/kernel") and not method.is_local("batch_stats/trunk/mean")
    received, had = tree(REFERENCE - 1.0, jnp.float32(1.0))
    trained, has = tree(LOCAL - 3.0, jnp.float32(3.0))
    context = ClientContext(jnp.int32(0), received, had, jnp.float32(7), lambda model: jnp.float32(0), probe)
    upload, client, logs = jax.jit(lambda model, state: method.finish(model, state, context))(
        trained, ClientState(has, None, ())
    )
    assert float(upload.scalars["cdw"]) == pytest.approx(0.5, abs=1e-6) and float(upload.scalars["images"]) == 7.0
    np.testing.assert_array_equal(upload.model["params"]["trunk"]["kernel"], trained["params"]["trunk"]["kernel"])
    assert upload.mask is None and logs == {} and float(client.local["params"]["classifier"]["kernel"]) == 3.0


def aggregate(cdw, *, images=(10.0, 30.0, 60.0), accepted=(True, True, True), values=(1.0, 5.0, 9.0)):
    """The kernel and the batch-norm mean after the server step, and its logs; client k's are v_k and 10 v_k."""

    def tree(value):
        return {"params": {"kernel": value}, "batch_stats": {"mean": 10.0 * value}}

    uploads = Uploads(
        tree(jnp.array(values)),
        None,
        {"cdw": jnp.array(cdw), "images": jnp.array(images)},
        jnp.arange(3),
        jnp.array(accepted),
    )
    server, logs = fedcapr.make(0.13).aggregate(
        ServerState(tree(jnp.float32(2.0)), (), jnp.int32(4)), uploads, ServerContext()
    )
    assert int(server.round) == 5
    return float(server.model["params"]["kernel"]), float(server.model["batch_stats"]["mean"]), logs


@pytest.mark.short
def test_the_whole_state_is_averaged_by_the_distances():
    kernel, mean, logs = aggregate([0.1, 0.3, 0.4])
    np.testing.assert_allclose(logs["weight"], [1 / 8, 3 / 8, 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(logs["cdw"], [0.1, 0.3, 0.4], rtol=1e-6)
    assert kernel == pytest.approx((1 + 3 * 5 + 4 * 9) / 8) and mean == pytest.approx(10 * kernel)


@pytest.mark.short
@pytest.mark.parametrize("nan", [float("nan"), 1e9])
def test_a_refused_client_has_no_weight(nan):
    kernel, mean, logs = aggregate([0.1, nan, 0.3], accepted=(True, False, True), values=(1.0, float("nan"), 9.0))
    np.testing.assert_allclose(logs["weight"], [0.25, 0.0, 0.75], rtol=1e-6)
    assert (kernel, mean) == (pytest.approx(7.0), pytest.approx(70.0)) and float(logs["cdw"][1]) == 0.0
    # All refused: the model stays.
    kernel, mean, logs = aggregate([0.1, 0.2, 0.3], accepted=(False, False, False))
    assert (kernel, mean) == (2.0, 20.0) and logs["weight"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.short
def test_where_nobody_moved_the_number_of_images_decides():
    # Rounding may even take a distance below 0.
    for cdw in ([0.0, 0.0, 0.0], [-6e-8, 0.0, -1e-7]):
        _, _, logs = aggregate(cdw)
        np.testing.assert_allclose(logs["weight"], [0.1, 0.3, 0.6], rtol=1e-6)
    _, _, logs = aggregate([0.0, 0.0, 0.0], accepted=(True, False, True))
    np.testing.assert_allclose(logs["weight"], [1 / 7, 0.0, 6 / 7], rtol=1e-6)
    # One who moved outweighs those who did not, one rounded below 0 among them.
    _, _, logs = aggregate([-6e-8, 0.02, 0.0])
    np.testing.assert_allclose(logs["weight"], [0.0, 1.0, 0.0], atol=1e-6)


def test_two_rounds_of_two_clients():
    # The embedding is the trunk itself; each step goes half of the way to the client's target. The server starts at
    # (1, 0): client 0 goes to (2, 0) and does not turn, client 1 to (0.5, 0.5) and turns by 45 degrees.
    task = toy_task([[3.0, 0.0], [0.0, 1.0]], optimizer=optax.sgd(1.0))
    task = dataclasses.replace(
        task,
        init=lambda key: {
            "params": {"trunk": {"kernel": jnp.array([1.0, 0.0])}, "classifier": {"kernel": jnp.zeros(1)}},
            "batch_stats": {"trunk": {"count": jnp.float32(0)}},
        },
        forward=lambda variables, inputs, client, train, key: (
            {
                "embedding": jnp.broadcast_to(variables["params"]["trunk"]["kernel"], (len(inputs), 2)),
                "inputs": inputs,
                "logits": variables["params"]["classifier"]["kernel"],
            },
            {"trunk": {"count": variables["batch_stats"]["trunk"]["count"] + (1.0 if train else 0.0)}},
        ),
        loss=lambda arrays, outputs, rows, client: (
            0.5 * jnp.mean(jnp.sum((outputs["embedding"] - outputs["inputs"]) ** 2, axis=1))
        ),
    )
    method = fedcapr.make(0.4)
    engine = rounds.make_engine(task, method, epochs=1)
    server, clients = rounds.start(task, method, seed=0)
    server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    np.testing.assert_allclose(logs["cdw"], [0.0, 1 - np.sqrt(0.5)], atol=1e-6)
    np.testing.assert_allclose(server.model["params"]["trunk"]["kernel"], [0.5, 0.5], atol=1e-5)
    server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    # Now the penalty is on, but at its own minimum, the received model: (1.75, 0.25) and (0.25, 0.75).
    turned = [1 - (7 + 1) / np.sqrt(2 * 50), 1 - (1 + 3) / np.sqrt(2 * 10)]
    np.testing.assert_allclose(logs["cdw"], turned, atol=1e-6)
    weights = np.array(turned) / sum(turned)
    expected = weights @ np.array([[1.75, 0.25], [0.25, 0.75]])
    np.testing.assert_allclose(server.model["params"]["trunk"]["kernel"], expected, atol=1e-5)
    assert float(server.model["batch_stats"]["trunk"]["count"]) == pytest.approx(2.0)
