"""The model that a client of a run ends with, from the run's folder alone.

It is what the headline evaluates: the download of the newest checkpoint as it arrives at the client, personalised, with
the client's own leaves. No picture is read for it: what the shapes of a run depend on stands in every checkpoint
(`note`). Only a client that has taken part in no round yet still has what the run started from, which is then made
again, and for which its data is needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from fedklpr_jax import channels, checkpoint, privacy
from fedklpr_jax import config as settings
from fedklpr_jax.assembly import make_federation, model_spec, participation_count
from fedklpr_jax.client_states import ClientStates, Shelf
from fedklpr_jax.console import Console
from fedklpr_jax.data.picture_format import PictureFormat
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientState, Method, ServerState, Task
from fedklpr_jax.methods import make_method
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.pruning import density
from fedklpr_jax.round import start, states_of
from fedklpr_jax.tasks import classification, reid
from fedklpr_jax.transport import as_arrived, as_payload
from fedklpr_jax.trees import PyTree, merge

_MOST_NAMES = 20


@dataclasses.dataclass(frozen=True)
class Trained:
    """A client's model after some rounds of a run.

    Attributes:
      run: the name of its folder.
      config: of the run.
      method: its method.
      client: whose model.
      number: of the client.
      rounds: completed.
      spec: the network.
      variables: the task's, host arrays; what is pruned is 0.
      mask: what the client keeps of the shared leaves; None = all.
      pictures: what the network takes.
      classes: what its logits stand for; empty for an embedding.
      digest: of every setting of the run that changes a number.
    """

    run: str
    config: ml_collections.ConfigDict
    method: Method
    client: str
    number: int
    rounds: int
    spec: ModelSpec
    variables: PyTree
    mask: PyTree | None
    pictures: PictureFormat
    classes: tuple[str, ...]
    digest: str

    @property
    def density(self) -> float:
        """Share of the shared entries that are not pruned, as the tables of a run tell it."""
        return 1.0 if self.mask is None else float(density(self.mask))

    def network(self) -> reid.Network:
        """(variables, uint8 [n, h, w, c]) -> float32 [n, d]: logits, or the embeddings that the tests of the run rank
        by."""
        return classification.classifier(self.spec, self.pictures) if self.classes else reid.embedder(self.spec)


def note(task: Task, server: ServerState, first: ClientState) -> dict[str, Any] | None:
    """What a checkpoint tells `load` beside the states, as JSON holds it; None where there is nothing to load.

    Args:
      task: the run's.
      server: of any round.
      first: what a client begins with; of one that is a machine of its own this is a mere record of it (its `local`
        is no tree).
    """
    if task.pictures is None or not isinstance(first.local, dict):
        return None
    leaves = traverse_util.flatten_dict(merge(server.model, first.local), sep="/")
    labels = np.shape(first.labels) if task.labelling else None
    return {
        "names": list(task.client_names),
        "pictures": dataclasses.asdict(task.pictures),
        "classes": list(task.classes),
        "variables": {path: [np.dtype(leaf.dtype).name, list(leaf.shape)] for path, leaf in leaves.items()},
        "labels": labels,
    }


def load(run: Path, client: str, console: Console) -> Trained:
    """The model with which `client` ends the run in the folder `run`, or has come to where that is not at its end.

    Args:
      run: as `config.out` of the run.
      client: its name.
      console: shows what has to be made again for a client that never took part.

    Raises:
      InputError: no such run or client, no checkpoint yet, or a run whose clients keep their models elsewhere.
    """
    config = settings_of(run)
    try:
        settings.validate(config)
    except InputError as error:
        raise InputError(f"{run}: {error}") from error
    folder = run / "checkpoints"
    metas = checkpoint.metas(folder)
    if not metas:
        raise InputError(f"{folder}: holds no complete checkpoint; give a run that has finished a round")
    step, meta = max(metas.items())
    if "trained" not in meta:
        raise InputError(f"{folder}: was written by an earlier version, which did not note what is needed to load a "
                         "client's model; run it again")
    told = meta["trained"]
    if told is None:
        raise InputError(f"{run}: its clients were machines of their own, and their models are there, not here; give "
                         "the folder of a simulated run")
    number = _number(run, told["names"], client)
    method = _method(config, told["names"])
    server, states = _template(method, told, run / "clients")
    tree, _ = checkpoint.restore(folder, step, {"server": server, "clients": states.recorded(meta["clients"])})
    # Its labels say nothing of what a client ends with, and one that never took part has none here.
    first = states[number]._replace(labels=())
    if str(number) not in meta["clients"] and jax.tree.leaves(first):
        state = _first(config, client, number, told, console)
    else:
        state = states.restored(meta["clients"], tree["clients"])[number]
    state = state._replace(labels=())
    received = jax.device_get(jax.jit(method.download)(tree["server"], np.int32(number)))
    if config.wire.encode:
        received = as_arrived(as_payload(received, state, config.wire.dtype), received, state)
    variables = jax.device_get(merge(jax.jit(method.personalise)(received, state), state.local))
    pictures = PictureFormat.from_json(told["pictures"])
    return Trained(
        run.resolve().name, config, method, client, number, step, model_spec(config), variables, state.mask, pictures,
        tuple(told["classes"]), meta["fingerprint"],
    )  # fmt: skip


def narrowed(model: Trained) -> tuple[Trained, np.ndarray | None]:
    """The network of a client's own size where it trains such a one, and which embedding entries of the whole network
    it has (bool [d]; None = all): the others are 0 there. Any other model as it is."""
    capacity = model.method.capacity
    # A neck that stays at its client keeps what it began with in the places of cut channels, and these show.
    own_neck = model.spec.neck == "bn" and model.method.is_local("params/trunk/bnneck/scale")
    if capacity is None or model.config.method.capacity.form != "compact" or own_neck:
        return model, None
    device = model.number % len(capacity.shares)
    small = dataclasses.replace(
        model,
        spec=capacity.specs(model.spec)[device],
        variables=jax.device_get(capacity.cut(model.variables, model.mask, device)),
    )
    # An embedding block and a classifier give what they gave.
    if model.classes or model.spec.embedding_dim:
        return small, None
    kept = channels.kept_channels(model.mask, channels.channel_groups(model.mask))[-1]
    return small, np.asarray(kept)


def settings_of(run: Path) -> ml_collections.ConfigDict:
    """The settings of the run in the folder `run`, as they were written.

    Raises:
      InputError: no run, or none of this version.
    """
    path = run / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a run, such as runs/fedklpr")
    config = settings.default_config()
    try:
        config.update_from_flattened_dict(dict(json.loads(path.read_text(encoding="utf-8"))["settings"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: no settings of this version ({reason}); give the folder of another run") from error
    return config


def _number(run: Path, names: Sequence[str], client: str) -> int:
    if client not in names:
        shown = ", ".join(names[:_MOST_NAMES])
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        raise InputError(f"--client: {client!r} is no client of {run}; there are {shown}{more}")
    return list(names).index(client)


def _method(config: ml_collections.ConfigDict, names: Sequence[str]) -> Method:
    """The run's, whose server remembers what its checkpoint holds; nothing is drawn with the key."""
    together = participation_count(len(names), config.participation)
    return privacy.protected(
        make_method(config.method, names), config.privacy, clients=len(names), participants=together,
        key=privacy.seeded(config.seed),
    )  # fmt: skip


