"""The methods, one file each. `make_method` is the only place that maps names and configuration to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedklpr_jax.federated import Method
from fedklpr_jax.methods import fedavg, fedcapr, fedklpr, fedpav, fedprox, local

METHODS: dict[str, Callable[[Any], Method]] = {
    "fedavg": lambda config: fedavg.make(),
    "fedcapr": lambda config: fedcapr.make(config.capr.weight),
    "fedklpr": lambda config: fedklpr.make(
        kll=config.kll, klaw=config.klaw, praw=config.praw, klpwa=config.klpwa, sas=config.sas,
        prune=config.prune, crr=config.crr, bn=config.bn,
    ),
    "fedpav": lambda config: fedpav.make(),
    "fedprox": lambda config: fedprox.make(config.prox.mu),
    "local": lambda config: local.make(),
}  # fmt: skip


def make_method(config: Any) -> Method:
    """The method named `config.name`, built from the sections of `config` (= `config.method` of a run) it reads.

    >>> import ml_collections
    >>> make_method(ml_collections.ConfigDict({"name": "fedpav"})).is_local("params/classifier/bias")
    True
    """
    return METHODS[config.name](config)
