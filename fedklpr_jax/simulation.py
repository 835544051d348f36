"""A simulated federation: its data, its engine, and one round of it over the wire format.

Every round: encode and decode each download, train the clients in one compiled program, encode and decode each upload,
refuse what is not finite, aggregate in another. What the ledger counts are the lengths of those payloads; what is
trained on are their decoded values.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from fedklpr_jax import exchange
from fedklpr_jax.data import folder, synthetic
from fedklpr_jax.data.site import Site
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.features import Evaluation
from fedklpr_jax.federated import ClientState, Message, ServerState, Task, Upload
from fedklpr_jax.methods import make_method
from fedklpr_jax.metrics import Console, Ledger, mean
from fedklpr_jax.models.spec import make_spec
from fedklpr_jax.pretrain import starting_trunk
from fedklpr_jax.pruning import DECISIONS, density
from fedklpr_jax.round import Engine, make_engine, rates, round_inputs, stack_uploads
from fedklpr_jax.tasks import supervised, unsupervised
from fedklpr_jax.trees import all_finite, merge, parameter_count, unstack
from fedklpr_jax.wire import WireError

HEADLINE = ("rank1", "rank5", "rank10", "map", "minp", "density")


class RunState(NamedTuple):
    """Everything a run continues from: server, one state a client, the ledger, seconds spent."""

    server: ServerState
    clients: list[ClientState]
    ledger: Ledger
    seconds: float


@dataclasses.dataclass(frozen=True)
class Federation:
    """What does not change during a run."""

    config: ml_collections.ConfigDict
    sites: Sequence[Site]
    engine: Engine
    notes: tuple[str, ...]

    @property
    def task(self) -> Task:
        """The engine's task."""
        return self.engine.task


