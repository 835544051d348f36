"""FedOBP: the mask by hand and against a sorted reference, the federation by hand, and scoring at the server and at the
client, which must not differ in a bit."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import floor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedklpr_jax import assembly, simulation
from fedklpr_jax import round as rounds
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientContext, ClientState, ServerState
from fedklpr_jax.methods import fedavg, fedobp, make_method
from fedklpr_jax.metrics import Ledger
from fedklpr_jax.trees import stack, unstack
from tests.federations import tiny_config, tiny_task, tiny_unsupervised_task, toy_task

QUANTILES = st.sampled_from([0.0, 0.07, 0.25, 0.29, 1 / 3, 0.5, 0.9, 0.995, 0.9999, 1.0, 0, 1])
DEFAULT = {"quantile": 0.5, "score": "obd", "ema": 0.5, "norm": "none", "classifier_only": False, "score_on": "server"}


def make(**changes):
    return fedobp.make(**(DEFAULT | changes))


@pytest.mark.short
def test_the_mask_by_hand():
    own = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([[2.0], [0.5], [1.0]])}
    theirs = {"a": jnp.array([2.0, 1.0]), "b": jnp.array([[2.0], [3.5], [1.5]])}
    # |(own - global) own| = 3, 2; 0, 1.5, 0.5 and (own - global)^2 = 1, 4; 0, 9, 0.25.
    cases = [
        ("obd", 0.0, [True, True], [False, True, True]),
        ("obd", 0.5, [True, True], [False, False, False]),
        ("obd", 0.74, [True, True], [False, False, False]),
        ("obd", 0.75, [True, False], [False, False, False]),
        ("obd", 1.0, [False, False], [False, False, False]),
        ("squared", 0.5, [False, True], [False, True, False]),
        ("squared", 0.75, [False, False], [False, True, False]),
    ]
    for score, quantile, first, second in cases:
        mask = fedobp.personal_mask(own, theirs, quantile, score)
        assert mask["a"].dtype == bool and mask["b"].shape == (3, 1)
        assert (mask["a"].tolist(), mask["b"].ravel().tolist()) == (first, second), (score, quantile)


@settings(deadline=None, max_examples=40)
@given(
    values=arrays.arrays(np.float32, 37, elements=st.integers(1, 2**20).map(lambda i: i / 8), unique=True),
    quantile=QUANTILES,
)
def test_the_number_of_personal_elements(values, quantile):
    # With a global model of zeros the score is the square of the value.
    own = {"x": values[:30].reshape(5, 6), "y": values[30:]}
    mask = fedobp.personal_mask(own, jax.tree.map(np.zeros_like, own), quantile)
    kept = np.concatenate([mask["x"].ravel(), mask["y"]])
    assert kept.sum() == 37 - 1 - floor(Fraction(str(quantile)) * 36)
    # The largest ones.
    assert values[kept].min(initial=np.inf) > values[~kept].max()


@settings(deadline=None, max_examples=40)
@given(
    values=arrays.arrays(np.float32, 21, elements=st.sampled_from([0.0, 1e-10, 0.5, 1.0, 1.5, 3.0, 1e4])),
    quantile=QUANTILES,
)
def test_scores_that_are_equal_fall_on_one_side_of_the_interpolated_quantile(values, quantile):
    # The method "linear" of NumPy, in double precision, is the definition that the mask does without.
    mask = fedobp.personal_mask({"x": values}, {"x": np.zeros(21, np.float32)}, quantile, "squared")["x"]
    scores = np.square(values).astype(np.float64)
    np.testing.assert_array_equal(mask, scores > np.quantile(scores, float(quantile), method="linear"))


def test_the_rank_is_exact_beyond_2_to_the_24_elements():
    number, quantile = 2**24 + 4001, 0.9999
    # Neighbouring floats from 0.5 on, shuffled. Own - global is exactly 1, and so a score is the value itself.
    order = (np.arange(number, dtype=np.uint64) * 7919 % number).astype(np.uint32)
    own = (np.uint32(0x3F000000) + order).view(np.float32)
    mask = np.asarray(fedobp.personal_mask([own], [own - 1], quantile)[0])
    rank = 9999 * (number - 1) // 10000
    assert mask.sum() == number - 1 - rank
    np.testing.assert_array_equal(mask, own > np.partition(own, rank)[rank])
    # The arithmetic of the scores would have missed it.
    assert int(np.float32(quantile) * np.float32(number - 1)) != rank


@pytest.mark.short
def test_the_quantile_is_the_decimal_it_is_written_as():
    # In binary floating point 0.29 * 100 is a little below 29.
    assert int(0.29 * 100) == 28 and fedobp.quantile_rank(0.29, 101) == 29
    assert fedobp.quantile_rank(0.9999, 10**9 + 1) == fedobp.quantile_rank(np.float32(0.9999), 10**9 + 1) == 999_900_000
    assert fedobp.quantile_rank(1e-05, 10**5 + 1) == 1 and fedobp.quantile_rank(1, 5) == 4
    for quantile in (-0.1, 1.01):
        with pytest.raises(ValueError, match="it is a number from 0 to 1"):
            fedobp.quantile_rank(quantile, 5)
    with pytest.raises(ValueError, match="it is 'obd' or 'squared'"):
        fedobp.personal_mask([jnp.ones(2)], [jnp.ones(2)], 0.5, "taylor")


@pytest.mark.short
def test_the_mask_is_the_same_under_jit_vmap_and_map():
    rng = np.random.default_rng(0)
    own, theirs = rng.normal(size=(2, 3, 50)).astype(np.float32)

    def mask(pair):
        return fedobp.personal_mask(*pair, 0.9)

    one_by_one = np.stack([mask(pair) for pair in zip(own, theirs, strict=True)])
    assert one_by_one.sum(axis=1).tolist() == [5, 5, 5]
    for mapped in (jax.vmap(mask), jax.jit(jax.vmap(mask)), lambda pair: jax.lax.map(mask, pair)):
        np.testing.assert_array_equal(mapped((own, theirs)), one_by_one)


def model(trunk, classifier, count=0.0):
    """The toy task's shared model."""
    return {
        "params": {
            "trunk": {"kernel": jnp.array(trunk, jnp.float32)},
            "classifier": {"kernel": jnp.atleast_1d(jnp.array(classifier, jnp.float32))},
        },
        "batch_stats": {"trunk": {"count": jnp.float32(count)}},
    }


