"""A plain JAX loop: a client's epochs as one compiled function with its own number of steps, a running weighted sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from _work import Work, main
from jax import lax


def init(key):  # noqa: ANN001, ANN201
    """The parameters of the small network of FedOBP."""
    shapes = {"conv1": (5, 5, 1, 32), "conv2": (5, 5, 32, 64), "dense": (1024, 512), "out": (512, 10)}
    params = {}
    for name, shape in shapes.items():
        key, one, two = jax.random.split(key, 3)
        bound = np.prod(shape[:-1]) ** -0.5
        params[name] = (jax.random.uniform(one, shape, minval=-bound, maxval=bound),
                        jax.random.uniform(two, shape[-1:], minval=-bound, maxval=bound))  # fmt: skip
    return params


def logits(params, images):  # noqa: ANN001, ANN201
    """[n, 10] of [n, 28, 28, 1]."""
    x = images
    for name in ("conv1", "conv2"):
        kernel, bias = params[name]
        x = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
        n, h, w, c = x.shape
        x = jax.nn.relu(x).reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["dense"][0] + params["dense"][1])
    return x @ params["out"][0] + params["out"][1]


def play(work: Work):  # noqa: ANN201
    """See `_work.main`."""
    images, labels = jnp.asarray(work.images[..., None]), jnp.asarray(work.labels.astype(np.int32))
    rng = np.random.default_rng(0)

    def objective(params, rows):  # noqa: ANN001, ANN202
        right = labels[jnp.abs(rows)]
        each = -jax.nn.log_softmax(logits(params, images[jnp.abs(rows)]))[jnp.arange(len(rows)), right]
        return jnp.sum(jnp.where(rows >= 0, each, 0.0)) / jnp.maximum(jnp.sum(rows >= 0), 1)

    # Unrolled where it is one step: the gradient of a convolution in a loop is slow on a CPU.
    @jax.jit
    def step(params, velocity, rows):  # noqa: ANN001, ANN202
        gradient = jax.grad(objective)(params, rows)
        velocity = jax.tree_util.tree_map(lambda v, g: work.momentum * v + g, velocity, gradient)
        return jax.tree_util.tree_map(lambda p, v: p - work.rate * v, params, velocity), velocity

    @jax.jit
    def add(sums, params, count):  # noqa: ANN001, ANN202
        return jax.tree_util.tree_map(lambda s, p: s + count * p, sums, params)

    state = {"params": init(jax.random.PRNGKey(0))}

    def round_(number: int) -> None:
        zeros = jax.tree_util.tree_map(jnp.zeros_like, state["params"])
        sums, total = zeros, 0
        for client in work.participants[number]:
            own = work.of(client)
            params, velocity = state["params"], zeros
            for _ in range(work.epochs):
                order = rng.permutation(own)
                # Row 0 has no negative, so a filled place holds the complement of row 0.
                order = np.concatenate([order, np.full(-len(order) % work.batch, -1)])
                for rows in order.reshape(-1, work.batch):
                    params, velocity = step(params, velocity, rows)
            sums, total = add(sums, params, float(len(own))), total + len(own)
        state["params"] = jax.block_until_ready(jax.tree_util.tree_map(lambda s: s / total, sums))

    return round_, lambda: np.concatenate([np.ravel(p) for p in jax.tree_util.tree_leaves(state["params"])])


if __name__ == "__main__":
    main(play)
