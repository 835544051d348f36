"""Time and memory of pseudo-label clustering: on the host, traced, and as usually written with dense NumPy arrays.

    python -m benchmarks.clustering
    python -m benchmarks.clustering --images 10000 19281 --memory 9

Features are synthetic, like those of a fair re-ID model before it is trained on the site: a Gaussian point per person
(17 images each on average), a weaker one per person and camera (6 cameras), and noise per image, in 2,048 dimensions;
12,936 images are Market-1501's training set, 19,281 its queries and gallery. Every row of the table is a process of its
own. Memory is the peak of the process above what it held with features, libraries and compiled program in place;
seconds leave out compilation. A form runs where its float32 [n, n] arrays fit into `--memory`: twelve of the traced
one, six of the dense. "growth" is the exponent of the time from the size before to this one, "agreement" the adjusted
Rand index with the host's clusters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import sort_graph_by_row_values

from benchmarks._common import alone, forget_peak, machine, print_header, print_row, process_memory, slope
from benchmarks.competitors import numpy_reranking
from fedklpr_jax import clustering, clustering_traced
from fedklpr_jax.reciprocal import expanded_reciprocal, query_expansion

IMAGES_PER_PERSON, CAMERAS = 17, 6
K1, K2, EPS, MIN_SAMPLES = 20, 6, 0.5, 4
STEPS = ("neighbours", "sets", "Jaccard", "DBSCAN")
# And how many float32 [n, n] arrays each holds at its peak.
FORMS = {"host": 0, "traced": 12, "dense NumPy": 6}


class Measured(NamedTuple):
    """One row: seconds, peak bytes, clusters, seconds by step where known."""

    seconds: float
    peak: int
    labels: np.ndarray
    steps: tuple[float, ...]


def synthetic_features(count: int, width: int) -> np.ndarray:
    """Float32 [count, width], made block by block so that no more memory is ever held."""
    rng = np.random.default_rng(0)
    people = max(1, count // IMAGES_PER_PERSON)
    person, camera = rng.integers(people, size=count), rng.integers(CAMERAS, size=count)
    features = rng.standard_normal((count, width), np.float32)
    features *= 1.8
    of_person = rng.standard_normal((people, width), np.float32)
    of_camera = 0.5 * rng.standard_normal((people, CAMERAS, width), np.float32)
    for block in np.array_split(np.arange(count), max(1, count // 256)):
        features[block] += of_person[person[block]] + of_camera[person[block], camera[block]]
    return features


def host_steps(features: np.ndarray) -> tuple[float, ...]:
    """Seconds of the steps of `clustering.cluster`; what is left of the whole is DBSCAN."""
    clock = [time.perf_counter()]
    points, place = clustering.distinct_rows(features)
    points /= clustering.lengths(points)
    nearest = clustering.nearest_points(points, place, min(max(K1 + 1, K2), len(features)))
    clock.append(time.perf_counter())
    members = expanded_reciprocal(nearest, K1)
    encoding = query_expansion(clustering.encode(points, place, members), nearest, K2)
    clock.append(time.perf_counter())
    graph = clustering.jaccard_graph(encoding, EPS)
    clock.append(time.perf_counter())
    graph = sort_graph_by_row_values(graph, warn_when_not_sorted=False)
    DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed").fit(graph)
    clock.append(time.perf_counter())
    return tuple(np.diff(clock).tolist())


def measure(form: str, count: int, width: int) -> Measured:
    """One form at one size, in the process it is called in: memory counts from what it holds before the call."""
    host = partial(clustering.cluster, k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES)
    features = synthetic_features(count, width)
    host(features[:64])  # what libraries load when they are first called
    on_device = jax.numpy.asarray(features)
    valid = jax.numpy.ones(count, bool)
    program = clustering_traced.cluster.lower(on_device, valid, k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES)
    traced = program.compile() if form == "traced" else None

    before = forget_peak()
    began = time.perf_counter()
    steps: tuple[float, ...] = ()
    if form == "host":
        labels = host(features)
    elif traced is not None:
        labels = np.asarray(traced(on_device, valid, eps=EPS, min_samples=MIN_SAMPLES))
    else:
        labels, steps = numpy_reranking.cluster(features, K1, K2, EPS, MIN_SAMPLES)
    seconds = time.perf_counter() - began
    after = process_memory("VmHWM")
    if form == "host":
        steps = host_steps(features)
    return Measured(seconds, after - before, labels, steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 4000, 12936], help="sizes, the smaller first")
    parser.add_argument("--memory", type=float, default=4, help="GiB that a form may take (default: 4)")
    parser.add_argument("--small", action="store_true", help="a tiny problem, to see that the benchmark runs")
    options = parser.parse_args(arguments)
    sizes, width = ([150], 16) if options.small else (options.images, 2048)

    print(f"{machine()}\nk1 {K1}, k2 {K2}, eps {EPS}, min_samples {MIN_SAMPLES}, width {width}\n")
    print_header(
        "images", "form", "seconds", "growth", *STEPS, "peak MiB", "time / host", "memory / host", "clusters",
        "agreement",
    )  # fmt: skip
    known: dict[str, tuple[int, float]] = {}
    for count in sizes:
        host: Measured | None = None
        for form, arrays in FORMS.items():
            needed = arrays * 4 * count**2 / 2**30
            if needed > options.memory:
                print_row(count, f"{form}: about {needed:.1f} GiB, more than {options.memory:g}", *[""] * 11)
                continue
            own = alone(measure, form, count, width)
            host = host or own
            growth = slope(*zip(known[form], (count, own.seconds), strict=True)) if form in known else None
            known[form] = count, own.seconds
            print_row(
                count,
                form,
                f"{own.seconds:.2f}",
                "" if growth is None else f"{growth:.2f}",
                *([f"{step:.2f}" for step in own.steps] or [""] * len(STEPS)),
                f"{own.peak / 2**20:.0f}",
                f"{own.seconds / host.seconds:.2f}",
                f"{own.peak / host.peak:.2f}" if host.peak else "",
                own.labels.max() + 1,
                f"{adjusted_rand_score(host.labels, own.labels):.4f}",
            )


if __name__ == "__main__":
    main()
