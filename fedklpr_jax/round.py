"""Rounds: client updates as compiled programs (`programs.py`, `submodels.py`), and the server step, one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedklpr_jax import hosts, programs, submodels
from fedklpr_jax.aggregation import masked_mean, mean_of_sums, weighted_sums
from fedklpr_jax.client_maps import (
    CLIENT_MAPS,
    Common,
    choose_client_map,
    client_mesh,
    compiled,
    everywhere,
    make_mapper,
    make_reducer,
)
from fedklpr_jax.client_states import ClientStates
from fedklpr_jax.client_update import ClientUpdate, RoundInputs, Told
from fedklpr_jax.data.stream import nothing_ahead
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import (
    ClientState,
    Message,
    Method,
    ServerContext,
    ServerState,
    Task,
    Upload,
    Uploads,
    average,
)
from fedklpr_jax.robust import Merge
from fedklpr_jax.trees import PyTree, split, stack, unstack


class Engine(NamedTuple):
    """The compiled programs of a federation.

    `epochs` is E; `steps` the longest epoch of any client, to which all plans are padded; `place(server)` the server
    state where every round finds it, on the devices (without it the second round would compile anew);
    `download(server, client) -> Message`; `update(round, rates, inputs [K], watch) -> (uploads, clients, logs)` and
    `fine_tune(round, rates, inputs [K]) -> variables`, both over stacked `RoundInputs`, host or device, with a factor
    on the step size for each epoch; `watch(part)` is entered around the parts of an update that run alone: `embedding`,
    `clustering`, `training`, `pruning`. `aggregate(server, uploads) -> (server, logs)` donates the server state.

    `update_summed(round, rates, inputs, watch) -> (sums, (clients, logs, told))` is there where the server step is
    FedAvg's and the whole client round one program under `map` (None elsewhere): no upload is kept, its terms are
    summed, and `aggregate_sums(server, sums)` is the server step.
    """

    task: Task
    method: Method
    epochs: int
    steps: int
    place: Callable[[ServerState], ServerState]
    download: Callable[[ServerState, Any], Message]
    update: Callable[..., tuple[Upload, ClientState, dict[str, Any]]]
    fine_tune: Callable[[int, np.ndarray, RoundInputs], PyTree]
    aggregate: Callable[[ServerState, Uploads], tuple[ServerState, dict[str, jax.Array]]]
    update_summed: Callable[..., tuple[PyTree, tuple[ClientState, dict[str, Any], Told]]] | None
    aggregate_sums: Callable[[ServerState, PyTree], ServerState]


def make_engine(
    task: Task,
    method: Method,
    *,
    epochs: int,
    client_map: str = "auto",
    chunk: int = 0,
    devices: int = 1,
    clients: int = 0,
    narrow: Sequence[Task] = (),
    merge: Merge = masked_mean,
) -> Engine:
    """Compiles (lazily) the programs of a federation.

    Args:
      task: data and loss.
      method: the federation.
      epochs: local epochs E of a round.
      client_map: one of `CLIENT_MAPS`, or `auto`.
      chunk: with `vmap`, how many clients at once; 0 = all.
      devices: how many devices of each host share the clients at most; 0 = all there are.
      clients: how many clients take part in a round; 0 = all.
      narrow: for a method with a `capacity`, the same task with the network of each class (`capacity.specs`), not
        started from given weights: every client then trains a network of its own class's size. Without them all train
        the whole network under masks, which gives the same numbers.
      merge: what the method's server step merges models with: of the form of `masked_mean`, such as those of
        `robust.py`, and over several devices computed by each of them.

    Raises:
      InputError: a narrow task is not what the method cuts the whole one to, or there are more hosts than work.
    """
    client_map = choose_client_map(client_map, jax.default_backend())
    if client_map not in CLIENT_MAPS:
        raise ValueError(f"client_map: {client_map!r} is not known; it is auto, {', '.join(CLIENT_MAPS)}")
    stages = ClientUpdate(task, method)
    # More devices than clients would only train padding.
    available = min(devices * hosts.count() or len(jax.devices()), len(jax.devices()), clients or len(task.clients))
    if available < hosts.count():
        raise InputError(
            f"config.hosts: {hosts.count()} hosts for {available} clients or devices at a time; give fewer hosts"
        )
    mesh = client_mesh(1 if client_map == "loop" else available)
    # One copy on the devices, made once: without this every call would send all images anew.
    arrays = jax.device_put(task.arrays, everywhere(mesh))
    mapper = make_mapper(client_map, mesh, chunk, arrays, task.client_names)
    staged = client_map == "loop" or (task.labelling is not None and task.labelling.on_host)
    if narrow:
        together = -(-(clients or len(task.clients)) // len(narrow))
        update, fine_tune = submodels.make_programs(
            stages, narrow, mapper, mesh.size, together=together, staged=staged
        )
    else:
        update, fine_tune = (programs.staged if staged else programs.fused)(stages, mapper, mesh.size)
    mean = _sharded_mean(mesh) if merge is masked_mean and mesh.size > 1 else merge
    public = task.public
    images = None if public is None else jax.device_put(public.arrays, everywhere(mesh))

    def server_step(server: ServerState, uploads: Uploads, images: PyTree) -> tuple[ServerState, dict[str, jax.Array]]:
        if public is None:
            return method.aggregate(server, uploads, ServerContext(mean))
        represent = functools.partial(public.represent, images)
        return method.aggregate(server, uploads, ServerContext(mean, represent, public.images))

    step = compiled(server_step, mesh, donate=(0,))
    steps = max(task.plan(0, 0, k, 1).shape[1] for k in range(len(task.clients)))
    # Other merges than the mean need every upload.
    summing = merge is masked_mean and method.aggregate is average
    sums = client_map == "map" and summing and not (narrow or staged)

    def after_sums(server: ServerState, sums: PyTree) -> ServerState:
        return server._replace(model=mean_of_sums(sums, server.model), round=server.round + 1)

    return Engine(
        task, method, epochs, steps, lambda server: jax.device_put(server, everywhere(mesh)),
        compiled(method.download, mesh), _reading_ahead(task, update), _reading_ahead(task, fine_tune),
        lambda server, uploads: step(server, uploads, images),
        _reading_ahead(task, programs.summed(stages, make_reducer(mesh, arrays), mesh.size)) if sums else None,
        compiled(after_sums, mesh, donate=(0,)),
    )  # fmt: skip


def _reading_ahead(task: Task, program: Callable[..., Any]) -> Callable[..., Any]:
    """A program over `RoundInputs`, with the pictures of their plans read ahead where the task does so."""
    if task.ahead is nothing_ahead:
        return program

    def run(round_: int, rates: np.ndarray, inputs: RoundInputs, *rest: Any) -> Any:
        rows = zip(np.asarray(inputs.plan), np.asarray(inputs.steps), strict=True)
        with task.ahead([plan[:, :steps].reshape(-1, plan.shape[-1]) for plan, steps in rows]):
            return program(round_, rates, inputs, *rest)

    return run


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


def first_states(task: Task, method: Method, seed: int) -> tuple[ServerState, ClientState]:
    """The first server state and that of a client, but for the mask of a method with classes of devices; traceable."""
    unlabelled = task.labelling.unlabelled if task.labelling else ()
    return states_of(task.init(jax.random.key(seed)), method, len(task.clients), unlabelled)


def states_of(
    variables: PyTree, method: Method, clients: int, unlabelled: PyTree
) -> tuple[ServerState, ClientState]:
    """The first server state and that of each of so many clients, from a task's first variables and the labels of a
    client that has made none, but for the mask of a method with classes of devices; traceable."""
    model, local = split(variables, method.is_local)
    mask = method.client_mask(model)
    client = ClientState(local, mask, method.client_memory(model, mask), unlabelled)
    return ServerState(model, method.server_memory(model, clients), jnp.int32(0)), client


def start(task: Task, method: Method, seed: int) -> tuple[ServerState, ClientStates]:
    """The first server state and the clients' states; all clients start from the same variables."""
    server, client = first_states(task, method, seed)
    # Its own buffers: the server state is donated, the client states are not.
    server = jax.tree.map(jnp.array, server)
    firsts = [jax.tree.map(np.array, client)]
    if method.capacity:
        mask_of = jax.jit(method.capacity.first_mask)
        masks = [jax.device_get(mask_of(server.model, device)) for device in range(len(method.capacity.shares))]
        firsts = [firsts[0]._replace(mask=mask) for mask in masks]
    return server, ClientStates(len(task.clients), tuple(firsts))