def numbers(tree):
    """Trunk and classifier as a list."""
    params = tree.get("params", tree)
    return np.concatenate([params["trunk"]["kernel"], params["classifier"]["kernel"]], axis=-1).tolist()


RECEIVED = model([1.0, 2.0], 4.0, 7.0)


def after_training(method, own, *, received=RECEIVED, clients=1):
    """A server that holds the global model `received` and the last upload `own` of client 0 alone."""
    memory = method.server_memory(own, clients)._replace(trained=jnp.arange(clients) == 0)
    return ServerState(received, memory, jnp.int32(0))


@pytest.mark.short
def test_statistics_are_never_personal_and_who_never_trained_has_nothing_of_its_own():
    server = after_training(make(quantile=0), model([9.0, 2.0], 8.0, 3.0), clients=2)
    message = make(quantile=0).download(server, 0)
    assert numbers(message.model) == [9.0, 2.0, 8.0] and message.mask is None
    assert message.model["batch_stats"]["trunk"]["count"] == 7.0
    assert numbers(make(quantile=0).download(server, 1).model) == [1.0, 2.0, 4.0]


@pytest.mark.short
def test_older_scores_outweigh_newer_ones_as_far_as_the_average_says():
    # Scores |(3 - 1) 3| = 6, |(4 - 2) 4| = 8 and 0; the older ones were 4, 0, 0.
    own = model([3.0, 4.0], 4.0)
    for ema, expected in ((0.0, [1.0, 4.0, 4.0]), (0.5, [3.0, 2.0, 4.0]), (0.25, [1.0, 4.0, 4.0])):
        method = make(ema=ema)
        server = after_training(method, own)
        if ema:
            average = {"trunk": {"kernel": jnp.array([[4.0, 0.0]])}, "classifier": {"kernel": jnp.zeros((1, 1))}}
            server = server._replace(memory=server.memory._replace(average={"params": average}))
        else:
            assert server.memory.average == ()
        assert numbers(method.download(server, 0).model) == expected, ema


