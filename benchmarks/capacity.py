"""What a smaller device saves: FLOPs, bytes and time of a client's round by capacity, against the whole network.

    python -m benchmarks.capacity

FLOPs are those of one compiled training step (forward, gradient, SGD) by XLA's cost analysis, with XLA's own
convolutions (tiles and patches would count their transforms and zeros), `bytes accessed` those it moves in memory,
`sent` the values of a submodel in one message. The time is that of one local epoch of one client as CA-HFP runs it,
cutting and restoring included; the classes are timed in turn, and the ratios are medians of the ratios within a
repetition. The last column is the same client under a mask, which saves no time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._common import again, machine, print_header, print_row, timed_in_turn
from fedklpr_jax import round as rounds
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.data.labelled import Labelled
from fedklpr_jax.federated import Task
from fedklpr_jax.methods import make_method
from fedklpr_jax.models import make_spec
from fedklpr_jax.tasks import classification
from fedklpr_jax.tasks.classification import Share
from fedklpr_jax.trees import parameter_count

NETWORKS = ("vgg11_thin", "resnet_cifar_thin")
CLASSES = 10


def make_tasks(name: str, config: Any, images: int, convolution: str = "auto") -> tuple[Task, list[Task]]:
    """Classification of noise with a network, and with those of the device classes; one client a class."""
    random = np.random.default_rng(0)
    devices = make_method(config.method).capacity
    assert devices
    count = images * len(devices.shares)
    pixels = random.integers(0, 256, (count, config.data.height, config.data.width, 1)).astype(np.uint8)
    data = Labelled(pixels, random.integers(0, CLASSES, count).astype(np.int32), tuple("0123456789"))
    none = np.arange(0)
    shares = [Share(np.arange(k * images, (k + 1) * images), none, none) for k in range(len(devices.shares))]
    spec = make_spec(name, convolution=convolution)
    return (
        classification.make_task(data, shares, spec, config),
        [classification.make_task(data, shares, one, config) for one in devices.specs(spec)],
    )


def step_cost(task: Task) -> tuple[float, float]:
    """FLOPs and bytes accessed of one training step on a batch of the task's first client."""
    client, rows = task.clients[0], task.plan(0, 0, 0, 1)[0, 0]

    def step(variables: Any, arrays: Any) -> Any:
        images = task.inputs(arrays, rows)

        def loss(params: Any) -> Any:
            outputs, stats = task.forward(variables | {"params": params}, images, client, True, jax.random.key(0))
            return task.loss(arrays, outputs, rows, client), stats

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        return jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradients), stats

    shapes = jax.eval_shape(task.init, jax.random.key(0))
    cost: Any = jax.jit(step).lower(shapes, task.arrays).compile().cost_analysis()
    return cost["flops"], cost["bytes accessed"]


def time_epochs(task: Task, narrow: Sequence[Task], config: Any, repetitions: int) -> dict[str, list[float]]:
    """Seconds of an epoch of each class's client, compact and (`masked`) under its mask, in turn."""
    method = make_method(config.method)
    calls = {}
    for form in ("compact", "masked"):
        engine = rounds.make_engine(
            task, method, epochs=1, clients=1, narrow=narrow if form == "compact" else ()
        )
        server, clients = rounds.start(task, method, 0)
        for k in range(len(narrow)) if form == "compact" else (len(narrow) - 1,):
            # As after its first round: it has chosen.
            memory = server.memory._replace(rounds=jnp.ones_like(server.memory.rounds))
            message = engine.download(server._replace(memory=memory), np.int32(k))
            client = clients[k]._replace(memory=np.int32(1))
            inputs = rounds.round_inputs(engine, [message], [client], [k], seed=0, round_=1)

            def call(engine: Any = engine, inputs: Any = inputs) -> Any:
                return engine.update(1, np.ones(1, np.float32), inputs)

            call()
            calls[form if form == "masked" else str(k)] = again(call)
    return timed_in_turn(calls, repetitions)


def ratio(times: dict[str, list[float]], name: str) -> str:
    """Median of the ratios to the whole network's time."""
    return f"{statistics.median(a / b for a, b in zip(times[name], times['0'], strict=True)):.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="timed epochs of each class")
    parser.add_argument("--images", type=int, default=320, help="training images of a client")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="comma-separated")
    options = parser.parse_args(arguments)
    config = default_config()
    config.method.name, config.task.name = "cahfp", "classification"
    config.method.hfp.score = "magnitude"
    config.data.height = config.data.width = 28
    config = resolved(config)

    print(f"{machine()}; images 28x28, batch {config.task.batch}, {options.images} images a client\n", flush=True)
    print_header(
        "network", "channels", "parameters", "sent", "FLOPs", "bytes accessed", "epoch s", "time", "time under a mask"
    )
    for name in options.networks.split(","):
        task, narrow = make_tasks(name, config, options.images)
        times = time_epochs(task, narrow, config, options.repetitions)
        costs = [step_cost(one) for one in make_tasks(name, config, options.images, "stock")[1]]
        sent = [parameter_count(jax.eval_shape(one.init, jax.random.key(0))) for one in narrow]
        shares = [float(share) for share in config.method.capacity.shares.split(",")]
        for k, share in enumerate(shares):
            print_row(
                name, f"{share:g}",
                f"{parameter_count(jax.eval_shape(narrow[k].init, jax.random.key(0))['params']):,}",
                f"{sent[k] / sent[0]:.2f}",
                f"{costs[k][0] / costs[0][0]:.2f}",
                f"{costs[k][1] / costs[0][1]:.2f}",
                f"{statistics.median(times[str(k)]):.2f}",
                ratio(times, str(k)),
                ratio(times, "masked") if k == len(shares) - 1 else "",
            )  # fmt: skip


if __name__ == "__main__":
    main()
