"""The whole interface: a Task knows data and loss, a Method knows federation, and both are values of pure functions.

A *model* below is the shared part of a variable tree, what server and clients exchange; the leaves a method calls
local never leave their client. A round of one client is `download -> begin -> E epochs -> finish`, where a task without
labels makes its own at the start of every epoch; the server merges the uploads with `aggregate`. Every hook has a
default, so that FedAvg is `Method("fedavg")`.

A complete method in a few lines, on a task of one number (each client pulls the model towards its own target): the
server moves only half of the way to the mean, and clients are held back by a proximal term.

>>> import jax, jax.numpy as jnp, numpy as np, optax
>>> from fedklpr_jax import aggregation, losses, round as rounds
>>> from fedklpr_jax.federated import *
>>> targets = jnp.array([1.0, 2.0, 6.0])
>>> task = Task(
...     name="toy", arrays=targets, client_names=("a", "b", "c"),
...     clients=tuple(ClientData(np.int32(k), np.float32(1 + k), np.zeros(1, np.int32), ()) for k in range(3)),
...     init=lambda key: {"params": {"x": jnp.zeros(())}, "batch_stats": {}},
...     inputs=lambda targets, rows: targets[rows],
...     augment=lambda key, inputs: inputs,
...     forward=lambda variables, inputs, client, train, key: (
...         {"embedding": variables["params"]["x"] - inputs}, variables["batch_stats"]),
...     loss=lambda targets, outputs, rows, client: 0.5 * jnp.mean(outputs["embedding"] ** 2),
...     score=lambda targets, variables, client: jnp.float32(0),
...     plan=lambda seed, round_, client, epochs: np.full((epochs, 1, 1), client, np.int32),
...     evaluate=lambda variables, client: {},
...     optimizer=optax.sgd(1.0), learning_rate=lambda round_, epoch: 0.5)
>>> def half_way(server, uploads, context):
...     weights = aggregation.image_weights(uploads.scalars["images"], uploads.accepted)
...     merged = context.mean(uploads.model, None, weights, server.model)
...     model = jax.tree.map(lambda old, new: 0.5 * (old + new), server.model, merged)
...     return server._replace(model=model, round=server.round + 1), {"weight": weights}
>>> toy = Method("half_way", penalty=lambda step: losses.proximal(step.params, step.received["params"]),
...              aggregate=half_way)
>>> engine = rounds.make_engine(task, toy, epochs=1)
>>> server, clients = rounds.start(task, toy, seed=0)
>>> for _ in range(3):
...     server, clients, _ = rounds.simulate(engine, server, clients, seed=0)
...     print(server.round, round(float(server.model["params"]["x"]), 4))
1 0.9583
2 1.6771
3 2.2161
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedklpr_jax import aggregation
from fedklpr_jax.capacity import DeviceClasses
from fedklpr_jax.data.picture_format import PictureFormat
from fedklpr_jax.data.stream import Ahead, nothing_ahead
from fedklpr_jax.trees import PyTree

__all__ = [
    "ClientContext",
    "ClientData",
    "ClientState",
    "Epoch",
    "Examined",
    "Labelling",
    "Message",
    "Method",
    "Public",
    "ServerContext",
    "ServerState",
    "Step",
    "Task",
    "Upload",
    "Uploads",
]


class ServerState(NamedTuple):
    """What the server keeps: the global `model`, the method's `memory`, and `round`, int32, rounds completed."""

    model: PyTree
    memory: PyTree
    round: jax.Array


class ClientState(NamedTuple):
    """What a client keeps from round to round: its `local` leaves, its `mask` (None = dense), the method's `memory`,
    and the `labels` it made last (empty for labelled tasks)."""

    local: PyTree
    mask: PyTree | None
    memory: PyTree
    labels: PyTree = ()


class Message(NamedTuple):
    """A download: the model sent to one client and the mask under which its values travel (None = all of them)."""

    model: PyTree
    mask: PyTree | None


class Upload(NamedTuple):
    """What a client sends: model, mask (None = dense) and named float32 scalars, `images` (n_k) among them."""

    model: PyTree
    mask: PyTree | None
    scalars: dict[str, jax.Array]


class Uploads(NamedTuple):
    """The uploads of K participants, every leaf with a leading axis [K].

    `clients` int32 [K] says whose they are; `accepted` bool [K] is False for an upload the server refused
    (not finite, malformed): it must get no weight.
    """

    model: PyTree
    mask: PyTree | None
    scalars: dict[str, jax.Array]
    clients: Any
    accepted: Any


