"""Rounds in which every client trains a network of its own size.

Of a method with a `capacity` the client's mask says which channels it keeps. Its variables are cut to them, trained as
the task with the network of its class, and put back in their places; begin and end of the round see the whole network,
as they do under masks, and the numbers are the same up to rounding. One compilation a class, whoever takes part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedklpr_jax.capacity import DeviceClasses
from fedklpr_jax.client_maps import Mapper, balanced, brought, spread
from fedklpr_jax.client_update import ClientUpdate, RoundInputs, Training
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientState, Message, Task, Upload
from fedklpr_jax.programs import Watch, epochs_in_stages, no_watch, taken
from fedklpr_jax.trees import PyTree, merge, path_map, split

# What trains the clients of a class: (round, rates, inputs, their models, their states, watch) -> stacked results.
Train = Callable[[int, np.ndarray, RoundInputs, PyTree, ClientState, Watch], PyTree]


class SubmodelUpdate(NamedTuple):
    """The stages of a client of class `device`: `whole` is bound to the task, `small` to the class's. All pure."""

    whole: ClientUpdate
    small: ClientUpdate
    capacity: DeviceClasses
    device: int

    def enter(self, inputs: RoundInputs, model: PyTree, client: ClientState) -> tuple[Message, Training]:
        """The download, cut to the client's channels, and the start of training the model cut to them."""

        def cut(tree: PyTree) -> PyTree:
            return self.capacity.cut(tree, client.mask, self.device)

        narrow = client._replace(local=cut(client.local), mask=None)
        return Message(cut(inputs.message.model), None), self.small.start(cut(model), narrow)

    def leave(self, model: PyTree, client: ClientState, training: Training) -> Training:
        """The whole variables after training; those of cut channels as they were."""
        variables = self.capacity.restore(training.variables, client.mask, merge(model, client.local))
        _, local = split(variables, self.whole.method.is_local)
        client = training.client._replace(local=local, mask=client.mask)
        return training._replace(variables=variables, optimizer=(), client=client)

    def finish(
        self,
        arrays: PyTree,
        round_: jax.Array,
        inputs: RoundInputs,
        model: PyTree,
        client: ClientState,
        training: Training,
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        """Back to the whole network, and the method's upload."""
        return self.whole.finish(arrays, round_, inputs, self.leave(model, client, training))

    def train(
        self,
        arrays: PyTree,
        round_: jax.Array,
        rates: jax.Array,
        inputs: RoundInputs,
        model: PyTree,
        client: ClientState,
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        """All of a client's round behind its begin as one function."""
        message, training = self.enter(inputs, model, client)
        narrow = inputs._replace(message=message, client=training.client)
        training, made = self.small.epochs(arrays, round_, rates, narrow, training)
        upload, client, logs = self.finish(arrays, round_, inputs, model, client, training)
        return upload, client, logs | made

    def fine_tune(
        self,
        arrays: PyTree,
        round_: jax.Array,
        rates: jax.Array,
        inputs: RoundInputs,
        model: PyTree,
        client: ClientState,
    ) -> PyTree:
        """The whole variables after the personalised model's extra epochs."""
        message, training = self.enter(inputs, model, client)
        narrow = inputs._replace(message=message, client=training.client)
        return self.leave(model, client, self.small.epochs(arrays, round_, rates, narrow, training)[0]).variables


def make_programs(
    whole: ClientUpdate, narrow: Sequence[Task], mapper: Mapper, devices: int, *, together: int, staged: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`update` and `fine_tune` of an engine; the logs of `update` tell each client's share of its class's seconds,
    `train_seconds` (compilation included, where one was needed).

    Args:
      whole: the stages of the whole network.
      narrow: the task of each class.
      mapper: of `client_maps.make_mapper`.
      devices: how many devices share the clients.
      together: clients of a class that one call trains; more take several calls, fewer are filled up with clients of
        no steps, so that shapes never change.
      staged: whether every stage is a program of its own.

    Raises:
      InputError: a narrow task is not what the method cuts the whole one to.
    """
    capacity = whole.method.capacity
    if capacity is None or len(narrow) != len(capacity.shares):
        raise InputError(
            f"method {whole.method.name}: {len(narrow)} narrow tasks; give one for each class of its capacity"
        )
    _check(whole, narrow, capacity)
    size = together + -together % devices
    updates = [SubmodelUpdate(whole, ClientUpdate(task, whole.method), capacity, k) for k, task in enumerate(narrow)]
    trains = [(_staged if staged else _fused)(update, mapper) for update in updates]
    prepare = mapper("begin", whole.prepare)
    personalise = mapper(
        "start", lambda arrays, inputs: (whole.method.personalise(inputs.message, inputs.client), inputs.client)
    )

    # On the devices, where the begin left them.
    rows_of = jax.jit(lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree))

    def begin(program: Any, scalars: tuple[Any, ...], inputs: RoundInputs) -> tuple[PyTree, ClientState]:
        ordered, places = spread(inputs, devices)
        return taken(jax.block_until_ready(program(scalars, ordered)), places, devices)

    def by_class(
        which: int,
        round_: int,
        rates: np.ndarray,
        inputs: RoundInputs,
        begun: tuple[PyTree, ClientState],
        watch: Watch,
    ) -> tuple[PyTree, np.ndarray]:
        """The results of all clients in their order, and the seconds of each."""
        parts, order, seconds = [], [], np.zeros(len(inputs.steps), np.float32)
        for device, members in enumerate(_members(np.asarray(inputs.data.index), len(trains))):
            for rows in _calls(members, inputs.steps, size, devices):
                own, chosen = rows >= 0, np.maximum(rows, 0)
                work = jax.tree.map(lambda leaf, c=chosen: leaf[c], inputs)
                model, client = rows_of(begun, chosen)
                work = work._replace(steps=np.where(own, work.steps, 0).astype(np.int32))
                began = time.monotonic()
                out = jax.block_until_ready(brought(trains[device][which](round_, rates, work, model, client, watch)))
                seconds[rows[own]] = (time.monotonic() - began) / own.sum()
                parts.append(jax.tree.map(lambda leaf, o=own: np.asarray(leaf)[o], out))
                order.append(rows[own])
        places = np.argsort(np.concatenate(order))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[places], *parts), seconds

    def update(round_: int, rates: np.ndarray, inputs: RoundInputs, watch: Watch = no_watch) -> PyTree:
        with watch("pruning"):
            begun = begin(prepare, (np.int32(round_),), inputs)
        (upload, client, logs), seconds = by_class(0, round_, rates, inputs, begun, watch)
        return upload, client, logs | {"train_seconds": seconds}

    def fine_tune(round_: int, rates: np.ndarray, inputs: RoundInputs) -> PyTree:
        return by_class(1, round_, rates, inputs, begin(personalise, (), inputs), no_watch)[0]

    return update, fine_tune


def _members(clients: np.ndarray, classes: int) -> list[np.ndarray]:
    """The places of the participants of each class."""
    return [np.flatnonzero(clients % classes == device) for device in range(classes)]


def _calls(members: np.ndarray, steps: np.ndarray, size: int, devices: int) -> Iterator[np.ndarray]:
    """Places of the participants that each call trains, int [size] in the order of the devices; -1 for nobody."""
    for first in range(0, len(members), size):
        chosen = np.full(size, -1)
        chosen[: len(members) - first] = members[first : first + size]
        work = np.where(chosen >= 0, np.asarray(steps)[chosen], 0)
        yield chosen[balanced(work, devices).ravel()]


def _fused(update: SubmodelUpdate, mapper: Mapper) -> tuple[Train, Train]:
    """Training and fine-tuning of a class as one program each."""

    def call(program: Any) -> Train:
        def train(
            round_: int, rates: np.ndarray, inputs: RoundInputs, model: PyTree, client: ClientState, watch: Watch
        ) -> PyTree:
            with watch("training"):
                return jax.block_until_ready(
                    program((np.int32(round_), np.float32(rates)), inputs, model, client)
                )

        return train

    return call(mapper("update", update.train)), call(mapper("fine_tune", update.fine_tune))


def _staged(update: SubmodelUpdate, mapper: Mapper) -> tuple[Train, Train]:
    """The same as one program a stage."""
    enter = mapper("cut", lambda arrays, *trees: update.enter(*trees))
    leave = mapper("restore", lambda arrays, inputs, *trees: update.leave(*trees).variables)
    finish = mapper("finish", update.finish)
    epochs = epochs_in_stages(update.small, mapper)

    def train(
        round_: int, rates: np.ndarray, inputs: RoundInputs, model: PyTree, client: ClientState, watch: Watch
    ) -> PyTree:
        message, training = enter((), inputs, model, client)
        narrow = inputs._replace(message=message, client=training.client)
        training, made = epochs(round_, rates, narrow, training, watch)
        upload, after, logs = finish((np.int32(round_),), inputs, model, client, training)
        return upload, after, logs | made

    def tune(
        round_: int, rates: np.ndarray, inputs: RoundInputs, model: PyTree, client: ClientState, watch: Watch
    ) -> PyTree:
        message, training = enter((), inputs, model, client)
        narrow = inputs._replace(message=message, client=training.client)
        training, _ = epochs(round_, rates, narrow, training, watch)
        return leave((), inputs, model, client, training)

    return train, tune


def _check(whole: ClientUpdate, narrow: Sequence[Task], capacity: DeviceClasses) -> None:
    """Raise InputError where a narrow task's variables are not those that a client of the class trains."""
    variables = jax.eval_shape(whole.task.init, jax.random.key(0))
    model, _ = split(variables, whole.method.is_local)
    mask = jax.eval_shape(lambda: capacity.first_mask(model, 0))
    for device, (task, share) in enumerate(zip(narrow, capacity.shares, strict=True)):
        found = _shapes(jax.eval_shape(task.init, jax.random.key(0)))
        for path, shape in _shapes(jax.eval_shape(lambda m, d=device: capacity.cut(variables, m, d), mask)).items():
            if found.pop(path, None) != shape:
                raise InputError(f"task {task.name}, network for {share:g} of the channels: {path} is not {shape}; "
                                 "give the task with that of `capacity.specs`, without weights to start from")
        for path in found:
            raise InputError(f"task {task.name}, network for {share:g} of the channels: {path} is not in the whole one")


def _shapes(variables: PyTree) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    path_map(lambda path, leaf: found.setdefault(path, leaf.shape), variables)
    return found
