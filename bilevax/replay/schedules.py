"""Which states of a training are kept for the way back, and which are made again from those."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bilevax._core import numbers
from bilevax.base import Bound


class Action(NamedTuple):
    """One thing to do.

    ``go`` to a step, ``keep`` the state of it, ``take`` it up again, ``drop`` it, ``turn`` at the
    end, go ``back`` over it.
    """

    kind: str
    step: int


class Counts(NamedTuple):
    """Training steps that a schedule executes in all, and states that it holds at once."""

    executed: int
    held: int


class Schedule(NamedTuple):
    """What is kept, as a list of things to do: ``actions(num_steps)``.

    Attributes:
      actions: from the number of training steps to the actions, in order. The first state is
        current at the start. ``turn`` stands once, where the state before the last step is current:
        it does that step and evaluates the outer objective. ``back`` stands once for each step,
        last step first, each time with that step's state current.
    """

    actions: Callable[[int], Iterator[Action]]

    def __repr__(self) -> str:
        return repr(self.actions)

    def counts(self, num_steps: int) -> Counts:
        """What it takes, found by going through its actions."""
        current = executed = most = 0
        held: set[int] = set()
        for kind, step in self.actions(num_steps):
            if kind == "go":
                executed, current = executed + step - current, step
            elif kind == "take":
                current = step
            elif kind == "turn":
                executed += 1
            elif kind == "keep":
                held.add(step)
                most = max(most, len(held))
            elif kind == "drop":
                held.discard(step)
        return Counts(executed, most)


def everything() -> Schedule:
    """Every state is kept, and no training step is done twice.

    ``T`` steps and ``T`` states: the least work, and the most memory of the host.

    Returns:
      A `Schedule`.

    Examples:
      >>> import bilevax as bx
      >>> bx.replay.everything().counts(100)
      Counts(executed=100, held=99)

    Source: Engstrom et al., "Optimizing ML training with metagradient descent" (arXiv 2503.13751),
    section 2.
    """
    return Schedule(Bound("everything", _everything))


def segments(length: int | None = None) -> Schedule:
    """The first state of each segment is kept; its other states are made again on the way back.

    About ``2T`` steps and ``2√T`` states with the default length, ``√T``.

    Args:
      length: steps of a segment, at least 1; None for the square root of the number of steps.

    Returns:
      A `Schedule`.

    Raises:
      ValueError: for a length that is no integer of at least 1.

    Examples:
      >>> import bilevax as bx
      >>> bx.replay.segments().counts(100)
      Counts(executed=181, held=18)

    Source: Chen et al., "Training deep nets with sublinear memory cost" (arXiv 1604.06174),
    section 4.3.
    """
    if length is not None:
        numbers.count(length, "length")
    return Schedule(Bound("segments", _segments, length=length))


def tree(slots: int) -> Schedule:
    r"""At most `slots` states are kept, moved so that the fewest training steps are done again.

    .. math::
        r T - \binom{k + r}{k + 1} + 1 \quad\text{steps,
        where } \binom{k + r - 1}{k} < T \le \binom{k + r}{k}

    The least that any schedule with so many slots can do. It pays below ``√T`` slots; with twice
    as many, `segments` does about as few steps.

    Args:
      slots: states kept at once, at least 1, the first one among them.

    Returns:
      A `Schedule`.

    Raises:
      ValueError: for a number of slots that is no integer of at least 1.

    Examples:
      >>> import bilevax as bx
      >>> bx.replay.tree(10).counts(1024)
      Counts(executed=3756, held=10)

    Source: Griewank and Walther, "Algorithm 799: revolve" (ACM TOMS 2000), proposition 1.
    """
    return Schedule(Bound("tree", _tree, slots=numbers.count(slots, "slots")))


def _row(lo: int, hi: int, last: int) -> Iterator[Action]:
    """Steps `lo` to `hi`, all of whose states are kept; the state of `lo` is current and kept."""
    for step in range(lo + 1, hi - 1):
        yield Action("go", step)
        yield Action("keep", step)
    yield from _leaf(lo, hi - 1, last)
    for step in range(hi - 2, lo - 1, -1):
        yield Action("take", step)
        yield Action("back", step)
        yield Action("drop", step)
    if hi - lo == 1:
        yield Action("drop", lo)


def _leaf(current: int, step: int, last: int) -> Iterator[Action]:
    if step > current:
        yield Action("go", step)
    if step == last:
        yield Action("turn", step)
    yield Action("back", step)


def _everything(num_steps: int) -> Iterator[Action]:
    yield Action("keep", 0)
    yield from _row(0, num_steps, num_steps - 1)


def _segments(num_steps: int, *, length: int | None) -> Iterator[Action]:
    size = length or math.isqrt(num_steps)
    starts = range(0, num_steps, size)
    yield Action("keep", 0)
    for start in starts[1:]:
        yield Action("go", start)
        yield Action("keep", start)
    for start in reversed(starts):
        if start != starts[-1]:
            yield Action("take", start)
        yield from _row(start, min(start + size, num_steps), num_steps - 1)


def _tree(num_steps: int, *, slots: int) -> Iterator[Action]:
    yield Action("keep", 0)
    todo: list[tuple[int, int, int] | Action] = [
        (0, num_steps, slots)
    ]  # a stack: a tree may be deeper than Python's
    while todo:
        item = todo.pop()
        if isinstance(item, Action):
            yield item
            continue
        lo, hi, free = item  # the state of `lo` is current and holds one of the slots
        if hi - lo == 1 or free == 1:
            for step in range(hi - 1, lo - 1, -1):
                if step < hi - 1:
                    yield Action("take", lo)
                yield from _leaf(lo, step, num_steps - 1)
            continue
        middle = lo + _split(hi - lo, free)
        yield Action("go", middle)
        after: list[tuple[int, int, int] | Action] = [Action("take", lo), (lo, middle, free)]
        if hi - middle == 1:
            yield from _leaf(middle, middle, num_steps - 1)
            todo += reversed(after)
        else:
            yield Action("keep", middle)
            todo += reversed([(middle, hi, free - 1), Action("drop", middle), *after])
    yield Action("drop", 0)


def _split(length: int, slots: int) -> int:
    """Where the next state is kept: both parts need as few repetitions as the whole allows."""
    repeats = 1
    while math.comb(slots + repeats, slots) < length:
        repeats += 1
    most = math.comb(
        slots + repeats - 1, slots
    )  # what `repeats - 1` repetitions reach with all slots
    least_right = math.comb(slots - 1 + repeats - 1, slots - 1)
    return max(1, min(most, length - least_right))


__all__ = ["Action", "Counts", "Schedule", "everything", "segments", "tree"]
