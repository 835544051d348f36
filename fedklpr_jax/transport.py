"""How messages of a simulated round get from the server to the clients and back, and what they measure.

`Encoded`, the usual way, sends every message through the wire format: what is trained on and averaged is what was
decoded, and the bytes are the lengths of the payloads. `Direct` hands over the arrays and works out the bytes, for
simulations of so many clients that encoding would take most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedklpr_jax import exchange
from fedklpr_jax.client_maps import Common
from fedklpr_jax.client_update import Told, told_of
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientState, Message, ServerState, Upload, Uploads
from fedklpr_jax.pruning import count_true
from fedklpr_jax.refusals import upload_fault
from fedklpr_jax.round import Engine, stack_uploads
from fedklpr_jax.trees import PyTree, all_finite, parameter_count, unstack
from fedklpr_jax.wire import WireError


class Delivered(NamedTuple):
    """The downloads of the participants as they arrive, and the bytes of each."""

    messages: Sequence[Message] | Common
    lengths: list[int]

    def of(self, place: int) -> Message:
        """The message of the participant at a place."""
        return self.messages.tree if isinstance(self.messages, Common) else self.messages[place]


class Measured(NamedTuple):
    """Of the participants' uploads the bytes, why one is refused ("" = it is not), and `dense(place)`, the bytes that
    one would have had unpruned."""

    lengths: list[int]
    reasons: list[str]
    dense: Callable[[int], int]


class Collected(NamedTuple):
    """The uploads of the participants as they arrive, and of them what `Measured` holds."""

    uploads: Uploads
    lengths: list[int]
    reasons: list[str]
    dense: Callable[[int], int]


def is_whole(mask: PyTree | None) -> bool:
    """Whether nothing is pruned under `mask`."""
    return mask is None or all(np.asarray(kept).all() for kept in jax.tree.leaves(mask))


def as_payload(message: Message, state: ClientState, dtype: str) -> bytes:
    """A download as it is sent to a client of this state."""
    return exchange.pack(message.model, message.mask, {}, state.mask, dtype)


def as_arrived(payload: bytes, like: Message, state: ClientState) -> Message:
    """A download as a client of this state decodes it; `like` has its leaves' shapes."""
    model, mask, _ = exchange.unpack(payload, like.model, {}, state.mask)
    return Message(model, mask)


class Encoded(NamedTuple):
    """Messages in the wire format, their values as `dtype`."""

    engine: Engine
    dtype: str

    def packed(self, server: ServerState, state: ClientState, client: int) -> tuple[Message, bytes]:
        """One download before it is sent, and as its payload."""
        message = jax.device_get(self.engine.download(server, np.int32(client)))
        return message, as_payload(message, state, self.dtype)

    def download(self, server: ServerState, state: ClientState, client: int) -> tuple[Message, int]:
        """One download: the message as the client decodes it, and the length of its payload."""
        message, payload = self.packed(server, state, client)
        return as_arrived(payload, message, state), len(payload)

    def downloads(self, server: ServerState, states: Sequence[ClientState], clients: Sequence[int]) -> Delivered:
        """Those of all participants; `states` are theirs before the round."""
        if self.engine.method.broadcasts:
            message, length = self.download(server, states[0], clients[0])
            return Delivered(Common(message), [length] * len(clients))
        found = [self.download(server, state, k) for state, k in zip(states, clients, strict=True)]
        return Delivered([message for message, _ in found], [length for _, length in found])

    def upload(self, upload: Upload, state: ClientState, client: int) -> tuple[Upload, int, str]:
        """One upload: as the server decodes it, its length, and why it is refused ("" if it is not).

        `state` is the one before the round: its mask is the one the server holds.
        """
        try:
            payload = exchange.pack(upload.model, upload.mask, upload.scalars, state.mask, self.dtype)
        except InputError as error:
            return upload, 0, str(error)
        decoded, reason = self.received(payload, upload, state, client)
        return decoded, len(payload), reason

    def received(self, payload: bytes, like: Upload, state: ClientState, client: int) -> tuple[Upload, str]:
        """An upload out of its payload, and why it is refused; `like` has its leaves' shapes and the names of its
        scalars, and is what comes back where the payload cannot be read."""
        try:
            decoded = Upload(*exchange.unpack(payload, like.model, like.scalars, state.mask))
        except WireError as error:
            return like, str(error)
        good = all_finite((decoded.model, decoded.scalars))
        return decoded, upload_fault(good, decoded.scalars, self.engine.task.clients[client].images)

    def dense(self, server: ServerState, upload: Upload, length: int) -> int:
        """Bytes that an upload of `length` would have had unpruned: itself, or the global model in its place."""
        if is_whole(upload.mask):
            return length
        return len(exchange.pack(jax.device_get(server.model), None, upload.scalars, None, self.dtype))

    def uploads(
        self, server: ServerState, uploads: Upload, states: Sequence[ClientState], clients: Sequence[int]
    ) -> Collected:
        """Those of all participants, from stacked ones; `states` are theirs before the round."""
        found = [
            self.upload(upload, state, client)
            for upload, state, client in zip(unstack(uploads, len(clients)), states, clients, strict=True)
        ]
        lengths, reasons = [length for _, length, _ in found], [reason for *_, reason in found]

        def dense(place: int) -> int:
            upload, length, _ = found[place]
            return self.dense(server, upload, length)

        together = stack_uploads([upload for upload, *_ in found], clients, [not reason for reason in reasons])
        return Collected(together, lengths, reasons, dense)