def client_key(seed: Any, round_: Any, client: Any) -> jax.Array:
    """The random key of one client's round: a pure function of (seed, round, client)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), round_), client)


@jax.jit
def _client_keys(seed: jax.Array, round_: jax.Array, clients: jax.Array) -> jax.Array:
    return jax.vmap(client_key, (None, None, 0))(seed, round_, clients)


def rates(task: Task, round_: int, epochs: int) -> np.ndarray:
    """The factors on the step size of a round's epochs, float32 [E]."""
    return np.array([task.learning_rate(round_, epoch) for epoch in range(epochs)], np.float32)


def round_inputs(
    engine: Engine,
    messages: Sequence[Message] | Common,
    states: Sequence[ClientState],
    participants: Sequence[int],
    *,
    seed: int,
    round_: int,
    epochs: int = 0,
) -> RoundInputs:
    """Everything the participants need for a round, stacked; message and state lists follow `participants`.

    `messages` is one `Common` where all download the same. `epochs` is for a round that is longer than the others; 0
    means E.
    """
    task = engine.task
    plans = [task.plan(seed, round_, k, epochs or engine.epochs) for k in participants]
    padded = [np.pad(p, ((0, 0), (0, engine.steps - p.shape[1]), (0, 0))) for p in plans]
    return RoundInputs(
        messages if isinstance(messages, Common) else stack(messages),
        stack(states),
        stack([task.clients[k] for k in participants]),
        np.stack(padded),
        np.array([p.shape[1] for p in plans], np.int32),
        _client_keys(seed, round_, np.array(participants, np.int32)),
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
    engine: Engine, server: ServerState, clients: Sequence[ClientState], *, seed: int
) -> tuple[ServerState, list[ClientState], dict[str, np.ndarray]]:
    """One round with every client taking part, nothing encoded: download, update, aggregate.

    Returns the new server, the new clients, and the server's logs, float32 [K] each.
    """
    everyone = range(len(clients))
    server = engine.place(server)
    round_ = int(server.round)
    messages = [engine.download(server, np.int32(k)) for k in everyone]
    inputs = round_inputs(engine, messages, clients, everyone, seed=seed, round_=round_)
    uploads, states, _ = engine.update(round_, rates(engine.task, round_, engine.epochs), inputs)
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
