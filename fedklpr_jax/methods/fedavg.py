"""FedAvg: everything is shared and averaged by the number of images.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017, algorithm 1:

    theta <- sum_k n_k / n * theta_k

On re-ID there is one classifier over the union of all clients' identities, averaged and counted like the rest.
FedAvg + fine-tuning, the baseline every personalised method has to beat, is this method's "after" column.
"""

from __future__ import annotations

from fedklpr_jax.federated import Method


def make() -> Method:
    """FedAvg is what every hook does by default."""
    return Method("fedavg")
