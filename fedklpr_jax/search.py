"""Finds the pictures of a folder that are most alike to one, by the network with which a client ends a run.

    python -m fedklpr_jax.search RUN --client NAME --gallery DIR --query FILE [--top 10] [--out PICTURE.png]

RUN is the folder of a run, finished or not; the newest checkpoint counts. DIR holds pictures under any names, in
folders or not; of a re-ID data set (docs/data.md) its gallery is searched. Names as in Market-1501 tell who is seen by
which camera. A picture that cannot be read is named and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedklpr_jax.errors import InputError, status_of
from fedklpr_jax.run_folder import arguments_of, model_of

if TYPE_CHECKING:
    from fedklpr_jax.searching import Ranking

_MOST_LINES = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    parser = arguments_of("search", __doc__)
    parser.add_argument("--gallery", required=True, metavar="DIR", type=Path, help="pictures to search in")
    parser.add_argument("--query", required=True, metavar="FILE", type=Path, help="picture to search for")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many to show (default 10)")
    parser.add_argument("--out", type=Path, metavar="PICTURE.png", help="where to draw query and ranked list")
    given = parser.parse_args(arguments)
    return status_of(lambda: _search(given))


def _search(given: argparse.Namespace) -> None:
    if not 1 <= given.top <= 200:
        raise InputError(f"--top: {given.top} is not allowed; give a whole number from 1 to 200")
    if given.out and (given.out.suffix != ".png" or not given.out.parent.is_dir()):
        raise InputError(f"--out: {given.out} is not allowed; give a name ending in .png in an existing folder")
    # Imported late, so that help and typing errors are answered at once.
    from fedklpr_jax import searching
    from fedklpr_jax.console import Console
    from fedklpr_jax.metrics import write_atomically

    console = Console()
    model = model_of(given.run, given.client, console)
    ranking = searching.rank(model, given.query, given.gallery, given.top, console, draw=bool(given.out))
    for text in ranking.refused[:_MOST_LINES]:
        console.line(f"left out: {text}")
    left = f", {len(ranking.refused)} left out" if ranking.refused else ""
    console.line(f"{given.query.name} among {ranking.searched} pictures{left}, by the network of {model.client} after "
                 f"{model.rounds} rounds")
    _show(ranking)
    if given.out:
        try:
            write_atomically(given.out, ranking.picture)
        except OSError as error:
            raise InputError(f"--out: {given.out} cannot be written ({error.strerror}); give another") from error
        console.line(f"wrote {given.out}")


def _show(ranking: Ranking) -> None:
    import rich.console
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    known = any(one.shown.person is not None for one in ranking.found)
    asked = ranking.query.person is not None
    for title in ("Rank", "Similarity", *(("Person", "Camera") if known else ())):
        table.add_column(title, justify="right", no_wrap=True)
    if known and asked:
        table.add_column("Same", no_wrap=True)
    table.add_column("File", overflow="fold")
    for place, one in enumerate(ranking.found):
        who = ["" if value is None else str(value) for value in (one.shown.person, one.shown.camera)]
        same = {True: "✓", False: "✗", None: ""}[ranking.hit(place)]
        path = one.shown.path if one.shown.path.isprintable() else ascii(one.shown.path)
        cells = [str(place + 1), f"{one.similarity:.3f}", *(who if known else ()), *([same] if known and asked else ())]
        table.add_row(*map(Text, [*cells, path]))
    rich.console.Console(highlight=False, markup=False, emoji=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
