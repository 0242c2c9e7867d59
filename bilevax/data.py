"""Where batches come from: pure draws keyed by (key, step), and adapters that turn what a user has into one.

Four forms are taken wherever data is asked for:

- a pytree of arrays with a common leading axis: the whole of it is the batch of every step (`full`); with `minibatches`, a batch of it is
  drawn on the device, inside the compiled loop;
- a pure function ``(key, step) -> batch``;
- an iterable of batches (a ``grain`` or any other loader), read on the host a chunk of steps ahead;
- None: the objective gets ``batch=None``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.base import Bound, Ctx, Draw, Feed, PyTree


class Source(NamedTuple):
    """Arrays and the draw that reads them. `keyed`: the draw needs a PRNG key."""

    draw: Draw
    data: PyTree = None
    keyed: bool = False


class Stream:
    """An iterable of batches, read on the host. One that can be iterated again starts over at its end."""

    def __init__(self, iterable: Iterable):
        self.iterable, self.iterator = iterable, iter(iterable)

    def next(self) -> PyTree:
        """The next batch; StopIteration when a one-pass iterator is at its end."""
        try:
            return next(self.iterator)
        except StopIteration:
            if self.iterator is self.iterable:
                raise
            self.iterator = iter(self.iterable)
            return next(self.iterator)


# ---- draws: (feed, i) -> Ctx


def draw_number(feed: Feed, i) -> jax.Array:
    """The number of the i-th draw from here, counted from the run's start: what draws are keyed by."""
    return jnp.asarray(feed.step, jnp.int32) + jnp.asarray(i, jnp.int32)


def _key(feed: Feed, i) -> Any:
    return None if feed.key is None else jax.random.fold_in(feed.key, draw_number(feed, i))


def same(feed: Feed, i) -> Ctx:
    """Draw: the whole of the feed's data, every time.

    Args:
      feed: the stream.
      i: the draw's number from here.

    Returns:
      A `Ctx` with the batch, and a key of its own where the stream has one.

    Example:
      >>> from bilevax import base, data
      >>> data.same(base.Feed([1.0, 2.0]), 5).batch
      [1.0, 2.0]
    """
    return Ctx(feed.data, _key(feed, i))


def stacked(feed: Feed, i) -> Ctx:
    """Draw: the data's leading axis counts draws, and entry ``feed.step + i`` is the batch.

    Args:
      feed: the stream.
      i: the draw's number from here.

    Returns:
      A `Ctx` with the batch, and a key of its own where the stream has one.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevax import base, data
      >>> data.stacked(base.Feed(jnp.array([10.0, 20.0, 30.0])), 2).batch.item()
      30.0
    """
    return Ctx(jax.tree.map(lambda a: a[draw_number(feed, i)], feed.data), _key(feed, i))


def windowed(feed: Feed, i) -> Ctx:
    """Draw: as `stacked`, from a window ``(start, batches)`` of a longer stream."""
    start, batches = feed.data
    return Ctx(jax.tree.map(lambda a: a[draw_number(feed, i) - start], batches), _key(feed, i))


def _sampled(feed: Feed, i, *, batch_size: int) -> Ctx:
    key = _key(feed, i)
    total = jax.tree.leaves(feed.data)[0].shape[0]
    index = jax.random.randint(key, (batch_size,), 0, total)
    return Ctx(jax.tree.map(lambda a: a[index], feed.data), jax.random.fold_in(key, 1))


def _by_epoch(feed: Feed, i, *, batch_size: int) -> Ctx:
    total = jax.tree.leaves(feed.data)[0].shape[0]
    per_epoch = total // batch_size
    step = draw_number(feed, i).astype(jnp.uint32)
    epoch, position = step // jnp.uint32(per_epoch), step % jnp.uint32(per_epoch)
    places = position * jnp.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32)
    index = permuted(jax.random.fold_in(feed.key, epoch), places, total).astype(jnp.int32)
    return Ctx(jax.tree.map(lambda a: a[index], feed.data), jax.random.fold_in(_key(feed, i), 1))


