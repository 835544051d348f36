"""Drawn sites kept on disk: drawing those of the default takes longer than anything else that a second run does before
it trains."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedklpr_jax.data import render, synthetic
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.errors import BROKEN_NPZ

_FIELDS = ("pixels", "ids", "cams", "names")


def kept_sites(
    seed: int, *, height: int, width: int, specs: Sequence[synthetic.SiteSpec], cache: Path
) -> list[Site]:
    """`synthetic.make_sites`, whose sites are written to `cache`, each a file, and read from there the next time.

    A file that is damaged or was drawn by other code is drawn anew. A cache that cannot be written keeps nothing.

    Raises:
      InputError: as `make_sites`.
    """
    paths = {spec.name: cache / f"drawn-{_key(seed, spec, height, width)}.npz" for spec in specs}
    found = {name: site for name, path in paths.items() if (site := _read(path, name))}
    missing = [spec for spec in specs if spec.name not in found]
    for drawn in synthetic.make_sites(seed, height=height, width=width, specs=missing) if missing else ():
        _write(paths[drawn.name], drawn)
        found[drawn.name] = drawn
    return [found[spec.name] for spec in specs]


def _key(seed: int, spec: synthetic.SiteSpec, height: int, width: int) -> str:
    """A name for what these arguments and this code draw."""
    code = inspect.getsource(render) + inspect.getsource(synthetic)
    what = json.dumps([seed, dataclasses.asdict(spec), height, width, np.__version__, code])
    return hashlib.sha256(what.encode()).hexdigest()[:24]


def _read(path: Path, name: str) -> Site | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            splits = [[file[f"{split}_{field}"] for field in _FIELDS] for split in ("train", "query", "gallery")]
    except BROKEN_NPZ:
        return None
    train, query, gallery = (Images(pixels, ids, cams, tuple(names.tolist())) for pixels, ids, cams, names in splits)
    return Site(name, train, query, gallery)


def _write(path: Path, site: Site) -> None:
    splits = {"train": site.train, "query": site.query, "gallery": site.gallery}
    arrays: dict[str, Any] = {
        f"{split}_{field}": np.asarray(getattr(images, field)) for split, images in splits.items() for field in _FIELDS
    }
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        try:
            with open(draft, "xb") as file:
                np.savez(file, **arrays)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
