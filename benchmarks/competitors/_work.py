"""The work that every library does alike, as a file, and how each tells its times. NumPy alone: peers have their own
Python."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Work(NamedTuple):
    """FedAvg on image classification.

    `images` float32 [n, 28, 28], normalised; `labels` int64 [n]; client k trains on `images[rows[starts[k] :
    starts[k + 1]]]`; `participants` int [rounds, K]; every participant makes `epochs` passes in shuffled batches of
    `batch`, the last one short, by SGD with `rate` and `momentum`.
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    participants: np.ndarray
    epochs: int
    batch: int
    rate: float
    momentum: float

    def of(self, client: int) -> np.ndarray:
        """A client's rows."""
        return self.rows[self.starts[client] : self.starts[client + 1]]

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self.starts) - 1


class ReIDWork(NamedTuple):
    """FedReID with the cosine distance weight: one epoch a round at each of K clients, an evaluation of each.

    Network: ResNet of `blocks` a stage, with or without `bottleneck`, then an embedding of `embedding` numbers with
    `dropout`; `start` float32 [values] are its parameters and statistics as PyTorch lists them, kernels with their
    outputs first.

    Training: `pixels` uint8 [n, h, w, 3]; `labels` int [n], 0 to `classes[k]` - 1 at client k; `batches` int [rounds,
    sum of steps, batch], rows of `pixels`, client k's `steps[k]` after those of the clients before it; `probes` int
    [K, p], rows for the distance. Mirrored with probability `flip`, shifted by up to `pad` pixels; cross-entropy; SGD
    with Nesterov's `momentum`, `decay` as L2, and `rate`, times `backbone` in the ResNet.

    Tests: `test_pixels`, `test_ids` and `test_cams`, of each client first `tests[k, 0]` queries, then `tests[k, 1]`
    gallery pictures, features in batches of `test_batch`. `device` as PyTorch calls it.
    """

    blocks: np.ndarray
    bottleneck: bool
    embedding: int
    dropout: float
    start: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    batches: np.ndarray
    steps: np.ndarray
    probes: np.ndarray
    flip: float
    pad: int
    momentum: float
    decay: float
    rate: float
    backbone: float
    test_pixels: np.ndarray
    test_ids: np.ndarray
    test_cams: np.ndarray
    tests: np.ndarray
    test_batch: int
    device: str


def save(path: Any, work: Work | ReIDWork) -> None:
    """Writes the file that `load` reads."""
    np.savez(path, **work._asdict())


def load(path: str, kind: Any = Work) -> Any:
    """Reads a work of that kind."""
    with np.load(path) as file:
        return kind(**{name: file[name] if file[name].ndim else file[name].item() for name in kind._fields})


def main(play: Callable[[Work], tuple[Callable[[int], None], Callable[[], np.ndarray]]]) -> None:
    """`python SCRIPT WORK.npz`: plays all rounds and prints seconds of each, MB at the peak, and the model's distance
    from where it began, as JSON on the last line.

    Args:
      play: from the work a function that plays a round, given its number, until its model is there, and one that
        gives all parameters as one vector.
    """
    work = load(sys.argv[1])
    round_, parameters = play(work)
    before, seconds = parameters(), []
    for number in range(len(work.participants)):
        began = time.perf_counter()
        round_(number)
        seconds.append(time.perf_counter() - began)
    tell(seconds, parameters() - before)


def tell(seconds: list[float], moved: np.ndarray) -> None:
    """The last line of a script."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": seconds, "megabytes": peak, "moved": float(np.linalg.norm(moved))}))
