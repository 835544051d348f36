"""How one labelled set becomes a federation: Dirichlet label skew, label shards, and each client's own test split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedklpr_jax.errors import InputError

TRIES = 1000


def dirichlet(labels: np.ndarray, clients: int, alpha: float, *, seed: int, least: int = 10) -> list[np.ndarray]:
    """Label skew: the rows of each class are shared out by a draw from a symmetric Dirichlet distribution.

    One draw: class by class in rising order, the rows are shuffled and cut at floor(cumulative share * rows of the
    class). All classes are drawn again until every client has `least` rows. Sizes are not balanced.

    NumPy's frozen legacy generator draws (shuffle, then shares, for each class). So a seed gives the same class counts
    on every machine and NumPy release, whatever the order of the pictures within a class; for Fashion-MNIST, 100
    clients and seed 42 they are those of the logged results of FedOBP (arXiv 2604.16574).

    Args:
      labels: int [n], the class of each picture.
      clients: number of clients, from 1.
      alpha: concentration, above 0; small means skewed.
      seed: whole number from 0 to 2**32 - 1.
      least: rows every client must get, from 1.

    Returns:
      The rows of each client, int64, class after class; every row is with exactly one client.

    Raises:
      InputError: an argument out of range, too few rows for `least` each, or no success in 1000 draws.

    >>> [len(rows) for rows in dirichlet(np.repeat(np.arange(10), 7000), 100, 0.1, seed=42)][:4]
    [198, 253, 1829, 1031]
    """
    _check(clients, seed)
    if not (alpha > 0 and np.isfinite(alpha)):  # so written that NaN fails
        raise InputError(f"partition: alpha is {alpha}; give a number above 0 (0.1 is very skewed, 100 nearly even)")
    if least < 1:
        raise InputError(f"partition: least is {least}; give a whole number from 1")
    if clients * least > len(labels):
        raise InputError(
            f"partition: {len(labels)} pictures are too few for {clients} clients of at least {least}; "
            "give fewer clients or a smaller least"
        )
    random = np.random.RandomState(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(TRIES):
        # Each draw shuffles the last one's order further, as the logged runs did; starting afresh would differ.
        pieces = [_share_out(rows, clients, alpha, random) for rows in classes]
        parts = [np.concatenate(part) for part in zip(*pieces, strict=True)]
        if min(map(len, parts)) >= least:
            return parts
    raise InputError(
        f"partition: in {TRIES} draws with alpha {alpha} some of the {clients} clients always had fewer than {least} "
        "pictures; give a larger alpha, fewer clients or a smaller least"
    )


def shards(labels: np.ndarray, clients: int, shards_per_client: int, *, seed: int) -> list[np.ndarray]:
    """Sorts by label, cuts into clients * shards_per_client equal pieces and deals them (McMahan et al., AISTATS 2017).

    Where classes are whole numbers of pieces, a client has at most `shards_per_client` classes. What does not divide
    evenly makes some pieces one row longer, so that no picture is lost. The order within a class is random.

    Args:
      labels: int [n], the class of each picture.
      clients: number of clients, from 1.
      shards_per_client: pieces each client gets, from 1.
      seed: whole number from 0 to 2**32 - 1.

    Returns:
      The rows of each client, int64; every row is with exactly one client.

    Raises:
      InputError: an argument out of range, or fewer pictures than pieces.

    >>> labels = np.array([0, 1, 0, 1, 2, 2])
    >>> sorted(labels[rows].tolist() for rows in shards(labels, 3, 1, seed=0))
    [[0, 0], [1, 1], [2, 2]]
    """
    _check(clients, seed)
    if shards_per_client < 1:
        raise InputError(f"partition: shards_per_client is {shards_per_client}; give a whole number from 1")
    count = clients * shards_per_client
    if count > len(labels):
        raise InputError(
            f"partition: {len(labels)} pictures are too few for {clients} clients of {shards_per_client} shards; "
            "give fewer clients or shards"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    pieces = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], count)
    dealt = rng.permutation(count).reshape(clients, shards_per_client)
    return [np.concatenate([pieces[piece] for piece in hand]) for hand in dealt]


def split_off(rows: np.ndarray, share: float, *, key: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Takes floor(share * rows) of a client's rows, at least 1, at random as its test set.

    Classes are not stratified: the split follows the logged results of FedOBP, where it is one plain shuffle.

    Args:
      rows: int [n], the rows of one client.
      share: the part to test on, between 0 and 1.
      key: whole numbers from 0, say (seed, client); the split depends on nothing else.

    Returns:
      (train, test), each in rising order and with at least one row; together exactly `rows`.

    Raises:
      InputError: a share outside (0, 1), or fewer than 2 rows.

    >>> train, test = split_off(np.arange(10), 0.25, key=(42, 0))
    >>> len(train), len(test)
    (8, 2)
    """
    if not 0 < share < 1:
        raise InputError(f"partition: a test share of {share} leaves one side empty; give a number between 0 and 1")
    if len(rows) < 2:
        raise InputError(f"partition: {len(rows)} picture cannot be split in two; give every client 2 or more")
    shuffled = np.random.default_rng(key).permutation(rows)
    count = max(int(share * len(rows)), 1)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def _check(clients: int, seed: int) -> None:
    if clients < 1:
        raise InputError(f"partition: clients is {clients}; give a whole number from 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"partition: seed is {seed}; give a whole number from 0 to {2**32 - 1}")


def _share_out(rows: np.ndarray, clients: int, alpha: float, random: np.random.RandomState) -> list[np.ndarray]:
    """Cuts `rows`, which it shuffles in place, into one piece a client."""
    random.shuffle(rows)
    shares = random.dirichlet(np.full(clients, alpha))
    return np.split(rows, (np.cumsum(shares) * len(rows)).astype(np.int64)[:-1])
