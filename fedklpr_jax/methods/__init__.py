"""The methods, one file each. `make_method` is the only place that maps names and configuration to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedklpr_jax.data.scenario import edges_of
from fedklpr_jax.federated import Method
from fedklpr_jax.methods import (
    cahfp,
    centralised,
    fedavg,
    fedcapr,
    fedklpr,
    fedobp,
    fedpav,
    fedper,
    fedprox,
    fedreid,
    fedrep,
    fedureid,
    heterofl,
    local,
    lotteryfl,
    subfedavg,
)

METHODS: dict[str, Callable[..., Method]] = {
    "cahfp": lambda config: cahfp.make(
        shares=config.capacity.shares, min_channels=config.capacity.min_channels, local=config.capacity.local,
        score=config.hfp.score, refresh=config.hfp.refresh, fill=config.hfp.fill,
    ),
    "centralised": lambda config: centralised.make(),
    "fedavg": lambda config: fedavg.make(),
    "fedcapr": lambda config: fedcapr.make(config.capr.weight),
    "fedklpr": lambda config: fedklpr.make(
        kll=config.kll, klaw=config.klaw, praw=config.praw, klpwa=config.klpwa, sas=config.sas,
        prune=config.prune, crr=config.crr, bn=config.bn,
    ),
    "fedobp": lambda config: fedobp.make(
        quantile=config.obp.quantile, score=config.obp.score, ema=config.obp.ema, norm=config.obp.norm,
        classifier_only=config.obp.classifier, score_on=config.obp.score_on,
    ),
    "fedpav": lambda config: fedpav.make(),
    "fedper": lambda config: fedper.make(config.per.layers),
    "fedprox": lambda config: fedprox.make(config.prox.mu),
    "fedreid": lambda config, clients=(): fedreid.make(config.reid, edges_of(clients)),
    "fedrep": lambda config: fedrep.make(config.rep.layers, config.rep.head_epochs),
    "heterofl": lambda config: heterofl.make(
        shares=config.capacity.shares, min_channels=config.capacity.min_channels, local=config.capacity.local,
        weights=config.hetero.weights,
    ),
    "fedureid": lambda config: fedureid.make(config.ureid.mu),
    "local": lambda config: local.make(),
    "lotteryfl": lambda config: lotteryfl.make(
        local=config.lottery.local, step=config.lottery.step, start=config.lottery.start, end=config.lottery.end
    ),
    "subfedavg": lambda config: subfedavg.make(
        local=config.sub.local, step=config.sub.step, target=config.sub.target, eps=config.sub.eps,
        threshold=config.sub.threshold,
    ),
}  # fmt: skip
# Methods that ask which site a client belongs to.
PLACED = ("fedreid",)


def make_method(config: Any, clients: Sequence[str] = ()) -> Method:
    """The method named `config.name`, built from the sections of `config` (= `config.method` of a run) it reads.

    `clients` are the clients' names, by which a method with edges puts cameras of one site under one edge.

    >>> import ml_collections
    >>> make_method(ml_collections.ConfigDict({"name": "fedpav"})).is_local("params/classifier/bias")
    True
    """
    make = METHODS[config.name]
    return make(config, clients) if config.name in PLACED else make(config)
