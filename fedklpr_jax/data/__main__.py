"""Says what data sets a folder holds and what of them is missing, and writes them as TensorFlow Datasets keeps them.

    python -m fedklpr_jax.data check DIR
    python -m fedklpr_jax.data prepare DIR --out TFDS_DIR [--clients ward,viper]

DIR is a data set in one of the layouts of docs/data.md, or a folder of several. `check` reads names, no pictures: those
that do not decode are told when a run reads them. `prepare` decodes every picture once, leaves out those that cannot
be, and writes TFDS_DIR/reid_folder/NAME: whole or not at all, and what is there already is left as it is. The exit code
is 2 where a set cannot be used, else 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import rich.console
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedklpr_jax.data.check import Report, data_sets, report
from fedklpr_jax.data.finding import Found, opened_site
from fedklpr_jax.data.folder import check_names
from fedklpr_jax.data.listing import shown
from fedklpr_jax.errors import InputError
from fedklpr_jax.help_text import Paragraphs

_TITLES = ("Persons", "published", "Images", "published", "Cameras", "published")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m fedklpr_jax.data", description=__doc__, formatter_class=Paragraphs)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("folder", metavar="DIR", type=Path, help="a data set, or a folder of several")
    commands.add_parser("check", parents=[folder], help="count what a folder holds, beside what is published")
    prepare = commands.add_parser("prepare", parents=[folder], help="write what a folder holds as TFDS sets")
    prepare.add_argument("--out", metavar="TFDS_DIR", type=Path, required=True, help="the folder of prepared sets")
    prepare.add_argument("--clients", metavar="NAMES", default="", help="comma-separated; all sets if left out")
    given = parser.parse_args(arguments)
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    try:
        sets, others = data_sets(given.folder)
        if given.command == "prepare":
            sets, others = _chosen(given.folder, [name for name in given.clients.split(",") if name], sets, others)
    except InputError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 2
    status = 0
    for found in sets:
        try:
            if given.command == "check":
                _show(console, report(found))
            else:
                _prepare(console, found, given.out)
        except InputError as error:
            print(f"error: {shown(str(error))}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            print(f"stopped at {shown(found.folder.name)}; the same command goes on", file=sys.stderr)
            return 130
    for text in others:
        console.print(f"passed over: {text}", soft_wrap=True)
    return status


def _chosen(
    root: Path, names: Sequence[str], sets: Sequence[Found], others: Sequence[str]
) -> tuple[list[Found], list[str]]:
    """The sets of these names, all where there are none, and a line for each folder passed over that was not named."""
    by_name = {found.folder.name: found for found in sets}
    check_names(root, names, by_name, {})
    return ([by_name[name] for name in names], []) if names else (list(sets), list(others))


def _prepare(console: rich.console.Console, found: Found, out: Path) -> None:
    # Imports TensorFlow Datasets, which takes half a second.
    import absl.logging

    from fedklpr_jax.data.preparing import prepare

    absl.logging.set_verbosity(absl.logging.ERROR)
    with opened_site(found) as (listed, _):
        total = len(listed.pictures)
    columns = (
        TextColumn("{task.description}", markup=False), MofNCompleteColumn(), BarColumn(bar_width=16),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    name = shown(found.folder.name)
    screen = rich.console.Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(name, total=total)
        made = prepare(found, out, lambda: progress.advance(task))
    counts = ", ".join(f"{count:,} {split}" for split, count in made.counts.items())
    console.print(f"{name}: {counts}{' (there already)' if made.before else ''}, in {made.place}", soft_wrap=True)
    if made.refused:
        console.print(f"  {len(made.refused):,} files left out, the first of them: {made.refused[0]}", soft_wrap=True)


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
