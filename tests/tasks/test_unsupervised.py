"""The unsupervised task: what it trains on, that identities change nothing, and a whole round however it is run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import assembly, proxies, simulation, train
from fedklpr_jax import round as rounds
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.ranking import euclidean_distances, evaluate_ranking
from fedklpr_jax.methods import make_method
from fedklpr_jax.metrics import Ledger, MetricsLog
from fedklpr_jax.tasks import unsupervised
from tests.federations import TINY, tiny_config, tiny_sites, tiny_unsupervised_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

PIER, GATE, YARD = range(3)
SETTINGS = {
    "task__name": "unsupervised",
    "epochs": 2,
    "data__copies": "1",
    "cluster__k1": 6,
    "cluster__k2": 2,
    # Features of random weights lie close together, so that Jaccard distances crowd around fractions of small numbers:
    # at 0.6 = 3/5 rounding would decide.
    "cluster__eps": 0.585,
    "cluster__min_samples": 2,
    "cluster__where": "host",
    "contrast__intra": 0.6,
    "contrast__inter": 0.7,
    "contrast__online": 0.0,
    "contrast__temperature": 0.2,
    # All of them: which of two equally similar ones is among the hardest is up to rounding.
    "contrast__negatives": 50,
    "contrast__momentum": 0.2,
    # Adam's first step is the sign of the gradient: where that is nearly 0, rounding decides it.
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 0.01,
    "participation": 1.0,
    "last__epochs": 0,
    "wire__dtype": "float32",
}



def config_of(method="fedavg", **settings):
    return tiny_config(method, **SETTINGS | settings)


def task_of(sites, **settings):
    return unsupervised.make_task(sites, TINY, config_of(**settings))


def federation_of(sites=None, *, method="fedavg", client_map="map", devices=1, **settings):
    config = config_of(method, **settings)
    task, chosen = tiny_unsupervised_task(config)
    if sites is not None:
        task = unsupervised.make_task(sites, TINY, config)
    engine = rounds.make_engine(task, chosen, epochs=config.epochs, client_map=client_map, devices=devices)
    return assembly.Federation(config, sites or tiny_sites(), engine, ())


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


def update(federation):
    """What the clients make of round 0."""
    state = begin(federation)
    engine, count = federation.engine, len(state.clients)
    messages = [engine.download(state.server, np.int32(k)) for k in range(count)]
    inputs = rounds.round_inputs(engine, messages, state.clients, range(count), seed=0, round_=0)
    return jax.device_get(engine.update(0, rounds.rates(federation.task, 0, engine.epochs), inputs))


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
def variables(task):
    return task.init(jax.random.key(0))


@pytest.fixture(scope="module")
def embed(variables):
    """Normalised embeddings of uint8 pictures by the network alone."""
    trunk = {name: variables[name]["trunk"] for name in ("params", "batch_stats")}
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def found(pixels):
        features = TINY.apply(trunk, jnp.asarray((pixels / 255 - mean) / deviation, jnp.float32), False)[0]["embedding"]
        return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))

    return found


@pytest.fixture(scope="module")
def federation():
    return federation_of()


@pytest.fixture(scope="module")
def history(federation):
    return run(federation, 2)


@pytest.fixture(scope="module")
def first(federation):
    return update(federation)


def held_rows(data):
    """The rows of a client's points that are held out, of every copy."""
    return int(data.task.first) + np.flatnonzero(data.task.held[: int(data.task.points)])


