"""One client's round as three pure stages: `begin -> E x train_epoch -> finish`.

The same functions are mapped over simulated clients (`round.py`) and run alone at a camera site.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedklpr_jax.federated import ClientContext, ClientData, ClientState, Message, Method, Step, Task, Upload
from fedklpr_jax.pruning import apply_mask
from fedklpr_jax.trees import PyTree, merge, split


class RoundInputs(NamedTuple):
    """What one client needs for a round (a leading axis [K] on every leaf when stacked).

    `message` its download, decoded; `client` its state; `data` its `ClientData`; `plan` int32 [epochs, steps, batch];
    `steps` int32, how many of the plan's steps are its own (the rest is padding); `key` its random key of the round.
    """

    message: Message
    client: ClientState
    data: ClientData
    plan: Any
    steps: Any
    key: jax.Array


class Training(NamedTuple):
    """What flows from stage to stage: the complete variables in training, the optimiser's and the client's state, and
    the mean loss of the last epoch (float32)."""

    variables: PyTree
    optimizer: PyTree
    client: ClientState
    loss: jax.Array


class ClientUpdate(NamedTuple):
    """The three stages and a context for them, bound to a task and a method. All pure, traceable, vmap-safe.

    `start(arrays, round, model, inputs) -> Training` sets up training of a model as it is (the personalised model's
    extra epochs); `begin` lets the method prepare it first.
    """

    task: Task
    method: Method

    def context(self, arrays: PyTree, round_: jax.Array, inputs: RoundInputs, local: PyTree) -> ClientContext:
        """The tools a method gets, over the client's `local` leaves."""
        task, data = self.task, inputs.data

        def score(model: PyTree) -> jax.Array:
            return task.score(arrays, merge(model, local), data)

        def probe(variables: PyTree) -> dict[str, jax.Array]:
            return task.forward(variables, task.inputs(arrays, data.probe), data, False, inputs.key)[0]

        return ClientContext(round_, inputs.message.model, inputs.client.local, data.images, score, probe)

    def start(self, model: PyTree, client: ClientState) -> Training:
        """Training of `model` with the client's local leaves and a fresh optimiser."""
        variables = merge(model, client.local)
        return Training(variables, self.task.optimizer.init(variables["params"]), client, jnp.float32(0))

    def begin(self, arrays: PyTree, round_: jax.Array, inputs: RoundInputs) -> Training:
        """Stage 1: what the method makes of the download."""
        context = self.context(arrays, round_, inputs, inputs.client.local)
        return self.start(*self.method.begin(inputs.client, context))

    def train_epoch(
        self,
        arrays: PyTree,
        round_: jax.Array,
        learning_rate: jax.Array,
        inputs: RoundInputs,
        training: Training,
        epoch: jax.Array,
    ) -> Training:
        """Stage 2: one local epoch under the client's mask; the trip count is the client's own (no padding steps)."""
        task, method, data = self.task, self.method, inputs.data
        received = merge(inputs.message.model, inputs.client.local)
        mask = self._full_mask(training)
        chex.assert_rank([inputs.plan, inputs.steps], [3, 0])
        plan, epoch_key = inputs.plan[epoch], jax.random.fold_in(inputs.key, epoch)

        def step(index: jax.Array, carry: tuple) -> tuple:
            params, stats, optimizer, total = carry
            # By epoch and step, not by place in the padded plan: a site alone draws what it draws in simulation.
            augment_key, train_key = jax.random.split(jax.random.fold_in(epoch_key, index))
            rows = plan[index]
            images = task.augment(augment_key, task.inputs(arrays, rows))

            def objective(params: PyTree) -> tuple[jax.Array, PyTree]:
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
                return task.loss(arrays, outputs, rows, data) + penalty, new_stats

            (loss, stats), gradients = jax.value_and_grad(objective, has_aux=True)(params)
            updates, optimizer = task.optimizer.update(apply_mask(gradients, mask), optimizer, params)
            updates = jax.tree.map(lambda u: learning_rate * u, updates)
            return apply_mask(optax.apply_updates(params, updates), mask), stats, optimizer, total + loss

        variables = training.variables
        carry = (variables["params"], variables.get("batch_stats", {}), training.optimizer, jnp.float32(0))
        params, stats, optimizer, total = jax.lax.fori_loop(0, inputs.steps, step, carry)
        model, local = split({"params": params, "batch_stats": stats}, method.is_local)
        client = training.client._replace(local=local)
        context = self.context(arrays, round_, inputs, local)
        model, client = method.on_epoch_end(model, client, context, epoch)
        return Training(merge(model, client.local), optimizer, client, total / jnp.maximum(inputs.steps, 1))

    def finish(
        self, arrays: PyTree, round_: jax.Array, inputs: RoundInputs, training: Training
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        """Stage 3: prune, weigh, make the upload. Logs hold `loss` and what the method adds."""
        model, local = split(training.variables, self.method.is_local)
        client = training.client._replace(local=local)
        context = self.context(arrays, round_, inputs, local)
        upload, client, logs = self.method.finish(model, client, context)
        return upload, client, {"loss": training.loss, **logs}

    def epochs(
        self,
        arrays: PyTree,
        round_: jax.Array,
        learning_rate: jax.Array,
        inputs: RoundInputs,
        training: Training,
    ) -> Training:
        """All epochs of the plan, as one loop."""
        return jax.lax.fori_loop(
            0,
            inputs.plan.shape[0],
            lambda epoch, state: self.train_epoch(arrays, round_, learning_rate, inputs, state, epoch),
            training,
        )

    def update(
        self, arrays: PyTree, round_: jax.Array, learning_rate: jax.Array, inputs: RoundInputs
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        """The whole client round as one function."""
        training = self.begin(arrays, round_, inputs)
        training = self.epochs(arrays, round_, learning_rate, inputs, training)
        return self.finish(arrays, round_, inputs, training)

    def fine_tune(
        self, arrays: PyTree, round_: jax.Array, learning_rate: jax.Array, inputs: RoundInputs
    ) -> PyTree:
        """The "after" of every table: the personalised model after the plan's epochs under its mask, not uploaded.

        Returns complete variables.
        """
        model = self.method.personalise(inputs.message, inputs.client)
        training = self.start(model, inputs.client)
        return self.epochs(arrays, round_, learning_rate, inputs, training).variables

    def _full_mask(self, training: Training) -> PyTree | None:
        """The client's mask over all parameters in training, local ones kept; None for dense methods."""
        mask = training.client.mask
        if mask is None:
            return None
        _, local = split(training.variables, self.method.is_local)
        kept = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), local)
        return merge(mask, kept)["params"]
