"""FedUReID's task: merges, table of clusters, early end of an epoch, and rounds of a small federation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import bottom_up as merging
from fedklpr_jax import proxies, simulation, train
from fedklpr_jax import round as rounds
from fedklpr_jax.assembly import Federation
from fedklpr_jax.errors import InputError
from fedklpr_jax.methods import make_method
from fedklpr_jax.metrics import Ledger, MetricsLog
from fedklpr_jax.tasks import bottom_up
from fedklpr_jax.tasks.bottom_up import Table
from tests.federations import TINY, tiny_config, tiny_sites

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

PIER, GATE, YARD = range(3)
SETTINGS = {
    "task__name": "bottom_up",
    "epochs": 1,
    "rounds": 4,
    "bottom_up__batch": 8,
    "bottom_up__first_epochs": 2,
    "bottom_up__first_decay_from": 1,
    "bottom_up__first": 2.0,
    "bottom_up__merge": 0.2,
    "bottom_up__identities": "",
    "bottom_up__size": 0.003,
    "bottom_up__scale": 10.0,
    "bottom_up__early": False,
    # Not read: every picture counts once.
    "data__copies": "3",
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 0.01,
    "method__ureid__mu": 0.5,
}



def config_of(**settings):
    return tiny_config("fedureid", **SETTINGS | settings)


def task_of(sites, **settings):
    return bottom_up.make_task(sites, TINY, config_of(**settings))


def federation_of(sites, **settings):
    config = config_of(**settings)
    task = bottom_up.make_task(sites, TINY, config)
    engine = rounds.make_engine(task, make_method(config.method), epochs=config.epochs)
    return Federation(config, sites, engine, ())


def begin(federation):
    server, clients = rounds.start(federation.task, federation.engine.method, 0)
    return simulation.RunState(server, clients, Ledger(), 0.0)


def host(state):
    """A copy that does not go when the server's state is donated."""
    return jax.tree.map(np.array, (state.server, list(state.clients)))


def run(federation, count):
    """The states after each of `count` rounds, and the events."""
    state, states, events = begin(federation), [], []
    for _ in range(count):
        state, event = simulation.run_round(federation, state)
        states.append(host(state))
        events.append(event)
    return states, events


