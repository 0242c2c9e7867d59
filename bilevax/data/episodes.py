"""Episodes: one draw an outer step, the same for its inner steps and for every level that is given
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilevax.base import Ctx, Feed, Problem, PyTree, join, split
from bilevax.data.draws import draw_key, windowed
from bilevax.data.loaders import Stream
from bilevax.data.sources import Source, as_source

_OWN = 0x45505321  # apart from the numbers of the streams, whose keys are folded in likewise


class Episodes(NamedTuple):
    """A source that gives one batch an outer step; made by `episodes`.

    `number` tells one parent's draws from another's; it is given when a run starts.
    """

    parent: Source | Stream
    maps: tuple[Callable[..., Any], ...] = ()
    number: int = 0

    @property
    def is_source(self) -> bool:
        """It is taken as it is wherever data is asked for."""
        return True

    def map(self, fn: Callable[[PyTree], PyTree]) -> Episodes:
        """The same episodes as ``fn(batch)``: each level's part of them.

        Args:
          fn: pure function of a batch, traced. Define it once: another lambda is another program.

        Returns:
          `Episodes` that share the draws of these.

        Raises:
          TypeError: if `fn` cannot be called.

        Examples:
          >>> import jax.numpy as jnp, bilevax as bx
          >>> tasks = bx.data.episodes({"support": jnp.ones((4, 5)), "query": jnp.ones((4, 15))})
          >>> tasks.map(lambda batch: batch["query"]).maps == ()
          False
        """
        if not callable(fn):
            raise TypeError(f"fn: got {type(fn).__name__}; expected a function of a batch.")
        return self._replace(maps=(*self.maps, fn))

    @property
    def keyed(self) -> bool:
        """Whether the draws need a PRNG key."""
        return isinstance(self.parent, Source) and self.parent.keyed

    @property
    def data(self) -> Episode:
        """What compiled code is given, where the parent is no iterable."""
        assert isinstance(self.parent, Source)
        return self.of(self.parent.draw, self.parent.data)

    def window(self, data: PyTree) -> Episode:
        """The same where it is one, read as far as `data`."""
        return self.of(windowed, data)

    def of(self, draw: Any, data: Any) -> Episode:
        """The draw, the data that it reads, and the maps, as arguments of compiled code."""
        static, dynamic = split((draw, self.maps))
        return Episode(data, dynamic, static, self.number)


def episodes(source: Any) -> Episodes:
    """Draw once an outer step: the inner steps, second-order products and every level see the same
    batch.

    What meta-learning needs: the tasks that the lower level adapts to are those that the upper one
    asks about. ``support = tasks.map(lambda t: t["support"])`` goes to one level,
    ``tasks.map(lambda t: t["query"])`` to the other. All that is made by `map` from one
    ``episodes(...)`` shares its draws; a second ``episodes(...)``, of the same data too, draws for
    itself.

    Args:
      source: whatever data may be: `minibatches` of arrays whose leading axis counts tasks, a pure
        function ``(key, step) -> batch`` (a sampler of tasks), an iterable of batches, a pytree of
        arrays.

    Returns:
      `Episodes`, for ``inner_data``, ``outer_data`` or a level's ``data``, as it is or mapped.

    Raises:
      TypeError, ValueError: for a source that is none.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> fit = lambda w, meta, task: 0.5 * (w - task) ** 2
      >>> query = lambda w, meta, tasks: jnp.mean((w - tasks) ** 2)
      >>> tasks = bx.data.episodes(bx.data.minibatches(jnp.arange(32.0), 4))
      >>> algorithm = bx.algorithms.double_loop(
      ...     bx.inner.optax(optax.sgd(1.0), 2), bx.hypergradient.unrolled(), optax.sgd(0.1)
      ... )
      >>> solution = bx.solve_bilevel(
      ...     bx.tasks(fit, "sum"),
      ...     query,
      ...     jnp.zeros(4),
      ...     jnp.zeros(()),
      ...     inner_data=tasks,
      ...     outer_data=tasks,
      ...     inner_init=bx.task_copies(4),
      ...     algorithm=algorithm,
      ...     num_steps=3,
      ...     key=jax.random.key(0),
      ... )
      >>> solution.history["value"].tolist()  # the very tasks that each step has adapted to
      [0.0, 0.0, 0.0]
    """
    if isinstance(source, Episodes):
        return source
    return Episodes(as_source(source, "source"))


def numbered(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    """`sources` with a number for each parent of episodes, in order of appearance."""
    parents: list[Any] = []
    out = []
    for source in sources:
        if isinstance(source, Episodes):
            known = [i for i, parent in enumerate(parents) if parent is source.parent]
            if not known:
                parents.append(source.parent)
            source = source._replace(number=known[0] if known else len(parents) - 1)
        out.append(source)
    return tuple(out)


def refuse_other_tasks(problem: Problem, inner: Any, outer: Any) -> None:
    """Tasks drawn from arrays anew at every inner step, or for the outer level, are not those that
    were adapted to.
    """
    if not problem.inner.tasks:
        return
    levels = [("inner_data", inner)] + ([("outer_data", outer)] if problem.outer.tasks else [])
    for argument, source in levels:
        if isinstance(source, Source) and source.keyed and source.data is not None:
            raise ValueError(
                f"{argument}: got a sample of tasks, {source.draw!r}, for an objective of tasks; "
                "expected one draw an outer step for both levels: each inner step would adapt to "
                "other tasks, and the outer level judge still others. Try tasks = "
                "bx.data.episodes(...) of it, with tasks.map(...) for each level's part."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Episode:
    """The data of an episodes' stream before the step's batch is drawn from it."""

    data: PyTree
    dynamic: tuple[Any, ...]
    static: Any = dataclasses.field(metadata=dict(static=True))
    number: int = dataclasses.field(metadata=dict(static=True))


def drawn(data: PyTree, key: Any, step: Any) -> PyTree:
    """A stream's data for one outer step: of an `Episode` the batch, anything else as it is."""
    if not isinstance(data, Episode):
        return data
    draw, maps = join(data.static, data.dynamic)
    own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, _OWN), data.number)
    batch = draw(Feed(data.data, own, step), 0).batch
    for fn in maps:
        batch = fn(batch)
    return batch


def episode(feed: Feed, i: Any) -> Ctx:
    """Draw: the step's batch, which is in the feed already."""
    return Ctx(feed.data, draw_key(feed, i))
