"""The ServerApp and the ClientApp for Flower, which carries the letters of `messages.py` over authenticated TLS.

One letter is one Flower message: its text in a ConfigRecord, its payload as one array of bytes. The run's
configuration names the settings, `config` and `flags` as of `experiments/run.py`; the configuration of a SuperNode says
which site it is, `name`; where its state lies between rounds, `folder`; where its pictures are, `root`; and where
decoded pictures and compiled programs may be kept, `cache`.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedklpr_jax.cli import parse
from fedklpr_jax.console import Console
from fedklpr_jax.deploy import server as server_side
from fedklpr_jax.deploy import site
from fedklpr_jax.deploy.answers import counts, one_line
from fedklpr_jax.deploy.messages import Asked, Letter, Silence, asked
from fedklpr_jax.errors import InputError

# Flower's own kinds of message for ours.
_TYPES = {"enrol": "query", "train": "train", "evaluate": "evaluate"}
# Seconds between two looks for answers, and after which a site that did not answer is asked again who it is.
_LOOK, _AGAIN = 1.0, 120.0

server = ServerApp()
client = ClientApp()


def as_content(letter: Letter) -> RecordDict:
    """A letter as the content of a Flower message."""
    content = RecordDict({"letter": ConfigRecord({"text": letter.text})})
    if letter.payload:
        array = Array("uint8", (len(letter.payload),), "fedklpr_jax.wire", letter.payload)
        content["payload"] = ArrayRecord({"payload": array})
    return content


def as_letter(content: RecordDict) -> Letter:
    """The letter in the content of a Flower message.

    Raises:
      InputError: there is none.
    """
    record = content.config_records.get("letter")
    text = record.get("text") if record else None
    arrays = content.array_records.get("payload")
    array = arrays.get("payload") if arrays else None
    if not isinstance(text, str) or (arrays and array is None):
        raise InputError("a message of another program")
    return Letter(text, array.data if array else b"")


class FlowerFleet:
    """The sites as a Flower grid reaches them; a `server.Fleet`.

    A site is a node that said its name when it was asked to enrol; a name that its SuperNode was registered with counts
    more than what it says.
    """

    def __init__(
        self, grid: Grid, enrol: Letter, names: Sequence[str], sizes: frozenset[str], console: Console
    ) -> None:
        self._grid, self._enrol, self._names, self._told, self._console = grid, enrol, names, sizes, console
        self._node_of: dict[str, int] = {}
        self._sizes: dict[str, dict[str, int]] = {}
        # Of nodes that were asked to enrol: the message, and when.
        self._asked: dict[int, tuple[str, float]] = {}
        self._refused: set[int] = set()

    def enrolled(self) -> Mapping[str, Mapping[str, int]]:
        """As `server.Fleet`."""
        nodes = {node.node_id: node.name for node in self._grid.get_nodes()}
        now = time.monotonic()
        known = {*self._node_of.values(), *self._refused}
        pending = {node for node, (_, since) in self._asked.items() if now - since < _AGAIN}
        for node in [node for node in nodes if node not in known | pending]:
            number = self._push("enrol", node, self._enrol, _AGAIN)
            self._asked[node] = (number, now)
        by_message = {number: node for node, (number, _) in self._asked.items() if number}
        for reply in self._grid.pull_messages(list(by_message)) if by_message else ():
            node = by_message[reply.metadata.reply_to_message_id]
            del self._asked[node]
            answer = _opened(reply)
            # A node that Flower could not reach is no node that was refused: it is asked again.
            if isinstance(answer, Letter):
                self._take_in(node, nodes, asked(answer))
        return self._sizes

    def _take_in(self, node: int, nodes: Mapping[int, str], told: Asked) -> None:
        """Takes a node in as the site it says it is, or refuses it."""
        name, sizes = told.answer.get("name"), counts(told.answer.get("sizes"))
        reason = told.fault or self._objection(nodes.get(node, ""), name, sizes)
        if reason:
            self._refused.add(node)
            who = nodes.get(node) or "without a name"
            self._console.line(f"refused node {node} ({who}): {one_line(reason)}")
        elif self._node_of.get(str(name), node) in {*nodes} - {node}:
            # The one before may only not be missed yet; this one is asked again later.
            self._asked[node] = ("", time.monotonic())
        else:
            self._node_of[str(name)], self._sizes[str(name)] = node, dict(sizes or {})

    def _objection(self, registered: str, name: Any, sizes: Mapping[str, int] | None) -> str:
        """Why a node is not the site that it says it is; "" = it is."""
        if name not in self._names:
            return f"calls itself {str(name)[:80]!r}, no client of this run; there are {', '.join(self._names)}"
        if registered and name != registered:
            return f"calls itself {name!r} but is registered as {registered!r}"
        if sizes is None or sizes.keys() != self._told:
            return "tells other sizes of its pictures than this version's; use the same at server and site"
        if sizes != self._sizes.get(name, sizes):
            return f"has other pictures than {name!r} had when it enrolled; give it those, or start another run"
        return ""

    def connected(self) -> Sequence[str]:
        """As `server.Fleet`."""
        nodes = {node.node_id for node in self._grid.get_nodes()}
        return [name for name in self._names if self._node_of.get(name) in nodes]

    def post(self, kind: str, letters: Mapping[str, Letter], seconds: float) -> Mapping[str, Letter | Silence]:
        """As `server.Fleet`."""
        here = [name for name in self.connected() if name in letters]
        found: dict[str, Letter | Silence] = {
            name: Silence("not connected", sent=False) for name in letters if name not in here
        }
        ends = time.monotonic() + seconds
        # One by one, for together they may be too large.
        numbers = {name: self._push(kind, self._node_of[name], letters[name], seconds) for name in here}
        found |= {name: Silence("the order could not be sent", sent=False) for name in here if not numbers[name]}
        waiting = {number: name for name, number in numbers.items() if number}
        while waiting and time.monotonic() < ends:
            for reply in self._grid.pull_messages(list(waiting)):
                found[waiting.pop(reply.metadata.reply_to_message_id)] = _opened(reply)
            if waiting:
                time.sleep(_LOOK)
        return found | {name: Silence(f"no answer in {seconds:g} s", sent=True) for name in waiting.values()}

    def _push(self, kind: str, node: int, letter: Letter, seconds: float) -> str:
        """Sends a node its letter; the message's number, "" where it could not be sent."""
        message = Message(as_content(letter), node, _TYPES[kind], ttl=seconds + 60.0)
        numbers = list(self._grid.push_messages([message]))
        return (numbers[0] or "") if numbers else ""


