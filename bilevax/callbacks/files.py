"""Logs in files: a row a step, as the run goes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from bilevax import check
from bilevax._core import numbers
from bilevax.run import logfile
from bilevax.run.watch import Callback, Event, of_one_run


class Log(NamedTuple):
    """An open log: ``write(steps, columns)`` takes new rows, by column; ``there()`` says whether
    they are found where they are looked for.
    """

    write: Callable[[list[int], dict[str, np.ndarray]], None]
    flush: Callable[[], None]
    close: Callable[[], None]
    there: Callable[[], bool] = lambda: True


def _new_rows(event: Event, written: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """The rows of this run from the `written`-th on, flat: the parts of the aux are columns
    ``aux/name``.
    """
    flat = {}
    for name, column in event.history.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(column):
            end = jax.tree_util.keystr(path, simple=True, separator="/")
            flat[f"{name}/{end}" if path else name] = np.asarray(leaf)[written:]
    rows = len(event.history["value"]) if event.history else 0
    return list(range(event.start + written, event.start + rows)), flat


def logger(
    open_log: Callable[[int], Log],
    every_n: int,
    *,
    begin: Callable[[], Callable[[], None] | None] | None = None,
    restored: bool = True,
) -> Callback:
    """A callback that hands new rows to a log: ``open_log(step)`` opens one, with what it has from
    `step` on dropped.

    A run that goes on from a state adds to its log, one that begins anew replaces it. One that
    resumes from a checkpoint writes the rows that came back with it anew, or, without `restored`,
    goes on behind them. A log that somebody took away is written anew. What `begin` returns is
    called at the end.
    """
    log: list[Log] = []
    ends: list[Callable[[], None]] = []
    written = 0

    def start() -> None:
        end = None if begin is None else begin()
        if end is not None:
            ends.append(end)

    def call(event: Event) -> None:
        nonlocal written
        if not log and not restored:
            written = event.resumed
        if log and not log[0].there():
            warnings.warn(
                "callbacks: the file of a log was moved or deleted while the run wrote to it; it "
                "is written anew.",
                RuntimeWarning,
                stacklevel=2,
            )
            log.pop().close()
            written = 0
        steps, columns = _new_rows(event, written)
        if not steps:
            return
        if not log:
            log.append(open_log(steps[0]))
        log[0].write(steps, columns)
        written += len(steps)
        log[0].flush()

    def close() -> None:
        nonlocal written
        closers, written = [*(one.close for one in log), *ends], 0
        # first, since closing may fail, and the next run is to begin anew all the same
        log.clear()
        ends.clear()
        with contextlib.ExitStack() as stack:
            for one in reversed(closers):
                stack.callback(one)

    return of_one_run(Callback(call, every_n, close, start, exact=False))


def as_path(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """A place on this machine's file system, whatever becomes of the current folder."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument}: got {check.describe(path)}; expected a file name.")
    place = os.fspath(path)
    if not isinstance(place, str) or not place or "\0" in place or "://" in place:
        raise ValueError(
            f"{argument}: got {place!r}; expected a name on this machine's file system. Try a "
            "local file, and copy it afterwards."
        )
    return Path(os.path.abspath(place))


def _target(path: str | os.PathLike[str]) -> Path:
    place = as_path(path)
    if place.is_dir():
        raise IsADirectoryError(
            f"path: got {str(path)!r}, which is a folder; expected the name of a file."
        )
    return place


