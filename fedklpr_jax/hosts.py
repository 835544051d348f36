"""Several hosts that train one federation together (`config.hosts`), each with devices of its own, by
`jax.distributed`.

Every host runs the same command and the same programs, whose clients are shared by all devices. What a host reads or
makes outside of them must be the same everywhere: the first host's is told to the others, and an error of one is raised
on all. With one host everything here does nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedklpr_jax.errors import InputError
from fedklpr_jax.trees import PyTree, stack

Result = TypeVar("Result")

# Bytes of an error's text that travel to the other hosts.
_LONGEST = 1000


def connect(setting: str) -> None:
    """Joins the hosts of `config.hosts`, waiting for them; before anything else is asked of JAX.

    Args:
      setting: nothing (one host), `auto` (as the cluster's manager says: Slurm, Kubernetes, TPU pods, Open MPI), or
        `HOST:PORT,COUNT,INDEX`: where the first of so many hosts listens, and which one this is.

    Raises:
      InputError: the first host cannot be reached, or no cluster's manager was found.
    """
    if not setting:
        return
    # It would take SIGTERM for itself, which already ends a run in good order.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if setting == "auto":
            jax.distributed.initialize()
        else:
            address, count, index = setting.split(",")
            jax.distributed.initialize(address, int(count), int(index))
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"config.hosts: {setting} gave no connection ({reason[:200]}); give the first host's address and a free "
            "port, the same on all hosts, how many they are, and which this is from 0: 10.0.0.5:12345,2,0"
        ) from error


def count() -> int:
    """How many hosts there are."""
    return jax.process_count()


def index() -> int:
    """Which of them this is; 0 is the first, the one that writes."""
    return jax.process_index()


def told(tree: PyTree) -> PyTree:
    """The first host's arrays on every host, bit by bit. `tree` has the same structure, shapes and dtypes on all."""
    if count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    leaves = [np.asarray(leaf) for leaf in leaves]
    # As bytes: the sum that carries them would make a plain zero of a negative one.
    sent = multihost_utils.broadcast_one_to_all([np.frombuffer(leaf.tobytes(), np.uint8) for leaf in leaves])
    rows = [
        np.frombuffer(np.asarray(row).tobytes(), leaf.dtype).reshape(leaf.shape).copy()
        for row, leaf in zip(sent, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, rows)


def told_text(text: str) -> str:
    """The first host's text on every host."""
    if count() == 1:
        return text
    own = np.frombuffer(text.encode(), np.uint8)
    length = int(told(np.int64(len(own))))
    return told(np.resize(own, length) if len(own) else np.zeros(length, np.uint8)).tobytes().decode()


def dealt(number: int, job: Callable[[int], PyTree]) -> list[PyTree]:
    """What `job` makes of each of the numbers below `number`, each made by one host and told to all, bit by bit.

    Args:
      number: at least as many as there are hosts.
      job: of a number, to arrays of the same structure, shapes and dtypes for all.
    """
    if count() == 1:
        return [job(k) for k in range(number)]
    own = {k: jax.tree.map(np.asarray, job(k)) for k in range(index(), number, count())}
    blank = jax.tree.map(np.zeros_like, own[index()])
    leaves, structure = jax.tree.flatten(stack([own.get(k, blank) for k in range(number)]))
    everyone = multihost_utils.process_allgather([np.ascontiguousarray(leaf).view(np.uint8) for leaf in leaves])
    found = [np.asarray(rows).view(leaf.dtype) for rows, leaf in zip(everyone, leaves, strict=True)]
    return [jax.tree.unflatten(structure, [rows[k % count(), k] for rows in found]) for k in range(number)]


def agreed(job: Callable[[], Result]) -> Result:
    """What `job` returns on this host, once it is done on all.

    Raises:
      InputError: that of the first host on which it failed.
    """
    if count() == 1:
        return job()
    result, own = None, ""
    try:
        result = job()
    except InputError as error:
        own = str(error)
    # Cut by bytes, then by the letters that are whole.
    sent = own.encode()[:_LONGEST].ljust(_LONGEST)
    for host, row in enumerate(multihost_utils.process_allgather(np.frombuffer(sent, np.uint8))):
        text = np.asarray(row).tobytes().decode(errors="ignore").strip()
        if text:
            raise InputError(own if own and host == index() else f"host {host}: {text}")
    return result  # type: ignore[return-value]


def check_same(what: str, tree: PyTree) -> None:
    """Raises InputError where the arrays of `tree`, which are `what`, are not those of the first host."""
    if count() == 1:
        return
    digest = 0
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        array = np.ascontiguousarray(leaf)
        digest = zlib.crc32(f"{array.dtype}{array.shape}".encode() + array.tobytes(), digest)
    digests = np.asarray(multihost_utils.process_allgather(np.uint32(digest)))
    for host, other in enumerate(digests):
        if other != digests[0]:
            raise InputError(f"host {host}: has other {what} than the first host; give every host the same")
