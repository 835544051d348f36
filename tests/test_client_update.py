"""One client's round, computed by hand on a task of three weights whose errors every step halves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedklpr_jax import round as rounds
from fedklpr_jax.client_update import ClientUpdate, RoundInputs
from fedklpr_jax.federated import Message, Method, Upload
from fedklpr_jax.methods.fedpav import is_classifier
from fedklpr_jax.pruning import apply_mask
from fedklpr_jax.trees import merge
from tests.federations import toy_task

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")

TARGET = [[4.0, -8.0]]
RATE = jnp.float32(0.5)


def keep(*bits):
    """A mask over the shared leaves that keeps these entries of the trunk's kernel."""
    return {
        "params": {"trunk": {"kernel": np.array(bits)}},
        "batch_stats": {"trunk": {"count": np.array(True)}},
    }


def partial_sharing(**hooks):
    return Method("partial", is_local=is_classifier, **hooks)


def prepare(task, method, *, epochs=1, mask=None, model=None):
    """The stages and what client 0 needs for a round; `model` replaces the download's kernel."""
    server, clients = rounds.start(task, method, seed=0)
    shared = server.model
    if model is not None:
        shared = shared | {"params": {"trunk": {"kernel": jnp.array(model, jnp.float32)}}}
    plan = task.plan(0, 0, 0, epochs)
    client = clients[0]._replace(mask=mask)
    inputs = RoundInputs(
        Message(shared, mask), client, task.clients[0], plan, np.int32(plan.shape[1]), jax.random.key(1)
    )
    return ClientUpdate(task, method), inputs


def update(stages, inputs, rate=RATE):
    rates = jnp.full(len(inputs.plan), rate)
    return jax.jit(stages.update)(stages.task.arrays, jnp.int32(1), rates, inputs)


def trunk(model):
    return np.asarray(model["params"]["trunk"]["kernel"]).tolist()


@pytest.mark.short
def test_a_round_by_hand_and_the_loss_is_the_mean_over_the_last_epoch():
    stages, inputs = prepare(toy_task(TARGET, steps=2), partial_sharing(), epochs=2)
    upload, client, logs = update(stages, inputs)
    # Four steps, each of which halves the distance to (4, -8) and 10.
    assert trunk(upload.model) == [3.75, -7.5]
    assert client.local["params"]["classifier"]["kernel"].tolist() == [9.375]
    # The loss starts at (16 + 64 + 100) / 2 = 90 and falls by 4 a step: 90, 22.5 | 5.625, 1.40625.
    assert float(logs["loss"]) == (5.625 + 1.40625) / 2
    # Statistics run through all epochs and go up with the model.
    assert float(upload.model["batch_stats"]["trunk"]["count"]) == 4.0
    assert float(upload.scalars["images"]) == 1.0


def test_only_the_clients_own_steps_run_and_the_penalty_is_part_of_the_loss():
    task = toy_task(TARGET, steps=3)
    stages, inputs = prepare(task, partial_sharing(penalty=lambda step: 7.0 + 0.0 * step.params["trunk"]["kernel"][0]))
    upload, _, logs = update(stages, inputs._replace(steps=np.int32(1)))
    assert trunk(upload.model) == [2.0, -4.0]
    assert float(logs["loss"]) == 90.0 + 7.0


def test_the_learning_rate_scales_the_step():
    stages, inputs = prepare(toy_task(TARGET), partial_sharing())
    assert trunk(update(stages, inputs, jnp.float32(0.25))[0].model) == [1.0, -2.0]


def test_every_round_starts_a_fresh_optimiser():
    task = toy_task(TARGET, optimizer=optax.sgd(1.0, momentum=0.5))
    stages, inputs = prepare(task, partial_sharing())
    first, client, _ = update(stages, inputs)
    assert trunk(first.model) == [2.0, -4.0]
    second, _, _ = update(stages, inputs._replace(message=Message(first.model, None), client=client))
    # Old momentum would carry the second round to (4, -8), as it does within one.
    assert trunk(second.model) == [3.0, -6.0]
    stages, inputs = prepare(dataclasses.replace(task, plan=toy_task(TARGET, steps=2).plan), partial_sharing())
    assert trunk(update(stages, inputs)[0].model) == [4.0, -8.0]


def test_pruned_weights_stay_exactly_zero_through_adam_with_weight_decay():
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam(), optax.scale(-0.3))
    task = toy_task(TARGET, optimizer=optimizer, steps=5)
    stages, inputs = prepare(task, partial_sharing(), epochs=3, mask=keep(True, False), model=[1.0, 0.0])
    upload, _, _ = update(stages, inputs)
    alive, pruned = trunk(upload.model)
    assert pruned == 0.0 and alive > 2.0


def test_gradients_are_masked_before_the_optimiser_sees_them():
    # The gradient is (-3, -4): clipped to length 1, it moves the first weight by 0.6 with the pruned one, by 1 without.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    task = dataclasses.replace(
        toy_task([[3.0, 4.0]], optimizer=optimizer),
        loss=lambda arrays, outputs, rows, client: 0.5 * jnp.sum(outputs["embedding"] ** 2),
    )
    for mask, moved in ((keep(True, False), 0.5), (keep(True, True), 0.3)):
        stages, inputs = prepare(task, partial_sharing(), mask=mask)
        assert trunk(update(stages, inputs)[0].model)[0] == pytest.approx(moved)


