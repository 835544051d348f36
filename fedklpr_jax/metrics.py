"""Numbers out: the event log of a run, the bytes it exchanged, its summary, and how numbers are written.

A run directory holds `config.json`, `metrics.jsonl` (one event a line), `summary.json` and `report.html`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fedklpr_jax.errors import InputError

METRIC_TITLES: Mapping[str, str] = {
    "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "map": "mAP", "minp": "mINP", "accuracy": "Accuracy",
    "pooled": "Accuracy (pooled)",
}
"""Keys of the accuracy fractions (0 to 1) in evaluations and summaries, with the names readers know; `pooled` is of all
clients' test images together, so that no client has it."""

MOST_ROWS = 20
"""Clients that a table shows one by one; of more it shows an extract or folds them away."""


def _plain(value: Any) -> Any:
    """`value` as strict JSON holds it: arrays as lists, and NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        # bfloat16 scalars come out of `tolist` unchanged, so that they need `float`.
        listed = value.tolist()
        return _plain(float(listed) if hasattr(listed, "tolist") else listed)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_json(obj: Any) -> str:
    """`obj` as one line of JSON; NaN and infinities become null.

    >>> as_json({"loss": float("nan"), "rounds": [1, 2]})
    '{"loss": null, "rounds": [1, 2]}'
    """
    return json.dumps(_plain(obj), allow_nan=False)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, also when the machine stops half-way.

    Args:
        path: the file; an older one is replaced.
        data: its bytes.

    Raises:
        OSError: the folder is missing or full; an older file is then still the one it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; NaN and infinities become null.

    Args:
        path: the file; an older one is replaced.
        obj: mappings, sequences, numbers, strings, NumPy or JAX arrays.

    Raises:
        TypeError: `obj` holds something JSON cannot.
    """
    write_atomically(path, (json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n").encode())


def _claim(file: BinaryIO, path: Path) -> None:
    """Makes this the only process that writes to `file` until it is closed, by whatever end of the process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(
            f"{path}: another process is at work on this run; wait for its end, or give --config.out=OTHER"
        ) from error
    except OSError:
        # A file system without locks; two processes on one run then do the same work and spoil the log.
        pass


class MetricsLog:
    """An append-only log of JSON lines; each line is on disk when `write` returns.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with MetricsLog.open(path) as log:
    ...     log.write({"event": "note", "text": "start"})
    ...     start = log.offset
    ...     log.write({"event": "round", "round": 0, "loss": float("nan")})
    >>> read_metrics(path)[1]
    {'event': 'round', 'round': 0, 'loss': None}
    >>> MetricsLog.open(path, offset=start).close()
    >>> len(read_metrics(path))
    1
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._listeners: list[Callable[[dict[str, Any]], None]] = []

    @classmethod
    def open(cls, path: Path, offset: int | None = None) -> MetricsLog:
        """Opens (or makes) the log at `path`.

        Args:
            path: the file.
            offset: length in bytes to cut the log to, as `offset` gave it when the checkpoint was written; None
                keeps every whole line.

        Raises:
            InputError: another process writes to it, the log is shorter than `offset`, or no line ends there.
        """
        file = path.open("a+b")
        _claim(file, path)
        file.seek(0)
        data = file.read()
        keep = data.rfind(b"\n") + 1 if offset is None else offset
        if not 0 <= keep <= len(data) or (keep and data[keep - 1 : keep] != b"\n"):
            file.close()
            raise InputError(
                f"{path}: no line ends at byte {keep} of {len(data)}, where the checkpoint stopped; "
                "put back the log that belongs to it or start in an empty directory"
            )
        file.truncate(keep)
        file.seek(keep)
        return cls(file)

    @property
    def offset(self) -> int:
        """Length of the log in bytes: what a checkpoint stores and `open` takes."""
        return self._file.tell()

    def write(self, event: Mapping[str, Any]) -> None:
        """Appends one event and waits until it is on disk; NaN and infinities become null.

        Args:
            event: mappings, sequences, numbers, strings, NumPy or JAX arrays.

        Raises:
            TypeError: the event holds something JSON cannot; nothing is written.
        """
        text = as_json(event)
        self._file.write((text + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        for listener in self._listeners:
            listener(json.loads(text))

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Has every event written from now on told to `listener`, as `read_metrics` would read it."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a log, oldest first. A last line without its end (the run was cut off there) is left out.

    Raises:
        InputError: no such file, or a whole line is no JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the directory of a run")
    events = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise InputError(f"{path}: line {number} is no JSON object; mend or delete that line")
        events.append(event)
    return events


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Bytes that crossed the wire, per client. A payload is one message in one direction.

    Attributes:
        down: bytes sent to each client.
        up: bytes each client sent.
        payloads: messages of each client, both directions.
        dense_payload: length in bytes of each client's first unpruned upload.
        parameters: number of values a dense message of each client holds.

    >>> ledger = Ledger().measured({"a": 100}, parameters=30).add({"a": (100, 50)})
    >>> ledger.total, ledger.dense_total, ledger.raw_total, ledger.saving
    (150, 200, 240, 0.25)
    """

    down: Mapping[str, int] = dataclasses.field(default_factory=dict)
    up: Mapping[str, int] = dataclasses.field(default_factory=dict)
    payloads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dense_payload: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def add(self, sent: Mapping[str, tuple[int | None, int | None]]) -> Ledger:
        """A new ledger with the payloads of some clients more.

        Args:
            sent: by a client's name the bytes of a download and of an upload (None: no message went that way).

        Raises:
            ValueError: a negative number of bytes.
        """
        down, up, payloads = dict(self.down), dict(self.up), dict(self.payloads)
        for client, sizes in sent.items():
            least = min((size for size in sizes if size is not None), default=0)
            if least < 0:
                raise ValueError(f"{client}: a payload has at least 0 bytes, not {least}")
            down[client] = down.get(client, 0) + int(sizes[0] or 0)
            up[client] = up.get(client, 0) + int(sizes[1] or 0)
            payloads[client] = payloads.get(client, 0) + sum(size is not None for size in sizes)
        return dataclasses.replace(self, down=down, up=up, payloads=payloads)

    def measured(self, dense_payload: Mapping[str, int], parameters: int) -> Ledger:
        """A new ledger that knows the dense size of some clients' payloads; a size already known stays.

        Args:
            dense_payload: by a client's name the bytes of its unpruned upload.
            parameters: number of values in it.
        """
        return dataclasses.replace(
            self,
            dense_payload={**dense_payload, **self.dense_payload},
            parameters={**dict.fromkeys(dense_payload, parameters), **self.parameters},
        )

    def _total(self, size: Mapping[str, int]) -> int:
        # A client whose dense size was never measured counts with its own bytes: it claims no saving.
        return sum(
            size[client] * count if client in size else self.down[client] + self.up[client]
            for client, count in self.payloads.items()
        )

    @property
    def total(self) -> int:
        """Bytes sent, all clients, both directions."""
        return sum(self.down.values()) + sum(self.up.values())

    @property
    def dense_total(self) -> int:
        """Bytes had every payload been as long as the client's first unpruned upload."""
        return self._total(self.dense_payload)

    @property
    def raw_total(self) -> int:
        """Bytes had every payload been plain float32: 4 x parameters x payloads."""
        return self._total({client: 4 * count for client, count in self.parameters.items()})

    @property
    def saving(self) -> float | None:
        """1 - total / dense_total; None if nothing was sent."""
        return 1 - self.total / self.dense_total if self.dense_total else None

    def summary(self) -> dict[str, Any]:
        """The `bytes` entry of `summary.json`."""
        return {
            "down": sum(self.down.values()),
            "up": sum(self.up.values()),
            "total": self.total,
            "dense_total": self.dense_total,
            "raw_total": self.raw_total,
            "per_client": {name: {"down": self.down[name], "up": self.up[name]} for name in self.payloads},
        }

    def to_json(self) -> dict[str, dict[str, int]]:
        """A JSON object (plain dicts) that `from_json` reads back."""
        return {field.name: dict(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, obj: Mapping[str, Mapping[str, int]]) -> Ledger:
        """The ledger that `to_json` wrote."""
        return cls(**{name: dict(counts) for name, counts in obj.items()})


def known_metrics(*groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of `METRIC_TITLES`, `pooled` left out, for which at least one client in at least one group has a number.

    >>> known_metrics({"a": {"accuracy": 0.5}}, {"mean": {"accuracy": 0.5, "pooled": 0.75}})
    ['accuracy']
    """
    rows = [row for group in groups for row in group.values()]
    return [key for key in METRIC_TITLES if key != "pooled" and any(row.get(key) is not None for row in rows)]


def headline_metric(row: Mapping[str, Any]) -> str:
    """The key by which results are compared: `accuracy` of a classification run, `map` of a re-ID run.

    >>> headline_metric({"accuracy": 0.5}), headline_metric({"rank1": 0.5, "map": 0.25})
    ('accuracy', 'map')
    """
    return "accuracy" if row.get("accuracy") is not None else "map"


def best_first(clients: Mapping[str, Mapping[str, Any]], key: str) -> list[str]:
    """Clients by their number `key`, the greatest first and those without one last.

    >>> best_first({"a": {"map": 0.25}, "b": {}, "c": {"map": 0.5}}, "map")
    ['c', 'a', 'b']
    """
    numbers = {name: row.get(key) for name, row in clients.items()}
    return sorted(clients, key=lambda name: -math.inf if (value := numbers[name]) is None else value, reverse=True)


def privacy_note(account: Mapping[str, Any] | None) -> str:
    """What a run spent of its clients' privacy, the entry `privacy` of a summary, as a line to read; empty for none.

    >>> privacy_note({"epsilon": 8.123, "clip": 1.0, "noise": 2.0, "delta": 1e-3, "clients": 100, "participants": 50,
    ...               "rounds": 20})
    'privacy of a client: epsilon 8.12 at delta 0.001 after 20 rounds (50 of 100 clients each, clip 1, noise 2)'
    """
    if account is None:
        return ""
    value = account["epsilon"]
    bound = "no bound" if value is None or math.isinf(value) else f"epsilon {value:.3g} at delta {account['delta']:g}"
    return (f"privacy of a client: {bound} after {account['rounds']} rounds ({account['participants']} of "
            f"{account['clients']} clients each, clip {account['clip']:g}, noise {account['noise']:g})")


def accuracy_note(row: Mapping[str, Any]) -> str:
    """Both means of a classification result; empty for other results.

    >>> accuracy_note({"accuracy": 0.8394, "pooled": 0.8451})
    '83.9 % mean accuracy over clients, 84.5 % over all their images'
    """
    if row.get("accuracy") is None or row.get("pooled") is None:
        return ""
    return (f"{show(row['accuracy'], 100)} % mean accuracy over clients, "
            f"{show(row['pooled'], 100)} % over all their images")


def show(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    """`value * scale` with fixed digits; a dash for no number.

    >>> show(0.4567, 100), show(None)
    ('45.7', '-')
    """
    return "-" if value is None or not math.isfinite(value) else f"{value * scale:.{digits}f}"


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the numbers among `values`; None if there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def duration(seconds: float) -> str:
    """Hours, minutes, seconds.

    >>> duration(3723.4)
    '1:02:03'
    """
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def heading(method: str, task: str) -> str:
    """What a run is called where people read of it.

    >>> heading("fedavg", "supervised"), heading("fedavg", "classification")
    ('fedavg on supervised re-ID', 'fedavg on classification')
    """
    return f"{method} on {task}" if task == "classification" else f"{method} on {task} re-ID"