@pytest.mark.parametrize("score", ["obd", "squared"])
def test_the_average_has_the_bits_of_plain_float32_arithmetic(score):
    # A compiler that contracts a product and a sum changes about every eighth element, but not in every program.
    own, theirs, average = np.random.default_rng(2).uniform(0.5, 2, size=(3, 10_000)).astype(np.float32)
    memory = fedobp.Memory({"params": {"x": own}}, np.bool_(True), {"params": {"x": average}}, np.float32(0))
    context = ClientContext(jnp.int32(1), {"params": {"x": theirs}}, {}, jnp.float32(1), lambda m: 0.0, lambda v: {})
    method = make(score=score, ema=0.3, score_on="client")
    _, client = method.begin(ClientState({}, None, memory), context)
    new = np.abs((own - theirs) * own) if score == "obd" else np.square(own - theirs)
    expected = np.float32(0.7) * new + np.float32(0.3) * average
    np.testing.assert_array_equal(client.memory.average["params"]["x"], expected)


@pytest.mark.short
def test_norms_and_the_classifier_alone():
    # Scores 6 and 8 in the trunk, 0 in the classifier: in a layer of its own every one is the lowest.
    own = model([3.0, 4.0], 4.0)
    for changes, expected in (
        ({"norm": "none", "quantile": 0}, [3.0, 4.0, 4.0]),
        ({"norm": "global", "quantile": 0}, [3.0, 4.0, 4.0]),
        ({"norm": "layer", "quantile": 0}, [1.0, 4.0, 4.0]),
    ):
        method = make(**changes)
        assert numbers(method.download(after_training(method, own), 0).model) == expected, changes
    # The classifier's own quantile: its scores are 8 (8 - 4) = 32 and 0, those of the trunk do not count.
    method = make(classifier_only=True, quantile=0)
    server = after_training(method, model([3.0, 4.0], [8.0, 4.0]), received=model([1.0, 2.0], [4.0, 4.0]))
    assert list(server.memory.own["params"]) == ["classifier"] == list(server.memory.average["params"])
    assert numbers(method.download(server, 0).model) == [1.0, 2.0, 8.0, 4.0]


def play(task, method, schedule, *, epochs=1, seed=0):
    """Rounds of (participants, which of them are accepted). After each, the model every client would be tested with;
    at the end server, clients and what was logged of "personal"."""
    engine = rounds.make_engine(task, method, epochs=epochs)
    server, started = rounds.start(task, method, seed)
    clients, tested, logged = list(started), [], []
    for round_, (who, accepted) in enumerate(schedule):
        messages = [engine.download(server, np.int32(k)) for k in who]
        inputs = rounds.round_inputs(engine, messages, [clients[k] for k in who], who, seed=seed, round_=round_)
        uploads, states, facts = engine.update(round_, rounds.rates(task, round_, epochs), inputs)
        rows = unstack((uploads, states), len(who))
        for k, (_, state), fine in zip(who, rows, accepted, strict=True):
            clients[k] = state if fine else clients[k]
        sent = rounds.stack_uploads([upload for upload, _ in rows], who, accepted)
        server, logs = engine.aggregate(server, sent)
        logged.append(np.asarray({**facts, **logs}["personal"]).tolist())
        tested.append([
            jax.device_get(method.personalise(engine.download(server, np.int32(k)), clients[k]))
            for k in range(len(clients))
        ])  # fmt: skip
    return tested, (server, clients), logged