def test_parameters_are_masked_after_every_step():
    # This optimiser moves every weight, whatever its gradient: only the mask holds the pruned one at 0.
    push = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u - 2.0, updates))
    task = toy_task(TARGET, optimizer=optax.chain(push, optax.sgd(1.0)), steps=2)
    stages, inputs = prepare(task, partial_sharing(), mask=keep(True, False))
    upload, client, logs = update(stages, inputs)
    # Steps of (error + 2) / 2: 0 -> 3 -> 4.5 for the first weight, 0 -> 6 -> 9 for the classifier, never masked.
    assert trunk(upload.model) == [4.5, 0.0]
    assert client.local["params"]["classifier"]["kernel"].tolist() == [9.0]
    # Were the second weight let go after step 1, the second loss would not hold its whole 64 / 2.
    assert float(logs["loss"]) == ((16 + 64 + 100) / 2 + (1 + 64 + 16) / 2) / 2


def test_a_mask_set_at_the_end_of_an_epoch_holds_in_the_next():
    def prune_after_the_first(model, client, context, epoch):
        first = (epoch == 0) & (context.round == 1)
        mask = jax.tree.map(lambda new, old: jnp.where(first, new, old), keep(False, True), client.mask)
        return apply_mask(model, mask), client._replace(mask=mask)

    task = toy_task(TARGET)
    stages, inputs = prepare(task, partial_sharing(on_epoch_end=prune_after_the_first), epochs=2, mask=keep(True, True))
    upload, client, logs = update(stages, inputs)
    assert trunk(upload.model) == [0.0, -6.0]
    assert client.mask["params"]["trunk"]["kernel"].tolist() == [False, True]
    # In the second epoch the first weight is 0 again: (16 + 16 + 25) / 2.
    assert float(logs["loss"]) == 28.5


def test_the_reference_is_the_frozen_download_in_eval_mode_on_the_same_images():
    def noisy(key, inputs):
        return inputs + jax.random.normal(key, inputs.shape)

    plain = toy_task(TARGET, steps=2)

    def forward(variables, inputs, client, train, key):
        outputs, stats = plain.forward(variables, inputs, client, train, key)
        return outputs | {"embedding": outputs["embedding"] + (100.0 if train else 0.0)}, stats

    def distance(step):
        return jnp.sum(step.outputs["embedding"] - step.reference()["embedding"])

    # No loss of the task; the penalty's gradient is 1 a weight, so that each step moves both by -0.5.
    task = dataclasses.replace(plain, augment=noisy, forward=forward, loss=lambda *_: jnp.float32(0))
    stages, inputs = prepare(task, partial_sharing(penalty=distance), model=[5.0, 7.0])
    upload, _, logs = update(stages, inputs)
    assert trunk(upload.model) == [4.0, 6.0]
    # 200 in step 1, 199 in step 2, whatever the noise.
    assert float(logs["loss"]) == pytest.approx(199.5, abs=1e-4)


def test_begin_scores_with_the_old_local_leaves_and_finish_with_the_trained_ones():
    def begin(client, context):
        return context.received, client._replace(memory=context.score(context.received))

    def finish(model, client, context):
        logs = {
            "before": client.memory,
            "after": context.score(model),
            "probe": context.probe(merge(context.received, context.received_local))["embedding"],
        }
        return Upload(model, None, {"images": context.images}), client, logs

    method = partial_sharing(begin=begin, finish=finish, client_memory=lambda model, mask: jnp.float32(0))
    stages, inputs = prepare(toy_task(TARGET), method, model=[1.0, 1.0])
    inputs.client.local["params"]["classifier"]["kernel"] = np.float32([6.0])
    _, _, logs = update(stages, inputs)
    assert (float(logs["before"]), float(logs["after"])) == (6.0, 8.0)
    # D_batch is what `ClientData.probe` says, 32 images, and the received model is still what came.
    np.testing.assert_array_equal(logs["probe"], np.tile([-3.0, 9.0], (32, 1)))


def test_fine_tuning_trains_the_personalised_model_and_leaves_the_mask():
    def personalise(message, client):
        return apply_mask(message.model, client.mask)

    task = toy_task(TARGET, steps=2)
    stages, inputs = prepare(task, partial_sharing(personalise=personalise), mask=keep(True, False), model=[0.0, 3.0])
    before = jax.tree.map(np.array, inputs.client)
    variables = jax.jit(stages.fine_tune)(task.arrays, jnp.int32(1), RATE[None], inputs)
    assert trunk(variables) == [3.0, 0.0]
    assert variables["params"]["classifier"]["kernel"].tolist() == [7.5]
    for now, then in zip(jax.tree.leaves(inputs.client), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(now, then)


def test_the_random_key_differs_by_step_and_epoch_and_nothing_else_decides():
    seen = dataclasses.replace(
        toy_task(TARGET, steps=2),
        augment=lambda key, inputs: jax.random.uniform(key, inputs.shape),
        optimizer=optax.sgd(2.0),
    )
    # With this step size a weight becomes the last picture it saw.
    stages, inputs = prepare(seen, partial_sharing())
    whole = trunk(update(stages, inputs)[0].model)
    first_only = trunk(update(stages, inputs._replace(steps=np.int32(1)))[0].model)
    stages, two = prepare(seen, partial_sharing(), epochs=2)
    assert len({tuple(whole), tuple(first_only), tuple(trunk(update(stages, two)[0].model))}) == 3
    assert trunk(update(*prepare(seen, partial_sharing()))[0].model) == whole
    other = inputs._replace(key=jax.random.key(2))
    assert trunk(update(*(prepare(seen, partial_sharing())[0], other))[0].model) != whole
