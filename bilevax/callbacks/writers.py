"""Logs of other packages, through one protocol: ``write_scalars(step, scalars)``. Each package is
imported when its writer is made.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from bilevax import check
from bilevax._core import numbers
from bilevax.callbacks.files import Log, as_path, logger
from bilevax.run.watch import Callback


class ScalarWriter(Protocol):
    """Whatever takes numbers by name: the writers of ``clu.metric_writers``, or three lines of
    one's own.

    It may have ``flush()``, too, which is called after each bundle of steps.
    """

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take the numbers of one step."""


def _log(
    write_scalars: Callable[[int, dict[str, float]], None],
    flush: Callable[[], None],
    close: Callable[[], None],
) -> Log:
    def write(steps, columns):
        scalar = {n: c.astype(np.float64).tolist() for n, c in columns.items() if c.ndim == 1}
        for step, *row in zip(steps, *scalar.values(), strict=True):
            # NaN is what a metric has between its evaluations; neither it nor infinity can be
            # drawn.
            named = zip(scalar, row, strict=True)
            write_scalars(step, {name: value for name, value in named if math.isfinite(value)})

    return Log(write, flush, close)


def scalars(writer: ScalarWriter, *, flush_every: int = 32) -> Callback:
    """Write the scalar columns of the history by any writer that has ``write_scalars(step,
    scalars)``.

    Args:
      writer: yours, and yours to close. Numbers that are not finite are left out.
      flush_every: steps after which new rows are written, at the end of the chunk in progress.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``. A run that resumes from a checkpoint
      writes only what it does itself.

    Raises:
      TypeError, ValueError: for a writer without the method, or ``flush_every < 1``.

    Examples:
      >>> import bilevax as bx
      >>> class Printer:
      ...     def write_scalars(self, step, scalars):
      ...         print(step, scalars["value"])
      >>> bx.callbacks.scalars(Printer()).every
      32
    """
    if not callable(getattr(writer, "write_scalars", None)) or isinstance(writer, type):
        raise TypeError(
            f"writer: got {check.describe(writer)}; expected an object with write_scalars(step, "
            "scalars), such as clu.metric_writers.create_default_writer(...)."
        )
    flush = getattr(writer, "flush", lambda: None)
    log = _log(writer.write_scalars, flush, lambda: None)
    return logger(lambda step: log, numbers.count(flush_every, "flush_every"), restored=False)


def tensorboard(directory: str | os.PathLike[str], *, flush_every: int = 32) -> Callback:
    """Write the scalar columns of the history for TensorBoard, by tensorboardX (extra
    ``tensorboard``).

    Args:
      directory: of the event files. Numbers that are not finite are left out.
      flush_every: steps after which new rows are written, at the end of the chunk in progress.

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
        raise ImportError(
            "callbacks.tensorboard needs tensorboardX; try pip install 'bilevax[tensorboard]'."
        ) from error
    place = as_path(directory, "directory")

    def open_log(step: int) -> Log:
        writer = SummaryWriter(str(place), purge_step=step)

        def write_scalars(step, row):
            for name, value in row.items():
                writer.add_scalar(name, value, step)

        return _log(write_scalars, writer.flush, writer.close)

    return logger(open_log, numbers.count(flush_every, "flush_every"))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"callbacks.{name} needs {name}; try pip install 'bilevax[{name}]'."
        ) from error


def _needs(name: str) -> None:
    _package(name)


def wandb(run: Any = None, *, flush_every: int = 32, **settings: Any) -> Callback:
    """Write the scalar columns of the history to Weights & Biases (extra ``wandb``).

    The x axis is the column ``step``, so that a run which resumes, and one that goes on from a
    state, continue their curves.

    Args:
      run: what ``wandb.init`` returned, yours to finish; None begins one with the run, by
        `settings`, and finishes it at the end.
      flush_every: steps after which new rows are written, at the end of the chunk in progress.
      **settings: of ``wandb.init``: ``project=``, ``mode="offline"``, ``dir=``, ...

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``. A run that resumes from a checkpoint
      writes only what it does itself.

    Raises:
      ImportError: in the run, before its first step, where wandb is not installed.
      TypeError, ValueError: for a run that is none, settings beside a run, or ``flush_every < 1``.

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.wandb(project="bilevel", mode="offline").every
      32

    Source: https://docs.wandb.ai/ref/python (``init``, ``define_metric``, ``log``).
    """
    if run is not None and not (
        callable(getattr(run, "log", None)) and hasattr(run, "define_metric")
    ):
        raise TypeError(
            f"run: got {check.describe(run)}; expected what wandb.init returns, or None."
        )
    if run is not None and settings:
        raise ValueError(f"settings: got {sorted(settings)} beside a run; expected one of the two.")

    def open_log(step: int) -> Log:
        own = _package("wandb").init(**settings) if run is None else run
        own.define_metric("step")
        own.define_metric("*", step_metric="step")
        end = own.finish if run is None else lambda: None
        return _log(lambda step, row: own.log({**row, "step": step}), lambda: None, end)

    return logger(
        open_log,
        numbers.count(flush_every, "flush_every"),
        begin=lambda: _needs("wandb"),
        restored=False,
    )


def mlflow(run_id: str | None = None, *, flush_every: int = 32, **settings: Any) -> Callback:
    """Write the scalar columns of the history to MLflow (extra ``mlflow``).

    Args:
      run_id: of a run that exists; None begins one with the run, by `settings`, and ends it at the
        end.
      flush_every: steps after which new rows are written, at the end of the chunk in progress.
      **settings: of ``MlflowClient.create_run``: ``run_name=``, ``experiment_id=``, ``tags=``, ...
        Where the
        runs are is MLflow's own setting: ``mlflow.set_tracking_uri("sqlite:///runs.db")``.

    Returns:
      A callback for ``solve_bilevel(..., callbacks=[...])``. A run that resumes from a checkpoint
      writes only what it does itself.

    Raises:
      ImportError: in the run, before its first step, where mlflow is not installed.
      TypeError, ValueError: for a `run_id` that is none, settings beside it, or ``flush_every <
        1``.

    Examples:
      >>> from bilevax import callbacks
      >>> callbacks.mlflow(run_name="first").every
      32

    Source: https://mlflow.org/docs/latest/api_reference (``MlflowClient.log_batch``).
    """
    if run_id is not None and not isinstance(run_id, str):
        raise TypeError(f"run_id: got {check.describe(run_id)}; expected a run's id, or None.")
    if run_id is not None and settings:
        raise ValueError(
            f"settings: got {sorted(settings)} beside run_id; expected one of the two."
        )

    def open_log(step: int) -> Log:
        package = _package("mlflow")
        client = package.MlflowClient()
        own = run_id or client.create_run(**{"experiment_id": "0", **settings}).info.run_id
        waiting: list[Any] = []

        def write_scalars(step, row):
            now = int(time.time() * 1000)
            waiting.extend(
                package.entities.Metric(name, value, now, step) for name, value in row.items()
            )

        def flush():
            while waiting:
                client.log_batch(own, metrics=waiting[:1000])  # as many as it takes at once
                del waiting[:1000]

        def close():
            flush()
            if run_id is None:
                client.set_terminated(own)

        return _log(write_scalars, flush, close)

    return logger(
        open_log,
        numbers.count(flush_every, "flush_every"),
        begin=lambda: _needs("mlflow"),
        restored=False,
    )
