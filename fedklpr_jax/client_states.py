"""The states of all clients of a federation, of which only those that have taken part are kept.

A client that never took part is as it began, and all that began alike share that state. The others lie in memory, or
each in a file of its own, so that memory does not grow with the clients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedklpr_jax.errors import BROKEN_NPZ, InputError
from fedklpr_jax.federated import ClientState

_OURS = re.compile(r"\d{8,}-\d{8,}\.npz|\.\d{8,}-\d{8,}\.npz\.[0-9a-f]+")


class Shelf:
    """Client states as files of one folder, which is made with the first of them.

    A file appears whole or not at all and is not changed afterwards, so that checkpoints can name it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def put(self, name: str, state: ClientState) -> None:
        """Writes `state` as file `name`.

        Raises:
          InputError: the folder cannot be written.
        """
        draft = self.folder / f".{name}.{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(draft, "xb") as file:
                np.savez(file, *map(np.asarray, jax.tree.leaves(state)))
            os.replace(draft, self.folder / name)
        except OSError as error:
            raise InputError(
                f"{self.folder}: a client's state cannot be written ({error.strerror}); free some space"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()

    def get(self, name: str, like: ClientState) -> ClientState:
        """The state in file `name`, of the structure, shapes and dtypes of `like`.

        Raises:
          InputError: there is no such file, or it holds something else.
        """
        path, (leaves, structure) = self.folder / name, jax.tree.flatten(like)
        try:
            with np.load(path, allow_pickle=False) as file:
                found = [file[f"arr_{number}"] for number in range(len(file.files))]
        except BROKEN_NPZ as error:
            raise InputError(
                f"{path}: no readable client state ({type(error).__name__}); start the run anew in another folder"
            ) from error
        here, wanted = ([(leaf.shape, leaf.dtype) for leaf in leaves] for leaves in (found, leaves))
        if here != wanted:
            raise InputError(f"{path}: holds another kind of client state; continue with the configuration it is of")
        return jax.tree.unflatten(structure, found)

    def sweep(self, used: Collection[str]) -> None:
        """Removes all states but those of the names in `used`, and drafts that a killed process left."""
        for path in self.folder.glob("*"):
            if path.name not in used and _OURS.fullmatch(path.name):
                # What cannot be removed is only in the way; the next sweep tries again.
                with contextlib.suppress(OSError):
                    path.unlink()


@dataclasses.dataclass(frozen=True, eq=False)
class ClientStates(Sequence[ClientState]):
    """One state a client; a value: `after` gives the states that follow.

    Attributes:
      size: how many clients there are.
      firsts: what they begin with; client k with number k modulo the length.
      kept: what the clients that took part have instead: a state, or the name of its file.
      shelf: where files lie; None = states are kept in memory.

    >>> state = ClientState({"x": np.float32(0)}, None, ())
    >>> states = ClientStates(3, (state,)).after(7, {1: state._replace(local={"x": np.float32(5)})})
    >>> [float(one.local["x"]) for one in states]
    [0.0, 5.0, 0.0]
    """

    size: int
    firsts: tuple[ClientState, ...]
    kept: Mapping[int, ClientState | str] = dataclasses.field(default_factory=dict)
    shelf: Shelf | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, client: Any) -> Any:
        if isinstance(client, slice):
            return [self[k] for k in range(*client.indices(self.size))]
        if not 0 <= client < self.size:
            raise IndexError(f"client {client} of {self.size}")
        first = self.firsts[client % len(self.firsts)]
        state = self.kept.get(client, first)
        if not isinstance(state, str):
            return state
        assert self.shelf, "a file without a shelf"
        return self.shelf.get(state, first)

    def after(self, round_: int, new: Mapping[int, ClientState]) -> ClientStates:
        """The states after a round in which the clients in `new` came to these."""
        if self.shelf is None:
            # Copies: a client's rows would hold those of all clients of its round in memory.
            return dataclasses.replace(self, kept={**self.kept, **{k: jax.tree.map(np.array, new[k]) for k in new}})
        names = {client: f"{client:08d}-{round_:08d}.npz" for client in new}
        for client, name in names.items():
            self.shelf.put(name, new[client])
        return dataclasses.replace(self, kept={**self.kept, **names})

    def bytes_in_all(self) -> int:
        """What the states of all clients take once each has taken part, in bytes."""
        each = [sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(first)) for first in self.firsts]
        return sum(each) * self.size // len(each)

    def record(self) -> dict[str, str]:
        """What a checkpoint notes: the file of every client that took part, "" for a state in memory."""
        return {str(client): state if isinstance(state, str) else "" for client, state in self.kept.items()}

    def in_memory(self) -> dict[str, ClientState]:
        """The states that a checkpoint has to hold itself."""
        return {str(client): state for client, state in self.kept.items() if not isinstance(state, str)}

    def recorded(self, record: Mapping[str, str]) -> dict[str, ClientState]:
        """For a `record` a tree like the `in_memory` of the states it is of."""
        return {
            client: self.firsts[int(client) % len(self.firsts)] for client, name in record.items() if not name
        }

    def restored(self, record: Mapping[str, str], held: Mapping[str, ClientState]) -> ClientStates:
        """The states that a checkpoint noted with `record` and held."""
        kept = {int(client): name or held[client] for client, name in record.items()}
        return dataclasses.replace(self, kept=kept)
