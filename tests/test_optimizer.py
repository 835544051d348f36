"""The first steps of the local optimisers, by hand."""

from __future__ import annotations

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from fedklpr_jax.optimizer import make_optimizer, step_decay

pytestmark = pytest.mark.short

PARAMS = {"trunk": {"conv": {"kernel": jnp.array([2.0])}, "embedding": {"kernel": jnp.array([2.0])}},
          "classifier": {"kernel": jnp.array([2.0])}}  # fmt: skip
GRADIENTS = {"trunk": {"conv": {"kernel": jnp.array([4.0])}, "embedding": {"kernel": jnp.array([4.0])}},
             "classifier": {"kernel": jnp.array([-4.0])}}  # fmt: skip


def steps(count=1, **settings):
    """The updates of (trunk, embedding block, classifier) in the last of `count` steps with equal gradients."""
    options = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0, "nesterov": True, "weight_decay": 0.0}
    options["backbone"] = 1.0
    optimizer = make_optimizer(ml_collections.ConfigDict(options | settings))
    state = optimizer.init(PARAMS)
    for _ in range(count):
        updates, state = optimizer.update(GRADIENTS, state, PARAMS)
    trunk = updates["trunk"]
    return [float(part["kernel"][0]) for part in (trunk["conv"], trunk["embedding"], updates["classifier"])]


def test_sgd():
    np.testing.assert_allclose(steps(), [-0.4, -0.4, 0.4], rtol=1e-6)


def test_momentum_is_nesterov_s():
    # v1 = g, step g + 0.5 v1 = 1.5 g; v2 = g + 0.5 v1 = 1.5 g, step g + 0.5 v2 = 1.75 g.
    np.testing.assert_allclose(steps(momentum=0.5), [-0.6, -0.6, 0.6], rtol=1e-6)
    np.testing.assert_allclose(steps(2, momentum=0.5), [-0.7, -0.7, 0.7], rtol=1e-6)


def test_weight_decay_is_l2_in_the_gradient():
    # g + 0.5 * 2 = 5 and -3.
    np.testing.assert_allclose(steps(weight_decay=0.5), [-0.5, -0.5, 0.3], rtol=1e-6)
    # Adam's first step is the sign of that sum, whatever its size; a decay of 3 turns the classifier's round.
    np.testing.assert_allclose(steps(name="adam"), [-0.1, -0.1, 0.1], rtol=1e-4)
    np.testing.assert_allclose(steps(name="adam", weight_decay=3.0), [-0.1, -0.1, -0.1], rtol=1e-4)


def test_the_backbone_is_slow_but_not_its_embedding_block():
    np.testing.assert_allclose(steps(backbone=0.1), [-0.04, -0.4, 0.4], rtol=1e-6)
    options = {"name": "sgd", "learning_rate": 1.0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    params = {"trunk": {name: {"scale": jnp.ones(1)} for name in ("bn1", "embedding_bn", "layer1_0")}}
    optimizer = make_optimizer(ml_collections.ConfigDict(options | {"backbone": 0.25}))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert {name: float(of["scale"][0]) for name, of in updates["trunk"].items()} == {
        "bn1": -0.25, "embedding_bn": -1.0, "layer1_0": -0.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("decay_from", "rounds", "expected"),
    [(0.67, 3, [1, 1, 1]), (0.5, 3, [1, 1, 0.2]), (0.0, 2, [0.2, 0.2]), (1.0, 2, [1, 1])],
)
def test_the_step_size_falls_once(decay_from, rounds, expected):
    factor = step_decay(ml_collections.ConfigDict({"decay_from": decay_from, "decay": 0.2}), rounds)
    assert [factor(round_, 1) for round_ in range(rounds)] == expected


def test_a_long_last_round_warms_up_and_falls_every_so_many_epochs():
    last = ml_collections.ConfigDict({"epochs": 5, "warmup": 1, "decay_every": 2})
    factor = step_decay(ml_collections.ConfigDict({"decay_from": 0.5, "decay": 0.2}), 3, last)
    assert [factor(round_, 0) for round_ in range(2)] == [1, 1]
    np.testing.assert_allclose([factor(2, epoch) for epoch in range(5)], [0.5, 1, 0.1, 0.1, 0.01], rtol=1e-6)
