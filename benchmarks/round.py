"""What a round costs beside its training steps: prints two Markdown tables.

Run from the repository root, on a machine with nothing else to do:

    python -m benchmarks.round            the default synthetic federation and network
    python -m benchmarks.round --small    two small sites: only shows that everything runs

The first table sets a round (downloads, client updates, server step; nothing encoded, nothing evaluated) against the
sum of its bare steps: one compiled train step (gather, augment, forward, loss, gradient, optimiser), its state donated
and everything on the device, called for the same batches of the same clients one after the other. Round and steps are
measured in turn after two rounds each to compile; the ratio is that of each pair.

The second table takes FedKLPR apart. Each part is compiled alone and called as often as a round calls it, on what a
real round left behind. The gradient of the KL loss and the masking of each step have no row of their own: they are what
the difference of the two rounds holds beside the sum of the parts. Encoding and decoding come on top of a round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._common import Prepare, again, machine, print_header, print_row, timed_in_turn
from fedklpr_jax import exchange, losses, pruning
from fedklpr_jax.assembly import load_sites, make_federation
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.console import Console
from fedklpr_jax.federated import ClientState, Message, ServerState, Task, Upload
from fedklpr_jax.methods import make_method
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.round import Engine, client_key, make_engine, rates, round_inputs, simulate, stack_uploads, start
from fedklpr_jax.tasks import supervised
from fedklpr_jax.trees import merge, unstack

SEED, WARM = 0, 2
SMALL = {
    "data.clients": "arena,harbour", "data.height": 32, "data.width": 16, "data.pad": 2,
    "task.people": 4, "task.shots": 2, "epochs": 1,
}  # fmt: skip
TINY = ModelSpec("tiny", (8, 8), (1, 1), stem="3x3/2")


class Rounds:
    """A federation under way: `server`, `clients`, and `run`, which goes on by one round."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.server, self.clients = start(engine.task, engine.method, SEED)

    def run(self) -> ServerState:
        """One round, as `fedklpr_jax.round` runs it."""
        self.server, self.clients, _ = simulate(self.engine, self.server, self.clients, seed=SEED)
        return self.server


def make_rounds(method: str, small: bool) -> tuple[Any, Rounds]:
    """The default federation of a method on one device, or the small one: its configuration, and its rounds."""
    config = default_config()
    config.method.name = method
    config.devices = 1
    config.task.name = "supervised"
    config = resolved(config)
    if not small:
        return config, Rounds(make_federation(config, Console()).engine)
    config.update_from_flattened_dict(SMALL)
    chosen = make_method(config.method)
    sites, _, _ = load_sites(config)
    task = supervised.make_task(sites, TINY, config, union=not chosen.is_local("params/classifier/kernel"))
    return config, Rounds(make_engine(task, chosen, epochs=config.epochs))


class Training(NamedTuple):
    """What a train step changes."""

    params: Any
    stats: Any
    optimizer: Any


class Work(NamedTuple):
    """A client's steps of one round, on the device: where they start, and for each of them its epoch and place."""

    training: Training
    data: Any
    plan: jax.Array
    key: jax.Array
    steps: list[tuple[jax.Array, jax.Array]]


