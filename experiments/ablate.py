"""The ablation of FedKLPR's open choices ([C] in `fedklpr_jax/config.py`), one factor at a time from the defaults.

    python experiments/ablate.py --out runs/ablation                             # stage 1: every row, one seed
    python experiments/ablate.py --out runs/ablation --best 6                    # and the best rows with three seeds
    taskset -c 0 python experiments/ablate.py --out runs/ablation --part 1/2     # half of the runs, on one core

Runs that are finished already are read, not run again, and an interrupted one goes on. Rows with the same settings
share their runs. The best rows are chosen by validation score alone: test numbers are shown, never used. Prints a
table and writes it and a figure of each stage into the output folder: of whatever is finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

# So that the command works from any folder of a clone, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _ablation as shown  # noqa: E402
from benchmarks import _runs  # noqa: E402
from benchmarks._ablation import BASE, REFERENCE, SEEDS, Numbers, Results, Row  # noqa: E402
from benchmarks._ablation_rows import factors  # noqa: E402
from benchmarks._common import ROOT, spread  # noqa: E402
from benchmarks._runs import (  # noqa: E402
    Job,
    Parser,
    arguments,
    check_settings,
    count,
    finished_summary,
    make_folder,
    markers,
    part,
)
from benchmarks._runs import execute as run_jobs  # noqa: E402
from fedklpr_jax.cli import parse  # noqa: E402
from fedklpr_jax.config import flat, resolved, validate  # noqa: E402
from fedklpr_jax.errors import InputError, status_of  # noqa: E402
from fedklpr_jax.help_text import Paragraphs  # noqa: E402
from fedklpr_jax.metrics import write_atomically  # noqa: E402

# The development federation: people and sites that no published number of this repository is measured on.
CLIENTS = "office,arena,harbour"
ROUNDS = 6
DEVELOPMENT = {"data.source": "synthetic", "data.clients": CLIENTS, "rounds": ROUNDS, "eval.every": ROUNDS}
DATA_SEED = 100

BEGIN, END = markers("ablation")
between_markers = partial(_runs.between_markers, name="ablation")


@dataclass(frozen=True)
class Plan:
    """The runs of an ablation, and the rows that need them.

    Attributes:
      out: directory of the runs.
      start: arguments that all runs share.
      rows: what to run and show, the base first.
      configs: per owner of runs its configuration at the first seed.
      claims: per group what it tests.
    """

    out: Path
    start: tuple[str, ...]
    rows: tuple[Row, ...]
    configs: Mapping[str, ConfigDict]
    claims: Mapping[str, str]

    @property
    def owners(self) -> dict[str, Row]:
        """The first row of each set of runs."""
        found: dict[str, Row] = {}
        for row in self.rows:
            found.setdefault(row.owner, row)
        return found

    def directory(self, owner: str, seed: int) -> Path:
        """Where a run lies."""
        return self.out / f"{owner}-{seed}"

    def first_runs(self) -> list[tuple[str, int]]:
        """Stage 1: the base with every seed, each other row with the first."""
        return [(owner, seed) for owner in self.owners for seed in (SEEDS if owner == BASE else SEEDS[:1])]


def seeded(config: ConfigDict, seed: int) -> ConfigDict:
    """The same run on another drawn federation with another seed."""
    config = config.copy_and_resolve_references()
    config.seed, config.data.seed = seed, DATA_SEED + seed
    return config


def make_plan(out: Path, names: Sequence[str], extra: Sequence[str]) -> Plan:
    """The ablation of the rows called `names`, or of all if there are none; the base belongs to it in any case.

    Raises:
      InputError: an unknown row, or a bad setting in `extra`.
    """
    start = (f"--config={ROOT / 'experiments' / 'fedklpr.py'}", *arguments(DEVELOPMENT), *extra)
    table = factors(parse(start).method.kll.weight)
    rows: list[Row] = []
    configs: dict[str, ConfigDict] = {}
    first: dict[str, str] = {}
    for group, (_, made) in table.items():
        for name, changes in made.items():
            config = parse([*start, *arguments(changes)])
            validate(config)
            config = seeded(resolved(config), SEEDS[0])
            owner = first.setdefault(json.dumps(flat(config), sort_keys=True), name)
            configs.setdefault(owner, config)
            rows.append(Row(name, group, changes, owner))
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise InputError(f"--rows: there is no row {name!r}; there are {', '.join(known)}")
    chosen = tuple(row for row in rows if not names or row.name in (BASE, *names))
    return Plan(out, start, chosen, configs, {group: claim for group, (claim, _) in table.items()})


def read_results(plan: Plan) -> dict[str, dict[int, Numbers]]:
    """The numbers of the finished runs of the plan's rows, and of the reference.

    Raises:
      InputError: a finished run has other settings than the plan.
    """
    results: dict[str, dict[int, Numbers]] = {}
    for owner in dict.fromkeys((*plan.owners, REFERENCE)):
        results[owner] = {}
        for seed in SEEDS:
            directory = plan.directory(owner, seed)
            numbers = shown.read_result(directory)
            if numbers is not None:
                check_settings(directory, seeded(plan.configs[owner], seed))
                results[owner][seed] = numbers
    return results


def execute(plan: Plan, runs: Sequence[tuple[str, int]], workers: int, seconds: float) -> list[str]:
    """Runs what is not finished; returns a line for each that did not end well."""
    jobs = []
    for owner, seed in runs:
        directory = plan.directory(owner, seed)
        place = {"seed": seed, "data.seed": DATA_SEED + seed, "out": directory}
        settings = (*plan.start, *arguments(plan.owners[owner].changes), *arguments(place))
        if finished_summary(directory) is None:
            jobs.append(Job(f"{owner}, seed {seed}", directory, settings))
    problems = []
    with closing(run_jobs(jobs, workers, seconds)) as news:
        for event in news:
            if event.kind == "started":
                print(event.job.name, file=sys.stderr, flush=True)
            elif event.problem:
                problems.append(event.problem)
    return problems


def finalists(plan: Plan, results: Results, best: int) -> list[Row]:
    """The base and the `best` other rows of stage 1 by validation score."""
    ranked = [owner for owner in shown.ranking(results) if owner in plan.owners]
    return [plan.owners[owner] for owner in (BASE, *ranked[:best])]


def report(plan: Plan, results: Results, last: Sequence[Row]) -> str:
    """Both tables with what one must know to read them, in Markdown; `last` are the rows of stage 2, if any."""
    config = plan.configs[BASE]
    scores = shown.over_seeds(results, BASE, "validation", SEEDS).values()
    text = [
        f"Development federation: synthetic sites {config.data.clients.replace(',', ', ')} (`data.seed` {DATA_SEED} + "
        f"seed), {config.rounds} rounds, {config.task.name} task. Base: the defaults, with `prune.step` "
        f"{config.method.prune.step:g} and `prune.target` {config.method.prune.target:g}; validation mAP over seeds "
        f"{', '.join(map(str, SEEDS))}: {spread([100 * score for score in scores])} %. `delta` is in points "
        "against the base of the same seed; ≈ marks one inside the standard deviation of the base's seeds: no "
        "difference. Test mAP is shown and was not used.",
        f"**Stage 1**, seed {SEEDS[0]}:",
        shown.table(results, plan.rows, SEEDS[:1], plan.claims),
    ]
    if last:
        head = f"**Stage 2**, the best of stage 1 by validation mAP, mean ± standard deviation of {len(SEEDS)} seeds:"
        text += [head, shown.table(results, last, SEEDS)]
    return "\n\n".join(text)


def _options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="ablate.py", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--rows", default="", help="comma-separated; all if left out (the base always)")
    parser.add_argument("--best", type=count, default=0, help="stage 2: this many rows with three seeds")
    parser.add_argument("--part", type=part, default=(1, 1), help="i/n: only every n-th run from the i-th")
    parser.add_argument("--workers", type=count, default=1, help="runs at a time")
    parser.add_argument("--seconds", type=count, default=600, help="a longer run is stopped, to go on later")
    parser.add_argument("--write", type=Path, help=f"page to put the tables into, between {BEGIN} and {END}")
    parser.add_argument("extra", nargs="*", help="settings for every run, after --: --config.rounds=3")
    options = parser.parse_args(given)
    for name in ("workers", "seconds"):
        if not getattr(options, name):
            raise InputError(f"--{name}: 0 is not allowed; give a whole number from 1")
    return options


def ablate(options: argparse.Namespace) -> int:
    """Runs what is missing and shows what is finished; returns 1 if a run failed or stage 2 cannot start yet.

    Raises:
      InputError: bad options; nothing was run then.
    """
    plan = make_plan(options.out, [name for name in options.rows.split(",") if name], options.extra)
    if options.write:
        between_markers(options.write, "")
    read_results(plan)
    make_folder(plan.out)
    first, parts = options.part

    def run(runs: list[tuple[str, int]]) -> list[str]:
        return execute(plan, runs[first - 1 :: parts], options.workers, options.seconds)

    problems = run(plan.first_runs())
    last: list[Row] = []
    if options.best:
        results = read_results(plan)
        waiting = [f"{owner}-{seed}" for owner, seed in plan.first_runs() if seed not in results[owner]]
        if waiting:
            problems.append(f"stage 2 needs all of stage 1; not finished: {', '.join(waiting)}")
        else:
            last = finalists(plan, results, options.best)
            problems += run([(row.owner, seed) for row in last[1:] for seed in SEEDS[1:]])
    results = read_results(plan)
    text = report(plan, results, last)
    print(text)
    write_atomically(plan.out / "ablation.md", f"{text}\n".encode())
    for number, rows, seeds in ((1, plan.rows, SEEDS[:1]), (2, last, SEEDS)):
        if rows:
            picture = shown.figure(results, rows, seeds, f"Ablation, stage {number}: accuracy against bytes")
            write_atomically(plan.out / f"stage{number}.png", picture)
    if options.write:
        write_atomically(options.write, between_markers(options.write, text).encode())
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


def main(given: Sequence[str] | None = None) -> int:
    """The whole command; returns the exit status: 0 done, 1 some run is missing, 2 bad input (130 interrupted)."""
    return status_of(lambda: ablate(_options(given)), interrupted="the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