def bank_and_plan(task, client, labels, seed=0):
    """`Epoch` of hand-made labels, padded as the task pads them."""
    padded = np.full(len(task.labelling.unlabelled), -1, np.int32)
    padded[: len(labels)] = labels
    features = np.random.default_rng(seed).normal(size=(len(padded), TINY.feature_dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    prepare = jax.jit(task.labelling.prepare)
    return prepare(task.arrays, features, padded, task.clients[client], jax.random.key(seed))


# --- who is trained on ----------------------------------------------------------------------------


def test_held_out_pictures_are_in_no_batch_and_not_in_the_probe(task, sites):
    for client, (site, data) in enumerate(zip(sites, task.clients, strict=True)):
        held = held_rows(data)
        assert len(held) == max(round(len(site.train) / 10), 4) == len(site.train) - data.images
        assert data.probe.shape == (32,) and not np.isin(data.probe, held).any()
        own = int(data.task.first) + np.arange(len(site.train))
        assert np.isin(data.probe, own).all()
        # Everybody clustered, two clusters.
        epoch = bank_and_plan(task, client, np.arange(len(site.train)) % 2)
        batches = np.asarray(epoch.plan)[: int(epoch.steps)]
        assert int(epoch.steps) > 0 and np.isin(batches, own).all() and not np.isin(batches, held).any()
        assert (np.asarray(epoch.memory.of_point)[data.task.held] == -1).all()
        assert (np.asarray(epoch.memory.of_point)[~data.task.held] >= 0).all()


def test_the_held_out_are_the_queries_of_the_validation_rows(task):
    for data in task.clients:
        queries, count = int(data.task.queries), int(data.task.validations)
        rows = np.asarray(data.task.validation)
        np.testing.assert_array_equal(rows[:queries] + data.task.first, held_rows(data))
        gallery = rows[queries:count]
        # Four training pictures for each, no one twice.
        assert len(set(gallery.tolist())) == len(gallery) == min(4 * queries, int(data.images))
        assert not data.task.held[gallery].any()


def test_a_plan_tells_only_how_much_work_there_is(task, sites):
    for client, site in enumerate(sites):
        assert task.plan(0, 3, client, 2).shape == (2, -(-len(site.train) // 8), 8)


def test_rows_are_pictures_of_their_client(task, sites):
    for site, data in zip(sites, task.clients, strict=True):
        rows = int(data.task.first) + np.arange(len(site.train))
        np.testing.assert_array_equal(task.arrays.pixels[task.arrays.picture[rows]], site.train.pixels)
        codes = np.unique(site.train.cams, return_inverse=True)[1]
        np.testing.assert_array_equal(data.task.cameras[: len(codes)], codes)


def test_copies_are_points_of_their_own(sites, task, variables):
    twice = task_of(sites, data__copies="gate:3")
    counts = [len(site.train) for site in sites]
    n = counts[GATE]
    assert [int(data.task.points) for data in twice.clients] == [counts[PIER], 3 * n, counts[YARD]]
    assert [int(data.task.first) for data in twice.clients] == [0, counts[PIER], counts[PIER] + 3 * n]
    data, once = twice.clients[GATE], task.clients[GATE]
    own = twice.arrays.picture[counts[PIER] : counts[PIER] + 3 * n]
    np.testing.assert_array_equal(own, np.tile(counts[PIER] + np.arange(n), 3))
    assert len(twice.arrays.pixels) == sum(counts), "pictures are stored once"
    np.testing.assert_array_equal(data.task.cameras[: 3 * n], np.tile(once.task.cameras[:n], 3))
    # Held out is a picture, not one of its copies; n_k counts copies.
    np.testing.assert_array_equal(data.task.held[: 3 * n], np.tile(once.task.held[:n], 3))
    assert float(data.images) == 3 * float(once.images)
    assert len(set(data.probe.tolist())) == 32 and not np.isin(data.probe, held_rows(data)).any()
    np.testing.assert_array_equal(data.task.validation, once.task.validation)
    # The features of a copy are bitwise those of its picture; what is behind the last point is 0.
    for client, count in ((GATE, 3), (YARD, 1)):
        n = counts[client]
        features = np.asarray(jax.jit(twice.labelling.embed)(twice.arrays, variables, twice.clients[client]))
        assert len(features) == 3 * counts[GATE]
        np.testing.assert_array_equal(features[: count * n], np.tile(features[:n], (count, 1)))
        assert not features[count * n :].any()
        np.testing.assert_allclose(np.linalg.norm(features[:n], axis=1), 1.0, rtol=1e-5)
    # Copies are drawn one by one.
    labels = np.arange(3 * counts[GATE]) % 2
    epochs = [bank_and_plan(twice, GATE, labels, seed) for seed in range(8)]
    drawn = np.concatenate([np.asarray(e.plan)[: int(e.steps)].ravel() for e in epochs]) - counts[PIER]
    assert set((drawn // counts[GATE]).tolist()) == {0, 1, 2}


def test_embeddings_are_those_of_the_network(task, sites, variables, embed):
    features = np.asarray(jax.jit(task.labelling.embed)(task.arrays, variables, task.clients[YARD]))
    np.testing.assert_allclose(features[: len(sites[YARD].train)], embed(sites[YARD].train.pixels), atol=1e-5)


@pytest.mark.short
def test_copies_by_client():
    names = ["ward", "viper", "3dpes"]
    assert unsupervised.parse_copies("3", names) == [3, 3, 3]
    assert unsupervised.parse_copies("3dpes:2, viper:10", names) == [1, 10, 2]
    assert unsupervised.parse_copies("viper:10,4", names) == [4, 10, 4]
    with pytest.raises(InputError, match=r"^config\.data\.copies: 'Viper' is no client; there are ward, viper, 3dpes$"):
        unsupervised.parse_copies("ward:2,Viper:4", names)


def test_users_mistakes_are_one_line(sites):
    with pytest.raises(InputError, match=r"^config\.data\.copies: 'hut' is no client; there are pier, gate, yard$"):
        task_of(sites, data__copies="2,hut:4")
    poor = dataclasses.replace(sites[GATE], name="hut", train=sites[GATE].train.take(np.arange(15)))
    with pytest.raises(InputError, match="hut: 15 training images are too few to cluster; give 16 or more"):
        task_of([sites[PIER], poor])


# --- an epoch, its loss and its memory ------------------------------------------------------------


@pytest.mark.parametrize("labels", ["none", "one", "one left", "two"])
def test_one_cluster_trains_nothing(task, sites, labels):
    n, held = len(sites[YARD].train), task.clients[YARD].task.held
    made = np.full(n, -1)
    if labels != "none":
        made[:10] = 3
    if labels == "one left":
        # The second cluster is of held-out pictures alone.
        made[held[:n]] = 4
    if labels == "two":
        made[np.flatnonzero(~held[:n])[-1]] = 4
    epoch = bank_and_plan(task, YARD, made)
    # One cluster alone may well have several proxies, one for each camera.
    assert int(epoch.memory.of_point.max()) >= (-1 if labels == "none" else 1)
    assert (int(epoch.steps) > 0) == (labels == "two")


def test_the_loss_is_the_weighted_sum_over_cameras_of_means(sites):
    task = task_of(sites, contrast__intra=2.0, contrast__inter=3.0, contrast__online=5.0)
    n, data = len(sites[YARD].train), task.clients[YARD]
    epoch = bank_and_plan(task, YARD, np.arange(n) % 3)
    rows, bank = np.asarray(epoch.plan[0]), epoch.memory
    client = data._replace(memory=bank)
    random = np.random.default_rng(0)
    outputs = {
        "embedding": jnp.asarray(random.normal(size=(8, TINY.feature_dim)), jnp.float32),
        "logits": jnp.where(bank.clusters >= 0, random.normal(size=(8, len(bank.clusters))), -1e9),
    }
    parts = []
    for weights in ((2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 5.0)):
        settings = dict(zip(("contrast__intra", "contrast__inter", "contrast__online"), weights, strict=True))
        parts.append(float(task_of(sites, **settings).loss(task.arrays, outputs, rows, client)))
    total = float(task.loss(task.arrays, outputs, rows, client))
    assert min(parts) > 0.1 and total == pytest.approx(sum(parts), rel=1e-5)
    # Within the own camera, camera by camera.
    points, logits = rows - int(data.task.first), np.asarray(outputs["logits"], np.float64)
    of_point, cameras = np.asarray(bank.of_point), np.asarray(bank.cameras)
    by_camera: dict[int, list[float]] = {}
    for row, point in zip(logits, points, strict=True):
        own = of_point[point]
        among = row[cameras == cameras[own]]
        by_camera.setdefault(int(data.task.cameras[point]), []).append(np.log(np.exp(among).sum()) - row[own])
    assert len(by_camera) > 1
    assert parts[0] == pytest.approx(2 * sum(np.mean(values) for values in by_camera.values()), rel=1e-5)


def test_logits_are_similarities_to_the_proxies_and_a_batch_moves_them(task, sites, variables, embed):
    epoch = bank_and_plan(task, YARD, np.arange(len(sites[YARD].train)) % 3)
    bank = epoch.memory
    client = task.clients[YARD]._replace(memory=bank)
    rows = np.asarray(epoch.plan[0])
    images = task.inputs(task.arrays, rows)
    forward = jax.jit(task.forward, static_argnums=3)
    outputs, _ = forward(variables, images, client, False, jax.random.key(0))
    features = embed(task.arrays.pixels[task.arrays.picture[rows]])
    there = np.asarray(bank.clusters) >= 0
    expected = features @ np.asarray(bank.features).T / 0.2
    np.testing.assert_allclose(outputs["logits"][:, there], expected[:, there], atol=1e-4)
    assert (outputs["logits"][:, ~there] < -1e8).all()
    moved = jax.jit(task.remember)(outputs, rows, client)
    by_hand = proxies.move(bank, jnp.asarray(features), jnp.asarray(rows - client.task.first), momentum=0.2)
    np.testing.assert_allclose(moved.features, by_hand.features, atol=1e-4)
    assert not np.allclose(moved.features, bank.features, atol=1e-2)


# --- score and report -----------------------------------------------------------------------------


def expected_map(embed, site, data, labels, cameras):
    """By the host's ranking; -1 takes no part, and with `cameras` None only the picture itself is left out."""
    rows = np.asarray(data.task.validation)[: int(data.task.validations)]
    queries = np.arange(len(rows)) < int(data.task.queries)
    taken = labels[rows] >= 0
    cams = np.arange(len(rows)) if cameras is None else cameras[rows]
    features, ids = embed(site.train.pixels[rows]), labels[rows]
    distances = euclidean_distances(features[queries & taken], features[taken])
    return evaluate_ranking(
        distances, ids[queries & taken], ids[taken], cams[queries & taken], cams[taken]
    ).mean_ap


def test_the_score_is_the_map_of_the_held_out_by_pseudo_labels(task, sites, variables, embed):
    site, data = sites[YARD], task.clients[YARD]
    n = len(site.train)
    labels = np.full(len(task.labelling.unlabelled), -1, np.int32)
    labels[:n] = np.arange(n) % 5
    labels[:n:6] = -1
    score = jax.jit(task.score)
    found = float(score(task.arrays, variables, data._replace(labels=labels)))
    expected = expected_map(embed, site, data, labels, None)
    assert 0.05 < expected < 0.95 and found == pytest.approx(expected, abs=1e-4)
    # Labels of pictures that are not looked at do not count; without labels there is no score.
    unseen = np.setdiff1d(np.arange(n), data.task.validation)
    spoilt = labels.copy()
    spoilt[unseen] = 99
    assert len(unseen) and float(score(task.arrays, variables, data._replace(labels=spoilt))) == found
    assert float(score(task.arrays, variables, data._replace(labels=task.labelling.unlabelled))) == 0.0


def test_the_validation_of_the_report_reads_the_true_people(task, sites, variables, embed):
    site, data = sites[PIER], task.clients[PIER]
    found = task.validate(variables, PIER)
    rows = np.asarray(data.task.validation)[: int(data.task.validations)]
    pairs = set(zip(site.train.ids[rows].tolist(), site.train.cams[rows].tolist(), strict=True))
    several = [i for i in site.train.ids[rows].tolist() if len({c for p, c in pairs if p == i}) > 1]
    cameras = site.train.cams if len(several) >= 8 else None
    assert found == pytest.approx(expected_map(embed, site, data, site.train.ids, cameras), abs=1e-4)


@pytest.mark.short
def test_the_quality_of_pseudo_labels_by_hand():
    quality = unsupervised.pseudo_label_quality
    ids = np.array([4, 4, 4, 9, 9, 2, 2, 2])
    # Cluster 0: 4 4 9; cluster 2: 9 2; the rest is noise. Numbers may be missing.
    assert quality(np.array([0, 0, -1, 0, 2, 2, -1, -1]), ids) == {
        "clusters": 2,
        "clustered": 5 / 8,
        "purity": (2 + 1) / 5,
    }
    assert quality(np.full(8, -1), ids) == {"clusters": 0, "clustered": 0.0, "purity": None}
    assert quality(np.arange(8), ids) == {"clusters": 8, "clustered": 1.0, "purity": 1.0}
    assert quality(np.zeros(8, int), ids) == {"clusters": 1, "clustered": 1.0, "purity": 3 / 8}


def test_what_is_told_of_labels_leaves_the_held_out_and_the_copies_out(sites):
    task = task_of(sites, data__copies="yard:2")
    n, data = len(sites[YARD].train), task.clients[YARD]
    people = np.unique(sites[YARD].train.ids, return_inverse=True)[1]
    labels = np.full((2, len(task.labelling.unlabelled)), -1)
    labels[0, :n] = people
    labels[0, :n][data.task.held[:n]] = 77
    labels[0, n : 2 * n] = np.arange(n)
    told = task.labelling.describe(labels, YARD)
    trained = len(np.unique(people[~data.task.held[:n]]))
    assert told == {"clusters": [trained, 0], "clustered": [1.0, 0.0], "purity": [1.0, None]}


# --- rounds ---------------------------------------------------------------------------------------


def test_a_round_relabels_every_epoch_and_logs_it(federation, history, first):
    _, events = history
    for event in events:
        assert event["refused"] == []
        for name, row in event["clients"].items():
            assert len(row["clusters"]) == len(row["clustered"]) == len(row["purity"]) == 2, name
            assert min(row["clusters"]) > 1 and row["steps"] > 0 and np.isfinite(row["loss"]), name
            assert 0 < min(row["clustered"]) and max(row["clustered"]) <= 1 and 0 < min(row["purity"]) <= 1
        assert {"embedding", "clustering", "training"} <= event["split"].keys()
    assert sum(row["weight"] for row in events[0]["clients"].values()) == pytest.approx(1.0)
    # The model has moved in between, and with it some labels.
    _, states, logs = first
    assert logs["labels"].shape == (3, 2, len(federation.task.labelling.unlabelled))
    np.testing.assert_array_equal(states.labels, logs["labels"][:, -1])
    # The first labels are those of the starting model.
    start = federation.task.init(jax.random.key(0))
    for k, data in enumerate(federation.task.clients):
        features = jax.jit(federation.task.labelling.embed)(federation.task.arrays, start, data)
        np.testing.assert_array_equal(
            logs["labels"][k, 0],
            federation.task.labelling.assign_host(np.asarray(features), k, federation.task.labelling.unlabelled, 0, 0),
        )


def test_identities_change_nothing_but_what_is_told_of_them(federation, history, sites):
    random = np.random.default_rng(0)
    shuffled = [
        dataclasses.replace(site, train=dataclasses.replace(site.train, ids=random.permutation(site.train.ids)))
        for site in sites
    ]
    other = federation_of(shuffled)
    assert_same((federation.task.arrays, federation.task.clients), (other.task.arrays, other.task.clients))
    states, events = run(other, 2)
    for left, right in zip(states, history[0], strict=True):
        assert_same(left, right)

    def told(events, key):
        return [row[key] for event in events for row in event["clients"].values()]

    for key in ("loss", "clusters", "clustered", "steps", "weight", "bytes_up", "bytes_down"):
        assert told(events, key) == told(history[1], key), key
    assert told(events, "purity") != told(history[1], "purity")
    server = history[0][-1][0]
    assert other.task.validate(server.model, PIER) != federation.task.validate(server.model, PIER)


def test_an_interrupted_run_goes_on_bitwise(federation, history, tmp_path):
    state, _ = simulation.run_round(federation, begin(federation))
    with MetricsLog.open(tmp_path / "metrics.jsonl") as log:
        train._save(federation, tmp_path, state, log)
    restored, _ = train._load_or_start(federation, tmp_path)
    assert_same(host(restored), history[0][0])
    assert (restored.clients[PIER].labels >= 0).any(), "labels are part of what is kept"
    state, event = simulation.run_round(federation, restored)
    assert_same(host(state), history[0][1])
    assert event["clients"]["pier"]["clusters"] == history[1][1]["clients"]["pier"]["clusters"]


@pytest.fixture(scope="module")
def one_epoch():
    """Round 0 of one epoch, a program a stage."""
    return update(federation_of(epochs=1))


@pytest.mark.parametrize(
    "how",
    [
        {"client_map": "vmap"},
        {"client_map": "loop"},
        {"client_map": "map", "devices": 2},
        {"client_map": "map", "cluster__where": "traced"},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_every_way_of_running_the_clients_gives_the_same_round(one_epoch, how):
    # Three clients on two devices also exercise the padding; `traced` is the whole round as one program. One epoch:
    # what another order of sums leaves in the weights may move a point at the edge of a cluster in the next.
    upload, states, logs = update(federation_of(epochs=1, **how))
    np.testing.assert_array_equal(logs["labels"], one_epoch[2]["labels"])
    np.testing.assert_array_equal(logs["steps"], one_epoch[2]["steps"])
    np.testing.assert_array_equal(states.labels, one_epoch[1].labels)
    np.testing.assert_allclose(logs["loss"], one_epoch[2]["loss"], rtol=1e-3)
    # Where a unit sits on the kink of its ReLU rounding moves single weights, on another processor others: what is
    # compared is the whole movement of every client, which a wrong batch, key or place changes by its own size.
    origin = rounds.start(federation_of().task, make_method(config_of().method), 0)[0].model
    for client in range(3):
        ours, theirs = (
            np.concatenate([np.ravel(leaf[client]) for leaf in jax.tree.leaves(model)])
            for model in (upload.model, one_epoch[0].model)
        )
        first = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(origin)])
        assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs - first)


def test_a_client_that_finds_nothing_to_tell_apart_is_left_out(federation, sites):
    blank = dataclasses.replace(sites[GATE].train, pixels=np.full_like(sites[GATE].train.pixels, 90))
    other = federation_of([sites[PIER], dataclasses.replace(sites[GATE], train=blank), sites[YARD]])
    before = begin(other)
    start, uploads = host(before)[0], update(other)[0]
    state, event = simulation.run_round(other, before)
    assert event["refused"] == [
        {"client": "gate", "reason": "found no two clusters in any epoch and trained nothing"}
    ]
    row = event["clients"]["gate"]
    assert row["weight"] == 0.0 and row["steps"] == 0 and "loss" not in row and max(row["clusters"]) <= 1
    assert state.clients[GATE] is before.clients[GATE]
    assert state.clients[PIER] is not before.clients[PIER]
    # It came back as it went, and the model is the mean of the two others, 51 and 34 pictures.
    shares = {name: entry["weight"] for name, entry in event["clients"].items()}
    assert shares == pytest.approx({"pier": 51 / 85, "gate": 0.0, "yard": 34 / 85})
    for new, old, sent in zip(
        jax.tree.leaves(state.server.model), jax.tree.leaves(start.model), jax.tree.leaves(uploads.model), strict=True
    ):
        np.testing.assert_array_equal(sent[GATE], old)
        np.testing.assert_allclose(new, (51 * sent[PIER] + 34 * sent[YARD]) / 85, rtol=1e-5, atol=1e-6)


def test_a_round_of_noise_changes_nothing():
    federation = federation_of(cluster__min_samples=1000)
    before = begin(federation)
    start = host(before)[0]
    state, event = simulation.run_round(federation, before)
    assert [entry["client"] for entry in event["refused"]] == ["pier", "gate", "yard"]
    for row in event["clients"].values():
        assert row["clusters"] == [0, 0] and row["purity"] == [None, None] and row["weight"] == 0.0
    assert_same(state.server.model, start.model)
    assert all(new is old for new, old in zip(state.clients, before.clients, strict=True))
    assert int(state.server.round) == 1


# The others have such a round in tests of their own.
@pytest.mark.parametrize("name", ["fedavg", "fedcapr", "fedklpr", "fedprox", "local"])
def test_methods_run_on_it(name):
    federation = federation_of(method=name, epochs=1)
    state = begin(federation)
    # As after a first round: penalties are on.
    state = state._replace(server=state.server._replace(round=jnp.int32(1)))
    start = host(state)
    after, event = simulation.run_round(federation, state)
    assert event["refused"] == [] and int(after.server.round) == 2
    moved = 0.0
    for new, old in zip(jax.tree.leaves(host(after)), jax.tree.leaves(start), strict=True):
        assert np.isfinite(new).all()
        if new.dtype == np.float32:
            moved = max(moved, float(np.abs(new - old).max()))
    assert moved > 1e-3
    for row in event["clients"].values():
        assert row["steps"] > 0 and np.isfinite(row["loss"])
        assert (row["bytes_up"] == 0) == (name == "local")
    assert make_method(federation.config.method).name == name
