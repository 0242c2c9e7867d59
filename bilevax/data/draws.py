"""Draws, ``(feed, i) -> Ctx``: how compiled code finds the batch of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax._core import numbers
from bilevax.base import Bound, Ctx, Draw, Feed, Objective, Problem
from bilevax.data.permutation import permuted, round_keys, walk
from bilevax.functions import told


def draw_number(feed: Feed, i: Any) -> jax.Array:
    """The number of the i-th draw from here, counted from the run's start: what draws are keyed
    by.
    """
    return jnp.asarray(feed.step, jnp.int32) + jnp.asarray(i, jnp.int32)


def draw_key(feed: Feed, i: Any) -> Any:
    """The key of the i-th draw from here; None where the stream has none."""
    return None if feed.key is None else jax.random.fold_in(feed.key, draw_number(feed, i))


def same(feed: Feed, i: Any) -> Ctx:
    """Draw: the whole of the feed's data, every time.

    Args:
      feed: the stream.
      i: the draw's number from here.

    Returns:
      A `Ctx` with the batch, and a key of its own where the stream has one.

    Examples:
      >>> from bilevax import base, data
      >>> data.same(base.Feed([1.0, 2.0]), 5).batch
      [1.0, 2.0]
    """
    return Ctx(feed.data, draw_key(feed, i))


def stacked(feed: Feed, i: Any) -> Ctx:
    """Draw: the data's leading axis counts draws, and entry ``feed.step + i`` is the batch.

    Args:
      feed: the stream.
      i: the draw's number from here.

    Returns:
      A `Ctx` with the batch, and a key of its own where the stream has one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import base, data
      >>> data.stacked(base.Feed(jnp.array([10.0, 20.0, 30.0])), 2).batch.item()
      30.0
    """
    return Ctx(jax.tree.map(lambda a: a[draw_number(feed, i)], feed.data), draw_key(feed, i))


def check_stacked(draw: Draw, batches: Any, steps: int) -> None:
    """Enough entries for `steps` draws, where they are drawn by `stacked`: JAX would repeat the
    last one.
    """
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(batches)}
    if draw is stacked and lengths and min(lengths) < steps:
        raise ValueError(
            f"inner_batch: got {min(lengths)} stacked batches for {steps} inner steps; expected at "
            f"least {steps}, "
            "an entry of the leading axis a step. Try fewer steps, or data.same to give each step "
            "the whole."
        )


def windowed(feed: Feed, i: Any) -> Ctx:
    """Draw: as `stacked`, from a window ``(start, batches)`` of a longer stream."""
    return _in_window(feed, i, draw_number(feed, i))


def last_windowed(feed: Feed, i: Any, *, take: int) -> Ctx:
    """Draw: the last of the `take` batches that another stream takes from the window in each
    step.
    """
    return _in_window(feed, i, (draw_number(feed, i) + 1) * take - 1)


def level_windowed(feed: Feed, i: Any, *, take: int, every: int) -> Ctx:
    """Draw: of `take` batches in every `every`-th step; the draw after them and those of other
    steps are the last again.
    """
    step, place = draw_number(feed, i) // (take + 1), draw_number(feed, i) % (take + 1)
    return _in_window(feed, i, (step // every) * take + jnp.minimum(place, take - 1))


def _in_window(feed: Feed, i: Any, number: Any) -> Ctx:
    start, batches = feed.data
    return Ctx(jax.tree.map(lambda a: a[number - start], batches), draw_key(feed, i))


def counted(feed: Feed, i: Any, *, draw: Draw, last: int | None = None) -> Ctx:
    """Draw: `draw`'s, with the number of the inner step; `last`: that one, whichever the draw."""
    return draw(feed, i)._replace(inner_step=jnp.asarray(i if last is None else last, jnp.int32))


def count_steps(problem: Problem, steps: int) -> Problem:
    """`problem` whose draws number the inner steps, where its inner objective asks for that."""
    if not problem.inner.indexed:
        return problem
    return problem._replace(
        inner_draw=Bound("counted", counted, draw=problem.inner_draw),
        hyper_draw=Bound("counted", counted, draw=problem.hyper_draw, last=steps - 1),
    )


def with_number(objective: Objective, ctx: Ctx) -> Ctx:
    """The shapes of a context, for an objective that is told the inner step's number."""
    return (
        ctx._replace(inner_step=jax.ShapeDtypeStruct((), jnp.int32)) if objective.indexed else ctx
    )


def sampled(feed: Feed, i: Any, *, batch_size: int) -> Ctx:
    """Draw: rows chosen independently, with replacement."""
    key = draw_key(feed, i)
    total = jax.tree.leaves(feed.data)[0].shape[0]
    index = jax.random.randint(key, (batch_size,), 0, total)
    return Ctx(jax.tree.map(lambda a: a[index], feed.data), jax.random.fold_in(key, 1))


