"""A simulated federation in motion: one round of it over the wire format, and its tests before and after.

Every round: encode and decode each download, train the clients in one compiled program, encode and decode each upload,
refuse what is not finite, aggregate in another. What the ledger counts are the lengths of those payloads; what is
trained on are their decoded values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from fedklpr_jax import exchange
from fedklpr_jax.assembly import Federation, participation_count
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.accuracy import Classified
from fedklpr_jax.evaluation.features import Evaluation
from fedklpr_jax.federated import ClientState, Message, ServerState, Upload
from fedklpr_jax.metrics import METRIC_TITLES, Ledger, mean
from fedklpr_jax.pruning import DECISIONS, density
from fedklpr_jax.round import rates, round_inputs, stack_uploads
from fedklpr_jax.trees import PyTree, all_finite, merge, parameter_count, unstack
from fedklpr_jax.wire import WireError

Evaluations = Mapping[str, Evaluation | Classified]


class RunState(NamedTuple):
    """Everything a run continues from: server, one state a client, the ledger, seconds spent."""

    server: ServerState
    clients: list[ClientState]
    ledger: Ledger
    seconds: float


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


def _dense_length(federation: Federation, server: ServerState, upload: Upload, length: int) -> int:
    """What an upload of `length` would measure unpruned: itself, or one of the present global model."""
    if upload.mask is None or all(np.asarray(kept).all() for kept in jax.tree.leaves(upload.mask)):
        return length
    dtype = federation.config.wire.dtype
    return len(exchange.pack(jax.device_get(server.model), None, upload.scalars, None, dtype))


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


def epochs_of(federation: Federation, round_: int) -> int:
    """Local epochs of a round: E, `last.epochs` in a long last round, or what the task wants of the first."""
    config = federation.config
    if config.last.epochs and round_ == config.rounds - 1:
        return config.last.epochs
    return federation.task.first_epochs if federation.task.first_epochs and round_ == 0 else config.epochs


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
    epochs = epochs_of(federation, round_)
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
            if up and name not in ledger.dense_payload:
                dense = _dense_length(federation, server, upload, up)
                ledger = ledger.measured(name, dense, parameter_count(upload.model))
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
        if engine.method.capacity:
            log[name]["capacity"] = engine.method.capacity.share_of(k)
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


def headline(federation: Federation, evaluations: Evaluations, clients: Sequence[ClientState]) -> dict[str, Any]:
    """`{"clients": {name: {rank1, ..., density}}, "mean": {...}}` of one evaluation, a row a test.

    `mean` is over the tests of clients' models; with `accuracy` comes `pooled`, over all their images. Tests of the
    server's model on sites of no client are apart, under `unseen`, in the same form.
    """
    groups: dict[bool, dict[str, dict[str, Any]]] = {False: {}, True: {}}
    for test in federation.task.examined:
        if test.name not in evaluations:
            continue
        size = 1.0 if test.client is None else _density(clients[test.client])
        groups[test.client is None][test.name] = {**evaluations[test.name].metrics, "density": size}
    result = _with_mean(groups[False])
    return result | {"unseen": _with_mean(groups[True])} if groups[True] else result


def _with_mean(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key in (*METRIC_TITLES, "density") if any(key in row for row in rows.values())]
    means = {key: mean([row[key] for row in rows.values()]) for key in keys}
    if "accuracy" in means:
        images = sum(row["images"] for row in rows.values())
        means["pooled"] = sum(row["accuracy"] * row["images"] for row in rows.values()) / images
    return {"clients": rows, "mean": means}


def servers_variables(state: RunState) -> PyTree | None:
    """The server's model with the mean of the clients' local leaves, for data of no client; None if it has no model."""
    if not jax.tree.leaves(state.server.model):
        return None
    local = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *(c.local for c in state.clients))
    return merge(jax.device_get(state.server.model), local)


def evaluate_before(federation: Federation, state: RunState) -> tuple[Evaluations, list[Message], list[int]]:
    """Every client's personalised model on its tests, the download going through the wire.

    Returns the evaluations, and each client's message and payload length: the final download, where it is one.
    """
    task, personalise = federation.task, federation.engine.method.personalise
    delivered = [deliver(federation, state.server, client, k) for k, client in enumerate(state.clients)]
    results: dict[str, Evaluation | Classified] = {}
    for number, test in enumerate(task.examined):
        if test.client is None:
            variables = servers_variables(state)
        else:
            client = state.clients[test.client]
            variables = merge(personalise(delivered[test.client][0], client), client.local)
        if variables is not None:
            results[test.name] = task.evaluate(variables, number)
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


def evaluate_after(federation: Federation, state: RunState, messages: Sequence[Message]) -> Evaluations:
    """The same after E more local epochs under each client's mask, which are not uploaded.

    As many clients at once as take part in a round: the programs then have the shapes of one, and the memory its size.
    """
    config, engine, task = federation.config, federation.engine, federation.task
    round_, together = int(state.server.round), participation_count(len(state.clients), config.participation)
    # At the end the step size of the last rounds that are like the others.
    factors = rates(task, min(round_, max(config.rounds - 1 - bool(config.last.epochs), 0)), config.epochs)
    results: dict[str, Evaluation | Classified] = {}
    for first in range(0, len(state.clients), together):
        # The last few are filled up from the front, or their number would compile anew.
        chosen = [k % len(state.clients) for k in range(first, first + together)]
        inputs = round_inputs(
            engine, [messages[k] for k in chosen], [state.clients[k] for k in chosen], chosen,
            seed=config.seed, round_=round_,
        )  # fmt: skip
        tuned = dict(zip(chosen, unstack(engine.fine_tune(round_, factors, inputs), together), strict=True))
        for number, test in enumerate(task.examined):
            if test.client in tuned and test.name not in results:
                results[test.name] = task.evaluate(tuned[test.client], number)
    return results
