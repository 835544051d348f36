"""From a configuration to a federation: its data, its task, its method and the compiled engine over them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from fedklpr_jax import hosts, privacy
from fedklpr_jax.console import Console
from fedklpr_jax.data import drawn, folder, labelled, partition, prepared, shapes, synthetic
from fedklpr_jax.data.public import public_pixels
from fedklpr_jax.data.scenario import site_of, split_sites
from fedklpr_jax.data.site import Clients, Site, here, pooled
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import Method, Task
from fedklpr_jax.methods import make_method
from fedklpr_jax.metrics import privacy_note
from fedklpr_jax.models import pretrained
from fedklpr_jax.models.spec import ModelSpec, make_spec
from fedklpr_jax.pretrain import starting_trunk
from fedklpr_jax.robust import make_merge
from fedklpr_jax.round import Engine, make_engine
from fedklpr_jax.tasks import bottom_up, classification, supervised, unsupervised
from fedklpr_jax.tasks.classification import Share
from fedklpr_jax.tasks.reid import Exam, public_images
from fedklpr_jax.trees import PyTree

CLASSIFICATION_ONLY = ("cnn", "vgg11", "vgg16", "vgg11_thin", "resnet18_cifar", "resnet_cifar_thin")


class Dealt(NamedTuple):
    """A data set for classification and the rows that each client has of it."""

    data: labelled.Labelled
    shares: Sequence[Share]


class Parts(NamedTuple):
    """What a federation is built of, and nothing compiled: `narrow` are the tasks of `make_engine`, `exams` the
    pictures of each of the task's tests (re-ID), `dealt` the data set with each client's rows (classification), `notes`
    what the user should know of the data, `lines` what each client holds."""

    task: Task
    method: Method
    narrow: Sequence[Task]
    exams: Sequence[Site]
    notes: tuple[str, ...]
    lines: tuple[str, ...]
    dealt: Dealt | None = None


@dataclasses.dataclass(frozen=True)
class Federation:
    """What does not change during a run; `exams`, `notes`, `lines` and `dealt` as in `Parts`."""

    config: ml_collections.ConfigDict
    exams: Sequence[Site]
    engine: Engine
    notes: tuple[str, ...]
    lines: tuple[str, ...] = ()
    dealt: Dealt | None = None

    @property
    def task(self) -> Task:
        """The engine's task."""
        return self.engine.task


def cache_directory(chosen: str, name: str) -> Path:
    """`chosen`, or a private directory of this user for `name`; made if missing.

    Raises:
      InputError: it cannot be made.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(chosen) if chosen else base / "fedklpr_jax" / name
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(f"{path}: cannot be made as the cache of {name} ({error.strerror}); give another") from error
    return path


def names_in(text: str) -> list[str]:
    """The names in a comma-separated setting.

    >>> names_in("ward, viper")
    ['ward', 'viper']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def load_sites(config: ml_collections.ConfigDict) -> tuple[list[Site], list[Site], list[str]]:
    """The clients' pictures, those of the sites nobody trains on, and a note for each folder or picture left out.

    Raises:
      InputError: nothing usable where the configuration points.
    """
    data = config.data
    names, unseen = names_in(data.clients), names_in(data.unseen)
    for name in unseen:
        if name in names:
            raise InputError(f"config.data.unseen: {name!r} is one of config.data.clients; give it in one of the two")
    size = {"height": data.height, "width": data.width}
    # Without names all there are take part, the unseen ones among them.
    wanted = names + unseen if names else []
    cache = cache_directory(data.cache, "images")
    if data.source == "folder":
        found, notes = folder.read_sites(Path(data.root), wanted, cache=cache, **size)
    elif data.source.startswith("tfds:"):
        found, notes = prepared.read_prepared(data.root, wanted, cache=cache, **size)
    else:
        specs = {spec.name: spec for spec in synthetic.DEFAULT_SITES}
        for name in wanted:
            if name not in specs:
                setting = "unseen" if name in unseen else "clients"
                raise InputError(
                    f"config.data.{setting}: {name!r} is no synthetic site; there are {', '.join(specs)}"
                )
        chosen = [specs[name] for name in wanted] or list(specs.values())
        found, notes = drawn.kept_sites(data.seed, specs=chosen, cache=cache, **size), []
    by_name = {site.name: site for site in found}
    for name in unseen:
        if name not in by_name:
            raise InputError(f"config.data.unseen: {name!r} is no site here; there are {', '.join(by_name)}")
    for site in found:
        notes += [f"{site.name}: {line}" for line in site.refused]
        unmatched = len(site.query) - folder.cross_camera_queries(site)
        if unmatched:
            notes.append(f"{site.name}: {unmatched} of {len(site.query)} queries have no second camera; not counted")
    clients = [site for site in found if site.name not in unseen]
    if not clients:
        raise InputError("config.data.unseen: leaves no site to train on; name fewer")
    return clients, [by_name[name] for name in unseen], notes


