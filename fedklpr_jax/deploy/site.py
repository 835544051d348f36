"""A site's side of a federation: it follows one order at a time, on its own pictures.

Every order finds a new process, so that between orders a site is what lies in its folder: after each round that it
trained, its state. Which of them holds is the server's word: a site does not know whether its last upload came to
anything.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from fedklpr_jax import config as settings
from fedklpr_jax import exchange
from fedklpr_jax.assembly import Federation, assembled, classification_parts, load_sites, reid_parts
from fedklpr_jax.client_maps import Common
from fedklpr_jax.client_states import Shelf
from fedklpr_jax.console import Console
from fedklpr_jax.data.site import Away, Site
from fedklpr_jax.deploy.messages import Letter, read
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientState, Message
from fedklpr_jax.metrics import as_json
from fedklpr_jax.pruning import density
from fedklpr_jax.round import rates, round_inputs, start
from fedklpr_jax.simulation import Examination, described, examine_some
from fedklpr_jax.tasks import supervised, unsupervised
from fedklpr_jax.train import keep_programs
from fedklpr_jax.transport import Delivered
from fedklpr_jax.trees import split, unstack
from fedklpr_jax.wire import WireError

_RUN = re.compile(r"[0-9a-f]{8,64}")


@dataclasses.dataclass(frozen=True)
class Place:
    """A site on its own machine.

    Attributes:
      name: the client it is.
      folder: where its state lies between rounds.
      local: settings of `_OWN`: where its data is, and what is kept where; else they have their defaults.
    """

    name: str
    folder: Path
    local: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class LostState(InputError):
    """The server wants the site to go on from a state that is not in its folder."""


# What a site decides for itself, whatever the server's settings say.
_OWN = ("data.root", "data.cache", "compilation_cache")
# What an order of each kind has to have.
_NEEDED = {
    "enrol": ("settings",),
    "train": ("settings", "run", "names", "sizes", "round", "state", "epochs"),
    "examine": ("settings", "run", "names", "sizes", "round", "state", "stages"),
}


def own_config(order: Mapping[str, Any], place: Place) -> ml_collections.ConfigDict:
    """The settings of an order as this site follows them: one client, one after the other, at its own places.

    Raises:
      InputError: settings that are unknown or wrong.
    """
    config = settings.default_config()
    own = {path: settings.FIELDS[path].default for path in _OWN} | dict(place.local)
    try:
        config.update_from_flattened_dict(
            {**order["settings"], **own, "client_map": "loop", "devices": 1, "hosts": ""}
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"the server's settings are not those of this library ({' '.join(str(error).split())[:200]}); use the same "
            "version at both"
        ) from error
    settings.validate(config)
    return settings.resolved(config)


def own_site(config: ml_collections.ConfigDict, name: str) -> Site:
    """The pictures of this site.

    Raises:
      InputError: nothing usable where the settings point.
    """
    alone = config.copy_and_resolve_references()
    alone.data.clients, alone.data.unseen = name, ""
    (site,), _, _ = load_sites(alone)
    return site


def sizes(config: ml_collections.ConfigDict, site: Site) -> dict[str, int]:
    """What of a re-ID site's pictures the others' shapes depend on, by its task."""
    task = supervised if config.task.name == "supervised" else unsupervised
    return task.sizes(site, config.seed)


def sizes_told(config: ml_collections.ConfigDict) -> frozenset[str]:
    """The names of these sizes; a data set that is dealt is known to all, so that its clients tell none."""
    if config.task.name == "classification":
        return frozenset()
    return frozenset((supervised if config.task.name == "supervised" else unsupervised).SIZES)


def federation_at(order: Mapping[str, Any], place: Place, console: Console) -> Federation:
    """The federation as this site sees it: of the others it knows the sizes alone.

    Raises:
      InputError: an order for other clients, or bad settings or data.
    """
    config, names = own_config(order, place), order["names"]
    if place.name not in names:
        raise InputError(f"{place.name!r} is no client of this run; there are {', '.join(names)}")
    if config.task.name == "classification":
        return assembled(config, classification_parts(config, console), together=1)
    own = own_site(config, place.name)
    # Of one that was never heard of nothing is known; it only takes its place among the numbers.
    blank = dict.fromkeys(sizes(config, own), 0)
    sites = [own if name == place.name else Away(name, order["sizes"].get(name, blank)) for name in names]
    return assembled(config, reid_parts(config, console, sites), together=1)


class Follower:
    """Follows orders for one site, and keeps what it compiled from order to order as long as it lives."""

    def __init__(self, place: Place, console: Console) -> None:
        self._place, self._console = place, console
        self._known: tuple[str, Federation] | None = None

    def __call__(self, letter: Letter) -> Letter:
        """The answer to an order.

        What cannot be done for a reason that the site or the server can mend is an answer too: its `fault`.
        """
        place = self._place
        try:
            order = read(letter)
            _check(order)
            if order["kind"] == "enrol":
                return Letter(as_json(_enrol(order, place)))
            keep_programs(own_config(order, place))
            follow = _train if order["kind"] == "train" else _examine
            return follow(order, letter.payload, place, self._federation(order))
        except (InputError, WireError) as error:
            lost = isinstance(error, LostState)
            return Letter(as_json({"name": place.name, "fault": str(error), "lost": lost}))

    def _federation(self, order: Mapping[str, Any]) -> Federation:
        known = as_json([order[key] for key in ("settings", "names", "sizes")])
        if self._known is None or self._known[0] != known:
            self._known = known, federation_at(order, self._place, self._console)
        return self._known[1]


def _check(order: Mapping[str, Any]) -> None:
    """Raises InputError for an order that is none of this version."""
    kind = order.get("kind")
    if kind not in _NEEDED:
        raise InputError(f"an order of kind {kind!r}; {', '.join(_NEEDED)} are known")
    missing = [key for key in _NEEDED[kind] if key not in order]
    if missing:
        raise InputError(f"an order without {missing[0]!r}; use the same version of the library at server and site")
    kinds = {"settings": dict, "sizes": dict, "names": list, "stages": list, "run": str}
    for key, value in order.items():
        if not isinstance(value, kinds.get(key, str if key == "kind" else int)):
            raise InputError(f"an order whose {key!r} is of another kind than this version's")


def _enrol(order: Mapping[str, Any], place: Place) -> dict[str, Any]:
    config = own_config(order, place)
    known = sizes(config, own_site(config, place.name)) if sizes_told(config) else {}
    return {"name": place.name, "sizes": known}


def _shelf(order: Mapping[str, Any], place: Place) -> Shelf:
    """Where this run's states of the site lie."""
    run = order["run"]
    if not _RUN.fullmatch(run):
        raise InputError(f"an order of run {run[:80]!r}; a run has 8 to 64 hexadecimal digits")
    return Shelf(place.folder / run)


