"""The server's pictures: drawn, from a folder of either kind, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fedklpr_jax.data import public
from fedklpr_jax.errors import InputError
from tests.federations import tiny_config, tiny_sites

pytestmark = pytest.mark.short


def data(**settings):
    return tiny_config("fedreid", **{f"data__{name}": value for name, value in settings.items()}).data


def hashes(pixels):
    return {picture.tobytes() for picture in pixels}


def test_drawn_pictures_are_those_of_no_client_and_the_same_each_time():
    pixels, told = public.public_pixels(data(public_images=64), ["pier", "gate"])
    assert told == []
    assert pixels.shape == (64, 32, 16, 3) and pixels.dtype == np.uint8
    assert len(hashes(pixels)) == 64
    np.testing.assert_array_equal(pixels, public.public_pixels(data(public_images=64, seed=5), [])[0])
    for site in tiny_sites():
        assert not hashes(pixels) & hashes(site.train.pixels)


def save(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 4, 3), value, np.uint8)).save(folder / name)


def test_a_folder_of_plain_pictures(tmp_path):
    folder = tmp_path / "lobby"
    for value in range(33):
        save(folder, f"any name {value}.png", value)
    (folder / "broken.jpg").write_bytes(b"nothing")
    (folder / "notes.txt").write_text("no picture")
    (folder / "album.png").mkdir()
    pixels, told = public.public_pixels(data(public=str(folder)), ["pier/c1"])
    assert told == ["public images: broken.jpg: not a JPEG or PNG picture"]
    assert pixels.shape == (33, 32, 16, 3) and sorted(pixels[:, 0, 0, 0].tolist()) == list(range(33))
    # Shuffled, so that a batch is no single person, but always the same way.
    assert pixels[:, 0, 0, 0].tolist() != list(range(33))
    np.testing.assert_array_equal(pixels, public.public_pixels(data(public=str(folder)), [])[0])


def test_a_folder_in_re_id_layout_gives_all_three_splits(tmp_path):
    folder = tmp_path / "lobby"
    for value, (split, camera) in enumerate((("bounding_box_train", 1), ("query", 1), ("bounding_box_test", 2))):
        for person in range(1, 12):
            save(folder / split, f"{person:04d}_c{camera}s1_000000_00.png", 60 + value)
    (folder / "query" / "0001_c1s1_000000_01.png").write_bytes(b"nothing")
    pixels, told = public.public_pixels(data(public=str(folder)), [])
    assert told == ["public images: query/0001_c1s1_000000_01.png: not a JPEG or PNG picture"]
    assert np.unique(pixels[:, 0, 0, 0], return_counts=True)[1].tolist() == [11, 11, 11]


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match="market is a client's folder; give pictures of people no client has"):
        public.public_pixels(data(public=str(tmp_path / "market")), ["pier", "market/c2"])
    with pytest.raises(InputError, match=r"config\.data\.public: .*nowhere cannot be listed"):
        public.public_pixels(data(public=str(tmp_path / "nowhere")), [])
    save(tmp_path / "few", "a.png", 1)
    with pytest.raises(InputError, match="few holds 1 readable pictures; give 32 or more"):
        public.public_pixels(data(public=str(tmp_path / "few")), [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds neither"):
        public.public_pixels(data(public=str(tmp_path / "empty")), [])