def load_labelled(config: ml_collections.ConfigDict) -> labelled.Labelled:
    """The data set of a classification run.

    Raises:
      InputError: nothing usable where the configuration points.
    """
    data = config.data
    if data.source == "folder":
        return labelled.read_folder(Path(data.root), cache=cache_directory(data.cache, "images"))
    if data.source.startswith("tfds:"):
        return labelled.read_tfds(data.source.removeprefix("tfds:"), data.root)
    return shapes.make_shapes(data.seed)


def deal(labels: np.ndarray, data: ml_collections.ConfigDict) -> list[Share]:
    """Each client's rows for training, validation and test, by `config.data`.

    Raises:
      InputError: the data set cannot be dealt like this.
    """
    if data.partition == "dirichlet":
        hands = partition.dirichlet(labels, data.count, data.alpha, seed=data.seed, least=data.least)
    else:
        hands = partition.shards(labels, data.count, data.shards, seed=data.seed)
    shares = []
    for client, rows in enumerate(hands):
        train, test = partition.split_off(rows, data.test, key=(data.seed, client))
        validation = train[:0]
        if data.validation:
            train, validation = partition.split_off(train, data.validation, key=(data.seed, client, 1))
        shares.append(Share(train, validation, test))
    return shares


def test_pictures(config: ml_collections.ConfigDict, client: int, name: str) -> np.ndarray:
    """The pictures that a client is tested on (of re-ID its queries), uint8 [n, h, w, c], and of no other client if
    its own can be read alone; where one client trains on all data, those of the first test.

    Raises:
      InputError: they cannot be read here.
    """
    if config.task.name == "classification":
        data = load_labelled(config)
        return data.pixels[deal(data.labels, config.data)[client].test]
    alone = config.copy_and_resolve_references()
    alone.data.unseen = ""
    if config.method.name != "centralised":
        alone.data.clients = site_of(name)
    sites, _, _ = load_sites(alone)
    return np.asarray(sites[0].query.pixels)


def model_spec(config: ml_collections.ConfigDict) -> ModelSpec:
    """The network of `config.model`."""
    model = config.model
    return make_spec(
        model.arch,
        pooling=model.pooling,
        norm=model.norm,
        embedding_dim=model.embedding,
        dropout=model.dropout if model.embedding else 0.0,
        dtype=model.dtype,
        convolution=model.convolution,
    )


def make_federation(
    config: ml_collections.ConfigDict, console: Console, own: Method | None = None
) -> Federation:
    """Reads the data and builds task, method and engine for a valid, resolved configuration.

    Where the run starts from weights trained on synthetic sites and there are none yet, they are trained now, which
    `console` shows. `own` is a method in place of the one that the configuration names.

    Raises:
      InputError: bad settings or data.
    """
    classifies = config.task.name == "classification"
    if classifies != (config.model.arch in CLASSIFICATION_ONLY):
        right = "one of " + ", ".join(CLASSIFICATION_ONLY) if classifies else "thin, a resnet or efficientnet_lite0"
        raise InputError(
            f"config.model.arch: {config.model.arch!r} is not for the {config.task.name} task; give {right}"
        )
    build = classification_parts if classifies else _reid
    parts = hosts.agreed(lambda: build(config, console, own))
    hosts.check_same("data", (parts.task.arrays, parts.task.clients))
    together = participation_count(len(parts.task.clients), config.participation)
    spent = privacy_spent(config, len(parts.task.clients))
    lines = (*parts.lines, *([privacy_note(spent)] if spent else []))
    return assembled(config, parts._replace(lines=lines), together=together)


def assembled(
    config: ml_collections.ConfigDict, parts: Parts, *, together: int, noise_key: privacy.Key | None = None
) -> Federation:
    """The federation of `parts`; `together` clients are trained at once, and a private run's noise comes from
    `noise_key`; None = from the run's seed."""
    clients = len(parts.task.clients)
    key = noise_key or privacy.seeded(config.seed)
    participants = participation_count(clients, config.participation)
    method = privacy.protected(parts.method, config.privacy, clients=clients, participants=participants, key=key)
    engine = make_engine(
        parts.task,
        method,
        epochs=config.epochs,
        client_map=config.client_map,
        chunk=config.client_chunk,
        devices=config.devices,
        clients=together,
        narrow=parts.narrow,
        merge=make_merge(config.merge.name, config.merge.trim),
    )
    return Federation(config, parts.exams, engine, parts.notes, parts.lines, parts.dealt)


def _narrow(
    config: ml_collections.ConfigDict, method: Method, spec: ModelSpec, make_task: Callable[..., Task]
) -> list[Task]:
    """Where devices differ and clients train networks of their own size, the task of each."""
    compact = method.capacity if config.method.capacity.form == "compact" else None
    return [make_task(narrow) for narrow in compact.specs(spec)] if compact else []


