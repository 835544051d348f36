"""Rounds: client updates mapped over simulated clients and devices, and the server step, each one compiled program.

How clients are mapped (`client_map`):

* `map`: one client after the other inside one program; each runs exactly its own number of steps. The default.
* `vmap`: all at once, or `chunk` at a time; a shorter client's extra steps change nothing. For small models on a GPU.
* `pmap`: like `map` on every device, through `jax.pmap`, for those who ask for it.
* `loop`: no program over clients; the stages are compiled for one client and errors name stage and client.

`map` and `vmap` run under a mesh with the axis `clients`: each device takes its share of the participants, padded to a
multiple of the devices with clients of no steps whose results are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedklpr_jax.aggregation import masked_mean, mean_of_sums, weighted_sums
from fedklpr_jax.client_update import ClientUpdate, RoundInputs
from fedklpr_jax.federated import ClientState, Message, Method, ServerState, Task, Upload, Uploads
from fedklpr_jax.trees import PyTree, split, stack, unstack

CLIENT_MAPS = ("map", "vmap", "pmap", "loop")
Result = list[tuple[Upload, ClientState, dict[str, Any]]]


class StageError(RuntimeError):
    """A stage failed for one client; only `client_map=loop` can say which."""


class Engine(NamedTuple):
    """The compiled programs of a federation.

    `epochs` is E; `steps` the longest epoch of any client, to which all plans are padded; `download(server, client) ->
    Message`; `update(round, learning_rate, inputs [K]) -> (uploads, clients, logs)` and `fine_tune(round,
    learning_rate, inputs [K]) -> variables`, both over stacked `RoundInputs`, host or device; `aggregate(server,
    uploads) -> (server, logs)` donates the server state.
    """

    task: Task
    method: Method
    epochs: int
    steps: int
    download: Callable[[ServerState, Any], Message]
    update: Callable[[int, float, RoundInputs], tuple[Upload, ClientState, dict[str, jax.Array]]]
    fine_tune: Callable[[int, float, RoundInputs], PyTree]
    aggregate: Callable[[ServerState, Uploads], tuple[ServerState, dict[str, jax.Array]]]


def client_mesh(devices: int) -> Mesh:
    """A mesh with the one axis `clients` over the first `devices` devices."""
    chosen = jax.devices()[:devices]
    return jax.make_mesh((len(chosen),), ("clients",), axis_types=(AxisType.Auto,), devices=chosen)


def make_engine(
    task: Task,
    method: Method,
    *,
    epochs: int,
    client_map: str = "map",
    chunk: int = 0,
    devices: int = 1,
    clients: int = 0,
) -> Engine:
    """Compiles (lazily) the programs of a federation.

    Args:
      task: data and loss.
      method: the federation.
      epochs: local epochs E of a round.
      client_map: one of `CLIENT_MAPS`.
      chunk: with `vmap`, how many clients at once; 0 = all.
      devices: how many devices share the clients at most; 0 = all there are.
      clients: how many clients take part in a round; 0 = all.
    """
    if client_map not in CLIENT_MAPS:
        raise ValueError(f"client_map: {client_map!r} is not known; it is one of {', '.join(CLIENT_MAPS)}")
    stages = ClientUpdate(task, method)
    # More devices than clients would only train padding.
    available = min(devices or len(jax.devices()), len(jax.devices()), clients or len(task.clients))
    mesh = client_mesh(1 if client_map == "loop" else available)
    # One copy on the devices, made once: without this every call would send all images anew.
    arrays = jax.device_put(task.arrays, NamedSharding(mesh, P()))
    update: Callable
    if client_map == "loop":
        update, fine_tune = _looped(stages, arrays)
    else:
        mapped = {"map": _over_devices, "vmap": _over_devices, "pmap": _with_pmap}[client_map]
        update = mapped(stages.update, arrays, mesh, client_map, chunk)
        fine_tune = mapped(stages.fine_tune, arrays, mesh, client_map, chunk)
    mean = masked_mean if mesh.size == 1 else _sharded_mean(mesh)
    server_step = jax.jit(lambda server, uploads: method.aggregate(server, uploads, mean), donate_argnums=0)
    steps = max(task.plan(0, 0, k, 1).shape[1] for k in range(len(task.clients)))
    return Engine(task, method, epochs, steps, jax.jit(method.download), update, fine_tune, server_step)


def _map_clients(stage: Callable, client_map: str, chunk: int) -> Callable:
    """`stage(arrays, round, learning_rate, inputs)` over the leading axis of `inputs`, inside one program."""

    def mapped(arrays: PyTree, round_: jax.Array, learning_rate: jax.Array, inputs: RoundInputs) -> PyTree:
        def one(row: RoundInputs) -> PyTree:
            return stage(arrays, round_, learning_rate, row)

        if client_map == "vmap":
            return jax.lax.map(one, inputs, batch_size=chunk) if chunk else jax.vmap(one)(inputs)
        return jax.lax.map(one, inputs)

    return mapped


def balanced(steps: Sequence[int] | np.ndarray, devices: int) -> np.ndarray:
    """Which client runs where: int [devices, clients per device], -1 for an empty place.

    Longest first onto the least loaded device with a free place: sites are of unequal size, and a round takes as long
    as its busiest device.

    >>> balanced([9, 1, 2, 6], 2).tolist()
    [[0, 1], [3, 2]]
    """
    places = -(-len(steps) // devices)
    rows: list[list[int]] = [[] for _ in range(devices)]
    for client in np.argsort(-np.asarray(steps), kind="stable"):
        free = [row for row in rows if len(row) < places]
        min(free, key=lambda row: sum(steps[k] for k in row)).append(int(client))
    return np.array([row + [-1] * (places - len(row)) for row in rows])


def _padded(function: Callable, devices: int) -> Callable:
    """Spreads clients over `devices`; empty places are filled with a client of no steps, whose results are dropped."""

    def call(round_: int, learning_rate: float, inputs: RoundInputs) -> PyTree:
        if devices == 1:
            return function(np.int32(round_), np.float32(learning_rate), inputs)
        count = len(inputs.steps)
        rows = balanced(np.asarray(inputs.steps), devices).ravel()
        spread = jax.tree.map(lambda leaf: leaf[np.maximum(rows, 0)], inputs)
        spread = spread._replace(steps=np.where(rows >= 0, spread.steps, 0).astype(np.int32))
        out = function(np.int32(round_), np.float32(learning_rate), spread)
        back = np.array([int(np.flatnonzero(rows == k)[0]) for k in range(count)])
        return jax.tree.map(lambda leaf: leaf[back], out)

    return call


def _over_devices(stage: Callable, arrays: PyTree, mesh: Mesh, client_map: str, chunk: int) -> Callable:
    body = _map_clients(stage, client_map, chunk)
    if mesh.size > 1:
        body = jax.shard_map(
            body, mesh=mesh, in_specs=(P(), P(), P(), P("clients")), out_specs=P("clients"), check_vma=False
        )
    program = jax.jit(body)
    return _padded(lambda round_, rate, inputs: program(arrays, round_, rate, inputs), mesh.size)


def _with_pmap(stage: Callable, arrays: PyTree, mesh: Mesh, client_map: str, chunk: int) -> Callable:
    size = mesh.size
    program = jax.pmap(
        _map_clients(stage, "map", 0), in_axes=(None, None, None, 0), devices=list(mesh.devices.flat)
    )

    def call(round_: np.int32, learning_rate: np.float32, inputs: RoundInputs) -> PyTree:
        folded = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), inputs)
        out = program(arrays, round_, learning_rate, folded)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)

    return _padded(call, size)


def _looped(stages: ClientUpdate, arrays: PyTree) -> tuple[Callable, Callable]:
    begin, train_epoch, finish = jax.jit(stages.begin), jax.jit(stages.train_epoch), jax.jit(stages.finish)
    personalise = stages.method.personalise
    start = jax.jit(lambda inputs: stages.start(personalise(inputs.message, inputs.client), inputs.client))

    def run(name: str, inputs: RoundInputs, stage: Callable, *args: Any) -> Any:
        try:
            return jax.block_until_ready(stage(*args))
        except Exception as error:
            client = stages.task.client_names[int(inputs.data.index)]
            raise StageError(f"client {client}, stage {name}: {error}") from error

    def epochs(round_: np.int32, rate: np.float32, inputs: RoundInputs, training: PyTree) -> PyTree:
        for epoch in range(inputs.plan.shape[0]):
            training = run(
                "train_epoch", inputs, train_epoch, arrays, round_, rate, inputs, training, np.int32(epoch)
            )
        return training

    def update_one(round_: np.int32, rate: np.float32, inputs: RoundInputs) -> PyTree:
        training = run("begin", inputs, begin, arrays, round_, inputs)
        training = epochs(round_, rate, inputs, training)
        return run("finish", inputs, finish, arrays, round_, inputs, training)

    def fine_tune_one(round_: np.int32, rate: np.float32, inputs: RoundInputs) -> PyTree:
        return epochs(round_, rate, inputs, run("start", inputs, start, inputs)).variables

    def each(function: Callable) -> Callable:
        def call(round_: int, rate: float, inputs: RoundInputs) -> PyTree:
            rows = [jax.tree.map(lambda leaf, k=k: leaf[k], inputs) for k in range(len(inputs.steps))]
            return stack([function(np.int32(round_), np.float32(rate), row) for row in rows])

        return call

    return each(update_one), each(fine_tune_one)


def _sharded_mean(mesh: Mesh) -> Callable[..., PyTree]:
    """`masked_mean` whose sums over clients run on each device over its own clients and meet once, in a psum."""

    def mean(params: PyTree, masks: PyTree | None, weights: jax.Array, previous: PyTree) -> PyTree:
        missing = -weights.shape[0] % mesh.size

        def pad(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), tree)

        sums = jax.shard_map(
            lambda *args: jax.lax.psum(weighted_sums(*args), "clients"),
            mesh=mesh,
            in_specs=P("clients"),
            out_specs=P(),
            check_vma=False,
        )
        return mean_of_sums(sums(pad(params), pad(masks), pad(weights)), previous)

    return mean


def start(task: Task, method: Method, seed: int) -> tuple[ServerState, list[ClientState]]:
    """The first server state and one state a client; all clients start from the same variables."""
    variables = task.init(jax.random.key(seed))
    model, local = split(variables, method.is_local)
    mask = method.client_mask(model)
    client = ClientState(local, mask, method.client_memory(model, mask))
    server = ServerState(model, method.server_memory(model, len(task.clients)), jnp.int32(0))
    # Each its own buffers: the server state is donated, the client states are not.
    server = jax.tree.map(jnp.array, server)
    return server, [jax.tree.map(np.array, client) for _ in task.clients]


def client_key(seed: int, round_: int, client: int) -> jax.Array:
    """The random key of one client's round: a pure function of (seed, round, client)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), round_), client)


