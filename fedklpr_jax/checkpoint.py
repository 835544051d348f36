"""State on disk: a few complete checkpoints of a run, each bitwise what was in memory.

A checkpoint of step 12 is two things in the run's checkpoint directory:

* `step-00000012.<random>/`: every leaf of the state, laid end to end in one buffer of bytes that Orbax writes.
  One buffer, because Orbax pays for every leaf: 1500 JAX arrays of 50 MB in all take 2.0-3.3 s to save as a tree with
  its defaults and 0.14-0.38 s this way (medians of five runs on 2 busy CPU cores; 0.13-0.19 s of processor time).
* `step-00000012.json`: where that buffer lies, the path, dtype and shape of every leaf, a checksum, and `meta`.

The JSON record is renamed into place after everything else is written. It is the only thing that makes a checkpoint
exist, so a process killed at any moment leaves the earlier checkpoints as they were, and a step saved again replaces
its old self in one motion. A power cut can still lose data that the system had not yet written; sizes and the checksum
then tell, and the checkpoint before it is used.

One process writes to a directory. In a run of several processes only one calls `save`, with a state that it can
address in full.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fedklpr_jax.errors import InputError

PyTree = Any

_FORMAT = 1
# Only names of this form are read or deleted; anything else in the directory is not ours.
_OURS = re.compile(r"step-(\d{8,})\.(json|draft|[0-9a-f]{12}.*)")
# Orbax writes and reads chunks in parallel.
_CHUNK_BYTES = 4 << 20


def save(directory: Path, step: int, state: PyTree, meta: dict[str, Any], keep: int = 2) -> None:
    """Writes one complete checkpoint, then drops all but the newest `keep`.

    Args:
      directory: where the checkpoints of this run lie; made when missing. One run, one directory.
      step: a whole number from 0, usually the number of finished rounds; not below the newest checkpoint's.
      state: any pytree of NumPy or JAX arrays (any shape, any fixed-width dtype). A typed random key goes in as
        `jax.random.key_data(key)`.
      meta: what JSON can hold, under string keys; tuples come back as lists.
      keep: how many complete checkpoints stay, at least 1.

    Raises:
      InputError: the directory cannot be written or the disk is full (earlier checkpoints stay as they were), `step`
        lies before the newest checkpoint, or `keep` is below 1.
      TypeError: a leaf is no plain array, or `meta` does not fit into JSON; nothing is written then.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(folder, 3, {"w": np.float32([1, 2])}, {"round": 3})
    >>> latest(folder)
    3
    >>> restore(folder, 3, {"w": np.zeros(2, np.float32)})
    ({'w': array([1., 2.], dtype=float32)}, {'round': 3})
    """
    directory = Path(directory).absolute()
    if step < 0:
        raise InputError(f"step: {step} is not allowed; give a whole number from 0")
    if keep < 1:
        raise InputError(f"keep: {keep} is not allowed; keep at least 1 checkpoint")
    leaves, specs = _flatten(state)
    buffer = _to_bytes(leaves)
    json.dumps(meta)
    data = f"step-{step:08d}.{uuid.uuid4().hex[:12]}"
    record = {"format": _FORMAT, "data": data, "crc32": zlib.crc32(buffer.data), "leaves": specs, "meta": meta}

    newest = latest(directory)
    if newest is not None and step < newest:
        raise InputError(
            f"{directory}: step {step} lies before the newest checkpoint {newest}; continue from that one or choose an "
            "empty directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # What a killed process left behind goes first: the disk may need its space.
        _remove_strays(directory)
        _write_buffer(directory / data, buffer)
        _commit(directory, step, record | {"files": _sizes(directory / data)})
        for old in list(_complete(directory))[:-keep]:
            _record_path(directory, old).unlink()
        _remove_strays(directory)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, InputError):
            _remove_strays(directory)
        raise InputError(
            f"{directory}: the checkpoint of step {step} cannot be written ({_reason(error)}); free some space or "
            "choose another directory, earlier checkpoints are intact"
        ) from error


def latest(directory: Path) -> int | None:
    """The step of the newest complete checkpoint, or None when there is none.

    A checkpoint is complete when its record can be read and every file it names has its full size, so one that was
    half copied or half deleted is passed over.

    Raises:
      InputError: a record is there but may not be read, or another version of this library wrote it.

    >>> latest(Path("no such directory")) is None
    True
    """
    return max(_complete(Path(directory)), default=None)


def metas(directory: Path) -> dict[int, dict[str, Any]]:
    """The `meta` of every complete checkpoint by its step, oldest first.

    Raises:
      InputError: as `latest`.
    """
    directory = Path(directory)
    records = ((step, _read_record(directory, step)) for step in _complete(directory))
    return {step: record["meta"] for step, record in records if record}


def restore(directory: Path, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint back, bit for bit.

    Args:
      directory: as given to `save`.
      step: as returned by `latest`.
      template: a pytree of the saved structure, whose leaves have the saved shapes and dtypes; arrays or
        `jax.ShapeDtypeStruct`. Its values are not looked at.

    Returns:
      The state, in the template's structure with a NumPy array at each leaf, and `meta`.

    Raises:
      InputError: there is no such checkpoint, it is damaged, or it holds another structure than the template.
    """
    directory = Path(directory).absolute()
    record = _known_record(directory, step)
    _, specs = _flatten(template)
    _check_same(_name(directory, step), record["leaves"], specs)
    buffer = _verified(directory, step, record)
    return jax.tree.unflatten(jax.tree.structure(template), _from_bytes(buffer, specs)), record["meta"]


