"""What server and site say to each other: an order or an answer, a small JSON object, and beside it at most one payload
of the wire format.

An order has `kind`, `enrol`, `train` or `examine`, and `settings`, all of them, as the server has them. `train` and
`examine` have more: `run`, which run it is of; the `names` of all clients; the `sizes` that they agreed on; `round`,
rounds completed; `state`, that of the site to go on from: the rounds that were completed when it had it, 0 = its first.
`train` has `epochs`, and `examine` its `stages`. An answer has `name`, and `fault`, why the order could not be followed
or the payload must not be used; "" or nothing where all is well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedklpr_jax.errors import InputError

# What an order or an answer may take; a thousand clients' names and sizes take a tenth.
LONGEST = 1 << 22


class Letter(NamedTuple):
    """An order or an answer: its `text`, a JSON object, and its `payload`, empty for none."""

    text: str
    payload: bytes = b""


class Silence(NamedTuple):
    """No answer: for which `reason`, and whether the order was `sent`."""

    reason: str
    sent: bool


class Asked(NamedTuple):
    """What came of an order: the `answer`, the `payload` with it, and why neither is to be used ("" = they are)."""

    answer: Mapping[str, Any]
    payload: bytes
    fault: str


def read(letter: Letter) -> dict[str, Any]:
    """The JSON object of a letter.

    Raises:
      InputError: it holds none.

    >>> read(Letter('{"kind": "enrol"}'))
    {'kind': 'enrol'}
    """
    if len(letter.text) > LONGEST:
        raise InputError(f"a message of {len(letter.text)} letters; at most {LONGEST} are read")
    try:
        found = json.loads(letter.text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError("a message that is no JSON object")
    return found


def asked(reply: Letter | Silence) -> Asked:
    """What came of an order.

    >>> asked(Silence("no answer in 60 s", sent=True)).fault
    'no answer in 60 s'
    >>> asked(Letter('{"loss": 1.0}', b"abc"))
    Asked(answer={'loss': 1.0}, payload=b'abc', fault='')
    """
    if isinstance(reply, Silence):
        return Asked({}, b"", reply.reason)
    try:
        answer = read(reply)
    except InputError as error:
        return Asked({}, reply.payload, str(error))
    fault = answer.get("fault", "")
    return Asked(answer, reply.payload, fault if isinstance(fault, str) else "a fault that is no text")
