"""Sites on disk for the tests of readers: the same files plain, and inside an `images.zip`."""

from __future__ import annotations

import zipfile
from pathlib import Path


def plain(where: Path, files: dict[str, bytes]) -> Path:
    """Writes files by their path under `where`."""
    for path, blob in files.items():
        (where / path).parent.mkdir(parents=True, exist_ok=True)
        (where / path).write_bytes(blob)
    return where


def zipped(where: Path, files: dict[str, bytes]) -> Path:
    """Writes them into the archive of `where`."""
    where.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(where / "images.zip", "w") as archive:
        for path, blob in files.items():
            archive.writestr(path, blob)
    return where