def _chosen(feed: Feed, i, num_batches: int, replace: bool) -> jax.Array:
    """The number of the batch that the i-th draw from here takes."""
    number = draw_number(feed, i)
    if num_batches == 1:
        return jnp.zeros((), jnp.int32)
    if replace:
        return jax.random.randint(_key(feed, i), (), 0, num_batches, jnp.int32)
    position = (number % num_batches).astype(jnp.uint32)
    return permuted(jax.random.fold_in(feed.key, number // num_batches), position, num_batches).astype(jnp.int32)


def ordered(draw: Draw, feed: Feed, count: int) -> jax.Array | None:
    """What the next `count` draws of `feed` find out, where `draw` makes use of it: one vectorised pass in place of a cipher in each step."""
    if not (isinstance(draw, Bound) and draw.fn is _partition) or draw.settings["num_batches"] == 1:
        return None
    total, first = draw.settings["num_batches"], draw_number(feed, 0)
    places = jnp.arange(count, dtype=jnp.int32)
    if draw.settings["replace"]:
        return jax.vmap(lambda i: _chosen(feed, i, total, True))(places)
    epochs = first // total + jnp.arange(count // total + 2, dtype=jnp.int32)
    keys = jax.vmap(lambda epoch: _round_keys(jax.random.fold_in(feed.key, epoch)))(epochs)
    numbers = first + places
    order = jax.vmap(lambda keys, place: _walk(keys, place, total))(keys[numbers // total - epochs[0]], (numbers % total).astype(jnp.uint32))
    return order.astype(jnp.int32)


def _partition(feed: Feed, i, *, batch_size: int, num_batches: int, replace: bool) -> Ctx:
    index = _chosen(feed, i, num_batches, replace) if feed.order is None else feed.order[i]
    batch = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index * batch_size, batch_size), feed.data)
    return Ctx(batch, jax.random.fold_in(_key(feed, i), 1), index=index)


def num_batches(draw: Draw, algorithm: str) -> int:
    """How many batches this draw chooses from: those of a `partitioned` source, or 1 where every draw is the whole.

    Raises:
      ValueError: for any other draw, naming `algorithm`, which needs batches that come again.
    """
    if draw is same:
        return 1
    if isinstance(draw, Bound) and draw.fn is _partition:
        return draw.settings["num_batches"]
    raise ValueError(
        f"algorithm: got {algorithm}, which returns to the same batches again and again, with data drawn by {draw!r}; "
        "expected a fixed number of batches. Try data.partitioned(arrays, batch_size), or full-batch data."
    )


def whole(draw: Draw, algorithm: str) -> Draw:
    """The draw of all of the data that `draw` takes batches of; refuses what `num_batches` refuses."""
    num_batches(draw, algorithm)
    return same


def _generated(feed: Feed, i, *, fn: Callable) -> Ctx:
    key = _key(feed, i)
    return Ctx(fn(jax.random.fold_in(key, 0), draw_number(feed, i)), jax.random.fold_in(key, 1))


def permuted(key: jax.Array, places: jax.Array, total: int) -> jax.Array:
    """Images of `places` (uint32, below `total`) under a pseudo-random permutation of ``range(total)`` chosen by `key`.

    A six-round Feistel network on as many bits as `total` needs, walked along its cycle until it lands below `total`. It reaches any
    place of an epoch's order without building the order, so a run resumes at any step exactly and a draw costs O(batch), not
    O(total log total).

    Args:
      key: PRNG key.
      places: uint32 array.
      total: number of entries, at least 1.

    Returns:
      uint32 array of the same shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> order = permuted(jax.random.key(0), jnp.arange(10, dtype=jnp.uint32), 10)
      >>> sorted(order.tolist()) == list(range(10))
      True

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), section 4, cycle walking.
    """
    return _walk(_round_keys(key), places, total)


def _round_keys(key: jax.Array) -> jax.Array:
    return jax.random.bits(key, (6,), jnp.uint32)


def _walk(keys: jax.Array, places: jax.Array, total: int) -> jax.Array:
    bits = (total - 1).bit_length()
    widths = bits // 2, bits - bits // 2  # of the two halves, which change places in each round

    def mix(value):  # a 32-bit finaliser: every input bit reaches every output bit
        value = (value ^ (value >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
        value = (value ^ (value >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
        return value ^ (value >> jnp.uint32(16))

    def network(place):
        left, right = place >> jnp.uint32(widths[1]), place & jnp.uint32(2 ** widths[1] - 1)
        for k in range(6):
            left, right = right, left ^ (mix(right ^ keys[k]) & jnp.uint32(2 ** widths[k % 2] - 1))
        return (left << jnp.uint32(widths[1])) | right

    limit = jnp.uint32(total)
    return jax.lax.while_loop(lambda p: jnp.any(p >= limit), lambda p: jnp.where(p >= limit, network(p), p), network(places))


# ---- what users write


def full(arrays: PyTree) -> Source:
    """The whole of `arrays` as the batch of every step, leading axes unchecked (constants may ride along).

    Args:
      arrays: pytree of arrays.

    Returns:
      A `Source`.

    Example:
      >>> import jax.numpy as jnp
      >>> full({"x": jnp.ones((5, 2)), "prior": jnp.float32(0.1)}).keyed
      False
    """
    return Source(same, jax.tree.map(jnp.asarray, arrays))


def minibatches(arrays: PyTree, batch_size: int, *, replace: bool = False) -> Source:
    """Batches of `arrays` drawn on the device, inside the compiled loop, as a pure function of (key, step).

    Args:
      arrays: pytree of arrays with a common leading axis of length N.
      batch_size: examples a batch, from 1 to N (any number with `replace`).
      replace: draw each batch independently with replacement. By default every epoch is a fresh random order, of which the last
        ``N % batch_size`` are left out.

    Returns:
      A `Source`: the same key gives the same batches, at any step, in any order.

    Raises:
      ValueError: for arrays whose leading axes differ, or a batch size outside 1 to N.

    Example:
      >>> import jax.numpy as jnp
      >>> source = minibatches((jnp.ones((10, 3)), jnp.zeros(10)), 4)
      >>> source.keyed
      True
    """
    check_arrays(arrays, "arrays")
    total = jax.tree.leaves(arrays)[0].shape[0]
    most = None if replace else total
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1 or (most and batch_size > most):
        limit = "of at least 1" if replace else f"from 1 to {total}, the arrays' leading axis"
        raise ValueError(f"batch_size: got {batch_size!r}; expected an integer {limit}.")
    draw = _sampled if replace else _by_epoch
    name = "minibatches"
    return Source(Bound(name, draw, batch_size=int(batch_size)), jax.tree.map(jnp.asarray, arrays), True)


def _batch_size(value, total: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= total:
        raise ValueError(f"batch_size: got {value!r}; expected an integer from 1 to {total}, the arrays' leading axis.")
    return int(value)


def partitioned(arrays: PyTree, batch_size: int, *, replace: bool = False) -> Source:
    """A fixed partition of `arrays` into batches, which come in random order: what finite-sum methods (SABA, SRBA, VRBO) need.

    Batch i holds rows ``i * batch_size`` to ``(i + 1) * batch_size``, read as one contiguous slice; which batch a draw gives is a pure function
    of (key, step). The last ``N % batch_size`` rows belong to no batch and are left out, so that the mean over batches is the mean over all.

    Args:
      arrays: pytree of arrays with a common leading axis of length N.
      batch_size: rows a batch, from 1 to N.
      replace: choose each batch independently. By default every epoch is a fresh random order of the batches.

    Returns:
      A `Source` whose contexts carry the batch's number (``Ctx.index``).

    Raises:
      ValueError: for arrays whose leading axes differ, or a batch size outside 1 to N.

    Example:
      >>> import jax.numpy as jnp
      >>> partitioned((jnp.ones((10, 3)), jnp.zeros(10)), 4).data[0].shape
      (8, 3)
    """
    check_arrays(arrays, "arrays")
    size = _batch_size(batch_size, jax.tree.leaves(arrays)[0].shape[0])
    count = jax.tree.leaves(arrays)[0].shape[0] // size
    draw = Bound("partitioned", _partition, batch_size=size, num_batches=count, replace=bool(replace))
    return Source(draw, jax.tree.map(lambda a: jnp.asarray(a)[: count * size], arrays), True)


def check_arrays(arrays: PyTree, argument: str) -> None:
    """Refuse data that is not a pytree of arrays with one common leading axis."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if not leaves:
        raise ValueError(f"{argument}: got {arrays!r}, which holds no array; expected arrays with a common leading axis, or None.")
    lengths = {}
    for path, leaf in leaves:
        place = argument + jax.tree_util.keystr(path)
        if not isinstance(leaf, (np.ndarray, jax.Array)) or getattr(leaf, "dtype", None) == np.dtype(object):
            raise TypeError(
                f"{place}: got {type(leaf).__name__} {leaf!r:.60}; expected a numpy or jax array. Data is a pytree of arrays, a function "
                "(key, step) -> batch, an iterable of batches, or None."
            )
        if leaf.ndim == 0:
            raise ValueError(
                f"{place}: got a scalar; expected an array whose leading axis counts examples. Wrap data that holds constants in data.full(...)."
            )
        lengths[place] = leaf.shape[0]
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{argument}: got leading axes {lengths}; expected one common leading axis, an entry an example. Wrap data that holds constants in "
            "data.full(...)."
        )
    if 0 in lengths.values():
        raise ValueError(f"{argument}: got arrays of length 0; expected at least one example.")


def as_source(data: Any, argument: str) -> Source | Stream:
    """The draw behind whichever of the four forms `data` has."""
    if isinstance(data, (Source, Stream)):
        return data
    if data is None:
        return Source(same)
    if callable(data):
        return Source(Bound("generated", _generated, fn=data), None, True)
    container = isinstance(data, (dict, list, tuple, np.ndarray, jax.Array)) or not jax.tree_util.all_leaves([data])
    if not container and isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return Stream(data)
    check_arrays(data, argument)
    return Source(same, jax.tree.map(jnp.asarray, data))


__all__ = ["full", "minibatches", "partitioned", "same", "stacked"]
