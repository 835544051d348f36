"""HeteroFL: the first channels of every layer, nested, and their unweighted mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedklpr_jax import channels
from fedklpr_jax import round as rounds
from fedklpr_jax.federated import ServerContext, Uploads
from fedklpr_jax.methods import make_method
from fedklpr_jax.trees import split, stack
from tests.methods.submodels import begin, config_of, flat, tasks_of

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")



def kept_of(mask):
    return [int(kept.sum()) for kept in channels.kept_channels(mask, channels.channel_groups(mask))]


def test_every_round_trains_the_first_channels():
    config = config_of("heterofl", method__capacity__shares="1.0,0.5")
    run = begin(config, "cnn", True, tasks_of(config, "cnn"))
    start = jax.device_get(run.server.model)
    upload, _, logs = run.round([0, 1])
    # Widths 8, 16, 24: the whole network, and half of it to the nearest 8, of layers below 16 to the nearest 4.
    for row, counts in ((0, [8, 16, 24]), (1, [4, 8, 16])):
        mask = rounds.unstack(upload.mask, 2)[row]
        assert kept_of(mask) == counts
        # Both sides know it from the start, so that no mask ever travels.
        message = run.engine.download(run.server, np.int32(row))
        for known in (run.clients[row].mask, message.mask):
            for a, b in zip(jax.tree.leaves(known), jax.tree.leaves(mask), strict=True):
                np.testing.assert_array_equal(a, b)
    sent, mask = flat(rounds.unstack(upload.model, 2)[1]), flat(rounds.unstack(upload.mask, 2)[1])
    assert sent["params/trunk/conv2/kernel"].shape == (5, 5, 8, 16)
    for path, leaf in sent.items():
        assert (leaf[~mask[path]] == 0).all(), path
    own = mask["params/trunk/conv2/kernel"]
    assert own[:, :, :4, :8].all() and own.sum() == 25 * 4 * 8
    assert (sent["params/trunk/conv2/kernel"] != start["params"]["trunk"]["conv2"]["kernel"])[own].any()
    assert logs["density"][0] == 1.0 and logs["density"][1] < 0.5
    # A client that was never chosen is tested with its own channels too.
    method = run.engine.method
    model = method.personalise(run.engine.download(run.server, np.int32(3)), run.clients[3])
    assert (np.asarray(model["params"]["trunk"]["conv1"]["kernel"])[..., 4:] == 0).all()


@pytest.mark.parametrize(("weights", "expected"), [("equal", [3.0, 1.0]), ("images", [4.0, 1.0])])
def test_the_mean_of_those_who_hold_an_entry(weights, expected):
    settings = {"method__hetero__weights": weights, "method__capacity__shares": "1.0,0.5"}
    config = config_of("heterofl", **settings)
    method = make_method(config.method)
    task, _ = tasks_of(config, "cnn")
    shared, _ = split(jax.eval_shape(task.init, jax.random.key(0)), method.is_local)

    @jax.jit
    def given():
        model = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 9.0), shared)
        return model, [method.capacity.first_mask(model, client) for client in (0, 1)]

    model, masks = given()
    models = [jax.tree.map(lambda m, x=x: np.where(m, np.float32(x), 0), mask) for mask, x in zip(
        masks, (1.0, 5.0), strict=True)]  # fmt: skip

    def merged(accepted):
        uploads = Uploads(
            stack(models), stack(masks), {"images": np.float32([10, 30])}, np.array([0, 1]), np.array(accepted)
        )
        step = jax.jit(lambda server: method.aggregate(server, uploads, ServerContext()))
        server, logs = step(rounds.ServerState(model, (), jnp.int32(0)))
        bias = flat(server.model)["params/trunk/conv1/bias"]
        return bias, logs["weight"].tolist(), server

    # (1 + 5) / 2 or (10 + 150) / 40 where both hold an entry, client 0's where it alone does.
    bias, _, server = merged([True, True])
    assert bias.tolist() == [expected[0]] * 4 + [expected[1]] * 4 and int(server.round) == 1
    # Refused: client 1's alone, and the old value beyond its channels.
    bias, weight, _ = merged([False, True])
    assert bias.tolist() == [5.0] * 4 + [9.0] * 4 and weight == [0.0, 1.0]
