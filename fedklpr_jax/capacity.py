"""Devices of unequal capacity: how wide a network each class of them trains, and a client's variables cut to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedklpr_jax import channels
from fedklpr_jax.models.spec import ModelSpec
from fedklpr_jax.trees import PyTree


def group_widths(groups: Sequence[channels.Group], share: float, least: int) -> tuple[int, ...]:
    """How many channels of each group a device keeps: those of `ModelSpec.scaled(share, least)`."""
    widths = tuple(group.width // group.multiple for group in groups)
    # A chain of layers this wide, so that one place alone says how widths are rounded.
    scaled = ModelSpec("widths", widths, (len(widths),), family="vgg", neck="none").scaled(share, least).widths
    return tuple(group.multiple * width for group, width in zip(groups, scaled, strict=True))


@dataclasses.dataclass(frozen=True)
class DeviceClasses:
    """Devices of unequal capacity: client k is of class k modulo the number of classes.

    Attributes:
      shares: of the channels of each layer that a class keeps, in (0, 1].
      least: channels that a layer keeps at least.

    >>> DeviceClasses.parse("1.0, 0.5", 8).shares
    (1.0, 0.5)
    """

    shares: tuple[float, ...]
    least: int

    @classmethod
    def parse(cls, shares: str, least: int) -> DeviceClasses:
        """From a setting such as `1.0,0.8,0.6,0.4`."""
        return cls(tuple(float(share) for share in shares.split(",")), least)

    def share_of(self, client: int) -> float:
        """The share of the channels that a client trains.

        >>> DeviceClasses.parse("1.0, 0.5", 8).share_of(3)
        0.5
        """
        return self.shares[client % len(self.shares)]

    def specs(self, spec: ModelSpec) -> tuple[ModelSpec, ...]:
        """The network that each class trains."""
        return tuple(spec.scaled(share, self.least) for share in self.shares)

    def counts(self, groups: Sequence[channels.Group]) -> np.ndarray:
        """Channels that each class keeps of each group, int32 [classes, groups]."""
        return np.array([group_widths(groups, share, self.least) for share in self.shares], np.int32)

    def first_channels(self, groups: Sequence[channels.Group], client: Any) -> tuple[jax.Array, ...]:
        """The channels a client keeps before anything is known of them: the first ones, bool [width] a group."""
        return self.best_channels([-jnp.arange(group.width, dtype=jnp.float32) for group in groups], groups, client)

    def best_channels(
        self, scores: Sequence[jax.Array], groups: Sequence[channels.Group], client: Any
    ) -> tuple[jax.Array, ...]:
        """As many channels of highest score as the client's class keeps, bool [width] a group; `client` int32."""
        counts = jnp.asarray(self.counts(groups))[client % len(self.shares)]
        return channels.top_channels(scores, [counts[number] for number in range(len(groups))])

    def first_mask(self, model: PyTree, client: Any) -> PyTree:
        """The structured mask of `first_channels`."""
        groups = channels.channel_groups(model)
        return channels.structured_mask(model, groups, self.first_channels(groups, client))

    def cut(self, tree: PyTree, mask: PyTree, device: int) -> PyTree:
        """`tree`, any part of a task's variables, cut to what the mask of a client of class `device` keeps."""
        groups = channels.channel_groups(mask)
        keep = channels.keep_sets(channels.kept_channels(mask, groups), self.counts(groups)[device].tolist())
        return channels.cut(tree, groups, keep)

    def restore(self, small: PyTree, mask: PyTree, into: PyTree) -> PyTree:
        """The inverse of `cut`; what the mask leaves out comes from `into`."""
        groups = channels.channel_groups(mask)
        return channels.restore(small, groups, channels.kept_channels(mask, groups), into)
