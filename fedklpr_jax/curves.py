"""The curves of a run for other programs: tables in CSV, and event files that TensorBoard reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedklpr_jax.errors import InputError
from fedklpr_jax.metrics import write_atomically

Event = Mapping[str, Any]
# How long numbers may wait for their way to the disk.
_SECONDS = 5


class TensorBoard:
    """Event files in `directory`, first of the `earlier` events of a run that goes on, for what its processes before
    had shown may be cut off or undone.

    The tags are `round/CLIENT/NAME` and `before/CLIENT/NAME` (or `after`), with the client `mean`; the step is how many
    rounds are completed.

    Raises:
      InputError: tensorboardX is not installed, or the directory cannot be written.
    """

    def __init__(self, directory: Path, earlier: Sequence[Event] = ()) -> None:
        check_tensorboard()
        from tensorboardX import SummaryWriter

        try:
            self._writer = SummaryWriter(str(directory), purge_step=0 if earlier else None, flush_secs=_SECONDS)
        except OSError as error:
            raise InputError(f"{directory}: cannot be written ({error.strerror}); give --config.out=OTHER") from error
        for event in earlier:
            self.write(event)

    def write(self, event: Event) -> None:
        """Shows an event of the log within seconds."""
        for tag, value in scalars(event):
            self._writer.add_scalar(tag, value, completed(event))

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()


def check_tensorboard() -> None:
    """Raises InputError where there is nothing to write event files with."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise InputError(
            "config.tensorboard: tensorboardX is not installed; type: pip install 'fedklpr_jax[tensorboard]'"
        ) from error


def completed(event: Event) -> int:
    """How many rounds are completed when an event is logged.

    >>> completed({"event": "round", "round": 0}), completed({"event": "eval", "round": 1})
    (1, 1)
    """
    return int(event["round"]) + (event["event"] == "round")


def rows(event: Event) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of an event, one a client and `mean` where there is one: names with numbers or words. Of a list, one
    entry a local epoch, it is the last.

    >>> list(rows({"event": "eval", "round": 1, "clients": {"a": {"map": 0.5}}, "mean": {"map": 0.5, "rank1": None}}))
    [('a', {'map': 0.5}), ('mean', {'map': 0.5})]
    """
    if event["event"] not in ("round", "eval"):
        return
    for client, row in {**event["clients"], **({"mean": event["mean"]} if "mean" in event else {})}.items():
        last = {name: value[-1] if isinstance(value, list) and value else value for name, value in row.items()}
        yield client, {name: value for name, value in last.items() if isinstance(value, int | float | str)}


def scalars(event: Event) -> Iterator[tuple[str, float]]:
    """The numbers of an event by their tag.

    >>> list(scalars({"event": "round", "round": 0, "clients": {"a": {"loss": 2.0, "decision": "none"}}, "seconds": 3}))
    [('round/a/loss', 2.0), ('round/seconds', 3.0)]
    """
    kind = event.get("stage", event["event"])
    for client, row in rows(event):
        for name, value in row.items():
            if not isinstance(value, str):
                yield f"{kind}/{client}/{name}", float(value)
    if event["event"] == "round" and "seconds" in event:
        yield "round/seconds", float(event["seconds"])


def write_csv(directory: Path, events: Sequence[Event]) -> None:
    """Writes `rounds.csv`, a row a round and client, and `evaluations.csv`, a row a test and client; `round` is how
    many rounds are completed.

    Raises:
      OSError: the directory cannot be written.
    """
    keys = {"rounds": ("round", "client"), "evaluations": ("round", "stage", "client")}
    for kind, table in (("round", "rounds"), ("eval", "evaluations")):
        found = [
            {"round": completed(event), "stage": event.get("stage"), "client": client, **row}
            for event in events if event["event"] == kind for client, row in rows(event)
        ]  # fmt: skip
        names = dict.fromkeys(name for row in found for name in row if name not in keys["evaluations"])
        text = io.StringIO()
        writer = csv.DictWriter(text, [*keys[table], *names], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        write_atomically(directory / f"{table}.csv", text.getvalue().encode())