def cache_directory(chosen: str, name: str) -> Path:
    """`chosen`, or a private directory of this user for `name`; made if missing.

    Raises:
      InputError: it cannot be made.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(chosen) if chosen else base / "fedklpr_jax" / name
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(f"{path}: cannot be made as the cache of {name} ({error.strerror}); give another") from error
    return path


def load_sites(config: ml_collections.ConfigDict) -> tuple[list[Site], list[str]]:
    """The clients' pictures, and one note for each folder or picture that was left out.

    Raises:
      InputError: nothing usable where the configuration points.
    """
    data = config.data
    names = [name.strip() for name in data.clients.split(",") if name.strip()]
    size = {"height": data.height, "width": data.width}
    if data.source == "folder":
        cache = cache_directory(data.cache, "images")
        sites, notes = folder.read_sites(Path(data.root), names, cache=cache, **size)
    else:
        specs = {spec.name: spec for spec in synthetic.DEFAULT_SITES}
        for name in names:
            if name not in specs:
                raise InputError(f"config.data.clients: {name!r} is no synthetic site; there are {', '.join(specs)}")
        sites = synthetic.make_sites(data.seed, specs=[specs[name] for name in names] or list(specs.values()), **size)
        notes = []
    for site in sites:
        notes += [f"{site.name}: {line}" for line in site.refused]
        unmatched = len(site.query) - folder.cross_camera_queries(site)
        if unmatched:
            notes.append(f"{site.name}: {unmatched} of {len(site.query)} queries have no second camera; not counted")
    return sites, notes


def make_federation(config: ml_collections.ConfigDict, console: Console) -> Federation:
    """Reads the data and builds task, method and engine for a valid, resolved configuration.

    Where the run starts from weights trained on synthetic sites and there are none yet, they are trained now, which
    `console` shows.

    Raises:
      InputError: bad settings or data.
    """
    sites, notes = load_sites(config)
    spec = make_spec(
        config.model.arch,
        pooling=config.model.pooling,
        embedding_dim=config.model.embedding,
        dropout=config.model.dropout if config.model.embedding else 0.0,
        dtype=config.model.dtype,
        convolution=config.model.convolution,
    )
    method = make_method(config.method)
    if config.task.name == "unsupervised":
        # A name that is no client's is told before the starting weights are trained.
        unsupervised.parse_copies(config.data.copies, [site.name for site in sites])
    trunk = starting_trunk(config, spec, cache_directory("", "weights"), console)
    if config.task.name == "unsupervised":
        task = unsupervised.make_task(sites, spec, config, trunk=trunk)
        same_camera: list[str] = []
    else:
        union = not method.is_local("params/classifier/kernel")
        task = supervised.make_task(sites, spec, config, union=union, trunk=trunk)
        same_camera = [
            name for name, data in zip(task.client_names, task.clients, strict=True) if data.task.same_camera
        ]
    engine = make_engine(
        task,
        method,
        epochs=config.epochs,
        client_map=config.client_map,
        chunk=config.client_chunk,
        devices=config.devices,
        clients=participation_count(len(sites), config.participation),
    )
    notes += [
        f"{name}: under 8 validation images have a match under another camera; same-camera matches count there too"
        for name in same_camera
    ]
    return Federation(config, sites, engine, tuple(notes))


def participation_count(clients: int, share: float) -> int:
    """How many of `clients` take part in a round: their share, rounded, at least one."""
    return max(1, round(share * clients))


def participants(seed: int, round_: int, clients: int, share: float) -> list[int]:
    """Which clients take part in a round: a pure function of seed and round, sorted.

    >>> participants(0, 3, 4, 1.0)
    [0, 1, 2, 3]
    """
    count = participation_count(clients, share)
    chosen = np.random.default_rng((seed, round_)).choice(clients, count, replace=False)
    return sorted(int(k) for k in chosen)


def deliver(federation: Federation, server: ServerState, client: ClientState, index: int) -> tuple[Message, int]:
    """One download through the wire: the message as the client decodes it, and the length of its payload."""
    message = jax.device_get(federation.engine.download(server, np.int32(index)))
    payload = exchange.pack(message.model, message.mask, {}, client.mask, federation.config.wire.dtype)
    model, mask, _ = exchange.unpack(payload, message.model, {}, client.mask)
    return Message(model, mask), len(payload)


def collect(federation: Federation, upload: Upload, client: ClientState) -> tuple[Upload, int, str]:
    """One upload through the wire: as the server decodes it, its length, and why it is refused ("" if it is not).

    `client` is the state before the round: its mask is the one the server holds.
    """
    payload = b""
    try:
        payload = exchange.pack(upload.model, upload.mask, upload.scalars, client.mask, federation.config.wire.dtype)
        decoded = Upload(*exchange.unpack(payload, upload.model, upload.scalars, client.mask))
    except (InputError, WireError) as error:
        return upload, len(payload), str(error)
    if not all_finite((decoded.model, decoded.scalars)):
        return decoded, len(payload), "values that are not finite"
    return decoded, len(payload), ""


class Split:
    """Seconds spent in the parts of a round, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def watch(self, part: str) -> Iterator[None]:
        """Counts the time until it is left for `part`."""
        began = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began


def epochs_of(config: ml_collections.ConfigDict, round_: int) -> int:
    """Local epochs of a round: E, or `last.epochs` in a long last round."""
    return config.last.epochs if config.last.epochs and round_ == config.rounds - 1 else config.epochs


