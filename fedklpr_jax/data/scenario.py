"""FedReID's three scenarios: a client is a whole data set, one camera of it, or a share of its people.

Zhuang et al., ACM MM 2020 and TOMM 2023. Whatever a client trains on, it is tested on its site's whole query and
gallery. A client of a split site is named `site/cN` (camera N) or `site/pN` (the N-th share of its people).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fedklpr_jax.data.site import Site
from fedklpr_jax.errors import InputError

# Some are held out for validation, and a triplet loss needs two people in training.
LEAST_PEOPLE = 5
LEAST_PICTURES = 16


def site_of(client: str) -> str:
    """The site that a client belongs to.

    >>> site_of("mall/c1"), site_of("mall")
    ('mall', 'mall')
    """
    return client.partition("/")[0]


def edges_of(clients: Sequence[str]) -> tuple[int, ...]:
    """The number of each client's site, in order of appearance.

    >>> edges_of(["mall/c1", "campus/c1", "mall/c2"])
    (0, 1, 0)
    """
    sites = list(dict.fromkeys(map(site_of, clients)))
    return tuple(sites.index(site_of(client)) for client in clients)


def split_sites(sites: Sequence[Site], scenario: str, *, clients: int, seed: int) -> tuple[list[Site], list[str]]:
    """The clients of a scenario.

    `dataset` leaves the sites alone. `camera` makes every camera a client, which so never sees a person from a second
    side; one with too few people or pictures is left out. `identity` shuffles each site's people and deals them out,
    with their pictures of all cameras; shares differ by one person at most.

    Args:
      sites: what to split.
      scenario: `dataset`, `camera` or `identity`.
      clients: shares of a site's people (`identity`).
      seed: whole number from 0, of the dealing.

    Returns:
      The clients, in the order of the sites, and one note for each camera left out.

    Raises:
      InputError: no camera is left, or a site has too few people for so many clients.
    """
    if scenario == "dataset":
        return list(sites), []
    if scenario == "camera":
        return _by_camera(sites)
    return [share for site in sites for share in _by_identity(site, clients, seed)], []


def _part(site: Site, name: str, chosen: np.ndarray) -> Site:
    """`site` with the training pictures that are `chosen`, bool [n]. What was refused is told once, of the site."""
    train = site.train.take(np.flatnonzero(chosen))
    return dataclasses.replace(site, name=f"{site.name}/{name}", train=train, refused=())


def _by_camera(sites: Sequence[Site]) -> tuple[list[Site], list[str]]:
    found, notes = [], []
    for site in sites:
        for camera in np.unique(site.train.cams):
            client = _part(site, f"c{camera}", site.train.cams == camera)
            people, pictures = len(np.unique(client.train.ids)), len(client.train)
            if people < LEAST_PEOPLE or pictures < LEAST_PICTURES:
                notes.append(
                    f"{client.name}: left out, {pictures} training pictures of {people} people; a client needs "
                    f"{LEAST_PICTURES} of {LEAST_PEOPLE}"
                )
            else:
                found.append(client)
    if not found:
        raise InputError(
            f"config.data.scenario: no camera has {LEAST_PICTURES} training pictures of {LEAST_PEOPLE} people; give "
            "dataset or identity"
        )
    return found, notes


def _by_identity(site: Site, clients: int, seed: int) -> list[Site]:
    people = np.random.default_rng(seed).permutation(np.unique(site.train.ids))
    if len(people) < LEAST_PEOPLE * clients:
        most = len(people) // LEAST_PEOPLE
        right = f"at most {most}" if most > 1 else "another scenario, or leave it out of config.data.clients"
        raise InputError(
            f"config.data.identity_clients: {site.name} has {len(people)} training identities, too few for {clients} "
            f"clients of {LEAST_PEOPLE}; give {right}"
        )
    hands = np.array_split(people, clients)
    return [_part(site, f"p{number}", np.isin(site.train.ids, hand)) for number, hand in enumerate(hands, 1)]
