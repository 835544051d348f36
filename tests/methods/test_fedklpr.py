"""FedKLPR's hooks on a linear network of six weights, against numbers computed by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import pruning
from fedklpr_jax import round as rounds
from fedklpr_jax.client_update import ClientUpdate
from fedklpr_jax.federated import ClientContext, ClientState, Method, ServerContext, ServerState, Step, Uploads
from fedklpr_jax.methods import make_method
from tests.federations import tiny_config, tiny_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

LN3 = float(np.log(3.0))
# Every setting of the method that the tests rely on: not those of a tuned default.
BASE = {
    "kll__weight": 0.5,
    "kll__temperature": 1.0,
    "kll__direction": "forward",
    "kll__space": "features",
    "kll__reference": "personalised",
    "klaw__sign": "align",
    "praw__form": "compact",
    "sas__form": "skip",
    "klpwa__form": "product",
    "klpwa__mix": 0.5,
    "klpwa__cap": 100.0,
    "prune__step": 0.5,
    "prune__target": 0.0,
    "prune__scope": "global",
    "crr__drop": 0.02,
    "crr__recover": 0.05,
    "crr__halt": 2,
    "bn__statistics": "averaged",
}


def make(**changes) -> Method:
    settings = {f"method__{name}": value for name, value in (BASE | changes).items()}
    return make_method(tiny_config("fedklpr", **settings).method)


def model(a, b=(1.0, 1.0), mean=(0.0, 0.0)):
    """`embedding = (x @ a) * b + mean`; only the two kernels can be pruned."""
    return {
        "params": {"trunk": {"a": {"kernel": jnp.array(a, jnp.float32)}, "b": {"kernel": jnp.array(b, jnp.float32)}}},
        "batch_stats": {"trunk": {"mean": jnp.array(mean, jnp.float32)}},
    }


def masks(a, b=(True, True)):
    return {
        "params": {"trunk": {"a": {"kernel": jnp.array(a)}, "b": {"kernel": jnp.array(b)}}},
        "batch_stats": {"trunk": {"mean": jnp.ones(2, bool)}},
    }


def kernel(tree, name="a"):
    return np.asarray(tree["params"]["trunk"][name]["kernel"]).tolist()


def probe(variables):
    """The network on the batch [(1, 0), (0, 1)] and a classifier that only swaps and doubles."""
    params = variables["params"]["trunk"]
    embedding = params["a"]["kernel"] * params["b"]["kernel"] + variables["batch_stats"]["trunk"]["mean"]
    return {"embedding": embedding, "logits": 2.0 * embedding[:, ::-1]}


def context(received, score=0.5, *, round_=1, images=7.0):
    """`score` is a number, or a function of the model."""
    scored = score if callable(score) else lambda variables: jnp.float32(score)
    return ClientContext(jnp.int32(round_), received, {}, jnp.float32(images), scored, probe)


def client(method, variables, mask=None, recovery=None):
    """A client that has taken part once; `recovery` replaces what it remembers of a pruning step."""
    mask = pruning.full_mask(variables) if mask is None else mask
    memory = method.client_memory(variables, mask)
    once = memory.recovery._replace(rounds=jnp.int32(1))
    return ClientState({}, mask, memory._replace(recovery=recovery or once))


def server_of(variables, table, round_=1):
    held = jax.tree.map(lambda *leaves: jnp.stack(leaves), *table)
    return ServerState(variables, held, jnp.int32(round_))


def uploads_of(models, table, klaw, images, clients=None, accepted=None):
    count = len(models)

    def together(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    return Uploads(
        together(models),
        together(table),
        {"klaw": jnp.array(klaw, jnp.float32), "images": jnp.array(images, jnp.float32)},
        jnp.arange(count) if clients is None else jnp.array(clients, jnp.int32),
        jnp.ones(count, bool) if accepted is None else jnp.array(accepted),
    )


FULL = masks([[True, True], [True, True]])
PART = masks([[True, False], [False, True]])
THIN = masks([[True, False], [False, True]], (True, False))  # half of the six


# --- download and personalise -------------------------------------------------------------------


@pytest.mark.short
def test_the_download_is_the_global_model_under_the_clients_last_mask():
    method, shared = make(), model([[1.0, 2.0], [3.0, 4.0]], mean=(5.0, 6.0))
    message = method.download(server_of(shared, [FULL, PART]), jnp.int32(1))
    assert kernel(message.model) == [[1.0, 0.0], [0.0, 4.0]]
    assert kernel(message.mask) == [[True, False], [False, True]]
    assert message.model["batch_stats"]["trunk"]["mean"].tolist() == [5.0, 6.0]
    assert kernel(method.download(server_of(shared, [FULL, PART]), jnp.int32(0)).model) == [[1.0, 2.0], [3.0, 4.0]]


def test_with_the_global_reference_the_download_is_dense_and_the_client_masks_it():
    method, shared = make(kll__reference="global"), model([[1.0, 2.0], [3.0, 4.0]])
    message = method.download(server_of(shared, [FULL, PART]), jnp.int32(1))
    assert message.mask is None and kernel(message.model) == [[1.0, 2.0], [3.0, 4.0]]
    state = client(method, shared, PART)
    assert kernel(method.personalise(message, state)) == [[1.0, 0.0], [0.0, 4.0]]
    assert kernel(method.begin(state, context(message.model))[0]) == [[1.0, 0.0], [0.0, 4.0]]


def test_the_server_starts_with_a_full_mask_for_every_client():
    shared = model([[1.0, 2.0], [3.0, 4.0]])
    memory = make().server_memory(shared, 3)
    for leaf, weights in zip(jax.tree.leaves(memory), jax.tree.leaves(shared), strict=True):
        assert leaf.shape == (3, *weights.shape) and leaf.dtype == bool and leaf.all()


# --- KLL ----------------------------------------------------------------------------------------


def step(round_, reference, outputs):
    return Step(jnp.int32(round_), {}, {}, outputs, lambda: reference)


# P = (1/2, 1/2) and Q = (3/4, 1/4) in the embedding; the same the other way round in the logits.
HALVES = {"embedding": jnp.zeros((1, 2)), "logits": jnp.array([[0.0, LN3]])}
QUARTERS = {"embedding": jnp.array([[LN3, 0.0]]), "logits": jnp.zeros((1, 2))}
FORWARD = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
REVERSE = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
SHARP = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)  # T = 1/2: Q = (9/10, 1/10)


@pytest.mark.short
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.5 * FORWARD),
        ({"kll__weight": 2.0}, 2.0 * FORWARD),
        ({"kll__weight": 0.0}, 0.0),
        ({"kll__direction": "reverse"}, 0.5 * REVERSE),
        ({"kll__temperature": 0.5}, 0.5 * SHARP),
        ({"kll__space": "proxies"}, 0.5 * REVERSE),
    ],
)
def test_the_kl_loss_by_hand_none_in_round_zero(changes, expected):
    method = make(**changes)
    assert float(method.penalty(step(0, HALVES, QUARTERS))) == 0.0
    for round_ in (1, 5):
        assert float(method.penalty(step(round_, HALVES, QUARTERS))) == pytest.approx(expected, rel=1e-5)


def test_the_kl_loss_pulls_from_round_one_on_only():
    def penalty(embedding, round_):
        return make().penalty(step(round_, HALVES, {"embedding": embedding}))

    gradient = jax.grad(penalty)
    assert gradient(QUARTERS["embedding"], 0).tolist() == [[0.0, 0.0]]
    # d KL / d logits = Q - P.
    np.testing.assert_allclose(gradient(QUARTERS["embedding"], 1), 0.5 * np.array([[0.25, -0.25]]), rtol=1e-5)


# --- finish -------------------------------------------------------------------------------------


def test_finish_prunes_the_smallest_and_weighs_what_changed():
    method, received = make(), model([[0.0, 0.0], [0.0, LN3]])
    # Of six weights the three smallest go: 0.01, 0.02 and 0.4 of the second kernel.
    trained = model([[LN3 / 2, -0.01], [0.02, LN3]], (2.0, 0.4))
    upload, state, logs = jax.jit(lambda m, s: method.finish(m, s, context(received)))(
        trained, client(method, received)
    )
    assert kernel(upload.mask) == [[True, False], [False, True]] and kernel(upload.mask, "b") == [True, False]
    np.testing.assert_allclose(kernel(upload.model), [[LN3 / 2, 0.0], [0.0, LN3]], rtol=1e-6)
    assert kernel(upload.model, "b") == [2.0, 0.0]
    assert upload.mask["batch_stats"]["trunk"]["mean"].all()
    # Embeddings: (0, 0) -> (ln 3, 0) and (0, ln 3) -> (0, 0), so KL((1/2, 1/2) || (3/4, 1/4)) and the reverse.
    assert float(upload.scalars["klaw"]) == pytest.approx((FORWARD + REVERSE) / 2, rel=1e-5)
    assert float(upload.scalars["images"]) == 7.0
    assert float(logs["density"]) == 0.5 and pruning.DECISIONS[int(logs["decision"])] == "accepted"
    assert kernel(state.mask) == kernel(upload.mask) and kernel(state.mask, "b") == kernel(upload.mask, "b")
    assert int(state.memory.recovery.rounds) == 2


def test_masks_only_shrink():
    method = make(prune__step=0.34)
    shared = model([[1.0, 0.0], [0.0, 4.0]], (5.0, 6.0))
    upload, _, logs = method.finish(shared, client(method, shared, PART), context(shared))
    # Four are alive, one of them goes: the 1; what was pruned before stays so.
    assert kernel(upload.mask) == [[False, False], [False, True]]
    assert float(logs["density"]) == 0.5


def test_the_first_participation_never_prunes_in_whatever_round_it_falls():
    method, shared = make(), model([[0.1, 0.2], [0.3, 0.4]])
    for round_ in (0, 3):
        state = client(method, shared, recovery=pruning.no_recovery(shared, FULL))
        upload, after, logs = method.finish(shared, state, context(shared, round_=round_))
        assert all(leaf.all() for leaf in jax.tree.leaves(upload.mask))
        assert pruning.DECISIONS[int(logs["decision"])] == "none" and int(after.memory.recovery.rounds) == 1
        np.testing.assert_allclose(kernel(upload.model), [[0.1, 0.2], [0.3, 0.4]])


def test_a_step_that_costs_too_much_is_not_taken():
    method, shared = make(), model([[0.1, 0.2], [0.3, 0.4]])
    # The score falls by 0.01 for every weight lost, by 0.03 for the step, of which 0.02 are allowed.
    scored = context(shared, lambda variables: 0.5 + 0.01 * alive(variables))
    upload, state, logs = method.finish(shared, client(method, shared), scored)
    assert pruning.DECISIONS[int(logs["decision"])] == "rejected"
    assert float(logs["score_current"]) == pytest.approx(0.56) and float(logs["score_candidate"]) == pytest.approx(0.53)
    assert all(leaf.all() for leaf in jax.tree.leaves(upload.mask)) and not bool(state.memory.recovery.armed)
    np.testing.assert_allclose(kernel(upload.model), [[0.1, 0.2], [0.3, 0.4]])


# --- CRR over rounds ----------------------------------------------------------------------------


def test_recovery_over_six_participations():
    """Every round of local training adds 1 to each weight the client keeps; it may prune one of the four."""
    method = make(prune__step=0.25, prune__target=0.75, crr__recover=0.05, crr__halt=2)
    first = {"params": {"trunk": {"kernel": jnp.array([1.0, 2.0, 3.0, 4.0])}}}

    def values(tree):
        return np.asarray(tree["params"]["trunk"]["kernel"]).tolist()

    server = ServerState(first, method.server_memory(first, 1), jnp.int32(0))
    mask = pruning.full_mask(first)
    state = ClientState({}, mask, method.client_memory(first, mask))

    def outputs(variables):
        return {"embedding": variables["params"]["trunk"]["kernel"][None]}

    @jax.jit
    def one_round(server, state, score):
        message = method.download(server, jnp.int32(0))
        opened = ClientContext(server.round, message.model, {}, jnp.float32(5), lambda variables: score, outputs)
        started, state = method.begin(state, opened)
        trained = pruning.apply_mask(jax.tree.map(lambda leaf: leaf + 1.0, started), state.mask)
        # Local training repairs everything: no step is rejected.
        closing = opened._replace(score=lambda variables: jnp.float32(0.9))
        upload, state, logs = method.finish(trained, state, closing)
        return message, upload, state, logs

    def participate(score):
        nonlocal server, state
        message, upload, state, logs = one_round(server, state, jnp.float32(score))
        received = jax.tree.map(lambda leaf: leaf[None], (upload.model, upload.mask, upload.scalars))
        server, _ = method.aggregate(
            server, Uploads(*received, jnp.array([0]), jnp.array([True])), ServerContext()
        )
        decision = pruning.DECISIONS[int(logs["decision"])]
        return values(message.model), values(upload.model), values(upload.mask), decision

    whole, lost = [True] * 4, [False, True, True, True]
    assert participate(0.50) == ([1, 2, 3, 4], [2, 3, 4, 5], whole, "none")
    # The download scored 0.60 when the step was taken, which forgets the client's own 3.
    assert participate(0.60) == ([2, 3, 4, 5], [0, 4, 5, 6], lost, "accepted")
    assert values(server.model) == [2, 4, 5, 6], "nobody keeps the first weight: the server's stays"
    # A download that scores a little less, if far from the 0.90 after training, is no reason to go back.
    assert participate(0.56) == ([0, 4, 5, 6], [0, 5, 6, 7], lost, "target")
    # This one scores less than 0.60 - 0.05: the 3 comes back, is trained, and goes up under the whole mask.
    assert participate(0.54) == ([0, 5, 6, 7], [4, 6, 7, 8], whole, "recovered")
    assert values(server.memory) == [whole] and values(server.model) == [4, 6, 7, 8]
    # Rounds without this client do not count; its second one without pruning does. There is nothing left to undo.
    server = server._replace(round=server.round + 3)
    assert participate(0.10) == ([4, 6, 7, 8], [5, 7, 8, 9], whole, "halted")
    assert participate(0.10) == ([5, 7, 8, 9], [0, 8, 9, 10], lost, "accepted")


# --- aggregate ----------------------------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        # a = (1, 3), median 2: KLAW 1/3, 1/5. r = (0, 1/2): PRAW 1, 2.
        ({}, (5 / 11, 6 / 11)),
        ({"klaw__sign": "gain"}, (1 / 7, 6 / 7)),
        ({"praw__form": "dense"}, (10 / 13, 3 / 13)),
        ({"praw__form": "none"}, (5 / 8, 3 / 8)),
        ({"klpwa__form": "sum"}, ((5 / 8 + 1 / 3) / 2, (3 / 8 + 2 / 3) / 2)),
        ({"klpwa__form": "sum", "klpwa__mix": 0.2}, (0.2 * 5 / 8 + 0.8 / 3, 0.2 * 3 / 8 + 0.8 * 2 / 3)),
        ({"klaw__sign": "gain", "klpwa__cap": 1.5}, (0.25, 0.75)),
    ],
)
def test_server_weights_and_sparse_mean_by_hand(changes, weights):
    previous = model([[9.0, 9.0], [9.0, 9.0]], (9.0, 9.0))
    both = [
        model([[1.0, 2.0], [3.0, 4.0]], (1.0, 1.0), (0.0, 1.0)),
        model([[5.0, 0.0], [0.0, 8.0]], (3.0, 0.0), (1.0, 0.0)),
    ]
    uploads = uploads_of(both, [FULL, THIN], klaw=[1.0, 3.0], images=[10.0, 30.0])
    server, logs = make(**changes).aggregate(server_of(previous, [FULL, FULL]), uploads, ServerContext())
    np.testing.assert_allclose(logs["weight"], weights, rtol=1e-5)
    first, second = weights
    # What the second client pruned comes from the first alone; the rest is the weighted mean, statistics included.
    np.testing.assert_allclose(
        kernel(server.model), [[first + 5 * second, 2.0], [3.0, 4 * first + 8 * second]], rtol=1e-5
    )
    np.testing.assert_allclose(kernel(server.model, "b"), [first + 3 * second, 1.0], rtol=1e-5)
    np.testing.assert_allclose(server.model["batch_stats"]["trunk"]["mean"], [second, first], rtol=1e-5)
    assert int(server.round) == 2
    assert logs["klaw"].tolist() == [1.0, 3.0]


def test_what_nobody_keeps_stays_as_it_was():
    previous = model([[9.0, 9.0], [9.0, 9.0]])
    uploads = uploads_of([model([[1.0, 0.0], [0.0, 4.0]])] * 2, [PART, PART], klaw=[1.0, 1.0], images=[1.0, 1.0])
    server, _ = make().aggregate(server_of(previous, [FULL, FULL]), uploads, ServerContext())
    assert kernel(server.model) == [[1.0, 9.0], [9.0, 4.0]]


@pytest.mark.parametrize(
    ("klaw", "expected"),
    [([0.0, 0.0], (0.25, 0.75)), ([4e-13, 5e-13], (0.25, 0.75)), ([1e-11, 1e-11], (0.5, 0.5))],
)
def test_without_divergence_the_number_of_images_decides(klaw, expected):
    both = [model([[1.0, 1.0], [1.0, 1.0]]), model([[5.0, 5.0], [5.0, 5.0]])]
    uploads = uploads_of(both, [FULL, FULL], klaw=klaw, images=[10.0, 30.0])
    server, logs = make(klaw__sign="gain").aggregate(server_of(both[0], [FULL, FULL]), uploads, ServerContext())
    np.testing.assert_allclose(logs["weight"], expected, rtol=1e-4)
    np.testing.assert_allclose(kernel(server.model), np.full((2, 2), expected[0] + 5 * expected[1]), rtol=1e-4)


def test_a_divergence_rounded_below_zero_gives_no_negative_weight():
    both = [model([[1.0, 1.0], [1.0, 1.0]]), model([[5.0, 5.0], [5.0, 5.0]])]
    uploads = uploads_of(both, [FULL, FULL], klaw=[-2e-8, 3e-8], images=[10.0, 30.0])
    for sign in ("gain", "align"):
        _, logs = make(klaw__sign=sign).aggregate(
            server_of(both[0], [FULL, FULL]), uploads, ServerContext()
        )
        assert (logs["weight"] >= 0).all() and float(logs["weight"].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("form", ["product", "sum"])
def test_a_refused_client_has_no_weight_and_keeps_its_old_mask(form):
    method, nan = make(klpwa__form=form), float("nan")
    good, bad = model([[1.0, 2.0], [3.0, 4.0]]), model([[nan, nan], [nan, nan]], (nan, nan), (nan, nan))
    table = [FULL, PART]
    uploads = uploads_of([good, bad], [THIN, THIN], klaw=[2.0, nan], images=[10.0, 90.0], accepted=[True, False])
    server, logs = method.aggregate(server_of(good, table), uploads, ServerContext())
    assert logs["weight"].tolist() == [1.0, 0.0] and logs["klaw"].tolist() == [2.0, 0.0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(server.model))
    assert kernel(server.memory) == [kernel(THIN), kernel(PART)]
    assert kernel(server.memory, "b") == [[True, False], [True, True]]
    # All refused: model and masks are what they were, only the round has passed.
    nobody = uploads._replace(accepted=jnp.zeros(2, bool))
    server, logs = method.aggregate(server_of(good, table), nobody, ServerContext())
    assert logs["weight"].tolist() == [0.0, 0.0] and int(server.round) == 2
    assert kernel(server.model) == kernel(good) and kernel(server.memory) == [kernel(FULL), kernel(PART)]


def test_only_participants_change_their_row_of_the_mask_table():
    shared = model([[1.0, 2.0], [3.0, 4.0]])
    uploads = uploads_of([shared, shared], [PART, THIN], klaw=[1.0, 1.0], images=[1.0, 1.0], clients=[2, 0])
    server, _ = make().aggregate(server_of(shared, [FULL, FULL, FULL]), uploads, ServerContext())
    assert kernel(server.memory) == [kernel(THIN), kernel(FULL), kernel(PART)]
    assert kernel(server.memory, "b") == [[True, False], [True, True], [True, True]]


# --- every alternative is wired, and to its own place -------------------------------------------

RECEIVED = model([[0.3, -0.7], [1.1, 0.2]], (0.9, 1.3), (0.1, -0.2))
TRAINED = model([[0.5, -0.6], [0.8, 0.4]], (1.0, 1.2), (0.2, -0.1))
EARLIER = masks([[True, True], [False, True]])


def outcomes(method: Method) -> dict:
    """What each part of the method makes of the same fixed inputs."""
    paths = ("params/trunk/a/kernel", "params/classifier/kernel", "batch_stats/trunk/mean")
    penalty = method.penalty(step(1, HALVES | {"logits": jnp.array([[0.3, 0.1]])}, QUARTERS))
    # The download scores 0.1 less than the one before the last step: recovery.
    undo = pruning.no_recovery(TRAINED, EARLIER)._replace(
        armed=jnp.bool_(True), score=jnp.float32(0.6), rounds=jnp.int32(2)
    )
    begun, started = method.begin(client(method, TRAINED, PART, undo), context(RECEIVED, 0.5))
    # Every weight that is pruned costs 0.005, a step of three 0.015.
    upload, finished, _ = method.finish(
        TRAINED, client(method, TRAINED), context(RECEIVED, lambda variables: 0.005 * alive(variables))
    )
    uploads = uploads_of(
        [RECEIVED, TRAINED, TRAINED], [FULL, PART, THIN], klaw=[0.1, 0.9, 0.2], images=[1.0, 2.0, 3.0]
    )
    # A mean of fixed weights, so that only what is averaged shows in it.
    equal = uploads._replace(scalars=jax.tree.map(jnp.ones_like, uploads.scalars), mask=stacked([PART] * 3))
    merged, _ = method.aggregate(server_of(RECEIVED, [FULL] * 3), equal, ServerContext())
    _, logs = method.aggregate(server_of(RECEIVED, [FULL] * 3), uploads, ServerContext())
    return {
        "local": [jnp.bool_(method.is_local(path)) for path in paths],
        "download": method.download(server_of(RECEIVED, [FULL, PART]), jnp.int32(1)),
        "loss": penalty,
        "recovery": (begun, started.mask),
        "halt": started.memory.recovery.halt,
        "mask": (upload.mask, finished.mask),
        "klaw": upload.scalars["klaw"],
        "weights": logs["weight"],
        "mean": merged.model,
    }


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def alive(variables):
    return sum(jnp.sum(leaf != 0).astype(jnp.float32) for leaf in jax.tree.leaves(variables["params"]))


@pytest.fixture(scope="module")
def usual():
    """The outcomes of the base settings."""
    return jax.jit(outcomes, static_argnums=0)(make())


@pytest.mark.parametrize(
    ("changes", "touched"),
    [
        ({"kll__weight": 0.7}, {"loss"}),
        # The softmax of KLL is KLAW's as well.
        ({"kll__temperature": 0.5}, {"loss", "klaw"}),
        ({"kll__space": "proxies"}, {"loss", "klaw"}),
        ({"kll__direction": "reverse"}, {"loss"}),
        ({"kll__reference": "global"}, {"download"}),
        ({"klaw__sign": "gain"}, {"weights"}),
        ({"klaw__sign": "none"}, {"weights"}),
        ({"sas__form": "zeros"}, {"mean"}),
        ({"praw__form": "dense"}, {"weights"}),
        ({"praw__form": "none"}, {"weights"}),
        ({"klpwa__form": "sum"}, {"weights"}),
        ({"klpwa__mix": 0.1}, set()),  # the product has no mix
        ({"klpwa__cap": 1.1}, {"weights"}),
        # KLAW compares with the pruned model, so another mask is another divergence.
        ({"prune__step": 0.2}, {"mask", "klaw"}),
        ({"prune__target": 0.9}, {"mask", "klaw"}),
        ({"prune__scope": "layer"}, {"mask", "klaw"}),
        ({"crr__drop": 0.01}, {"mask", "klaw"}),
        ({"crr__recover": 0.2}, {"recovery", "halt"}),
        ({"crr__halt": 4}, {"halt"}),
        ({"bn__statistics": "local"}, {"local"}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_every_setting_changes_what_it_should_and_nothing_else(usual, changes, touched):
    found = jax.jit(outcomes, static_argnums=0)(make(**changes))
    assert {part for part in usual if not same(usual[part], found[part])} == touched


def same(left, right):
    one, other = jax.tree.leaves(left), jax.tree.leaves(right)
    return len(one) == len(other) and all(np.allclose(a, b, rtol=1e-6) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "changes", [{}, {"kll__reference": "global"}, {"kll__space": "proxies"}, {"bn__statistics": "local"}]
)
def test_every_alternative_traces_through_a_whole_client_round(changes):
    config = tiny_config("fedklpr", **{f"method__{name}": value for name, value in (BASE | changes).items()})
    task, method = tiny_task(config)
    server, clients = rounds.start(task, method, 0)
    message = method.download(server, jnp.int32(0))
    engine = rounds.make_engine(task, method, epochs=1)
    inputs = rounds.round_inputs(engine, [message], clients[:1], [0], seed=0, round_=1)
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    stages = ClientUpdate(task, method)
    upload, state, _ = jax.eval_shape(stages.update, task.arrays, jnp.int32(1), jnp.ones(1), inputs)

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

    assert shapes(upload.model) == shapes(server.model)
    assert shapes(state) == shapes(clients[0])
    travels = "batch_stats" in upload.model
    assert travels == (changes.get("bn__statistics") != "local") == ("batch_stats" not in state.local)
    assert "classifier" in state.local["params"] and "classifier" not in upload.model["params"]


# --- ablations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        # n_k 10 and 30; r = (0, 1/2), so PRAW is 1 and 2, or without it 1 and 1.
        ({}, (1 / 7, 6 / 7)),
        ({"praw__form": "none"}, (0.25, 0.75)),
        ({"klpwa__form": "sum"}, ((1 / 4 + 1 / 3) / 2, (3 / 4 + 2 / 3) / 2)),
    ],
)
def test_without_klaw_the_number_of_images_takes_its_place(changes, weights):
    both = [model([[1.0, 1.0], [1.0, 1.0]]), model([[5.0, 0.0], [0.0, 5.0]], (1.0, 0.0))]
    method = make(klaw__sign="none", **changes)
    for klaw in ([1.0, 3.0], [5.0, 0.1]):
        uploads = uploads_of(both, [FULL, THIN], klaw=klaw, images=[10.0, 30.0])
        _, logs = method.aggregate(server_of(both[0], [FULL, FULL]), uploads, ServerContext())
        np.testing.assert_allclose(logs["weight"], weights, rtol=1e-5)
        np.testing.assert_allclose(logs["klaw"], klaw, rtol=1e-6)
    # A refused one has none, and its images do not count.
    refused = uploads._replace(accepted=jnp.array([False, True]))
    _, logs = method.aggregate(server_of(both[0], [FULL, FULL]), refused, ServerContext())
    assert logs["weight"].tolist() == [0.0, 1.0]


def test_without_sas_pruned_weights_count_as_zeros():
    previous = model([[9.0, 9.0], [9.0, 9.0]], (9.0, 9.0))
    both = [
        model([[1.0, 2.0], [3.0, 0.0]], (1.0, 1.0), (0.0, 1.0)),
        model([[5.0, 0.0], [0.0, 0.0]], (3.0, 0.0), (1.0, 0.0)),
    ]
    first_mask, second_mask = masks([[True, True], [True, False]]), masks([[True, False], [False, False]])
    uploads = uploads_of(both, [first_mask, second_mask], klaw=[1.0, 1.0], images=[10.0, 30.0])
    method = make(sas__form="zeros", klaw__sign="none", praw__form="none")
    server, logs = method.aggregate(server_of(previous, [FULL, FULL]), uploads, ServerContext())
    np.testing.assert_allclose(logs["weight"], [0.25, 0.75], rtol=1e-6)
    # What one keeps shrinks to its share; what nobody keeps becomes 0 and not the previous 9.
    np.testing.assert_allclose(kernel(server.model), [[4.0, 0.5], [0.75, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(kernel(server.model, "b"), [2.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(server.model["batch_stats"]["trunk"]["mean"], [0.75, 0.25], rtol=1e-6)
    # The server holds the masks all the same: downloads stay sparse.
    assert kernel(server.memory) == [kernel(first_mask), kernel(second_mask)]
