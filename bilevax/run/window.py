"""The host's side of the data: batches of iterables for the steps of a chunk, and what an objective will be given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.base import Ctx, Feed, PyTree, join, split
from bilevax.data.draws import windowed
from bilevax.data.loaders import Stream, peek
from bilevax.data.sources import Source


class Window:
    """Batches of host streams for the steps of the next chunk, stacked and padded to one shape.

    `put` places a stacked window on the devices; None leaves it to JAX.
    """

    def __init__(self, sources: tuple[Source | Stream, ...], draws: Sequence[int], capacity: int, put: Callable[[PyTree], PyTree] | None = None):
        self.sources, self.draws, self.capacity, self.put, self.exhausted = sources, draws, capacity, put, False
        self.streaming = any(isinstance(s, Stream) for s in sources)
        self._last: list = []
        self._back: list = []

    def _pull(self) -> list[list] | None:
        """The batches of one step, a list a source, or None at the end of an iterator."""
        if self._back:
            return self._back.pop(0)
        try:
            return [[s.next() for _ in range(k)] if isinstance(s, Stream) else [] for s, k in zip(self.sources, self.draws, strict=True)]
        except StopIteration:
            self.exhausted = True
            return None

    def skip(self, steps: int) -> None:
        """Pass over the batches of `steps` steps that an earlier process has done."""
        for _ in range(steps if self.streaming else 0):
            if self._pull() is None:
                break

    def put_back(self, steps: int) -> None:
        """Hand out again the batches of the last `steps` steps that were read."""
        self._back = (self._last[-steps:] if steps else []) + self._back

    def read(self, start: int, n: int) -> tuple[tuple, int]:
        """The data of steps `start` to `start + n`, and how many of those steps there are batches for."""
        pulled: list[list] = [[] for _ in self.sources]
        self._last = []
        steps = 0 if self.streaming else n
        while self.streaming and steps < n:  # step by step, so that which batch a step gets does not depend on the chunks
            batches = self._pull()
            if batches is None:
                break
            self._last.append(batches)
            for column, new in zip(pulled, batches, strict=True):
                column.extend(new)
            steps += 1
        data = []
        for source, draws, column in zip(self.sources, self.draws, pulled, strict=True):
            if isinstance(source, Source):
                data.append(source.data)
            elif column:
                padded = column + [column[-1]] * (self.capacity * draws - len(column))
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
                placed = jax.tree.map(jnp.asarray, stacked) if self.put is None else self.put(stacked)
                data.append((jnp.asarray(start * draws, jnp.int32), placed))
            else:
                data.append(None)
        return tuple(data), steps


def source_draw(source: Source | Stream) -> Any:
    """The draw by which compiled code reads a source."""
    return windowed if isinstance(source, Stream) else source.draw


def first_context(source: Source | Stream, key) -> Ctx:
    """Shapes of what an objective will be given."""
    if isinstance(source, Stream):
        batch = peek(source)
        return jax.eval_shape(lambda key: windowed(Feed((0, jax.tree.map(lambda a: jnp.asarray(a)[None], batch)), key, 0), 0), key)
    static, dynamic = split(source.draw)
    return _first_draw.eval_shape(static, dynamic, source.data, key)


@functools.partial(jax.jit, static_argnums=0)  # for its cache: a second run on the same data traces nothing
def _first_draw(static, dynamic, data, key) -> Ctx:
    zero = jnp.zeros((), jnp.int32)
    known = zero[None]  # an order, whose finding out would be most of what is traced here
    return join(static, dynamic)(Feed(data, key, zero, known), 0)
