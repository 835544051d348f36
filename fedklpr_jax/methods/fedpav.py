"""FedPAV: federated partial averaging, the identity classifier stays at the client.

Zhuang et al., "Performance optimization for federated person re-identification via benchmark analysis" (FedReID),
ACM MM 2020, algorithm 1:

    theta <- sum_k n_k / n * theta_k    over the trunk only; every client keeps its own classifier.
"""

from __future__ import annotations

from fedklpr_jax.federated import Method


def is_classifier(path: str) -> bool:
    """Leaves of the identity classifier.

    >>> is_classifier("params/classifier/kernel"), is_classifier("params/trunk/conv1/kernel")
    (True, False)
    """
    return "classifier" in path.split("/")


def make() -> Method:
    """FedAvg without the classifier."""
    return Method("fedpav", is_local=is_classifier)
