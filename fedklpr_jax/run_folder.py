"""What the commands on the folder of a run share; nothing heavy is imported before their arguments are understood."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from fedklpr_jax.errors import InputError
from fedklpr_jax.help_text import Paragraphs

if TYPE_CHECKING:
    from fedklpr_jax.console import Console
    from fedklpr_jax.trained import Trained


def arguments_of(command: str, meaning: str | None) -> argparse.ArgumentParser:
    """The arguments of `python -m fedklpr_jax.<command>` that name a client's model: `run` and `client`."""
    parser = argparse.ArgumentParser(
        f"python -m fedklpr_jax.{command}", description=meaning, formatter_class=Paragraphs
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, such as runs/fedklpr")
    parser.add_argument("--client", required=True, metavar="NAME", help="whose network")
    return parser


def model_of(run: Path, client: str, console: Console) -> Trained:
    """As `trained.load`, and what is compiled for it is kept for the next time in the user's cache."""
    from fedklpr_jax import trained
    from fedklpr_jax.config import default_config
    from fedklpr_jax.train import keep_programs

    # Where there is no cache to write to, it only takes longer.
    with contextlib.suppress(InputError):
        keep_programs(default_config())
    return trained.load(run, client, console)