def leaves(directory: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of a checkpoint by its path, such as `server/model/params/head/kernel`, in the order of the file.

    Args:
      directory: as given to `save`.
      step: as returned by `latest`.

    Raises:
      InputError: there is no such checkpoint, or it is damaged.
    """
    directory = Path(directory).absolute()
    record = _known_record(directory, step)
    values = _from_bytes(_verified(directory, step, record), record["leaves"])
    return {path: value for (path, *_), value in zip(record["leaves"], values, strict=True)}


def _name(directory: Path, step: int) -> str:
    return f"{directory}: checkpoint {step}"


def _known_record(directory: Path, step: int) -> dict[str, Any]:
    """The record of a complete checkpoint; raises InputError where there is none."""
    record = _read_record(directory, step)
    if record is None:
        there = ", ".join(map(str, _complete(directory))) or "none"
        raise InputError(f"{directory}: no complete checkpoint of step {step}; complete ones: {there}")
    return record


def _verified(directory: Path, step: int, record: dict[str, Any]) -> np.ndarray:
    """The bytes of all leaves; raises InputError where they are not those that were saved."""
    name = _name(directory, step)
    try:
        buffer = _read_buffer(directory / record["data"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{name} cannot be read ({_reason(error)}); {_advice(directory, step)}") from error
    if zlib.crc32(buffer.data) != record["crc32"]:
        raise InputError(f"{name} is damaged (its checksum does not match); {_advice(directory, step)}")
    return buffer


def _flatten(tree: PyTree) -> tuple[list[Any], list[list[Any]]]:
    """The leaves of `tree`, and a `[path, dtype, shape]` for each."""
    leaves, specs = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        if not isinstance(array.dtype, np.dtype) or array.dtype.kind in "OSUMm":
            raise TypeError(f"{name}: a checkpoint holds plain arrays, not {array.dtype}; see jax.random.key_data")
        leaves.append(array)
        specs.append([name, array.dtype.name, list(array.shape)])
    return leaves, specs


def _to_bytes(leaves: list[Any]) -> np.ndarray:
    """All leaves end to end as uint8, with zeros behind them: at least one, for Orbax refuses an empty array, and so
    many that a long buffer is whole chunks, for Orbax cuts an array into equal ones, and of a length without such a
    divisor it makes files of a few bytes each, hundreds of thousands of them."""
    parts = [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in jax.device_get(leaves)]
    size = sum(map(len, parts)) + 1
    padding = -size % _CHUNK_BYTES if size > _CHUNK_BYTES else 0
    return np.concatenate([*parts, np.zeros(1 + padding, np.uint8)])


def _from_bytes(buffer: np.ndarray, specs: list[list[Any]]) -> list[np.ndarray]:
    """The inverse of `_to_bytes`."""
    leaves, start = [], 0
    for _, name, shape in specs:
        dtype = np.dtype(name)
        end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # A copy: a view would lie unaligned and hold the whole buffer in memory.
        leaves.append(buffer[start:end].copy().view(dtype).reshape(shape))
        start = end
    return leaves


def _check_same(name: str, saved: list[list[Any]], wanted: list[list[Any]]) -> None:
    """Raises InputError at the first leaf in which the two lists of `[path, dtype, shape]` differ."""
    here, there = ({path: f"{dtype}{shape}" for path, dtype, shape in specs} for specs in (wanted, saved))
    for path in [*there, *here]:
        old, new = there.get(path, "missing"), here.get(path, "missing")
        if old != new:
            raise InputError(
                f"{name}: {path or 'the state'} is {old} in the file but {new} in this run; continue with the "
                "configuration that wrote it"
            )
    if saved != wanted:
        raise InputError(f"{name} holds its leaves in another order; continue with the version that wrote it")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax, which logs whole tracebacks of errors that we report in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _checkpointer() -> ocp.Checkpointer:
    # Without this, Orbax waits for all processes of a run, while only one of them saves.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(here, {here}, barrier_sync_key_prefix=f"process{here}")
    # Weights hardly compress (8 %), and trying takes four times the processor time of writing them.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _write_buffer(path: Path, buffer: np.ndarray) -> None:
    chunks = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
    with _quiet(), _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave({"bytes": buffer}, save_args={"bytes": chunks}))


def _read_buffer(path: Path) -> np.ndarray:
    with _quiet(), _checkpointer() as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore())["bytes"]


def _record_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.json"


def _commit(directory: Path, step: int, record: dict[str, Any]) -> None:
    path = _record_path(directory, step)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(record), encoding="utf-8")
    os.replace(draft, path)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under `folder`, by its path in there."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _read_record(directory: Path, step: int) -> dict[str, Any] | None:
    """The record of a complete checkpoint; None when it is missing, cut short, or its files are not all there."""
    path = _record_path(directory, step)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] == _FORMAT:
            return record if _sizes(directory / record["data"]) == record["files"] else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        # Not "damaged": what is only unreadable for now must not be swept away.
        raise InputError(f"{path}: cannot be read ({_reason(error)}); make it readable") from error
    raise InputError(f"{path}: its format is {record['format']}, not {_FORMAT}; use the library version that wrote it")


def _ours(directory: Path) -> list[tuple[Path, int, str]]:
    """Every entry that a save may have made: its path, its step and the rest of its name."""
    found = ((path, _OURS.fullmatch(path.name)) for path in sorted(directory.glob("step-*")))
    return [(path, int(match[1]), match[2]) for path, match in found if match]


def _complete(directory: Path) -> dict[int, str]:
    """The steps of all complete checkpoints, oldest first, each with the name of its data."""
    steps = sorted(step for _, step, rest in _ours(directory) if rest == "json")
    records = ((step, _read_record(directory, step)) for step in steps)
    return {step: record["data"] for step, record in records if record is not None}


def _remove_strays(directory: Path) -> None:
    """Deletes what a save made and no complete checkpoint uses."""
    complete = _complete(directory)
    used = {*complete.values(), *(_record_path(directory, step).name for step in complete)}
    for path, _, _ in _ours(directory):
        if path.name in used:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _reason(error: Exception) -> str:
    """One short phrase for an error of the system, of TensorStore or of Orbax."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _advice(directory: Path, step: int) -> str:
    others = [str(other) for other in _complete(directory) if other != step]
    return f"delete it and continue from {others[-1]}" if others else "no other checkpoint is there; start anew"