def classification_parts(
    config: ml_collections.ConfigDict, console: Console, own: Method | None = None
) -> Parts:
    method = own or make_method(config.method)
    if method.needs_public:
        raise InputError(
            "config.method.reid: distillation and clustering need the server's public images of people, which "
            "classification has none of; give --config.method.reid.distill_every=0 and cluster=False"
        )
    if method.needs_score and not config.data.validation:
        raise InputError(
            f"config.data.validation: 0, but {method.name} decides by a validation score; give a share such as 0.1"
        )
    data = load_labelled(config)
    shares = deal(data.labels, config.data)
    spec = model_spec(config)

    def make_task(spec: ModelSpec) -> Task:
        return classification.make_task(data, shares, spec, config, pooled=method.name == "centralised")

    task = make_task(spec)
    counts = [int(client.images) for client in task.clients]
    tested = [len(share.test) for share in shares]
    lines = (
        f"{len(task.clients)} clients: {min(counts)} to {max(counts)} images to train on, "
        f"{min(tested)} to {max(tested)} to test on, {len(data.classes)} classes",
    )
    narrow = _narrow(config, method, spec, make_task)
    return Parts(task, method, narrow, (), data.refused, lines, Dealt(data, shares))


def _start(
    config: ml_collections.ConfigDict, spec: ModelSpec, console: Console
) -> tuple[PyTree | None, Sequence[str]]:
    """The trunk's variables to start from, None for random ones, and what there is to know of them."""
    if config.model.pretrained:
        return pretrained.load(Path(config.model.pretrained), spec, jax.random.key(config.seed))
    return starting_trunk(config, spec, cache_directory("", "weights"), console), ()


def _reid(config: ml_collections.ConfigDict, console: Console, own: Method | None) -> Parts:
    sites, unseen, notes = load_sites(config)
    sites, told = split_sites(
        sites, config.data.scenario, clients=config.data.identity_clients, seed=config.data.seed
    )
    return reid_parts(config, console, sites, unseen, notes + told, own)


def reid_parts(
    config: ml_collections.ConfigDict,
    console: Console,
    sites: Clients,
    unseen: Sequence[Site] = (),
    notes: Sequence[str] = (),
    own: Method | None = None,
) -> Parts:
    """What a federation of these clients is built of, some or all of them on other machines.

    Args:
      config: valid and resolved.
      console: shows the training of the starting weights.
      sites: the clients' pictures, or the sizes of clients elsewhere.
      unseen: sites that nobody trains on.
      notes: what there is to know of the data so far.
      own: a method in place of the one that `config` names.

    Raises:
      InputError: bad settings or data.
    """
    notes = list(notes)
    names = [site.name for site in sites]
    spec = model_spec(config)
    method = own or make_method(config.method, names)
    labels = config.task.name == "supervised"
    # A name that is no client's is told before the starting weights are trained.
    if config.task.name == "unsupervised":
        unsupervised.parse_copies(config.data.copies, names)
    if config.task.name == "bottom_up":
        bottom_up.parse_identities(config.bottom_up.identities, names)
    trunk, told = _start(config, spec, console)
    notes += told
    exams = [Exam(site, client) for client, site in enumerate(sites)]
    if method.name == "centralised":
        if not labels:
            raise InputError("config.method.name: centralised needs labels; give --config.task.name=supervised")
        exams, sites = [Exam(site, 0) for site in sites], [pooled(here(sites), "all")]
    exams += [Exam(site, None) for site in unseen]

    def make_task(spec: ModelSpec, trunk: PyTree | None = None) -> Task:
        if labels:
            union = not method.is_local("params/classifier/kernel")
            return supervised.make_task(sites, spec, config, union=union, trunk=trunk, exams=exams)
        kind = bottom_up if config.task.name == "bottom_up" else unsupervised
        return kind.make_task(sites, spec, config, trunk=trunk, exams=exams)

    task = make_task(spec, trunk)
    # A client alone does not take the server's step.
    if method.needs_public and len(here(sites)) in (0, len(sites)):
        pixels, told = public_pixels(config.data, names)
        notes += told
        task = dataclasses.replace(task, public=public_images(pixels, spec))
    if labels:
        notes += [
            f"{name}: under 8 validation images have a match under another camera; same-camera matches count there too"
            for name, data in zip(task.client_names, task.clients, strict=True)
            if data.task.same_camera
        ]
    lines = [
        f"{name}: {int(data.images)} images to train on"
        for name, data in zip(task.client_names, task.clients, strict=True)
    ]
    lines += [f"{site.name}: nobody trains on it, {len(site.query)} queries" for site in unseen]
    narrow = _narrow(config, method, spec, make_task)
    tested = here([exam.site for exam in exams])
    return Parts(task, method, narrow, tested, tuple(notes), tuple(lines))


def privacy_spent(config: ml_collections.ConfigDict, clients: int) -> dict[str, Any] | None:
    """What a run of so many clients spends of their privacy in all its rounds, as in `privacy.spent`."""
    together = participation_count(clients, config.participation)
    return privacy.spent(config.privacy, clients=clients, participants=together, rounds=config.rounds)


def participation_count(clients: int, share: float) -> int:
    """How many of `clients` take part in a round: their share, rounded, at least one."""
    return max(1, round(share * clients))
