"""Rounds of FedReID here and as a plain PyTorch loop runs them, evaluation included: prints one Markdown table.

Run from the repository root, on a machine with nothing else to do:

    python -m benchmarks.fedreid --root ../shared/data --python /path/of/a/python/with/torch
    python -m benchmarks.fedreid --small      two drawn sites and a small network: only shows that everything runs

Four real sites in the published setting (`experiments/fedreid_r50.py`): ResNet with the 512-d block, one epoch in
batches of 32, SGD, cosine distance weight; no distillation, which that setting has every tenth round. Both sides hold
decoded pictures in memory, start from the same weights (their features are compared first) and train on the same
batches. Ours are rounds as a run makes them, messages through the wire format, and tests of each client's download;
PyTorch copies its network for each client in turn and sorts the gallery anew for each query
(`competitors/pytorch_fedreid.py`).

After each round every client's model is tested. Both sides take turns, ours first, each with all cores; `first` is what
they do before the rounds that are timed, in which things are compiled. The row of ratios holds medians of the ratios
round by round. Without `--python` only ours are timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks._common import ROOT, machine, print_header, print_row
from benchmarks._peer import Peer
from benchmarks.competitors._work import ReIDWork, save
from benchmarks.round import SMALL, spread
from fedklpr_jax import simulation
from fedklpr_jax.assembly import Federation, load_sites, model_spec, names_in
from fedklpr_jax.cli import parse
from fedklpr_jax.config import resolved, validate
from fedklpr_jax.data import augment
from fedklpr_jax.errors import InputError
from fedklpr_jax.methods import make_method
from fedklpr_jax.metrics import Ledger
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.round import make_engine, start
from fedklpr_jax.tasks import reid, supervised
from fedklpr_jax.trees import PyTree, merge

SITES = "ward,viper,prid2011,mars_mini"
NETWORKS = ("resnet18", "resnet50")
# As PyTorch's modules follow each other.
ORDER = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample_conv", "downsample_bn", "layer", "embedding",
         "embedding_bn")  # fmt: skip
ALIKE = 1e-4


class Answer(NamedTuple):
    """Of a side: seconds of the last round and of the tests after it, and what they found, mean mAP and Rank-1."""

    round: float
    tests: float
    scores: tuple[float, float]

    @property
    def both(self) -> float:
        """Seconds of a round, evaluation included."""
        return self.round + self.tests


def make_federation(
    network: str, root: Path | None, size: tuple[int, int], rounds: int
) -> tuple[Federation, ModelSpec]:
    """The federation and its network; without `root` two drawn sites, and of the network a block.

    Raises:
      InputError: the sites are not there, or a setting is out of its range.
    """
    config = parse([f"--config={ROOT / 'experiments' / 'fedreid_r50.py'}"])
    changes: dict[str, Any] = {"method.reid.distill_every": 0, "rounds": rounds}
    if root is None:
        changes |= SMALL | {"data.source": "synthetic"}
    else:
        changes |= {"data.root": str(root), "data.clients": SITES, "model.arch": network}
        changes |= dict(zip(("data.height", "data.width"), size, strict=True))
    config.update_from_flattened_dict(changes)
    validate(config)
    config = resolved(config)
    spec = model_spec(config)
    if root is None:
        spec = dataclasses.replace(spec, widths=(64,), blocks=(1,), bottleneck=False)
    sites, _, notes = load_sites(config)
    method = make_method(config.method, names_in(config.data.clients))
    task = supervised.make_task(sites, spec, config, union=not method.is_local("params/classifier/kernel"))
    engine = make_engine(
        task, method, epochs=config.epochs, client_map=config.client_map, chunk=config.client_chunk,
        devices=config.devices, clients=len(sites),
    )  # fmt: skip
    return Federation(config, sites, engine, tuple(notes)), spec


def torch_values(params: PyTree, stats: PyTree) -> list[np.ndarray]:
    """Parameters and statistics of a network, or of a layer, as PyTorch's `state_dict` lists them."""
    if "kernel" in params:
        kernel = np.asarray(params["kernel"])
        outputs_first = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        return [outputs_first, *([np.asarray(params["bias"])] if "bias" in params else [])]
    if "scale" in params:
        return [np.asarray(leaf) for leaf in (params["scale"], params["bias"], stats["mean"], stats["var"])]
    names = sorted(params, key=lambda name: (ORDER.index("layer" if name.startswith("layer") else name), name))
    return [value for name in names for value in torch_values(params[name], stats.get(name, {}))]