def bare_step(task: Task) -> Callable[..., tuple[Training, jax.Array]]:
    """One compiled train step of a task: the arithmetic and the random numbers of a round without a method.

    `(training, arrays, data, plan, key, epoch, index, rate) -> (training, loss)`; `training` is donated.
    """

    def step(
        training: Training,
        arrays: Any,
        data: Any,
        plan: jax.Array,
        key: jax.Array,
        epoch: jax.Array,
        index: jax.Array,
        rate: jax.Array,
    ) -> tuple[Training, jax.Array]:
        augment_key, train_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, epoch), index))
        rows = plan[epoch, index]
        images = task.augment(augment_key, task.inputs(arrays, rows))

        def objective(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": training.stats}
            outputs, stats = task.forward(variables, images, data, True, train_key)
            return task.loss(arrays, outputs, rows, data), stats

        (loss, stats), gradients = jax.value_and_grad(objective, has_aux=True)(training.params)
        updates, optimizer = task.optimizer.update(gradients, training.optimizer, training.params)
        params = optax.apply_updates(training.params, jax.tree.map(lambda u: rate * u, updates))
        return Training(params, stats, optimizer), loss

    return jax.jit(step, donate_argnums=0)


def round_work(engine: Engine, server: ServerState, clients: Sequence[ClientState]) -> list[Work]:
    """The steps of the round that comes next, one `Work` a client; nothing in it shares memory with the states."""
    task, round_ = engine.task, int(server.round)
    works = []
    for k, client in enumerate(clients):
        # Through the host: a round leaves its results with a placement that the step would be compiled for once more.
        variables = jax.tree.map(lambda leaf: jnp.array(np.array(leaf)), merge(server.model, client.local))
        plan = task.plan(SEED, round_, k, engine.epochs)
        epochs, steps, _ = plan.shape
        # Padded like a round's, so that the step is compiled once for all clients.
        padded = np.pad(plan, ((0, 0), (0, engine.steps - steps), (0, 0)))
        works.append(
            Work(
                Training(variables["params"], variables["batch_stats"], task.optimizer.init(variables["params"])),
                jax.device_put(task.clients[k]),
                jax.device_put(padded),
                client_key(SEED, round_, k),
                [(jnp.int32(epoch), jnp.int32(index)) for epoch in range(epochs) for index in range(steps)],
            )
        )
    return works


def run_steps(step: Callable, arrays: Any, works: Sequence[Work], rate: jax.Array) -> list[Training]:
    """All steps of all clients, one client after the other; the donated states of `works` are gone afterwards."""
    trained = []
    for work in works:
        training = work.training
        for epoch, index in work.steps:
            training, _ = step(training, arrays, work.data, work.plan, work.key, epoch, index, rate)
        trained.append(jax.block_until_ready(training))
    return trained


def bare_steps(rounds: Rounds) -> Prepare:
    """Makes the bare steps of the round that `rounds` runs next."""
    task = rounds.engine.task
    step, arrays = bare_step(task), jax.device_put(task.arrays)

    def prepare() -> Callable[[], Any]:
        works = round_work(rounds.engine, rounds.server, rounds.clients)
        rate = jnp.float32(task.learning_rate(int(rounds.server.round), 0))
        jax.block_until_ready(works)
        return lambda: run_steps(step, arrays, works, rate)

    return prepare


class Mail(NamedTuple):
    """What crosses the wire in one round of FedKLPR: each client's state before it, its message and its upload."""

    clients: list[ClientState]
    messages: list[Message]
    uploads: list[Upload]


def one_mail(rounds: Rounds) -> Mail:
    """Messages and uploads of the round that `rounds` runs next, as host arrays; the round itself is not completed."""
    engine, everyone = rounds.engine, range(len(rounds.clients))
    round_ = int(rounds.server.round)
    messages = [jax.device_get(engine.download(rounds.server, np.int32(k))) for k in everyone]
    inputs = round_inputs(engine, messages, rounds.clients, everyone, seed=SEED, round_=round_)
    uploads, _, _ = engine.update(round_, rates(engine.task, round_, engine.epochs), inputs)
    return Mail(rounds.clients, messages, unstack(uploads, len(rounds.clients)))


def fedklpr_parts(config: Any, rounds: Rounds, mail: Mail) -> dict[str, Prepare]:
    """FedKLPR's parts inside a round by name, each compiled alone and called as often as a round does."""
    engine = rounds.engine
    task, settings = engine.task, config.method
    arrays = jax.device_put(task.arrays)
    clients = [jax.device_put(data) for data in task.clients]
    models = [jax.device_put(upload.model) for upload in mail.uploads]
    masks = [jax.device_put(upload.mask) for upload in mail.uploads]
    variables = [merge(model, jax.device_put(c.local)) for model, c in zip(models, mail.clients, strict=True)]
    images = [jax.jit(task.inputs)(arrays, task.plan(SEED, 0, k, 1)[0, 0]) for k in range(len(clients))]
    probes = [jax.jit(task.inputs)(arrays, data.probe) for data in clients]
    steps = [engine.epochs * task.plan(SEED, 0, k, 1).shape[1] for k in range(len(clients))]
    uploads = jax.device_put(stack_uploads(mail.uploads, range(len(clients)), [True] * len(clients)))

    forward = jax.jit(lambda v, x, data: task.forward(v, x, data, False, jax.random.key(0))[0]["embedding"])
    score = jax.jit(task.score)
    divergence = jax.jit(lambda a, b: losses.kl_feature_loss(a, b, temperature=settings.kll.temperature))
    prune = jax.jit(
        lambda model, mask: pruning.magnitude_mask(
            model, mask, settings.prune.step, settings.prune.scope, target=settings.prune.target
        )
    )

    def for_clients(one: Callable[[int], Any], times: Sequence[int]) -> Prepare:
        def call() -> None:
            for k in range(len(clients)):
                for _ in range(times[k]):
                    jax.block_until_ready(one(k))

        return again(call)

    def aggregate() -> Callable[[], Any]:
        server = jax.tree.map(jnp.array, rounds.server)
        return lambda: engine.aggregate(server, uploads)

    def probe(k: int) -> jax.Array:
        return divergence(*(forward(variables[k], probes[k], clients[k]) for _ in range(2)))

    once, thrice = [1] * len(clients), [3] * len(clients)
    return {
        "KLL: reference forward, each step": for_clients(lambda k: forward(variables[k], images[k], clients[k]), steps),
        "CRR: three scores a client": for_clients(lambda k: score(arrays, variables[k], clients[k]), thrice),
        "KLAW: two probes and their divergence": for_clients(probe, once),
        "pruning: candidate mask": for_clients(lambda k: prune(models[k], masks[k]), once),
        "server: KLPWA and SAS": aggregate,
    }


def wire_parts(config: Any, mail: Mail) -> dict[str, Prepare]:
    """Encoding and decoding of all downloads and uploads of a round, by name."""
    jobs = [
        (value.model, value.mask, scalars, client.mask)
        for client, message, upload in zip(*mail, strict=True)
        for value, scalars in ((message, {}), (upload, upload.scalars))
    ]
    payloads = [exchange.pack(*job, config.wire.dtype) for job in jobs]

    def encode() -> None:
        for job in jobs:
            exchange.pack(*job, config.wire.dtype)

    def decode() -> None:
        for payload, (model, _, scalars, held) in zip(payloads, jobs, strict=True):
            exchange.unpack(payload, model, scalars, held)

    return {"wire: encoding, both ways": again(encode), "wire: decoding, both ways": again(decode)}


def spread(values: Sequence[float], unit: float = 1.0, digits: int = 2) -> list[str]:
    """Median and min-max as table cells."""
    shown = [value * unit for value in values]
    return [f"{statistics.median(shown):.{digits}f}", f"{min(shown):.{digits}f}-{max(shown):.{digits}f}"]


def overhead_table(federations: Mapping[str, Rounds], pairs: int) -> None:
    """Rounds against their bare steps, a row a method."""
    print_header("method", "clients", "steps", "round s", "min-max", "bare steps s", "min-max", "ratio", "min-max")
    for name, rounds in federations.items():
        prepare = {"round": again(rounds.run), "steps": bare_steps(rounds)}
        timed_in_turn(prepare, WARM)
        seconds = timed_in_turn(prepare, pairs)
        ratios = [a / b for a, b in zip(seconds["round"], seconds["steps"], strict=True)]
        steps = sum(len(work.steps) for work in round_work(rounds.engine, rounds.server, rounds.clients))
        cells = (*spread(seconds["round"], 1, 3), *spread(seconds["steps"], 1, 3), *spread(ratios, 1, 3))
        print_row(name, len(rounds.clients), steps, *cells)


def parts_table(config: Any, ours: Rounds, plain: Rounds, repetitions: int) -> None:
    """FedKLPR's round (`ours`, of `config`) beside FedPAV's (`plain`), and its parts."""
    rounds = {"FedPAV round": again(plain.run), "FedKLPR round": again(ours.run)}
    # A client's first round is never pruned: what the third sends is the first to come under changed masks.
    timed_in_turn(rounds, WARM)
    mail = one_mail(ours)
    inside, around = fedklpr_parts(config, ours, mail), wire_parts(config, mail)
    timed_in_turn({**inside, **around}, WARM)
    seconds = timed_in_turn({**rounds, **inside, **around}, repetitions)
    more = [a - b for a, b in zip(seconds["FedKLPR round"], seconds["FedPAV round"], strict=True)]
    together = [sum(row) for row in zip(*(seconds[name] for name in inside), strict=True)]
    whole = statistics.median(seconds["FedKLPR round"])
    print_header("part", "ms a round", "min-max", "% of a FedKLPR round")
    rows = {**{name: seconds[name] for name in rounds}, "difference of the two": more}
    rows |= {name: seconds[name] for name in inside} | {"these five together": together}
    for name, values in (rows | {name: seconds[name] for name in around}).items():
        print_row(name, *spread(values, 1e3, 1), f"{100 * statistics.median(values) / whole:.1f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, help="measurements of each call (default: 7, small: 1)")
    parser.add_argument("--small", action="store_true", help="two small sites, in seconds; its numbers mean nothing")
    options = parser.parse_args(arguments)
    if options.pairs is not None and options.pairs < 1:
        parser.error("--pairs takes a whole number from 1")
    pairs = options.pairs or (1 if options.small else 7)

    print(f"{machine()}; {'small' if options.small else 'default'} federation, medians of {pairs}\n", flush=True)
    # FedAvg differs from FedPAV in what is shared, not in the code that runs.
    names = ("fedpav",) if options.small else ("fedavg", "fedpav")
    federations = {name: make_rounds(name, options.small)[1] for name in names}
    overhead_table(federations, pairs)
    print()
    parts_table(*make_rounds("fedklpr", options.small), federations["fedpav"], pairs)


if __name__ == "__main__":
    main()