def run_round(federation: Federation, state: RunState) -> tuple[RunState, dict[str, Any]]:
    """One round of the chosen clients; returns the state after it and its event for the log.

    A refused client keeps the state it had, and its upload gets no weight; a round in which all are refused leaves the
    model as it was.
    """
    began, split = time.monotonic(), Split()
    config, engine, task = federation.config, federation.engine, federation.task
    server, clients, ledger = state.server, list(state.clients), state.ledger
    round_ = int(server.round)
    chosen = participants(config.seed, round_, len(clients), config.participation)
    epochs = epochs_of(config, round_)
    with split.watch("wire"):
        delivered = [deliver(federation, server, clients[k], k) for k in chosen]
    inputs = round_inputs(
        engine, [message for message, _ in delivered], [clients[k] for k in chosen], chosen,
        seed=config.seed, round_=round_, epochs=epochs,
    )  # fmt: skip
    outputs = engine.update(round_, rates(task, round_, epochs), inputs, split.watch)
    rows = unstack(outputs, len(chosen))

    uploads, accepted, refused = [], [], []
    log: dict[str, dict[str, Any]] = {}
    for k, (_, down), (upload, after, facts) in zip(chosen, delivered, rows, strict=True):
        name = task.client_names[k]
        with split.watch("wire"):
            decoded, up, reason = collect(federation, upload, clients[k])
        labels, steps = facts.pop("labels", None), facts.pop("steps", None)
        if steps is not None and not steps.any():
            reason = "found no two clusters in any epoch and trained nothing"
        if not reason and not all_finite(after.local):
            reason = "local values that are not finite"
        if down or up:
            ledger = ledger.add(name, down=down, up=up)
        if reason:
            refused.append({"client": name, "reason": reason})
        else:
            clients[k] = after
            # A refused upload says nothing of the dense size: NaN compresses to nearly nothing.
            if up:
                ledger = ledger.measured(name, up, parameter_count(upload.model))
        uploads.append(decoded)
        accepted.append(not reason)
        log[name] = {key: float(value) for key, value in facts.items() if key != "decision"}
        if "decision" in facts:
            log[name]["decision"] = DECISIONS[int(facts["decision"])]
        if labels is not None and steps is not None:
            assert task.labelling
            log[name] |= task.labelling.describe(labels, k) | {"steps": int(steps.sum())}
            # The mean over no batch is no loss.
            if not steps[-1]:
                del log[name]["loss"]
        log[name] |= {"bytes_down": down, "bytes_up": up, "images": int(task.clients[k].images)}
    with split.watch("aggregation"):
        server, weights = jax.block_until_ready(engine.aggregate(server, stack_uploads(uploads, chosen, accepted)))
    for key, values in weights.items():
        for k, value in zip(chosen, np.asarray(values), strict=True):
            log[task.client_names[k]][key] = float(value)
    event = {
        "event": "round",
        "round": round_,
        "seconds": time.monotonic() - began,
        "clients": log,
        "refused": refused,
        "split": split.seconds,
    }
    return state._replace(server=server, clients=clients, ledger=ledger), event


def _density(client: ClientState) -> float:
    return 1.0 if client.mask is None else float(density(client.mask))


def headline(evaluations: dict[str, Evaluation], clients: Sequence[ClientState]) -> dict[str, Any]:
    """`{"clients": {name: {rank1, ..., density, valid_queries}}, "mean": {...}}` of one evaluation."""
    rows = {
        name: {**result.metrics, "density": _density(client)}
        for (name, result), client in zip(evaluations.items(), clients, strict=True)
    }
    return {"clients": rows, "mean": {key: mean([row[key] for row in rows.values()]) for key in HEADLINE}}


def evaluate_before(federation: Federation, state: RunState) -> tuple[dict[str, Evaluation], list[Message], list[int]]:
    """Every client's personalised model on its test images, the download going through the wire.

    Returns the evaluations, and each client's message and payload length: the final download, where it is one.
    """
    task, results = federation.task, {}
    delivered = [deliver(federation, state.server, client, k) for k, client in enumerate(state.clients)]
    for k, ((message, _), client) in enumerate(zip(delivered, state.clients, strict=True)):
        model = federation.engine.method.personalise(message, client)
        results[task.client_names[k]] = task.evaluate(merge(model, client.local), k)
    return results, [message for message, _ in delivered], [length for _, length in delivered]


def validate(federation: Federation, state: RunState, messages: Sequence[Message]) -> dict[str, Any] | None:
    """mAP by true identities of every client's personalised model on its validation images; None without such.

    For choosing settings on development federations: no run reads it.
    """
    task = federation.task
    if task.validate is None:
        return None
    rows = {}
    for k, (message, client) in enumerate(zip(messages, state.clients, strict=True)):
        model = federation.engine.method.personalise(message, client)
        rows[task.client_names[k]] = task.validate(merge(model, client.local), k)
    return {"clients": rows, "mean": mean(list(rows.values()))}


def evaluate_after(federation: Federation, state: RunState, messages: Sequence[Message]) -> dict[str, Evaluation]:
    """The same after E more local epochs under each client's mask, which are not uploaded."""
    config, task = federation.config, federation.task
    everyone = range(len(state.clients))
    inputs = round_inputs(
        federation.engine, messages, state.clients, everyone, seed=config.seed, round_=config.rounds
    )
    # The step size of the last rounds that are like the others.
    factors = rates(task, max(config.rounds - 1 - bool(config.last.epochs), 0), config.epochs)
    tuned = unstack(federation.engine.fine_tune(config.rounds, factors, inputs), len(state.clients))
    return {task.client_names[k]: task.evaluate(tuned[k], k) for k in everyone}
