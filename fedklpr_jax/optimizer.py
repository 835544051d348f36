"""Local optimisers and the step size over rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from fedklpr_jax.trees import PyTree, path_map


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """The local optimiser of `config.optimizer`, for a learning rate of `optimizer.learning_rate`.

    Weight decay is L2 added to the gradient, as re-ID code does it, for Adam too. Parameters under `trunk` move by
    `optimizer.backbone` times the step, except a trunk's embedding block, which is new like the classifier.
    """
    direction = {
        "adam": optax.scale_by_adam(),
        "sgd": optax.trace(config.momentum, nesterov=config.momentum > 0),
    }[config.name]

    def slow_backbone(updates: PyTree, params: PyTree | None) -> PyTree:
        def scaled(path: str, update: jax.Array) -> jax.Array:
            parts = path.split("/")
            return update * config.backbone if parts[0] == "trunk" and "embedding" not in parts else update

        return path_map(scaled, updates)

    backbone = optax.stateless(slow_backbone) if config.backbone != 1 else optax.identity()
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay), direction, backbone, optax.scale(-config.learning_rate)
    )


def step_decay(config: Any, rounds: int) -> Callable[[int], float]:
    """Factor on the step size in each round: 1, then `optimizer.decay` after `optimizer.decay_from` of the rounds.

    >>> import ml_collections
    >>> factor = step_decay(ml_collections.ConfigDict({"decay_from": 0.5, "decay": 0.1}), 4)
    >>> [factor(round_) for round_ in range(4)]
    [1.0, 1.0, 0.1, 0.1]
    """
    return lambda round_: config.decay if round_ >= config.decay_from * rounds else 1.0
