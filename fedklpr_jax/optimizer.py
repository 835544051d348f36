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
    `optimizer.backbone` times the step, but not its embedding block, layer and norm, which is new like the classifier.
    """
    direction = {
        "adam": optax.scale_by_adam(),
        "sgd": optax.trace(config.momentum, nesterov=config.nesterov),
    }[config.name]

    def slow_backbone(updates: PyTree, params: PyTree | None) -> PyTree:
        def scaled(path: str, update: jax.Array) -> jax.Array:
            top, _, below = path.partition("/")
            slow = top == "trunk" and below.split("/")[0] not in ("embedding", "embedding_bn")
            return update * config.backbone if slow else update

        return path_map(scaled, updates)

    backbone = optax.stateless(slow_backbone) if config.backbone != 1 else optax.identity()
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay), direction, backbone, optax.scale(-config.learning_rate)
    )


def step_decay(config: Any, rounds: int, last: Any = None) -> Callable[[int, int], float]:
    """Factor on the step size in each (round, epoch): 1, then `optimizer.decay` after `optimizer.decay_from` of the
    rounds.

    A long last round (`config.last` with `epochs` > 0) starts over: it rises for `last.warmup` epochs to 1 and falls to
    a tenth every `last.decay_every` epochs (FedCAPR's authors' code).

    >>> import ml_collections
    >>> factor = step_decay(ml_collections.ConfigDict({"decay_from": 0.5, "decay": 0.1}), 4)
    >>> [factor(round_, 0) for round_ in range(4)]
    [1.0, 1.0, 0.1, 0.1]
    """

    def factor(round_: int, epoch: int) -> float:
        if last is not None and last.epochs and round_ == rounds - 1:
            warm = min((epoch + 1) / (last.warmup + 1), 1.0)
            return warm * 0.1 ** (epoch // last.decay_every)
        return config.decay if round_ >= config.decay_from * rounds else 1.0

    return factor
