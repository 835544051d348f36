"""Merges that one client cannot pull away, scalars that no honest client tells, and what poisoned uploads then do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax import aggregation, refusals, robust, simulation
from fedklpr_jax import round as rounds
from fedklpr_jax.assembly import Federation
from fedklpr_jax.client_maps import Common
from fedklpr_jax.config import validate
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import (
    Message,
    Method,
    ServerContext,
    ServerState,
    Upload,
    Uploads,
    average,
    average_equally,
    send_all,
)
from fedklpr_jax.methods import METHODS, make_method
from fedklpr_jax.metrics import Ledger
from fedklpr_jax.trees import split, unstack
from tests.federations import tiny_config, tiny_task, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")
TARGETS = ((1.0, 3.0), (2.0, -1.0), (4.0, 0.5))
NAN = float("nan")
MERGES = {name: jax.jit(robust.make_merge(name, 0.2)) for name in ("median", "trimmed")}


def test_the_median_by_hand():
    median = jax.jit(robust.masked_median)
    params = {"w": jnp.array([[1.0, 7.0, 4.0, 9.0], [2.0, 9.0, 8.0, 9.0], [1e9, 0.0, 5.0, 9.0], [NAN] * 4])}
    masks = {"w": jnp.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)}
    merged = median(params, masks, jnp.array([0.1, 0.2, 0.7, 0.0]), {"w": jnp.full(4, -1.0)})
    # The fourth client does not count; three, two, one and nobody hold the entries.
    assert merged["w"].tolist() == [2.0, 8.0, 4.0, -1.0]
    dense = median(params, None, jnp.array([0.1, 0.2, 0.7, 0.0]), {"w": jnp.full(4, -1.0)})
    assert dense["w"].tolist() == [2.0, 7.0, 5.0, 9.0]
    none = median(params, None, jnp.zeros(4), {"w": jnp.full(4, -1.0)})
    assert none["w"].tolist() == [-1.0] * 4


@pytest.mark.parametrize(
    "trim, wanted", [(0, (1e9 + 21) / 5), (0.1, 20 / 3), (0.2, 20 / 3), (0.21, 6.0), (0.49, 6.0)]
)
def test_the_trimmed_mean_by_hand(trim, wanted):
    """None, one, or two of five values cut at each end."""
    values = jnp.array([12.0, 1.0, 1e9, 6.0, 2.0])[:, None]
    merged = jax.jit(robust.make_merge("trimmed", trim))(values, None, jnp.ones(5), jnp.zeros(1))
    assert merged[0] == pytest.approx(wanted, rel=1e-6)


def test_the_share_that_is_cut_is_the_decimal_number():
    """0.28 * 25 is 7.000000000000001 in floating point, but 7 values go."""
    values = jnp.square(jnp.arange(25.0))[:, None]
    merged = jax.jit(robust.make_merge("trimmed", 0.28))(values, None, jnp.ones(25), jnp.zeros(1))
    assert merged[0] == pytest.approx(np.mean(np.arange(7, 18) ** 2), rel=1e-6)
    for trim in (0.5, -0.1):
        with pytest.raises(ValueError, match="trim"):
            robust.masked_trimmed_mean(values, None, jnp.ones(25), jnp.zeros(1), trim=trim)
    with pytest.raises(ValueError, match="krum"):
        robust.make_merge("krum", 0.2)


def test_lists_and_dtypes_are_those_of_the_mean():
    params = [{"w": jnp.float32(k), "b": jnp.bfloat16([k, 2 * k])} for k in (1, 2, 9)]
    masks = [{"w": jnp.array(True), "b": jnp.array([True, k < 9])} for k in (1, 2, 9)]
    previous = {"w": jnp.float32(0), "b": jnp.bfloat16([0, 0])}
    merged = robust.masked_median(params, masks, jnp.ones(3), previous)
    assert merged["w"] == 2 and merged["b"].tolist() == [2, 3]
    assert jax.tree.map(lambda leaf: leaf.dtype, merged) == jax.tree.map(lambda leaf: leaf.dtype, previous)
    assert robust.masked_median({}, None, jnp.ones(3), {}) == {}


def numpy_merge(values, kept, previous, merge):
    """The definition, entry by entry."""
    merged = []
    for entry in range(values.shape[1]):
        held = np.sort(values[kept[:, entry], entry].astype(np.float64))
        cut = min(-(-2 * len(held) // 10), (len(held) - 1) // 2) if merge == "trimmed" else 0
        middle = np.median if merge == "median" else np.mean
        merged.append(middle(held[cut : len(held) - cut]) if len(held) else previous[entry])
    return merged


@settings(deadline=None, max_examples=40)
@given(clients=st.sampled_from([1, 2, 3, 4, 7]), seed=st.integers(0, 2**31), merge=st.sampled_from(sorted(MERGES)))
def test_merges_are_what_numpy_finds(clients, seed, merge):
    random = np.random.default_rng(seed)
    values = random.normal(size=(clients, 6)).astype(np.float32)
    kept, weights = random.random((clients, 6)) < 0.6, (random.random(clients) < 0.8).astype(np.float32)
    merged = MERGES[merge](values, kept, weights, jnp.arange(6.0))
    wanted = numpy_merge(values, kept & (weights[:, None] > 0), np.arange(6.0), merge)
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


FLOATS = st.floats(-float(np.float32(3e38)), float(np.float32(3e38)), width=32)


@settings(deadline=None, max_examples=60)
@given(
    poison=st.lists(FLOATS, min_size=4, max_size=4), weight=st.floats(0, 2.0**100, width=32),
    clients=st.sampled_from([3, 4, 7]), seed=st.integers(0, 2**31), merge=st.sampled_from(sorted(MERGES)),
)  # fmt: skip
def test_one_poisoned_client_leaves_every_entry_among_the_honest_values(poison, weight, clients, seed, merge):
    random = np.random.default_rng(seed)
    honest = random.normal(size=(clients - 1, 4)).astype(np.float32)
    kept = random.random((clients - 1, 4)) < 0.5
    # Two honest clients hold every entry; against one alone there is no telling who is wrong.
    kept[:2] = True
    values, masks = np.vstack([honest, poison]).astype(np.float32), np.vstack([kept, random.random((1, 4)) < 0.9])
    weights = np.append(random.random(clients - 1) + 0.1, weight).astype(np.float32)
    merged = np.asarray(MERGES[merge](values, masks, weights, jnp.zeros(4)))
    low = np.where(kept, honest, np.inf).min(axis=0)
    high = np.where(kept, honest, -np.inf).max(axis=0)
    slack = 1e-5 * (1 + np.abs(merged))
    assert ((low - slack <= merged) & (merged <= high + slack)).all()


@functools.partial(jax.jit, static_argnames=("form", "sign"))
def klpwa(divergences, pruned, accepted, cap, form, sign):
    align = aggregation.klaw(divergences, sign=sign, where=accepted)
    return aggregation.klpwa(align, aggregation.praw(pruned), form=form, cap=cap, where=accepted)


@settings(deadline=None, max_examples=80)
@given(
    told=st.lists(st.tuples(st.floats(0, 1e6, width=32), st.floats(0, 1, width=32), st.booleans()),
                  min_size=5, max_size=5),
    cap=st.floats(1, 8), form=st.sampled_from(["product", "sum"]), sign=st.sampled_from(["align", "gain"]),
)  # fmt: skip
def test_no_told_scalar_lifts_a_weight_over_the_cap(told, cap, form, sign):
    divergences, pruned, accepted = (jnp.array(column) for column in zip(*told, strict=True))
    weights, number = np.asarray(klpwa(divergences, pruned, accepted, cap, form, sign)), int(accepted.sum())
    assert np.isfinite(weights).all() and (weights >= 0).all() and not weights[~np.asarray(accepted)].any()
    if number:
        assert weights.sum() == pytest.approx(1, abs=1e-4) and weights.max() <= cap / number + 1e-4


def test_what_one_upload_weighs_at_most():
    """Ten clients, of which the first lies as much as it may."""
    accepted = jnp.ones(10, bool)
    assert aggregation.image_weights(jnp.array([0.0] + [10.0] * 9), accepted)[0] == 0
    # CDW: 2 of 2 + 9 * 0.02. It has no cap.
    by_images = jnp.full(10, 0.1)
    assert aggregation.distance_weights(jnp.array([2.0] + [0.02] * 9), by_images)[0] == pytest.approx(2 / 2.18)
    # KLAW's lie makes it 1 / median against 1 / (2 median); a mask of nothing makes PRAW 1e6. The cap holds both.
    align = aggregation.klaw(jnp.array([0.0] + [0.1] * 9))
    assert align[0] / align[1] == pytest.approx(2)
    emptied = aggregation.klpwa(align, aggregation.praw(jnp.array([1.0] + [0.5] * 9)), cap=3.0)
    assert emptied[0] == pytest.approx(0.3) and emptied[1] == pytest.approx(0.7 / 9)


@pytest.mark.parametrize("scalars, fault", [
    ({"images": 24.0, "klaw": 0.3, "cdw": 1.9}, ""),
    ({"images": 0.0, "klaw": -1e-6, "cdw": -1e-7}, ""),
    ({"images": 25.0}, "scalar 'images' is 25; from 0 to 24 is allowed"),
    ({"images": -1.0}, "scalar 'images' is -1; from 0 to 24 is allowed"),
    ({"images": NAN}, "scalar 'images' is nan; from 0 to 24 is allowed"),
    ({"images": 24.0, "cdw": 3.0}, "scalar 'cdw' is 3; from -0.001 to 2.001 is allowed"),
    ({"images": 24.0, "klaw": 1e30}, "scalar 'klaw' is 1e+30; from -0.001 to 1e+06 is allowed"),
    ({"images": 24.0, "klaw": -0.5}, "scalar 'klaw' is -0.5; from -0.001 to 1e+06 is allowed"),
    ({"another": -1e30}, ""),
])  # fmt: skip
def test_scalars_out_of_their_range_are_named(scalars, fault):
    assert refusals.upload_fault(True, scalars, 24.0) == fault
    assert bool(refusals.scalars_hold(scalars, jnp.float32(24))) == (not fault)
    assert refusals.upload_fault(False, {"images": 24.0}, 24.0) == refusals.NOT_FINITE


def toy(method, merge="mean", devices=1, **settings):
    engine = rounds.make_engine(
        toy_task(TARGETS), method, epochs=1, devices=devices, merge=robust.make_merge(merge, 0.2)
    )
    server, clients = rounds.start(engine.task, method, 0)
    config = tiny_config("fedpav", epochs=1, **settings)
    return Federation(config, [], engine, ()), simulation.RunState(server, clients, Ledger(), 0.0)


def boast(model, client, context):
    """Client 1 claims a thousand times the images that it has."""
    upload, client, logs = send_all(model, client, context)
    factor = jnp.where(context.client == 1, 1000.0, 1.0)
    return upload._replace(scalars={"images": factor * context.images}), client, logs


@pytest.mark.parametrize("encode, aggregate", [(True, average), (False, average), (False, lambda *a: average(*a))],
                         ids=["encoded", "summed", "stacked"])  # fmt: skip
def test_a_client_that_claims_more_images_than_it_registered_is_refused(encode, aggregate):
    federation, state = toy(Method("boastful", finish=boast, aggregate=aggregate), wire__encode=encode)
    state, event = simulation.run_round(federation, state)
    assert event["refused"] == [
        {"client": "client 1", "reason": "scalar 'images' is 2000; from 0 to 2 is allowed"}
    ]
    # Half of the way to the mean of the other two, weighted 1 to 3.
    np.testing.assert_allclose(state.server.model["params"]["trunk"]["kernel"], np.array([3.25, 1.125]) / 2)


@pytest.mark.parametrize("encode", [True, False])
@pytest.mark.parametrize("merge, wanted", [("median", [2.0, 0.5]), ("trimmed", [2.0, 0.5])])
def test_a_round_of_another_merge_by_hand_on_any_number_of_devices(merge, wanted, encode):
    models = []
    for devices in (1, 2, 4):
        federation, state = toy(Method("fedavg"), merge, devices, wire__encode=encode)
        assert federation.engine.update_summed is None
        state, _ = simulation.run_round(federation, state)
        models.append(np.asarray(state.server.model["params"]["trunk"]["kernel"]))
    np.testing.assert_allclose(models[0], np.array(wanted) / 2)
    for model in models[1:]:
        np.testing.assert_array_equal(model, models[0])


@pytest.mark.parametrize("merge", ["median", "trimmed"])
def test_uploads_spread_over_devices_merge_as_on_one(merge):
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("clients"))
    random = np.random.default_rng(1)
    values, kept = random.normal(size=(8, 5, 3)).astype(np.float32), random.random((8, 5, 3)) < 0.6
    weights, previous = jnp.ones(8).at[2].set(0.0), jnp.zeros((5, 3))
    spread = MERGES[merge](*jax.device_put((values, kept, weights), placed), previous)
    np.testing.assert_array_equal(spread, MERGES[merge](values, kept, weights, previous))


@pytest.fixture(scope="module")
def tiny():
    return tiny_task(tiny_config("fedpav"))[0]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"local", "centralised"}))
def test_every_method_merges_by_the_mean_that_it_is_given(name, tiny):
    """`context.mean` here adds 1 to what was; a method that averaged by itself would not."""
    config = tiny_config(name, method__reid__distill_every=0)
    method = make_method(config.method)
    model, _ = split(tiny.init(jax.random.key(0)), method.is_local)
    mask = method.capacity.first_mask(model, 0) if method.capacity else method.client_mask(model)
    server = ServerState(model, method.server_memory(model, 3), jnp.int32(0))
    stack3 = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tree)  # noqa: E731
    scalars = {"images": jnp.ones(3), "klaw": jnp.ones(3), "cdw": jnp.ones(3)}
    uploads = Uploads(stack3(model), stack3(mask), scalars, jnp.arange(3), jnp.ones(3, bool))
    plus = ServerContext(lambda params, masks, weights, old: jax.tree.map(lambda leaf: leaf + 1.0, old))
    after, _ = jax.jit(lambda server, uploads: method.aggregate(server, uploads, plus))(server, uploads)
    for new, old in zip(jax.tree.leaves(after.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(new, old + 1.0, rtol=1e-6)


@pytest.mark.parametrize("method, changes, right", [
    ("fedreid", {}, "distill_every"),
    ("fedreid", {"method__reid__distill_every": 0, "method__reid__cluster": True}, "cluster"),
    ("fedreid", {"method__reid__distill_every": 0, "method__reid__cloud_every": 2}, "cloud_every"),
    ("fedavg", {"privacy__clip": 1.0}, "privacy.clip=0"),
])  # fmt: skip
def test_merges_that_would_not_hold_are_refused(method, changes, right):
    with pytest.raises(InputError, match=right) as caught:
        validate(tiny_config(method, merge__name="median", **changes))
    assert "\n" not in str(caught.value)
    validate(tiny_config("fedreid", merge__name="trimmed", method__reid__distill_every=0))


def test_a_poisoned_upload_wrecks_the_mean_alone(tiny):
    """A federation of three sites; one uploads a million times its values in every round."""
    method = make_method(tiny_config("fedpav").method)
    engines = {name: rounds.make_engine(tiny, method, epochs=1, merge=robust.make_merge(name, 0.2))
               for name in ("mean", "median", "trimmed")}  # fmt: skip
    train = engines["mean"].update

    def run(merge, poisoned):
        server, clients = rounds.start(tiny, method, 0)
        for round_ in range(3):
            message = Common(Message(jax.device_get(server.model), None))
            inputs = rounds.round_inputs(engines["mean"], message, clients, range(3), seed=0, round_=round_)
            uploads, states, logs = train(round_, rounds.rates(tiny, round_, 1), inputs)
            sent = unstack(uploads, 3)
            if poisoned:
                with np.errstate(over="ignore"):
                    sent[2] = Upload(jax.tree.map(lambda leaf: 1e6 * leaf, sent[2].model), None, sent[2].scalars)
            together = rounds.stack_uploads(sent, range(3), [True] * 3)
            server, clients = engines[merge].aggregate(server, together)[0], unstack(states, 3)
        return np.asarray(logs["loss"]), float(optax.tree.norm(server.model["params"]))

    losses, size = run("mean", poisoned=False)
    assert not run("mean", poisoned=True)[1] < 1e4 * size
    for merge in ("median", "trimmed"):
        beside, length = run(merge, poisoned=True)
        np.testing.assert_allclose(beside, losses, rtol=0.1)
        assert length == pytest.approx(size, rel=0.2)


def test_equal_means_leave_the_refused_out():
    server = ServerState({"w": jnp.zeros(1)}, (), jnp.int32(0))
    uploads = Uploads({"w": jnp.array([[2.0], [4.0], [NAN]])}, None, {}, jnp.arange(3), jnp.array([True, True, False]))
    after, logs = average_equally(server, uploads, ServerContext())
    assert after.model["w"].tolist() == [3.0] and logs["weight"].tolist() == [0.5, 0.5, 0.0]
