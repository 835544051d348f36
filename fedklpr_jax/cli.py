"""The command line: settings in, one clear line for bad input, an answer to Ctrl-C within two seconds."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from fedklpr_jax.config import FIELDS
from fedklpr_jax.errors import InputError

INSTALLED = "fedklpr"
USAGE = "python experiments/run.py --config=experiments/fedklpr.py [--config.FIELD=VALUE ...]"


def parse(arguments: Sequence[str]) -> Any:
    """The configuration of a command line such as `["--config=experiments/fedklpr.py", "--config.rounds=3"]`.

    Raises:
      InputError: no configuration file, an unknown field, or a value of the wrong type.
    """
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=["run", *arguments])
    except (flags.Error, OSError, ValueError) as error:
        raise InputError(f"--flagfile: {_shown(str(error)[:300])}; usage: {USAGE}") from error
    chosen = [a.split("=", 1)[1] for a in arguments if re.match(r"--?config=", a)]
    if not chosen:
        raise InputError(f"--config: missing; usage: {USAGE}")
    path = Path(chosen[-1].split(":", 1)[0])
    # os.path, not Path: it answers False for a name that the system does not take.
    if not os.path.isfile(path):
        raise InputError(f"--config: {_shown(str(path))} is no file; usage: {USAGE}")
    for match in filter(None, (re.match(r"--?config\.([^=]*)", a) for a in arguments)):
        if match[1] not in FIELDS:
            near = difflib.get_close_matches(match[1], FIELDS, 1) or ["rounds"]
            raise InputError(f"--config.{_shown(match[1])}: there is no such setting; perhaps --config.{near[0]}")
    try:
        rest = values(["run", *arguments])
        config = values.config
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"--{_shown(error.flagname)}: there is no such setting; usage: {USAGE}") from error
    except (SyntaxError, ImportError) as error:
        raise InputError(f"--config: {path}: {' '.join(str(error).split())}") from error
    except (flags.Error, AttributeError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        # An error inside get_config() comes with its traceback; the last line says what it was.
        message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(f"{_shown(message[:300])}; see fedklpr_jax/config.py for all settings") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"--config: {path}: get_config() returns no ConfigDict; start from default_config()")
    if rest[1:]:
        raise InputError(f"{_shown(rest[1])}: not understood; settings look like --config.rounds=3")
    return config


def _shown(text: str) -> str:
    # An argument may hold line breaks or control codes; a message is one harmless line.
    return text if text.isprintable() else ascii(text)


def interruptible(job: Callable[[], None], hint: Callable[[], str]) -> int:
    """Runs `job` in a thread; returns its exit status, or leaves at once with 130 on Ctrl-C or SIGTERM.

    Compiled programs hold no Python frame that a signal could stop, so the main thread only waits for signals. What is
    on disk is complete at any moment, so leaving without a word to the job loses nothing but the round in progress.
    """
    status = [0]

    def body() -> None:
        try:
            job()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status[0] = 2
        except BaseException:
            status[0] = 1
            raise

    def on_terminate(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, on_terminate)
    worker = threading.Thread(target=body, name="run", daemon=True)
    try:
        worker.start()
        while worker.is_alive():
            worker.join(0.2)
    except KeyboardInterrupt:
        # A progress bar hides the cursor; show it again.
        prefix = "\x1b[?25h\n" if sys.stdout.isatty() else "\n"
        sys.stdout.write(f"{prefix}interrupted: the round in progress is dropped. {hint()}\n")
        sys.stdout.flush()
        os._exit(130)
    return status[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole command; returns the exit status: 0 done, 1 our mistake, 2 bad input (130 interrupted).

    It is typed as `python experiments/run.py`, or where the package is installed as `fedklpr`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    installed = Path(sys.argv[0]).name == INSTALLED
    if {"-h", "--help"} & set(given):
        print(f"usage: {USAGE}\nsettings: see fedklpr_jax/config.py")
        return 0
    command = shlex.join([*([INSTALLED] if installed else ["python", "experiments/run.py"]), *given])
    try:
        config = parse(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def job() -> None:
        # Imported late, so that a typing error is answered at once.
        from fedklpr_jax import console, train

        train.run(config, console.Console(), command)

    return interruptible(job, lambda: f"Go on with the same command: {command}")
