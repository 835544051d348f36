"""A host of `test_hosts.py`: `python -m tests.host_of_several SETTING` joins the others and prints what it got."""

from __future__ import annotations

import hashlib
import json
import sys

import jax
import numpy as np

from fedklpr_jax import hosts
from fedklpr_jax import round as rounds
from fedklpr_jax.errors import InputError
from tests.federations import tiny_config, tiny_unsupervised_task


def what_is_told() -> list[object]:
    """The first host's values as they arrive: signs of zeros, NaN, booleans, nothing at all, a text."""
    first = hosts.index() == 0
    mine = (np.array([-0.0, np.nan, np.inf], np.float32), np.array([True, False]), np.zeros((0, 3)), np.int32(7))
    arrays = hosts.told(mine if first else jax.tree.map(np.ones_like, mine))
    same = [a.tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in zip(arrays, mine, strict=True)]
    return [all(same), hosts.told_text("naïve" if first else ""), hosts.told_text("" if first else "mine")]


def what_is_refused() -> list[str]:
    """The errors that every host gets of what the second host has alone."""

    def fail() -> int:
        if hosts.index() == 1:
            raise InputError("config.x: " + "ä" * 600)
        return 3

    found = []
    for job in (fail, lambda: hosts.check_same("data", {"x": np.full(2, hosts.index())})):
        try:
            hosts.agreed(job) if job is fail else job()
        except InputError as error:
            found.append(str(error))
    assert hosts.agreed(lambda: 4) == 4
    hosts.check_same("data", {"x": np.ones(2)})
    return found


def trained() -> str:
    """A digest of the model after a round whose labels are made on the hosts."""
    config = tiny_config("fedklpr", task__name="unsupervised", data__copies="1", cluster__where="host",
                         cluster__k1=6, cluster__k2=2, cluster__min_samples=2)  # fmt: skip
    task, method = tiny_unsupervised_task(config)
    server, clients = rounds.start(task, method, 0)
    engine = rounds.make_engine(task, method, epochs=1, devices=0)
    server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
    parts = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((server.model, clients))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


if __name__ == "__main__":
    hosts.connect(sys.argv[1])
    print(json.dumps([what_is_told(), what_is_refused(), trained()] if hosts.count() > 1 else trained()))