def _opened(reply: Message) -> Letter | Silence:
    if reply.has_error():
        return Silence(f"the site failed: {one_line(str(reply.error.reason))}", sent=True)
    try:
        return as_letter(reply.content)
    except InputError as error:
        return Silence(str(error), sent=True)


class _OneLine(logging.Filter):
    """Leaves the traceback out of what Flower says of a person's mistake."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record, and keeps it."""
        if record.exc_info and isinstance(record.exc_info[1], InputError):
            record.msg, record.args = f"error: {record.exc_info[1]}", ()
            record.exc_info = None
        return True


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """The server of one run."""
    logging.getLogger("flwr").addFilter(_OneLine())
    given = {key: str(value) for key, value in context.run_config.items()}
    config = parse([f"--config={given.get('config', '')}", *shlex.split(given.get("flags", ""))])
    said = " ".join(f"{key}={value!r}" for key, value in given.items())
    console = Console()
    server_side.run(
        config,
        console,
        f'flwr run --run-config "{said}"',
        lambda enrol, names, sizes: FlowerFleet(grid, enrol, names, sizes, console),
    )


def _answer(message: Message, context: Context) -> Message:
    """A site's answer to any order."""
    given: Mapping[str, Any] = context.node_config
    missing = [key for key in ("name", "folder") if not given.get(key)]
    if missing:
        letter = Letter(f'{{"fault": "the SuperNode has no {missing[0]}; give it in --node-config"}}')
        return Message(as_content(letter), reply_to=message)
    local = {"data.root": str(given["root"])} if "root" in given else {}
    if "cache" in given:
        local |= {"data.cache": f"{given['cache']}/images", "compilation_cache": f"{given['cache']}/xla"}
    place = site.Place(str(given["name"]), Path(str(given["folder"])), local)
    answer = site.Follower(place, Console())(as_letter(message.content))
    return Message(as_content(answer), reply_to=message)


@client.query()
def enrol(message: Message, context: Context) -> Message:
    """Says who the site is."""
    return _answer(message, context)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Trains one round."""
    return _answer(message, context)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Examines the site's model."""
    return _answer(message, context)