def _template(method: Method, told: Mapping[str, Any], shelf: Path) -> tuple[ServerState, ClientStates]:
    """Shapes of what the checkpoint of a run holds, and of what its clients began with."""
    leaves = told["variables"].items()
    flat = {path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for path, (dtype, shape) in leaves}
    labels = () if told["labels"] is None else jax.ShapeDtypeStruct(tuple(told["labels"]), np.int32)
    count = len(told["names"])
    server, first = jax.eval_shape(
        lambda variables, labels: states_of(variables, method, count, labels),
        traverse_util.unflatten_dict(flat, sep="/"), labels,
    )  # fmt: skip
    if method.capacity:
        first = first._replace(mask=jax.eval_shape(method.capacity.first_mask, server.model, np.int32(0)))
    return server, ClientStates(count, (first,), shelf=Shelf(shelf))


def _first(
    config: ml_collections.ConfigDict, client: str, number: int, told: Mapping[str, Any], console: Console
) -> ClientState:
    """What a client began with that has not taken part."""
    console.line(f"{client} has taken part in no round: making again what it began with")
    try:
        federation = make_federation(config, console)
    except InputError as error:
        reason = f"what it began with cannot be made again: {error}"
        raise InputError(f"{client} has taken part in no round, and {reason}") from error
    server, states = start(federation.task, federation.engine.method, config.seed)
    found = note(federation.task, server, states.firsts[0])
    if json.loads(json.dumps(found)) != told:
        raise InputError(f"{client} has taken part in no round, and the data here is not that of the run; give it the "
                         "data that the run had")
    return states[number]