@pytest.mark.parametrize("score_on", ["server", "client"])
def test_three_rounds_of_two_clients_by_hand(score_on):
    # n_k = 1, 2. Every step halves the distance to the targets, 10 for the classifier.
    task = toy_task([[6.0, 12.0], [0.0, -6.0]])
    tested, (server, clients), logged = play(task, make(score_on=score_on), [([0, 1], [True, True])] * 3)
    # Round 0 ends with (3, 6), 5 and (0, -3), 5: global (1, 0), 5. Scores 6, 36, 0 and 0, 9, 0; the quantiles 6 and 0.
    assert [numbers(tree) for tree in tested[0]] == [[1.0, 6.0, 5.0], [1.0, -3.0, 5.0]]
    # Round 1: (3.5, 9), 7.5 and (0.5, -4.5), 7.5, so (1.5, 0), 7.5. E was 3, 18, 0 and 0, 4.5, 0; now 5, 49.5, 0 and
    # |(0.5 - 1.5) 0.5| / 2 = 0.25, 2.25 + 20.25 / 2 = 12.375, 0.
    np.testing.assert_allclose([numbers(tree) for tree in tested[1]], [[1.5, 9.0, 7.5], [1.5, -4.5, 7.5]], rtol=1e-6)
    # Evaluation moved nothing: E is that of the three downloads trained on, and of what was trained in round 2.
    memory = unstack(server.memory, 2) if score_on == "server" else [client.memory for client in clients]
    np.testing.assert_allclose(numbers(memory[0].average["params"]), [5.0, 49.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(numbers(memory[1].average["params"]), [0.25, 12.375, 0.0], rtol=1e-6)
    np.testing.assert_allclose(numbers(memory[0].own["params"]), [3.75, 10.5, 8.75], rtol=1e-6)
    np.testing.assert_allclose(logged, [[0, 0], [1 / 3, 1 / 3], [1 / 3, 1 / 3]], rtol=1e-6)
    assert tested[2][0]["batch_stats"]["trunk"]["count"] == 3.0


# One client absent, one refused, one that comes late.
SCHEDULE = [([0, 1], [True, True]), ([1, 2], [False, True]), ([0, 1], [True, True]), ([0, 2], [True, False])]


def assert_both_forms_agree(task, schedule, *, epochs=1, **changes):
    server_tested, (server, _), server_logged = play(task, make(**changes), schedule, epochs=epochs)
    tested, (other, clients), logged = play(task, make(score_on="client", **changes), schedule, epochs=epochs)
    jax.tree.map(np.testing.assert_array_equal, server_tested, tested)
    jax.tree.map(np.testing.assert_array_equal, server.model, other.model)
    assert server_logged == logged
    remembered = stack([client.memory for client in clients])
    jax.tree.map(np.testing.assert_array_equal, server.memory._replace(personal=0), remembered._replace(personal=0))
    assert other.memory == ()
    return tested, logged


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.3},
        {"ema": 0.0, "score": "squared"},
        {"ema": 0.7, "norm": "layer", "score": "squared", "quantile": 0.25},
    ],
)
def test_server_and_client_find_the_same_on_the_toy_task(changes):
    targets = np.random.default_rng(1).normal(size=(3, 2)) * 5
    tested, logged = assert_both_forms_agree(toy_task(targets), SCHEDULE, **changes)
    # Client 2 has not trained after round 0.
    assert numbers(tested[0][2]) != numbers(tested[0][0]) and min(logged[2]) > 0 == max(logged[0])


def test_server_and_client_find_the_same_on_re_identification():
    task, _ = tiny_task(tiny_config("fedobp"))
    # The classifier counts all identities of the federation.
    kernel = jax.eval_shape(task.init, jax.random.key(0))["params"]["classifier"]["kernel"]
    own_only, _ = tiny_task(tiny_config("fedpav"))
    assert kernel.shape[1] > jax.eval_shape(own_only.init, jax.random.key(0))["params"]["classifier"]["kernel"].shape[1]
    tested, logged = assert_both_forms_agree(task, SCHEDULE, quantile=0.9, ema=0.3)
    number = sum(leaf.size for leaf in jax.tree.leaves(tested[0][0]["params"]))
    kept = number - 1 - 9 * (number - 1) // 10
    # Frozen or unseen weights score nothing, and of equal scores none is above the quantile.
    assert 0 < logged[2][0] <= np.float32(kept / number) and logged[0] == [0.0, 0.0]


