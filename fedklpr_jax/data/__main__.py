"""Says what data sets a folder holds and what of them is missing.

    python -m fedklpr_jax.data check DIR

DIR is a data set in one of the layouts of docs/data.md, or a folder of several. Names are read, pictures are not: those
that do not decode are told when a run reads them. The exit code is 2 where a set cannot be used, else 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import rich.console
from rich import box
from rich.table import Table
from rich.text import Text

from fedklpr_jax.data.check import Report, data_sets, report
from fedklpr_jax.data.listing import shown
from fedklpr_jax.errors import InputError

_TITLES = ("Persons", "published", "Images", "published", "Cameras", "published")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m fedklpr_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="count what a folder holds, beside what is published")
    check.add_argument("folder", metavar="DIR", type=Path, help="a data set, or a folder of several")
    given = parser.parse_args(arguments)
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    try:
        sets, others = data_sets(given.folder)
    except InputError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 2
    status = 0
    for found in sets:
        try:
            _show(console, report(found))
        except InputError as error:
            print(f"error: {shown(str(error))}", file=sys.stderr)
            status = 2
    for text in others:
        console.print(f"passed over: {text}", soft_wrap=True)
    return status


def _show(console: rich.console.Console, found: Report) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=found.headline, title_justify="left", title_style="bold")
    table.add_column("Split", no_wrap=True)
    for title in _TITLES:
        table.add_column(title, justify="right", no_wrap=True)
    for part in found.parts:
        counts = (part.people, part.images, part.cameras)
        pairs = zip(counts, part.published, strict=True)
        cells = [f"{number:,}" if number is not None else "" for pair in pairs for number in pair]
        table.add_row(*map(Text, [part.title, *cells]))
    console.print(table)
    for note in found.notes:
        console.print(f"  {note}", soft_wrap=True)
    console.print()


if __name__ == "__main__":
    sys.exit(main())
