"""This library: rounds as a run makes them, messages handed over (`wire.encode=False`)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.competitors._work import Work, main  # noqa: E402
from fedklpr_jax import simulation  # noqa: E402
from fedklpr_jax.assembly import Federation, model_spec  # noqa: E402
from fedklpr_jax.config import default_config, resolved  # noqa: E402
from fedklpr_jax.data.labelled import Labelled  # noqa: E402
from fedklpr_jax.methods import make_method  # noqa: E402
from fedklpr_jax.metrics import Ledger  # noqa: E402
from fedklpr_jax.round import make_engine, start  # noqa: E402
from fedklpr_jax.tasks import classification  # noqa: E402


def make_federation(work: Work, method: str = "fedavg", widths: Sequence[int] = ()) -> Federation:
    """The federation that does the work, or the same with another method or widths of the network.

    Who takes part is drawn by the function that drew the work's participants.
    """
    config = default_config()
    config.method.name, config.task.name, config.wire.encode = method, "classification", False
    # Where a method's memory can lie with the clients, it does: a server's would hold all of them on the device.
    config.method.obp.score_on = "client"
    config.epochs, config.task.batch = work.epochs, work.batch
    config.participation = work.participants.shape[1] / work.clients
    config.optimizer.name, config.optimizer.learning_rate = "sgd", work.rate
    config.optimizer.momentum, config.optimizer.nesterov = work.momentum, False
    config.optimizer.weight_decay, config.optimizer.decay = 0.0, 1.0
    config = resolved(config)
    # The images were normalised from bytes; normalising those again gives the same numbers.
    low, high = work.images.min(), work.images.max()
    pixels = np.rint((work.images - low) / (high - low) * 255).astype(np.uint8)[..., None]
    data = Labelled(pixels, work.labels.astype(np.int32), tuple(map(str, range(10))))
    nothing = np.zeros(0, np.int64)
    shares = [classification.Share(work.of(client), nothing, nothing) for client in range(work.clients)]
    spec = model_spec(config)
    if widths:
        spec = dataclasses.replace(spec, widths=tuple(widths))
    task = classification.make_task(data, shares, spec, config)
    engine = make_engine(
        task, make_method(config.method), epochs=work.epochs, devices=config.devices,
        clients=work.participants.shape[1],
    )  # fmt: skip
    return Federation(config, (), engine, ())


class Rounds:
    """A federation under way: its `state`, and `run`, which goes on by one round."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        server, clients = start(federation.task, federation.engine.method, federation.config.seed)
        self.state = simulation.RunState(server, clients, Ledger(), 0.0)

    def run(self) -> dict[str, Any]:
        """One round, as a run makes it; its event."""
        self.state, event = simulation.run_round(self.federation, self.state)
        return event


def play(work: Work):  # noqa: ANN201
    """See `_work.main`."""
    rounds = Rounds(make_federation(work))

    def round_(number: int) -> None:
        chosen = [int(name[1:]) for name in rounds.run()["clients"]]
        assert chosen == work.participants[number].tolist(), "not the participants of the work"

    return round_, lambda: np.concatenate([np.ravel(p) for p in jax.tree.leaves(rounds.state.server.model)])


if __name__ == "__main__":
    main(play)
