from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.data.folder import read_site
from fedklpr_jax.data.validation import (
    hold_out_identities,
    hold_out_images,
    same_camera_counts,
    valid_cross_camera,
)
from fedklpr_jax.errors import InputError

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    "identities, held_out",
    [(3, 1), (4, 2), (7, 3), (8, 4), (19, 4), (20, 4), (23, 5), (35, 7), (316, 63), (320, 64), (751, 64)],
)
def test_number_of_identities(identities: int, held_out: int) -> None:
    ids = np.repeat(np.arange(1, identities + 1), 2)
    cams = np.tile([1, 2], identities)
    chosen = hold_out_identities(ids, cams, seed=0)
    assert chosen.dtype == bool and chosen.shape == ids.shape
    assert len(np.unique(ids[chosen])) == held_out


@pytest.mark.parametrize("identities", [0, 1, 2])
def test_too_few_identities_name_the_client(identities: int) -> None:
    ids = np.arange(identities, dtype=np.int32)
    with pytest.raises(InputError, match=f"viper: {identities} training identities are too few"):
        hold_out_identities(ids, ids, seed=0, client="viper")


def test_people_of_several_cameras_come_first() -> None:
    ids = np.array([1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8])
    cams = np.array([1, 1, 1, 2, 1, 1, 1, 3, 2, 2, 2, 3, 1, 1, 1, 1])
    for seed in range(20):
        held_out = set(ids[hold_out_identities(ids, cams, seed=seed)].tolist())
        assert len(held_out) == 4 and {2, 4, 6} < held_out


def test_number_of_cameras_beyond_two_gives_no_preference() -> None:
    # A validation set of the most filmed people only would not be like the test set.
    ids = np.repeat(np.arange(20), 5)
    cams = np.where(ids < 4, np.tile(np.arange(5), 20), np.tile([0, 1, 0, 1, 0], 20))
    drawn = [set(ids[hold_out_identities(ids, cams, seed=seed)].tolist()) for seed in range(10)]
    assert any(people != {0, 1, 2, 3} for people in drawn)


def test_seed_decides() -> None:
    ids = np.repeat(np.arange(40), 3)
    cams = np.tile([1, 2, 3], 40)
    drawn = [hold_out_identities(ids, cams, seed=seed) for seed in range(5)]
    assert np.array_equal(drawn[3], hold_out_identities(ids, cams, seed=3))
    assert len({row.tobytes() for row in drawn}) == 5


def test_choice_does_not_depend_on_the_order_of_images() -> None:
    rng = np.random.default_rng(0)
    ids, cams = rng.integers(1, 30, 200), rng.integers(1, 4, 200)
    order = rng.permutation(200)
    assert np.array_equal(
        hold_out_identities(ids, cams, seed=1)[order], hold_out_identities(ids[order], cams[order], seed=1)
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), max_size=120), st.integers(0, 2**32))
def test_whole_identities_and_bounds(rows: list[tuple[int, int]], seed: int) -> None:
    ids = np.array([row[0] for row in rows], np.int32)
    cams = np.array([row[1] for row in rows], np.int32)
    total = len(set(ids.tolist()))
    if total < 3:
        with pytest.raises(InputError):
            hold_out_identities(ids, cams, seed=seed)
        return
    chosen = hold_out_identities(ids, cams, seed=seed)
    inside, outside = set(ids[chosen].tolist()), set(ids[~chosen].tolist())
    assert not inside & outside
    assert len(inside) == min(max(round(total / 5), 4), 64, total // 2) and len(outside) >= 2
    several = {person for person in set(ids.tolist()) if len(set(cams[ids == person].tolist())) > 1}
    assert several <= inside or inside <= several


def test_cross_camera_count_by_hand() -> None:
    ids = np.array([1, 1, 1, 2, 2, 3, 4, 4])
    cams = np.array([1, 1, 2, 3, 3, 1, 5, 6])
    assert valid_cross_camera(ids, cams) == 5
    assert same_camera_counts(ids, cams)
    assert not same_camera_counts(np.repeat([1, 2, 3, 4], 2), np.tile([1, 2], 4))
    assert same_camera_counts(np.repeat([1, 2, 3, 4], 2)[:-1], np.tile([1, 2], 4)[:-1])
    nobody = np.zeros(0, np.int32)
    assert valid_cross_camera(nobody, nobody) == 0 and same_camera_counts(nobody, nobody)


@pytest.mark.parametrize("name, images", [("mars_mini", None), ("viper", 126)])
def test_real_set(name: str, images: int | None) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"the real set {name} is not here")
    train = read_site(REAL / name, height=4, width=2).train
    chosen = hold_out_identities(train.ids, train.cams, seed=0)
    assert images is None or chosen.sum() == images
    assert not same_camera_counts(train.ids[chosen], train.cams[chosen])


@pytest.mark.parametrize("count, held_out", [(16, 4), (40, 4), (44, 4), (46, 5), (100, 10), (1264, 126)])
def test_number_of_held_out_images(count: int, held_out: int) -> None:
    chosen = hold_out_images(count, seed=0)
    assert chosen.dtype == bool and chosen.shape == (count,) and chosen.sum() == held_out
    assert np.array_equal(chosen, hold_out_images(count, seed=0))


def test_the_seed_decides_which_images_are_held_out() -> None:
    drawn = np.stack([hold_out_images(50, seed=seed) for seed in range(40)])
    assert len({row.tobytes() for row in drawn}) > 35
    # Any image may be: none of the 50 is spared by 40 draws of a tenth, but for bad luck with a few.
    assert drawn.any(axis=0).sum() > 40


@pytest.mark.parametrize("count", [0, 1, 15])
def test_too_few_images_name_the_client(count: int) -> None:
    with pytest.raises(InputError, match=f"viper: {count} training images are too few to cluster; give 16 or more"):
        hold_out_images(count, seed=0, client="viper")
