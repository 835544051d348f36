"""A simulated federation in motion: one round of it over the wire format, and its tests before and after.

Every round: bring each client its download, train the clients in one compiled program, bring back the uploads, refuse
what is not finite, aggregate in another. Messages go through the wire format (`transport.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax import aggregation
from fedklpr_jax.assembly import Federation, participation_count
from fedklpr_jax.client_maps import Common
from fedklpr_jax.client_states import ClientStates
from fedklpr_jax.client_update import RoundInputs
from fedklpr_jax.compilations import programs_made
from fedklpr_jax.evaluation.accuracy import Classified
from fedklpr_jax.evaluation.features import Evaluation
from fedklpr_jax.federated import ClientState, ServerState, Task
from fedklpr_jax.metrics import METRIC_TITLES, Ledger, mean
from fedklpr_jax.pruning import DECISIONS, density
from fedklpr_jax.round import Engine, rates, round_inputs
from fedklpr_jax.transport import Collected, Delivered, Direct, Encoded, Measured, make_transport, measured
from fedklpr_jax.trees import PyTree, all_finite, merge, parameter_count, unstack


class Reported(NamedTuple):
    """A test of which only the numbers are known here."""

    metrics: Mapping[str, float]


LOCAL_NOT_FINITE = "local values that are not finite"

Evaluations = dict[str, Evaluation | Classified | Reported]


class RunState(NamedTuple):
    """Everything a run continues from: server, the clients' states, the ledger, seconds spent."""

    server: ServerState
    clients: ClientStates
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


class Split:
    """Seconds spent in the parts of a round, by name, and what was done from the beginning on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began, self._made = time.monotonic(), programs_made()

    def whole(self) -> dict[str, Any]:
        """For the log: `seconds` and `programs` made since the beginning, and the parts as `split`."""
        return {
            "seconds": time.monotonic() - self._began,
            "programs": programs_made() - self._made,
            "split": self.seconds,
        }

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


class Played(NamedTuple):
    """The clients' side of a round, a row a participant: its state `after`, its `entries` for the log, the bytes `down`
    and `up` (None: no message), and why its upload is refused ("" = it is not); `dense(place)`, the bytes that an
    upload would have had unpruned, and `merge(accepted [K])`, the server step."""

    after: Sequence[ClientState]
    entries: Sequence[dict[str, Any]]
    down: Sequence[int | None]
    up: Sequence[int | None]
    reasons: Sequence[str]
    dense: Callable[[int], int]
    merge: Callable[[np.ndarray], tuple[ServerState, dict[str, Any]]]


def described(task: Task, client: int, facts: dict[str, Any], after: ClientState) -> tuple[dict[str, Any], str]:
    """What the log says of a client's round, and whether its upload is refused for it, as a reason ("" = it is not).

    Args:
      task: the federation's.
      client: its number.
      facts: what the update told of it, as arrays.
      after: its state after the round.
    """
    labels, steps = facts.get("labels"), facts.get("steps")
    entry: dict[str, Any] = {
        key: float(value) for key, value in facts.items() if key not in ("decision", "labels", "steps")
    }
    if "decision" in facts:
        entry["decision"] = DECISIONS[int(facts["decision"])]
    reason = "" if all_finite(after.local) else LOCAL_NOT_FINITE
    if labels is not None and steps is not None:
        assert task.labelling
        entry |= task.labelling.describe(labels, client) | {"steps": int(steps.sum())}
        # The mean over no batch is no loss.
        if not steps[-1]:
            del entry["loss"]
        if not steps.any():
            reason = "found no two clusters in any epoch and trained nothing"
    return entry, reason


def first_of(own: str, reason: str) -> str:
    """Of a client's own reason against its upload and the server's the one to tell, "" where there is neither: what
    makes a model's values infinite often makes local ones so too."""
    return reason if own == LOCAL_NOT_FINITE and reason else own or reason


Work = tuple[int, np.ndarray, RoundInputs]
# The participants' states after training, what the update tells of each, their uploads, and the server step.
Trained = tuple[list[ClientState], list[dict[str, Any]], Collected | Measured, Callable[..., Any]]


def _by_uploads(
    transport: Encoded | Direct,
    server: ServerState,
    states: Sequence[ClientState],
    chosen: Sequence[int],
    work: Work,
    split: Split,
) -> Trained:
    """Every upload goes to the server, which merges them."""
    engine = transport.engine
    uploads, after, facts = engine.update(*work, split.watch)
    with split.watch("wire"):
        collected = transport.uploads(server, uploads, states, chosen)

    def merge(accepted: np.ndarray) -> tuple[ServerState, dict[str, Any]]:
        return engine.aggregate(server, collected.uploads._replace(accepted=accepted))

    return unstack(after, len(chosen)), unstack(facts, len(chosen)), collected, merge


