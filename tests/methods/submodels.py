"""Federations for the methods whose clients train networks of different widths."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from fedklpr_jax import round as rounds
from fedklpr_jax.data.labelled import Labelled
from fedklpr_jax.federated import Task
from fedklpr_jax.methods import make_method
from fedklpr_jax.models.spec import ModelSpec, make_spec
from fedklpr_jax.tasks import classification, supervised, unsupervised
from fedklpr_jax.tasks.classification import Share
from fedklpr_jax.trees import path_map
from tests.federations import tiny_config, tiny_sites

SPECS = {
    "vgg": make_spec("vgg11_thin", widths=(32, 32), blocks=(1, 1)),
    "resnet": make_spec("resnet_cifar_thin", widths=(16, 24), blocks=(1, 1)),
    "group norm": make_spec("vgg11_thin", widths=(16, 16), blocks=(1, 1), norm="group"),
    "cnn": make_spec("cnn", widths=(8, 16, 24)),
    "re-ID": ModelSpec("tiny", (16, 16), (1, 1), stem="3x3/2"),
}
SEED = 1
# Adam's first step is the sign of the gradient: where that is nearly 0, rounding decides it.
BASE = {
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 0.003,
    "optimizer__weight_decay": 0.01,
    "method__capacity__shares": "1.0,0.5,0.25",
    "method__capacity__min_channels": 4,
    "task__batch": 8,
}


def config_of(method, **settings):
    return tiny_config(method, **({"task__name": "classification"} | BASE | settings))


def tasks_of(config, name) -> tuple[Task, list[Task]]:
    """A task and the same with the networks of the method's classes: three classes of small noisy pictures and four
    clients, or the drawn sites."""
    method, spec = make_method(config.method), SPECS[name]
    if config.task.name == "unsupervised":
        make = lambda spec: unsupervised.make_task(tiny_sites(), spec, config)  # noqa: E731
    elif config.task.name == "supervised":
        union = not method.is_local("params/classifier/kernel")
        make = lambda spec: supervised.make_task(tiny_sites(), spec, config, union=union)  # noqa: E731
    else:
        random = np.random.default_rng(0)
        labels = random.integers(0, 3, 96).astype(np.int32)
        pixels = (80 * labels[:, None, None, None] + random.integers(0, 90, (96, 16, 16, 1))).astype(np.uint8)
        ends = (0, 40, 56, 72, 88)
        shares = [
            Share(np.arange(first, last), np.arange(0), np.arange(88, 96))
            for first, last in zip(ends, ends[1:], strict=False)
        ]
        data = Labelled(pixels, labels, ("a", "b", "c"))
        make = lambda spec: classification.make_task(data, shares, spec, config)  # noqa: E731
    return make(spec), [make(one) for one in method.capacity.specs(spec)]


@dataclasses.dataclass
class Run:
    """A federation in progress; `round` lets all its clients, or `chosen`, take part."""

    config: object
    task: Task
    engine: rounds.Engine
    server: object
    clients: list

    def inputs(self, chosen, epochs=0):
        messages = [jax.device_get(self.engine.download(self.server, np.int32(k))) for k in chosen]
        states = [self.clients[k] for k in chosen]
        round_ = int(self.server.round)
        return rounds.round_inputs(self.engine, messages, states, chosen, seed=SEED, round_=round_, epochs=epochs)

    def round(self, chosen=None, accepted=None):
        """One round: the uploads, the states and the logs of the clients; what is refused changes nothing."""
        chosen = range(len(self.clients)) if chosen is None else chosen
        accepted = [True] * len(chosen) if accepted is None else accepted
        round_ = int(self.server.round)
        rates = rounds.rates(self.task, round_, self.engine.epochs)
        upload, states, logs = self.engine.update(round_, rates, self.inputs(chosen))
        uploads = rounds.stack_uploads(rounds.unstack(upload, len(chosen)), list(chosen), accepted)
        self.server, _ = self.engine.aggregate(self.server, uploads)
        for k, state, taken in zip(chosen, rounds.unstack(states, len(chosen)), accepted, strict=True):
            if taken:
                self.clients[k] = state
        return upload, states, logs


def begin(config, name, compact, tasks=None, epochs=1, **how) -> Run:
    method = make_method(config.method)
    task, narrow = tasks or tasks_of(config, name)
    engine = rounds.make_engine(task, method, epochs=epochs, narrow=narrow if compact else (), **how)
    server, clients = rounds.start(task, method, SEED)
    return Run(config, task, engine, server, list(clients))


def flat(tree):
    found = {}
    path_map(lambda path, leaf: found.setdefault(path, np.asarray(leaf)), tree)
    return found
