"""LotteryFL's tickets: what is cut, when, and what the rest is rewound to, by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import pruning
from fedklpr_jax import round as rounds
from fedklpr_jax.federated import ClientContext, ClientState, Method
from fedklpr_jax.methods import make_method, subfedavg
from tests.federations import tiny_config, tiny_task, tiny_unsupervised_task, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

PUBLISHED = {"step": 0.2, "start": 0.2, "end": 0.1}
FIRST = {
    "params": {"layer": {"kernel": jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), "bias": jnp.array([6.0])}},
    "batch_stats": {"norm": {"mean": jnp.array([7.0])}},
}
# The interpolated 20 % quantile of the magnitudes is 0.18.
RECEIVED = {
    "params": {"layer": {"kernel": jnp.array([0.1, -0.2, 0.3, -0.4, 0.5]), "bias": jnp.array([0.01])}},
    "batch_stats": {"norm": {"mean": jnp.array([0.7])}},
}


def make(**changes) -> Method:
    settings = {f"method__lottery__{name}": value for name, value in (PUBLISHED | changes).items()}
    return make_method(tiny_config("lotteryfl", **settings).method)


def start_of(method: Method) -> ClientState:
    mask = pruning.full_mask(FIRST)
    return ClientState({}, mask, method.client_memory(FIRST, mask))


def scored(received, score):
    return ClientContext(jnp.int32(3), received, {}, jnp.float32(7), lambda tree: jnp.float32(score), lambda tree: {})


def values(tree):
    return np.asarray(tree["params"]["layer"]["kernel"]).tolist()


def test_the_defaults_are_the_published_ones():
    settings = tiny_config("lotteryfl").method.lottery
    assert {name: settings[name] for name in PUBLISHED} == PUBLISHED and settings.local == "classifier"
    assert make().is_local("params/classifier/bias") and not make(local="").is_local("params/classifier/bias")
    assert make().needs_score


def test_a_ticket_is_cut_from_the_download_and_rewound():
    method = make()
    assert np.quantile(np.abs(values(RECEIVED)), 0.2) == pytest.approx(0.18)
    model, state = method.begin(start_of(method), scored(RECEIVED, 0.21))
    assert values(state.mask) == [False, True, True, True, True]
    assert state.mask["params"]["layer"]["bias"].tolist() == [True]
    assert values(model) == [0.0, 2.0, 3.0, 4.0, 5.0]
    assert model["params"]["layer"]["bias"].tolist() == [6.0] and model["batch_stats"]["norm"]["mean"].tolist() == [7.0]
    assert float(state.memory.rate) == pytest.approx(0.8)
    # What is remembered stays whole: a later ticket is rewound to the same weights.
    assert values(state.memory.initial) == values(FIRST)
    upload, after, logs = method.finish(model, state, scored(RECEIVED, 0.21))
    assert values(upload.model) == values(model) and values(upload.mask) == values(state.mask) and after is state
    assert upload.scalars == {"images": 7.0} and float(logs["density"]) == pytest.approx(0.8)


@pytest.mark.parametrize(("score", "end"), [(0.2, 0.1), (0.1, 0.1), (0.9, 1.0)])
def test_no_ticket_without_a_good_download_or_below_the_last_rate(score, end):
    method = make(start=0.2, end=end)
    model, state = method.begin(start_of(method), scored(RECEIVED, score))
    assert values(model) == values(RECEIVED) and model["params"]["layer"]["bias"].tolist() == pytest.approx([0.01])
    assert all(values(state.mask)) and float(state.memory.rate) == 1.0


def test_the_rate_falls_by_a_fifth_until_the_end():
    method = make(end=0.5)
    begin = jax.jit(lambda state, received: method.begin(state, scored(received, 0.9)))
    state, rates, kept = start_of(method), [], []
    for _ in range(5):
        _, state = begin(state, pruning.apply_mask(RECEIVED, state.mask))
        rates.append(float(state.memory.rate))
        kept.append(sum(values(state.mask)))
    # 0.512 is still above a half. A fifth of four weights is none.
    np.testing.assert_allclose(rates, [0.8, 0.64, 0.512, 0.4096, 0.4096], rtol=1e-6)
    assert kept == [4] * 5


def test_the_server_step_and_the_download_are_those_of_sub_fedavg():
    assert make().aggregate is subfedavg.aggregate and make().download is subfedavg.download


def test_three_rounds_of_two_clients():
    # From (1, 2), half of the way to the client's target. The score is the local classifier: 0, 5, 7.5.
    task = toy_task([[9.0, 4.0], [3.0, 8.0]])
    init = task.init
    first = {"trunk": {"kernel": jnp.array([1.0, 2.0])}}
    task = dataclasses.replace(task, init=lambda key: init(key) | {"params": init(key)["params"] | first})
    method = make(step=0.5, start=0.2, end=0.5)
    engine = rounds.make_engine(task, method, epochs=1)
    server, clients = rounds.start(task, method, seed=0)

    def trunk(tree):
        return np.asarray(tree["params"]["trunk"]["kernel"]).tolist()

    server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    # (5, 3) and (2, 5), by clients and not by their one and two images.
    assert trunk(server.model) == [3.5, 4.0] and trunk(server.memory) == [[True] * 2] * 2
    # Both cut the 3.5, go back to (0, 2), and from there to (0, 3) and (0, 5); the first weight stays as it was.
    server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    assert trunk(server.model) == [3.5, 4.0] and trunk(server.memory) == [[False, True]] * 2
    assert float(server.model["batch_stats"]["trunk"]["count"]) == 1.0
    assert [trunk(client.memory.initial) for client in clients] == [[1.0, 2.0]] * 2
    # The rate is a half now: on from (0, 4), under the mask.
    server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    assert trunk(server.model) == [3.5, 5.0] and [float(client.memory.rate) for client in clients] == [0.5, 0.5]
    assert float(server.model["batch_stats"]["trunk"]["count"]) == 2.0


@pytest.mark.parametrize("task_name", ["supervised", "unsupervised"])
def test_a_round_on_re_id(task_name):
    settings = tiny_config("lotteryfl", task__name=task_name, method__lottery__start=0.0)
    task, method = (tiny_task if task_name == "supervised" else tiny_unsupervised_task)(settings)
    engine = rounds.make_engine(task, method, epochs=1)
    server, clients = rounds.start(task, method, seed=0)
    server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    np.testing.assert_allclose(logs["weight"], [1 / 3] * 3, rtol=1e-6)
    if task_name == "unsupervised":
        # Nothing can be scored before a client has made labels.
        assert all(float(pruning.density(client.mask)) == 1.0 for client in clients)
        server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    for k, client in enumerate(clients):
        # A fifth of every layer, rounded down, at the first download that scores.
        assert 0.8 <= float(pruning.density(client.mask)) < 0.81
        for held, own in zip(jax.tree.leaves(server.memory), jax.tree.leaves(client.mask), strict=True):
            np.testing.assert_array_equal(held[k], own)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(server.model))
