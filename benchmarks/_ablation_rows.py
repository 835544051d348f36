"""The rows of the ablation: every open choice ([C] in `fedklpr_jax/config.py`) with its alternatives; the methods."""

from __future__ import annotations

from typing import Any

from benchmarks._ablation import BASE, REFERENCE


def choices(prefix: str, path: str, *values: Any) -> dict[str, dict[str, Any]]:
    """Rows that give one setting each of `values`.

    >>> choices("klaw", "method.klaw.sign", "gain")
    {'klaw-gain': {'method.klaw.sign': 'gain'}}
    """
    return {f"{prefix}-{value}": {path: value} for value in values}


def factors(kll_weight: float) -> dict[str, tuple[str, dict[str, dict[str, Any]]]]:
    """Per factor what it tests, and its rows; the values of a choice are all listed, whichever is the default."""
    bare = {"method.praw.form": "none", "method.prune.step": 0.0}
    no_recovery = {"method.crr.recover": 1.0}
    return {
        "method": ("FedKLPR against plain averaging and its base FedCAPR", {
            BASE: {}, "fedavg": {"method.name": "fedavg"}, REFERENCE: {"method.name": "fedcapr"}}),
        "unpruned": ("KLL for FedCAPR's penalty, weights n_k; then KLAW either way", {
            "kll": bare | {"method.klaw.sign": "none"}, "kll-klaw-gain": bare | {"method.klaw.sign": "gain"},
            "kll-klaw-align": bare | {"method.klaw.sign": "align"}}),
        "KLAW": ("prefer clients near the received model, or those that gained most",
                 choices("klaw", "method.klaw.sign", "align", "gain", "none")),
        "PRAW": ("favour compact models, dense ones, or neither",
                 choices("praw", "method.praw.form", "compact", "dense", "none")),
        "KLL weight": ("the KL term helps; its weight is calibrated to FedCAPR's penalty", {
            "kll-off": {"method.kll.weight": 0.0},
            "kll-third": {"method.kll.weight": round(kll_weight / 3, 4)},
            "kll-triple": {"method.kll.weight": round(kll_weight * 3, 4)}}),
        "KLL temperature": ("softness of the distributions, KLAW's too",
                            choices("temperature", "method.kll.temperature", 0.25, 0.5, 1.0)),
        "KLL direction": ("KL of received to local, or of local to received",
                          choices("direction", "method.kll.direction", "forward", "reverse")),
        "KLL space": ("softmax over features, or over similarities to the proxies",
                      choices("space", "method.kll.space", "features", "proxies")),
        "KLL reference": ("the frozen model: the masked download, or the dense global one",
                          choices("reference", "method.kll.reference", "personalised", "global")),
        "KLPWA": ("how the two weights combine",
                  choices("klpwa", "method.klpwa.form", "product", "sum")),
        "SAS": ("pruned entries are left out of the mean, or count as zeros",
                choices("sas", "method.sas.form", "skip", "zeros")),
        "CRR": ("the two checks keep accuracy while pruning", {
            "crr-both": {}, "crr-stage1": no_recovery, "crr-none": {"method.crr.drop": 1.0} | no_recovery}),
        "prune target": ("the density that pruning stops at",
                         choices("target", "method.prune.target", 0.7, 0.5, 0.4, 0.3, 0.2)),
        "prune step": ("share of the alive weights removed at once",
                       choices("step", "method.prune.step", 0.1, 0.25, 0.5)),
        "pruning": ("both at once", {"prune-gently": {"method.prune.step": 0.25, "method.prune.target": 0.4}}),
        "BN statistics": ("stay with the client, or travel and are averaged",
                          choices("bn", "method.bn.statistics", "averaged", "local")),
        "wire": ("half as many bytes a value", {
            "bfloat16": {"wire.dtype": "bfloat16"},
            "fedcapr-bfloat16": {"method.name": "fedcapr", "wire.dtype": "bfloat16"}}),
        "task": ("O2CAP's online association beside FedCAPR's contrast", {
            "online-off": {"contrast.online": 0.0},
            "fedcapr-online-off": {"method.name": "fedcapr", "contrast.online": 0.0}}),
        "start": ("the trunk starts from weights trained on drawn sites of no client, or at random",
                  choices("weights", "model.weights", "random")),
    }  # fmt: skip
