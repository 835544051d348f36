"""A fleet whose sites are followers in this process: the code of server and sites without a network between them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fedklpr_jax.console import Console
from fedklpr_jax.deploy.messages import Letter, Silence, asked
from fedklpr_jax.deploy.site import Follower, Place

# What becomes of an order: (name, kind, number of the orders of this kind before, the order, follow) -> answer.
Post = Callable[[str, str, int, Letter, Callable[[Letter], Letter]], Letter | Silence]


def delivered(name: str, kind: str, number: int, order: Letter, follow: Callable[[Letter], Letter]) -> Letter | Silence:
    """Nothing goes wrong."""
    return follow(order)


def quiet() -> Console:
    """A console that nobody reads."""
    return Console(io.StringIO())


class InProcess:
    """A `server.Fleet` of followers that live in folders of `root`, with the settings `local` of their own.

    `here(name, orders)` says whether a site can be reached after so many orders to train; `payloads` adds up the bytes
    of all payloads.
    """

    def __init__(
        self,
        enrol: Letter,
        names: Sequence[str],
        root: Path,
        *,
        post: Post = delivered,
        here: Callable[[str, int], bool] = lambda name, orders: True,
        local: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._local = local
        self._enrol, self._names, self._root, self._post, self._here = enrol, names, root, post, here
        self._sizes: dict[str, dict[str, int]] = {}
        self._orders = {"train": 0, "evaluate": 0}
        self.followers = {name: self.follower(name) for name in names}
        self.payloads = 0

    def follower(self, name: str) -> Follower:
        """A site as it is after its machine was started."""
        return Follower(Place(name, self._root / name, self._local), quiet())

    def enrolled(self) -> Mapping[str, Mapping[str, int]]:
        """Of all that were ever here the sizes."""
        for name in self.connected():
            if name not in self._sizes:
                answer = asked(self.followers[name](self._enrol))
                assert not answer.fault, answer.fault
                self._sizes[name] = answer.answer["sizes"]
        return self._sizes

    def connected(self) -> Sequence[str]:
        """Those that are here."""
        return [name for name in self._names if self._here(name, self._orders["train"])]

    def post(self, kind: str, letters: Mapping[str, Letter], seconds: float) -> Mapping[str, Letter | Silence]:
        """Each site's answer, as `post` of the constructor lets it come through."""
        number, here = self._orders[kind], self.connected()
        found: dict[str, Letter | Silence] = {}
        for name, order in letters.items():
            if name not in here:
                found[name] = Silence("not connected", sent=False)
                continue
            reply = self._post(name, kind, number, order, self.followers[name])
            self.payloads += len(order.payload) + (len(reply.payload) if isinstance(reply, Letter) else 0)
            found[name] = reply
        self._orders[kind] += 1
        return found
