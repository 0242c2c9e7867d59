"""The host's side of the data: batches of iterables for the steps of a chunk, and what an objective
will be given.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax._core.settings import wrapped
from bilevax.base import Bound, Ctx, Draws, Feed, Problem, PyTree, join, split
from bilevax.data.draws import count_steps, last_windowed, windowed
from bilevax.data.episodes import Episodes, drawn, episode
from bilevax.data.loaders import Stream
from bilevax.run import digest

MOST_BYTES = 2**28  # of batches read ahead
MOST_STEPS = 16  # and of outer steps: a slow loader's first ones are waited for
PATIENCE = 10.0  # seconds of passing over batches between two words about it


class Step(NamedTuple):
    """What was read for one outer step: a list of batches a stream, a stream's last one before it
    where its level stands still in some steps, and its mark before its last one.
    """

    batches: list[list[PyTree]]
    before: list[PyTree | None]
    marks: list[bytes | None]


class Staged(NamedTuple):
    """Steps from `start` on, and their batches as compiled code is given them: ``(start, stacked)``
    a stream.
    """

    start: int
    steps: list[Step]
    data: list[Any]


def stream_of(source: Any) -> Stream | None:
    """The iterable behind a source."""
    parent = source.parent if isinstance(source, Episodes) else source
    return parent if isinstance(parent, Stream) else None


class Window:
    """Batches of host streams for the steps of the next chunk, stacked and padded to one shape.

    An iterable that stands behind several sources is read once. `steps` bounds how many outer steps
    are read ahead, those of the chunk included; None for as many as fit in 256 MiB, at least two.
    `put` places a stacked window on the devices; None leaves it to JAX.
    """

    def __init__(
        self,
        sources: tuple[Any, ...],
        num_steps: int,
        steps: int | None = None,
        put: Callable[..., Any] | None = None,
    ):
        self.sources, self.put = sources, put
        found = {id(s): s for s in map(stream_of, sources) if s is not None and s.take}
        self.streams: list[Stream] = list(found.values())
        if steps is None:
            step_bytes = sum(s.take * _bytes(s.peek()) / s.every for s in self.streams)
            steps = max(2, min(2 * MOST_STEPS, int(MOST_BYTES // max(step_bytes, 1))))
        self.capacity = max(1, min(num_steps, (steps + 1) // 2))
        self._ahead = max(0, steps - self.capacity)
        self._next = 0  # the step that is pulled from the streams next
        self._last: list[PyTree] = [None] * len(self.streams)
        self._marks: list[bytes | None] = [None] * len(self.streams)  # of the batches read last,
        self._done: list[bytes | None] = [None] * len(
            self.streams
        )  # and of those last used by a step that was done
        # the last batch of each stream in the call that is done; None where it read none
        self._latest: list[PyTree] = []
        self._back: list[Step] = []
        self._current: Staged | None = None
        self._staged: Staged | None = None
        self._error: BaseException | None = None
        self._ended: Stream | None = None

    @property
    def streaming(self) -> bool:
        """Whether anything is read on the host."""
        return bool(self.streams)

    @property
    def exhausted(self) -> bool:
        """An iterator is at its end, and so are the steps that were read before."""
        return self._ended is not None and not self._back and self._staged is None

    # ---- where the streams stand

    def places(self) -> dict[str, np.ndarray] | None:
        """Where the streams stand that can say so themselves, by argument."""
        said = {
            s.argument: np.frombuffer(mark, np.uint8)
            for s, mark in zip(self.streams, self._done, strict=True)
            if mark is not None
        }
        return said or None

    def digests(self) -> dict[str, str]:
        """Digests of the batches that were used last, by argument."""
        return {
            stream.argument: _digest(batch)
            for stream, batch in zip(self.streams, self._latest, strict=False)
            if batch is not None
        }

    def differing(self, digests: dict[str, str]) -> list[str]:
        """The arguments whose last batch before this place, just passed over, is none of these."""
        return [
            stream.argument
            for stream, batch in zip(self.streams, self._last, strict=True)
            if batch is not None and digests.get(stream.argument, _digest(batch)) != _digest(batch)
        ]

    def seek(self, step: int, places: dict[str, Any] | None = None) -> None:
        """Pass over the batches of the steps before `step`, which an earlier run has taken; where
        `places` has what a stream said, it goes there.
        """
        self._next = step
        begin = said = time.perf_counter()
        for place, stream in enumerate(self.streams):
            count = passed = -(-step // stream.every) * stream.take
            mark = (places or {}).get(stream.argument)
            if count and mark is not None and stream.jump(np.asarray(mark).tobytes(), count - 1):
                passed = 1  # the last one, which a level that stands still takes its products on
            for number in range(passed):
                try:
                    batch = stream.next()
                    self._marks[place] = self._done[place] = stream.mark
                except StopIteration:
                    self._ended = stream
                    return
                if number == passed - 1:  # a loader may use its buffer again
                    self._last[place] = jax.tree.map(np.array, batch)
                if time.perf_counter() - said > PATIENCE:
                    said = time.perf_counter()
                    logging.getLogger("bilevax").warning(
                        "%s: passed over %d of %d batches in %.0f s, to the place where the run "
                        "stands",
                        stream.argument, number + 1, count, said - begin,
                    )  # fmt: skip

    def _pull(self, windows: list[_Stack]) -> Step | None:
        """What the next step reads, copied into `windows` batch by batch, since a loader may use
        one buffer for all of them; or None at the end of an iterator.
        """
        batches: list[list[PyTree]] = []
        before, filled = list(self._last), [window.filled for window in windows]
        for place, (stream, window) in enumerate(zip(self.streams, windows, strict=True)):
            taken: list[PyTree] = []
            try:
                while self._next % stream.every == 0 and len(taken) < stream.take:
                    taken.append(window.add(stream.next()))
            except Exception as error:
                for one, rows in zip(windows, filled, strict=True):
                    one.filled = rows
                if not isinstance(error, StopIteration):
                    raise
                if self._next == 0:
                    raise ValueError(
                        f"{stream.argument}: got an iterator that ended after {len(taken)} "
                        "batches; expected at "
                        f"least {stream.take}, those of one outer step. Try an iterable that can "
                        "be read again."
                    ) from None
                self._ended = stream
                return None
            batches.append(taken)
            if taken:
                # held, with its window, only for a level that stands still in some steps
                self._last[place] = taken[-1] if stream.every > 1 else None
                self._marks[place] = stream.mark
        self._next += 1
        return Step(batches, before, list(self._marks))

    # ---- what a chunk is given

    def read(self, start: int, n: int) -> tuple[tuple[Any, ...], int]:
        """The data of steps `start` to `start + n`, and how many of those steps there are batches
        for.
        """
        if not self.streaming:
            return self._arranged([]), n
        if self._staged is None:
            self._staged = self._stage(start, n)
        staged, self._staged, self._current = self._staged, None, self._staged
        if not staged.steps and self._error is not None:
            raise self._error
        if staged.steps:
            self._latest = []  # which holds what was read for an earlier call
        return self._arranged(staged.data), min(n, len(staged.steps))

    def prefetch(self, n: int, end: int) -> None:
        """Read the next steps, at most `n` and none from `end` on, while those that were handed out
        are being done.
        """
        if self._current is None or self._back:
            return
        start = self._current.start + len(
            self._current.steps
        )  # more than are being done, where a call was cut short
        n = min(n, self._ahead, end - start)
        if n > 0:
            staged = self._stage(start, n)
            self._staged = staged if staged.steps else None

    def done(self, count: int) -> None:
        """Of the steps handed out last, `count` were done; the others will be handed out again."""
        if self._current is None:
            return
        used, left = self._current.steps[:count], self._current.steps[count:]
        if used:
            self._done = used[-1].marks
            by_stream = zip(*(step.batches for step in reversed(used)), strict=True)
            self._latest = [next((b[-1] for b in taken if b), None) for taken in by_stream]
        if left:
            ahead = [] if self._staged is None else self._staged.steps
            self._back, self._staged = [*left, *ahead, *self._back], None
        self._current = None

    def _stage(self, start: int, n: int) -> Staged:
        """Up to `n` steps, copied into one array a leaf as they are read."""
        steps: list[Step] = []
        windows: list[_Stack] = []
        while len(steps) < min(n, self.capacity):
            step = self._back.pop(0) if self._back else None
            if not windows:
                windows = self._stacks(start, self._last if step is None else step.before)
            if step is None:
                step = self._pull_or_wait(windows)
            else:
                pairs = zip(windows, step.batches, strict=True)
                step = step._replace(batches=[[w.add(one) for one in taken] for w, taken in pairs])
            if step is None:
                break
            steps.append(step)
        return Staged(start, steps, [w.placed(self.put) for w in windows] if steps else [])

    def _stacks(self, start: int, before: list[PyTree]) -> list[_Stack]:
        """What the batches of the steps from `start` on are copied into, a stack a stream; of a
        level that stands still at `start`, it begins with the last batch `before`.
        """
        stacks: list[_Stack] = []
        for stream, last in zip(self.streams, before, strict=True):
            standing = start % stream.every != 0
            number = start // stream.every * stream.take + (stream.take - 1 if standing else 0)
            rows = -(-self.capacity // stream.every) * stream.take + (stream.every > 1)
            stacks.append(_Stack(number, rows, stream.peek()))
            if standing:
                stacks[-1].add(last)
        return stacks

    def _pull_or_wait(self, windows: list[_Stack]) -> Step | None:
        if self._ended is not None or self._error is not None:
            return None
        try:
            return self._pull(windows)
        except Exception as error:  # raised when its step is due, and not when it is read ahead
            self._error = error
            return None

    def _arranged(self, windows: list[Any]) -> tuple[Any, ...]:
        """The data of each source."""
        by_stream = {
            id(stream): window for stream, window in zip(self.streams, windows, strict=False)
        }
        data: list[Any] = []
        for source in self.sources:
            stream = stream_of(source)
            if stream is None:
                data.append(source.data)
            else:
                window = by_stream.get(id(stream))
                data.append(source.window(window) if isinstance(source, Episodes) else window)
        return tuple(data)


class _Stack:
    """Batches of one stream, the first with this number, copied one after another into arrays of
    `rows`.
    """

    def __init__(self, number: int, rows: int, like: PyTree):
        self.number, self.filled = number, 0
        self.arrays = jax.tree.map(lambda a: _aligned((rows, *a.shape), a.dtype), like)

    def add(self, batch: PyTree) -> PyTree:
        """The batch as it lies here."""
        row, self.filled = self.filled, self.filled + 1

        def copy(array, a):
            array[row] = np.asarray(a)
            return array[row]

        return jax.tree.map(copy, self.arrays, batch)

    def placed(self, put: Callable[..., Any] | None) -> tuple[Any, ...]:
        stacked = (
            jax.device_put(self.arrays) if put is None else put(self.arrays)
        )  # on the CPU no copy
        return jnp.asarray(self.number, jnp.int32), stacked


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that JAX on the CPU takes as they lie, without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _digest(batch: PyTree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return digest.of_columns({jax.tree_util.keystr(path): np.asarray(a) for path, a in leaves})


def _bytes(batch: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))


# ---- what compiled code is given


def source_draw(source: Any) -> Any:
    """The draw by which compiled code reads a source."""
    if isinstance(source, Episodes):
        return episode
    return windowed if isinstance(source, Stream) else source.draw


def reading(problem: Problem, draws: Draws, sources: tuple[Any, ...]) -> Problem:
    """The problem's draws, and its streams, told what each step of an algorithm takes.

    Over an iterable, second-order products are taken on the last batch that the step has trained
    on.

    Raises:
      ValueError: for an algorithm that needs batches of their own for them.
    """
    inner, hyper, outer = sources
    shared = isinstance(inner, Stream) and hyper is inner
    if shared and draws.hyper > 1:
        raise ValueError(
            f"hyper_data: got None with an iterable as {inner.argument}, for an algorithm whose "
            "second-order products "
            f"take {draws.hyper} batches a step, independent of those trained on; expected data of "
            "their own. "
            "Try hyper_data= another iterator over the same data."
        )
    for source, take in (
        (inner, draws.inner),
        (outer, draws.outer),
        *(() if shared else ((hyper, draws.hyper),)),
    ):
        if isinstance(source, Stream):
            source.take = take
    if shared:
        problem = problem._replace(hyper_draw=Bound("last", last_windowed, take=draws.inner))
    return count_steps(problem, draws.inner)


def refuse_shared(sources: tuple[Any, ...]) -> None:
    """Two levels cannot read one iterator: each would get every other batch."""
    seen: dict[int, Stream] = {}
    for stream in filter(None, map(stream_of, sources)):
        other = seen.setdefault(id(stream.iterable), stream)
        if stream.one_pass and other is not stream:
            raise ValueError(
                f"{stream.argument}: got the iterator ({type(stream.iterable).__name__}) that "
                f"{other.argument} is; expected one of its own, since "
                "each would get every other batch. Try a second iterator, or what makes them: a "
                "loader, or a class with __iter__."
            )


def refuse_one_pass(sources: tuple[Any, ...]) -> None:
    """A run that goes on from a state cannot tell where an iterator stands."""
    for stream in filter(None, map(stream_of, sources)):
        if stream.one_pass:
            raise ValueError(
                f"{stream.argument}: got an iterator ({type(stream.iterable).__name__}) with "
                "state=; expected an "
                "iterable that can be read from its beginning, to be passed over to where the run "
                "stands. Try "
                "what makes the iterator: a loader, or a class with __iter__."
            )


def first_data(source: Any) -> Any:
    """What compiled code is given of a source; of an iterable, its first batch alone."""
    stream = stream_of(source)
    if stream is None:
        return source.data
    data = (jnp.int32(0), jax.tree.map(lambda a: jnp.asarray(a)[None], stream.peek()))
    return source.window(data) if isinstance(source, Episodes) else data


def first_context(source: Any, key: Any) -> Ctx:
    """Shapes of what an objective will be given."""
    data = first_data(source)
    static, dynamic = split(source_draw(source))
    return _first_draw.eval_shape(static, dynamic, data, key)


@functools.partial(
    jax.jit, static_argnums=0
)  # for its cache: a second run on the same data traces nothing
def _first_draw(static: Any, dynamic: Any, data: Any, key: Any) -> Ctx:
    zero = jnp.zeros((), jnp.int32)
    known = zero[None]  # an order, whose finding out would be most of what is traced here
    return join(static, dynamic)(Feed(drawn(data, key, zero), key, zero, known), 0)


def needs_key(source: Any) -> bool:
    """Whether a source without a key is one short: a user's function may ignore its own."""
    parent = source.parent if isinstance(source, Episodes) else source
    if isinstance(parent, Stream):
        return False
    fn = wrapped(parent.draw)
    if not parent.keyed or fn is None:
        return parent.keyed
    like = jax.eval_shape(lambda: jax.random.key(0))
    closed = jax.make_jaxpr(fn)(like, jax.ShapeDtypeStruct((), jnp.int32))
    _, used = jax.interpreters.partial_eval.dce_jaxpr(
        closed.jaxpr, [True] * len(closed.jaxpr.outvars)
    )
    return used[0]
