"""What the user did wrong, said in one line.

Anything a person can mend (a name, a value, a folder, a picture) is raised as `InputError`; the command line prints
its message alone and leaves with status 2. Everything else is our own mistake and keeps its traceback.
"""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Callable

# What NumPy raises for an .npz file that is damaged or something else; the last two: a length beyond memory or numbers.
BROKEN_NPZ = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error,
              MemoryError, OverflowError)  # fmt: skip


class InputError(ValueError):
    """Bad input. The message names the file, field or client, what is wrong, and what would be right.

    >>> print(InputError("config.rounds: -1 is not allowed; give a whole number from 1"))
    config.rounds: -1 is not allowed; give a whole number from 1
    """


def status_of(job: Callable[[], int | None], interrupted: str = "nothing was written") -> int:
    """Does the job of a command; returns its exit status: the job's own, 2 for bad input, 130 where it is interrupted.

    Args:
        job: returns a status, or None for 0. Its `InputError` is told in one line on stderr.
        interrupted: what an interrupt leaves behind.

    >>> status_of(lambda: None), status_of(lambda: 1)
    (0, 1)
    """
    try:
        return job() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
