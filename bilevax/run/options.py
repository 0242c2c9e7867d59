"""The arguments of a driver that say how to run and not what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from bilevax import check
from bilevax import checkpoint as checkpoint_lib
from bilevax._core import numbers
from bilevax.results import strictness
from bilevax.run import watch
from bilevax.run.metrics import Metrics
from bilevax.run.metrics import metrics as as_metrics
from bilevax.sharding import placement

# ---- the part that every driver shares


class Options(NamedTuple):
    """The arguments of a driver that say how to run and not what."""

    num_steps: int
    metrics: Metrics | None
    tol: Any  # a number, which may be traced, or None
    keep: str
    watchers: list[Any]
    throw: bool
    on_failure: str
    checkpoint: checkpoint_lib.Checkpointing | None
    sharding: placement.Sharding | None
    read_ahead: int | None = None
    strict: int = 0  # the mask of the warnings that are failures
    name: str = "solve_bilevel"  # the driver's, for messages


def check_options(
    num_steps: Any,
    metrics: Any,
    tol: Any,
    keep: Any,
    callbacks: Any,
    progress: Any,
    throw: Any,
    *,
    on_failure: Any = "stop",
    checkpoint: Any = None,
    sharding: Any = None,
    read_ahead: Any = None,
    strict: Any = False,
    name: str = "solve_bilevel",
) -> Options:
    """`Options`, or an error that names the argument."""
    num_steps = numbers.count(num_steps, "num_steps")
    if num_steps >= 2**31:
        raise ValueError(
            f"num_steps: got {num_steps}; expected fewer than 2**31, since steps are counted in 32 "
            "bits."
        )
    numbers.choice(keep, "keep", ("best", "last"))
    numbers.choice(on_failure, "on_failure", ("stop", "skip", "rollback"))
    if tol is not None:
        tol = numbers.positive(tol, "tol", example=1e-3)
    progress, throw = numbers.flag(progress, "progress"), numbers.flag(throw, "throw")
    if isinstance(callbacks, (str, bytes)) or not isinstance(callbacks, Sequence):
        raise TypeError(
            f"callbacks: got {check.describe(callbacks)}; expected a sequence of functions. Try "
            "callbacks=[fn]."
        )
    if checkpoint is not None and not isinstance(checkpoint, checkpoint_lib.Checkpointing):
        raise TypeError(
            f"checkpoint: got {check.describe(checkpoint)}; expected checkpoint.every(n, "
            "directory), or None."
        )
    placement.check_sharding(sharding)
    read_ahead = None if read_ahead is None else numbers.count(read_ahead, "read_ahead")
    watchers = [watch.as_callback(fn, i) for i, fn in enumerate(callbacks)]
    if progress and jax.process_index() == 0:
        watchers.append(watch.progress_bar())
    if metrics is not None and not isinstance(metrics, Metrics):
        metrics = as_metrics(metrics)
    return Options(
        num_steps,
        metrics,
        tol,
        keep,
        watchers,
        throw,
        on_failure,
        checkpoint,
        sharding,
        read_ahead,
        strictness(strict),
        name,
    )