def test_a_round_without_labels():
    task, method = tiny_unsupervised_task(
        tiny_config("fedobp", task__name="unsupervised", method__obp__quantile=0.9, cluster__where="host")
    )
    tested, _, logged = play(task, method, [([0, 1, 2], [True] * 3)])
    assert logged == [[0.0, 0.0, 0.0]]
    # A tenth of every client's model is its own now.
    first, second = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(t["params"])]) for t in tested[0][:2])
    assert 0 < np.mean(first != second) < 0.2
    with pytest.raises(InputError, match=r"^config\.method\.obp\.classifier: True, but this task's model has no"):
        rounds.start(task, make(classifier_only=True), 0)


@pytest.mark.short
def test_a_quantile_of_one_is_fedavg():
    task = toy_task([[6.0, 12.0], [0.0, -6.0], [1.0, 1.0]])
    schedule = [([0, 1, 2], [True] * 3)] * 3
    _, (server, _), logged = play(task, make(quantile=1), schedule)
    engine = rounds.make_engine(task, fedavg.make(), epochs=1)
    other, clients = rounds.start(task, fedavg.make(), 0)
    for _ in schedule:
        other, clients, _ = rounds.simulate(engine, other, clients, seed=0)
    jax.tree.map(np.testing.assert_array_equal, server.model, other.model)
    assert logged == [[0.0] * 3] * 3


@pytest.mark.parametrize("score_on", ["server", "client"])
def test_a_client_refused_on_the_wire_keeps_its_old_model(score_on):
    # In round 1 client 0 trains on a row that is not finite.
    task = toy_task([[6.0, 12.0], [0.0, -6.0]])
    task = dataclasses.replace(
        task,
        arrays=jnp.concatenate([task.arrays, jnp.full((1, 2), jnp.nan)]),
        plan=lambda seed, round_, client, epochs: np.full(
            (epochs, 1, 1), 2 if (round_, client) == (1, 0) else client, np.int32
        ),
    )
    config = tiny_config("fedobp", epochs=1, method__obp__score_on=score_on, method__obp__quantile=0.5)
    method = make_method(config.method)
    federation = assembly.Federation(config, [], rounds.make_engine(task, method, epochs=1), ())
    state = simulation.RunState(*rounds.start(task, method, 0), Ledger(), 0.0)
    for round_ in range(3):
        state, event = simulation.run_round(federation, state)
        assert [row["client"] for row in event["refused"]] == (["client 0"] if round_ == 1 else [])
        assert "personal" in event["clients"]["client 0"]
        memory = state.clients[0].memory if score_on == "client" else jax.tree.map(lambda x: x[0], state.server.memory)
        if round_ < 2:
            # Both rounds leave it with round 0's model and without a score.
            assert numbers(memory.own) == [3.0, 6.0, 5.0] and numbers(memory.average) == [0.0, 0.0, 0.0]
    # After round 1 only client 1's (0.5, -4.5), 7.5 is global: |(3 - 0.5) 3| / 2, |(6 + 4.5) 6| / 2, |(5 - 7.5) 5| / 2.
    np.testing.assert_allclose(numbers(memory.average), [3.75, 31.5, 6.25], rtol=1e-6)


@pytest.mark.short
def test_the_settings_reach_the_method():
    config = tiny_config("fedobp", method__obp__score_on="client", method__obp__ema=0.0, method__obp__classifier=True)
    method = make_method(config.method)
    memory = method.client_memory(model([1, 2], 3), None)
    assert method.name == "fedobp" and memory.average == () and list(memory.own["params"]) == ["classifier"]
    assert not method.is_local("params/classifier/kernel") and not method.is_local("batch_stats/trunk/mean")
