"""Unsupervised person re-ID as FedCAPR trains it: nobody labels identities, only the cameras are known.

FedCAPR (CVPR 2025 workshop, its authors' code), at the start of every local epoch:

    embeddings of all local pictures -> k-reciprocal Jaccard distance -> DBSCAN -> clusters, noise sits out
    proxies: one per (cluster, camera), the normalised mean embedding

and per batch of 8 proxies x 4 pictures `0.6 L_intra + 0.7 L_inter` (`contrast.py`), after which the batch moves its
proxies. A point is one copy of a picture: small clients count each picture several times (IDE). Ours: a tenth of the
pictures is held out of training; they are clustered with the others, and the validation score is the retrieval mAP of
pseudo labels with them as queries. An epoch with fewer than two clusters has nothing to tell apart and trains nothing.

Identities are read by `describe`, `validate` and `evaluate` alone, for the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax import clustering, clustering_traced, contrast, proxies
from fedklpr_jax.data import augment as augmentation
from fedklpr_jax.data.site import Clients, Site
from fedklpr_jax.data.stream import Streamed
from fedklpr_jax.data.validation import hold_out_images, same_camera_counts
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation.validation import retrieval_map
from fedklpr_jax.federated import ClientData, Epoch, Examined, Labelling, Task
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.optimizer import make_optimizer, step_decay
from fedklpr_jax.tasks import reid
from fedklpr_jax.trees import PyTree

# Training pictures per held-out one among which the validation score looks for it.
GALLERY = 4


class Arrays(NamedTuple):
    """The training pictures of all clients, one client after the other: `pixels` uint8 [n, h, w, 3], and `picture`
    int32 [points], of which picture each point is a copy."""

    pixels: Any
    picture: Any


class SiteData(NamedTuple):
    """Of one client: `first` int32, its first point; `pictures` int32, how many it has; `points` int32, these times its
    copies; and over all places for points of the widest client `cameras` int32 [p], codes from 0, and `held` bool [p],
    held out of training. `validation` int32 [v], local pictures, held-out ones first, padded; `queries` and
    `validations` int32, how many of them are held out, and how many there are."""

    first: Any
    pictures: Any
    points: Any
    cameras: Any
    held: Any
    validation: Any
    queries: Any
    validations: Any


def parse_copies(text: str, names: Sequence[str]) -> list[int]:
    """How often each client's pictures count: `client:count` pairs, and a count without a name for all others (or 1).

    Raises:
      InputError: a name that is no client's.

    >>> parse_copies("2,viper:10", ["ward", "viper"])
    [2, 10]
    """
    pairs = {name: int(count) for name, _, count in (entry.strip().rpartition(":") for entry in text.split(","))}
    others = pairs.pop("", 1)
    for name in pairs:
        if name not in names:
            raise InputError(f"config.data.copies: {name!r} is no client; there are {', '.join(names)}")
    return [pairs.get(name, others) for name in names]


# What `sizes` tells.
SIZES = ("pictures", "cameras", "held", "validation")


def sizes(site: Site, seed: int) -> dict[str, int]:
    """What the others' shapes depend on: how many `pictures` a client has, of how many `cameras`, how many of them are
    `held` out, and how many the validation score reads, `validation`; `seed` is the run's.

    Raises:
      InputError: too few pictures to train and to validate on.
    """
    held = _held(site, seed)
    return {
        "pictures": len(held),
        "cameras": len(np.unique(site.train.cams)),
        "held": int(held.sum()),
        "validation": len(_validation_rows(held, (seed, 0))),
    }


def _held(site: Site, seed: int) -> np.ndarray:
    return hold_out_images(len(site.train), seed=seed, client=site.name)


def make_task(
    sites: Clients,
    spec: ModelSpec,
    config: Any,
    *,
    trunk: PyTree | None = None,
    exams: Sequence[reid.Exam] | None = None,
) -> Task:
    """Unsupervised re-ID over `sites`, one client each.

    Args:
      sites: the clients' pictures, of which training reads pixels and cameras, or of clients on other machines their
        `sizes`.
      spec: the network.
      config: the run's configuration (`data`, `task`, `cluster`, `contrast`, `optimizer`, `last`, `eval`, `seed`,
        `rounds` are read).
      trunk: the network's variables to start from; None = random ones, whose pseudo labels are noise.
      exams: what is tested; None = each client on its own site.

    Raises:
      InputError: unknown clients in `data.copies`, or a client with too few pictures.
    """
    tests = reid.exams_of(sites, exams)
    copies = parse_copies(config.data.copies, [site.name for site in sites])
    known = [sizes(site, config.seed) if isinstance(site, Site) else site.sizes for site in sites]
    arrays = _arrays(sites, copies, reid.training_pixels(sites, config.data))
    clients = _clients(sites, known, copies, config.seed)
    widest_points = len(clients[0].task.cameras)
    widest_pictures = reid.padded(max(of["pictures"] for of in known))
    cameras = max(of["cameras"] for of in known)
    cluster, options = config.cluster, config.contrast
    dbscan = {"k1": cluster.k1, "k2": cluster.k2, "eps": cluster.eps, "min_samples": cluster.min_samples}
    batch = config.task.people * config.task.shots
    trains = {client: site.train for client, site in enumerate(sites) if isinstance(site, Site)}

    def init(key: jax.Array) -> PyTree:
        start = spec.init(key, config.data.height, config.data.width) if trunk is None else trunk
        return {"params": {"trunk": start["params"]}, "batch_stats": {"trunk": start["batch_stats"]}}

    def inputs(arrays: Arrays, rows: jax.Array) -> jax.Array:
        return augmentation.normalise(arrays.pixels[arrays.picture[rows]])

    def forward(
        variables: PyTree, images: jax.Array, client: ClientData, train: bool, key: jax.Array
    ) -> tuple[dict[str, jax.Array], PyTree]:
        outputs, new_stats = spec.apply(reid.trunk_of(variables), images, train, {"dropout": key})
        features = reid.normalise_features(outputs["embedding"])
        logits = contrast.proxy_logits(features, client.memory, temperature=options.temperature)
        return outputs | {"logits": logits}, {"trunk": new_stats}

    def loss(arrays: Arrays, outputs: dict[str, jax.Array], rows: jax.Array, client: ClientData) -> jax.Array:
        bank, points, logits = client.memory, rows - client.task.first, outputs["logits"]
        each = options.intra * contrast.intra_camera(logits, bank, points)
        each += options.inter * contrast.inter_camera(logits, bank, points, negatives=options.negatives)
        if options.online:
            features = reid.normalise_features(outputs["embedding"])
            each += options.online * contrast.online_association(
                features, logits, bank, points, cameras=cameras, negatives=options.negatives
            )
        return jnp.sum(contrast.camera_weights(client.task.cameras[points]) * each)

    def remember(outputs: dict[str, jax.Array], rows: jax.Array, client: ClientData) -> proxies.Bank:
        features = jax.lax.stop_gradient(reid.normalise_features(outputs["embedding"]))
        return proxies.move(client.memory, features, rows - client.task.first, momentum=options.momentum)

    def embed(arrays: Arrays, variables: PyTree, client: ClientData) -> jax.Array:
        data = client.task
        # Rows behind the client's own pictures are computed in its last batch and then put to zero.
        features = reid.embed(
            spec, variables, lambda local: inputs(arrays, data.first + local), widest_pictures, data.pictures
        )
        point = jnp.arange(widest_points)
        return jnp.where(point[:, None] < data.points, features[point % data.pictures], 0.0)

    # Clusters are made anew each time: neither the last ones nor the time matter.
    def assign(features: jax.Array, client: ClientData, round_: jax.Array, epoch: jax.Array) -> jax.Array:
        return clustering_traced.cluster(features, jnp.arange(widest_points) < client.task.points, **dbscan)

    def assign_host(features: np.ndarray, client: int, last: np.ndarray, round_: int, epoch: int) -> np.ndarray:
        labels = np.full(widest_points, -1, np.int32)
        count = int(clients[client].task.points)
        labels[:count] = clustering.cluster(features[:count], **dbscan)
        return labels

    def prepare(
        arrays: Arrays, features: jax.Array, labels: jax.Array, client: ClientData, key: jax.Array
    ) -> Epoch:
        data = client.task
        clusters = jnp.where(data.held, -1, labels)
        bank = proxies.build(features, clusters, data.cameras)
        points, steps = proxies.plan(bank, key, proxies=config.task.people, shots=config.task.shots)
        found = jnp.where(clusters >= 0, clusters, clusters.max())
        return Epoch(points + data.first, jnp.where(found.min() < found.max(), steps, 0), bank)

    def validation_map(
        arrays: Arrays, variables: PyTree, client: ClientData, labels: jax.Array, same_camera: jax.Array | bool
    ) -> jax.Array:
        data, rows = client.task, client.task.validation
        features = reid.embed(
            spec, variables, lambda chunk: inputs(arrays, data.first + rows[chunk]), len(rows), data.validations
        )
        place = jnp.arange(len(rows))
        valid, queries = place < data.validations, place < data.queries
        return retrieval_map(features, labels[rows], data.cameras[rows], valid, same_camera, queries)

    def score(arrays: Arrays, variables: PyTree, client: ClientData) -> jax.Array:
        # Pseudo labels join cameras at their own pace; a score that counted only matches across cameras would rise and
        # fall with them.
        return validation_map(arrays, variables, client, client.labels, True)

    true_map = jax.jit(validation_map)

    def validate(variables: PyTree, client: int) -> float:
        data, train = clients[client], trains[client]
        ids = np.resize(train.ids, widest_points).astype(np.int32)
        rows = data.task.validation[: int(data.task.validations)]
        alike = same_camera_counts(train.ids[rows], train.cams[rows])
        return float(true_map(arrays, variables, data, ids, alike))

    def describe(labels: np.ndarray, client: int) -> dict[str, list[Any]]:
        data, train = clients[client].task, trains[client]
        used = ~data.held[: len(train)]
        rows = [pseudo_label_quality(epoch[: len(train)][used], train.ids[used]) for epoch in labels]
        return {key: [row[key] for row in rows] for key in rows[0]}

    where = cluster.where
    if where == "auto":
        where = "host" if jax.default_backend() == "cpu" else "traced"
    return Task(
        name="unsupervised",
        arrays=arrays,
        client_names=tuple(site.name for site in sites),
        clients=clients,
        init=init,
        inputs=inputs,
        augment=reid.augmenting(config.data),
        forward=forward,
        loss=loss,
        score=score,
        plan=lambda seed, round_, client, epochs: np.zeros(
            (epochs, -(-int(clients[client].task.points) // batch), batch), np.int32
        ),
        evaluate=reid.evaluating(tests, spec, config.eval),
        tests=tuple(Examined(site.name, client) for site, client in tests),
        optimizer=make_optimizer(config.optimizer),
        learning_rate=step_decay(config.optimizer, config.rounds, config.last),
        labelling=Labelling(
            embed=embed,
            on_host=where == "host",
            assign_host=assign_host,
            assign=assign,
            prepare=prepare,
            unlabelled=np.full(widest_points, -1, np.int32),
            blank=jax.tree.map(np.asarray, proxies.blank(widest_points, spec.feature_dim)),
            describe=describe,
        ),
        remember=remember,
        validate=validate,
        pictures=reid.picture_format(config.data),
    )


def pseudo_label_quality(clusters: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    """`clusters`, how many there are; `clustered`, the share of pictures in one; `purity`, the share of these whose
    cluster's commonest person is theirs (None without a cluster).

    >>> pseudo_label_quality(np.array([0, 0, 0, 1, -1]), np.array([7, 7, 8, 8, 8]))
    {'clusters': 2, 'clustered': 0.8, 'purity': 0.75}
    """
    used = clusters >= 0
    if not used.any():
        return {"clusters": 0, "clustered": 0.0, "purity": None}
    _, people = np.unique(ids[used], return_inverse=True)
    table = np.zeros((clusters.max() + 1, people.max() + 1), np.int64)
    np.add.at(table, (clusters[used], people), 1)
    found = int((table.sum(axis=1) > 0).sum())
    return {
        "clusters": found,
        "clustered": float(used.mean()),
        "purity": float(table.max(axis=1).sum() / used.sum()),
    }


def _arrays(sites: Clients, copies: Sequence[int], pixels: np.ndarray | Streamed) -> Arrays:
    counts = [len(site.train) if isinstance(site, Site) else 0 for site in sites]
    firsts = np.cumsum([0, *counts])
    picture = [first + np.tile(np.arange(n), c) for first, n, c in zip(firsts[:-1], counts, copies, strict=True)]
    return Arrays(pixels, np.concatenate(picture).astype(np.int32))


def _clients(
    sites: Clients, known: Sequence[Mapping[str, int]], copies: Sequence[int], seed: int
) -> tuple[ClientData, ...]:
    points = [of["pictures"] * count for of, count in zip(known, copies, strict=True)]
    widest = max(points)
    most = reid.padded(max(of["validation"] for of in known))
    clients, first = [], 0
    for index, (site, of) in enumerate(zip(sites, known, strict=True)):
        held: np.ndarray = np.zeros(1, bool)
        codes: np.ndarray = np.zeros(1, np.int64)
        rows: np.ndarray = np.zeros(0, np.int64)
        probe: np.ndarray = np.zeros(reid.PROBE, np.int32)
        if isinstance(site, Site):
            held = _held(site, seed)
            codes = np.unique(site.train.cams, return_inverse=True)[1]
            rows = _validation_rows(held, (seed, index))
            training = first + np.flatnonzero(~np.resize(held, points[index]))
            probe = reid.probe_rows(training, (seed, index))
        data = SiteData(
            np.int32(first),
            np.int32(of["pictures"]),
            np.int32(points[index]),
            # Going round repeats the pictures copy by copy, as `Arrays.picture` does; what is behind takes no part.
            np.resize(codes, widest).astype(np.int32),
            np.resize(held, widest) | (np.arange(widest) >= points[index]),
            np.pad(rows, (0, most - len(rows))).astype(np.int32),
            np.int32(of["held"]),
            np.int32(of["validation"]),
        )
        trained = (of["pictures"] - of["held"]) * copies[index]
        clients.append(ClientData(np.int32(index), np.float32(trained), probe, data))
        first += points[index] if isinstance(site, Site) else 0
    return tuple(clients)


def _validation_rows(held: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """The held-out pictures, then `GALLERY` training pictures for each of them as far as there are so many."""
    queries, training = np.flatnonzero(held), np.flatnonzero(~held)
    count = min(GALLERY * len(queries), len(training))
    gallery = np.random.default_rng(key).choice(training, count, replace=False)
    return np.concatenate([queries, np.sort(gallery)])
