"""The made-up people: deterministic, disjoint, unequal, hard on raw pixels, and quick to draw."""

import numpy as np
import pytest
from PIL import Image

from fedklpr_jax.data import synthetic
from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation import euclidean_distances, evaluate_ranking


@pytest.fixture(scope="module")
def sites():
    return synthetic.make_sites(0)


def small(seed=0, name="pier"):
    spec = synthetic.SiteSpec(name, "summer", 2, 3, 2, 2)
    return synthetic.make_sites(seed, height=32, width=16, specs=[spec])[0]


def raw_pixel_map(site):
    features = [np.asarray(part.pixels).reshape(len(part), -1) / np.float32(255) for part in (site.query, site.gallery)]
    labels = (site.query.ids, site.gallery.ids, site.query.cams, site.gallery.cams)
    chance = np.random.default_rng(0).random((len(site.query), len(site.gallery)))
    return (
        evaluate_ranking(euclidean_distances(*features), *labels).mean_ap,
        evaluate_ranking(chance, *labels).mean_ap,
    )


def test_pictures_are_a_function_of_seed_and_name():
    one, again = small(), small()
    np.testing.assert_array_equal(one.train.pixels, again.train.pixels)
    for other in (small(seed=1), small(name="quay")):
        assert (one.query.pixels[:2] != other.query.pixels[:2]).mean() > 0.5


def test_a_site_does_not_depend_on_its_neighbours(sites):
    alone = synthetic.make_sites(0, specs=[s for s in synthetic.DEFAULT_SITES if s.name == sites[3].name])[0]
    np.testing.assert_array_equal(alone.train.pixels, sites[3].train.pixels)


def test_shapes_and_people(sites):
    for site in sites:
        for part in (site.train, site.query, site.gallery):
            assert part.pixels.dtype == np.uint8 and part.pixels.shape == (len(part), 64, 32, 3)
            assert len(part.ids) == len(part.cams) == len(part.names)
        assert not set(site.train.ids) & (set(site.query.ids) | set(site.gallery.ids))
        assert 0 in site.gallery.ids and 0 not in site.query.ids and 0 not in site.train.ids
        for person, camera in zip(site.query.ids, site.query.cams, strict=True):
            assert ((site.gallery.ids == person) & (site.gallery.cams != camera)).any()


def test_sites_are_as_unequal_as_real_ones(sites):
    sizes = sorted(len(site.train) for site in sites)
    assert sizes[-1] > 8 * sizes[0] and sizes[0] >= 40
    light = [float(np.mean(site.train.pixels)) for site in sites]
    assert max(light) - min(light) > 40, "sites differ in light"


def test_raw_pixels_are_poor_yet_better_than_chance(sites):
    found, chance = np.mean([raw_pixel_map(site) for site in sites], axis=0)
    assert chance < found < 0.25


def test_a_camera_changes_pixels_more_than_a_person_does(sites):
    site = sites[0]
    pixels = site.train.pixels.astype(np.float32)
    ids, cams = site.train.ids, site.train.cams
    first = ids == ids[0]
    here, there = pixels[first & (cams == cams[0])], pixels[first & (cams != cams[0])]
    others = pixels[~first & (cams == cams[0])]
    across_cameras = np.abs(here.mean(0) - there.mean(0)).mean()
    across_people = np.abs(here.mean(0) - others.mean(0)).mean()
    assert across_cameras > across_people


def test_the_contact_sheet_is_a_picture(tmp_path):
    path = tmp_path / "people.png"
    assert synthetic.main(["--show", str(path), "--height", "32", "--width", "16"]) == 0
    with Image.open(path) as picture:
        assert picture.width > 200 and np.asarray(picture.convert("RGB")).std() > 20
    assert synthetic.main(["--show", str(tmp_path / "missing" / "people.png")]) == 2


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="data.seed"):
        synthetic.make_sites(-1)
    with pytest.raises(InputError, match="too small"):
        synthetic.make_sites(0, height=8, width=4)
