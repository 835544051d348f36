"""FedRep: first the personal head on the received body, then the body below that head.

Collins, Hassani, Mokhtari, Shakkottai, "Exploiting shared representations for personalized federated learning",
ICML 2021, algorithm 1. A client's round, head h_k and body phi:

    h_k   <- some epochs of descent on L_k(h, phi)        the body frozen
    phi_k <- descent on L_k(h_k, phi)                     the head frozen
    phi   <- 1 / K sum_k phi_k                            every participant counts the same

The authors' code has equal weights on CIFAR and MNIST, n_k on FEMNIST and Sent140; ours are the algorithm's. Freezing
is of weights: batch-norm statistics are shared, follow the client's images in every epoch, and are averaged with phi,
as PyTorch's train mode would have it (the paper's networks have none). Epochs after training are in the same order.
"""

from __future__ import annotations

import jax

from fedklpr_jax.federated import Method, average_equally
from fedklpr_jax.methods.fedper import named


def make(layers: str, head_epochs: int) -> Method:
    """FedRep with the head `layers`, trained in the first `head_epochs` epochs of a round; the body in the others."""
    is_head = named(layers)

    def trains(path: str, epoch: jax.Array) -> jax.Array:
        return (epoch < head_epochs) == is_head(path)

    return Method("fedrep", is_local=is_head, trains=trains, aggregate=average_equally)
