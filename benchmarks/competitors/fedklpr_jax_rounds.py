"""This library: rounds as a run makes them, messages handed over (`wire.encode=False`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from _work import Work, main  # noqa: E402

from fedklpr_jax import simulation  # noqa: E402
from fedklpr_jax.assembly import Federation, model_spec  # noqa: E402
from fedklpr_jax.config import default_config, resolved  # noqa: E402
from fedklpr_jax.data.labelled import Labelled  # noqa: E402
from fedklpr_jax.methods import make_method  # noqa: E402
from fedklpr_jax.metrics import Ledger  # noqa: E402
from fedklpr_jax.round import make_engine, start  # noqa: E402
from fedklpr_jax.tasks import classification  # noqa: E402


def play(work: Work):  # noqa: ANN201
    """See `_work.main`; who takes part is what the work says, for it was drawn by the same function."""
    config = default_config()
    config.method.name, config.task.name, config.wire.encode = "fedavg", "classification", False
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
    method = make_method(config.method)
    task = classification.make_task(data, shares, model_spec(config), config)
    engine = make_engine(
        task, method, epochs=work.epochs, devices=config.devices, clients=work.participants.shape[1]
    )
    federation = Federation(config, (), engine, ())
    server, clients = start(task, method, config.seed)
    run = {"state": simulation.RunState(server, clients, Ledger(), 0.0)}

    def round_(number: int) -> None:
        run["state"], event = simulation.run_round(federation, run["state"])
        chosen = [int(name[1:]) for name in event["clients"]]
        assert chosen == work.participants[number].tolist(), "not the participants of the work"

    return round_, lambda: np.concatenate([np.ravel(p) for p in jax.tree.leaves(run["state"].server.model)])


if __name__ == "__main__":
    main(play)
