"""Where an unsupervised trunk starts: trained WITH labels on drawn sites that no client uses.

Pseudo labels need features that already tell people apart; the papers take a network trained on ImageNet. Here the
start is re-ID itself on other made-up people: identity cross-entropy and batch-hard triplet loss on all pretraining
sites pooled into one, by the supervised task and the engine of the federation with a single client.

    python -m fedklpr_jax.pretrain --out trunk.npz

writes a file that `--config.model.weights=trunk.npz` takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from fedklpr_jax import round as rounds
from fedklpr_jax import weights
from fedklpr_jax.config import default_config, resolved, validate
from fedklpr_jax.console import Console
from fedklpr_jax.data import synthetic
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.errors import InputError, status_of
from fedklpr_jax.federated import Method
from fedklpr_jax.models.spec import SPECS, ModelSpec, make_spec
from fedklpr_jax.tasks import supervised
from fedklpr_jax.trees import PyTree

VERSION = 1  # of what no field of a recipe says, such as the drawing of the sites; part of the cache's key

DRAWN_TOGETHER = 3
PRETRAINING_SITES: tuple[synthetic.SiteSpec, ...] = tuple(
    synthetic.SiteSpec(f"pretraining {style} {number}", style, cameras=4, train_ids=40, test_ids=2, images_per_camera=2)
    for style in synthetic.STYLES
    for number in range(3)
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything beside network and image size that decides the weights.

    Attributes:
      sites: what is drawn and pooled.
      seed: of the drawing and of the training; far from the seeds of federations.
      settings: by dotted path, every setting that the supervised task and the training read.
    """

    sites: tuple[synthetic.SiteSpec, ...] = PRETRAINING_SITES
    seed: int = 730_001
    settings: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "rounds": 12,
            "epochs": 1,
            "task.people": 8,
            "task.shots": 4,
            "task.smoothing": 0.1,
            "task.identity": 1.0,
            "task.triplet": 1.0,
            "task.margin": 0.3,
            "data.flip": 0.5,
            "data.pad": 4,
            "data.erase": 0.0,
            "optimizer.name": "adam",
            "optimizer.learning_rate": 2e-3,
            "optimizer.weight_decay": 5e-4,
            "optimizer.backbone": 1.0,
            "optimizer.decay_from": 0.67,
            "optimizer.decay": 0.2,
        }
    )


class Pretrained(NamedTuple):
    """A trained trunk, `{"params", "batch_stats"}` of float32 host arrays, and its retrieval mAP in [0, 1] on the
    pretraining identities that were held out."""

    trunk: PyTree
    score: float


def pool(sites: Sequence[Site], name: str) -> Site:
    """One site with the training images of all `sites`, identities and cameras made disjoint; no query, no gallery."""
    parts = [site.train for site in sites]
    # Numbers start at 1 everywhere, so that a shift by the largest before keeps them apart.
    first_id = np.cumsum([0, *(part.ids.max() for part in parts)])
    first_cam = np.cumsum([0, *(part.cams.max() for part in parts)])
    train = Images(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.ids + first for part, first in zip(parts, first_id, strict=False)]).astype(np.int32),
        np.concatenate([part.cams + first for part, first in zip(parts, first_cam, strict=False)]).astype(np.int32),
        tuple(name for part in parts for name in part.names),
    )
    nothing = train.take(np.arange(0))
    return Site(name, train, nothing, nothing)


