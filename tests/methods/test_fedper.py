"""FedPer: which layers are personal, and what is averaged."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import round as rounds
from fedklpr_jax.config import validate
from fedklpr_jax.errors import InputError
from fedklpr_jax.methods import fedper, make_method
from fedklpr_jax.trees import path_map, split
from tests.federations import tiny_config, tiny_task, tiny_unsupervised_task, toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

# Two clients with one and two images: n_k / n is 1/3 and 2/3.
TARGETS = [[6.0, 0.0], [0.0, 12.0]]


def kernel(tree, name="trunk"):
    return np.asarray(tree["params"][name]["kernel"])


def simulate(task, method, rounds_=1):
    engine = rounds.make_engine(task, method, epochs=1)
    server, clients = rounds.start(task, method, seed=0)
    for _ in range(rounds_):
        server, clients, logs = rounds.simulate(engine, server, clients, seed=0)
    return server, clients, logs


@pytest.mark.short
def test_personal_layers_are_whole_parts_of_a_path():
    personal = fedper.named("classifier, layer4_0,bnneck")
    for path in ("params/classifier/bias", "params/trunk/layer4_0/conv1/kernel", "batch_stats/trunk/bnneck/mean"):
        assert personal(path), path
    for path in ("params/trunk/layer4_01/conv1/kernel", "params/trunk/layer3_0/conv1/kernel", "params/trunk/conv1"):
        assert not personal(path), path
    assert not fedper.named("")("params/classifier/bias")


@pytest.mark.short
def test_the_default_is_the_classifier_or_the_neck_where_there_is_none():
    supervised, unsupervised = tiny_config("fedper"), tiny_config("fedper", task__name="unsupervised")
    assert supervised.method.per.layers == "classifier" and unsupervised.method.per.layers == "bnneck"
    assert make_method(supervised.method).is_local("params/classifier/kernel")
    for wrong in ("", "classifier,", "params/classifier"):
        with pytest.raises(InputError, match=r"^config\.method\.per\.layers: .* such as classifier,layer4_0$"):
            validate(tiny_config("fedper", method__per__layers=wrong))


def test_the_base_is_averaged_by_images_and_the_classifier_stays():
    # Client 0's classifier is drawn to 10, client 1's to 20.
    task = toy_task(TARGETS)
    task = dataclasses.replace(
        task,
        loss=lambda arrays, outputs, rows, client: (
            0.5 * jnp.mean(jnp.sum(outputs["embedding"] ** 2, axis=1))
            + 0.5 * jnp.sum((outputs["logits"] - 10.0 * (1 + client.index)) ** 2)
        ),
    )
    server, clients, logs = simulate(task, fedper.make("classifier"), rounds_=2)
    # Round 1: (3, 0) and (0, 6) make (1, 4). Round 2: (3.5, 2) and (0.5, 8) make (1.5, 6).
    np.testing.assert_allclose(logs["weight"], [1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(kernel(server.model), [1.5, 6.0], rtol=1e-6)
    assert [kernel(client.local, "classifier").tolist() for client in clients] == [[7.5], [15.0]]


def test_a_personal_block_keeps_its_statistics_and_never_travels():
    server, clients, _ = simulate(toy_task(TARGETS), fedper.make("trunk"), rounds_=2)
    assert "trunk" not in server.model["params"] and not jax.tree.leaves(server.model.get("batch_stats", {}))
    assert [kernel(client.local).tolist() for client in clients] == [[4.5, 0.0], [0.0, 9.0]]
    assert [float(client.local["batch_stats"]["trunk"]["count"]) for client in clients] == [2.0, 2.0]
    np.testing.assert_allclose(kernel(server.model, "classifier"), [7.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("task_name", "layers"), [("supervised", "classifier,layer2_0"), ("unsupervised", "layer2_0,bnneck")]
)
def test_a_round_on_re_id(task_name, layers):
    settings = tiny_config("fedper", task__name=task_name, method__per__layers=layers)
    task, method = (tiny_task if task_name == "supervised" else tiny_unsupervised_task)(settings)
    initial = split(task.init(jax.random.key(0)), method.is_local)
    server, clients, logs = simulate(task, method)
    images = np.array([client.images for client in task.clients])
    np.testing.assert_allclose(logs["weight"], images / images.sum(), rtol=1e-6)

    def paths(tree):
        return set(jax.tree.leaves(path_map(lambda path, leaf: path, tree)))

    names = set(layers.split(","))
    assert paths(server.model) == paths(initial[0]) and not any(names & set(p.split("/")) for p in paths(server.model))
    assert all(any(name in path.split("/") for path in paths(clients[0].local)) for name in names)
    # Every client's own block has moved its own way.
    blocks = [np.asarray(tree["params"]["trunk"]["layer2_0"]["conv1"]["kernel"])
              for tree in (initial[1], *(client.local for client in clients))]  # fmt: skip
    assert all(not np.array_equal(a, b) for k, a in enumerate(blocks) for b in blocks[:k])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(server.model))