class ClientData(NamedTuple):
    """One client's data as the compiled stages see it.

    `index` int32, its number; `images` float32, n_k; `probe` int32 [32], rows of its fixed batch D_batch;
    `task` what else the task needs (class counts, validation rows): same shapes for every client. `labels` and `memory`
    are filled in by the stages for tasks that make their own labels: the labels the client made last, and what the task
    keeps during an epoch.
    """

    index: Any
    images: Any
    probe: Any
    task: PyTree
    labels: PyTree = ()
    memory: PyTree = ()


class Epoch(NamedTuple):
    """What one local epoch trains on: `plan` int32 [most, batch] rows, `steps` int32, how many of its batches count,
    `memory` what loss and forward pass may read and `Task.remember` moves after every step."""

    plan: Any
    steps: Any
    memory: PyTree


def no_curvature(model: PyTree) -> tuple[PyTree, PyTree]:
    """`ClientContext.curvature` where there is no batch to take gradients of."""
    raise ValueError("this client has no batches to take gradients of")


class ClientContext(NamedTuple):
    """What a method may use at the begin and the end of a client's round.

    `round` int32; `received` the model decoded from this round's download, `received_local`
    the local leaves the client had then; `images` float32, n_k; `score(model)` float32, validation score of a model
    with the client's present local leaves; `probe(variables)` the task's outputs for complete variables on D_batch
    (eval mode, no augmentation); `curvature(model)` two trees like `model["params"]`: the mean gradient g of the task's
    loss over the batches of the round's first epoch (train mode, no augmentation) and h, the mean of batch size x
    squared batch gradients, which estimates the diagonal of the empirical Fisher matrix (not for tasks that make their
    labels on the way); `client` int32, its number.
    """

    round: jax.Array
    received: PyTree
    received_local: PyTree
    images: jax.Array
    score: Callable[[PyTree], jax.Array]
    probe: Callable[[PyTree], Mapping[str, jax.Array]]
    curvature: Callable[[PyTree], tuple[PyTree, PyTree]] = no_curvature
    client: Any = np.int32(0)


def no_public_images(model: PyTree, rows: jax.Array, train: bool) -> tuple[jax.Array, PyTree]:
    """`ServerContext.represent` of a server without public images."""
    raise ValueError("the server has no public images")


class ServerContext(NamedTuple):
    """What a method may use in its server step.

    `mean` is `aggregation.masked_mean`, summed over the devices of the mesh, or a merge of `robust.py` in its place;
    `represent(model, rows, train)` the features float32 [len(rows), d] of the task's public images in these rows and
    the batch-norm statistics after them; `public` how many such images there are (0 = none).
    """

    mean: Callable[..., PyTree] = aggregation.masked_mean
    represent: Callable[[PyTree, jax.Array, bool], tuple[jax.Array, PyTree]] = no_public_images
    public: int = 0


class Step(NamedTuple):
    """What a method may use in the loss of one batch.

    `round` int32; `params` the shared parameters in training; `received` the downloaded model; `outputs` the task's
    outputs in train mode; `reference()` those of the frozen received model, eval mode, on the same augmented images
    (computed only if called).
    """

    round: jax.Array
    params: PyTree
    received: PyTree
    outputs: Mapping[str, jax.Array]
    reference: Callable[[], Mapping[str, jax.Array]]


def send_global(server: ServerState, client: jax.Array) -> Message:
    """Download of a dense method: the global model, whoever asks."""
    return Message(server.model, None)


def start_from_download(client: ClientState, context: ClientContext) -> tuple[PyTree, ClientState]:
    """Begin of a client's round: train what came."""
    return context.received, client


def no_penalty(step: Step) -> jax.Array:
    """The task's loss alone."""
    return jnp.float32(0)


def same_after_epoch(
    model: PyTree, client: ClientState, context: ClientContext, epoch: jax.Array
) -> tuple[PyTree, ClientState]:
    """Epoch end without a hook."""
    return model, client


def send_all(
    model: PyTree, client: ClientState, context: ClientContext
) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
    """Finish of a dense method: the whole shared model and n_k go up."""
    return Upload(model, None, {"images": context.images}), client, {}


