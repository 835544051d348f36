"""Rounds whose pictures stay on disk end in the models of rounds that have them on the device, bit for bit."""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest

from fedklpr_jax import round as rounds
from fedklpr_jax.config import default_config, validate
from fedklpr_jax.data.labelled import Labelled
from fedklpr_jax.data.stream import Streamed
from fedklpr_jax.errors import InputError
from fedklpr_jax.methods import make_method
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.tasks import classification
from fedklpr_jax.tasks.classification import Share
from tests.federations import tiny_config, tiny_task, tiny_unsupervised_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")


def classes_task(config):
    rng = np.random.default_rng(0)
    data = Labelled(rng.integers(0, 256, (60, 16, 16, 1), np.uint8), np.arange(60, dtype=np.int32) % 3, ("a", "b", "c"))
    shares = [Share(np.arange(0, 21), np.arange(21, 26), np.arange(26, 30)),
              Share(np.arange(30, 43), np.arange(43, 50), np.arange(50, 60))]  # fmt: skip
    spec = ModelSpec("small", (4, 4, 4), (1, 1, 1), family="cnn")
    return classification.make_task(data, shares, spec, config), make_method(config.method)


TASKS = {"supervised": tiny_task, "classification": classes_task}


def trained(task_name: str, method: str, stream: bool, client_map: str):
    """Server and clients after two rounds, and how many batches of the plan were read ahead."""
    config = tiny_config(method, task__name=task_name, data__stream=stream, task__batch=4)
    task, method = TASKS[task_name](config)
    ahead = []
    if stream:
        assert isinstance(task.arrays.pixels, Streamed)
        feeding = task.arrays.pixels._batch
        # Whether the batch that is asked for is one that a plan announced.
        task.arrays.pixels._batch = lambda rows: (
            ahead.append(rows.tobytes() in task.arrays.pixels._due) or feeding(rows)
        )
    engine = rounds.make_engine(task, method, epochs=2, client_map=client_map)
    server, clients = rounds.start(task, method, 0)
    for _ in range(2):
        server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    return jax.tree.map(np.asarray, (server.model, [client.local for client in clients])), sum(ahead), task


@pytest.mark.parametrize(
    ("task", "method", "client_map"),
    [
        ("supervised", "fedavg", "map"),
        ("classification", "fedper", "vmap"),
    ],
)
def test_a_streamed_round_is_the_same(task: str, method: str, client_map: str) -> None:
    wanted, _, _ = trained(task, method, False, client_map)
    found, ahead, streamed = trained(task, method, True, client_map)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.array_equal(one, two)
    steps = sum(streamed.plan(0, 0, client, 2).size // streamed.plan(0, 0, client, 2).shape[-1]
                for client in range(len(streamed.clients)))  # fmt: skip
    assert ahead == 2 * steps


def test_what_labels_are_made_from_is_the_same() -> None:
    found = []
    for stream in (False, True):
        task, _ = tiny_unsupervised_task(tiny_config("fedavg", task__name="unsupervised", data__stream=stream))
        assert isinstance(task.arrays.pixels, Streamed) == stream
        variables = jax.jit(task.init)(jax.random.key(0))
        found.append(np.asarray(jax.jit(task.labelling.embed)(task.arrays, variables, task.clients[1])))
    assert np.array_equal(*found) and np.abs(found[0]).sum() > 1


def test_what_copies_pictures_is_no_stream() -> None:
    config = default_config()
    config.data.stream = True
    validate(config)
    for path, value in (("hosts", "localhost:1,2,0"), ("data.scenario", "camera"), ("method.name", "centralised")):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({path: value})
        with pytest.raises(InputError, match="config.data.stream: is for one host, the scenario dataset and clients"):
            validate(other)


def test_without_grain_one_line_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match=r"config.data.stream: needs Grain; install it: pip install 'fedklpr_jax\[gra"):
        tiny_task(tiny_config("fedavg", data__stream=True))
