"""One stage of a client's round mapped over simulated clients and devices.

How clients are mapped (`client_map`):

* `map`: one client after the other inside one program; each runs exactly its own number of steps.
* `vmap`: all at once, or `chunk` at a time; a shorter client's extra steps change nothing. For small models on a GPU.
* `pmap`: like `map` on every device, through `jax.pmap`, for those who ask for it.
* `loop`: no program over clients; the stages are compiled for one client and errors name stage and client.
* `auto`, the default: the fastest of them on the backend (`choose_client_map`).

`map` and `vmap` run under a mesh with the axis `clients`: each device takes its share of the participants, padded to a
multiple of the devices with clients of no steps whose results are dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedklpr_jax.trees import PyTree, stack

CLIENT_MAPS = ("map", "vmap", "pmap", "loop")
# The fastest in the table of `python -m benchmarks.maps` (docs/performance.md), by backend.
_FASTEST = {"cpu": "map"}


class Common(NamedTuple):
    """In the place of a tree with a leading axis [K]: one `tree` without it, the same for every client.

    What all clients download alike crosses to the devices once instead of K times.
    """

    tree: PyTree


class StageError(RuntimeError):
    """A stage failed for one client; only `client_map=loop` can say which."""


class Mapped(Protocol):
    """A stage over clients: scalars are the same for all; leaves of `trees` have a leading axis [K], but for what is in
    a `Common`."""

    def __call__(self, scalars: tuple[Any, ...], *trees: PyTree) -> PyTree: ...


Mapper = Callable[[str, Callable[..., PyTree]], Mapped]


def choose_client_map(choice: str, backend: str) -> str:
    """What a `client_map` stands for on a backend, named as `jax.default_backend()` names it.

    `"auto"` is what was measured to be the fastest there; where nothing was, `map`, which takes the memory of one
    client.

    >>> choose_client_map("auto", "cpu"), choose_client_map("vmap", "cpu")
    ('map', 'vmap')
    """
    return _FASTEST.get(backend, "map") if choice == "auto" else choice


def client_mesh(devices: int) -> Mesh:
    """A mesh with the one axis `clients` over `devices` devices, as many of each host."""
    by_turns = sorted(jax.devices(), key=lambda device: (_rank_on_its_host(device), device.process_index))
    chosen = sorted(by_turns[:devices], key=lambda device: (device.process_index, device.id))
    return jax.make_mesh((len(chosen),), ("clients",), axis_types=(AxisType.Auto,), devices=chosen)


def _rank_on_its_host(device: jax.Device) -> int:
    return sum(other.process_index == device.process_index and other.id < device.id for other in jax.devices())


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has in full."""
    return NamedSharding(mesh, P())


def compiled(function: Callable[..., PyTree], mesh: Mesh, donate: tuple[int, ...] = ()) -> Callable[..., PyTree]:
    """`function` compiled for the devices of `mesh`.

    With several hosts all results are brought to each of them, where the next step reads them; one host reads what lies
    on its devices as it is.
    """
    several = len({device.process_index for device in mesh.devices.flat}) > 1
    return jax.jit(function, donate_argnums=donate, out_shardings=everywhere(mesh) if several else None)


