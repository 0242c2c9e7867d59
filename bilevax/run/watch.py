"""What may watch a run from outside: any function, called between compiled chunks of steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bilevax import check
from bilevax._core import numbers


class Event:
    """What a callback is given.

    Attributes:
      step: steps done in all, earlier runs that this one continues included.
      done: steps done by this call.
      num_steps: steps that this call was asked for.
      history: columns of all rows of this call so far, as numpy arrays by name that are only to be
        read: they are the run's own.
      state: the run's state on the device, to be read while the callback is called. Its buffers are
        reused by the next chunk: copy what must outlive the call.
      start: the step that this call began at; row ``i`` of the history is step ``start + i``.
      resumed: how many of the rows an earlier process did, and a checkpoint brought back.
    """

    __slots__ = ("_history", "_state", "done", "num_steps", "resumed", "start", "step")

    def __init__(
        self,
        step: int,
        done: int,
        num_steps: int,
        history: dict[str, np.ndarray],
        state: Any,
        start: int = 0,
        resumed: int = 0,
    ):
        self._put(step, done, num_steps, lambda done: history, lambda done: state, start, resumed)

    def _put(
        self,
        step: Any,
        done: Any,
        num_steps: Any,
        history: Any,
        state: Any,
        start: Any,
        resumed: Any,
    ) -> None:
        self.step, self.done, self.num_steps, self.start, self.resumed = (
            step,
            done,
            num_steps,
            start,
            resumed,
        )
        self._history, self._state = (
            history,
            state,
        )  # of a number of steps: most callbacks look at one of them, or at none

    @classmethod
    def seen(
        cls,
        step: int,
        done: int,
        num_steps: int,
        history: Callable[[int], dict[str, np.ndarray]],
        state: Callable[[int], Any],
        start: int,
        resumed: int,
    ) -> Event:
        """One whose history and state are made, from the number of steps done, when they are
        read.
        """
        event = cls.__new__(cls)
        event._put(step, done, num_steps, history, state, start, resumed)
        return event

    @property
    def history(self) -> dict[str, np.ndarray]:
        return self._history(self.done)

    @property
    def state(self) -> Any:
        return self._state(self.done)


class Callback(NamedTuple):
    """A function and how often it is called. Any plain callable is one, called every 256 steps or
    less often.

    Attributes:
      fn: takes an `Event`; returning True stops the run.
      every: steps between calls.
      close: called when the run ends, however it ends.
      begin: called before the first step; what cannot work is refused there.
      exact: whether it is called with what the run was after each `every` steps, and a stop ends
        the run there; otherwise at the end of the first chunk after them.
    """

    fn: Callable[[Event], bool | None]
    every: int | None = None
    close: Callable[[], None] | None = None
    begin: Callable[[], None] | None = None
    exact: bool = True


def of_one_run(callback: Callback) -> Callback:
    """A callback that keeps what it has seen, with a word to a second run that is given it before
    the first has ended.
    """
    taken = threading.Lock()

    def begin() -> None:
        if not taken.acquire(blocking=False):
            raise RuntimeError(
                "callbacks: got one that is given twice, or that a run which has not ended was "
                "given; expected one of this run's own, since it keeps what it has seen. Make a "
                "second one."
            )
        try:
            if callback.begin is not None:
                callback.begin()
        except BaseException:
            taken.release()
            raise

    def close() -> None:
        try:
            if callback.close is not None:
                callback.close()
        finally:
            if taken.locked():
                taken.release()

    return callback._replace(begin=begin, close=close)


def as_callback(fn: Any, position: int) -> Callback:
    """A `Callback` of whatever was given."""
    where = f"callbacks[{position}]"
    if isinstance(fn, Callback):
        numbers.function(fn.fn, f"{where}, fn", "(event)")
        for name, hook in (("close", fn.close), ("begin", fn.begin)):
            if hook is not None:
                numbers.function(hook, f"{where}, {name}", "()")
        if fn.every is not None:
            numbers.count(fn.every, f"{where}, every")
        numbers.flag(fn.exact, f"{where}, exact")
        return fn
    if not callable(fn):
        raise TypeError(
            f"{where}: got {check.describe(fn)}; expected a function of an Event, or "
            "callbacks.every(n, fn)."
        )
    if getattr(fn, "__annotations__", {}).get("return") in ("Callback", Callback):
        raise TypeError(
            f"{where}: got the factory {fn.__name__}; expected what it returns. Try "
            f"callbacks.{fn.__name__}(...)."
        )
    numbers.takes(fn, where, "(event)")
    return Callback(fn)


def progress_bar() -> Callback:
    """A progress bar by tqdm (extra ``progress``), with the outer value and the hypergradient's
    norm beside it.

    Returns:
      A callback; ``solve_bilevel(..., progress=True)`` adds it. Its rate leaves out the
      compilation.

    Raises:
      ImportError: where tqdm is not installed.

    Examples:
      >>> from bilevax import callbacks
      >>> bar = callbacks.progress_bar()
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm; try pip install 'bilevax[progress]'."
        ) from error
    bars: list[Any] = []

    def show(event: Event) -> None:
        if (
            not bars
        ):  # the first chunk was mostly compilation, and restored steps took no time at all
            bars.append(tqdm(total=event.num_steps, initial=event.done, unit="step"))
        bars[0].update(event.done - bars[0].n)
        value, norm = event.history["value"][-1], event.history["grad_norm"][-1]
        bars[0].set_postfix(value=f"{value:.4g}", grad=f"{norm:.2g}")

    def close() -> None:
        while bars:
            bars.pop().close()

    return of_one_run(Callback(show, 32, close, exact=False))