def _summed(
    engine: Engine, server: ServerState, chosen: Sequence[int], work: Work, split: Split
) -> Trained:
    """The same for FedAvg's mean: uploads are summed where they are made, and none is kept."""
    assert engine.update_summed
    sums, rest = engine.update_summed(*work, split.watch)
    after, facts, told = jax.device_get(rest)

    def merge(accepted: np.ndarray) -> tuple[ServerState, dict[str, Any]]:
        weights = aggregation.image_weights(jnp.asarray(told.scalars["images"]), jnp.asarray(accepted))
        return engine.aggregate_sums(server, sums), {"weight": weights}

    count = len(chosen)
    return unstack(after, count), unstack(facts, count), measured(engine, server, told, chosen), merge


def run_round(federation: Federation, state: RunState) -> tuple[RunState, dict[str, Any]]:
    """One round of the chosen clients; returns the state after it and its event for the log."""
    split = Split()
    config, engine, task = federation.config, federation.engine, federation.task
    server = engine.place(state.server)
    round_ = int(server.round)
    chosen = participants(config.seed, round_, len(state.clients), config.participation)
    states = [state.clients[k] for k in chosen]
    epochs = epochs_of(federation, round_)
    transport = make_transport(engine, config.wire)
    with split.watch("wire"):
        delivered = transport.downloads(server, states, chosen)
    inputs = round_inputs(
        engine, delivered.messages, states, chosen, seed=config.seed, round_=round_, epochs=epochs
    )
    work = (round_, rates(task, round_, epochs), inputs)
    if isinstance(transport, Direct) and engine.update_summed:
        trained = _summed(engine, server, chosen, work, split)
    else:
        trained = _by_uploads(transport, server, states, chosen, work, split)
    after, facts, collected, merge = trained
    rows = [described(task, *row) for row in zip(chosen, facts, after, strict=True)]
    reasons = [first_of(own, reason) for (_, own), reason in zip(rows, collected.reasons, strict=True)]
    entries = [entry for entry, _ in rows]
    # What a method without shared leaves sends is no message.
    down, up = ([length or None for length in lengths] for lengths in (delivered.lengths, collected.lengths))
    played = Played(after, entries, down, up, reasons, collected.dense, merge)
    return settled(federation, state._replace(server=server), chosen, played, split)


def settled(
    federation: Federation, state: RunState, chosen: Sequence[int], played: Played, split: Split
) -> tuple[RunState, dict[str, Any]]:
    """The end of a round: the server step, the ledger, and the event for the log.

    A refused client keeps the state it had, and its upload gets no weight; a round in which all are refused leaves the
    model as it was. `state` is the one before, its server where the server step takes it.
    """
    engine, task, ledger, round_ = federation.engine, federation.task, state.ledger, int(state.server.round)
    refused: list[dict[str, str]] = []
    log: dict[str, dict[str, Any]] = {}
    kept, sent, dense = {}, {}, {}
    for place, k in enumerate(chosen):
        name, down, up, reason = task.client_names[k], played.down[place], played.up[place], played.reasons[place]
        if down or up:
            sent[name] = (down, up)
        if reason:
            refused.append({"client": name, "reason": reason})
        else:
            kept[k] = played.after[place]
            # A refused upload says nothing of the dense size: NaN compresses to nearly nothing.
            if up and name not in ledger.dense_payload:
                dense[name] = played.dense(place)
        log[name] = played.entries[place] | {
            "bytes_down": down or 0, "bytes_up": up or 0, "images": int(task.clients[k].images),
        }  # fmt: skip
        if engine.method.capacity:
            log[name]["capacity"] = engine.method.capacity.share_of(k)
    ledger = ledger.add(sent).measured(dense, parameter_count(state.server.model))
    with split.watch("aggregation"):
        server, weights = jax.block_until_ready(played.merge(np.array([k in kept for k in chosen])))
    for key, values in weights.items():
        for k, value in zip(chosen, np.asarray(values), strict=True):
            log[task.client_names[k]][key] = float(value)
    event = {"event": "round", "round": round_, "clients": log, "refused": refused, **split.whole()}
    return state._replace(server=server, clients=state.clients.after(round_, kept), ledger=ledger), event


class Examination(NamedTuple):
    """What an examination in some `stages` found: of each stage `before` and `after` its results by the name of the
    test, of `validation` what `validate` of the task says of each client by name; and of each client the bytes of its
    download and the density of its model. `sent` are those of the downloads that crossed a wire for it: none in a
    simulation. `diverged` are the clients whose fine-tuning gave values that are not finite: `after` tests their
    download once more."""

    stages: tuple[str, ...]
    results: dict[str, Evaluations]
    validation: dict[str, float]
    lengths: list[int]
    densities: list[float]
    sent: list[int]
    diverged: list[str]

    @classmethod
    def of(cls, stages: Sequence[str]) -> Examination:
        """One that has found nothing yet."""
        return cls(tuple(stages), {stage: {} for stage in stages if stage != "validation"}, {}, [], [], [], [])


