"""FedProx: clients are held near the model they received.

Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, equation 2:

    min_theta  L_k(theta) + mu / 2 * ||theta - theta_g||^2

As everywhere in federated re-ID the classifier stays at the client (ours: the paper has no re-ID), so the proximal
term runs over the trunk.
"""

from __future__ import annotations

from fedklpr_jax import losses
from fedklpr_jax.federated import Method
from fedklpr_jax.methods.fedpav import is_classifier


def make(mu: float) -> Method:
    """FedPAV plus the proximal term with weight `mu`."""
    return Method(
        "fedprox",
        is_local=is_classifier,
        penalty=lambda step: mu * losses.proximal(step.params, step.received["params"]),
    )
