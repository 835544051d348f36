"""One client's round as pure stages: `begin -> E x (embed, label, train_epoch) -> finish`.

The same functions are mapped over simulated clients (`round.py`) and run alone at a camera site. Where the data has its
labels there is nothing to embed; where a task makes its own, they are assigned on the host between the compiled stages,
or by a traced function inside `update`, which is then the whole client round as one function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedklpr_jax.aggregation import client_terms
from fedklpr_jax.federated import ClientContext, ClientData, ClientState, Epoch, Message, Method, Step, Task, Upload
from fedklpr_jax.pruning import apply_mask, count_true
from fedklpr_jax.refusals import scalars_hold
from fedklpr_jax.trees import PyTree, finite, merge, path_map, split

# Beside the steps of an epoch, which draw by their number.
SAMPLER = 2**31 - 1


class RoundInputs(NamedTuple):
    """What one client needs for a round (a leading axis [K] on every leaf when stacked).

    `message` its download, decoded (one `client_maps.Common` where all got the same); `client` its state; `data` its
    `ClientData`; `plan` int32 [epochs, steps, batch]; `steps` int32, how many of the plan's steps are its own (the rest
    is padding; 0 = a client that only fills a place); `key` its random key of the round.
    """

    message: Message | Any
    client: ClientState
    data: ClientData
    plan: Any
    steps: Any
    key: jax.Array


class Training(NamedTuple):
    """What flows from stage to stage: the complete variables in training, the optimiser's and the client's state, the
    task's `memory`, and of the last epoch the mean `loss` (float32) and the number of `steps` (int32)."""

    variables: PyTree
    optimizer: PyTree
    client: ClientState
    memory: PyTree
    loss: jax.Array
    steps: jax.Array


class Found(NamedTuple):
    """What an epoch's labels are: `features` float32 [points, d] they were made from, and the `labels`."""

    features: jax.Array
    labels: PyTree


class Told(NamedTuple):
    """What the server tells of an upload: whether it is `finite`, its `scalars`, and how many entries its mask `kept`,
    int32 (None = it has no mask)."""

    finite: jax.Array
    scalars: dict[str, jax.Array]
    kept: jax.Array | None


def told_of(upload: Upload) -> Told:
    """What there is to tell of an upload, traced."""
    kept = None
    if upload.mask is not None:
        kept = count_true(upload.mask)
    return Told(finite((upload.model, upload.scalars)), upload.scalars, kept)


