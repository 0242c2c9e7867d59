"""Functions of one's own between the steps, and the end of a run that no longer improves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bilevax import check
from bilevax._core import numbers
from bilevax.run.watch import Callback, Event, of_one_run


def every(n: int, fn: Callable[[Event], bool | None]) -> Callback:
    """Call `fn` every `n` steps, and once more at the end.

    The compiled calls of a run may go past such a step (they take about a tenth of a second), and
    `fn` then looks back at it. They are done again up to there if `fn` stops the run, and until it
    first reads ``event.state``; what steps print or call back to the host, they do so again then.

    Args:
      n: steps between calls, at least 1.
      fn: takes an `Event`; returning True stops the run.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``.

    Raises:
      ValueError: if `n` is below 1.
      TypeError: if `fn` is not callable.

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.every(100, lambda event: print(event.step, event.history["value"][-1])).every
      100
    """
    if not callable(fn):
        raise TypeError(f"fn: got {check.describe(fn)}; expected a function of an Event.")
    numbers.takes(fn, "fn", "(event)")
    return Callback(fn, numbers.count(n, "n"))


def early_stopping(
    name: str,
    *,
    patience: int,
    mode: str = "min",
    min_delta: float = 0.0,
    check_every: int = 10,
) -> Callback:
    """Stop when a column of the history has not improved for `patience` steps.

    Args:
      name: a column of the history, such as ``"value"`` or a metric's name. Rows where it is NaN (a
        metric between its evaluations) are passed over.
      patience: steps without improvement after which the run stops.
      mode: ``"min"`` or ``"max"``.
      min_delta: what counts as an improvement, in the column's units.
      check_every: steps between looks, to the step, so that a run ends where it always would.

    Returns:
      A callback for one run at a time; the next run begins anew.

    Raises:
      ValueError: for another mode, or counts below 1.
      KeyError: in the run, if the history has no such column.

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.early_stopping("accuracy", patience=50, mode="max").every
      10
    """
    patience = numbers.count(patience, "patience")
    mode, name = numbers.choice(mode, "mode", ("min", "max")), numbers.word(name, "name", "value")
    min_delta = numbers.positive(min_delta, "min_delta", zero=True)
    sign = 1 if mode == "min" else -1
    seen, best, best_row = 0, np.inf, -1

    def again() -> None:
        nonlocal seen, best, best_row
        seen, best, best_row = 0, np.inf, -1

    def stop(event: Event) -> bool:
        nonlocal seen, best, best_row
        history = event.history
        if name not in history:
            raise KeyError(
                f"early_stopping: got {name!r}; expected one of the history's columns: "
                f"{sorted(history)}."
            )
        column = history[name]
        if len(column) < seen:  # another run, whose beginning nobody told
            again()
        for row, value in enumerate((sign * column[seen:]).tolist(), seen):
            if value < best - min_delta:  # never so for NaN
                best, best_row = value, row
        seen = len(column)
        return seen - 1 - best_row >= patience

    every_n = numbers.count(check_every, "check_every")
    return of_one_run(Callback(stop, every_n, again, again))
