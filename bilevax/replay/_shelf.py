"""Where states wait for the way back: the host's memory, or a folder."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.base import PyTree
from bilevax.replay import _files

_IN_FLIGHT = 2  # copies to the host that may be under way while training goes on
_HOST = "pinned_host"  # memory of the host that devices reach by themselves
_LIMIT, _DEFAULT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64  # XLA's pool of it, for a process


class Host:
    """States in the host's memory, by step; copies overlap with the steps that follow.

    An accelerator copies to and from memory that the system cannot page several times faster than
    through NumPy (one H200: 49 against 2 GB/s on the way there), and without the host waiting.
    """

    def __init__(self):
        self._held: dict[int, PyTree] = {}
        self._sizes: dict[int, int] = {}
        self._moving: deque[int] = deque()
        self.bytes, self.most_bytes, self.most = 0, 0, 0

    def __contains__(self, step: int) -> bool:
        return step in self._held

    def steps(self) -> list[int]:
        """What is here."""
        return list(self._held)

    def expect(self, held: int, value: PyTree) -> None:
        """Refuse so many values like this one before anything is done, where XLA's pool is smaller:
        training would go on for hours until it is full.
        """
        leaves = [leaf for leaf in jax.tree.leaves(value) if not _on_host(leaf)]
        need = held * sum(_local_bytes(leaf) for leaf in leaves)
        limit = float(os.environ.get(_LIMIT) or _DEFAULT)
        if any(map(_pooled, leaves)) and need > limit * 2**30:
            raise ValueError(
                f"schedule: got one that keeps {held} states, {need / 2**30:.1f} GiB, in the "
                f"host's memory; expected at most {limit:g} GiB, which is what XLA pins for a GPU. "
                f"Try {_LIMIT}={int(1.2 * need / 2**30) + 1} (set before JAX is imported) where "
                "the host has them, states=folder, or schedule=replay.tree(slots)."
            )

    def put(self, step: int, value: PyTree) -> None:
        """Keep `value`, whose buffers must not be donated from now on."""
        self._held[step] = jax.tree.map(_forth, value)
        self._sizes[step] = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(value))
        self.bytes += self._sizes[step]
        self.most_bytes = max(self.most_bytes, self.bytes)
        self.most = max(self.most, len(self._held))
        self._moving.append(step)
        while len(self._moving) > _IN_FLIGHT:  # the devices hold what has not arrived yet
            jax.block_until_ready(self._held.get(self._moving.popleft()))

    def take(self, step: int) -> tuple[PyTree, bool]:
        """The value of this step on its devices, and whether the caller may donate it."""
        value = self._held[step]
        own = all(_away(leaf) for leaf in jax.tree.leaves(value))
        return jax.tree.map(lambda leaf: _back(leaf) if _away(leaf) else leaf, value), own

    def drop(self, step: int) -> None:
        """Forget the value of this step."""
        del self._held[step]
        self.bytes -= self._sizes.pop(step)

    def close(self) -> None:
        """Forget all."""
        self._held.clear()


def bound(value: PyTree) -> PyTree:
    """Arrays bound to the devices that they lie on, where states leave those.

    What comes back is bound to its device, and a program is compiled anew for arrays that are where
    those before were not: so all are from the start.
    """
    return jax.tree.map(
        lambda leaf: leaf if _on_host(leaf) else jax.device_put(leaf, leaf.sharding), value
    )


def _on_host(leaf: Any) -> bool:
    """Whether the device's memory is the host's, so that there is nothing to copy."""
    return all(device.platform == "cpu" for device in leaf.sharding.device_set)


def _pooled(leaf: Any) -> bool:
    return any(device.platform in ("gpu", "cuda", "rocm") for device in leaf.sharding.device_set)


def _away(leaf: Any) -> bool:
    return leaf.sharding.memory_kind == _HOST


def _forth(leaf: Any) -> Any:
    if _on_host(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(_HOST))


def _back(leaf: Any) -> Any:
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))


def _local_bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf.size * 8
    return (
        sum(
            int(np.prod(part.data.shape))
            for part in leaf.addressable_shards
            if part.replica_id == 0 or not leaf.is_fully_addressable
        )
        * leaf.dtype.itemsize
    )


class Folder:
    """States in files, by step: for trainings whose states outgrow the host's memory. Written while
    training goes on.
    """

    def __init__(self, folder: str):
        self.folder = folder
        _files.make(folder)
        _files.remove(list(_files.names(folder, "state").values()))  # of a process that was killed
        self._writing: dict[int, Future[Any]] = {}
        self._like: dict[int, PyTree] = {}
        self._ahead: dict[int, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="replay-states")
        self._sizes: dict[int, int] = {}
        self.bytes, self.most_bytes, self.most = 0, 0, 0

    def __contains__(self, step: int) -> bool:
        return step in self._like

    def steps(self) -> list[int]:
        """What is here."""
        return list(self._like)

    def expect(self, held: int, value: PyTree) -> None:
        """A disk says by itself when it is full."""

    def put(self, step: int, value: PyTree) -> None:
        """Keep `value`, whose buffers must not be donated from now on."""
        while len(self._writing) >= _IN_FLIGHT:
            first = next(iter(self._writing))
            self._writing.pop(first).result()
        for leaf in jax.tree.leaves(value):
            leaf.copy_to_host_async()
        where = _files.path(self.folder, "state", step)
        self._writing[step] = self._pool.submit(_files.write, where, value)
        self._like[step] = _files.forms(value)
        self._sizes[step] = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(value))
        self.bytes += self._sizes[step]
        self.most_bytes = max(self.most_bytes, self.bytes)
        self.most = max(self.most, len(self._like))

    def take(self, step: int) -> tuple[PyTree, bool]:
        """The value of this step on its devices; the one before it is read meanwhile."""
        found = (self._ahead.pop(step, None) or self._pool.submit(self._read, step)).result()
        self._ahead = {}
        if step - 1 in self._like:
            self._ahead[step - 1] = self._pool.submit(self._read, step - 1)
        return found, True

    def _read(self, step: int) -> PyTree:
        return _files.read(_files.path(self.folder, "state", step), self._like[step])[0]

    def drop(self, step: int) -> None:
        """Forget the value of this step."""
        if step in self._writing:
            self._writing.pop(step).result()
        del self._like[step]
        self.bytes -= self._sizes.pop(step)
        _files.remove([_files.path(self.folder, "state", step)])

    def close(self) -> None:
        """Wait for the writer, and leave nothing behind."""
        self._pool.shutdown(cancel_futures=True)
        _files.remove([_files.path(self.folder, "state", step) for step in self._like])
