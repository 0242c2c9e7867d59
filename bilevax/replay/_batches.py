"""Batches that can be read again at any step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import check
from bilevax.base import PyTree
from bilevax.data.draws import same
from bilevax.data.loaders import Stream
from bilevax.data.sources import Source, as_source


class Reader(NamedTuple):
    """Batches that the host reads, by step; made by `reader`."""

    fn: Callable[[int], PyTree]


def reader(fn: Callable[[int], PyTree]) -> Reader:
    """Batches that the host reads by their step: the same step, the same batch.

    `fn` is called from a thread, one step ahead of where the replay is, on the way there and on the
    way back.

    Args:
      fn: function of the step's number, from 0, to a pytree of numpy arrays of the same shapes
        each time.

    Returns:
      A value for `inner_data`.

    Raises:
      TypeError: if `fn` is not callable.

    Examples:
      >>> import numpy as np, bilevax as bx
      >>> tokens = np.arange(1000).reshape(100, 10)
      >>> order = np.random.default_rng(0).integers(0, 100, size=(50, 8))  # 50 steps of 8 rows
      >>> batches = bx.replay.reader(
      ...     lambda step: {"tokens": tokens[order[step]], "index": order[step]}
      ... )
      >>> batches.fn(3)["tokens"].shape
      (8, 10)
    """
    if not callable(fn):
        raise TypeError(
            f"fn: got {check.describe(fn)}; expected a function from a step's number to its batch."
        )
    return Reader(fn)


def resolve(data: Any) -> Source | Reader:
    """Whatever the user gave, as something that can be read again at any step."""
    if isinstance(data, Reader):
        return data
    found = as_source(data, "inner_data")
    if isinstance(found, Stream):
        raise TypeError(
            f"inner_data: got {check.describe(data)}, an iterable, whose batches come once and in "
            "one order; a replay reads them again "
            "on its way back. Try replay.reader(lambda step: ...), data.minibatches(arrays, "
            "batch_size), or a pure function (key, step) -> batch."
        )
    return found


class Batches:
    """The data of each step as compiled code is given it; what the host reads is read ahead."""

    def __init__(self, source: Source | Reader, num_steps: int, put: Callable[[PyTree], PyTree]):
        self.source, self.num_steps, self.put = source, num_steps, put
        self._ahead: dict[int, Future[Any]] = {}
        self._pool = (
            ThreadPoolExecutor(1, thread_name_prefix="replay-batches")
            if isinstance(source, Reader)
            else None
        )
        self._whole = None if isinstance(source, Reader) else source.data

    @property
    def draw(self) -> Any:
        """The draw by which compiled code reads what `at` gives."""
        return same if isinstance(self.source, Reader) else self.source.draw

    def at(self, step: int, then: int) -> PyTree:
        """The data of `step`; that of the step `then` is read meanwhile."""
        if self._pool is None:
            return self._whole
        found = self._ahead.pop(step, None) or self._pool.submit(self._read, step)
        self._ahead = {k: v for k, v in self._ahead.items() if k == then}
        if then not in self._ahead and 0 <= then < self.num_steps:
            self._ahead[then] = self._pool.submit(self._read, then)
        return found.result()

    def _read(self, step: int) -> PyTree:
        # only a Reader is read step by step; a Source is here as a whole. A copy, since a reader
        # may use one buffer for all steps
        return self.put(jax.tree.map(jnp.array, self.source.fn(step)))  # type: ignore[union-attr]

    def close(self) -> None:
        """End the reading thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
