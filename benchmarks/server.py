"""FedKLPR's server step and the exact threshold at the size of ResNet-50, next to copies of the bytes they touch.

    python -m benchmarks.server            8 clients, 23.5 million parameters: needs 6 GB
    python -m benchmarks.server --small    2 clients, the thin network: only shows that everything runs

The server step is the compiled `aggregate` of FedKLPR with its defaults: weights (KLAW, PRAW), masked mean, table of
masks; its state is donated. "touched" are the bytes that it has to read or write at least once: models and masks of
all clients, the global model before and after, the table of masks. The copy is NumPy's, of half as many bytes to a
place that is there: it reads half and writes half of them. The threshold is `pruning.magnitude_mask`, half of all
weights pruned, in a compiled program; on the host `np.partition`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._common import again, machine, print_header, print_row, timed_in_turn
from fedklpr_jax import pruning
from fedklpr_jax.aggregation import masked_mean
from fedklpr_jax.config import default_config, resolved
from fedklpr_jax.federated import Method, ServerContext, ServerState, Uploads
from fedklpr_jax.methods import make_method
from fedklpr_jax.models.spec import make_spec
from fedklpr_jax.trees import parameter_count, split

HEIGHT, WIDTH = 128, 64


def model_of(arch: str, method: Method) -> Any:
    """What clients share of a network, with normally distributed values."""
    spec = make_spec(arch)
    shapes = jax.eval_shape(lambda key: spec.init(key, HEIGHT, WIDTH), jax.random.key(0))
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    return split(variables, method.is_local)[0]


def uploads_of(model: Any, clients: int) -> Uploads:
    """Uploads of `clients`, about half of each pruned."""
    random = np.random.default_rng(1)
    masks = jax.tree.map(lambda leaf: random.random((clients, *leaf.shape), np.float32) < 0.5, model)
    models = jax.tree.map(lambda leaf, kept: np.where(kept, leaf, np.float32(0)), model, masks)
    scalars = {"images": np.arange(1, clients + 1, dtype=np.float32), "klaw": np.ones(clients, np.float32)}
    everyone = np.arange(clients, dtype=np.int32)
    return jax.device_put(Uploads(models, masks, scalars, everyone, np.ones(clients, bool)))


def size(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def server_table(method: Method, model: Any, clients: int, repetitions: int) -> None:
    """One row: the server step and the copy."""
    uploads = uploads_of(model, clients)
    context = ServerContext(masked_mean)
    step = jax.jit(lambda server, uploads: method.aggregate(server, uploads, context), donate_argnums=0)
    memory = method.server_memory(jax.device_put(model), clients)
    touched = size(uploads) + 2 * size(model) + size(memory)
    source = np.ones(touched // 8, np.float32)
    target = np.ones_like(source)

    def server() -> Callable[[], Any]:
        state = ServerState(jax.tree.map(jnp.array, model), jax.tree.map(jnp.array, memory), jnp.int32(0))
        return partial(step, state, uploads)

    seconds = timed_in_turn({"step": server, "copy": again(partial(np.copyto, target, source))}, repetitions + 1)
    rows = {name: values[1:] for name, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(rows["step"], rows["copy"], strict=True))
    print_header("server step", "touched MB", "ms", "least", "most", "copy ms", "step / copy")
    steps = [1e3 * value for value in rows["step"]]
    print_row(
        f"{clients} clients", f"{touched / 1e6:.0f}", f"{statistics.median(steps):.0f}", f"{min(steps):.0f}",
        f"{max(steps):.0f}", f"{1e3 * statistics.median(rows['copy']):.0f}", f"{ratio:.2f}",
    )  # fmt: skip


def threshold_table(model: Any, repetitions: int) -> None:
    """The pruning mask in a program, and the same threshold on the host."""
    kept = pruning.full_mask(model)
    prune = jax.jit(partial(pruning.magnitude_mask, step=0.5))
    weights, mask = jax.device_put((model, kept))
    flat = np.concatenate([np.abs(leaf).ravel() for leaf in pruning._prunable_leaves(model, pruning.is_prunable)])
    # One value for all: ties are the slow case.
    tied = jax.tree.map(jnp.ones_like, weights)
    calls = {
        "compiled, exact": again(partial(prune, weights, mask)),
        "compiled, all weights alike": again(partial(prune, tied, mask)),
        "host, np.partition": again(lambda: np.partition(flat, flat.size // 2)),
    }
    print_header(f"threshold of {flat.size / 1e6:.1f} million", "s", "least", "most")
    for name, values in timed_in_turn(calls, repetitions + 1).items():
        later = values[1:]
        print_row(name, *(f"{value:.3f}" for value in (statistics.median(later), min(later), max(later))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="only shows that everything runs")
    small = parser.parse_args(arguments).small
    method = make_method(resolved(default_config()).method)
    model = model_of("thin" if small else "resnet50", method)
    print(machine())
    print(f"{parameter_count(model) / 1e6:.1f} million parameters\n")
    repetitions = 1 if small else 9
    server_table(method, model, 2 if small else 8, repetitions)
    print()
    threshold_table(model, repetitions)


if __name__ == "__main__":
    main()
