"""Image augmentation inside the training step: pure, on the device, on uint8 images gathered a moment before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# ImageNet statistics in units of uint8, the convention of every re-ID backbone. NumPy's: importing starts no backend.
MEAN = np.array([0.485, 0.456, 0.406], np.float32) * np.float32(255.0)
STD = np.array([0.229, 0.224, 0.225], np.float32) * np.float32(255.0)


def normalise(images: jax.Array) -> jax.Array:
    """uint8 [b, h, w, 3] to float32 of mean 0 and deviation 1 a channel (ImageNet statistics)."""
    return (images.astype(jnp.float32) - MEAN) / STD


def flip(images: jax.Array) -> jax.Array:
    """Mirrors images [b, h, w, c] left to right."""
    return images[:, :, ::-1]


def random_flip(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Mirrors each image with the given probability."""
    chosen = jax.random.bernoulli(key, probability, (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, flip(images), images)


def random_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Shifts each image by up to `pad` pixels in both directions; what comes in is 0 (the mean colour)."""
    if pad == 0:
        return images
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.random.randint(key, (count, 2), 0, 2 * pad + 1)
    return jax.vmap(
        lambda image, offset: jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))
    )(padded, offsets)


def random_erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Sets a random rectangle of each image to 0 with the given probability.

    Area 2-20 % of the image, aspect ratio 0.3-3.3 (log-uniform), as in Zhong et al., "Random erasing data
    augmentation", AAAI 2020.
    """
    count, height, width, _ = images.shape
    keys = jax.random.split(key, 5)
    area = jax.random.uniform(keys[0], (count,), minval=0.02, maxval=0.2) * height * width
    aspect = jnp.exp(jax.random.uniform(keys[1], (count,), minval=jnp.log(0.3), maxval=jnp.log(3.3)))
    tall = jnp.round(jnp.minimum(jnp.sqrt(area * aspect), height - 1.0))
    wide = jnp.round(jnp.minimum(jnp.sqrt(area / aspect), width - 1.0))
    corner = jax.random.uniform(keys[2], (count, 2))
    top = jnp.floor(corner[:, 0] * (height - tall + 1))[:, None]
    left = jnp.floor(corner[:, 1] * (width - wide + 1))[:, None]
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    inside_rows = (rows >= top) & (rows < top + tall[:, None])
    inside_columns = (columns >= left) & (columns < left + wide[:, None])
    chosen = jax.random.bernoulli(keys[3], probability, (count, 1, 1))
    erased = chosen & inside_rows[:, :, None] & inside_columns[:, None, :]
    return jnp.where(erased[..., None], 0.0, images)


def augment(
    key: jax.Array, images: jax.Array, *, flip_probability: float, pad: int, erase_probability: float
) -> jax.Array:
    """Flip, pad-and-crop, erase: float32 [b, h, w, 3], normalised, in and out; a pure function of `key`."""
    flip_key, crop_key, erase_key = jax.random.split(key, 3)
    images = random_flip(flip_key, images, flip_probability)
    images = random_crop(crop_key, images, pad)
    return random_erase(erase_key, images, erase_probability) if erase_probability > 0 else images
