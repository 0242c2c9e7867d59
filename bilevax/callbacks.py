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
      history: columns of all rows of this call so far, as numpy arrays by name.
      state: the run's state on the device. Its buffers are reused by the next chunk: copy what must outlive the call.
    """

    step: int
    done: int
    num_steps: int
    history: dict[str, np.ndarray]
    state: Any


class Callback(NamedTuple):
    """A function and how often it is called. Any plain callable is one, called every 256 steps or less often."""

    fn: Callable[[Event], bool | None]
    every: int | None = None
    close: Callable[[], None] | None = None


def every(n: int, fn: Callable[[Event], bool | None]) -> Callback:
    """Call `fn` every `n` steps, and once more at the end.

    Args:
      n: steps between calls, at least 1.
      fn: takes an `Event`; returning True stops the run.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``.

    Raises:
      ValueError: if `n` is below 1.
      TypeError: if `fn` is not callable.

    Example:
      >>> from bilevax import callbacks
      >>> callbacks.every(100, lambda event: print(event.step, event.history["value"][-1])).every
      100
    """
    if not callable(fn):
        raise TypeError(f"fn: got {check.describe(fn)}; expected a function of an Event.")
    return Callback(fn, check.count(n, "n"))


def early_stopping(name: str, *, patience: int, mode: str = "min", min_delta: float = 0.0, check_every: int = 10) -> Callback:
    """Stop when a column of the history has not improved for `patience` steps.

    Args:
      name: a column of the history, such as ``"value"`` or a metric's name. Rows where it is NaN (a metric between its evaluations) are passed over.
      patience: steps without improvement after which the run stops.
      mode: ``"min"`` or ``"max"``.
      min_delta: what counts as an improvement.
      check_every: steps between looks.

    Returns:
      A callback. It reads one run's history and keeps nothing of its own, so it may be used again.

    Raises:
      ValueError: for another mode, or counts below 1.
      KeyError: in the run, if the history has no such column.

    Example:
      >>> from bilevax import callbacks
      >>> callbacks.early_stopping("accuracy", patience=50, mode="max").every
      10
    """
    patience = check.count(patience, "patience")
    if mode not in ("min", "max"):
        raise ValueError(f"mode: got {mode!r}; expected 'min' or 'max'.")

    def stop(event: Event) -> bool:
        if name not in event.history:
            raise KeyError(f"early_stopping: got {name!r}; expected one of the history's columns: {sorted(event.history)}.")
        column = event.history[name] if mode == "min" else -event.history[name]
        best, best_row = np.inf, -1
        for row in np.flatnonzero(~np.isnan(column)):
            if column[row] < best - min_delta:
                best, best_row = column[row], int(row)
        return len(column) - 1 - best_row >= patience

    return Callback(stop, check.count(check_every, "check_every"))


def progress_bar() -> Callback:
    """A progress bar by tqdm (extra ``progress``), with the outer value and the hypergradient's norm beside it.

    Returns:
      A callback; ``solve_bilevel(..., progress=True)`` adds it.

    Raises:
      ImportError: where tqdm is not installed.

    Example:
      >>> from bilevax import callbacks
      >>> bar = callbacks.progress_bar()
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm; try pip install 'bilevax[progress]'.") from error
    bars: list = []

    def show(event: Event) -> None:
        if not bars:
            bars.append(tqdm(total=event.num_steps, unit="step"))
        bars[0].update(event.done - bars[0].n)
        bars[0].set_postfix(value=f"{event.history['value'][-1]:.4g}", grad=f"{event.history['grad_norm'][-1]:.2g}")

    def close() -> None:
        while bars:
            bars.pop().close()

    return Callback(show, 32, close)


def as_callback(fn: Any, position: int) -> Callback:
    """A `Callback` of whatever was given."""
    if isinstance(fn, Callback):
        return fn
    if not callable(fn):
        raise TypeError(f"callbacks[{position}]: got {check.describe(fn)}; expected a function of an Event, or callbacks.every(n, fn).")
    return Callback(fn)
