"""What the pictures are that a trained network takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class PictureFormat:
    """Pictures of `height` rows, `width` columns and `channels` (3 are red, green, blue, in this order), uint8; of them
    a network is given `(x - mean) / deviation`, both in units of uint8 and one a channel.

    >>> PictureFormat(1, 1, 1, (100.0,), (50.0,)).normalise(np.full((1, 1, 1, 1), 200, np.uint8)).tolist()
    [[[[2.0]]]]
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one picture: rows, columns, channels."""
        return self.height, self.width, self.channels

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> PictureFormat:
        """From what JSON has made of `dataclasses.asdict`."""
        height, width, channels = (int(told[name]) for name in ("height", "width", "channels"))
        return cls(height, width, channels, tuple(told["mean"]), tuple(told["deviation"]))

    def normalise(self, pixels: jax.Array) -> jax.Array:
        """uint8 [n, height, width, channels] to float32 of the same shape, as the network takes them."""
        mean, deviation = (np.array(values, np.float32) for values in (self.mean, self.deviation))
        return (pixels.astype(jnp.float32) - mean) / deviation
