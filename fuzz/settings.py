"""The targets `command` and `settings`: command lines, and values as a configuration file may give them.

An input is text, one argument (`--config.rounds=3`) or one assignment (`rounds=3`, a Python literal or else a string) a
line. A configuration file itself is a program that the user runs, so that nothing in it is hostile.
"""

from __future__ import annotations

import ast
import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

from fedklpr_jax import cli
from fedklpr_jax.config import FIELDS, default_config, resolved, validate
from fedklpr_jax.errors import InputError
from fuzz._mutation import Basic, Target, one_line

_FILE = f"--config={Path(__file__).resolve().parents[1] / 'experiments' / 'fedklpr.py'}"
_MEMORY = 16 << 20
_VALUES = (
    "", "0", "-1", "1", "2", "0.5", "1e400", "-1e400", "nan", "inf", "1e308", "9" * 400, "9" * 5000, "0." + "0" * 5000,
    "True", "None", "auto", "full", "a/b", "..", "\u0663", "\u00b2", "1_0", "0x10", "2,viper:10", "1.0,0.5", "a:1,2,3",
    "localhost:1,2,0", "tfds:", "classifier,bnneck", "[]", "()", "{'a': 1}", "synthetic", "x.npz", "\x1b[2J", "\ud800",
    "(" * 300, "-" * 300,
)  # fmt: skip
_SINGLE = (
    "--config", "--config.rounds", "--noconfig.eval.rerank", "--config.eval.rerank", "--", "-h", "--flagfile=/",
    "--undefok=x", "--helpfull", "rounds=3", "--config=", "--config=nowhere.py", "--config.=3", "--config.method=3",
    "--config=" + "x" * 5000, "--config.rounds=3=4", "-config.rounds=3", "--config.data.nothing=1",
)  # fmt: skip


def _lines(data: bytes) -> list[str]:
    # What is no UTF-8 becomes half a surrogate pair, as in arguments that the system hands over.
    return data.decode("utf-8", "surrogateescape").split("\n")


def run_command(data: bytes) -> bool:
    """Parses a command line and validates what comes of it."""
    given = [line for line in _lines(data) if line and "\0" not in line]
    # Another file than ours would be run.
    given = [line for line in given if not os.path.isfile(line.partition("=")[2])]
    return _accepted(lambda: validate(cli.parse([_FILE, *given])))


def run_settings(data: bytes) -> bool:
    """Puts values into the defaults and validates them."""
    config = default_config()
    with config.unlocked(), config.ignore_type():
        for line in filter(None, _lines(data)):
            path, _, text = line.partition("=")
            if path in FIELDS:
                # What the configuration's own class refuses never becomes a value.
                with contextlib.suppress(OverflowError):
                    config.update_from_flattened_dict({path: _literal(text)})

    def both() -> None:
        validate(config)
        validate(resolved(config))

    return _accepted(both)


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _accepted(job: Callable[[], object]) -> bool:
    try:
        job()
    except InputError as error:
        one_line(error)
        return False
    return True


def _mutate(data: bytes, rng: random.Random, basic: Basic, prefix: str) -> bytes:
    lines = [line for line in data.split(b"\n") if line]
    fresh = f"{prefix}{rng.choice(list(FIELDS))}={rng.choice(_VALUES)}".encode("utf-8", "surrogatepass")
    kind = rng.random()
    if not lines or kind < 0.2:
        lines.insert(rng.randint(0, len(lines)), fresh)
    place = rng.randrange(len(lines))
    name, sign, value = lines[place].partition(b"=")
    if kind < 0.5:
        lines[place] = name + sign + basic(value, rng)
    elif kind < 0.7:
        lines[place] = name + b"=" + rng.choice(_VALUES).encode("utf-8", "surrogatepass")
    elif kind < 0.8:
        lines[place : place + 1] = rng.choice(([], [fresh]))
    elif kind < 0.9:
        lines[place] = basic(lines[place], rng)
    elif prefix:
        lines[place] = rng.choice(_SINGLE).encode()
    return b"\n".join(lines[:8])


def mutate_command(data: bytes, rng: random.Random, basic: Basic) -> bytes:
    """Another command line: an argument or its value changed, put in or left out."""
    return _mutate(data, rng, basic, "--config.")


def mutate_settings(data: bytes, rng: random.Random, basic: Basic) -> bytes:
    """Other assignments."""
    return _mutate(data, rng, basic, "")


COMMAND = Target(run_command, mutate_command, _MEMORY)
SETTINGS = Target(run_settings, mutate_settings, _MEMORY)