class Direct(NamedTuple):
    """Arrays handed over; counted are 4 bytes a value that is kept or a scalar, and one bit an entry of a mask."""

    engine: Engine

    def downloads(self, server: ServerState, states: Sequence[ClientState], clients: Sequence[int]) -> Delivered:
        """As `Encoded.downloads`."""
        if self.engine.method.broadcasts:
            message = self.engine.download(server, np.int32(0))
            return Delivered(Common(message), [_plain_bytes(parameter_count(message.model))] * len(clients))
        messages = [self.engine.download(server, np.int32(k)) for k in clients]
        kept = [None if message.mask is None else int(_kept(message.mask)) for message in messages]
        lengths = [_plain_bytes(parameter_count(m.model), n) for m, n in zip(messages, kept, strict=True)]
        return Delivered(messages, lengths)

    def uploads(
        self, server: ServerState, uploads: Upload, states: Sequence[ClientState], clients: Sequence[int]
    ) -> Collected:
        """As `Encoded.uploads`; the stacked arrays stay where they are."""
        told = measured(self.engine, server, jax.device_get(_told_of_rows(uploads)), clients)
        accepted = np.array([not reason for reason in told.reasons])
        together = Uploads(uploads.model, uploads.mask, uploads.scalars, np.array(clients, np.int32), accepted)
        return Collected(together, *told)


_told_of_rows = jax.jit(jax.vmap(told_of))


def measured(engine: Engine, server: ServerState, told: Told, clients: Sequence[int]) -> Measured:
    """Of uploads of `clients` nobody encodes, of which this is told."""
    entries, scalars = parameter_count(server.model), len(told.scalars)
    whole = _plain_bytes(entries, scalars=scalars)
    lengths = [whole] * len(told.finite)
    if told.kept is not None:
        lengths = [_plain_bytes(entries, int(kept), scalars) for kept in told.kept]
    rows = zip(told.finite, unstack(told.scalars, len(clients)), clients, strict=True)
    reasons = [upload_fault(bool(good), row, engine.task.clients[client].images) for good, row, client in rows]
    return Measured(lengths, reasons, lambda place: whole)


_kept = jax.jit(count_true)


def _plain_bytes(entries: int, kept: int | None = None, scalars: int = 0) -> int:
    """Bytes of a message that nobody encodes: of so many entries so many `kept` under a mask (None = it has none)."""
    if not entries:
        return 0
    if kept is None:
        return 4 * (entries + scalars)
    return 4 * (kept + scalars) + -(-entries // 8)


def make_transport(engine: Engine, wire: Any) -> Encoded | Direct:
    """The transport that `config.wire` asks for."""
    return Encoded(engine, wire.dtype) if wire.encode else Direct(engine)
