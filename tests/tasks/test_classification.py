"""Classification: what is drawn, what counts in the loss, validation and test scores, centralised training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import assembly, client_update
from fedklpr_jax import round as rounds
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.console import Console
from fedklpr_jax.data.labelled import Labelled
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.accuracy import classified
from fedklpr_jax.methods import make_method
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.tasks import classification
from fedklpr_jax.tasks.classification import Share

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

SMALL = ModelSpec("small", (4, 4, 8), (1, 1, 1), family="cnn")


def config_of(**settings):
    config = default_config()
    config.task.name, config.task.batch = "classification", 4
    config.method.name = "fedavg"
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.05
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in settings.items()})
    return resolved(config)


def bars(count=60, seed=0):
    """Two classes that anybody can tell apart: a bright left or a bright right half."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 2
    pixels = rng.integers(0, 60, (count, 16, 16, 1), dtype=np.uint8)
    pixels[labels == 0, :, :8] += 150
    pixels[labels == 1, :, 8:] += 150
    return Labelled(pixels, labels, ("left", "right"))


SHARES = (
    Share(np.arange(0, 22), np.arange(22, 28), np.arange(28, 36)),
    Share(np.arange(36, 47), np.arange(47, 50), np.arange(50, 60)),
)


@pytest.fixture(scope="module")
def task():
    return classification.make_task(bars(), SHARES, SMALL, config_of())


def test_an_epoch_shows_every_image_once_and_fills_the_last_batch(task):
    plan = task.plan(0, 0, 1, 2)
    assert plan.shape == (2, 3, 4) and plan.dtype == np.int32
    for epoch in plan:
        assert sorted(epoch[epoch >= 0]) == list(range(36, 47))
        assert set(~epoch[epoch < 0]) <= set(range(36, 47)) and (epoch < 0).sum() == 1
    assert (plan[0] != plan[1]).any()
    np.testing.assert_array_equal(plan, task.plan(0, 0, 1, 2))


def test_images_that_fill_a_batch_count_in_no_loss(task):
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [5.0, -5.0]])
    rows = jnp.array([0, 1, ~3])
    # Classes 0, 1 and (not counted) 1: the mean of log(1 + e^-2) and log(1 + e^-1).
    expected = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))) / 2
    assert float(task.loss(task.arrays, {"logits": logits}, rows, task.clients[0])) == pytest.approx(expected, rel=1e-6)
    assert float(task.loss(task.arrays, {"logits": logits}, jnp.array([~0, ~1, ~3]), task.clients[0])) == 0.0
    np.testing.assert_array_equal(task.inputs(task.arrays, rows)[2], task.inputs(task.arrays, jnp.array([3]))[0])


def test_inputs_have_mean_0_and_deviation_1_over_the_training_images(task):
    rows = jnp.array([*range(0, 22), *range(36, 47)])
    values = np.asarray(task.inputs(task.arrays, rows), np.float64)
    assert abs(values.mean()) < 1e-5 and values.std() == pytest.approx(1.0, abs=1e-5)


def test_scores_count_validation_and_test_rows_alone(task):
    variables = task.init(jax.random.key(0))
    # A classifier that always says class 1.
    always = {"kernel": jnp.zeros((8, 2)), "bias": jnp.array([0.0, 1.0])}
    variables["params"]["classifier"] = always
    labels = bars().labels
    for k, share in enumerate(SHARES):
        score = float(jax.jit(task.score)(task.arrays, variables, task.clients[k]))
        assert score == pytest.approx(np.mean(labels[share.validation] == 1))
        result = task.evaluate(variables, k)
        assert result.metrics["accuracy"] == pytest.approx(np.mean(labels[share.test] == 1))
        assert result.metrics["images"] == len(share.test)
        np.testing.assert_array_equal(result.labels, labels[share.test])
    assert classified(np.array([1, 0]), np.array([1, 1])).metrics["accuracy"] == 0.5