def by_epoch(feed: Feed, i: Any, *, batch_size: int) -> Ctx:
    """Draw: rows in an order of their own for each epoch."""
    total = jax.tree.leaves(feed.data)[0].shape[0]
    per_epoch = total // batch_size
    step = draw_number(feed, i).astype(jnp.uint32)
    epoch, position = step // jnp.uint32(per_epoch), step % jnp.uint32(per_epoch)
    places = position * jnp.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32)
    index = permuted(jax.random.fold_in(feed.key, epoch), places, total).astype(jnp.int32)
    return Ctx(
        jax.tree.map(lambda a: a[index], feed.data), jax.random.fold_in(draw_key(feed, i), 1)
    )


def _chosen(feed: Feed, i: Any, num_batches: int, replace: bool) -> jax.Array:
    """The number of the batch that the i-th draw from here takes."""
    number = draw_number(feed, i)
    if num_batches == 1:
        return jnp.zeros((), jnp.int32)
    if replace:
        return jax.random.randint(draw_key(feed, i), (), 0, num_batches, jnp.int32)
    position = (number % num_batches).astype(jnp.uint32)
    return permuted(
        jax.random.fold_in(feed.key, number // num_batches), position, num_batches
    ).astype(jnp.int32)


def knows_order(draw: Draw | None) -> bool:
    """Whether a draw can find out for many draws at once what each would."""
    return getattr(draw, "order", None) is not None


def ordered(draw: Draw, feed: Feed, count: int) -> jax.Array | None:
    """What the next `count` draws of `feed` find out, where `draw` makes use of it: one vectorised
    pass in place of a cipher in each step.
    """
    order = getattr(draw, "order", None)
    return None if order is None else order(feed, count)


class Batches(NamedTuple):
    """A draw of a fixed number of batches that come again and again; its contexts carry the batch's
    number (``Ctx.index``).

    Attributes:
      draw: the draw itself.
      batches: how many there are.
      order: ``(feed, count) -> int32[count]``: the numbers of the next `count` draws, found out at
        once; it then finds them in
        ``feed.order``. None: each draw finds out its own.
    """

    draw: Draw
    batches: int
    order: Callable[[Feed, int], jax.Array] | None = None

    def __call__(self, feed: Feed, i: Any) -> Ctx:
        return self.draw(feed, i)

    def __repr__(self) -> str:
        return repr(self.draw)


def partition_order(feed: Feed, count: int, *, num_batches: int, replace: bool) -> jax.Array:
    """The numbers of the batches of the next draws of a `partition`."""
    total, first = num_batches, draw_number(feed, 0)
    places = jnp.arange(count, dtype=jnp.int32)
    if replace:
        return jax.vmap(lambda i: _chosen(feed, i, total, True))(places)
    epochs = first // total + jnp.arange(count // total + 2, dtype=jnp.int32)
    keys = jax.vmap(lambda epoch: round_keys(jax.random.fold_in(feed.key, epoch)))(epochs)
    numbers = first + places
    order = jax.vmap(lambda keys, place: walk(keys, place, total))(
        keys[numbers // total - epochs[0]], (numbers % total).astype(jnp.uint32)
    )
    return order.astype(jnp.int32)


def partition(feed: Feed, i: Any, *, batch_size: int, num_batches: int, replace: bool) -> Ctx:
    """Draw: one of the fixed batches that the data is divided into."""
    index = _chosen(feed, i, num_batches, replace) if feed.order is None else feed.order[i]
    batch = jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, index * batch_size, batch_size), feed.data
    )
    return Ctx(batch, jax.random.fold_in(draw_key(feed, i), 1), index=index)


def num_batches(draw: Draw, algorithm: str) -> int:
    """How many batches this draw chooses from: those of a `partitioned` source, or 1 where every
    draw is the whole.

    Raises:
      ValueError: for any other draw, naming `algorithm`, which needs batches that come again.
    """
    if draw is same:
        return 1
    found = getattr(draw, "batches", None)
    if found is not None:
        return found
    raise ValueError(
        f"algorithm: got {algorithm}, which returns to the same batches again and again, with data "
        f"drawn by {draw!r}; "
        "expected a fixed number of batches. Try data.partitioned(arrays, batch_size), or "
        "full-batch data."
    )


def whole(draw: Draw, algorithm: str) -> Draw:
    """The draw of all of the data that `draw` takes batches of; refuses what `num_batches`
    refuses.
    """
    num_batches(draw, algorithm)
    return same


def generated(feed: Feed, i: Any, *, fn: Callable[..., Any], argument: str = "data") -> Ctx:
    """Draw: what a user's ``fn(key, step)`` makes. A run without a key has a function that reads
    none.
    """
    key = draw_key(feed, i)
    own = jax.random.key(0) if key is None else jax.random.fold_in(key, 0)
    with told(argument, "(key, step) -> batch"):
        batch = fn(own, draw_number(feed, i))
    numbers.arrays(batch, f"{argument}'s batch")
    if not jax.tree.leaves(batch):
        raise TypeError(
            f"{argument}: got a function that returned {numbers.describe(batch)}; expected a batch "
            "of arrays. Does it end in a return?"
        )
    return Ctx(batch, None if key is None else jax.random.fold_in(key, 1))
