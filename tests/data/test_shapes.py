from __future__ import annotations

import numpy as np
import pytest

from fedklpr_jax.data.shapes import NAMES, make_shapes
from fedklpr_jax.errors import InputError


def test_shapes_are_a_balanced_labelled_set() -> None:
    data = make_shapes(0, per_class=30)
    assert data.pixels.shape == (300, 28, 28, 1) and data.pixels.dtype == np.uint8
    assert data.labels.dtype == np.int32 and np.bincount(data.labels).tolist() == [30] * 10
    assert data.classes == NAMES and data.refused == () and len(data) == 300


def test_size_and_classes_are_as_asked() -> None:
    data = make_shapes(0, per_class=2, size=40, classes=3)
    assert data.pixels.shape == (6, 40, 40, 1) and data.classes == ("disc", "ring", "square")


def test_equal_arguments_give_equal_pictures_and_another_seed_does_not() -> None:
    one, same, other = (make_shapes(seed, per_class=300) for seed in (3, 3, 4))
    assert np.array_equal(one.pixels, same.pixels)
    assert not np.array_equal(one.pixels, other.pixels)
    assert len(np.unique(one.pixels.reshape(3000, -1), axis=0)) == 3000


def test_every_picture_shows_something() -> None:
    pixels = make_shapes(1, per_class=200).pixels.astype(float)
    assert (pixels.std((1, 2, 3)) > 8).all()


def test_classes_differ_by_form_not_by_brightness() -> None:
    # A form covers a part of the square about it that hardly depends on its size; the mean grey must tell nothing.
    pixels = make_shapes(2, per_class=400).pixels.reshape(10, -1) / 255
    assert np.ptp(pixels.mean(1)) < 0.08


def test_a_disc_is_full_and_a_ring_is_hollow() -> None:
    data = make_shapes(5, per_class=300, classes=2)
    grey = data.pixels[..., 0] / 255
    # The form's place: the centre of what is far from the border's median grey.
    away = np.abs(grey - np.median(grey[:, [0, -1]].reshape(600, -1), 1)[:, None, None])
    weight = away * (away > 0.2)
    rows, columns = ((weight * axis).sum((1, 2)) / weight.sum((1, 2)) for axis in np.mgrid[:28, :28])
    middle = away[np.arange(600), np.round(rows).astype(int), np.round(columns).astype(int)]
    assert np.median(middle[:300]) > 0.25 > 0.15 > np.median(middle[300:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
        ({"per_class": 0}, "per_class is 0; give a whole number from 1"),
        ({"size": 11}, "size is 11; give a whole number from 12"),
        ({"classes": 1}, "classes is 1; give a whole number from 2 to 10"),
        ({"classes": 11}, "classes is 11; give a whole number from 2 to 10"),
    ],
)
def test_what_cannot_be_drawn_is_told(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=f"^shapes: {said}$"):
        make_shapes(**{"seed": 0, **arguments})
