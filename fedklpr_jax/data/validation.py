"""The validation split: whole identities held out of a client's training images, or whole images without labels.

Pruning decisions and model choice are scored on these people, never on the test set; every method trains on the same
remainder. The papers gate on test data or say nothing, so the numbers here are our choice.
"""

from __future__ import annotations

import numpy as np

from fedklpr_jax.errors import InputError

LEAST, MOST = 4, 64
LEAST_QUERIES = 8


def hold_out_identities(ids: np.ndarray, cams: np.ndarray, *, seed: int, client: str = "client") -> np.ndarray:
    """Marks the images of 20 % of the identities, at least 4, at most 64 and never more than half of them.

    Identities seen by two or more cameras are taken first, as only they give cross-camera matches; among equals a
    shuffle by `seed` decides.

    Args:
      ids: int [n], the person of each training image.
      cams: int [n], its camera.
      seed: whole number from 0.
      client: the name to show in an error.

    Returns:
      bool [n], True = validation image.

    Raises:
      InputError: fewer than 2 identities would be left to train on.

    >>> ids = np.repeat(np.arange(10), 2)
    >>> cams = np.tile([1, 2], 10)
    >>> len(np.unique(ids[hold_out_identities(ids, cams, seed=0)]))
    4
    """
    people = np.unique(ids)
    count = min(max(round(len(people) / 5), LEAST), MOST, len(people) // 2)
    if len(people) - count < 2:
        raise InputError(
            f"{client}: {len(people)} training identities are too few to hold some out for validation; give 3 or more"
        )
    shuffled = np.random.default_rng(seed).permutation(people)
    single = ~np.isin(shuffled, ids[_has_other_camera(ids, cams)])
    chosen = shuffled[np.argsort(single, kind="stable")][:count]
    return np.isin(ids, chosen)


def hold_out_images(count: int, *, seed: int, client: str = "client") -> np.ndarray:
    """Marks a tenth of `count` images, at least 4, for a task that knows no identities: bool [count].

    Raises:
      InputError: fewer than 16 images.

    >>> int(hold_out_images(100, seed=0).sum())
    10
    """
    if count < 16:
        raise InputError(f"{client}: {count} training images are too few to cluster; give 16 or more")
    held = np.zeros(count, bool)
    held[np.random.default_rng(seed).permutation(count)[: max(round(count / 10), LEAST)]] = True
    return held


def valid_cross_camera(ids: np.ndarray, cams: np.ndarray) -> int:
    """The number of images whose person also appears under another camera.

    >>> valid_cross_camera(np.array([1, 1, 1, 2, 2]), np.array([1, 1, 2, 3, 3]))
    3
    """
    return int(_has_other_camera(ids, cams).sum())


def same_camera_counts(ids: np.ndarray, cams: np.ndarray) -> bool:
    """True where same-camera matches must count too, because fewer than 8 images have a match in another camera.

    >>> same_camera_counts(np.array([1, 1, 2, 2]), np.array([1, 2, 1, 2]))
    True
    """
    return valid_cross_camera(ids, cams) < LEAST_QUERIES


def _has_other_camera(ids: np.ndarray, cams: np.ndarray) -> np.ndarray:
    """bool [n]: the image's person is seen by at least two cameras."""
    pairs = np.unique(np.stack([ids, cams], axis=1), axis=0)
    people, cameras = np.unique(pairs[:, 0], return_counts=True)
    return np.isin(ids, people[cameras > 1])
