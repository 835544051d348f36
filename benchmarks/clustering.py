"""Time and memory of pseudo-label clustering: on the host, traced, and as usually written with dense NumPy arrays.

    python -m benchmarks.clustering

Features are synthetic, like those of a fair re-ID model before it is trained on the site: a Gaussian point per person
(17 images each on average), a weaker one per person and camera (6 cameras), and noise per image, in 2,048 dimensions;
12,936 images are Market-1501's training set. Every row of the table is a process of its own. Memory is the peak of the
process above what it held with features, libraries and compiled program in place (Linux only); seconds leave out
compilation. The traced form runs where twelve float32 [n, n] arrays fit into `--memory`. "agreement" is the adjusted
Rand index with the host's clusters.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import sort_graph_by_row_values

from benchmarks._common import machine, print_header, print_row
from fedklpr_jax import clustering, clustering_traced
from fedklpr_jax.reciprocal import expanded_reciprocal, query_expansion

IMAGES_PER_PERSON, CAMERAS = 17, 6
K1, K2, EPS, MIN_SAMPLES = 20, 6, 0.5, 4
TRACED_ARRAYS = 12
STEPS = ("neighbours", "sets", "Jaccard", "DBSCAN")
FORMS = ("host", "traced", "dense NumPy")


class Measured(NamedTuple):
    """One row: seconds, peak bytes (None where the system does not tell), clusters, seconds by step where known."""

    seconds: float
    peak: int | None
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


def mutual(ranking: np.ndarray, i: int, k: int) -> np.ndarray:
    """The k-reciprocal neighbours of image i, itself among them, from the whole ranking [n, n]."""
    forward = ranking[i, : k + 1]
    return forward[(ranking[forward, : k + 1] == i).any(axis=1)]


def dense_numpy(features: np.ndarray) -> tuple[np.ndarray, tuple[float, ...]]:
    """The same clusters with [n, n] arrays, every row sorted and Python loops over images, and seconds by step."""
    clock = [time.perf_counter()]
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 2 - 2 * features @ features.T
    np.fill_diagonal(distance, -1)
    ranking = np.argsort(distance, axis=1, kind="stable")
    np.fill_diagonal(distance, 0)
    clock.append(time.perf_counter())

    size = len(features)
    encoding = np.zeros((size, size), np.float32)
    for i in range(size):
        members = candidates = mutual(ranking, i, K1)
        for candidate in candidates:
            others = mutual(ranking, candidate, round(K1 / 2))
            if 3 * len(np.intersect1d(others, candidates)) > 2 * len(others):
                members = np.append(members, others)
        members = np.unique(members)
        weights = np.exp(-distance[i, members])
        encoding[i, members] = weights / weights.sum()
    encoding = np.stack([encoding[row[:K2]].mean(axis=0) for row in ranking])
    clock.append(time.perf_counter())

    del ranking
    holders = [np.flatnonzero(column) for column in encoding.T]
    for i in range(size):
        shared = np.zeros(size, np.float32)
        for column in np.flatnonzero(encoding[i]):
            having = holders[column]
            shared[having] += np.minimum(encoding[i, column], encoding[having, column])
        distance[i] = np.maximum(1 - shared / (2 - shared), 0)
    clock.append(time.perf_counter())
    labels = DBSCAN(eps=EPS, min_samples=MIN_SAMPLES, metric="precomputed").fit_predict(distance)
    clock.append(time.perf_counter())
    return labels, tuple(np.diff(clock).tolist())


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


def peak_memory() -> int | None:
    """The most memory this process has held, in bytes; None where /proc does not tell."""
    known = Path("/proc/self/status")
    lines = known.read_text().splitlines() if known.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def measure(form: str, count: int, width: int) -> Measured:
    """One form at one size, in the process it is called in: memory counts from the peak before the call."""
    host = partial(clustering.cluster, k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES)
    features = synthetic_features(count, width)
    host(features[:64])  # what libraries load when they are first called
    on_device = jax.numpy.asarray(features)
    valid = jax.numpy.ones(count, bool)
    program = clustering_traced.cluster.lower(on_device, valid, k1=K1, k2=K2, eps=EPS, min_samples=MIN_SAMPLES)
    traced = program.compile() if form == "traced" else None

    before = peak_memory()
    began = time.perf_counter()
    steps: tuple[float, ...] = ()
    if form == "host":
        labels = host(features)
    elif traced is not None:
        labels = np.asarray(traced(on_device, valid, eps=EPS, min_samples=MIN_SAMPLES))
    else:
        labels, steps = dense_numpy(features)
    seconds = time.perf_counter() - began
    after = peak_memory()
    if form == "host":
        steps = host_steps(features)
    return Measured(seconds, None if before is None or after is None else after - before, labels, steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=4, help="GiB that the traced form may take (default: 4)")
    parser.add_argument("--small", action="store_true", help="a tiny problem, to see that the benchmark runs")
    options = parser.parse_args(arguments)
    sizes, width = ((150,), 16) if options.small else ((2000, 4000, 12936), 2048)

    print(f"{machine()}\nk1 {K1}, k2 {K2}, eps {EPS}, min_samples {MIN_SAMPLES}, width {width}\n")
    print_header(
        "images", "form", "seconds", *STEPS, "peak MiB", "time / host", "memory / host", "clusters", "agreement"
    )
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for count in sizes:
            host: Measured | None = None
            for form in FORMS:
                needed = TRACED_ARRAYS * 4 * count**2 / 2**30
                if form == "traced" and needed > options.memory:
                    print_row(count, f"{form}: about {needed:.1f} GiB, more than {options.memory:g}", *[""] * 10)
                    continue
                own = processes.submit(measure, form, count, width).result()
                host = host or own
                print_row(
                    count,
                    form,
                    f"{own.seconds:.2f}",
                    *([f"{step:.2f}" for step in own.steps] or [""] * len(STEPS)),
                    "" if own.peak is None else f"{own.peak / 2**20:.0f}",
                    f"{own.seconds / host.seconds:.2f}",
                    f"{own.peak / host.peak:.2f}" if own.peak and host.peak else "",
                    own.labels.max() + 1,
                    f"{adjusted_rand_score(host.labels, own.labels):.4f}",
                )


if __name__ == "__main__":
    main()
