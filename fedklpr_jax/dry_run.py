"""What a run would be, before it is one: `--config.dry_run=True` tells it and writes nothing.

Counted are clients, parameters, steps and bytes; operations are XLA's count of the lowered, not compiled, step. Time
and memory follow from them by rules of thumb; docs/performance.md holds them against the one run that was measured.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax.assembly import Federation, participation_count
from fedklpr_jax.client_maps import choose_client_map
from fedklpr_jax.client_update import ClientUpdate, Found, RoundInputs
from fedklpr_jax.federated import ClientData, ClientState, Message, ServerState
from fedklpr_jax.round import first_states
from fedklpr_jax.trees import PyTree, parameter_count

# How many times the time of its operations at the rate of a large matrix product a step takes: ResNets at best (1.4 to
# 2 in docs/performance.md), and the default's thin network with clustering, evaluation and wire format (5).
SLOWNESS = (1.5, 6.0)
# What a process holds beside arrays, most of it while it compiles: such that the default job comes to its 2.3 GiB.
_PROCESS = 2.3e9
# A forward pass has about a third of the operations of a training step.
_FORWARD = 1 / 3


class Expected(NamedTuple):
    """What a run is expected to be.

    Attributes:
      parameters: values of the whole model, batch-norm statistics included.
      shared: those that travel, unpruned.
      participants: clients a round.
      steps: training steps of the whole run, all clients.
      flops: floating-point operations of one of them.
      tested: images that all tests of the run look at.
      batch: images in a step.
      bytes_sent: of all payloads, unpruned and uncompressed, float32.
      activations: bytes kept of a step's forward pass for its backward pass.
      memory: bytes that the process may need.
    """

    parameters: int
    shared: int
    participants: int
    steps: int
    flops: float
    tested: int
    batch: int
    bytes_sent: int
    activations: int
    memory: float

    def seconds(self, rate: float) -> tuple[float, float]:
        """Between how many seconds the run may take at `rate` operations a second, compilation left out."""
        operations = self.steps * self.flops + self.tested * self.flops * _FORWARD / self.batch
        return SLOWNESS[0] * operations / rate, SLOWNESS[1] * operations / rate


def expected(federation: Federation) -> Expected:
    """What the run of a federation is expected to be; compiles nothing."""
    config, task, method = federation.config, federation.task, federation.engine.method
    clients = len(task.clients)
    participants = participation_count(clients, config.participation)
    plans = [task.plan(config.seed, 0, client, 1).shape[1:] for client in range(clients)]
    epochs = config.rounds * config.epochs
    if config.last.epochs:
        epochs += config.last.epochs - config.epochs
    a_client = float(np.mean([steps for steps, _ in plans]))
    # One test at the start, before and after at the end; for a test after local training all clients train.
    midway = (config.rounds - 1) // config.eval.every
    tests = 3 + midway * (1 + config.eval.after)
    fine_tunings = 1 + midway * config.eval.after
    steps = round(a_client * (epochs * participants + fine_tunings * config.epochs * clients))
    server, state = jax.eval_shape(functools.partial(first_states, task, method, config.seed))
    if method.capacity:
        mask = jax.eval_shape(method.capacity.first_mask, server.model, np.int32(0))
        state = state._replace(mask=mask)
    shared = parameter_count(server.model)
    parameters = parameter_count(jax.eval_shape(task.init, jax.random.key(0)))
    flops, activations = _step(federation, server, state)
    together = 1
    if choose_client_map(config.client_map, jax.default_backend()) in ("vmap", "pmap"):
        together = min(participants, config.client_chunk or participants)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(task.arrays))
    # Of the model in float32: gradient, both moments of Adam, received and trained form at every client that trains; an
    # upload, a download and a state of every participant; the server's own and its sum.
    models = 4.0 * parameters * (5 * together + 3 * participants + 2)
    return Expected(
        parameters, shared, participants, steps, flops, tests * _tested(federation), plans[0][1],
        4 * shared * (2 * participants * config.rounds + clients), activations,
        _PROCESS + arrays + models + 2.0 * activations * together,
    )  # fmt: skip


def _tested(federation: Federation) -> int:
    """Images of one test of everything."""
    dealt = sum(len(share.test) for share in federation.dealt.shares) if federation.dealt else 0
    return dealt + sum(len(site.query) + len(site.gallery) for site in federation.exams)


def _step(federation: Federation, server: ServerState, state: ClientState) -> tuple[float, int]:
    """Operations of a training step of the whole network, and bytes that its backward pass finds kept."""
    task, method, labelling = federation.task, federation.engine.method, federation.task.labelling
    update = ClientUpdate(task, method)
    plan = jax.ShapeDtypeStruct(task.plan(0, 0, 0, 1).shape, jnp.int32)
    number, factor = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    message: Message = jax.eval_shape(method.download, server, number)
    inputs = RoundInputs(message, state, task.clients[0], plan, number, key)

    def epoch(arrays: PyTree, round_: Any, rate: Any, number: Any, inputs: RoundInputs, labels: PyTree) -> PyTree:
        training = update.begin(arrays, round_, inputs)
        found = Found(update.embed(arrays, inputs, training), labels) if labelling else None
        return update.train_epoch(arrays, round_, rate, number, inputs, training, found)

    def begin(arrays: PyTree, round_: Any, inputs: RoundInputs) -> PyTree:
        training = update.begin(arrays, round_, inputs)
        return update.embed(arrays, inputs, training) if labelling else training

    labels = labelling.unlabelled if labelling else ()
    # The loops of both have unknown lengths, which XLA counts as one turn: what is left between them is one step.
    whole = _operations(jax.jit(epoch).lower(task.arrays, number, factor, number, inputs, labels))
    before = _operations(jax.jit(begin).lower(task.arrays, number, inputs))
    return whole - before, _kept(federation, plan.shape[-1])


def _operations(program: jax.stages.Lowered) -> float:
    return float((program.cost_analysis() or {}).get("flops", 0.0))


def _kept(federation: Federation, batch: int) -> int:
    """Bytes of a forward pass that the backward pass reads."""
    task = federation.task
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    client = task.clients[0]
    if task.labelling:
        client = client._replace(memory=task.labelling.blank)
    variables = jax.eval_shape(task.init, jax.random.key(0))

    def residuals(arrays: PyTree, variables: PyTree, rows: Any, client: ClientData, key: Any) -> PyTree:
        images = task.inputs(arrays, rows)

        def embedded(params: PyTree) -> jax.Array:
            return task.forward(variables | {"params": params}, images, client, True, key)[0]["embedding"]

        return jax.vjp(embedded, variables["params"])[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    kept = jax.eval_shape(residuals, task.arrays, variables, rows, client, key)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def matmul_rate(seconds: float = 0.5) -> float:
    """Operations a second that a large matrix product in float32 reaches here, at its best within so many seconds."""
    size = 1024
    product = jax.jit(lambda a: a @ a)
    a = jnp.full((size, size), 1.0 / size)
    product(a).block_until_ready()
    best, ends = math.inf, time.monotonic() + seconds
    while time.monotonic() < ends:
        began = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def told(federation: Federation, rate: float) -> list[str]:
    """The lines that a dry run shows, for devices of that rate."""
    config, found = federation.config, expected(federation)
    clients = len(federation.task.clients)
    least, most = found.seconds(rate * jax.device_count())
    return [
        f"{found.participants} of {clients} clients a round, {config.rounds} rounds of {config.epochs} local epochs: "
        f"{found.steps:,} steps of {found.batch} images",
        f"model: {found.parameters:,} parameters, of which {found.shared:,} travel",
        f"bytes: at most {found.bytes_sent / 1e6:,.1f} MB in all, before pruning and compression",
        f"operations: {found.flops / 1e9:,.2f} GFLOP a step, {found.steps * found.flops / 1e12:,.2f} TFLOP in all; "
        f"here {rate / 1e9:,.0f} GFLOP/s",
        f"time: about {duration(least)} to {duration(most)}, compilation left out",
        f"memory: about {found.memory / 1e9:.1f} GB",
    ]


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(40), duration(200), duration(9000)
    ('40 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
