"""FedPer: the personalisation layers stay at the client, the base layers below them are averaged.

Arivazhagan, Aggarwal, Singh, Choudhary, "Federated learning with personalization layers", arXiv 1912.00818:

    base <- sum_k n_k / n * base_k    all layers train together, every client keeps its own personal ones.

With the classifier alone this is FedPAV; the paper also keeps the last blocks of the network.
"""

from __future__ import annotations

from collections.abc import Callable

from fedklpr_jax.federated import Method


def named(layers: str) -> Callable[[str], bool]:
    """Leaves with one of the comma-separated names among the parts of their path, batch-norm statistics too.

    >>> personal = named("classifier, layer4_0")
    >>> personal("params/classifier/bias"), personal("batch_stats/trunk/layer4_0/bn1/mean")
    (True, True)
    >>> personal("params/trunk/layer4_1/conv1/kernel")
    False
    """
    names = {name.strip() for name in layers.split(",")}
    return lambda path: not names.isdisjoint(path.split("/"))


def make(layers: str) -> Method:
    """FedAvg without the personal `layers`."""
    return Method("fedper", is_local=named(layers))
