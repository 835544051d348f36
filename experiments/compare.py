"""Methods compared: every method with every seed on every data set, in one command that can be interrupted.

    python experiments/compare.py --out runs/comparison --methods fedklpr,fedcapr,fedavg,local --against fedcapr
    python experiments/compare.py --out runs/comparison --methods fedklpr,fedpav --seeds 0,1,2 \\
        --data synthetic --data "real: --config.data.source=folder --config.data.root=../shared/data" \\
        -- --config.task.name=supervised

A method is a configuration in `experiments/` by name, or any other one by its path. A data set is a name and settings;
`{seed}` in them is the run's seed. A run lies in OUT/DATA/METHOD-SEED, what it says in a log beside it. Runs that are
finished are read, not run again; interrupted ones go on; one that fails is told and the others go on. Prints the tables
and keeps them in OUT/comparison.md (with figures) and OUT/comparison.csv after every run: of whatever is finished.
FedAvg + fine-tuning, the "after" of FedAvg, is a row of every table, so FedAvg is always among the methods.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# So that the command works from any folder of a clone, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _comparison as shown  # noqa: E402
from benchmarks import _comparison_figures as figures  # noqa: E402
from benchmarks._comparison import Result, Results  # noqa: E402
from benchmarks._comparison_plan import Plan, differences, make_plan  # noqa: E402
from benchmarks._comparison_progress import run_all  # noqa: E402
from benchmarks._runs import Parser, between_markers, count, make_folder, markers, part  # noqa: E402
from fedklpr_jax.errors import InputError, status_of  # noqa: E402
from fedklpr_jax.help_text import Paragraphs  # noqa: E402
from fedklpr_jax.metrics import write_atomically  # noqa: E402

MARK = "comparison"
FIGURES = {
    "bytes": (figures.front_figure, "accuracy against megabytes"),
    "rounds": (figures.rounds_figure, "accuracy per round"),
    "clients": (figures.clients_figure, "accuracy of every client"),
}


def read_results(plan: Plan, known: dict[Path, Result]) -> dict[str, Results]:
    """Per data set the finished runs of every method; a row of FedAvg + fine-tuning below FedAvg.

    Args:
      plan: of the comparison.
      known: what was read before, by directory; filled further.
    """
    data: dict[str, dict[str, list[Result]]] = {name: {} for name in plan.data}
    for run in sorted(plan.runs, key=lambda run: plan.methods.index(run.method)):
        directory = run.job.directory
        if directory not in known and (result := shown.read_result(run.method, run.seed, directory)):
            known[directory] = result
        found = [known[directory]] if directory in known else []
        results = data[run.data]
        results.setdefault(run.method, []).extend(found)
        if run.baseline:
            tuned = [result for result in map(shown.fine_tuned, found) if result]
            results.setdefault(f"{run.method}{shown.FINE_TUNED}", []).extend(tuned)
    return dict(data)


def section(plan: Plan, name: str, results: Results, against: str) -> list[str]:
    """What the page says of one data set: paragraphs in Markdown."""
    config = next(run for run in plan.runs if run.data == name)
    settings = shlex.join(plan.data[name])
    text = [
        f"**{name}**{f' (`{settings}`)' if settings else ''}, {config.settings['task.name']} task, seeds "
        f"{', '.join(map(str, plan.seeds))}:",
        shown.table(results, plan.seeds),
    ]
    other = differences([run for run in plan.runs if (run.data, run.seed) == (name, plan.seeds[0])])
    if other:
        lines = [
            f"{method} " + ", ".join(f"`{path}={value}`" for path, value in changes.items())
            for method, changes in other.items()
        ]
        text.append(f"Settings other than {plan.methods[0]}'s, besides those of `method`: {'; '.join(lines)}.")
    failures = [
        f"{method}, seed {run.seed}: {failure}"
        for method, runs in results.items() for run in runs for failure in run.summary.get("failures") or []
    ]  # fmt: skip
    if failures:
        text.append(f"Failed by the run's own judgement: {'; '.join(failures)}.")
    paired = shown.against_table(results, against) if against else ""
    return text + ([f"Paired by seed; the interval is a bootstrap over queries:\n\n{paired}"] if paired else [])


def report(plan: Plan, data: dict[str, Results], against: str) -> dict[str, list[str]]:
    """The paragraphs of the page, those of each data set under its name, those on all of them under ""."""
    text = {name: section(plan, name, results, against) for name, results in data.items()}
    unseen = shown.unseen_table(data)
    head = (
        "Per cent, mean ± standard deviation over seeds of the mean over clients. Without a word behind it a metric is "
        "of the downloaded model before local fine-tuning, \"after\" of the one after it. MB: both directions, all "
        "clients."
    )
    return {"": [head], **text} | ({"unseen sites": [unseen]} if unseen else {})


def write(plan: Plan, known: dict[Path, Result], options: argparse.Namespace) -> str:
    """Writes tables, figures and CSV of what is finished; returns the tables."""
    data = read_results(plan, known)
    text = report(plan, data, options.against)
    pictured = {name: list(paragraphs) for name, paragraphs in text.items()}
    for name, results in data.items():
        for kind, (figure, words) in FIGURES.items():
            picture = figure(results, f"{name}: {words}")
            if picture:
                write_atomically(plan.out / f"{name}-{kind}.png", picture)
                pictured[name].append(f"![{name}: {words}]({name}-{kind}.png)")
    write_atomically(plan.out / "comparison.md", f"{_joined(pictured)}\n".encode())
    write_atomically(plan.out / "comparison.csv", shown.csv_text(data, plan.out).encode())
    if options.write:
        write_atomically(options.write, between_markers(options.write, _joined(text), MARK).encode())
    return _joined(text)


def _joined(text: dict[str, list[str]]) -> str:
    return "\n\n".join(paragraph for paragraphs in text.values() for paragraph in paragraphs)


def _options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="compare.py", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of what is written")
    parser.add_argument("--methods", required=True, help="comma-separated names of experiments/*.py, or paths")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--data", action="append", default=[], help="NAME or 'NAME: SETTINGS'; may be repeated")
    parser.add_argument("--against", default="", help="method that the others are compared with, paired by seed")
    parser.add_argument("--part", type=part, default=(1, 1), help="i/n: only every n-th run from the i-th")
    parser.add_argument("--workers", type=count, default=1, help="runs at a time")
    page = " and ".join(markers(MARK))
    parser.add_argument("--write", type=Path, help=f"page to put the tables into, between {page}")
    parser.add_argument("extra", nargs="*", help="settings for every run, after --: --config.rounds=3")
    options = parser.parse_args(given)
    if not options.workers:
        raise InputError("--workers: 0 is not allowed; give a whole number from 1")
    return options


def compare(options: argparse.Namespace) -> int:
    """Runs what is missing and shows what is finished; returns 1 if a run did not end well.

    Raises:
      InputError: bad options; nothing was run then.
    """
    plan = make_plan(options.out, options.methods, options.seeds, options.data, options.extra)
    if options.against and options.against not in plan.methods:
        raise InputError(f"--against: {options.against!r} is not among the methods {', '.join(plan.methods)}")
    if options.write:
        between_markers(options.write, "", MARK)
    known: dict[Path, Result] = {}
    read_results(plan, known)
    make_folder(plan.out)
    first, parts = options.part
    runs = plan.runs[first - 1 :: parts]
    failed = run_all(runs, options.workers, lambda: write(plan, known, options))
    print(write(plan, known, options))
    if failed:
        print(f"not finished: {failed} of {len(runs)} runs; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def main(given: Sequence[str] | None = None) -> int:
    """The whole command; returns the exit status: 0 done, 1 some run is missing, 2 bad input (130 interrupted)."""
    return status_of(lambda: compare(_options(given)), interrupted="the same command goes on from here")


if __name__ == "__main__":
    # A command that is told to end ends its runs too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
