"""The server's side of a federation whose clients are machines of their own.

The loop over rounds, its checkpoints, log, summary and report are those of the simulation (`train.follow`); another is
only how a round comes about: every participant gets an order with its download, and what is back before the deadline is
merged. Who does not answer, answers with a fault, or sends what cannot be used is refused, counted and named, and goes
on in a later round from the state of the last upload that was accepted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np

from fedklpr_jax import config as settings
from fedklpr_jax import privacy
from fedklpr_jax.assembly import Federation, assembled, classification_parts, names_in, reid_parts
from fedklpr_jax.client_states import ClientStates
from fedklpr_jax.console import Console
from fedklpr_jax.curves import check_tensorboard
from fedklpr_jax.data import synthetic
from fedklpr_jax.data.site import Away
from fedklpr_jax.deploy.answers import add_results, entry_of, number, one_line
from fedklpr_jax.deploy.messages import Asked, Letter, Silence, asked
from fedklpr_jax.deploy.register import Register
from fedklpr_jax.deploy.site import sizes_told
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientState, Method, ServerState, Task, Upload
from fedklpr_jax.metrics import as_json
from fedklpr_jax.pruning import density
from fedklpr_jax.round import stack_uploads, start
from fedklpr_jax.simulation import (
    Examination,
    Played,
    RunState,
    Split,
    epochs_of,
    first_of,
    participants,
    settled,
)
from fedklpr_jax.train import Course, follow, keep_programs, prepare_directory
from fedklpr_jax.transport import Encoded
from fedklpr_jax.trees import PyTree


class Fleet(Protocol):
    """The sites as the server reaches them."""

    def enrolled(self) -> Mapping[str, Mapping[str, int]]:
        """Looks for sites that are new; of all that ever enrolled the sizes, by name."""

    def connected(self) -> Sequence[str]:
        """The enrolled sites that can be reached now."""

    def post(self, kind: str, letters: Mapping[str, Letter], seconds: float) -> Mapping[str, Letter | Silence]:
        """Sends each site its order, of one kind, and waits for so long at most; what came, by name."""


def site_names(config: ml_collections.ConfigDict) -> list[str]:
    """The clients of a run, for which sites are waited.

    Raises:
      InputError: they are not named, or the run is not one that sites of their own can do.
    """
    task = config.task.name
    for setting, wrong, right in (
        ("method.name", config.method.name == "centralised", "footage stays at its site; give another method"),
        ("data.scenario", config.data.scenario != "dataset", "a site is a client; give dataset"),
        ("data.unseen", bool(config.data.unseen), "nobody here has its pictures; leave it out"),
        ("wire.encode", not config.wire.encode, "messages travel as payloads; give True"),
        ("hosts", bool(config.hosts), "the server is one host; leave it out"),
        ("dry_run", config.dry_run, "sites of their own tell nothing before they train; leave it out"),
    ):
        if wrong:
            value = settings.flat(config)[setting]
            raise InputError(f"config.{setting}: {value!r} is not for a deployment: {right}")
    if task == "classification":
        digits = len(str(config.data.count - 1))
        return [f"c{k:0{digits}d}" for k in range(config.data.count)]
    names = names_in(config.data.clients)
    if not names and config.data.source == "synthetic":
        names = [spec.name for spec in synthetic.DEFAULT_SITES]
    if not names:
        raise InputError("config.data.clients: name the sites that may take part, such as ward,viper")
    return names


def run(
    config: ml_collections.ConfigDict,
    console: Console,
    command: str,
    fleet_of: Callable[[Letter, Sequence[str], frozenset[str]], Fleet],
) -> dict[str, Any]:
    """Runs, or goes on with, the run that `config` describes, with the sites of a fleet; returns what `summary.json`
    holds.

    Args:
      config: as for the simulation; what concerns the clients' data is each site's own.
      console: what is shown.
      command: what to type to go on.
      fleet_of: (the order to enrol, the names that may, the sizes that they have to tell) -> the sites.

    Raises:
      InputError: bad settings, data or directory, or too few sites.
    """
    settings.validate(config)
    config = settings.resolved(config)
    names = site_names(config)
    if config.tensorboard:
        check_tensorboard()
    keep_programs(config)
    began = time.monotonic()
    directory = prepare_directory(config, command)
    register = Register.of(directory)
    fleet = fleet_of(Letter(as_json(_order("enrol", config, names, register))), names, sizes_told(config))
    _await_sites(config, console, fleet, names, register)
    federation = _federation(config, console, names, register)
    return follow(_course(config, console, fleet, names, register), federation, directory, console, began)


def _order(
    kind: str, config: ml_collections.ConfigDict, names: Sequence[str], register: Register, **more: Any
) -> dict[str, Any]:
    given = {**settings.flat(config), "out": "", "name": ""}
    return {"kind": kind, "run": register.run, "settings": given, "names": names, "sizes": register.sizes, **more}


def _await_sites(
    config: ml_collections.ConfigDict, console: Console, fleet: Fleet, names: Sequence[str], register: Register
) -> None:
    """Waits for all sites, at most `deploy.wait` seconds, then for `deploy.least` of them as long again."""
    least = min(config.deploy.least or len(names), len(names))
    fresh = not register.sizes
    wanted = len(names) if fresh else least
    console.line(f"waiting for {wanted} of {len(names)} sites: {', '.join(names)}")
    ends = time.monotonic() + config.deploy.wait
    while True:
        known, here = fleet.enrolled(), fleet.connected()
        if len(here) >= wanted or (time.monotonic() > ends and len(here) >= least):
            break
        if time.monotonic() > ends + config.deploy.wait:
            raise InputError(
                f"config.deploy.least: {len(here)} of at least {least} sites are here after {2 * config.deploy.wait} "
                "s; start their SuperNodes, or give fewer, and start the run again"
            )
        time.sleep(1.0)
    console.line(f"{len(here)} sites are here: {', '.join(here)}")
    if fresh:
        register.sizes = {name: dict(known[name]) for name in names if name in known}
        register.save()


def _federation(
    config: ml_collections.ConfigDict, console: Console, names: Sequence[str], register: Register
) -> Federation:
    """The federation without a picture: for its server step and the shapes of its model."""
    if config.task.name == "classification":
        parts = classification_parts(config, console)
    else:
        parts = reid_parts(config, console, _away(names, register.sizes))
    # Its noise must not follow from a seed that every site knows.
    return assembled(config, parts, together=1, noise_key=privacy.from_system)


def _away(names: Sequence[str], sizes: Mapping[str, Mapping[str, int]]) -> list[Away]:
    """All clients, those that have not enrolled with nothing."""
    blank = dict.fromkeys(next(iter(sizes.values())), 0)
    return [Away(name, sizes.get(name, blank)) for name in names]


def _with_late(federation: Federation, console: Console, names: Sequence[str], register: Register) -> Federation:
    """The same federation, which also knows how many images the sites have that came late."""
    # Where a data set is dealt the server knows everybody's share.
    if not register.late or federation.config.task.name == "classification":
        return federation
    known = reid_parts(federation.config, console, _away(names, {**register.sizes, **register.late})).task.clients
    task = federation.task
    clients = tuple(
        client._replace(images=known[k].images) if names[k] in register.late else client
        for k, client in enumerate(task.clients)
    )
    engine = federation.engine._replace(task=dataclasses.replace(task, clients=clients))
    return dataclasses.replace(federation, engine=engine)


def records(task: Task, method: Method, seed: int) -> tuple[ServerState, ClientStates]:
    """What the server keeps of each client: the mask that it holds, and as `memory` the number of its state, that is
    the rounds completed when it had it; 0 = its first."""
    server, clients = start(task, method, seed)
    firsts = tuple(ClientState((), first.mask, np.int32(0), ()) for first in clients.firsts)
    return server, ClientStates(len(clients), firsts)


def _course(
    config: ml_collections.ConfigDict, console: Console, fleet: Fleet, names: Sequence[str], register: Register
) -> Course:
    barred: dict[str, str] = {}

    def order(kind: str, record: ClientState, round_: int, **more: Any) -> str:
        return as_json(_order(kind, config, names, register, round=round_, state=int(record.memory), **more))

    def welcome(federation: Federation) -> Federation:
        """Waits until there are sites enough, and takes in those that are new."""
        _await_sites_again(config, console, fleet, len(names))
        agreed = {**register.sizes, **register.late}
        for name, sizes in fleet.enrolled().items():
            if name in barred or sizes == agreed.get(name):
                continue
            if name in agreed:
                barred[name] = "has other pictures than when it enrolled; give it those, or start another run"
            elif "classes" in sizes and not federation.engine.method.is_local("params/classifier/kernel"):
                barred[name] = "came after the first round, when the one classifier had no place for it any more"
            else:
                register.late[name] = dict(sizes)
                register.save()
            console.line(f"{name}: {barred.get(name, 'joins late')}")
        return _with_late(federation, console, names, register)

    def send(kind: str, letters: Mapping[str, Letter], clients: Sequence[int]) -> list[Letter | Silence]:
        """The replies of some clients, in their order."""
        sent = {name: letter for name, letter in letters.items() if name not in barred}
        replies = fleet.post(kind, sent, config.deploy.deadline)
        return [replies.get(names[k]) or Silence(barred[names[k]], sent=False) for k in clients]

    def run_round(federation: Federation, state: RunState) -> tuple[RunState, dict[str, Any]]:
        split = Split()
        federation = welcome(federation)
        engine = federation.engine
        server = engine.place(state.server)
        round_ = int(server.round)
        chosen = participants(config.seed, round_, len(names), config.participation)
        held = [state.clients[k] for k in chosen]
        transport, epochs = Encoded(engine, config.wire.dtype), epochs_of(federation, round_)
        with split.watch("wire"):
            packed = _packed(transport, server, held, chosen)
        letters = {
            names[k]: Letter(order("train", record, round_, epochs=epochs), payload)
            for k, record, payload in zip(chosen, held, packed, strict=True)
        }
        with split.watch("sites"):
            replies = send("train", letters, chosen)
        found = [asked(reply) for reply in replies]
        with split.watch("wire"):
            like = _like(engine.method, jax.device_get(server.model))
            read = [
                _upload(transport, answer, like(record), record, k)
                for k, record, answer in zip(chosen, held, found, strict=True)
            ]
        uploads = [upload for upload, _ in read]
        firsts = state.clients.firsts
        lost = [k for k, answer in zip(chosen, found, strict=True) if answer.answer.get("lost") is True]
        clients = state.clients.after(round_, {k: firsts[k % len(firsts)] for k in lost})

        def merge(accepted: np.ndarray) -> tuple[ServerState, dict[str, Any]]:
            return engine.aggregate(server, stack_uploads(uploads, chosen, accepted.tolist()))

        played = Played(
            after=[ClientState((), upload.mask, np.int32(round_ + 1), ()) for upload in uploads],
            entries=[entry_of(answer.answer.get("entry")) for answer in found],
            down=_sent(packed, replies),
            up=[len(answer.payload) or None for answer in found],
            reasons=[reason for _, reason in read],
            dense=lambda place: transport.dense(server, uploads[place], len(found[place].payload)),
            merge=merge,
        )
        return settled(federation, state._replace(server=server, clients=clients), chosen, played, split)

    def examine(federation: Federation, state: RunState, *stages: str) -> Examination:
        federation = welcome(federation)
        transport, everyone = Encoded(federation.engine, config.wire.dtype), range(len(names))
        held, round_ = list(state.clients), int(state.server.round)
        packed = _packed(transport, state.server, held, everyone)
        letters = {
            name: Letter(order("examine", record, round_, stages=stages), payload)
            for name, record, payload in zip(names, held, packed, strict=True)
        }
        replies = send("evaluate", letters, everyone)
        found = Examination.of(stages)
        found.lengths.extend(length or 0 for length in _sent(packed, replies))
        found.sent.extend(found.lengths)
        for name, record, reply in zip(names, held, replies, strict=True):
            answer = asked(reply)
            if answer.fault:
                console.line(f"{name}: not examined: {one_line(answer.fault)}")
            size = number(answer.answer.get("density"))
            own = 1.0 if record.mask is None else float(density(record.mask))
            found.densities.append(own if size is None else size)
            add_results(found, name, answer.answer, config.task.name == "classification")
        if not any(found.results.values()):
            raise InputError("no site answered; start their SuperNodes and go on with the same command")
        return found

    return Course(records, run_round, examine)


def _await_sites_again(config: ml_collections.ConfigDict, console: Console, fleet: Fleet, count: int) -> None:
    """Waits until `deploy.least` sites are here, for twice `deploy.wait` seconds."""
    least = min(config.deploy.least or 1, count)
    ends = time.monotonic() + 2 * config.deploy.wait
    while len(fleet.connected()) < least:
        if time.monotonic() > ends:
            raise InputError(
                f"fewer than {least} sites have been here for {2 * config.deploy.wait} s; the run goes on from its "
                "checkpoint with the same command"
            )
        fleet.enrolled()
        time.sleep(1.0)


def _packed(
    transport: Encoded, server: ServerState, held: Sequence[ClientState], clients: Sequence[int]
) -> list[bytes]:
    """The downloads of some clients, where all get the same made once."""
    if transport.engine.method.broadcasts:
        return [transport.packed(server, held[0], clients[0])[1]] * len(clients)
    return [transport.packed(server, record, k)[1] for record, k in zip(held, clients, strict=True)]


def _sent(payloads: Sequence[bytes], replies: Sequence[Letter | Silence]) -> list[int | None]:
    """Bytes of the downloads that were sent; None = there was none, or nobody to send it to."""
    return [
        None if isinstance(reply, Silence) and not reply.sent else len(payload) or None
        for payload, reply in zip(payloads, replies, strict=True)
    ]


def _like(method: Method, model: PyTree) -> Callable[[ClientState], Upload]:
    """What an upload of a client with a record looks like: in the place of one that did not come it is merged with no
    weight."""
    scalars: dict[str, Any] = dict.fromkeys(method.tells, np.float32(0))
    return lambda record: Upload(model, record.mask, scalars)


def _upload(
    transport: Encoded, answer: Asked, like: Upload, record: ClientState, client: int
) -> tuple[Upload, str]:
    """The upload of an answer, and why it is refused."""
    if not answer.payload:
        nothing_to_send = not jax.tree.leaves(like.model)
        return like, one_line(answer.fault) or ("" if nothing_to_send else "an answer without an upload")
    upload, reason = transport.received(answer.payload, like, record, client)
    if not reason and (upload.mask is None) != (like.mask is None):
        upload, reason = like, "an upload without its mask" if upload.mask is None else "a mask nobody asked for"
    return upload, one_line(first_of(answer.fault, reason))
