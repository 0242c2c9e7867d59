"""Where batches come from: arrays with the draw that reads them, and adapters that turn what a user
has into one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax._core import numbers
from bilevax._core.showing import screenful
from bilevax.base import Bound, Draw, PyTree
from bilevax.data.draws import (
    Batches,
    by_epoch,
    generated,
    partition,
    partition_order,
    same,
    sampled,
)
from bilevax.data.loaders import Stream, refuse_uniterable


class Source(NamedTuple):
    """Arrays and the draw that reads them. `keyed`: the draw needs a PRNG key."""

    draw: Draw
    data: PyTree = None
    keyed: bool = False

    def __repr__(self) -> str:
        return screenful(self)


# ---- what users write


def full(arrays: PyTree) -> Source:
    """The whole of `arrays` as the batch of every step, leading axes unchecked (constants may ride
    along).

    Args:
      arrays: pytree of arrays.

    Returns:
      A `Source`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import data
      >>> data.full({"x": jnp.ones((5, 2)), "prior": jnp.float32(0.1)}).keyed
      False
    """
    numbers.arrays(arrays, "arrays")
    return Source(same, jax.tree.map(jnp.asarray, arrays))


def minibatches(arrays: PyTree, batch_size: int, *, replace: bool = False) -> Source:
    """Batches of `arrays` drawn on the device, inside the compiled loop, as a pure function of
    (key, step).

    Args:
      arrays: pytree of arrays with a common leading axis of length N.
      batch_size: examples a batch, from 1 to N (any number with `replace`).
      replace: draw each batch independently with replacement. By default every epoch is a fresh
        random order, of which the last ``N % batch_size`` are left out.

    Returns:
      A `Source`. The same key gives the same batches, at any step, in any order.

    Raises:
      ValueError: for arrays whose leading axes differ, or a batch size outside 1 to N.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import data
      >>> source = data.minibatches((jnp.ones((10, 3)), jnp.zeros(10)), 4)
      >>> source.keyed
      True
    """
    check_arrays(arrays, "arrays")
    total = jax.tree.leaves(arrays)[0].shape[0]
    if numbers.flag(replace, "replace"):
        draw = Bound("minibatches", sampled, batch_size=numbers.count(batch_size, "batch_size"))
    else:
        draw = Bound("minibatches", by_epoch, batch_size=_batch_size(batch_size, total))
    return Source(draw, jax.tree.map(jnp.asarray, arrays), True)


def _batch_size(value: Any, total: int) -> int:
    return numbers.count(value, "batch_size", most=total, why=", the arrays' leading axis")


def partitioned(arrays: PyTree, batch_size: int, *, replace: bool = False) -> Source:
    """A fixed partition of `arrays` into batches, which come in random order: what finite-sum
    methods (SABA, SRBA, VRBO) need.

    Batch i holds rows ``i * batch_size`` to ``(i + 1) * batch_size``, read as one contiguous slice;
    which batch a draw gives is a pure function of (key, step). The last ``N % batch_size`` rows
    belong to no batch and are left out, so that the mean over batches is the mean over all.

    Args:
      arrays: pytree of arrays with a common leading axis of length N.
      batch_size: rows a batch, from 1 to N.
      replace: choose each batch independently. By default every epoch is a fresh random order of
        the batches.

    Returns:
      A `Source` whose contexts carry the batch's number (``Ctx.index``).

    Raises:
      ValueError: for arrays whose leading axes differ, or a batch size outside 1 to N.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import data
      >>> data.partitioned((jnp.ones((10, 3)), jnp.zeros(10)), 4).data[0].shape
      (8, 3)
    """
    check_arrays(arrays, "arrays")
    size = _batch_size(batch_size, jax.tree.leaves(arrays)[0].shape[0])
    count = jax.tree.leaves(arrays)[0].shape[0] // size
    chosen = dict(num_batches=count, replace=numbers.flag(replace, "replace"))
    order = None if count == 1 else Bound("order", partition_order, **chosen)
    draw = Batches(Bound("partitioned", partition, batch_size=size, **chosen), count, order)
    return Source(draw, jax.tree.map(lambda a: jnp.asarray(a)[: count * size], arrays), True)


def check_arrays(arrays: PyTree, argument: str) -> None:
    """Refuse data that is not a pytree of arrays with one common leading axis."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if not leaves:
        raise ValueError(
            f"{argument}: got {arrays!r}, which holds no array; expected arrays with a common "
            "leading axis, or None."
        )
    lengths = {}
    for path, leaf in leaves:
        place = argument + jax.tree_util.keystr(path)
        if not isinstance(leaf, (np.ndarray, jax.Array)) or getattr(
            leaf, "dtype", None
        ) == np.dtype(object):
            raise TypeError(
                f"{place}: got {type(leaf).__name__} {leaf!r:.60}; expected a numpy or jax array. "
                "Data is a pytree of arrays, a function "
                "(key, step) -> batch, an iterable of batches, or None."
            )
        if leaf.ndim == 0:
            raise ValueError(
                f"{place}: got a scalar; expected an array whose leading axis counts examples. "
                "Wrap data that holds constants in data.full(...)."
            )
        lengths[place] = leaf.shape[0]
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{argument}: got leading axes {lengths}; expected one common leading axis, an entry "
            "an example. Wrap data that holds constants in "
            "data.full(...)."
        )
    if 0 in lengths.values():
        raise ValueError(f"{argument}: got arrays of length 0; expected at least one example.")
    numbers.arrays(arrays, argument)


def as_source(data: Any, argument: str) -> Any:
    """The `Source`, `Stream` or `Episodes` behind whichever form `data` has."""
    if isinstance(data, (Source, Stream)) or getattr(data, "is_source", False):
        return data
    if data is None:
        return Source(same)
    refuse_uniterable(data, argument)
    if callable(data):
        numbers.takes(data, argument, "(key, step) -> batch")
        return Source(Bound("generated", generated, fn=data, argument=argument), None, True)
    container = isinstance(
        data, (dict, list, tuple, np.ndarray, jax.Array)
    ) or not jax.tree_util.all_leaves([data])
    if not container and isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return Stream(data, argument)
    check_arrays(data, argument)
    return Source(same, jax.tree.map(jnp.asarray, data))
