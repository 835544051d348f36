"""FedJAX: its federated averaging with the jitted per-client loop, its default. Needs an old JAX (0.4.13 works)."""

from __future__ import annotations

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from _work import Work, main
from jax_loop import init, logits


def play(work: Work):  # noqa: ANN201
    """See `_work.main`."""
    images = work.images[..., None]
    data = {
        client: fedjax.ClientDataset({"x": images[work.of(client)], "y": work.labels[work.of(client)].astype(np.int32)})
        for client in np.unique(work.participants).tolist()
    }

    def gradient(params, batch, key):  # noqa: ANN001, ANN202
        def loss(params):  # noqa: ANN001, ANN202
            each = -jax.nn.log_softmax(logits(params, batch["x"]))[jnp.arange(len(batch["y"])), batch["y"]]
            return jnp.mean(each)

        return jax.grad(loss)(params)

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        gradient,
        fedjax.optimizers.sgd(work.rate, work.momentum or None),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=work.batch, num_epochs=work.epochs, drop_remainder=False),
    )
    keys = jax.random.split(jax.random.PRNGKey(1), work.participants.shape[1])
    state = {"server": algorithm.init(init(jax.random.PRNGKey(0)))}

    def round_(number: int) -> None:
        clients = [(k, data[k], key) for k, key in zip(work.participants[number].tolist(), keys, strict=True)]
        state["server"], _ = algorithm.apply(state["server"], clients)
        jax.block_until_ready(state["server"].params)

    return round_, lambda: np.concatenate([np.ravel(p) for p in jax.tree_util.tree_leaves(state["server"].params)])


if __name__ == "__main__":
    main(play)
