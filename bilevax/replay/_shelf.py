"""Where states wait for the way back: the host's memory."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevax.base import PyTree

_IN_FLIGHT = 2  # copies to the host that may be under way while training goes on


class Place(NamedTuple):
    """A leaf on the host: its parts as they lay on this process's devices, and how they lay."""

    parts: Any
    sharding: Any
    shape: tuple[int, ...]


class Host:
    """States in the host's memory, by step; copies overlap with the steps that follow."""

    def __init__(self):
        self._held: dict[int, PyTree] = {}
        self._sizes: dict[int, int] = {}
        self._moving: deque[int] = deque()
        self.bytes, self.most_bytes, self.most = 0, 0, 0

    def __contains__(self, step: int) -> bool:
        return step in self._held

    def put(self, step: int, value: PyTree) -> None:
        """Keep `value`, whose buffers must not be donated from now on."""
        for leaf in jax.tree.leaves(value):
            if not _on_host(leaf):
                leaf.copy_to_host_async()
        self._held[step] = value
        self._sizes[step] = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(value))
        self.bytes += self._sizes[step]
        self.most_bytes = max(self.most_bytes, self.bytes)
        self.most = max(self.most, len(self._held))
        self._moving.append(step)
        while len(self._moving) > _IN_FLIGHT:
            self._settle(self._moving.popleft())

    def take(self, step: int) -> tuple[PyTree, bool]:
        """The value of this step on its devices, and whether the caller may donate it."""
        value = self._held[step]
        is_place = lambda a: isinstance(a, Place)
        own = all(is_place(leaf) for leaf in jax.tree.leaves(value, is_leaf=is_place))
        return jax.tree.map(lambda a: _back(a) if is_place(a) else a, value, is_leaf=is_place), own

    def drop(self, step: int) -> None:
        """Forget the value of this step."""
        del self._held[step]
        self.bytes -= self._sizes.pop(step)

    def _settle(self, step: int) -> None:
        """Wait for a copy that is under way, and let go of what lies on the devices."""
        if step in self._held:
            self._held[step] = jax.tree.map(_forth, self._held[step])


def _on_host(leaf) -> bool:
    """Whether the device's memory is the host's, so that there is nothing to copy."""
    return all(device.platform == "cpu" for device in leaf.sharding.device_set)


def _local_bytes(leaf) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf.size * 8
    return (
        sum(int(np.prod(part.data.shape)) for part in leaf.addressable_shards if part.replica_id == 0 or not leaf.is_fully_addressable)
        * leaf.dtype.itemsize
    )


def _forth(leaf):
    if _on_host(leaf) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if leaf.is_fully_addressable:
        return Place(np.asarray(leaf), leaf.sharding, leaf.shape)
    return Place(
        {part.device: np.asarray(part.data) for part in leaf.addressable_shards},
        leaf.sharding,
        leaf.shape,
    )


def _back(place: Place):
    if isinstance(place.parts, dict):
        parts = [jax.device_put(part, device) for device, part in place.parts.items()]
        return jax.make_array_from_single_device_arrays(place.shape, place.sharding, parts)
    return jax.device_put(place.parts, place.sharding)