def round_inputs(
    engine: Engine,
    messages: Sequence[Message],
    states: Sequence[ClientState],
    participants: Sequence[int],
    *,
    seed: int,
    round_: int,
) -> RoundInputs:
    """Everything the participants need for a round, stacked; message and state lists follow `participants`."""
    task = engine.task
    plans = [task.plan(seed, round_, k, engine.epochs) for k in participants]
    padded = [np.pad(p, ((0, 0), (0, engine.steps - p.shape[1]), (0, 0))) for p in plans]
    return RoundInputs(
        stack(messages),
        stack(states),
        stack([task.clients[k] for k in participants]),
        np.stack(padded),
        np.array([p.shape[1] for p in plans], np.int32),
        jnp.stack([client_key(seed, round_, k) for k in participants]),
    )


def stack_uploads(uploads: Sequence[Upload], participants: Sequence[int], accepted: Sequence[bool]) -> Uploads:
    """Uploads of several clients as the server step takes them."""
    together = stack(uploads)
    return Uploads(
        together.model,
        together.mask,
        together.scalars,
        np.array(participants, np.int32),
        np.array(accepted, bool),
    )


def simulate(
    engine: Engine, server: ServerState, clients: list[ClientState], *, seed: int
) -> tuple[ServerState, list[ClientState], dict[str, np.ndarray]]:
    """One round with every client taking part, nothing encoded: download, update, aggregate.

    Returns the new server, the new clients, and the server's logs, float32 [K] each.
    """
    everyone = range(len(clients))
    round_ = int(server.round)
    messages = [engine.download(server, np.int32(k)) for k in everyone]
    inputs = round_inputs(engine, messages, clients, everyone, seed=seed, round_=round_)
    uploads, states, _ = engine.update(round_, engine.task.learning_rate(round_), inputs)
    server, logs = engine.aggregate(
        server,
        Uploads(
            uploads.model,
            uploads.mask,
            uploads.scalars,
            np.arange(len(clients), dtype=np.int32),
            np.ones(len(clients), bool),
        ),
    )
    return server, unstack(states, len(clients)), jax.tree.map(np.asarray, logs)
