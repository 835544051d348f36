"""Clients by data set, by camera and by identity, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedklpr_jax.data import scenario
from fedklpr_jax.data.site import Images, Site
from fedklpr_jax.data.validation import hold_out_identities
from fedklpr_jax.errors import InputError
from tests.federations import tiny_sites

pytestmark = pytest.mark.short


def site_with(name: str, pictures: list[tuple[int, int]], refused: tuple[str, ...] = ()) -> Site:
    """A site whose training pictures are these (person, camera); pixel values count them."""
    ids, cams = np.array(pictures, np.int32).T
    pixels = np.broadcast_to(np.arange(len(ids), dtype=np.uint8)[:, None, None, None], (len(ids), 2, 1, 3))
    train = Images(pixels, ids, cams, tuple(f"{name} {row}" for row in range(len(ids))))
    return Site(name, train, train.take(np.arange(2)), train.take(np.arange(3)), refused)


def seen_by(camera: int, people: range, times: int) -> list[tuple[int, int]]:
    return [(person, camera) for person in people for _ in range(times)]


def test_data_sets_stay_as_they_are():
    sites = tiny_sites()
    found, notes = scenario.split_sites(sites, "dataset", clients=2, seed=0)
    assert [a is b for a, b in zip(found, sites, strict=True)] == [True] * 3 and notes == []


def test_every_camera_is_a_client_with_its_own_pictures_and_the_test_of_its_site():
    pictures = seen_by(4, range(1, 6), 4) + seen_by(2, range(3, 9), 3)
    mall = site_with("mall", pictures, refused=("a.jpg: 0 bytes",))
    (second, fourth), notes = scenario.split_sites([mall], "camera", clients=2, seed=0)
    assert notes == [] and (second.name, fourth.name) == ("mall/c2", "mall/c4")
    assert (second.train.cams == 2).all() and second.train.ids.tolist() == [p for p in range(3, 9) for _ in range(3)]
    assert second.train.pixels[:, 0, 0, 0].tolist() == list(range(20, 38))
    assert second.train.names[0] == "mall 20" and len(fourth.train) == 20
    for client in (second, fourth):
        assert client.query is mall.query and client.gallery is mall.gallery
        assert client.refused == ()  # told once, of the site


def test_a_camera_with_too_little_is_left_out_with_a_note():
    few_people, few_pictures = seen_by(1, range(1, 5), 9), seen_by(2, range(1, 8), 2)
    mall = site_with("mall", few_people + few_pictures + seen_by(3, range(1, 6), 4))
    (found,), notes = scenario.split_sites([mall], "camera", clients=2, seed=0)
    assert found.name == "mall/c3"
    assert notes == [
        "mall/c1: left out, 36 training pictures of 4 people; a client needs 16 of 5",
        "mall/c2: left out, 14 training pictures of 7 people; a client needs 16 of 5",
    ]
    with pytest.raises(InputError, match=r"^config\.data\.scenario: no camera has 16 training pictures of 5 people"):
        scenario.split_sites([site_with("mall", few_people)], "camera", clients=2, seed=0)


def test_people_are_dealt_out_with_all_their_cameras():
    mall = site_with("mall", seen_by(1, range(1, 12), 2) + seen_by(2, range(1, 12), 1))
    shares, notes = scenario.split_sites([mall], "identity", clients=2, seed=3)
    assert notes == [] and [share.name for share in shares] == ["mall/p1", "mall/p2"]
    people = [set(share.train.ids.tolist()) for share in shares]
    assert sorted(map(len, people)) == [5, 6] and people[0] | people[1] == set(range(1, 12))
    for share, own in zip(shares, people, strict=True):
        assert len(share.train) == 3 * len(own) and set(share.train.cams.tolist()) == {1, 2}
        assert share.query is mall.query and share.gallery is mall.gallery
    again, _ = scenario.split_sites([mall], "identity", clients=2, seed=3)
    others, _ = scenario.split_sites([mall], "identity", clients=2, seed=4)
    assert again[0].train.ids.tolist() == shares[0].train.ids.tolist() != others[0].train.ids.tolist()


def test_too_few_people_are_told_with_what_would_do():
    mall = site_with("mall", seen_by(1, range(1, 15), 2))
    with pytest.raises(InputError) as caught:
        scenario.split_sites([mall], "identity", clients=3, seed=0)
    assert str(caught.value) == (
        "config.data.identity_clients: mall has 14 training identities, too few for 3 clients of 5; give at most 2"
    )
    kiosk = site_with("kiosk", seen_by(1, range(1, 10), 2))
    with pytest.raises(InputError, match=r"kiosk has 9 training identities.*; give another scenario, or leave it out"):
        scenario.split_sites([kiosk], "identity", clients=2, seed=0)


@pytest.mark.parametrize("kind", ["camera", "identity"])
def test_the_smallest_client_still_trains_and_validates(kind):
    pictures = seen_by(1, range(1, 6), 4) if kind == "camera" else seen_by(1, range(1, 11), 2)
    clients, _ = scenario.split_sites([site_with("mall", pictures)], kind, clients=2, seed=0)
    for client in clients:
        held = hold_out_identities(client.train.ids, client.train.cams, seed=0, client=client.name)
        assert len(np.unique(client.train.ids[held])) == 2 and len(np.unique(client.train.ids[~held])) == 3


def test_the_edge_of_a_client_is_its_site():
    assert scenario.edges_of(["b/c1", "a/c1", "b/c7", "c"]) == (0, 1, 0, 2)
    assert scenario.edges_of([]) == ()