def brought(tree: PyTree) -> PyTree:
    """What clients gave, in full on every host that is to read it: a stage leaves it with the devices that made it.

    With several hosts as host arrays: what is done with them next would else be compiled for all devices, leaf by leaf.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            assert isinstance(leaf.sharding, NamedSharding)
            return jax.device_get(_bringing(leaf.sharding.mesh)(tree))
    return tree


@functools.cache
def _bringing(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=everywhere(mesh))


def make_mapper(client_map: str, mesh: Mesh, chunk: int, arrays: PyTree, names: Sequence[str]) -> Mapper:
    """A function `(name, stage) -> mapped stage`, compiled at its first call.

    A stage is called `stage(arrays, *scalars, *trees of one client)`; a mapped stage `mapped(scalars, *trees)`, with
    leading axes that are a multiple of the mesh. Its results stay on the devices; `brought` makes them readable. With
    `loop` the first tree is the client's `RoundInputs`.

    Args:
      client_map: one of `CLIENT_MAPS`.
      mesh: the devices.
      chunk: with `vmap`, how many clients at once; 0 = all.
      arrays: what every client reads, on the devices.
      names: the clients' names, for errors.
    """
    if client_map == "loop":
        return _sharing(lambda name, stage: _looped(name, stage, arrays, names))
    if client_map == "pmap":
        return _sharing(lambda name, stage: _with_pmap(stage, arrays, mesh))
    return _sharing(lambda name, stage: _over_devices(stage, arrays, mesh, client_map, chunk))


def make_reducer(mesh: Mesh, arrays: PyTree) -> Mapper:
    """As `make_mapper` for `map`, of stages that give `(terms, rest)`: the terms of all clients are summed as each of
    them is done, and take the room of one; of `rest` every client's is given, with a leading axis.

    Args:
      mesh: the devices.
      arrays: what every client reads, on the devices.
    """

    def reduced(name: str, stage: Callable[..., PyTree]) -> Mapped:
        def body(arrays: PyTree, scalars: tuple[Any, ...], trees: tuple[PyTree, ...]) -> PyTree:
            def one(sums: PyTree, row: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
                terms, rest = stage(arrays, *scalars, *row)
                return jax.tree.map(jnp.add, sums, terms), rest

            first = jax.tree.map(lambda leaf: leaf[0], trees)
            blank, _ = jax.eval_shape(lambda: stage(arrays, *scalars, *first))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blank)
            sums, rest = jax.lax.scan(one, zeros, trees)
            return (jax.lax.psum(sums, "clients") if mesh.size > 1 else sums), rest

        if mesh.size > 1:
            body = jax.shard_map(
                body, mesh=mesh, in_specs=(P(), P(), P("clients")), out_specs=(P(), P("clients")), check_vma=False
            )
        program = compiled(body, mesh)
        return lambda scalars, *trees: program(arrays, scalars, trees)

    return _sharing(reduced)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Gap:
    """Where the `Common` of a number was taken out of a tree."""

    number: int


def _sharing(mapper: Mapper) -> Mapper:
    """`mapper` for trees with `Common`s in them, which travel like scalars."""

    def mapped(name: str, stage: Callable[..., PyTree]) -> Mapped:
        def fill(tree: PyTree, shared: Sequence[PyTree]) -> PyTree:
            return jax.tree.map(
                lambda leaf: shared[leaf.number] if isinstance(leaf, _Gap) else leaf,
                tree,
                is_leaf=lambda leaf: isinstance(leaf, _Gap),
            )

        def whole(arrays: PyTree, shared: Sequence[PyTree], *rest: PyTree) -> PyTree:
            return stage(arrays, *fill(rest, shared))

        program = mapper(name, whole)

        def call(scalars: tuple[Any, ...], *trees: PyTree) -> PyTree:
            shared: list[PyTree] = []

            def take_out(leaf: Any) -> Any:
                if not isinstance(leaf, Common):
                    return leaf
                shared.append(leaf.tree)
                return _Gap(len(shared) - 1)

            rest = jax.tree.map(take_out, trees, is_leaf=lambda leaf: isinstance(leaf, Common))
            return program((shared, *scalars), *rest)

        return call

    return mapped


def _map_clients(stage: Callable[..., PyTree], client_map: str, chunk: int) -> Callable[..., PyTree]:
    """`stage` over the leading axes of `trees`, inside one program."""

    def mapped(arrays: PyTree, scalars: tuple[Any, ...], trees: tuple[PyTree, ...]) -> PyTree:
        def one(row: tuple[PyTree, ...]) -> PyTree:
            return stage(arrays, *scalars, *row)

        if client_map == "vmap":
            return jax.lax.map(one, trees, batch_size=chunk) if chunk else jax.vmap(one)(trees)
        return jax.lax.map(one, trees)

    return mapped


def _over_devices(stage: Callable[..., PyTree], arrays: PyTree, mesh: Mesh, client_map: str, chunk: int) -> Mapped:
    body = _map_clients(stage, client_map, chunk)
    if mesh.size > 1:
        body = jax.shard_map(
            body, mesh=mesh, in_specs=(P(), P(), P("clients")), out_specs=P("clients"), check_vma=False
        )
    program = jax.jit(body)
    return lambda scalars, *trees: program(arrays, scalars, trees)


def _with_pmap(stage: Callable[..., PyTree], arrays: PyTree, mesh: Mesh) -> Mapped:
    size = mesh.size
    program = jax.pmap(_map_clients(stage, "map", 0), in_axes=(None, None, 0), devices=list(mesh.devices.flat))

    def call(scalars: tuple[Any, ...], *trees: PyTree) -> PyTree:
        folded = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), trees)
        out = program(arrays, scalars, folded)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)

    return call


def _looped(name: str, stage: Callable[..., PyTree], arrays: PyTree, names: Sequence[str]) -> Mapped:
    program = jax.jit(stage)

    def one(scalars: tuple[Any, ...], *trees: PyTree) -> PyTree:
        try:
            return jax.block_until_ready(program(arrays, *scalars, *trees))
        except Exception as error:
            client = names[int(trees[0].data.index)]
            raise StageError(f"client {client}, stage {name}: {error}") from error

    def call(scalars: tuple[Any, ...], *trees: PyTree) -> PyTree:
        count = len(jax.tree.leaves(trees)[0])
        rows = [jax.tree.map(lambda leaf, k=k: leaf[k], trees) for k in range(count)]
        return stack([one(scalars, *row) for row in rows])

    return call


def balanced(steps: Sequence[int] | np.ndarray, devices: int) -> np.ndarray:
    """Which client runs where: int [devices, clients per device], -1 for an empty place.

    Longest first onto the least loaded device with a free place: sites are of unequal size, and a round takes as long
    as its busiest device.

    >>> balanced([9, 1, 2, 6], 2).tolist()
    [[0, 1], [3, 2]]
    """
    places = -(-len(steps) // devices)
    rows: list[list[int]] = [[] for _ in range(devices)]
    for client in np.argsort(-np.asarray(steps), kind="stable"):
        free = [row for row in rows if len(row) < places]
        min(free, key=lambda row: sum(steps[k] for k in row)).append(int(client))
    return np.array([row + [-1] * (places - len(row)) for row in rows])


def spread(inputs: Any, devices: int) -> tuple[Any, np.ndarray]:
    """Stacked `RoundInputs` in the order of the devices, and the place of each client in it, int [K].

    Empty places are filled with a client of no steps.
    """
    count = len(inputs.steps)
    if devices == 1:
        return inputs, np.arange(count)
    rows = balanced(np.asarray(inputs.steps), devices).ravel()
    ordered = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, Common) else leaf[np.maximum(rows, 0)],
        inputs,
        is_leaf=lambda leaf: isinstance(leaf, Common),
    )
    ordered = ordered._replace(steps=np.where(rows >= 0, ordered.steps, 0).astype(np.int32))
    return ordered, np.array([int(np.flatnonzero(rows == k)[0]) for k in range(count)])