def examine(federation: Federation, state: RunState, *stages: str) -> Examination:
    """Tests every client's personalised model, the download going through the wire.

    As many clients at a time as take part in a round: the programs then have the shapes of one, and the memory its
    size.

    Args:
      federation: the federation.
      state: after a round.
      stages: some of `before`: the model as it arrives; `after`: after E more local epochs under the client's mask,
        which are not uploaded; `validation`: as it arrives, on validation images by true identities, where the task
        knows them; for choosing settings on development federations, and read by no run.
    """
    config, engine = federation.config, federation.engine
    count, together = len(state.clients), participation_count(len(state.clients), config.participation)
    transport = make_transport(engine, config.wire)
    found = Examination.of(stages)
    for first in range(0, count, together):
        chosen = list(range(first, min(first + together, count)))
        states = [state.clients[k] for k in chosen]
        delivered = transport.downloads(state.server, states, chosen)
        examine_some(federation, int(state.server.round), chosen, states, delivered, together, found)
    unseen = [number for number, test in enumerate(federation.task.examined) if test.client is None]
    if "before" in stages and unseen and jax.tree.leaves(state.server.model):
        variables = servers_variables(state)
        for number in unseen:
            found.results["before"][federation.task.examined[number].name] = federation.task.evaluate(variables, number)
    return found


def examine_some(
    federation: Federation,
    round_: int,
    chosen: Sequence[int],
    states: Sequence[ClientState],
    delivered: Delivered,
    together: int,
    found: Examination,
) -> None:
    """Tests the models of the `chosen` clients, in the stages of `found`, to which the results are added.

    `round_` counts the rounds completed; `together` is of how many clients the compiled programs are.
    """
    engine, task = federation.engine, federation.task
    found.lengths.extend(delivered.lengths)
    found.densities.extend(1.0 if one.mask is None else float(density(one.mask)) for one in states)
    tests: dict[int | None, list[int]] = {}
    for number, test in enumerate(task.examined):
        tests.setdefault(test.client, []).append(number)

    def test_all(stage: str, client: int, variables: PyTree) -> None:
        for number in tests.get(client, ()):
            found.results[stage][task.examined[number].name] = task.evaluate(variables, number)

    def arrived(place: int) -> PyTree:
        return merge(engine.method.personalise(delivered.of(place), states[place]), states[place].local)

    for place, k in enumerate(chosen):
        variables = arrived(place)
        if "before" in found.stages:
            test_all("before", k, variables)
        if "validation" in found.stages and task.validate:
            found.validation[task.client_names[k]] = task.validate(variables, k)
    if "after" in found.stages:
        tuned = _fine_tuned(federation, round_, delivered, states, chosen, together)
        for place, (k, variables) in enumerate(zip(chosen, tuned, strict=True)):
            if not (sound := all_finite(variables)):
                found.diverged.append(task.client_names[k])
            test_all("after", k, variables if sound else arrived(place))


def servers_variables(state: RunState) -> PyTree:
    """The server's model with the mean of the clients' local leaves, for data of no client."""
    total = functools.reduce(lambda sums, local: jax.tree.map(np.add, sums, local), (c.local for c in state.clients))
    return merge(jax.device_get(state.server.model), jax.tree.map(lambda leaf: leaf / len(state.clients), total))


def _fine_tuned(
    federation: Federation,
    round_: int,
    delivered: Delivered,
    states: Sequence[ClientState],
    chosen: Sequence[int],
    together: int,
) -> list[PyTree]:
    """The variables of the chosen clients after E more local epochs."""
    config, engine = federation.config, federation.engine
    # At the end the step size of the last rounds that are like the others.
    factors = rates(federation.task, min(round_, max(config.rounds - 1 - bool(config.last.epochs), 0)), config.epochs)
    # The last few are filled up with the first of them, or their number would compile anew.
    places = [*range(len(chosen)), *[0] * (together - len(chosen))]
    messages = delivered.messages
    inputs = round_inputs(
        engine,
        messages if isinstance(messages, Common) else [messages[place] for place in places],
        [states[place] for place in places],
        [chosen[place] for place in places],
        seed=config.seed,
        round_=round_,
    )
    return unstack(engine.fine_tune(round_, factors, inputs), len(chosen))


def headline(federation: Federation, evaluations: Evaluations, densities: Sequence[float]) -> dict[str, Any]:
    """`{"clients": {name: {rank1, ..., density}}, "mean": {...}}` of one evaluation, a row a test.

    `densities` are those of the clients. `mean` is over the tests of clients' models; with `accuracy` comes `pooled`,
    over all their images. Tests of the server's model on sites of no client are apart, under `unseen`, in the same
    form.
    """
    groups: dict[bool, dict[str, dict[str, Any]]] = {False: {}, True: {}}
    for test in federation.task.examined:
        if test.name not in evaluations:
            continue
        size = 1.0 if test.client is None else densities[test.client]
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
