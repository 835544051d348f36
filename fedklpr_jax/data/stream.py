"""Training pictures that stay on disk, for sets that fit neither device nor memory: compiled programs ask for a batch
where they would gather it, and what a plan says they will ask for next is read ahead by Grain's threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from fedklpr_jax.errors import InputError

Read = Callable[[np.ndarray], np.ndarray]

# Batches read ahead of the step that runs, and threads that read them: two of each would do, more hide a slow disk.
AHEAD = 4
THREADS = 2


def pictures(plan: np.ndarray) -> np.ndarray:
    """The rows of a plan, complements (`plans.shuffled_plan`) as the rows they stand for.

    >>> pictures(np.array([[2, ~1]])).tolist()
    [[2, 1]]
    """
    return np.where(plan < 0, ~plan, plan)


class PlannedBatches:
    """The batches of a plan as a random access source of Grain: element i is the i-th of them.

    >>> pixels = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    >>> source = PlannedBatches(pixels.__getitem__, np.array([[0, 5], [2, ~1]]))
    >>> len(source), source[1].ravel().tolist()
    (2, [2, 1])
    """

    def __init__(self, read: Read, plan: np.ndarray) -> None:
        """Args:
        read: int [batch] of rows to their pictures, uint8 [batch, h, w, c]; thread-safe.
        plan: int [steps, batch].
        """
        self._read, self._plan = read, pictures(plan)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._read(self._plan[index])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={len(self)})"


def batches(read: Read, plan: np.ndarray) -> Iterator[np.ndarray]:
    """The batches of a plan in order, a few of them read ahead.

    Raises:
      InputError: Grain is not installed.
    """
    grain = import_grain()
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    return iter(grain.MapDataset.source(PlannedBatches(read, plan)).to_iter_dataset(options))


def import_grain() -> Any:
    """The module; it takes seconds to import.

    Raises:
      InputError: it is not installed.
    """
    try:
        import grain
    except ImportError as error:
        raise InputError("config.data.stream: needs Grain; install it: pip install 'fedklpr_jax[grain]'") from error
    return grain


@jax.tree_util.register_static
class Streamed:
    """Pictures in the place of an array uint8 [n, h, w, c] on the device: indexed by traced rows they are read.

    In a tree it has no leaves. A program that reads one calls the host, so that JAX does not keep it in the compilation
    cache. `waited` is how many seconds programs have waited for pictures so far.

    >>> pixels = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    >>> streamed = Streamed([pixels[:2], pixels[2:]], (1, 1, 1))
    >>> jax.jit(lambda pixels, rows: pixels[rows])(streamed, np.array([5, 1])).ravel().tolist()
    [5, 1]
    """

    def __init__(self, parts: Sequence[np.ndarray], shape: tuple[int, int, int]) -> None:
        """Args:
        parts: uint8 [n, *shape] each, memory maps, which are rows one after the other.
        shape: of a picture, (h, w, c).
        """
        self.shape = (sum(map(len, parts)), *shape)
        self.waited = 0.0
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        self._lock = threading.Lock()
        self._due: dict[bytes, _Feed] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: jax.Array) -> jax.Array:
        """The pictures of `rows`, int [...]: uint8 [..., h, w, c], in a traced function or outside."""
        result = jax.ShapeDtypeStruct((*rows.shape, *self.shape[1:]), np.uint8)
        return jax.pure_callback(self._asked, result, rows, vmap_method="broadcast_all")

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The pictures of `rows`, int [n], from disk: uint8 [n, h, w, c]. Rows out of range are what JAX makes of them:
        negative ones count from the end, and the nearest there is stands for others."""
        rows = np.clip(np.where(rows < 0, rows + len(self), rows), 0, len(self) - 1)
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(part_of):
            chosen = part_of == part
            found[chosen] = self._parts[part][rows[chosen] - self._starts[part]]
        return found

    @contextlib.contextmanager
    def ahead(self, plans: Sequence[np.ndarray]) -> Iterator[None]:
        """Inside it batches are read ahead: `plans` int [steps, batch], those of each client in the order in which it
        will ask for them. Clients may ask in turn or together; what no plan says is read when it is asked for."""
        feeds = [_Feed(self.read, plan) for plan in plans if len(plan)]
        self._due = {feed.next: feed for feed in feeds}
        try:
            yield
        finally:
            self._due = {}

    def _asked(self, rows: jax.Array) -> np.ndarray:
        began, wanted = time.perf_counter(), np.asarray(rows)
        together = wanted.reshape(-1, wanted.shape[-1])
        found = np.stack([self._batch(batch) for batch in together]).reshape(*wanted.shape, *self.shape[1:])
        with self._lock:
            self.waited += time.perf_counter() - began
        return found

    def _batch(self, rows: np.ndarray) -> np.ndarray:
        with self._lock:
            feed = self._due.pop(rows.tobytes(), None)
        if feed is None:
            return self.read(rows)
        batch = feed.take()
        if feed.next:
            with self._lock:
                self._due[feed.next] = feed
        return batch


class _Feed:
    """The batches of one client, read ahead from the first one on that it asks for.

    `next` is the rows of the batch that it will ask for next, as bytes; b"" at the end.
    """

    def __init__(self, read: Read, plan: np.ndarray) -> None:
        self._read, self._plan, self._taken = read, pictures(plan).astype(np.int32), 0
        self._batches: Iterator[np.ndarray] | None = None

    @property
    def next(self) -> bytes:
        return self._plan[self._taken].tobytes() if self._taken < len(self._plan) else b""

    def take(self) -> np.ndarray:
        """The next batch."""
        if self._batches is None:
            self._batches = batches(self._read, self._plan)
        self._taken += 1
        return next(self._batches)


Ahead = Callable[[Sequence[np.ndarray]], AbstractContextManager[None]]


def nothing_ahead(plans: Sequence[np.ndarray]) -> AbstractContextManager[None]:
    """`Streamed.ahead` of pictures that lie on the device."""
    return contextlib.nullcontext()


def ahead_of(pixels: np.ndarray | Streamed) -> Ahead:
    """What is entered while plans over these pictures are carried out."""
    return pixels.ahead if isinstance(pixels, Streamed) else nothing_ahead
