"""Sub-FedAvg's masks, its three gates and its server step, by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import pruning
from fedklpr_jax import round as rounds
from fedklpr_jax.config import validate
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientContext, ClientState, Method, ServerContext, ServerState, Uploads
from fedklpr_jax.methods import make_method
from tests.federations import tiny_config, tiny_task, tiny_unsupervised_task, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

PUBLISHED = {"step": 0.1, "target": 0.3, "eps": 1e-4, "threshold": 0.5}


def config(**changes):
    return tiny_config("subfedavg", **{f"method__sub__{name}": value for name, value in changes.items()})


def make(**changes) -> Method:
    return make_method(config(**(PUBLISHED | changes)).method)


def model(a, b=(1.0, 2.0), bias=(0.0,)):
    return {"params": {"a": {"kernel": jnp.array(a), "bias": jnp.array(bias)}, "b": {"kernel": jnp.array(b)}}}


def masks(a, b=(1, 1)):
    kept = {"params": {"a": {"kernel": jnp.array(a, bool), "bias": jnp.ones(1, bool)}}}
    kept["params"]["b"] = {"kernel": jnp.array(b, bool)}
    return kept


def kernel(tree, name="a"):
    return np.asarray(tree["params"][name]["kernel"]).tolist()


def scored(score):
    """A context in which every model has this validation score, or a function of it."""
    of = score if callable(score) else lambda variables: jnp.float32(score)
    return ClientContext(jnp.int32(0), {}, {}, jnp.float32(7), of, lambda variables: {})


@pytest.mark.short
def test_the_defaults_are_the_published_ones():
    assert {name: config().method.sub[name] for name in PUBLISHED} == PUBLISHED
    assert config().method.sub.local == "classifier" and config(local="").method.sub.local == ""
    assert make().is_local("params/classifier/kernel") and not make(local="").is_local("params/classifier/kernel")


@pytest.mark.short
def test_one_epoch_a_round_is_refused_because_nothing_would_ever_be_pruned():
    with pytest.raises(InputError, match=r"^config\.epochs: 1 is not allowed; .* from 2$"):
        validate(tiny_config("subfedavg", epochs=1))
    validate(tiny_config("subfedavg", epochs=2))
    validate(tiny_config("fedavg", epochs=1))


@pytest.mark.short
def test_the_hamming_distance_by_hand():
    # (1 of 4 + 1 of 2) / 2; the bias is no layer.
    assert float(pruning.hamming_distance(masks([1, 1, 1, 0], [1, 0]), masks([1, 0, 1, 0], [1, 1]))) == 0.375
    assert float(pruning.hamming_distance(masks([1, 1]), masks([1, 1]))) == 0.0


@pytest.mark.short
def test_a_traced_share_counts_like_a_constant_one():
    shares = [0.0, 0.0001, 0.05, 0.1, 0.2, 0.3, 0.7, 0.9999, 1.0]
    for number in (3, 5, 10, 729, 20_000_003):
        traced = jax.vmap(lambda share, n=number: pruning._floor_share(jnp.int32(n), share))(jnp.array(shares))
        assert traced.tolist() == [int(pruning._floor_share(jnp.int32(number), share)) for share in shares]


def test_the_first_epochs_candidate_is_remembered_and_the_later_ones_are_not():
    method, full = make(step=0.5, target=0.9), masks([1, 1, 1, 1])
    state = ClientState({}, full, method.client_memory(model([0.0] * 4), full))
    end = jax.jit(lambda tree, state, epoch: method.on_epoch_end(tree, state, scored(0.9), epoch))
    first = model([4.0, -1.0, 2.0, 3.0], [-2.0, 1.0])
    trained, state = end(first, state, jnp.int32(0))
    # Half of each layer, not half of all six.
    assert kernel(state.memory) == [True, False, False, True] and kernel(state.memory, "b") == [True, False]
    assert kernel(trained) == [4.0, -1.0, 2.0, 3.0] and kernel(state.mask) == [True] * 4
    _, state = end(model([1.0, 2.0, 3.0, 4.0]), state, jnp.int32(1))
    assert kernel(state.memory) == [True, False, False, True]


# Trained to these weights a half of each layer would leave LAST.
TRAINED, LAST = model([4.0, 1.0, 2.0, 3.0], [2.0, 1.0], [0.001]), masks([1, 0, 0, 1], [1, 0])


@pytest.mark.parametrize(
    ("first", "held", "changes", "score", "decision"),
    [
        (masks([1, 0, 1, 0], [1, 0]), None, {}, 0.51, "accepted"),
        (masks([1, 0, 1, 0], [1, 0]), None, {}, 0.5, "rejected"),
        # Two of four and none of two: 1/4 on average.
        (masks([1, 0, 1, 0], [1, 0]), None, {"eps": 0.25}, 0.9, "none"),
        (masks([1, 0, 1, 0], [1, 0]), None, {"eps": 0.24}, 0.9, "accepted"),
        (LAST, None, {}, 0.9, "none"),
        # Two of the six are gone: no step at a target of a third.
        (masks([1, 0, 1, 0], [1, 0]), masks([1, 0, 1, 1], [1, 0]), {"target": 1 / 3}, 0.9, "target"),
    ],
)
def test_a_step_needs_a_moving_mask_room_and_a_good_model(first, held, changes, score, decision):
    method = make(**({"step": 0.5, "target": 0.9} | changes))
    held = masks([1, 1, 1, 1]) if held is None else held
    trained = pruning.apply_mask(TRAINED, held)
    seen = []

    def score_of(variables):
        seen.append(variables)
        return jnp.float32(score)

    upload, state, logs = method.finish(trained, ClientState({}, held, first), scored(score_of))
    assert pruning.DECISIONS[int(logs["decision"])] == decision
    mask = LAST if decision == "accepted" else held
    assert kernel(state.mask) == kernel(upload.mask) == kernel(mask)
    assert kernel(state.mask, "b") == kernel(upload.mask, "b") == kernel(mask, "b")
    assert kernel(upload.model) == kernel(pruning.apply_mask(TRAINED, mask))
    assert upload.model["params"]["a"]["bias"].tolist() == pytest.approx([0.001]) and upload.scalars == {"images": 7.0}
    # What is scored is the pruned model.
    if decision != "target":
        assert kernel(seen[0]) == [4.0, 0.0, 0.0, 3.0] and float(logs["distance"]) <= 0.25


def test_near_the_target_the_steps_are_smaller():
    weights = {"params": {"a": {"kernel": jnp.arange(1.0, 1001.0)}}}
    method = make()
    finish = jax.jit(lambda state: method.finish(weights, state, scored(0.9)))

    def left_from(alive, rounds_):
        mask = {"params": {"a": {"kernel": jnp.arange(1000) >= 1000 - alive}}}
        # An earlier candidate that differs from every later one.
        state = ClientState({}, mask, jax.tree.map(jnp.zeros_like, mask))
        counts = []
        for _ in range(rounds_):
            _, state, logs = finish(state)
            counts.append(int(state.mask["params"]["a"]["kernel"].sum()))
        return counts, pruning.DECISIONS[int(logs["decision"])]

    # 19 % is not yet near: 10 % of 810 go. At 27.1 % it is (30 - 27.1) / 72.9 = 3.98 % of 729.
    assert left_from(1000, 5) == ([900, 810, 729, 700, 700], "target")
    # At 25 % it would be 5 / 75 = 6.67 %, more than 5 %.
    assert left_from(750, 1) == ([713], "accepted")


def uploads_of(accepted, clients=(0, 1)):
    """The worked numbers: two clients that keep different weights, and have unequal numbers of images."""
    nan = float("nan")
    second = [4.0, 6.0, 0.0, 0.0] if accepted[1] else [nan] * 4
    both = [model([2.0, 0.0, 4.0, 0.0], [1.0, 1.0], [10.0]), model(second, [5.0, 3.0], [30.0])]
    kept = [masks([1, 0, 1, 0]), masks([1, 1, 0, 0])]
    together, mask = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (both, kept))
    return Uploads(together, mask, {"images": jnp.array([1.0, 99.0])}, jnp.array(clients), jnp.array(accepted))


@pytest.mark.short
def test_the_server_takes_the_mean_over_those_who_keep_a_weight():
    method, previous = make(), model([9.0] * 4, [9.0, 9.0], [9.0])
    server = ServerState(previous, method.server_memory(previous, 3), jnp.int32(4))
    # Client 1 is absent.
    merged, logs = method.aggregate(server, uploads_of([True, True], (0, 2)), ServerContext())
    assert logs["weight"].tolist() == [0.5, 0.5] and int(merged.round) == 5
    assert kernel(merged.model) == [3.0, 6.0, 4.0, 9.0] and kernel(merged.model, "b") == [3.0, 2.0]
    assert merged.model["params"]["a"]["bias"].tolist() == [20.0]
    assert kernel(merged.memory) == [[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    message = method.download(merged, jnp.int32(2))
    assert kernel(message.model) == [3.0, 6.0, 0.0, 0.0] and kernel(message.mask) == [True, True, False, False]
    assert kernel(method.download(merged, jnp.int32(1)).model) == [3.0, 6.0, 4.0, 9.0]
    assert method.personalise(message, ClientState({}, message.mask, ())) is message.model


@pytest.mark.short
def test_a_refused_client_has_no_weight_and_keeps_its_old_mask():
    method, previous = make(), model([9.0] * 4, [9.0, 9.0], [9.0])
    server = ServerState(previous, method.server_memory(previous, 2), jnp.int32(4))
    merged, logs = method.aggregate(server, uploads_of([True, False]), ServerContext())
    assert logs["weight"].tolist() == [1.0, 0.0] and kernel(merged.model) == [2.0, 9.0, 4.0, 9.0]
    assert kernel(merged.memory) == [[1, 0, 1, 0], [1, 1, 1, 1]]
    merged, logs = method.aggregate(server, uploads_of([False, False]), ServerContext())
    assert logs["weight"].tolist() == [0.0, 0.0] and kernel(merged.model) == [9.0] * 4
    assert kernel(merged.memory) == [[1] * 4] * 2 and int(merged.round) == 5


@pytest.mark.parametrize(("threshold", "pruned"), [(0.5, True), (1.0, False)])
def test_three_rounds_of_two_clients(threshold, pruned):
    # The score, the local classifier over ten, is 3/4 after round 1, 15/16 after round 2, and never above 1.
    task = toy_task([[8.0, 4.0], [0.0, 20.0]])
    score = task.score
    task = dataclasses.replace(task, score=lambda *args: score(*args) / 10.0)
    method = make(step=0.5, target=0.9, threshold=threshold)
    engine = rounds.make_engine(task, method, epochs=2)
    server, clients = rounds.start(task, method, seed=0)

    def trunk(tree):
        return np.asarray(tree["params"]["trunk"]["kernel"]).tolist()

    # From 0 the order of the weights is that of the targets all along: the masks do not move.
    server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    assert trunk(server.model) == [3.0, 9.0] and trunk(server.memory) == [[True] * 2] * 2
    assert logs["weight"].tolist() == [0.5, 0.5]
    # Client 0: (5.5, 6.5), then (6.75, 5.25): the smaller one is another. Client 1: (1.5, 14.5), then (0.75, 17.25).
    server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    kept = [[True, not pruned], [True, True]]
    assert trunk(server.memory) == kept and [trunk(client.mask) for client in clients] == kept
    assert trunk(server.model) == [3.75, 17.25 if pruned else 11.25]
    assert float(server.model["batch_stats"]["trunk"]["count"]) == 4.0
    # The pruned weight is not trained: (3.75, 0) goes to (6.9375, 0). Of one weight half is none.
    server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    assert trunk(server.memory)[0] == kept[0] and float(clients[0].local["params"]["classifier"]["kernel"][0]) > 9.8
    if pruned:
        assert trunk(server.model) == [3.9375, 19.3125]


@pytest.mark.parametrize("task_name", ["supervised", "unsupervised"])
def test_a_round_on_re_id(task_name):
    settings = tiny_config("subfedavg", task__name=task_name, method__sub__threshold=0.0, method__sub__eps=0.0)
    task, method = (tiny_task if task_name == "supervised" else tiny_unsupervised_task)(settings)
    engine = rounds.make_engine(task, method, epochs=2)
    server, clients = rounds.start(task, method, seed=0)
    server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    np.testing.assert_allclose(logs["weight"], [1 / 3] * 3, rtol=1e-6)
    for k, client in enumerate(clients):
        # A tenth of every layer, rounded down.
        assert 0.9 <= float(pruning.density(client.mask)) < 0.91
        for held, own in zip(jax.tree.leaves(server.memory), jax.tree.leaves(client.mask), strict=True):
            np.testing.assert_array_equal(held[k], own)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(server.model))
