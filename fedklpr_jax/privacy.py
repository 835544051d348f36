"""Differentially private federations: what one client did cannot be told from the model, up to epsilon and delta.

McMahan, Ramage, Talwar, Zhang, "Learning differentially private recurrent language models", ICLR 2018, with a fixed
number K of participants, drawn without replacement, all of equal weight. S is `clip`, z `noise`, d_k what training
moved the download by, every leaf that travels taken together:

    client    d_k <- d_k * min(1, S / |d_k|)           it sends this, and nothing beside it
    server    theta <- theta + 1 / K * sum_k d_k + N(0, (z S / K)^2)        the sum over the accepted ones

K is not the number of accepted uploads, which tells of clients. Neighbours differ in all data of one client; how many
clients there are is known. Replacing one moves the sum by up to 2 S, so that the noise is z / 2 times the sensitivity.
Epsilon is the bound of Wang, Balle, Kasiviswanathan, "Subsampled Renyi differential privacy and analytical moments
accountant", AISTATS 2019, as Google's dp-accounting computes it.

Scores, masks and weights of single clients have no place in this, hence only methods whose download is the global model
and whose server step is FedAvg's mean. Who reads the uploads themselves is trusted; see `docs/privacy.md`.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import io_callback

from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import (
    ClientContext,
    ClientState,
    Method,
    ServerContext,
    ServerState,
    Upload,
    Uploads,
    average,
    average_equally,
)
from fedklpr_jax.trees import PyTree, path_map

Key = Callable[[jax.Array], jax.Array]
# Where the keys of clients have their round.
_NOISE = 2**31 - 1


def seeded(seed: int) -> Key:
    """Keys of each round's noise that follow from the run's seed: for simulations.

    Who knows the seed can take the noise away again.
    """
    return lambda round_: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _NOISE), round_)


def from_system(round_: jax.Array) -> jax.Array:
    """A key from the system's randomness, a new one at every call of the compiled step: for deployments."""

    def draw() -> np.ndarray:
        return np.frombuffer(secrets.token_bytes(8), np.uint32)

    return jax.random.wrap_key_data(io_callback(draw, jax.ShapeDtypeStruct((2,), jnp.uint32)), impl="threefry2x32")


def within(length: jax.Array, clip: float) -> jax.Array:
    """The factor that brings what is so long to at most `clip`.

    >>> float(within(jnp.float32(8), 2.0)), float(within(jnp.float32(0), 2.0))
    (0.25, 1.0)
    """
    return clip / jnp.maximum(length, clip)


def private(method: Method, *, clip: float, noise: float, participants: int, key: Key) -> Method:
    """`method` with clipped updates and a noisy mean.

    What a client uploads is its clipped update, not a model, and no scalar.

    Args:
      method: one that sends every client the global model and merges by FedAvg's mean, weighted or not.
      clip: S, above 0.
      noise: z.
      participants: K, of every round, whoever then answers.
      key: round int32 -> the random key of its noise, traced.

    Raises:
      InputError: a method of which clipped updates are not all that the server learns.
    """
    if not method.broadcasts or method.aggregate not in (average, average_equally):
        raise InputError(
            f"config.privacy.clip: {method.name} makes use of masks, scores or models of single clients, which noise "
            "in a mean does not hide; give fedavg, fedpav, fedprox, fedper or fedrep, or 0"
        )
    if method.is_local("params/") and method.is_local("batch_stats/"):
        raise InputError(f"config.privacy.clip: {method.name} sends nothing, so that there is nothing to clip; give 0")

    def finish(
        model: PyTree, client: ClientState, context: ClientContext
    ) -> tuple[Upload, ClientState, dict[str, jax.Array]]:
        upload, client, logs = method.finish(model, client, context)
        update = jax.tree.map(jnp.subtract, upload.model, context.received)
        length = optax.tree.norm(update)
        update = jax.tree.map(lambda leaf: within(length, clip) * leaf, update)
        return Upload(update, None, {}), client, logs | {"update_norm": length}

    def aggregate(
        server: ServerState, uploads: Uploads, context: ServerContext
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        # Again, for clients that did not, and for values that were rounded on the way.
        factors = within(jax.vmap(optax.tree.norm)(uploads.model), clip)
        weights = jnp.where(uploads.accepted, factors, 0.0)
        mean = context.mean(uploads.model, None, weights, jax.tree.map(jnp.zeros_like, server.model))
        share = jnp.sum(weights) / participants
        leaves, structure = jax.tree.flatten(mean)
        keys = jax.tree.unflatten(structure, list(jax.random.split(key(server.round), len(leaves))))

        def moved(path: str, old: jax.Array, step: jax.Array, key: jax.Array) -> jax.Array:
            new = old + share * step + (noise * clip / participants) * jax.random.normal(key, old.shape)
            # Noise may take a variance below 0; what is done to the sum afterwards costs no privacy.
            return jnp.maximum(new, 0.0) if path.startswith("batch_stats/") and path.endswith("/var") else new

        model = path_map(moved, server.model, mean, keys)
        return server._replace(model=model, round=server.round + 1), {"weight": weights / participants}

    return dataclasses.replace(method, finish=finish, aggregate=aggregate, tells=())


def protected(method: Method, settings: Any, *, clients: int, participants: int, key: Key) -> Method:
    """`method` as `config.privacy` wants it: itself where `settings.clip` is 0, else made `private`.

    Raises:
      InputError: a method or a delta that does not fit.
    """
    if not settings.clip:
        return method
    if settings.delta >= 1 / clients:
        raise InputError(
            f"config.privacy.delta: {settings.delta:g} would allow to publish one of {clients} clients; give a number "
            f"below {1 / clients:g}"
        )
    return private(method, clip=settings.clip, noise=settings.noise, participants=participants, key=key)


def epsilon(*, noise: float, delta: float, clients: int, participants: int, rounds: int) -> float:
    """Epsilon at `delta` after so many rounds, of replacing one client; infinite without noise.

    Args:
      noise: z, the deviation of the noise in the sum over the clip.
      delta: from 0 to 1.
      clients: that participants are drawn from, uniformly, by a draw that stays secret; where all this is not so, the
        number of `participants`: that holds however often a client takes part.
      participants: of each round.
      rounds: done.

    Raises:
      InputError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise InputError(
            "config.privacy.clip: epsilon is worked out by dp-accounting, which is missing; install it with: "
            "pip install 'fedklpr_jax[privacy]'"
        ) from error
    if not noise:
        return math.inf
    bounds = []
    # That of a draw is loose for little noise, where it may exceed the one that holds for any choice of participants.
    for population in {clients, participants}:
        accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        step = dp_accounting.SampledWithoutReplacementDpEvent(
            population, participants, dp_accounting.GaussianDpEvent(noise / 2)
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, rounds))
        bounds.append(float(accountant.get_epsilon(delta)))
    return min(bounds)


def spent(settings: Any, *, clients: int, participants: int, rounds: int) -> dict[str, Any] | None:
    """What `summary.json` tells of a private run: its settings and `epsilon`, null for infinite; None for other runs.

    Raises:
      InputError: dp-accounting is not installed.
    """
    if not settings.clip:
        return None
    fixed = {"noise": settings.noise, "delta": settings.delta, "clients": clients, "participants": participants,
             "rounds": rounds}  # fmt: skip
    return {"epsilon": epsilon(**fixed), "clip": settings.clip, **fixed}
