"""Accuracy against bytes of the methods, several seeds each, through the real command.

    python -m benchmarks.accuracy --out runs/accuracy                                   # the synthetic default
    python -m benchmarks.accuracy --out runs/accuracy_real -- --config.data.source=folder \
        --config.data.root=../shared/data --config.data.clients=ward,viper,prid2011,mars_mini \
        --config.data.copies=1,viper:10,prid2011:10
    python -m benchmarks.accuracy --out runs/supervised --against fedpav \
        --methods fedklpr,fedpav,fedavg,fedprox,local -- --config.task.name=supervised

Runs that are finished already are read, not run again, and an interrupted one goes on. Prints a Markdown table: mean
and standard deviation over seeds of the mean over clients, at the start, before and after local fine-tuning, and
FedKLPR's mAP and bytes as a share of another method's, paired by seed, with a bootstrap interval over queries.
FedAvg + fine-tuning is the "after" column of FedAvg.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import ROOT, finished_summary, machine, print_header, print_row, run_command, spread
from fedklpr_jax.evaluation.bootstrap import paired_ratio_interval

METHODS = ("fedklpr", "fedcapr", "fedavg", "local")


def finished_run(method: str, seed: int, out: Path, extra: list[str]) -> dict[str, Any]:
    """`summary.json` of one run, made first if it is not there."""
    directory = out / f"{method}-{seed}"
    summary = finished_summary(directory)
    if summary is None:
        print(f"{method}, seed {seed}", file=sys.stderr, flush=True)
        command = run_command(
            f"--config={ROOT / 'experiments' / method}.py", f"--config.out={directory}", f"--config.seed={seed}", *extra
        )
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = finished_summary(directory)
        assert summary is not None, f"{directory}: a run that ended well left no report"
    return summary


def precisions(summary: dict[str, Any], stage: str) -> list[np.ndarray]:
    """Average precision of each query, one array a client (NaN = no match), `before` or `after` local fine-tuning."""
    key = {"before": "average_precisions", "after": "average_precisions_after"}[stage]
    return [np.array(values, float) for values in summary[key].values()]


def table(results: dict[str, list[dict[str, Any]]], against: str) -> None:
    """Prints the results, a row a method, and the comparison of FedKLPR with the method `against`."""
    print_header(
        "method", "mAP start", "Rank-1", "mAP", "mINP", "Rank-1 after", "mAP after", "density", "MB", "saving %",
        "seconds",
    )  # fmt: skip
    for method, runs in results.items():
        savings = [100 * run["saving"] for run in runs if run["saving"] is not None]
        print_row(
            method,
            spread([100 * run["start"]["mean"]["map"] for run in runs]),
            *(spread([100 * run["mean"][key] for run in runs]) for key in ("rank1", "map", "minp")),
            *(spread([100 * run["after"]["mean"][key] for run in runs]) for key in ("rank1", "map")),
            spread([run["mean"]["density"] for run in runs], 2),
            spread([run["bytes"]["total"] / 1e6 for run in runs]),
            spread(savings) if savings else "nothing sent",
            spread([run["seconds"] for run in runs], 0),
        )
    if "fedklpr" in results and against in results:
        ours, theirs = results["fedklpr"], results[against]
        shares = [a["bytes"]["total"] / b["bytes"]["total"] for a, b in zip(ours, theirs, strict=True)]
        texts = []
        for stage in ("before", "after"):
            ratio = paired_ratio_interval([precisions(r, stage) for r in ours], [precisions(r, stage) for r in theirs])
            texts.append(
                f"mAP x {ratio.ratio:.3f} {stage} (95 % interval over queries {ratio.low:.3f} to {ratio.high:.3f})"
            )
        print(
            f"\nfedklpr against {against}, paired by seed: {'; '.join(texts)}; bytes "
            f"{100 * (1 - np.mean(shares)):.1f} % fewer "
            f"({', '.join(f'{100 * (1 - share):.1f}' for share in shares)} by seed)"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, runs what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--against", default="fedcapr", help="the method that FedKLPR is compared with")
    parser.add_argument("extra", nargs="*", help="settings for every run, after --")
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    methods = options.methods.split(",")
    runs = {(m, s): finished_run(m, s, options.out, options.extra) for s in seeds for m in methods}
    print(f"{machine()}; seeds {options.seeds}; {' '.join(options.extra) or 'synthetic default'}\n")
    table({method: [runs[method, seed] for seed in seeds] for method in methods}, options.against)


if __name__ == "__main__":
    main()
