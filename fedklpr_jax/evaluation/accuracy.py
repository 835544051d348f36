"""What a classification task reports of one client's test images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Classified(NamedTuple):
    """One client's test result.

    Attributes:
      metrics: `accuracy` in [0, 1] and `images`, how many it was measured on.
      predicted: int32 [n], the class given to each test image.
      labels: int32 [n], its class.
    """

    metrics: dict[str, float]
    predicted: np.ndarray
    labels: np.ndarray


def classified(predicted: np.ndarray, labels: np.ndarray) -> Classified:
    """The share of right predictions.

    >>> classified(np.array([1, 2, 2, 0]), np.array([1, 2, 0, 0])).metrics
    {'accuracy': 0.75, 'images': 4}
    """
    metrics = {"accuracy": float(np.mean(predicted == labels)), "images": len(labels)}
    return Classified(metrics, np.asarray(predicted), np.asarray(labels))
