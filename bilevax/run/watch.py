"""What may watch a run from outside: any function, called between compiled chunks of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bilevax import check


class Event(NamedTuple):
    """What a callback is given.

    Attributes:
      step: steps done in all, earlier runs that this one continues included.
      done: steps done by this call.
      num_steps: steps that this call was asked for.
      history: columns of all rows of this call so far, as numpy arrays by name that are only to be
        read: they are the run's own.
      state: the run's state on the device. Its buffers are reused by the next chunk: copy what must
        outlive the call.
      start: the step that this call began at; row ``i`` of the history is step ``start + i``.
      resumed: how many of the rows an earlier process did, and a checkpoint brought back.
    """

    step: int
    done: int
    num_steps: int
    history: dict[str, np.ndarray]
    state: Any
    start: int = 0
    resumed: int = 0


class Callback(NamedTuple):
    """A function and how often it is called. Any plain callable is one, called every 256 steps or less often.

    Attributes:
      fn: takes an `Event`; returning True stops the run.
      every: steps between calls.
      close: called when the run ends, however it ends.
      begin: called before the first step; what cannot work is refused there.
      exact: whether it is called after each `every` steps to the step, for which chunks are cut
        short; otherwise at the end of the first chunk after them.
    """

    fn: Callable[[Event], bool | None]
    every: int | None = None
    close: Callable[[], None] | None = None
    begin: Callable[[], None] | None = None
    exact: bool = True


def as_callback(fn: Any, position: int) -> Callback:
    """A `Callback` of whatever was given."""
    if isinstance(fn, Callback):
        return fn
    if not callable(fn):
        raise TypeError(f"callbacks[{position}]: got {check.describe(fn)}; expected a function of an Event, or callbacks.every(n, fn).")
    return Callback(fn)


def progress_bar() -> Callback:
    """A progress bar by tqdm (extra ``progress``), with the outer value and the hypergradient's norm beside it.

    Returns:
      A callback; ``solve_bilevel(..., progress=True)`` adds it. Its rate leaves out the compilation.

    Raises:
      ImportError: where tqdm is not installed.

    Examples:
      >>> from bilevax import callbacks
      >>> bar = callbacks.progress_bar()
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm; try pip install 'bilevax[progress]'.") from error
    bars: list[Any] = []

    def show(event: Event) -> None:
        if not bars:  # the first chunk was mostly compilation, and restored steps took no time at all
            bars.append(tqdm(total=event.num_steps, initial=event.done, unit="step"))
        bars[0].update(event.done - bars[0].n)
        value, norm = event.history["value"][-1], event.history["grad_norm"][-1]
        bars[0].set_postfix(value=f"{value:.4g}", grad=f"{norm:.2g}")

    def close() -> None:
        while bars:
            bars.pop().close()

    return Callback(show, 32, close, exact=False)
