"""All ways of mapping clients give the same round, and the sums over devices meet once."""

import dataclasses
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import aggregation, client_maps, pruning
from fedklpr_jax import round as rounds
from fedklpr_jax.federated import ClientContext, Method, Uploads
from tests.federations import TINY, tiny_config, tiny_task

SEED = 3


def start(config, method=None):
    task, method = tiny_task(config, method)
    server, clients = rounds.start(task, method, SEED)
    # As after a first round: the KL loss is on and pruning is allowed.
    server = server._replace(round=jnp.int32(1))
    if hasattr(clients[0].memory, "recovery"):
        clients = [
            c._replace(memory=c.memory._replace(recovery=c.memory.recovery._replace(rounds=np.int32(1))))
            for c in clients
        ]
    return task, method, server, clients


def one_round(method, **how):
    config = tiny_config(method, method__crr__drop=1.0)
    task, method, server, clients = start(config)
    engine = rounds.make_engine(task, method, epochs=2, **how)
    server, clients, logs = rounds.simulate(engine, server, clients, seed=SEED)
    return jax.device_get(server), clients, logs


@pytest.fixture(scope="module")
def reference():
    return one_round("fedklpr", client_map="map")


def differing_mask_bits(left, right):
    pairs = [
        (a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(jax.tree.leaves(one.mask), jax.tree.leaves(other.mask), strict=True)
    ]
    return sum((a != b).sum() for a, b in pairs) / sum(a.size for a, _ in pairs)


@pytest.mark.parametrize(
    "how",
    [
        {"client_map": "auto"},
        {"client_map": "vmap"},
        {"client_map": "vmap", "chunk": 2},
        {"client_map": "loop"},
        {"client_map": "pmap", "devices": 2},
        {"client_map": "map", "devices": 4},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_every_client_map_gives_the_same_round(reference, how):
    # Three clients on two or four devices also exercise the padding.
    server, clients, logs = one_round("fedklpr", **how)
    assert all(float(pruning.density(c.mask)) < 0.9 for c in clients), "pruning must have happened"
    # A magnitude at the threshold may fall on either side of it: few bits, and only there may values differ by much.
    assert differing_mask_bits(clients, reference[1]) < 2e-3
    for name, values in reference[2].items():
        np.testing.assert_allclose(logs[name], values, rtol=2e-3, err_msg=name)
    for a, b in zip(jax.tree.leaves(server.model), jax.tree.leaves(reference[0].model), strict=True):
        assert np.mean(~np.isclose(a, b, rtol=1e-3, atol=2e-4)) < 5e-3


def test_a_round_is_a_pure_function_of_its_seed(reference):
    again = one_round("fedklpr", client_map="map")
    for a, b in zip(jax.tree.leaves((again[0], again[1])), jax.tree.leaves((reference[0], reference[1])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["fedklpr", "cahfp", "fedavg"])
def test_a_whole_round_lowers_for_a_tpu(name):
    """Lowering alone: no TPU has run it. The convolution is the one that is chosen there."""
    config = tiny_config(name)
    task, method = tiny_task(config, spec=dataclasses.replace(TINY, convolution="stock"))
    server, clients = rounds.start(task, method, SEED)
    engine = rounds.make_engine(task, method, epochs=1)
    everyone = range(len(clients))
    messages = [engine.download(server, np.int32(k)) for k in everyone]
    inputs = rounds.round_inputs(engine, messages, clients, everyone, seed=SEED, round_=1)

    def whole(server, inputs):
        uploads, states, logs = engine.update(1, rounds.rates(task, 1, 1), inputs)
        together = Uploads(*uploads, np.arange(len(clients), dtype=np.int32), np.ones(len(clients), bool))
        return engine.aggregate(server, together), states, logs

    lowered = jax.export.export(jax.jit(whole), platforms=["tpu"])(server, inputs)
    text = lowered.mlir_module()
    assert lowered.platforms == ("tpu",) and "stablehlo.convolution" in text


def test_clients_run_their_own_number_of_steps():
    config = tiny_config("fedpav")
    task, method = tiny_task(config)
    server, clients = rounds.start(task, method, SEED)
    engine = rounds.make_engine(task, method, epochs=1)
    messages = [engine.download(server, np.int32(k)) for k in range(3)]
    inputs = rounds.round_inputs(engine, messages, clients, range(3), seed=SEED, round_=0)
    assert inputs.steps.tolist() == [task.plan(SEED, 0, k, 1).shape[1] for k in range(3)]
    assert inputs.steps[0] > inputs.steps[1] == inputs.steps[2]
    # What stands in the padding is never looked at.
    dirty = inputs.plan.copy()
    for k, steps in enumerate(inputs.steps):
        dirty[k, :, steps:] = 7
    clean = engine.update(0, np.ones(1), inputs)
    for a, b in zip(
        jax.tree.leaves(clean), jax.tree.leaves(engine.update(0, np.ones(1), inputs._replace(plan=dirty))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # And a client with no step at all comes back as it went.
    nothing = engine.update(0, np.ones(1), inputs._replace(steps=np.zeros_like(inputs.steps)))
    for a, b in zip(jax.tree.leaves(nothing[0].model), jax.tree.leaves(inputs.message.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_loop_names_stage_and_client():
    def explode(client, context: ClientContext):
        raise ZeroDivisionError("no such luck")

    config = tiny_config("fedpav")
    task, _ = tiny_task(config)
    method = Method("broken", begin=explode)
    server, clients = rounds.start(task, method, SEED)
    engine = rounds.make_engine(task, method, epochs=1, client_map="loop")
    with pytest.raises(client_maps.StageError, match=re.escape("client pier, stage begin: no such luck")):
        rounds.simulate(engine, server, clients, seed=SEED)
    with pytest.raises(ValueError, match="client_map"):
        rounds.make_engine(task, method, epochs=1, client_map="threads")


@pytest.mark.parametrize("clients", [3, 4, 9])
def test_the_mean_over_devices_is_the_mean(clients):
    random = np.random.default_rng(clients)
    params = {"w": random.normal(size=(clients, 5)).astype(np.float32)}
    masks = {"w": random.random((clients, 5)) < 0.5}
    weights = random.random(clients).astype(np.float32)
    previous = {"w": np.full(5, 9, np.float32)}
    sharded = jax.jit(rounds._sharded_mean(client_maps.client_mesh(4)))
    for kept in (masks, None):
        expected = aggregation.masked_mean(params, kept, weights, previous)
        np.testing.assert_allclose(sharded(params, kept, weights, previous)["w"], expected["w"], rtol=1e-5)


def test_the_server_step_donates_its_state_and_leaves_the_refused_out():
    config = tiny_config("fedpav")
    task, method = tiny_task(config)
    server, _ = rounds.start(task, method, SEED)
    engine = rounds.make_engine(task, method, epochs=1)
    model = jax.tree.map(np.array, server.model)  # copies: a view would keep the donated buffers alive
    uploads = Uploads(
        jax.tree.map(lambda x: np.stack([x + 1, x + 3, np.full_like(x, np.nan)]), model),
        None,
        {"images": np.float32([10, 30, 50])},
        np.arange(3, dtype=np.int32),
        np.array([True, True, False]),
    )
    after, logs = engine.aggregate(server, uploads)
    assert logs["weight"].tolist() == [0.25, 0.75, 0.0]
    for new, old in zip(jax.tree.leaves(after.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(new, old + 2.5, rtol=1e-5, atol=1e-6)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(server.model))
    # All refused: the model stays as it was.
    kept, _ = engine.aggregate(after, uploads._replace(accepted=np.zeros(3, bool)))
    for new, old in zip(jax.tree.leaves(kept.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(new, old + 2.5, rtol=1e-5, atol=1e-6)


def test_keys_differ_by_seed_round_and_client():
    keys = {tuple(jax.random.key_data(rounds.client_key(*where)).tolist())
            for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}  # fmt: skip
    assert len(keys) == 4
