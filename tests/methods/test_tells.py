"""What a server that never saw an upload expects of one, `Method.tells` and the first mask, is what comes."""

import jax
import numpy as np
import pytest

from fedklpr_jax import privacy
from fedklpr_jax.client_update import ClientUpdate, RoundInputs
from fedklpr_jax.methods import METHODS, make_method
from fedklpr_jax.round import start
from tests.federations import tiny_config, tiny_task


def upload_of(method):
    """The shape of an upload, nothing compiled or computed."""
    task, _ = tiny_task(tiny_config("fedavg"), method)
    server, clients = start(task, method, 0)
    client = clients[0]
    plan = task.plan(0, 0, 0, 1)
    message = jax.eval_shape(method.download, server, np.int32(0))
    inputs = RoundInputs(message, client, task.clients[0], plan, np.int32(plan.shape[1]), jax.random.key(0))
    upload, *_ = jax.eval_shape(ClientUpdate(task, method).update, task.arrays, 0, np.ones(1, np.float32), inputs)
    return upload, client


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in METHODS if name != "centralised"), ("fedreid", {"method__reid__cdw": True})],
)
def test_an_upload_is_what_the_server_expects(name, more):
    method = make_method(tiny_config(name, **more).method, ("a", "b", "c"))
    upload, client = upload_of(method)
    assert set(upload.scalars) == set(method.tells)
    assert (upload.mask is None) == (client.mask is None)


def test_a_private_upload_tells_nothing():
    options = tiny_config("fedavg", privacy__clip=1.0, privacy__noise=1.0).privacy
    method = privacy.protected(make_method(tiny_config("fedavg").method), options, clients=3, participants=3,
                               key=privacy.seeded(0))  # fmt: skip
    assert method.tells == () == tuple(upload_of(method)[0].scalars)