def pretrain(spec: ModelSpec, height: int, width: int, recipe: Recipe, console: Console) -> Pretrained:
    """Trains a trunk by `recipe`; equal arguments give equal weights on one machine.

    Args:
      spec: the network.
      height, width: pixels of the images.
      recipe: sites and settings.
      console: where the progress goes.

    Raises:
      InputError: an image size or a site that cannot be drawn.
    """
    settings = _settings(recipe, height, width)
    count = len(recipe.sites)
    console.line(f"drawing {sum(site.train_ids for site in recipe.sites)} people of {count} sites")
    sites: list[Site] = []
    # A few at a time, to show how far it is; a site is the same whatever others stand beside it.
    for first in range(0, count, DRAWN_TOGETHER):
        chosen = recipe.sites[first : first + DRAWN_TOGETHER]
        sites += synthetic.make_sites(recipe.seed, height=height, width=width, specs=chosen)
        console.line(f"  {len(sites)} of {count} sites drawn")
    task = supervised.make_task([pool(sites, "pretraining")], spec, settings, union=False)
    engine = rounds.make_engine(task, Method("centralised"), epochs=settings.epochs)
    server, started = rounds.start(task, engine.method, settings.seed)
    clients = list(started)
    console.line(f"training {spec.name} with labels on {int(task.clients[0].images)} images; the first round compiles")
    with console.progress(settings.rounds) as bar:
        for _ in range(settings.rounds):
            server, clients, _ = rounds.simulate(engine, server, clients, seed=settings.seed)
            jax.block_until_ready(server.model)
            bar.advance("pretraining")
    score = jax.jit(task.score)(task.arrays, server.model, task.clients[0])
    model = jax.device_get(server.model)
    return Pretrained({kind: model[kind]["trunk"] for kind in ("params", "batch_stats")}, float(score))


def starting_trunk(
    config: ml_collections.ConfigDict,
    spec: ModelSpec,
    directory: Path,
    console: Console,
    recipe: Recipe | None = None,
) -> PyTree | None:
    """What `config.model.weights` names: None for `random`, else trunk variables like `spec.init`'s.

    Args:
      config: a resolved configuration; `model.weights` and the image size are read.
      spec: the network.
      directory: an existing directory that keeps what `synthetic` trained.
      console: where the progress of training goes.
      recipe: of `synthetic`; None is the default one.

    Raises:
      InputError: a weight file that does not fit, or a directory that cannot be written.
    """
    chosen, height, width = config.model.weights, config.data.height, config.data.width
    if chosen == "random":
        return None
    like = jax.eval_shape(lambda: spec.init(jax.random.key(0), height, width))
    if chosen != "synthetic":
        return weights.load(Path(chosen), like)
    recipe = recipe or Recipe()
    path = directory / f"{spec.name}-{height}x{width}-{fingerprint(spec, height, width, recipe)}.npz"
    if path.exists():
        try:
            return weights.load(path, like)
        except InputError as error:
            console.line(f"{error}: training it anew")
    console.line(f"no trunk of this network yet: training one, kept in {path}")
    trunk = pretrain(spec, height, width, recipe, console).trunk
    weights.save(path, trunk)
    return trunk


def fingerprint(spec: ModelSpec, height: int, width: int, recipe: Recipe) -> str:
    """Hash of everything that changes the weights."""
    parts = [VERSION, dataclasses.asdict(spec), height, width, dataclasses.asdict(recipe)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _settings(recipe: Recipe, height: int, width: int) -> ml_collections.ConfigDict:
    """The configuration that the supervised task reads."""
    config = default_config()
    config.update_from_flattened_dict({"task.name": "supervised", "seed": recipe.seed, **recipe.settings})
    config.data.height, config.data.width = height, width
    validate(config)
    return resolved(config)


def main(arguments: Sequence[str] | None = None, recipe: Recipe | None = None) -> int:
    """Trains a trunk and writes it; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    recipe = recipe or Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m fedklpr_jax.pretrain", description="Train the trunk that an unsupervised run starts from."
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz", help="where to write the weights")
    parser.add_argument("--arch", default="thin", choices=list(SPECS), metavar="NAME", help=", ".join(SPECS))
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=recipe.seed, help="of the drawn people and of the training")
    options = parser.parse_args(arguments)
    recipe = dataclasses.replace(recipe, seed=options.seed)
    return status_of(lambda: _to_file(options.out, options.arch, options.height, options.width, recipe))


def _to_file(out: Path, arch: str, height: int, width: int, recipe: Recipe) -> None:
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise InputError(f"--out: {out} is not allowed; give a name ending in .npz in an existing folder")
    console = Console()
    trunk, score = pretrain(make_spec(arch), height, width, recipe, console)
    weights.save(out, trunk)
    size = out.stat().st_size / 1e6
    console.line(f"mAP {100 * score:.1f} % on held-out pretraining identities; wrote {out} ({size:.1f} MB)")


if __name__ == "__main__":
    sys.exit(main())