class ClientUpdate(NamedTuple):
    """The stages and a context for them, bound to a task and a method. All pure, traceable, vmap-safe.

    `start(model, client)` sets up training of a model as it is (the personalised model's extra epochs); `begin` lets
    the method prepare it first. `rates` are float32 [E], a factor on the step size for every local epoch.
    """

    task: Task
    method: Method

    def context(
        self, arrays: PyTree, round_: jax.Array, inputs: RoundInputs, data: ClientData, local: PyTree
    ) -> ClientContext:
        """The tools a method gets, over the client's `local` leaves and the labels and memory of `data`."""
        task = self.task

        def score(model: PyTree) -> jax.Array:
            return task.score(arrays, merge(model, local), data)

        def probe(variables: PyTree) -> dict[str, jax.Array]:
            return task.forward(variables, task.inputs(arrays, data.probe), data, False, inputs.key)[0]

        def curvature(model: PyTree) -> tuple[PyTree, PyTree]:
            variables = merge(model, local)

            def objective(params: PyTree, rows: jax.Array) -> jax.Array:
                outputs, _ = task.forward(
                    variables | {"params": params}, task.inputs(arrays, rows), data, True, inputs.key
                )
                return task.loss(arrays, outputs, rows, data)

            def batch(index: jax.Array, sums: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
                rows = inputs.plan[0, index]
                gradient = jax.grad(objective)(variables["params"], rows)
                share = 1.0 / jnp.maximum(inputs.steps, 1)
                return (
                    jax.tree.map(lambda total, g: total + share * g, sums[0], gradient),
                    jax.tree.map(lambda total, g: total + share * len(rows) * jnp.square(g), sums[1], gradient),
                )

            zeros = jax.tree.map(jnp.zeros_like, variables["params"])
            found = jax.lax.fori_loop(0, inputs.steps, batch, (zeros, zeros))
            mean, fisher = (split({"params": tree}, self.method.is_local)[0]["params"] for tree in found)
            return mean, fisher

        return ClientContext(
            round_, inputs.message.model, inputs.client.local, data.images, score, probe, curvature, data.index
        )

    def start(self, model: PyTree, client: ClientState) -> Training:
        """Training of `model` with the client's local leaves and a fresh optimiser."""
        variables = merge(model, client.local)
        optimizer = self.task.optimizer.init(variables["params"])
        return Training(variables, optimizer, client, self._blank(), jnp.float32(0), jnp.int32(0))

    def prepare(self, arrays: PyTree, round_: jax.Array, inputs: RoundInputs) -> tuple[PyTree, ClientState]:
        """What the method makes of the download: the model to train, and the client's state."""
        data = inputs.data._replace(labels=inputs.client.labels, memory=self._blank())
        context = self.context(arrays, round_, inputs, data, inputs.client.local)
        return self.method.begin(inputs.client, context)

    def begin(self, arrays: PyTree, round_: jax.Array, inputs: RoundInputs) -> Training:
        """First stage: training of what the method makes of the download."""
        return self.start(*self.prepare(arrays, round_, inputs))

    def personalised(self, inputs: RoundInputs) -> Training:
        """Start of training the model this client ends with."""
        return self.start(self.method.personalise(inputs.message, inputs.client), inputs.client)

    def embed(self, arrays: PyTree, inputs: RoundInputs, training: Training) -> jax.Array:
        """What the next epoch's labels are made from: float32 [points, d]."""
        labelling = self.task.labelling
        assert labelling, f"task {self.task.name} has its labels"
        return labelling.embed(arrays, training.variables, inputs.data)

    def assign(
        self,
        arrays: PyTree,
        round_: jax.Array,
        epoch: jax.Array,
        inputs: RoundInputs,
        training: Training,
        features: jax.Array,
    ) -> PyTree:
        """The labels that a traced function finds."""
        labelling = self.task.labelling
        assert labelling, f"task {self.task.name} has its labels"
        return labelling.assign(features, inputs.data._replace(labels=training.client.labels), round_, epoch)

    def train_epoch(
        self,
        arrays: PyTree,
        round_: jax.Array,
        learning_rate: jax.Array,
        epoch: jax.Array,
        inputs: RoundInputs,
        training: Training,
        found: Found | None = None,
    ) -> Training:
        """One local epoch under the client's mask; the trip count is the client's own (no padding steps)."""
        task, method = self.task, self.method
        received = merge(inputs.message.model, inputs.client.local)
        mask = self._full_mask(training)
        chex.assert_rank([inputs.plan, inputs.steps], [3, 0])
        epoch_key = jax.random.fold_in(inputs.key, epoch)
        if found is None:
            work, labels = Epoch(inputs.plan[epoch], inputs.steps, ()), ()
        else:
            assert task.labelling
            labels = found.labels
            key = jax.random.fold_in(epoch_key, SAMPLER)
            work = task.labelling.prepare(arrays, found.features, labels, inputs.data, key)
            work = work._replace(steps=jnp.where(inputs.steps > 0, work.steps, 0))

        def moving(tree: PyTree) -> PyTree:
            moves = method.trains
            if moves is None:
                return tree
            return path_map(lambda path, leaf: jnp.where(moves(f"params/{path}", epoch), leaf, 0.0), tree)

        def step(carry: tuple) -> tuple:
            index, params, stats, optimizer, memory, total = carry
            data = inputs.data._replace(labels=labels, memory=memory)
            # By epoch and step, not by place in the padded plan: a site alone draws what it draws in simulation.
            augment_key, train_key = jax.random.split(jax.random.fold_in(epoch_key, index))
            rows = work.plan[index]
            images = task.augment(augment_key, task.inputs(arrays, rows))

            def objective(params: PyTree) -> tuple[jax.Array, tuple]:
                outputs, new_stats = task.forward(
                    {"params": params, "batch_stats": stats}, images, data, True, train_key
                )
                shared, _ = split({"params": params}, method.is_local)
                penalty = method.penalty(
                    Step(
                        round_,
                        shared.get("params", {}),
                        inputs.message.model,
                        outputs,
                        lambda: task.forward(received, images, data, False, train_key)[0],
                    )
                )
                return task.loss(arrays, outputs, rows, data) + penalty, (new_stats, outputs)

            (loss, (stats, outputs)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
            # Frozen leaves neither move nor leave a trace in the optimiser.
            updates, optimizer = task.optimizer.update(apply_mask(moving(gradients), mask), optimizer, params)
            updates = jax.tree.map(lambda u: learning_rate * u, moving(updates))
            params = apply_mask(optax.apply_updates(params, updates), mask)
            return index + 1, params, stats, optimizer, task.remember(outputs, rows, data), total + loss

        def goes_on(carry: tuple) -> jax.Array:
            more = carry[0] < work.steps
            return more if task.stop is None else more & ~task.stop(carry[4])

        variables = training.variables
        carry = (
            jnp.int32(0), variables["params"], variables.get("batch_stats", {}), training.optimizer, work.memory,
            jnp.float32(0),
        )  # fmt: skip
        steps, params, stats, optimizer, memory, total = jax.lax.while_loop(goes_on, step, carry)
        model, local = split({"params": params, "batch_stats": stats}, method.is_local)
        client = training.client._replace(local=local, labels=labels)
        context = self.context(arrays, round_, inputs, inputs.data._replace(labels=labels, memory=memory), local)
        model, client = method.on_epoch_end(model, client, context, epoch)
        return Training(merge(model, client.local), optimizer, client, memory, total / jnp.maximum(steps, 1), steps)

    def finish(
        self, arrays: PyTree, round_: jax.Array, inputs: RoundInputs, training: Training
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        """Last stage: prune, weigh, make the upload. Logs hold `loss` and what the method adds."""
        model, local = split(training.variables, self.method.is_local)
        client = training.client._replace(local=local)
        data = inputs.data._replace(labels=client.labels, memory=training.memory)
        context = self.context(arrays, round_, inputs, data, local)
        upload, client, logs = self.method.finish(model, client, context)
        return upload, client, {"loss": training.loss, **logs}

    def epochs(
        self, arrays: PyTree, round_: jax.Array, rates: jax.Array, inputs: RoundInputs, training: Training
    ) -> tuple[Training, dict[str, PyTree]]:
        """All epochs as one loop; with labels made on the way also these, [E, ...], and the `steps` [E] of each."""
        labelling = self.task.labelling

        def one(training: Training, now: tuple[jax.Array, jax.Array]) -> tuple[Training, dict[str, PyTree]]:
            epoch, rate = now
            if labelling is None:
                return self.train_epoch(arrays, round_, rate, epoch, inputs, training), {}
            features = self.embed(arrays, inputs, training)
            labels = self.assign(arrays, round_, epoch, inputs, training, features)
            training = self.train_epoch(arrays, round_, rate, epoch, inputs, training, Found(features, labels))
            return training, {"labels": labels, "steps": training.steps}

        return jax.lax.scan(one, training, (jnp.arange(len(rates)), rates))

    def update(
        self, arrays: PyTree, round_: jax.Array, rates: jax.Array, inputs: RoundInputs
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        """The whole client round as one function."""
        training = self.begin(arrays, round_, inputs)
        training, made = self.epochs(arrays, round_, rates, inputs, training)
        upload, client, logs = self.finish(arrays, round_, inputs, training)
        return upload, client, logs | made

    def contribute(
        self, arrays: PyTree, round_: jax.Array, rates: jax.Array, inputs: RoundInputs
    ) -> tuple[tuple[PyTree, PyTree], tuple[ClientState, dict[str, jax.Array], Told]]:
        """The whole client round; of the upload only the terms of its mean by images, and what is told of it."""
        upload, client, logs = self.update(arrays, round_, rates, inputs)
        told = told_of(upload)
        # Who only fills a place, and who found nothing to train on, has no steps.
        trained = jnp.any(logs["steps"] > 0) if "steps" in logs else inputs.steps > 0
        accepted = told.finite & finite(client.local) & trained & scalars_hold(told.scalars, inputs.data.images)
        weight = jnp.where(accepted, upload.scalars["images"], 0.0)
        return client_terms(upload.model, upload.mask, weight), (client, logs, told)

    def fine_tune(self, arrays: PyTree, round_: jax.Array, rates: jax.Array, inputs: RoundInputs) -> PyTree:
        """The "after" of every table: the personalised model after E epochs under its mask, not uploaded.

        Returns complete variables.
        """
        return self.epochs(arrays, round_, rates, inputs, self.personalised(inputs))[0].variables

    def _blank(self) -> PyTree:
        """The task's memory before the first epoch."""
        return jax.tree.map(jnp.asarray, self.task.labelling.blank) if self.task.labelling else ()

    def _full_mask(self, training: Training) -> PyTree | None:
        """The client's mask over all parameters in training, local ones kept; None for dense methods."""
        mask = training.client.mask
        if mask is None:
            return None
        _, local = split(training.variables, self.method.is_local)
        kept = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), local)
        return merge(mask, kept)["params"]
