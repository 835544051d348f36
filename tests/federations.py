"""A federation small enough to compile in seconds, shared by the tests of rounds, methods and tasks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.data import synthetic
from fedklpr_jax.data.labelled import Labelled
from fedklpr_jax.data.shapes import make_shapes
from fedklpr_jax.data.site import Site
from fedklpr_jax.federated import ClientData, Method, Task
from fedklpr_jax.methods import make_method
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.tasks import supervised, unsupervised

TINY = ModelSpec("tiny", (8, 8), (1, 1), stem="3x3/2")
SPECS = tuple(
    synthetic.SiteSpec(name, style, 2, train_ids, 4, 2)
    for name, style, train_ids in (("pier", "summer", 14), ("gate", "winter", 10), ("yard", "summer", 10))
)


@functools.cache
def _shapes() -> Labelled:
    return make_shapes(0, per_class=60)


def write_shapes(folder: Path) -> str:
    """Writes 600 drawn shapes as a set that `data.source=folder` reads, and gives its `data.root`."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "shapes.npz", images=_shapes().pixels, labels=_shapes().labels)
    return str(folder)


def tiny_config(method: str, **settings: object) -> ml_collections.ConfigDict:
    """Two epochs of small batches on three sites of 32 x 16 pixels; `settings` by dotted path (`__` for the dot)."""
    config = default_config()
    config.method.name = method
    config.data.height, config.data.width, config.data.pad = 32, 16, 2
    config.task.people, config.task.shots = 4, 2
    config.rounds = 4
    config.task.name = "supervised"
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in settings.items()})
    return resolved(config)


def tiny_sites() -> list[Site]:
    """Three sites of unequal size."""
    return synthetic.make_sites(0, height=32, width=16, specs=SPECS)


def tiny_task(
    config: ml_collections.ConfigDict, method: Method | None = None, spec: ModelSpec = TINY
) -> tuple[Task, Method]:
    """The task of `config` with a two-block network, and its method."""
    method = method or make_method(config.method)
    union = not method.is_local("params/classifier/kernel")
    return supervised.make_task(tiny_sites(), spec, config, union=union), method


def tiny_unsupervised_task(config: ml_collections.ConfigDict, method: Method | None = None) -> tuple[Task, Method]:
    """The same without labels; `config` is of `tiny_config(..., task__name="unsupervised")`."""
    return unsupervised.make_task(tiny_sites(), TINY, config), method or make_method(config.method)


def toy_task(
    targets: Sequence[Sequence[float]], *, optimizer: optax.GradientTransformation | None = None, steps: int = 1
) -> Task:
    """A task to compute by hand: a trunk of two weights, pulled to `targets[k]` at client k, and a classifier of one
    weight, pulled to 10; all start at 0. `batch_stats` counts the batches trained on, and the score is the classifier.

    The default optimiser is plain gradient descent; the factor on its step is 0.5, so every step halves the errors.
    """
    data = [ClientData(np.int32(k), np.float32(1 + k), np.full(32, k, np.int32), ()) for k in range(len(targets))]

    def forward(variables, inputs, client, train, key):
        params, count = variables["params"], variables["batch_stats"]["trunk"]["count"]
        outputs = {"embedding": params["trunk"]["kernel"] - inputs, "logits": params["classifier"]["kernel"]}
        return outputs, {"trunk": {"count": count + 1.0 if train else count}}

    def loss(arrays, outputs, rows, client):
        trunk = 0.5 * jnp.mean(jnp.sum(outputs["embedding"] ** 2, axis=1))
        return trunk + 0.5 * jnp.sum((outputs["logits"] - 10.0) ** 2)

    return Task(
        name="toy",
        arrays=jnp.array(targets, jnp.float32),
        client_names=tuple(f"client {k}" for k in range(len(targets))),
        clients=tuple(data),
        init=lambda key: {
            "params": {"trunk": {"kernel": jnp.zeros(2)}, "classifier": {"kernel": jnp.zeros(1)}},
            "batch_stats": {"trunk": {"count": jnp.float32(0)}},
        },
        inputs=lambda arrays, rows: arrays[rows],
        augment=lambda key, inputs: inputs,
        forward=forward,
        loss=loss,
        score=lambda arrays, variables, client: variables["params"]["classifier"]["kernel"][0],
        plan=lambda seed, round_, client, epochs: np.full((epochs, steps, 1), client, np.int32),
        evaluate=lambda variables, client: {},
        optimizer=optax.sgd(1.0) if optimizer is None else optimizer,
        learning_rate=lambda round_, epoch: 0.5,
    )
