"""What may watch a run from outside: any function, called between compiled chunks of steps."""

from __future__ import annotations

import csv as csv_lib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevax import check
from bilevax._core import numbers


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

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.every(100, lambda event: print(event.step, event.history["value"][-1])).every
      100
    """
    if not callable(fn):
        raise TypeError(f"fn: got {check.describe(fn)}; expected a function of an Event.")
    return Callback(fn, numbers.count(n, "n"))


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

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.early_stopping("accuracy", patience=50, mode="max").every
      10
    """
    patience = numbers.count(patience, "patience")
    if mode not in ("min", "max"):
        raise ValueError(f"mode: got {mode!r}; expected 'min' or 'max'.")

    min_delta, check_every = numbers.positive(min_delta, "min_delta", zero=True), numbers.count(check_every, "check_every")

    def stop(event: Event) -> bool:
        if name not in event.history:
            raise KeyError(f"early_stopping: got {name!r}; expected one of the history's columns: {sorted(event.history)}.")
        column = event.history[name] if mode == "min" else -event.history[name]
        best, best_row = np.inf, -1
        for row in np.flatnonzero(~np.isnan(column)):
            if column[row] < best - min_delta:
                best, best_row = column[row], int(row)
        return len(column) - 1 - best_row >= patience

    return Callback(stop, check_every)


def progress_bar() -> Callback:
    """A progress bar by tqdm (extra ``progress``), with the outer value and the hypergradient's norm beside it.

    Returns:
      A callback; ``solve_bilevel(..., progress=True)`` adds it.

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


# ---- logs


def _new_rows(event: Event, written: int) -> Iterator[dict[str, Any]]:
    """The rows of this run from the `written`-th on, flat: a scalar or array a name, the parts of the aux as ``aux/name``."""
    flat = {}
    for name, column in event.history.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(column):
            flat["/".join([name, jax.tree_util.keystr(path, simple=True, separator="/")]) if path else name] = leaf
    rows = len(event.history["value"]) if event.history else 0
    for row in range(written, rows):
        yield {"step": event.step - event.done + row, **{name: np.asarray(leaf[row]) for name, leaf in flat.items()}}


def _logger(open_log: Callable[[int], tuple[Callable[[dict], None], Callable[[], None], Callable[[], None]]], every_n: int) -> Callback:
    """A callback that hands each new row to a log: ``open_log(step) -> (write, flush, close)``, with what the log has from `step` on dropped.

    A run that goes on from a state adds to its log, one that begins anew replaces it, and one that resumes from a checkpoint writes no row twice.
    """
    log: list = []
    written = 0

    def call(event: Event) -> None:
        nonlocal written
        rows = list(_new_rows(event, written))
        if not log and rows:
            log.extend(open_log(rows[0]["step"]))
        for row in rows:
            log[0](row)
        written += len(rows)
        if log:
            log[1]()

    def close() -> None:
        nonlocal written
        if log:
            log[2]()
        log.clear()
        written = 0

    return Callback(call, every_n, close)


def _target(path: str | os.PathLike) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: got {check.describe(path)}; expected a file name.")
    return Path(path)


def jsonl(path: str | os.PathLike, *, flush_every: int = 32) -> Callback:
    """Write the history to a file as it grows, a JSON object a step.

    Args:
      path: the file; its folder is made. What it has of the steps that are written now is replaced. Every object has ``step``, then a key
        for each column of the history; NaN and infinity are written as null.
      flush_every: steps between writes.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``.

    Raises:
      TypeError, ValueError: for a path that is none, or ``flush_every < 1``.

    Examples:
      >>> import pathlib, jax.numpy as jnp, optax, bilevax as bx
      >>> quadratic = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
      >>> algorithm = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.5))
      >>> outer = lambda y, x, batch: jnp.sum(y**2)
      >>> log = bx.callbacks.jsonl("run.jsonl")
      >>> solution = bx.solve_bilevel(quadratic, outer, jnp.zeros(2), jnp.ones(2), algorithm=algorithm, num_steps=3, callbacks=[log])
      >>> len(pathlib.Path("run.jsonl").read_text().splitlines())
      3
    """
    path = _target(path)

    def open_log(step):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < step] if path.exists() else []
        file = path.open("w")
        file.writelines(line + "\n" for line in kept)
        return lambda row: file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n"), file.flush, file.close

    return _logger(open_log, numbers.count(flush_every, "flush_every"))


def _plain(value) -> Any:
    """What JSON can hold, whose standard has no NaN."""
    value = np.asarray(value)
    if np.issubdtype(value.dtype, np.inexact) or value.dtype.name == "bfloat16":
        wide = value.astype(np.float64)
        kept = wide.astype(object)
        kept[~np.isfinite(wide)] = None
        return kept.tolist()
    return value.tolist()


def csv(path: str | os.PathLike, *, flush_every: int = 32) -> Callback:
    """Write the scalar columns of the history to a file as it grows, a line a step under one header.

    Args:
      path: the file; its folder is made. What it has of the steps that are written now is replaced.
      flush_every: steps between writes.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``.

    Raises:
      TypeError, ValueError: for a path that is none, or ``flush_every < 1``; in the run, if the file has another header.

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.csv("run.csv").every
      32
    """
    path = _target(path)

    def open_log(step):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(csv_lib.reader(path.read_text().splitlines())) if path.exists() else []
        kept = [line for line in lines[1:] if int(line[0]) < step]
        header = lines[0] if kept else []
        file = path.open("w", newline="")
        writer = csv_lib.writer(file)
        writer.writerows([header, *kept] if kept else [])

        def write(row):
            scalars = {name: value for name, value in row.items() if np.ndim(value) == 0}
            if not header:
                header.extend(scalars)
                writer.writerow(header)
            if header != list(scalars):
                raise ValueError(f"path: got {str(path)!r}, a log with the columns {header}; expected {list(scalars)}. Give another file name.")
            writer.writerow(scalars.values())

        return write, file.flush, file.close

    return _logger(open_log, numbers.count(flush_every, "flush_every"))


def tensorboard(directory: str | os.PathLike, *, flush_every: int = 32) -> Callback:
    """Write the scalar columns of the history for TensorBoard, by tensorboardX (extra ``tensorboard``).

    Args:
      directory: of the event files.
      flush_every: steps between writes.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``.

    Raises:
      ImportError: where tensorboardX is not installed.
      TypeError, ValueError: for a directory that is none, or ``flush_every < 1``.

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.tensorboard("logs").every
      32
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("callbacks.tensorboard needs tensorboardX; try pip install 'bilevax[tensorboard]'.") from error
    directory = _target(directory)

    def open_log(step):
        writer = SummaryWriter(str(directory), purge_step=step)

        def write(row):
            step = int(row["step"])
            for name, value in row.items():
                if name != "step" and np.ndim(value) == 0:
                    writer.add_scalar(name, float(value), step)

        return write, writer.flush, writer.close

    return _logger(open_log, numbers.count(flush_every, "flush_every"))


def as_callback(fn: Any, position: int) -> Callback:
    """A `Callback` of whatever was given."""
    if isinstance(fn, Callback):
        return fn
    if not callable(fn):
        raise TypeError(f"callbacks[{position}]: got {check.describe(fn)}; expected a function of an Event, or callbacks.every(n, fn).")
    return Callback(fn)


__all__ = ["Callback", "Event", "csv", "early_stopping", "every", "jsonl", "progress_bar", "tensorboard"]
