"""The server's unlabelled pictures: drawn people of no client, or a folder the user gives.

FedReID (Zhuang et al., ACM MM 2020) distils on such a set, CUHK02 in the paper, and clusters clients by it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedklpr_jax.data import folder, synthetic
from fedklpr_jax.data.scenario import site_of
from fedklpr_jax.errors import InputError

# Far from the seeds of federations and of pretraining; the names of the sites are their own too.
SEED = 810_001
LEAST = 32
PICTURES = (".jpg", ".jpeg", ".png")


def public_pixels(data: Any, clients: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The pictures at the server, uint8 [n, height, width, 3], n from 32, and a line for each file left out.

    Args:
      data: `config.data`; `public`, `public_images`, `height` and `width` are read.
      clients: the clients' names. Nobody can tell from a folder whose pictures are in it; only one that bears a
        client's name is refused.

    Raises:
      InputError: a folder of a client, without pictures that can be read, or with fewer than 32.
    """
    if not data.public:
        return drawn(data.public_images, data.height, data.width), []
    path = Path(os.path.abspath(data.public))
    if path.name in map(site_of, clients):
        raise InputError(f"config.data.public: {path.name} is a client's folder; give pictures of people no client has")
    pixels, refused = _read(path, data.height, data.width)
    if len(pixels) < LEAST:
        raise InputError(f"config.data.public: {path} holds {len(pixels)} readable pictures; give {LEAST} or more")
    return pixels, [f"public images: {line}" for line in refused]


def drawn(count: int, height: int, width: int) -> np.ndarray:
    """`count` pictures in all styles, shuffled: uint8 [count, height, width, 3].

    >>> drawn(32, 16, 8).shape
    (32, 16, 8, 3)
    """
    # Each person stands before both cameras at least once.
    people = max(2, -(-count // (2 * len(synthetic.STYLES))))
    specs = [synthetic.SiteSpec(f"public {style}", style, 2, people, 2, 1) for style in synthetic.STYLES]
    sites = synthetic.make_sites(SEED, height=height, width=width, specs=specs)
    pixels = np.concatenate([site.train.pixels for site in sites])
    return pixels[np.random.default_rng(SEED).permutation(len(pixels))[:count]]


def _read(path: Path, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """All pictures of a folder, in a fixed shuffled order, and why others are left out."""
    try:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
    except OSError as error:
        raise InputError(f"config.data.public: {path} cannot be listed ({error.strerror}); give a folder") from error
    if files:
        pixels, broken = folder.read_pictures(files, height=height, width=width)
        refused = [f"{name}: {reason}" for name, reason in broken.items()]
    else:
        site = folder.read_site(path, height=height, width=width)
        pixels = np.concatenate([part.pixels for part in (site.train, site.query, site.gallery)])
        refused = list(site.refused)
    return pixels[np.random.default_rng(SEED).permutation(len(pixels))], refused
