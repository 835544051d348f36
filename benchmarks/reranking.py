"""Time and memory of k-reciprocal re-ranking, here and as usually written with dense NumPy arrays and Python loops.

    python -m benchmarks.reranking
    python -m benchmarks.reranking --images 2000 5000 10000 19281

19,281 images are Market-1501's 3,368 queries and 15,913 gallery images; of other sizes the same share are queries.
Features are those of `benchmarks.clustering`. Both forms start from the same three matrices of squared distances, and
every row of the table is a process of its own. Memory is the peak of the process above what it held with the matrices
in place; "growth" is the exponent of the time from the size before to this one, "difference" the largest from ours over
a sample of queries. The dense form runs where its four float32 [n, n] arrays fit into `--memory`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks._common import alone, forget_peak, machine, print_header, print_row, process_memory, slope
from benchmarks.clustering import synthetic_features
from benchmarks.competitors import numpy_reranking
from fedklpr_jax.evaluation import euclidean_distances, rerank

K1, K2, LAMBDA = 20, 6, 0.3
QUERIES, IMAGES = 3368, 19281
SAMPLE = 64
FORMS: dict[str, Callable[..., np.ndarray]] = {"ours": rerank, "dense NumPy": numpy_reranking.rerank}
DENSE_ARRAYS = 4


class Measured(NamedTuple):
    """One row: seconds of the distances and of re-ranking them, peak bytes, a sample of the result's rows."""

    distances: float
    seconds: float
    peak: int
    rows: np.ndarray


def measure(form: str, images: int, width: int) -> Measured:
    """One form at one size, in the process it is called in: memory counts from what it holds before the call."""
    features = synthetic_features(images, width)
    queries = max(1, round(images * QUERIES / IMAGES))
    query, gallery = features[:queries], features[queries:]
    settings: dict[str, Any] = {"k1": K1, "k2": K2, "lambda_value": LAMBDA}
    warm = euclidean_distances(features[:64], features[:64])
    FORMS[form](warm, warm, warm, **settings)  # what libraries load when they are first called

    began = time.perf_counter()
    matrices = [euclidean_distances(a, b) for a, b in ((query, gallery), (query, query), (gallery, gallery))]
    made = time.perf_counter()
    before = forget_peak()
    start = time.perf_counter()
    result = FORMS[form](*matrices, **settings)
    seconds = time.perf_counter() - start
    peak = process_memory("VmHWM") - before
    return Measured(made - began, seconds, peak, result[:: max(1, queries // SAMPLE)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[5000, IMAGES], help="sizes, the smaller first")
    parser.add_argument("--memory", type=float, default=9, help="GiB that the dense form may take (default: 9)")
    parser.add_argument("--small", action="store_true", help="a tiny problem, to see that the benchmark runs")
    options = parser.parse_args(arguments)
    sizes, width = ([100, 200], 16) if options.small else (options.images, 2048)
    if min(sizes) < 2:
        parser.error("--images takes whole numbers from 2")

    print(f"{machine()}\nk1 {K1}, k2 {K2}, lambda {LAMBDA}, width {width}\n")
    print_header(
        "images", "form", "distances s", "re-ranking s", "growth", "peak MiB", "ours / time", "difference"
    )
    known: dict[str, tuple[int, float]] = {}
    for images in sizes:
        ours: Measured | None = None
        for form in FORMS:
            needed = DENSE_ARRAYS * 4 * images**2 / 2**30
            if ours and needed > options.memory:
                print_row(images, f"{form}: about {needed:.1f} GiB, more than {options.memory:g}", *[""] * 6)
                continue
            own = alone(measure, form, images, width)
            ours = ours or own
            growth = slope(*zip(known[form], (images, own.seconds), strict=True)) if form in known else None
            known[form] = images, own.seconds
            print_row(
                images,
                form,
                f"{own.distances:.2f}",
                f"{own.seconds:.2f}",
                "" if growth is None else f"{growth:.2f}",
                f"{own.peak / 2**20:.0f}",
                f"{ours.seconds / own.seconds:.2f}",
                f"{np.abs(own.rows - ours.rows).max():.0e}",
            )


if __name__ == "__main__":
    main()
