"""A client round as compiled programs over clients.

Where labels are given, or assigned by a traced function, the whole client round is one program over all clients. Where
they are assigned on the host, and with `client_map=loop`, every stage is a program of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np

from fedklpr_jax import hosts
from fedklpr_jax.client_maps import Mapper, brought, spread
from fedklpr_jax.client_update import ClientUpdate, Found, RoundInputs, Told, Training
from fedklpr_jax.federated import ClientState
from fedklpr_jax.trees import PyTree, stack

Watch = Callable[[str], AbstractContextManager[Any]]


def no_watch(part: str) -> AbstractContextManager[Any]:
    """A watch that takes no time."""
    return nullcontext()


Epochs = Callable[[int, np.ndarray, RoundInputs, Training, Watch], tuple[Training, dict[str, PyTree]]]


def taken(tree: PyTree, places: np.ndarray, devices: int) -> PyTree:
    """The rows of the clients out of those of all places, on every host."""
    return tree if devices == 1 else jax.tree.map(lambda leaf: leaf[places], brought(tree))


def fused(stages: ClientUpdate, mapper: Mapper, devices: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A client round as one program."""
    programs = mapper("update", stages.update), mapper("fine_tune", stages.fine_tune)

    def whole(program: Any, round_: int, rates: np.ndarray, inputs: RoundInputs, watch: Watch) -> PyTree:
        ordered, places = spread(inputs, devices)
        with watch("training"):
            out = jax.block_until_ready(program((np.int32(round_), np.float32(rates)), ordered))
        return taken(out, places, devices)

    def update(round_: int, rates: np.ndarray, inputs: RoundInputs, watch: Watch = no_watch) -> PyTree:
        return whole(programs[0], round_, rates, inputs, watch)

    def fine_tune(round_: int, rates: np.ndarray, inputs: RoundInputs) -> PyTree:
        return whole(programs[1], round_, rates, inputs, no_watch)

    return update, fine_tune


def summed(
    stages: ClientUpdate, reducer: Mapper, devices: int
) -> Callable[..., tuple[PyTree, tuple[ClientState, dict[str, PyTree], Told]]]:
    """A client round as one program that sums what the server averages: `(sums, (clients, logs, told))`."""
    program = reducer("update", stages.contribute)

    def update(round_: int, rates: np.ndarray, inputs: RoundInputs, watch: Watch = no_watch) -> PyTree:
        ordered, places = spread(inputs, devices)
        with watch("training"):
            sums, rest = jax.block_until_ready(program((np.int32(round_), np.float32(rates)), ordered))
        return sums, taken(rest, places, devices)

    return update


def epochs_in_stages(stages: ClientUpdate, mapper: Mapper) -> Epochs:
    """All local epochs, each stage a program of its own: with labels made on the way also these, [K, E, ...], and the
    `steps` [K, E] of each."""
    labelling = stages.task.labelling
    embed, train_epoch = mapper("embed", stages.embed), mapper("train_epoch", stages.train_epoch)
    assign = mapper("assign", stages.assign)

    def label(round_: int, epoch: int, inputs: RoundInputs, training: Training, watch: Watch) -> Found:
        assert labelling
        with watch("embedding"):
            features = jax.block_until_ready(embed((), inputs, training))
        with watch("clustering"):
            if not labelling.on_host:
                scalars = (np.int32(round_), np.int32(epoch))
                return Found(features, jax.block_until_ready(assign(scalars, inputs, training, features)))
            clients, before = inputs.data.index, np.asarray(brought(training.client.labels))
            host = np.asarray(brought(features))

            def assigned(place: int) -> PyTree:
                if not inputs.steps[place]:
                    return labelling.unlabelled
                return labelling.assign_host(host[place], int(clients[place]), before[place], round_, epoch)

            return Found(features, stack(hosts.dealt(len(clients), assigned)))

    def epochs(
        round_: int, rates: np.ndarray, inputs: RoundInputs, training: Training, watch: Watch
    ) -> tuple[Training, dict[str, PyTree]]:
        made = []
        for epoch, rate in enumerate(rates):
            found = () if labelling is None else (label(round_, epoch, inputs, training, watch),)
            with watch("training"):
                scalars = (np.int32(round_), np.float32(rate), np.int32(epoch))
                training = jax.block_until_ready(train_epoch(scalars, inputs, training, *found))
            made += [brought({"labels": entry.labels, "steps": training.steps}) for entry in found]
        # Leading axes [K, E], as in one program.
        return training, jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *made) if made else {}

    return epochs


def staged(stages: ClientUpdate, mapper: Mapper, devices: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A client round as one program a stage, with the labels assigned in between."""
    begin, finish = mapper("begin", stages.begin), mapper("finish", stages.finish)
    personalised = mapper("start", lambda arrays, inputs: stages.personalised(inputs))
    epochs = epochs_in_stages(stages, mapper)

    def update(round_: int, rates: np.ndarray, inputs: RoundInputs, watch: Watch = no_watch) -> PyTree:
        inputs, places = spread(inputs, devices)
        with watch("pruning"):
            training = jax.block_until_ready(begin((np.int32(round_),), inputs))
        training, made = epochs(round_, rates, inputs, training, watch)
        with watch("pruning"):
            upload, client, logs = jax.block_until_ready(finish((np.int32(round_),), inputs, training))
        return taken((upload, client, logs | made), places, devices)

    def fine_tune(round_: int, rates: np.ndarray, inputs: RoundInputs) -> PyTree:
        inputs, places = spread(inputs, devices)
        training, _ = epochs(round_, rates, inputs, personalised((), inputs), no_watch)
        return taken(training.variables, places, devices)

    return update, fine_tune
