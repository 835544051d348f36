"""What privacy costs: FedAvg's accuracy against the epsilon that its clients spend, over noise levels.

    python -m benchmarks.privacy --data DIR

DIR holds an .npz of images and labels, such as Fashion-MNIST; without it drawn shapes are dealt. The accuracy is that
of the server's model after the last round, on the test images of all clients: mean and standard deviation over the
seeds, each with its own model, partition and participants, which are the same at every level.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks._common import machine, print_header, print_row
from fedklpr_jax.assembly import Federation, make_federation, model_spec, privacy_spent
from fedklpr_jax.config import default_config, resolved, validate
from fedklpr_jax.console import Console
from fedklpr_jax.metrics import Ledger, show
from fedklpr_jax.round import start
from fedklpr_jax.simulation import RunState, run_round
from fedklpr_jax.tasks import classification
from fedklpr_jax.tasks.classification import Share


def make_config(options: argparse.Namespace, seed: int, clip: float, noise: float) -> Any:
    """The settings of a run at one level."""
    config = default_config()
    config.method.name, config.task.name = "fedavg", "classification"
    if options.data:
        config.data.source, config.data.root = "folder", options.data
    config.data.count, config.data.validation, config.participation = options.clients, 0.0, options.share
    config.seed = config.data.seed = seed
    config.rounds, config.epochs, config.devices = options.rounds, 1, 1
    config.optimizer.name, config.optimizer.learning_rate = "sgd", options.rate
    config.wire.encode = False
    config.privacy.clip, config.privacy.noise, config.privacy.delta = clip, noise, options.delta
    validate(config)
    return resolved(config)


def trained(federation: Federation) -> tuple[Any, list[float]]:
    """The server's model after all rounds, and the lengths of the updates of the last one before they were clipped."""
    server, clients = start(federation.task, federation.engine.method, federation.config.seed)
    state = RunState(server, clients, Ledger(), 0.0)
    event: dict[str, Any] = {"clients": {}}
    for _ in range(federation.config.rounds):
        state, event = run_round(federation, state)
    lengths = [row["update_norm"] for row in event["clients"].values() if "update_norm" in row]
    return jax.device_get(state.server.model), lengths


def accuracy(federation: Federation, model: Any) -> float:
    """Of a model on all clients' test images."""
    assert federation.dealt
    data, shares = federation.dealt
    together = Share(*(np.concatenate(rows) for rows in zip(*shares, strict=True)))
    task = classification.make_task(data, [together], model_spec(federation.config), federation.config)
    return task.evaluate(model, 0).metrics["accuracy"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="directory of the data set")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.1, help="of the clients in each round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.05, help="step size of SGD")
    parser.add_argument("--clip", type=float, default=0.3)
    parser.add_argument("--noises", default="0,0.5,1,2", help="comma-separated multiples of the clip")
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    options = parser.parse_args(arguments)
    together = max(1, round(options.share * options.clients))

    print(f"{machine()}; {together} of {options.clients} clients a round, {options.rounds} rounds, clip "
          f"{options.clip:g}, delta {options.delta:g}, seeds {options.seeds}\n", flush=True)  # fmt: skip
    print_header("noise", "epsilon", "accuracy %", "updates longer than the clip %")
    levels = [(0.0, 0.0), *((options.clip, float(noise)) for noise in options.noises.split(","))]
    for clip, noise in levels:
        accuracies, longer = [], []
        for seed in map(int, options.seeds.split(",")):
            federation = make_federation(make_config(options, seed, clip, noise), Console(sys.stderr))
            model, lengths = trained(federation)
            accuracies.append(accuracy(federation, model))
            longer.append(float(np.mean(np.array(lengths) > clip)) if lengths else math.nan)
        spent = privacy_spent(make_config(options, 0, clip, noise), options.clients)
        print_row(
            f"{noise:g}" if spent else "not private",
            show(spent["epsilon"] if spent else None),
            f"{show(float(np.mean(accuracies)), 100)} ± {show(float(np.std(accuracies)), 100)}",
            show(float(np.mean(longer)), 100) if spent else "-",
        )


if __name__ == "__main__":
    main()
