"""Writes the network with which a client ends a run as a file for others.

    python -m fedklpr_jax.export RUN --client NAME --format onnx [--out FILE]

RUN is the folder of a run, finished or not; the newest checkpoint counts. The network is the client's personalised one,
as the run's tables evaluate it: of re-ID from a picture to its embedding, of classification to its logits. Before the
file is there it is read back, run, and compared. docs/trained-models.md says what is in it and how to use it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedklpr_jax.errors import InputError, status_of
from fedklpr_jax.run_folder import arguments_of, model_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    parser = arguments_of("export", __doc__)
    parser.add_argument("--format", required=True, choices=("safetensors", "onnx"), help="of the file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it; else RUN/NAME.FORMAT")
    given = parser.parse_args(arguments)
    return status_of(lambda: _export(given.run, given.client, given.format, given.out))


def _export(run: Path, client: str, form: str, out: Path | None) -> None:
    if out and (out.suffix != f".{form}" or not out.parent.is_dir()):
        raise InputError(f"--out: {out} is not allowed; give a name ending in .{form} in an existing folder")
    # Imported late, so that help and typing errors are answered at once.
    from fedklpr_jax import exporting
    from fedklpr_jax.console import Console

    console = Console()
    model = model_of(run, client, console)
    # A client may be named after a camera of its site: mall/c1.
    path = out or run / f"{client.replace('/', '-')}.{form}"
    done = exporting.export(model, form, path)
    zeros = f"{100 * done.zeros / done.parameters:.1f} % of them 0"
    console.line(f"{client} of {run} after {model.rounds} rounds: {model.spec.name}, density {model.density:.3f}; "
                 f"{done.parameters:,} parameters, {zeros}")
    if model.spec.dtype != "float32":
        console.line(f"the run computed in {model.spec.dtype}; the file, and what it is compared with, in float32")
    console.line(f"read back and compared on {done.compared} {done.of}: largest difference {done.difference:.1e}")
    told = exporting.metadata(done.model)
    console.line(f"takes {told['takes']}")
    console.line(f"gives {told['gives']}")
    console.line(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(main())