def make_work(federation: Federation, spec: ModelSpec, variables: PyTree) -> ReIDWork:
    """What PyTorch does alike: from the given variables, on the same batches."""
    config, task, trunk = federation.config, federation.task, reid.trunk_of(variables)
    everyone = range(len(task.clients))
    plans = [[task.plan(config.seed, round_, k, 1)[0] for k in everyone] for round_ in range(config.rounds)]
    tests = [images for site in federation.exams for images in (site.query, site.gallery)]
    optimizer = config.optimizer
    return ReIDWork(
        blocks=np.array(spec.blocks),
        bottleneck=spec.bottleneck,
        embedding=spec.embedding_dim,
        dropout=spec.dropout,
        start=np.concatenate([value.ravel() for value in torch_values(trunk["params"], trunk["batch_stats"])]),
        pixels=task.arrays.pixels,
        labels=task.arrays.labels,
        classes=np.array([client.task.classes for client in task.clients]),
        batches=np.array([np.concatenate(plan) for plan in plans]),
        steps=np.array([len(rows) for rows in plans[0]]),
        probes=np.array([client.probe for client in task.clients]),
        flip=config.data.flip,
        pad=config.data.pad,
        momentum=optimizer.momentum,
        decay=optimizer.weight_decay,
        rate=optimizer.learning_rate,
        backbone=optimizer.backbone,
        test_pixels=np.concatenate([images.pixels for images in tests]),
        test_ids=np.concatenate([images.ids for images in tests]),
        test_cams=np.concatenate([images.cams for images in tests]),
        tests=np.array([len(images) for images in tests]).reshape(-1, 2),
        test_batch=reid.EMBED_BATCH,
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
    )


def features_of(federation: Federation, spec: ModelSpec, variables: PyTree) -> np.ndarray:
    """f(x) + f(mirrored x) of the first client's probe, each of length 1: float32 [p, embedding]."""
    task = federation.task
    forward = jax.jit(lambda trunk, images: spec.apply(trunk, images, False)[0]["embedding"])
    trunk, images = reid.trunk_of(variables), task.inputs(task.arrays, task.clients[0].probe)
    return np.asarray(reid.normalise_features(forward(trunk, images) + forward(trunk, augment.flip(images))))


class Ours:
    """This library under the same questions as `competitors/pytorch_fedreid.py`."""

    def __init__(self, federation: Federation, spec: ModelSpec) -> None:
        self.federation, self.spec = federation, spec
        server, clients = start(federation.task, federation.engine.method, federation.config.seed)
        self.state = simulation.RunState(server, clients, Ledger(), 0.0)

    def variables(self) -> PyTree:
        """The first client's, with the server's model of now."""
        return merge(jax.device_get(self.state.server.model), self.state.clients[0].local)

    def ask(self, question: str) -> dict[str, Any]:
        """`round`, `evaluate` or `features`: seconds, and what it told."""
        began = time.perf_counter()
        told = getattr(self, question)()
        return {"seconds": time.perf_counter() - began, "told": told}

    def round(self) -> None:
        """As a run makes it."""
        self.state, event = simulation.run_round(self.federation, self.state)
        assert not event["refused"], event["refused"]

    def evaluate(self) -> list[float]:
        """Mean over the clients of mAP and Rank-1."""
        found = simulation.examine(self.federation, self.state, "before")
        mean = simulation.headline(self.federation, found.results["before"], found.densities)["mean"]
        return [mean["map"], mean["rank1"]]

    def features(self) -> np.ndarray:
        """Of the first client's probe."""
        return features_of(self.federation, self.spec, self.variables())