def _kept(path: Path, form: logfile.Form, step: int) -> logfile.Kept:
    """What a log keeps for a run that writes the steps from `step` on, with a word about an end
    that was cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return logfile.Kept(b"", [], True, None)
    found = logfile.kept(path, form, step)
    if found.cut is not None:
        warnings.warn(
            f"path: {os.fspath(path)!r} ends in a row that was cut off ({found.cut[:40]!r}), as a "
            "kill or a full disk leaves it; the row is dropped.",
            RuntimeWarning,
            stacklevel=5,
        )
    return found


def _replaceable(path: Path) -> bool:
    """Whether this is an ordinary file, or none yet; pipes and devices are only written to."""
    return path.is_file() or not path.exists()


def _checked(path: Path, form: logfile.Form) -> Callable[[], Callable[[], None]]:
    """Refuse, before the first step, a file that is no log, or another's; returns what gives it
    free.
    """

    def begin() -> Callable[[], None]:
        if path.is_file():
            logfile.refuse_foreign(path, form)
        return logfile.claim(path)

    return begin


def _anew(path: Path, text: bytes, whole: bool = False) -> TextIO:
    """The file with this text, open for more; pipes and devices are only written to. It is `whole`
    where that is what it holds.
    """
    if _replaceable(path) and not whole:
        logfile.append(path).close()  # refused where another process has it
        logfile.replace(path, text)
    return logfile.append(path)


def jsonl(path: str | os.PathLike[str], *, flush_every: int = 32) -> Callback:
    """Write the history to a file as it grows, a JSON object a step.

    Args:
      path: the file; its folder is made. What it has of the steps that are written now is replaced,
        and a last row that was cut off (by a kill, by a full disk) is dropped with a warning. Every
        object has ``step``, then a key for each column of the history; numbers are read back
        exactly, NaN and infinity are written as null.
      flush_every: steps after which new rows are written, at the end of the chunk in progress.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``.

    Raises:
      TypeError, ValueError: for a path that is none, or ``flush_every < 1``; in the run, before its
        first step, if the file is no log.

    Examples:
      >>> import pathlib, jax.numpy as jnp, optax, bilevax as bx
      >>> quadratic = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
      >>> solver, method = bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit()
      >>> algorithm = bx.algorithms.double_loop(solver, method, optax.sgd(0.5))
      >>> outer = lambda y, x, batch: jnp.sum(y**2)
      >>> log = bx.callbacks.jsonl("run.jsonl")
      >>> solution = bx.solve_bilevel(
      ...     quadratic,
      ...     outer,
      ...     jnp.zeros(2),
      ...     jnp.ones(2),
      ...     algorithm=algorithm,
      ...     num_steps=3,
      ...     callbacks=[log],
      ... )
      >>> len(pathlib.Path("run.jsonl").read_text().splitlines())
      3
    """
    path = _target(path)

    def open_log(step: int) -> Log:
        kept = _kept(path, logfile.JSONL, step)
        file = _anew(path, kept.text, kept.whole)

        def write(steps, columns):
            names = (json.dumps(name).replace("%", "%%") for name in ("step", *columns))
            cells = [Cells("%d", steps), *map(_json, columns.values())]
            parts = (f"{name}: {cell.form}" for name, cell in zip(names, cells, strict=True))
            file.write(_lines(f"{{{', '.join(parts)}}}\n", cells))

        return Log(write, file.flush, file.close, lambda: logfile.still_there(path, file))

    begin = _checked(path, logfile.JSONL)
    return logger(open_log, numbers.count(flush_every, "flush_every"), begin=begin)


class Cells(NamedTuple):
    """A column as a row shows it: the place in a format, and what goes there, row by row; nothing
    where all rows show the same.
    """

    form: str
    values: list[Any] | None


def _lines(row: str, cells: list[Cells]) -> str:
    """Rows as a text: in one call, which long runs of short steps feel."""
    columns = [cell.values for cell in cells if cell.values is not None]
    rows = zip(*columns, strict=True)
    return row * len(columns[0]) % tuple(itertools.chain.from_iterable(rows))


def _json(column: np.ndarray) -> Cells:
    """The rows of a column as JSON has them, whose standard has no NaN."""
    if column.ndim > 1 or column.dtype == bool:
        return Cells("%s", [json.dumps(_plain(value)) for value in column])
    if not _is_float(column) or np.isfinite(column).all():
        return _cells(column)
    finite = np.isfinite(column).tolist()
    texts = zip(_texts(column), finite, strict=True)
    return Cells("%s", [text if fine else "null" for text, fine in texts])


def _cells(column: np.ndarray) -> Cells:
    """Scalars as they are read back exactly."""
    if len(column) > 1 and (column == column[0]).all():
        return Cells(_texts(column[:1])[0], None)
    if not _is_float(column):
        return Cells("%s", column.tolist())
    if column.dtype.itemsize <= 4:  # nine digits are all that they have
        return Cells("%.9g", column.astype(np.float64).tolist())
    return Cells("%r", column.tolist())


def _texts(column: np.ndarray) -> list[str]:
    """The same, a text a row."""
    form, values = _cells(column)
    return [form] * len(column) if values is None else [form % value for value in values]


def _is_float(column: np.ndarray) -> bool:
    return np.issubdtype(column.dtype, np.floating) or column.dtype.name == "bfloat16"


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    value = np.asarray(value)
    if np.issubdtype(value.dtype, np.inexact) or value.dtype.name == "bfloat16":
        wide = value.astype(np.float64)
        if np.isfinite(wide).all():
            return wide.tolist()
        kept = wide.astype(object)
        kept[~np.isfinite(wide)] = None
        return kept.tolist()
    return value.tolist()


def csv(path: str | os.PathLike[str], *, flush_every: int = 32) -> Callback:
    """Write the scalar columns of the history to a file as it grows, a line a step under one
    header.

    Args:
      path: the file; its folder is made. What it has of the steps that are written now is replaced,
        and a last row that was cut off is dropped with a warning. Numbers are read back
        exactly. Columns that begin or end in the
        middle (metrics that were added to a run, or left out) are empty where they are not.
      flush_every: steps after which new rows are written, at the end of the chunk in progress.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``.

    Raises:
      TypeError, ValueError: for a path that is none, or ``flush_every < 1``; in the run, before its
        first step, if the file is no log.

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.csv("run.csv").every
      32
    """
    path = _target(path)

    def open_log(step: int) -> Log:
        kept = _kept(path, logfile.CSV, step)
        header, file = kept.header, _anew(path, kept.text, kept.whole)

        def write(steps, columns):
            nonlocal header, file
            scalar = {n: _cells(c) for n, c in columns.items() if c.ndim == 1}
            scalar = {"step": Cells("%d", steps), **scalar}
            new = [name for name in scalar if name not in header]
            if new and header and _replaceable(path):
                file.close()
                header = header + new
                before = logfile.read_csv(path).rows
                table = [header, *([row.get(name, "") for name in header] for _, _, row in before)]
                file = _anew(path, logfile.as_text(list(map(logfile.csv_line, table))))
            elif new:
                header = new
                file.write(logfile.csv_line(header) + "\n")
            cells = [scalar.get(name, Cells("", None)) for name in header]
            file.write(_lines(",".join(cell.form for cell in cells) + "\n", cells))

        return Log(
            write,
            lambda: file.flush(),
            lambda: file.close(),
            lambda: logfile.still_there(path, file),
        )

    begin = _checked(path, logfile.CSV)
    return logger(open_log, numbers.count(flush_every, "flush_every"), begin=begin)