def _file(client: int, state: int) -> str:
    return f"{client:08d}-{state:08d}.npz"


def _state(order: Mapping[str, Any], place: Place, federation: Federation, client: int) -> ClientState:
    """The state the server wants the site to go on from."""
    _, states = start(federation.task, federation.engine.method, federation.config.seed)
    if not order["state"]:
        return states[client]
    shelf, name = _shelf(order, place), _file(client, order["state"])
    if not (shelf.folder / name).exists():
        raise LostState(f"{place.name}: has no state after round {order['state']}; it begins anew")
    return shelf.get(name, states[client])


def _keep(order: Mapping[str, Any], place: Place, client: int, state: ClientState, every: int) -> None:
    """Keeps the state after a round beside the one before it and those that a server may go back to."""
    shelf, last = _shelf(order, place), order["round"] + 1
    name = _file(client, last)
    shelf.put(name, state)
    # A power cut must not leave an empty file under the name.
    with open(shelf.folder / name, "rb") as file:
        os.fsync(file.fileno())
    earlier = sorted((path.name for path in shelf.folder.glob(f"{client:08d}-*.npz")), reverse=True)
    older = [other for other in earlier if other < name]
    shelf.sweep({name, _file(client, order["state"]), *older[: every + 1]})


def _received(
    order: Mapping[str, Any], payload: bytes, place: Place, federation: Federation
) -> tuple[int, ClientState, Message]:
    """This site's number, its state, and its download as it is decoded."""
    client = federation.task.client_names.index(place.name)
    state = _state(order, place, federation, client)
    model, _ = split(federation.task.init(jax.random.key(federation.config.seed)), federation.engine.method.is_local)
    found, mask, _ = exchange.unpack(payload, jax.device_get(model), {}, state.mask)
    return client, state, Message(found, mask)


def _train(order: Mapping[str, Any], payload: bytes, place: Place, federation: Federation) -> Letter:
    client, state, message = _received(order, payload, place, federation)
    config, engine, round_, epochs = federation.config, federation.engine, order["round"], order["epochs"]
    sent = Common(message) if engine.method.broadcasts else [message]
    inputs = round_inputs(engine, sent, [state], [client], seed=config.seed, round_=round_, epochs=epochs)
    update = engine.update(round_, rates(federation.task, round_, epochs), inputs)
    upload, after, facts = (unstack(tree, 1)[0] for tree in jax.device_get(update))
    entry, fault = described(federation.task, client, facts, after)
    _keep(order, place, client, after, config.checkpoint.every)
    answer = {"name": place.name, "entry": entry, "fault": fault}
    try:
        packed = exchange.pack(upload.model, upload.mask, upload.scalars, state.mask, config.wire.dtype)
    except InputError as error:
        return Letter(as_json(answer | {"fault": fault or str(error)}))
    return Letter(as_json(answer), packed)


def _examine(order: Mapping[str, Any], payload: bytes, place: Place, federation: Federation) -> Letter:
    client, state, message = _received(order, payload, place, federation)
    found = Examination.of(order["stages"])
    sent = Common(message) if federation.engine.method.broadcasts else [message]
    examine_some(federation, order["round"], [client], [state], Delivered(sent, [len(payload)]), 1, found)
    results = {
        stage: {name: dict(result.metrics) for name, result in tests.items()} for stage, tests in found.results.items()
    }
    size = 1.0 if state.mask is None else float(density(state.mask))
    answer = {"name": place.name, "results": results, "validation": found.validation, "density": size}
    return Letter(as_json(answer))
