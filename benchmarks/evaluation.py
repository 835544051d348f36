"""Time of an evaluation at Market-1501's size, against the distance product and an argsort of every query's row.

    python -m benchmarks.evaluation --labels ../shared/data/market1501_labels

Features are synthetic: a point per identity plus noise. Labels are Market-1501's own (3,368 queries, 15,913 gallery
images once the junk is left out) if `--labels` names the folder that holds `labels.npz`, else random ones of that size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._common import machine, print_header, print_row
from fedklpr_jax.data.site import Images
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation import euclidean_distances, evaluate_ranking
from fedklpr_jax.evaluation.features import evaluate_features

QUERIES, GALLERY, PEOPLE, CAMERAS = 3368, 15913, 751, 6


class Labels(NamedTuple):
    """Identities and cameras, int [q] and [g], in the order that `evaluate_ranking` takes them."""

    query_ids: np.ndarray
    gallery_ids: np.ndarray
    query_cams: np.ndarray
    gallery_cams: np.ndarray


def read_labels(folder: Path) -> Labels:
    """Market-1501's query and gallery labels from `folder/labels.npz`, without the junk images (-1)."""
    path = folder / "labels.npz"
    if not path.is_file():
        raise InputError(f"--labels: {path} does not exist; give the folder that holds labels.npz, or leave it out")
    with np.load(path) as stored:
        kept = stored["test_pid"] != -1
        return Labels(stored["query_pid"], stored["test_pid"][kept], stored["query_cam"], stored["test_cam"][kept])


def random_labels(rng: np.random.Generator) -> Labels:
    """Labels of Market-1501's size, uniform over people and cameras."""
    return Labels(
        rng.integers(PEOPLE, size=QUERIES),
        rng.integers(PEOPLE, size=GALLERY),
        rng.integers(CAMERAS, size=QUERIES),
        rng.integers(CAMERAS, size=GALLERY),
    )


def synthetic_features(labels: Labels, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Float32 [q, width] and [g, width]; the noise is chosen so that retrieval is neither perfect nor hopeless."""
    centres = rng.normal(size=(int(max(labels.query_ids.max(), labels.gallery_ids.max())) + 1, width))

    def around(ids: np.ndarray) -> np.ndarray:
        return (centres[ids] + 2.5 * rng.normal(size=(len(ids), width))).astype(np.float32)

    return around(labels.query_ids), around(labels.gallery_ids)


def argsort_mean_ap(distances: np.ndarray, labels: Labels) -> float:
    """Plain mAP: sort the whole gallery for every query, drop the junk, accumulate hits."""
    aps = []
    for row, person, camera in zip(distances, labels.query_ids, labels.query_cams, strict=True):
        order = np.argsort(row)
        same = labels.gallery_ids[order] == person
        hits = same[~(same & (labels.gallery_cams[order] == camera))]
        if hits.any():
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            aps.append(precision[hits].mean())
    return float(np.mean(aps))


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Best seconds of `repeats` calls, and the last result."""
    best, result = np.inf, None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, help="folder with Market-1501's labels.npz (default: random labels)")
    parser.add_argument("--width", type=int, default=2048, help="length of a feature (default: 2048)")
    parser.add_argument("--repeats", type=int, default=3, help="the best of this many runs is shown (default: 3)")
    options = parser.parse_args(arguments)
    if options.width < 1 or options.repeats < 1:
        parser.error("--width and --repeats take whole numbers from 1")

    rng = np.random.default_rng(0)
    try:
        labels = read_labels(options.labels) if options.labels else random_labels(rng)
    except InputError as mistake:
        parser.error(str(mistake))
    query, gallery = synthetic_features(labels, options.width, rng)
    product_time, distances = timed(lambda: euclidean_distances(query, gallery), options.repeats)
    ranking_time, ranking = timed(lambda: evaluate_ranking(distances, *labels), options.repeats)
    people = [Images(np.empty(0), ids, cams, ()) for ids, cams in
              ((labels.query_ids, labels.query_cams), (labels.gallery_ids, labels.gallery_cams))]  # fmt: skip
    whole_time, whole = timed(lambda: evaluate_features(query, gallery, *people), options.repeats)
    plain_time, plain_map = timed(lambda: argsort_mean_ap(distances, labels), options.repeats)

    source = "Market-1501 labels" if options.labels else "random labels"
    print(f"{machine()}\n{len(query)} queries x {len(gallery)} gallery images, {source}, width {options.width}:\n")
    print_header("step", "seconds", "of the product", "mAP")
    for step, seconds, score in (
        ("distance product", product_time, None),
        ("CMC, mAP, mINP of the distances", ranking_time, ranking.mean_ap),
        ("product, CMC, mAP, mINP and lists of 10, by blocks", whole_time, whole.metrics["map"]),
        ("argsort of every row of the distances, mAP", plain_time, plain_map),
    ):
        print_row(step, f"{seconds:.2f}", f"{seconds / product_time:.2f}", "" if score is None else f"{score:.6f}")


if __name__ == "__main__":
    main()
