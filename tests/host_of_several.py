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
    texts = [hosts.told_text("naïve" if first else ""), hosts.told_text("" if first else "mine")]
    return [all(same) and what_is_dealt(), *texts]


def what_is_dealt() -> bool:
    """Whether three pieces of work are made by one host each, and arrive on all bit by bit."""
    made = []

    def work(number: int) -> dict[str, np.ndarray]:
        made.append(number)
        return {"x": np.array([-0.0, number], np.float32), "y": np.int64(2**40 + number), "z": np.array([number == 1])}

    found = hosts.dealt(3, work)
    own = made == list(range(hosts.index(), 3, hosts.count()))
    return own and all(
        found[number][key].tobytes() == value.tobytes() and found[number][key].dtype == value.dtype
        for number in range(3)
        for key, value in work(number).items()
    )


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
