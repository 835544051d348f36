"""Augmentation: each transformation on small images, as a function of its key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedklpr_jax.data import augment

HEIGHT, WIDTH = 32, 16
# No pixel is like its neighbours or its mirror, none is 0.
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 6, 3)).astype(np.float32))
WHITE = jnp.ones((64, HEIGHT, WIDTH, 3))
KEYS = st.integers(0, 2**31 - 1).map(jax.random.key)

crop = jax.jit(augment.random_crop, static_argnums=2)
erase = jax.jit(augment.random_erase)
run = jax.jit(augment.augment, static_argnames=("flip_probability", "pad", "erase_probability"))


@pytest.mark.short
def test_normalisation_by_hand():
    found = augment.normalise(jnp.array([[[[0, 255, 51]]]], jnp.uint8))
    expected = [-0.485 / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0, 0, 0], expected, rtol=1e-5)


@settings(deadline=None, max_examples=10)
@given(KEYS)
def test_nothing_happens_where_nothing_is_asked_for(key):
    same = run(key, IMAGES, flip_probability=0.0, pad=0, erase_probability=0.0)
    np.testing.assert_array_equal(same, IMAGES)


@settings(deadline=None, max_examples=10)
@given(KEYS)
def test_the_key_alone_decides(key):
    options = {"flip_probability": 0.5, "pad": 2, "erase_probability": 0.5}
    first = run(key, WHITE[:, :8, :6] * IMAGES[:1], **options)
    np.testing.assert_array_equal(first, run(key, WHITE[:, :8, :6] * IMAGES[:1], **options))
    other = run(jax.random.fold_in(key, 1), WHITE[:, :8, :6] * IMAGES[:1], **options)
    assert not np.array_equal(first, other)
    # And 64 times the same image becomes many different ones.
    assert len({np.asarray(image).tobytes() for image in first}) > 10


@pytest.mark.short
def test_flipping_mirrors_left_and_right():
    row = jnp.arange(6.0).reshape(1, 2, 3, 1)
    assert augment.flip(row)[0, :, :, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    np.testing.assert_array_equal(augment.flip(augment.flip(IMAGES)), IMAGES)


@settings(deadline=None, max_examples=20)
@given(KEYS)
def test_each_image_is_flipped_or_not(key):
    np.testing.assert_array_equal(augment.random_flip(key, IMAGES, 1.0), augment.flip(IMAGES))
    mirrored = augment.flip(IMAGES)
    for found, image, mirror in zip(augment.random_flip(key, IMAGES, 0.5), IMAGES, mirrored, strict=True):
        assert np.array_equal(found, image) or np.array_equal(found, mirror)


def test_half_of_the_images_are_flipped():
    many = jnp.tile(IMAGES[:1], (1000, 1, 1, 1))
    flipped = augment.random_flip(jax.random.key(3), many, 0.3) != many
    assert 0.25 < np.mean(np.any(flipped, axis=(1, 2, 3))) < 0.35


def shift_of(image, original, pad):
    """Which of the `2 pad + 1` squared shifts `image` is: (down, right), or None."""
    padded = np.pad(original, ((pad, pad), (pad, pad), (0, 0)))
    height, width, _ = original.shape
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            if np.array_equal(image, padded[top : top + height, left : left + width]):
                return top - pad, left - pad
    return None


@settings(deadline=None, max_examples=20)
@given(KEYS, st.sampled_from([1, 3]))
def test_a_crop_is_one_of_the_possible_shifts(key, pad):
    for found, image in zip(np.asarray(crop(key, IMAGES, pad)), np.asarray(IMAGES), strict=True):
        assert shift_of(found, image, pad) is not None


def test_all_shifts_occur():
    many = jnp.tile(IMAGES[:1], (300, 1, 1, 1))
    shifts = {shift_of(image, np.asarray(IMAGES[0]), 1) for image in np.asarray(crop(jax.random.key(0), many, 1))}
    assert shifts == {(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)}


@settings(deadline=None, max_examples=25)
@given(KEYS)
def test_what_is_erased_is_one_rectangle_of_two_to_twenty_percent(key):
    for image in np.asarray(erase(key, WHITE, 1.0)):
        gone = (image == 0).all(axis=-1)
        np.testing.assert_array_equal(image[~gone], 1.0)
        rows, columns = np.flatnonzero(gone.any(axis=1)), np.flatnonzero(gone.any(axis=0))
        tall, wide = len(rows), len(columns)
        # One block without holes.
        assert gone.sum() == tall * wide and np.ptp(rows) == tall - 1 and np.ptp(columns) == wide - 1
        # Each side is rounded by up to half a pixel, and none fills the image.
        assert (tall - 0.5) * (wide - 0.5) <= 0.2 * HEIGHT * WIDTH
        assert (tall + 0.5) * (wide + 0.5) >= 0.02 * HEIGHT * WIDTH
        assert tall < HEIGHT and wide < WIDTH
        # Aspect 0.3 to 3.3, unless the image is too narrow for it.
        assert (tall - 0.5) / (wide + 0.5) <= 3.3
        assert wide == WIDTH - 1 or (tall + 0.5) / (wide - 0.5) >= 0.3


def test_erasing_spares_nothing_by_its_place_and_some_by_its_chance():
    erased = np.asarray(erase(jax.random.key(7), jnp.tile(WHITE, (64, 1, 1, 1)), 0.5)) == 0
    assert 0.45 < erased.any(axis=(1, 2, 3)).mean() < 0.55
    # Every place is reached, and each as often as its mirror image.
    share = erased[..., 0].mean(axis=0)
    assert share.min() > 0 and share.max() < 0.2
    np.testing.assert_allclose(share, share[::-1, ::-1], atol=0.03)
    assert abs(share[0].mean() - share[-1].mean()) < 0.003 and abs(share[:, 0].mean() - share[:, -1].mean()) < 0.003
    np.testing.assert_array_equal(erase(jax.random.key(7), WHITE, 0.0), WHITE)


@settings(deadline=None, max_examples=10)
@given(KEYS)
def test_all_together_leave_shape_and_type_and_invent_no_colour(key):
    found = run(key, IMAGES, flip_probability=0.5, pad=3, erase_probability=0.5)
    assert found.shape == IMAGES.shape and found.dtype == IMAGES.dtype
    for image, original in zip(np.asarray(found), np.asarray(IMAGES), strict=True):
        assert np.isin(image, np.append(original, 0.0)).all()