def check_alike(ours: Ours, peer: Peer) -> None:
    """Compares the features of both sides, each of length 1.

    Raises:
      RuntimeError: a number differs by more than 1e-4, or is none.
    """
    apart = np.abs(ours.features() - np.array(peer.ask("features")["told"])).max()
    if not apart <= ALIKE:
        raise RuntimeError(f"PyTorch has another network: features differ by {apart:.1e}")


def play(sides: dict[str, Ours | Peer], rounds: int) -> dict[str, list[Answer]]:
    """Rounds and the tests after each, in turn."""
    answers: dict[str, list[Answer]] = {name: [] for name in sides}
    for _ in range(rounds):
        seconds = {name: side.ask("round")["seconds"] for name, side in sides.items()}
        for name, side in sides.items():
            tests = side.ask("evaluate")
            answers[name].append(Answer(seconds[name], tests["seconds"], tuple(tests["told"])))
    return answers


def print_rows(network: str, answers: dict[str, list[Answer]]) -> None:
    """The part of the table that belongs to one network."""
    for name, (first, *timed) in answers.items():
        columns = ([answer.round for answer in timed], [answer.tests for answer in timed], [a.both for a in timed])
        cells = [cell for seconds in columns for cell in spread(seconds)]
        scores = " / ".join(f"{100 * score:.1f}" for score in timed[-1].scores)
        print_row(network, name, f"{first.round:.2f}", f"{first.tests:.2f}", *cells, scores)
    if len(answers) > 1:
        pairs = list(zip(*answers.values(), strict=True))[1:]
        parts = ("round", "tests", "both")
        ratios = [[getattr(our, part) / getattr(peer, part) for our, peer in pairs] for part in parts]
        print_row(network, "ours / PyTorch", "", "", *(cell for values in ratios for cell in spread(values)), "")


def compare(network: str, root: Path | None, size: tuple[int, int], python: str | None, rounds: int) -> None:
    """Prints the rows of one network.

    Raises:
      InputError: as `make_federation`.
      RuntimeError: the peer ended early, or has another network.
    """
    federation, spec = make_federation(network, root, size, rounds + 1)
    ours = Ours(federation, spec)
    if not python:
        print_rows(network, play({"ours": ours}, rounds + 1))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.npz"
        save(path, make_work(federation, spec, ours.variables()))
        peer = Peer(python, "pytorch_fedreid", str(path))
        try:
            check_alike(ours, peer)
            print_rows(network, play({"ours": ours, "PyTorch": peer}, rounds + 1))
        finally:
            peer.close()


def main(given: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help=f"folder with the sites {SITES}")
    parser.add_argument("--python", help="a Python with PyTorch")
    parser.add_argument("--arch", default=",".join(NETWORKS), help="comma-separated networks (default: %(default)s)")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed (default: 3)")
    parser.add_argument("--small", action="store_true", help="in seconds; its numbers mean nothing")
    options = parser.parse_args(given)
    if options.small == (options.root is not None):
        parser.error("give --root DIR or --small, one of the two")
    if options.rounds < 1:
        parser.error("--rounds takes a whole number from 1")
    networks = ["small"] if options.small else options.arch.split(",")
    if not options.small and not set(networks) <= set(NETWORKS):
        parser.error(f"--arch takes some of {','.join(NETWORKS)}")
    print(f"{machine()}; {options.rounds} rounds of FedReID\n", flush=True)
    print_header("network", "library", "first round s", "first tests s", "round s", "min-max", "tests s", "min-max",
                 "both s", "min-max", "mAP / Rank-1 %")  # fmt: skip
    for network in networks:
        try:
            compare(network, options.root, (options.height, options.width), options.python, options.rounds)
        except InputError as mistake:
            parser.error(str(mistake))


if __name__ == "__main__":
    main()