def average(server: ServerState, uploads: Uploads, context: ServerContext) -> tuple[ServerState, dict]:
    """FedAvg's server step: the mean of the accepted models weighted by n_k / n (McMahan et al. 2017, algorithm 1)."""
    weights = aggregation.image_weights(uploads.scalars["images"], uploads.accepted)
    model = context.mean(uploads.model, uploads.mask, weights, server.model)
    return server._replace(model=model, round=server.round + 1), {"weight": weights}


def average_equally(server: ServerState, uploads: Uploads, context: ServerContext) -> tuple[ServerState, dict]:
    """The same with equal weights: every accepted client counts `1 / K`."""
    weights = aggregation.equal_weights(uploads.accepted)
    model = context.mean(uploads.model, uploads.mask, weights, server.model)
    return server._replace(model=model, round=server.round + 1), {"weight": weights}


def keep_download(message: Message, client: ClientState) -> PyTree:
    """The model a client of a dense method ends with: the downloaded one."""
    return message.model


@dataclasses.dataclass(frozen=True)
class Method:
    """A federated method: pure functions, traced and mapped over clients; none may look at the host.

    Attributes:
      name: for configs and reports.
      is_local: path of a leaf -> whether it never leaves its client.
      server_memory: (model, number of clients) -> what the server remembers beside the model.
      client_mask: model -> the client's first mask, None for dense methods.
      client_memory: (model, mask) -> what a client remembers at the start.
      download: (server, client int32) -> Message.
      begin: (client, context) -> (model to train, client).
      penalty: Step -> float32 scalar added to the task's loss.
      on_epoch_end: (model, client, context, epoch int32) -> (model, client).
      finish: (trained model, client, context) -> (Upload, client, logs), logs named scalars that do not travel.
      aggregate: (server, uploads, ServerContext) -> (server, logs of float32 [K]).
      personalise: (message, client) -> the model this client is evaluated with and would deploy.
      trains: (path of a leaf of `params`, epoch int32) -> bool, whether it moves in this local epoch; None = all do.
      tells: names of the scalars that its uploads hold.
      needs_score: whether a hook reads `ClientContext.score`, so that validation data must be held out.
      needs_public: whether the server step reads public images.
      capacity: the classes of devices whose clients keep a part of the network's channels; a client's first mask is
        then that of its class, not `client_mask`, and `round.make_engine` may be given a smaller network for each
        class. None = all clients have the whole network.
    """

    name: str
    is_local: Callable[[str], bool] = lambda path: False
    server_memory: Callable[[PyTree, int], PyTree] = lambda model, clients: ()
    client_mask: Callable[[PyTree], PyTree | None] = lambda model: None
    client_memory: Callable[[PyTree, PyTree | None], PyTree] = lambda model, mask: ()
    download: Callable[[ServerState, jax.Array], Message] = send_global
    begin: Callable[[ClientState, ClientContext], tuple[PyTree, ClientState]] = start_from_download
    penalty: Callable[[Step], jax.Array] = no_penalty
    on_epoch_end: Callable[..., tuple[PyTree, ClientState]] = same_after_epoch
    finish: Callable[..., tuple[Upload, ClientState, dict[str, jax.Array]]] = send_all
    aggregate: Callable[..., tuple[ServerState, dict[str, jax.Array]]] = average
    personalise: Callable[[Message, ClientState], PyTree] = keep_download
    trains: Callable[[str, jax.Array], jax.Array] | None = None
    tells: tuple[str, ...] = ("images",)
    needs_score: bool = False
    needs_public: bool = False
    capacity: DeviceClasses | None = None

    @property
    def broadcasts(self) -> bool:
        """Whether all clients download the same."""
        return self.download is send_global


def keep_memory(outputs: Mapping[str, jax.Array], rows: jax.Array, client: ClientData) -> PyTree:
    """A task without a memory, or one that does not move."""
    return client.memory


@dataclasses.dataclass(frozen=True)
class Labelling:
    """How a task without labels makes its own, from its client's pictures alone, at the start of every local epoch.

    Attributes:
      embed: (arrays, variables, client) -> float32 [points, d], what labels are made from.
      on_host: whether `assign_host` does it between compiled stages, or `assign` inside the one program of a round.
      assign_host: host; (features [points, d], client int, the labels made last, round, epoch) -> labels.
      assign: the same, traced; (features, `ClientData` with the labels made last, round, epoch) -> labels.
      prepare: (arrays, features, labels, client, key) -> Epoch.
      unlabelled: the labels of a client that has made none yet.
      blank: an `Epoch.memory` before the first epoch: same shapes, nothing in it.
      describe: host; (labels of E epochs [E, ...], client int) -> named lists of E numbers for the log.
    """

    embed: Callable[..., jax.Array]
    on_host: bool
    assign_host: Callable[[np.ndarray, int, np.ndarray, int, int], np.ndarray]
    assign: Callable[[jax.Array, ClientData, jax.Array, jax.Array], jax.Array]
    prepare: Callable[..., Epoch]
    unlabelled: PyTree
    blank: PyTree
    describe: Callable[[np.ndarray, int], dict[str, list[Any]]]


