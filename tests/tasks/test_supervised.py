"""The supervised task: who is trained on, what the losses and scores are, and that test images stay out of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import losses
from fedklpr_jax.data import augment
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.features import evaluate_features
from fedklpr_jax.evaluation.ranking import euclidean_distances, evaluate_ranking
from fedklpr_jax.tasks import reid, supervised
from tests.federations import TINY, tiny_config, tiny_sites

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

GATE = 1  # a client narrower than the widest


def task_of(sites, union=False, **settings):
    return supervised.make_task(sites, TINY, tiny_config("fedpav", **settings), union=union)


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Embeds 8 images at a time, so that every split of these small sites takes several chunks, the last not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reid, "EMBED_BATCH", 8)
        yield


@pytest.fixture(scope="module")
def sites():
    return tiny_sites()


@pytest.fixture(scope="module")
def task(sites):
    return task_of(sites)


@pytest.fixture(scope="module")
def variables(task):
    """A network whose running statistics are not those it was born with."""
    fresh = task.init(jax.random.key(0))
    stats = jax.tree.map(lambda leaf: leaf + 0.3, fresh["batch_stats"])
    return {"params": fresh["params"], "batch_stats": stats}


@pytest.fixture(scope="module")
def score(task):
    return jax.jit(task.score)


@pytest.fixture(scope="module")
def embed(variables):
    """Embeddings of uint8 pictures by the network alone, in one batch, not normalised."""
    trunk = {name: variables[name]["trunk"] for name in ("params", "batch_stats")}
    apply = jax.jit(lambda images: TINY.apply(trunk, images, False)[0]["embedding"])

    def run(pixels):
        filled = np.zeros((32, *pixels.shape[1:]), np.uint8)
        filled[: len(pixels)] = pixels
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        return np.asarray(apply(jnp.asarray((filled / 255 - mean) / deviation, jnp.float32)))[: len(pixels)]

    return run


def spans(sites):
    ends = np.cumsum([len(site.train) for site in sites])
    return [np.arange(end - len(site.train), end) for end, site in zip(ends, sites, strict=True)]


def validation_rows(task, client):
    data = task.clients[client].task
    return np.asarray(data.validation)[: int(data.validations)]


# --- who is trained on ---------------------------------------------------------------------------


def test_labels_are_contiguous_and_stand_for_one_person_each(task, sites):
    for site, rows, data in zip(sites, spans(sites), task.clients, strict=True):
        labels = task.arrays.labels[rows]
        trained = labels >= 0
        assert sorted(set(labels[trained].tolist())) == list(range(int(data.task.classes))), site.name
        pairs = set(zip(site.train.ids[trained].tolist(), labels[trained].tolist(), strict=True))
        assert len(pairs) == int(data.task.classes)
        assert float(data.images) == trained.sum()
        np.testing.assert_array_equal(task.arrays.pixels[rows], site.train.pixels)


def test_the_held_out_are_whole_people_and_never_in_a_plan(task, sites):
    for client, (site, rows) in enumerate(zip(sites, spans(sites), strict=True)):
        held = validation_rows(task, client)
        people = set(task.arrays.ids[held].tolist())
        assert len(people) == 4, site.name
        assert (task.arrays.labels[held] == -1).all()
        assert set(held.tolist()) == {int(row) for row in rows if int(task.arrays.ids[row]) in people}
        for seed, round_ in ((0, 0), (0, 5), (9, 1)):
            plan = task.plan(seed, round_, client, 3)
            assert plan.dtype == np.int32 and plan.shape[0] == 3 and plan.shape[2] == 8
            assert np.isin(plan, rows).all(), "a client trains on its own images"
            assert not np.isin(plan, held).any()
            assert not set(task.arrays.ids[plan].ravel().tolist()) & people


def test_plans_are_a_function_of_seed_round_client_and_epoch(task):
    first = task.plan(0, 1, 0, 2)
    np.testing.assert_array_equal(first, task.plan(0, 1, 0, 2))
    np.testing.assert_array_equal(first[:1], task.plan(0, 1, 0, 1))
    assert not np.array_equal(first[0], first[1])
    for other in (task.plan(1, 1, 0, 2), task.plan(0, 2, 0, 2)):
        assert not np.array_equal(first, other)


def test_all_methods_train_on_the_same_remainder(task, sites):
    union = task_of(sites, union=True)
    np.testing.assert_array_equal(union.arrays.labels >= 0, task.arrays.labels >= 0)
    for client in range(3):
        np.testing.assert_array_equal(union.plan(0, 2, client, 2), task.plan(0, 2, client, 2))
        for name in ("images", "probe"):
            np.testing.assert_array_equal(getattr(union.clients[client], name), getattr(task.clients[client], name))
        np.testing.assert_array_equal(validation_rows(union, client), validation_rows(task, client))


def test_probe_rows_are_fixed_distinct_where_possible_and_trained_on(task, sites):
    again = task_of(sites)
    for client, (rows, data) in enumerate(zip(spans(sites), task.clients, strict=True)):
        np.testing.assert_array_equal(data.probe, again.clients[client].probe)
        assert data.probe.shape == (32,) and data.probe.dtype == np.int32
        assert np.isin(data.probe, rows).all() and (task.arrays.labels[data.probe] >= 0).all()
    # The first client has 40 images to choose from, the others fewer than 32.
    assert len(set(task.clients[0].probe.tolist())) == 32
    assert not np.array_equal(task_of(sites, seed=1).clients[0].probe, task.clients[0].probe)


@pytest.mark.short
def test_a_client_with_too_few_people_is_named(sites):
    two = np.flatnonzero(np.isin(sites[0].train.ids, np.unique(sites[0].train.ids)[:2]))
    poor = dataclasses.replace(sites[0], name="hut", train=sites[0].train.take(two))
    with pytest.raises(InputError, match="hut: 2 training identities are too few"):
        task_of([poor, sites[1]])


# --- losses ---------------------------------------------------------------------------------------


def test_padded_classes_get_no_probability(task, variables):
    rows = np.asarray(task.clients[GATE].probe[:2])
    forward = jax.jit(lambda images, client: task.forward(variables, images, client, False, jax.random.key(0))[0])
    logits = forward(task.inputs(task.arrays, rows), task.clients[GATE])["logits"]
    probability = np.asarray(jax.nn.softmax(logits))
    assert logits.shape == (2, 10) and (probability[:, 6:] == 0).all() and (probability[:, :6] > 0).all()
    np.testing.assert_allclose(probability.sum(axis=1), 1.0, rtol=1e-5)
    # The widest client has all ten.
    assert (np.asarray(jax.nn.softmax(forward(task.inputs(task.arrays, rows), task.clients[0])["logits"])) > 0).all()


def test_each_loss_has_its_weight_and_can_be_switched_off(sites):
    random = np.random.default_rng(0)
    outputs = {
        "logits": jnp.asarray(random.normal(size=(8, 10)), jnp.float32),
        "pooled": jnp.asarray(random.normal(size=(8, 8)), jnp.float32),
        "embedding": jnp.full((8, 8), jnp.nan),  # the losses read the logits and the pooled feature
    }
    fixed = {"task__smoothing": 0.2, "task__margin": 0.5}
    both = task_of(sites, task__identity=2.0, task__triplet=3.0, **fixed)
    client = both.clients[0]
    rows = both.plan(0, 0, 0, 1)[0, 0]
    labels = both.arrays.labels[rows]
    identity = losses.identity_cross_entropy(outputs["logits"], labels, np.int32(10), smoothing=0.2)
    triplet = losses.batch_hard_triplet(outputs["pooled"], labels, margin=0.5)
    assert float(identity) > 0.1 and float(triplet) > 0.1

    def loss(task):
        return float(task.loss(task.arrays, outputs, rows, client))

    assert loss(both) == pytest.approx(2 * float(identity) + 3 * float(triplet), rel=1e-6)
    assert loss(task_of(sites, task__identity=1.0, task__triplet=0.0, **fixed)) == pytest.approx(float(identity))
    assert loss(task_of(sites, task__identity=0.0, task__triplet=1.0, **fixed)) == pytest.approx(float(triplet))
    assert loss(task_of(sites, task__identity=0.0, task__triplet=0.0, **fixed)) == 0.0


def test_augmentation_follows_the_configuration(sites):
    task = task_of(sites, data__flip=0.25, data__pad=3, data__erase=0.75)
    images = task.inputs(task.arrays, np.arange(8))
    np.testing.assert_allclose(images, augment.normalise(sites[0].train.pixels[:8]), rtol=1e-6)
    key = jax.random.key(5)
    expected = augment.augment(key, images, flip_probability=0.25, pad=3, erase_probability=0.75)
    np.testing.assert_array_equal(task.augment(key, images), expected)
    plain = task_of(sites, data__flip=0.0, data__pad=0, data__erase=0.0)
    np.testing.assert_array_equal(plain.augment(key, images), images)


# --- score and evaluation -------------------------------------------------------------------------


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize("client", [0, 1, 2])
def test_the_score_is_the_map_of_the_held_out_people(task, variables, score, embed, client):
    rows = validation_rows(task, client)
    distances = euclidean_distances(*[unit(embed(task.arrays.pixels[rows]))] * 2)
    ids, cams = task.arrays.ids[rows], task.arrays.cams[rows]
    data = task.clients[client]
    expected = evaluate_ranking(distances, ids, ids, cams, cams).mean_ap
    assert 0.05 < expected < 0.95
    assert float(score(task.arrays, variables, data)) == pytest.approx(expected, abs=1e-4)
    # Where same-camera matches count, only the picture itself is left out.
    alone = data._replace(task=data.task._replace(same_camera=np.bool_(True)))
    each = np.arange(len(rows))
    expected_alone = evaluate_ranking(distances, ids, ids, each, each).mean_ap
    assert expected_alone != pytest.approx(expected, abs=1e-3)
    assert float(score(task.arrays, variables, alone)) == pytest.approx(expected_alone, abs=1e-4)
    # What stands in the padding does not count.
    padded = np.array(data.task.validation)
    padded[len(rows) :] = rows[0]
    assert len(padded) > len(rows)
    dirty = data._replace(task=data.task._replace(validation=padded))
    assert float(score(task.arrays, variables, dirty)) == float(score(task.arrays, variables, data))


def test_evaluation_averages_the_mirror_image_and_normalises(task, sites, variables, embed):
    site = sites[GATE]

    def features(images):
        return unit(embed(images.pixels) + embed(images.pixels[:, :, ::-1]))

    query, gallery = features(site.query), features(site.gallery)
    expected = evaluate_features(query, gallery, site.query, site.gallery)
    found = task.evaluate(variables, GATE)
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-4)
    np.testing.assert_allclose(found.average_precisions, expected.average_precisions, atol=1e-4)
    np.testing.assert_array_equal(found.top, expected.top)
    # Neither half of it would do.
    once = evaluate_features(unit(embed(site.query.pixels)), unit(embed(site.gallery.pixels)), site.query, site.gallery)
    assert not np.array_equal(once.top, expected.top)
    raw = [embed(images.pixels) + embed(images.pixels[:, :, ::-1]) for images in (site.query, site.gallery)]
    assert not np.array_equal(evaluate_features(*raw, site.query, site.gallery).top, expected.top)


def test_test_images_touch_neither_score_nor_plan_nor_arrays(task, sites, variables, score):
    random = np.random.default_rng(0)

    def noise(images):
        return dataclasses.replace(images, pixels=random.integers(0, 256, images.pixels.shape, np.uint8))

    other = task_of([dataclasses.replace(s, query=noise(s.query), gallery=noise(s.gallery)) for s in sites])
    for left, right in zip(
        jax.tree.leaves((task.arrays, task.clients)), jax.tree.leaves((other.arrays, other.clients)), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    rescored = jax.jit(other.score)
    for client in range(3):
        np.testing.assert_array_equal(task.plan(0, 3, client, 2), other.plan(0, 3, client, 2))
        assert float(score(task.arrays, variables, task.clients[client])) == float(
            rescored(other.arrays, variables, other.clients[client])
        )
    assert other.evaluate(variables, 0).metrics != task.evaluate(variables, 0).metrics


def test_the_named_average_precision_and_reranking_reach_the_evaluation(sites, variables, task):
    plain = task.evaluate(variables, 0).metrics["map"]
    for setting in ({"eval__average_precision": "trapezoidal"}, {"eval__rerank": True}):
        assert task_of(sites, **setting).evaluate(variables, 0).metrics["map"] != plain
