"""Unsupervised person re-ID as FedUReID trains it: clusters grow from single images, a few merges a round.

Zhuang et al., "Joint optimization in edge-cloud continuum for federated unsupervised person re-identification", ACM MM
2021, on bottom-up clustering (BUC, Lin et al., AAAI 2019). Neither identities nor cameras are used. In a client's first
round every picture is a cluster; at the start of each later one `bottom_up.merge` joins the nearest:

    int(0.05 n) merges a round, or, "personalised clustering", (n - identities) / rounds
    L = cross-entropy over 10 x V^T        x the normalised embedding, V one row a cluster
    V[y] <- normalise((V[y] + x) / 2)      after every step, sample by sample

over the pictures in random order, 16 at a time. "Personalised epoch": an epoch ends with the first batch that is all
right, or when the mean precision of its batches exceeds 0.95 (precision: the share whose nearest row is their own); not
while all clusters are single pictures, as in the authors' code.

Ours: V starts every epoch as the normalised mean embeddings of the clusters (the authors' starts every round at zero);
merges look at the model that the round begins with (their code: at the trained one, or by a switch at the global one)
and leave two clusters; the last batch of an epoch, if not full, is left out as in BUC, but a client has one batch at
least. Held-out pictures, validation score and report are those of `unsupervised.py`; every picture counts once, for its
copies would be the first to be merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedklpr_jax import bottom_up, contrast, proxies
from fedklpr_jax.data.site import Clients, Site
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import ClientData, Epoch, Task
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.tasks import reid, unsupervised
from fedklpr_jax.tasks.unsupervised import Arrays
from fedklpr_jax.trees import PyTree

RUNNING_PRECISION = 0.95
FIRST_DECAY = 0.1


class Table(NamedTuple):
    """The memory of an epoch: `rows`, V as a bank of one proxy a cluster; the `precision` of the last batch and the
    `total` of all, float32; `batches` int32, how many there were; `may_stop` bool, whether clusters were merged yet."""

    rows: proxies.Bank
    precision: Any
    total: Any
    batches: Any
    may_stop: Any


def parse_identities(text: str, names: Sequence[str]) -> list[float | None]:
    """How many people each client is thought to see: `client:number` pairs, and a number without a name for all others;
    from 1 on a count, below it a share of the client's pictures; None where nothing is said.

    Raises:
      InputError: a name that is no client's.

    >>> parse_identities("0.1,viper:316", ["ward", "viper"])
    [0.1, 316.0]
    """
    entries = [entry.strip().rpartition(":") for entry in text.split(",")] if text else []
    pairs = {name: float(number) for name, _, number in entries}
    others = pairs.pop("", None)
    for name in pairs:
        if name not in names:
            raise InputError(f"config.bottom_up.identities: {name!r} is no client; there are {', '.join(names)}")
    return [pairs.get(name, others) for name in names]


def merges_a_round(images: int, identities: float | None, *, share: float, rounds: int) -> int:
    """By how many clusters a round has fewer: `int(share * images)`, or `int((images - identities) / rounds)`.

    Args:
      images: the client's pictures.
      identities: how many people they show, a share of the pictures if below 1; None = no estimate.
      share: of the pictures.
      rounds: of the run.

    Source: FedUReID's code.

    >>> merges_a_round(450, None, share=0.05, rounds=20), merges_a_round(450, 93, share=0.05, rounds=20)
    (22, 17)
    """
    if identities is None:
        return int(share * images)
    people = identities * images if identities < 1 else identities
    return max(int((images - people) / rounds), 0)


def step_sizes(options: Any) -> Callable[[int, int], float]:
    """Factor on the step size in each (round, epoch): `first` in round 0, a tenth of it from epoch `first_decay_from`
    on, and 1 from round 1 on. `options` is `config.bottom_up`."""

    def factor(round_: int, epoch: int) -> float:
        if round_ > 0:
            return 1.0
        return options.first * (FIRST_DECAY if epoch >= options.first_decay_from else 1.0)

    return factor


def make_task(
    sites: Clients,
    spec: ModelSpec,
    config: Any,
    *,
    trunk: PyTree | None = None,
    exams: Sequence[reid.Exam] | None = None,
) -> Task:
    """FedUReID's task over `sites`, one client each; labels are always made on the host.

    Args:
      sites: the clients' pictures, of which training reads pixels alone, or of clients on other machines their
        `unsupervised.sizes`.
      spec: the network.
      config: the run's configuration (`bottom_up`, `data`, `optimizer`, `eval`, `seed`, `rounds` are read).
      trunk: the network's variables to start from; None = random ones.
      exams: what is tested; None = each client on its own site.

    Raises:
      InputError: unknown clients in `bottom_up.identities`, or a client with too few pictures.
    """
    options = config.bottom_up
    people = parse_identities(options.identities, [site.name for site in sites])
    merges = [
        merges_a_round(len(site.train) if isinstance(site, Site) else site.sizes["pictures"], number,
                       share=options.merge, rounds=config.rounds)
        for site, number in zip(sites, people, strict=True)
    ]  # fmt: skip
    once = config.copy_and_resolve_references()
    once.data.copies = "1"
    # The same pictures, held-out pictures, embeddings, scores and tests; what is made of them is another.
    base = unsupervised.make_task(sites, spec, once, trunk=trunk, exams=exams)
    assert base.labelling
    points, batch = len(base.labelling.unlabelled), options.batch
    most = max(points // batch, 1)

    def forward(
        variables: PyTree, images: jax.Array, client: ClientData, train: bool, key: jax.Array
    ) -> tuple[dict[str, jax.Array], PyTree]:
        outputs, new_stats = spec.apply(reid.trunk_of(variables), images, train, {"dropout": key})
        features = reid.normalise_features(outputs["embedding"])
        logits = contrast.proxy_logits(features, client.memory.rows, temperature=1.0 / options.scale)
        return outputs | {"logits": logits}, {"trunk": new_stats}

    def own_rows(rows: jax.Array, client: ClientData) -> jax.Array:
        return client.memory.rows.of_point[rows - client.task.first]

    def loss(arrays: Arrays, outputs: dict[str, jax.Array], rows: jax.Array, client: ClientData) -> jax.Array:
        each = optax.losses.softmax_cross_entropy_with_integer_labels(outputs["logits"], own_rows(rows, client))
        return jnp.mean(each)

    def remember(outputs: dict[str, jax.Array], rows: jax.Array, client: ClientData) -> Table:
        table: Table = client.memory
        features = jax.lax.stop_gradient(reid.normalise_features(outputs["embedding"]))
        right = jnp.argmax(outputs["logits"], axis=1) == own_rows(rows, client)
        precision = jnp.mean(right.astype(jnp.float32))
        return Table(
            # Halving both does not turn the sum: normalised it is the same.
            proxies.move(table.rows, features, rows - client.task.first, momentum=0.5),
            precision,
            table.total + precision,
            table.batches + 1,
            table.may_stop,
        )

    def stop(table: Table) -> jax.Array:
        good = (table.precision == 1.0) | (table.total > RUNNING_PRECISION * table.batches)
        return table.may_stop & (table.batches > 0) & good

    def assign_host(features: np.ndarray, client: int, last: np.ndarray, round_: int, epoch: int) -> np.ndarray:
        count = int(base.clients[client].task.points)
        labels = np.full(points, -1, np.int32)
        if last[0] < 0:
            labels[:count] = np.arange(count)
        elif epoch > 0 or round_ >= config.rounds:
            # A run has T - 1 merges; what is trained after its end keeps the clusters of the last round.
            labels[:count] = last[:count]
        else:
            fewer = min(merges[client], max(int(last.max()) - 1, 0))
            labels[:count] = bottom_up.merge(features[:count], last[:count], fewer, size_weight=options.size)
        return labels

    def assign(features: jax.Array, client: ClientData, round_: jax.Array, epoch: jax.Array) -> jax.Array:
        raise NotImplementedError("bottom-up clusters are merged on the host: use assign_host")

    def prepare(
        arrays: Arrays, features: jax.Array, labels: jax.Array, client: ClientData, key: jax.Array
    ) -> Epoch:
        clusters = jnp.where(client.task.held, -1, labels)
        rows = proxies.build(features, clusters, jnp.zeros_like(clusters))
        training = clusters >= 0
        count, found = jnp.sum(training), jnp.sum(rows.clusters >= 0)
        order = jnp.argsort(jnp.where(training, jax.random.uniform(key, (points,)), jnp.inf))
        plan = order[jnp.arange(most * batch) % jnp.maximum(count, 1)].reshape(most, batch)
        steps = jnp.where(found > 1, jnp.maximum(count // batch, 1), 0)
        table = Table(rows, jnp.float32(0), jnp.float32(0), jnp.int32(0), found < count)
        return Epoch((plan + client.task.first).astype(jnp.int32), steps.astype(jnp.int32), table)

    empty = jax.tree.map(np.asarray, proxies.blank(points, spec.feature_dim))
    return dataclasses.replace(
        base,
        name="bottom_up",
        forward=forward,
        loss=loss,
        plan=lambda seed, round_, client, epochs: np.zeros(
            (epochs, max(int(base.clients[client].images) // batch, 1), batch), np.int32
        ),
        learning_rate=step_sizes(options),
        labelling=dataclasses.replace(
            base.labelling,
            on_host=True,
            assign_host=assign_host,
            assign=assign,
            prepare=prepare,
            blank=Table(empty, np.float32(0), np.float32(0), np.int32(0), np.bool_(False)),
        ),
        remember=remember,
        stop=stop if options.early else None,
        first_epochs=options.first_epochs,
    )