def assert_same(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def sites():
    return tiny_sites()


@pytest.fixture(scope="module")
def task(sites):
    return task_of(sites)


@pytest.fixture(scope="module")
def federation(sites):
    return federation_of(sites)


@pytest.fixture(scope="module")
def history(federation):
    return run(federation, 3)


def padded(task, labels):
    return np.concatenate([labels, np.full(len(task.labelling.unlabelled) - len(labels), -1)]).astype(np.int32)


def epoch_of(task, client, labels, seed=0):
    """The `Epoch` of hand-made labels, and the features it was made from."""
    features = np.random.default_rng(seed).normal(size=(len(task.labelling.unlabelled), TINY.feature_dim))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    prepare = jax.jit(task.labelling.prepare)
    made = prepare(task.arrays, features, padded(task, labels), task.clients[client], jax.random.key(seed))
    return made, features


# --- who is trained on ----------------------------------------------------------------------------


def test_an_epoch_is_every_training_picture_once_but_for_the_last_incomplete_batch(task, sites):
    for client, (site, data) in enumerate(zip(sites, task.clients, strict=True)):
        n = len(site.train)
        assert int(data.task.points) == n, "copies are left out"
        epoch, _ = epoch_of(task, client, np.arange(n))
        training = int(data.task.first) + np.flatnonzero(~data.task.held[:n])
        assert int(epoch.steps) == len(training) // 8 == task.plan(0, 0, client, 2).shape[1]
        drawn = np.asarray(epoch.plan)[: int(epoch.steps)].ravel()
        assert len(set(drawn.tolist())) == len(drawn) and np.isin(drawn, training).all()
        other, _ = epoch_of(task, client, np.arange(n), seed=1)
        assert (np.asarray(other.plan)[0] != np.asarray(epoch.plan)[0]).any()


def test_a_client_with_less_than_a_batch_has_one(sites):
    task = task_of(sites, bottom_up__batch=64)
    n = len(sites[GATE].train)
    epoch, _ = epoch_of(task, GATE, np.arange(n))
    count = int(task.clients[GATE].images)
    drawn = np.asarray(epoch.plan)[0].tolist()
    assert count < 64 and int(epoch.steps) == 1 and len(set(drawn)) == count and drawn[:4] == drawn[count : count + 4]


@pytest.mark.parametrize(("clusters", "trains"), [(1, False), (2, True)])
def test_one_cluster_trains_nothing(task, sites, clusters, trains):
    n, held = len(sites[YARD].train), task.clients[YARD].task.held
    labels = np.zeros(n, int)
    labels[np.flatnonzero(held[:n] if clusters == 1 else ~held[:n])[-1]] = 1
    assert (int(epoch_of(task, YARD, labels)[0].steps) > 0) == trains


def test_only_what_has_been_merged_may_stop_early(task, sites):
    n = len(sites[YARD].train)
    assert not bool(epoch_of(task, YARD, np.arange(n))[0].memory.may_stop)
    training = np.flatnonzero(~task.clients[YARD].task.held[:n])
    labels = np.arange(n)
    labels[training[1]] = labels[training[0]]
    assert bool(epoch_of(task, YARD, labels)[0].memory.may_stop)


# --- table, loss and stop by hand -----------------------------------------------------------------


def test_the_table_starts_as_the_normalised_means_of_the_clusters(task, sites):
    n, data = len(sites[YARD].train), task.clients[YARD].task
    labels = np.arange(n) // 3
    labels[data.held[:n]] = n
    epoch, features = epoch_of(task, YARD, labels)
    rows = epoch.memory.rows
    for cluster in np.unique(labels[:n][~data.held[:n]]):
        mean = features[:n][labels == cluster].mean(axis=0)
        found = np.asarray(rows.of_point)[:n][labels == cluster]
        assert len(set(found.tolist())) == 1, "one row, whatever the cameras"
        np.testing.assert_allclose(rows.features[found[0]], mean / np.linalg.norm(mean), atol=1e-5)
    assert (np.asarray(rows.of_point)[data.held] == -1).all() and n not in np.asarray(rows.clusters)


def client_with(task, table):
    """The first client with a table of three rows: points 0 and 1 in row 0, 2 in row 1, 3 in row 2."""
    return task.clients[PIER]._replace(memory=table)


def table_of(task, features):
    points = len(task.labelling.unlabelled)
    rows = proxies.blank(points, len(features[0]))
    rows = rows._replace(
        features=rows.features.at[:3].set(jnp.array(features)),
        clusters=rows.clusters.at[:3].set(jnp.arange(3)),
        of_point=rows.of_point.at[:4].set(jnp.array([0, 0, 1, 2])),
    )
    return Table(rows, jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.bool_(True))


def test_loss_and_table_by_hand(task):
    assert int(task.clients[PIER].task.first) == 0
    client = client_with(task, table_of(task, [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    # Of lengths 2 and 5; the rows of the batch are of length 1.
    embedding = jnp.array([[2.0, 0.0], [3.0, 4.0]])
    points = len(task.labelling.unlabelled)
    logits = np.full((2, points), -1e9, np.float32)
    logits[:, :3] = [[10.0, 0.0, 6.0], [6.0, 8.0, 10.0]]
    outputs, rows = {"embedding": embedding, "logits": jnp.array(logits)}, jnp.array([1, 2])
    # The first is right, the second is nearest to row 2 instead of 1.
    expected = np.mean([np.log(1 + np.exp(-10) + np.exp(-4)), np.log(1 + np.exp(-2) + np.exp(2))])
    assert float(task.loss(task.arrays, outputs, rows, client)) == pytest.approx(expected, rel=1e-5)
    after = task.remember(outputs, rows, client)
    # (1, 0) + (1, 0), and (0, 1) + (0.6, 0.8), each of length 1 again; row 2 was not met.
    moved = np.array([0.3, 0.9])
    np.testing.assert_allclose(
        after.rows.features[:3], [[1.0, 0.0], moved / np.linalg.norm(moved), [0.6, 0.8]], atol=1e-6
    )
    assert [float(after.precision), float(after.total), int(after.batches)] == [0.5, 0.5, 1]
    # Two pictures of a cluster in one batch move its row one after the other.
    twice = task.remember(outputs, jnp.array([0, 1]), client)
    second = np.array([1.0, 0.0]) / 2 + np.array([0.6, 0.8]) / 2
    np.testing.assert_allclose(twice.rows.features[0], second / np.linalg.norm(second), atol=1e-6)


def test_logits_are_ten_times_the_similarities(task, sites):
    n = len(sites[YARD].train)
    epoch, _ = epoch_of(task, YARD, np.arange(n) // 3)
    client, rows = task.clients[YARD]._replace(memory=epoch.memory), np.asarray(epoch.plan[0])
    variables = task.init(jax.random.key(0))
    forward = jax.jit(task.forward, static_argnums=3)
    outputs, _ = forward(variables, task.inputs(task.arrays, rows), client, False, jax.random.key(0))
    embedding = np.asarray(outputs["embedding"])
    features = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    there = np.asarray(epoch.memory.rows.clusters) >= 0
    expected = 10 * features @ np.asarray(epoch.memory.rows.features)[there].T
    np.testing.assert_allclose(outputs["logits"][:, there], expected, atol=1e-4)
    assert (outputs["logits"][:, ~there] < -1e8).all()


@pytest.mark.parametrize(
    ("precisions", "stops"),
    [
        ((), False),
        ((0.5,), False),
        ((0.5, 1.0), True),
        # 2.875 / 3 = 0.958; a batch that is all right has ended the epoch before, so this takes no 1.
        ((0.96875, 0.96875, 0.9375), True),
        ((0.9375, 0.9375, 0.9375), False),
        # The mean of a batch before counts, not only the last.
        ((0.875, 0.96875), False),
    ],
)
def test_when_an_epoch_ends(sites, precisions, stops):
    task = task_of(sites, bottom_up__early=True)
    table = table_of(task, [[1.0, 0.0]] * 3)._replace(
        precision=jnp.float32(precisions[-1] if precisions else 0),
        total=jnp.float32(sum(precisions)),
        batches=jnp.int32(len(precisions)),
    )
    assert bool(task.stop(table)) == stops
    assert not bool(task.stop(table._replace(may_stop=jnp.bool_(False))))
    assert task_of(sites).stop is None


# --- merges ---------------------------------------------------------------------------------------


def test_clusters_start_as_single_pictures_and_are_merged_once_a_round(task, sites):
    n, assign = len(sites[YARD].train), task.labelling.assign_host
    features = np.zeros((len(task.labelling.unlabelled), 3), np.float32)
    features[:n] = np.random.default_rng(0).normal(size=(n, 3))
    blank = task.labelling.unlabelled
    single = assign(features, YARD, blank, 0, 0)
    np.testing.assert_array_equal(single, padded(task, np.arange(n)))
    # Whenever a client comes first.
    np.testing.assert_array_equal(assign(features, YARD, blank, 3, 0), single)
    np.testing.assert_array_equal(assign(features, YARD, single, 0, 1), single)
    merged = assign(features, YARD, single, 1, 0)
    np.testing.assert_array_equal(merged, padded(task, merging.merge(features[:n], np.arange(n), int(0.2 * n))))
    assert merged.max() + 1 == n - int(0.2 * n)
    # Not in later epochs, nor after the run's last round.
    np.testing.assert_array_equal(assign(features, YARD, merged, 1, 1), merged)
    np.testing.assert_array_equal(assign(features, YARD, merged, 4, 0), merged)


def test_two_clusters_are_left(sites):
    task = task_of(sites, bottom_up__merge=1.0)
    n = len(sites[YARD].train)
    features = np.random.default_rng(0).normal(size=(len(task.labelling.unlabelled), 3)).astype(np.float32)
    labels = task.labelling.assign_host(features, YARD, padded(task, np.arange(n)), 1, 0)
    assert labels[:n].max() == 1
    np.testing.assert_array_equal(task.labelling.assign_host(features, YARD, labels, 2, 0), labels)


def test_a_traced_form_is_refused(task):
    assert task.labelling.on_host
    with pytest.raises(NotImplementedError, match="merged on the host"):
        task.labelling.assign(jnp.zeros((4, 2)), task.clients[0], jnp.int32(0), jnp.int32(0))


@pytest.mark.short
def test_how_many_merges():
    assert bottom_up.merges_a_round(1000, None, share=0.05, rounds=20) == 50
    assert bottom_up.merges_a_round(1019, None, share=0.05, rounds=20) == 50
    assert bottom_up.merges_a_round(1000, 200.0, share=0.05, rounds=20) == 40
    assert bottom_up.merges_a_round(1000, 0.1, share=0.05, rounds=20) == 45
    assert bottom_up.merges_a_round(1000, 2000.0, share=0.05, rounds=20) == 0


@pytest.mark.short
def test_estimates_of_identities(sites):
    names = ["ward", "viper", "3dpes"]
    assert bottom_up.parse_identities("", names) == [None, None, None]
    assert bottom_up.parse_identities("0.1", names) == [0.1, 0.1, 0.1]
    assert bottom_up.parse_identities("viper:316, 0.2", names) == [0.2, 316.0, 0.2]
    assert bottom_up.parse_identities("viper:316", names) == [None, 316.0, None]
    with pytest.raises(
        InputError, match=r"^config\.bottom_up\.identities: 'hut' is no client; there are pier, gate, yard$"
    ):
        task_of(sites, bottom_up__identities="hut:4")


def test_personalised_clustering_reaches_the_estimate(sites):
    task = task_of(sites, bottom_up__identities="yard:10,0.5")
    features = np.random.default_rng(0).normal(size=(len(task.labelling.unlabelled), 3)).astype(np.float32)
    for client, people in ((YARD, 10.0), (PIER, 0.5 * len(sites[PIER].train))):
        n = len(sites[client].train)
        labels = task.labelling.assign_host(features, client, padded(task, np.arange(n)), 1, 0)
        assert labels.max() + 1 == n - int((n - people) / 4)


# --- rounds ---------------------------------------------------------------------------------------


def test_first_epochs_and_step_sizes(task, federation):
    assert task.first_epochs == 2
    assert [simulation.epochs_of(federation, round_) for round_ in range(3)] == [2, 1, 1]
    assert [task.learning_rate(0, epoch) for epoch in range(3)] == [2.0, pytest.approx(0.2), pytest.approx(0.2)]
    assert [task.learning_rate(round_, epoch) for round_, epoch in ((1, 0), (1, 7), (3, 0))] == [1.0] * 3


def test_rounds_merge_and_log_it(federation, history, sites):
    states, events = history
    for k, site in enumerate(sites):
        n = len(site.train)
        counts = [int(clients[k].labels.max()) + 1 for _, clients in states]
        assert counts == [n, n - int(0.2 * n), n - 2 * int(0.2 * n)]
        labels = [clients[k].labels[:n] for _, clients in states]
        for fine, coarse in zip(labels, labels[1:], strict=False):
            assert len(set(zip(fine.tolist(), coarse.tolist(), strict=True))) == fine.max() + 1, "never split"
        assert (states[-1][1][k].labels[n:] == -1).all()
    for event in events:
        assert event["refused"] == []
        for row in event["clients"].values():
            assert len(row["clusters"]) == (2 if event["round"] == 0 else 1)
            assert set(row["clustered"]) == {1.0} and row["steps"] > 0 and np.isfinite(row["loss"])
            assert 0 < min(row["purity"]) <= 1
    for row in events[0]["clients"].values():
        assert row["purity"] == [1.0, 1.0] and row["clusters"] == [row["images"]] * 2


def test_merges_look_at_the_model_that_a_round_begins_with(federation, history):
    task, (states, _) = federation.task, history
    server, clients = states[0]
    for k, data in enumerate(task.clients):
        # Half its own, half the mean.
        model = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, clients[k].memory.model, server.model)
        features = np.asarray(jax.jit(task.labelling.embed)(task.arrays, model, data))
        expected = task.labelling.assign_host(features, k, clients[k].labels, 1, 0)
        np.testing.assert_array_equal(states[1][1][k].labels, expected)


def test_an_interrupted_run_goes_on_bitwise(federation, history, tmp_path):
    state, _ = simulation.run_round(federation, begin(federation))
    state, _ = simulation.run_round(federation, state)
    with MetricsLog.open(tmp_path / "metrics.jsonl") as log:
        train._save(federation, tmp_path, state, log)
    restored, _ = train._load_or_start(federation, tmp_path)
    assert_same([c.labels for c in restored.clients], [c.labels for c in history[0][1][1]])
    state, _ = simulation.run_round(federation, restored)
    assert_same(host(state), history[0][2])


def test_identities_and_cameras_change_nothing(task, sites):
    random = np.random.default_rng(0)
    shuffled = [
        dataclasses.replace(
            site,
            train=dataclasses.replace(
                site.train, ids=random.permutation(site.train.ids), cams=random.permutation(site.train.cams)
            ),
        )
        for site in sites
    ]
    other = task_of(shuffled)
    labels = np.arange(len(sites[PIER].train)) // 2
    assert_same(epoch_of(task, PIER, labels), epoch_of(other, PIER, labels))
    assert_same(task.arrays, other.arrays)


def test_an_epoch_of_what_is_easily_told_apart_ends_after_its_first_batch(sites):
    # Black and white pictures in two clusters.
    n = len(sites[YARD].train)
    white = np.arange(n) % 2
    pixels = np.broadcast_to(np.uint8(255 * white)[:, None, None, None], sites[YARD].train.pixels.shape)
    site = dataclasses.replace(sites[YARD], train=dataclasses.replace(sites[YARD].train, pixels=pixels))
    federation = federation_of([site], bottom_up__early=True, bottom_up__merge=0.0, data__erase=0.0, data__pad=0)
    state = begin(federation)
    clients = state.clients.after(0, {0: state.clients[0]._replace(labels=padded(federation.task, white))})
    state = state._replace(server=state.server._replace(round=jnp.int32(1)), clients=clients)
    _, event = simulation.run_round(federation, state)
    assert event["clients"]["yard"]["steps"] == 1 < int(federation.task.clients[0].images) // 8
