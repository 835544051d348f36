"""A federation small enough to compile in seconds, shared by the tests of rounds, methods and tasks."""

from __future__ import annotations

import ml_collections

from fedklpr_jax.config import default_config
from fedklpr_jax.data import synthetic
from fedklpr_jax.data.site import Site
from fedklpr_jax.federated import Method, Task
from fedklpr_jax.methods import make_method
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.tasks import supervised

TINY = ModelSpec("tiny", (8, 8), (1, 1), stem="3x3/2")
SPECS = tuple(
    synthetic.SiteSpec(name, style, 2, train_ids, 4, 2)
    for name, style, train_ids in (("pier", "summer", 14), ("gate", "winter", 10), ("yard", "summer", 10))
)


def tiny_config(method: str, **settings: object) -> ml_collections.ConfigDict:
    """Two epochs of small batches on three sites of 32 x 16 pixels; `settings` by dotted path (`__` for the dot)."""
    config = default_config()
    config.method.name = method
    config.data.height, config.data.width, config.data.pad = 32, 16, 2
    config.task.people, config.task.shots = 4, 2
    config.rounds = 4
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in settings.items()})
    return config


def tiny_sites() -> list[Site]:
    """Three sites of unequal size."""
    return synthetic.make_sites(0, height=32, width=16, specs=SPECS)


def tiny_task(config: ml_collections.ConfigDict, method: Method | None = None) -> tuple[Task, Method]:
    """The task of `config` with a two-block network, and its method."""
    method = method or make_method(config.method)
    union = not method.is_local("params/classifier/kernel")
    return supervised.make_task(tiny_sites(), TINY, config, union=union), method