@pytest.mark.short
def test_it_learns_the_easy_problem_in_a_few_rounds(task):
    method = make_method(config_of().method)
    engine = rounds.make_engine(task, method, epochs=3)
    server, clients = rounds.start(task, method, seed=0)
    for _ in range(3):
        server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    assert [task.evaluate(server.model, k).metrics["accuracy"] for k in (0, 1)] == [1.0, 1.0]


def test_pooled_training_has_one_client_and_a_test_for_each_share():
    task = classification.make_task(bars(), SHARES, SMALL, config_of(), pooled=True)
    assert task.client_names == ("all",) and float(task.clients[0].images) == 33
    assert [tuple(test) for test in task.examined] == [("c0", 0), ("c1", 0)]
    plan = task.plan(0, 0, 0, 1)
    assert sorted(plan[plan >= 0]) == [*range(0, 22), *range(36, 47)]
    variables = task.init(jax.random.key(0))
    assert [task.evaluate(variables, test).metrics["images"] for test in (0, 1)] == [8, 10]


def test_the_number_of_clients_decides_how_their_names_are_padded():
    shares = [Share(np.arange(4 * k, 4 * k + 2), np.arange(0), np.arange(4 * k + 2, 4 * k + 4)) for k in range(12)]
    assert classification.make_task(bars(), shares, SMALL, config_of()).client_names[:2] == ("c00", "c01")


def test_curvature_is_the_mean_gradient_and_the_batch_size_times_the_mean_square(task):
    method = make_method(config_of().method)
    engine = rounds.make_engine(task, method, epochs=1)
    server, clients = rounds.start(task, method, seed=0)
    message = [engine.download(server, np.int32(0))]
    stacked = rounds.round_inputs(engine, message, clients[:1], [0], seed=0, round_=0)
    inputs = jax.tree.map(lambda leaf: leaf[0], stacked)
    stages = client_update.ClientUpdate(task, method)

    @jax.jit
    def curvature(arrays, inputs, model):
        return stages.context(arrays, jnp.int32(0), inputs, inputs.data, {}).curvature(model)

    gradient, fisher = curvature(task.arrays, inputs, server.model)

    def loss(params, rows):
        variables, images = server.model | {"params": params}, task.inputs(task.arrays, rows)
        outputs, _ = task.forward(variables, images, None, True, inputs.key)
        return task.loss(task.arrays, outputs, rows, None)

    each = [jax.grad(loss)(server.model["params"], jnp.asarray(rows)) for rows in np.asarray(inputs.plan)[0]]
    kernels = np.stack([np.asarray(g["classifier"]["kernel"]) for g in each])
    np.testing.assert_allclose(gradient["classifier"]["kernel"], kernels.mean(0), rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(fisher["classifier"]["kernel"], 4 * (kernels**2).mean(0), rtol=2e-3, atol=1e-5)


def federation_of(**settings):
    config = config_of(data__count=4, data__alpha=5.0, rounds=1, **settings)
    return assembly.make_federation(config, Console())


def test_drawn_shapes_are_dealt_to_the_clients_with_validation_and_test_apart():
    federation = federation_of()
    shares = assembly.deal(np.asarray(federation.task.arrays.labels), federation.config.data)
    together = np.concatenate([np.concatenate(share) for share in shares])
    assert sorted(together) == list(range(len(federation.task.arrays.labels)))
    for share, client in zip(shares, federation.task.clients, strict=True):
        total = sum(map(len, share))
        assert len(share.test) == total // 4 and len(share.validation) == int(0.1 * (total - total // 4))
        assert float(client.images) == len(share.train)


def test_settings_that_do_not_fit_together_are_told_in_one_line():
    for settings, told in [
        ({"model__arch": "thin"}, "config.model.arch: 'thin' is not for the classification task"),
        ({"task__name": "supervised", "model__arch": "cnn"}, "'cnn' is not for the supervised task"),
        ({"method__name": "fedklpr", "data__validation": 0.0}, "fedklpr decides by a validation score"),
        ({"data__partition": "shards", "data__shards": 5000}, "too few"),
    ]:
        with pytest.raises(InputError, match=told) as error:
            federation_of(**settings)
        assert "\n" not in str(error.value)