class Examined(NamedTuple):
    """Something a model is tested on: its `name`, and the number of the client whose model it is for; None = the
    server's, on data of no client."""

    name: str
    client: int | None


class Public(NamedTuple):
    """Unlabelled images that the server holds: `arrays` what the traced functions read, `images` how many, and
    `represent(arrays, model, rows, train)` -> (features float32 [rows, d], batch-norm statistics) of a shared model."""

    arrays: PyTree
    images: int
    represent: Callable[[PyTree, PyTree, jax.Array, bool], tuple[jax.Array, PyTree]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A learning problem split over clients: data and loss, no federation.

    `arrays` is whatever the traced functions read (uint8 images of all clients, labels, ...); it is passed to them as
    an argument so that it is never baked into a program. `rows` are int32 indices into it.

    Attributes:
      name: for configs and reports.
      arrays: pytree of arrays.
      client_names: one name a client.
      clients: one `ClientData` a client.
      init: key -> a complete variable tree `{"params", "batch_stats"}`, local leaves included.
      inputs: (arrays, rows) -> model inputs as evaluated.
      augment: (key, inputs) -> inputs as trained on.
      forward: (variables, inputs, client, train, key) -> (outputs, new batch_stats); outputs has `embedding` [n, d],
        and `logits` where the task has a classifier.
      loss: (arrays, outputs, rows, client) -> float32 scalar.
      score: (arrays, variables, client) -> float32, higher is better, on validation data only.
      plan: host; (seed, round, client, epochs) -> int32 [epochs, steps, batch] of rows, shapes fixed per client. With
        `labelling` only its shape is read, as an estimate of the work.
      evaluate: host; (variables, test) -> its result, with `metrics`: named floats; a number in `examined`.
      optimizer: optax transformation for a learning rate of 1.
      learning_rate: host; (round, epoch) -> factor on the updates.
      labelling: how labels are made; None where the data has them.
      remember: (outputs, rows, client) -> the client's `memory` after a step.
      validate: host; (variables, client) -> mAP by true identities on validation images, to choose settings on
        development federations; no run uses it. None if there is none.
      stop: (the client's memory) -> bool, whether its epoch ends before the steps are used up; None = never.
      tests: what is tested; empty = one test a client, named like it.
      public: images at the server; None if there are none.
      first_epochs: local epochs of round 0 where they differ; 0 = as in the other rounds.
      ahead: host; entered while plans, int [steps, batch] of each client, are carried out: what reads pictures ahead.
      pictures: what a trained network takes; None where it takes no pictures.
      classes: names of what the classifier tells apart, in its order; empty where the network's answer is an embedding.
    """

    name: str
    arrays: PyTree
    client_names: tuple[str, ...]
    clients: tuple[ClientData, ...]
    init: Callable[[jax.Array], PyTree]
    inputs: Callable[..., jax.Array]
    augment: Callable[[jax.Array, jax.Array], jax.Array]
    forward: Callable[..., tuple[dict[str, jax.Array], PyTree]]
    loss: Callable[..., jax.Array]
    score: Callable[..., jax.Array]
    plan: Callable[[int, int, int, int], np.ndarray]
    evaluate: Callable[[PyTree, int], Any]
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[int, int], float]
    labelling: Labelling | None = None
    remember: Callable[..., PyTree] = keep_memory
    validate: Callable[[PyTree, int], float] | None = None
    stop: Callable[[PyTree], jax.Array] | None = None
    tests: tuple[Examined, ...] = ()
    public: Public | None = None
    first_epochs: int = 0
    ahead: Ahead = nothing_ahead
    pictures: PictureFormat | None = None
    classes: tuple[str, ...] = ()

    @property
    def examined(self) -> tuple[Examined, ...]:
        """Every test, in order."""
        return self.tests or tuple(Examined(name, client) for client, name in enumerate(self.client_names))
