"""Iterables of batches, read on the host."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax._core import numbers
from bilevax.base import PyTree

_NOTHING = object()


class Stream:
    """An iterable of batches, read on the host. One that can be iterated again starts over at its
    end.

    A step takes `take` batches in every `every`-th step and none in between. Batches come as
    pytrees of arrays; one that differs from the first in structure, shape or dtype is refused, and
    so is what is no array, with `argument`'s name and the batch's number. `mark` is what the
    iterator said of its place (``get_state``, as grain's do) before it gave the last batch; None
    where it says nothing.
    """

    def __init__(self, iterable: Iterable[Any], argument: str = "data"):
        self.iterable, self.argument = iterable, argument
        self.one_pass = hasattr(iterable, "__next__")
        self.take = self.every = 1
        self.count = 0  # of the batches handed out
        self.first: Any = None  # the first of them
        self.mark: bytes | None = None
        self._iterator: Any = None
        self._peeked = False

    def peek(self) -> PyTree:
        """The first batch, which stays to be handed out."""
        if self.first is None:
            # a copy: the next one, or another loader, may be read into the same buffer
            first = as_batch(self._read(), self.argument, 1)
            if not jax.tree.leaves(first):
                raise TypeError(
                    f"{self.argument}, batch 1: got {numbers.describe(first)}; expected arrays."
                )
            self.first = jax.tree.map(lambda a: a.copy(), first)
            self._peeked = True
        return self.first

    def next(self) -> PyTree:
        """The next batch; StopIteration when a one-pass iterator is at its end."""
        if self.first is None or self._peeked:
            batch, self._peeked = self.peek(), False
        else:
            batch = as_batch(self._read(), self.argument, self.count + 1)
            _same(batch, self.first, f"{self.argument}, batch {self.count + 1}")
        self.count += 1
        return batch

    def jump(self, mark: bytes, count: int) -> bool:
        """Go to where the iterator said `mark`, after `count` batches, without reading them; False
        where it cannot.
        """
        self.peek()
        if not callable(getattr(self._iterator, "set_state", None)):
            return False
        self._iterator.set_state(mark[1:] if mark[:1] == b"b" else json.loads(mark[1:]))
        self._peeked, self.count = False, count
        return True

    def _read(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.iterable)
        self.mark = _mark(self._iterator)
        batch = next(self._iterator, _NOTHING)
        if batch is _NOTHING and not self.one_pass:
            self._iterator = iter(self.iterable)
            batch = next(self._iterator, _NOTHING)
        if batch is not _NOTHING:
            return batch
        if self.one_pass and self.first is not None:
            raise StopIteration
        raise ValueError(
            f"{self.argument}: got {type(self.iterable).__name__}, which yields no batch; expected "
            "an iterable of batches. (An iterator that was read to its end before yields none: "
            "give what makes it. So does a loader that drops its last batch and has fewer examples "
            "than a batch.)"
        )


def _mark(iterator: Any) -> bytes | None:
    """What an iterator says of its place, as bytes that say what they are; None where it says
    nothing that can be kept.
    """
    say = getattr(iterator, "get_state", None)
    if not (callable(say) and callable(getattr(iterator, "set_state", None))):
        return None
    state = say()
    if isinstance(state, bytes):
        return b"b" + state
    try:
        return b"j" + json.dumps(state).encode()
    except (TypeError, ValueError):
        return None


def as_batch(batch: Any, argument: str, number: int) -> PyTree:
    """A loader's batch as a pytree of arrays: others' tensors become arrays, others' mappings
    dicts.
    """

    def leaf(path, a):
        a = _as_array(a)
        if isinstance(a, (np.ndarray, jax.Array)) and _is_numeric(a.dtype):
            return a
        got = f"a {a.dtype} array" if isinstance(a, np.ndarray) else f"{type(a).__name__} {a!r:.40}"
        raise TypeError(
            f"{argument}, batch {number}{jax.tree_util.keystr(path)}: got {got}; expected arrays "
            "and numbers. "
            "Leave it out of the batches: ({name: batch[name] for name in (...)} for batch in "
            "loader)."
        )

    return jax.tree_util.tree_map_with_path(leaf, _plain(batch))


def _plain(batch: Any) -> Any:
    """Mappings that JAX does not know (a tokenizer's) as dicts."""
    foreign = lambda a: isinstance(a, Mapping) and not isinstance(a, dict)
    leaf = lambda a: _plain({name: a[name] for name in a}) if foreign(a) else a
    return jax.tree.map(leaf, batch, is_leaf=foreign)


def _as_array(a: Any) -> Any:
    if isinstance(a, (np.ndarray, jax.Array)):
        return a
    if isinstance(a, (bool, int, float, complex, np.generic)):
        return np.asarray(a)
    if hasattr(a, "detach"):  # torch: what requires a gradient is not handed over
        a = a.detach()
    if hasattr(a, "__dlpack__"):
        try:
            return np.from_dlpack(a)
        except (
            BufferError,
            RuntimeError,
            TypeError,
        ):  # on a device, or of a dtype that numpy lacks
            return jnp.from_dlpack(a)
    return np.asarray(a) if hasattr(a, "__array__") else a


def _is_numeric(dtype: Any) -> bool:
    return dtype.kind in "biufc" or jnp.issubdtype(dtype, jnp.inexact)


def _same(batch: PyTree, first: PyTree, place: str) -> None:
    """`batch` has the structure, shapes and dtypes of the first one."""
    got, want = jax.tree.structure(batch), jax.tree.structure(first)
    if got != want:
        raise ValueError(
            f"{place}: got the structure {got} where the first batch has {want}; expected one "
            "structure "
            "throughout, since each batch is an argument of one compiled program."
        )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(batch), jax.tree.leaves(first), strict=True
    ):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"{place}{jax.tree_util.keystr(path)}: got {a.dtype}{list(a.shape)} where the "
                "first batch has "
                f"{b.dtype}{list(b.shape)}; expected one shape throughout, since each batch is an "
                "argument of "
                "one compiled program. Try drop_last=True (torch), drop_remainder=True (grain, "
                "tf.data), or pad."
            )


def refuse_uniterable(data: Any, argument: str) -> None:
    """Say of two things that look like a loader, and are none, what they are."""
    import inspect

    if inspect.isgeneratorfunction(data):
        raise TypeError(
            f"{argument}: got the generator function {getattr(data, '__name__', data)!s}, not "
            "called; expected "
            f"an iterable of batches. Try {argument}={getattr(data, '__name__', 'it')}()."
        )
    if not (isinstance(data, list) and len(data) > 1):
        return
    containers = all(isinstance(batch, (dict, list, tuple)) for batch in data)
    if containers and len({jax.tree.structure(batch) for batch in data}) == 1:
        raise TypeError(
            f"{argument}: got a list of {len(data)} containers of one structure, which looks like "
            "batches; "
            f"expected arrays or an iterable. Try {argument}=itertools.cycle(batches) to read them "
            "one by one, "
            "or a tuple if all of it is one batch."
        )
