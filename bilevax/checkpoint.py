"""Where runs are saved, so that they survive."""

from __future__ import annotations

import os
from typing import NamedTuple

from bilevax import check
from bilevax._core import numbers


class Checkpointing(NamedTuple):
    """Where a run is saved, every how many steps, and how many checkpoints stay."""

    directory: str
    every: int
    keep: int
    resume: str = "refuse"


def every(
    n: int, directory: str | os.PathLike[str], *, keep: int = 3, resume: str = "refuse"
) -> Checkpointing:
    """Save the run every `n` steps, and resume from what is there.

    A run that is started again with the same arguments and directory goes on from its newest
    checkpoint, the order of its data included, and ends with the same bits on the same devices; on
    another number of devices they are equal to rounding. Its `Solution` is that of the undisturbed
    run: the history is saved, too, and ``num_steps`` counts from the first start. An iterable of
    batches is read from its beginning and passed over to the place where the run stands.

    Saving overlaps with the next steps. SIGTERM (what schedulers send before they take a machine
    away) saves at the end of the chunk in progress and ends the run with ``RESULTS.preempted``;
    SIGINT (Ctrl-C) does so, too, and raises KeyboardInterrupt with ``.solution`` (with
    ``throw=False`` the result is ``RESULTS.interrupted``); a second one raises at once. One that
    comes in the last steps or the last save is heard as well. Chunks take about a tenth of a
    second, or one step. A run that is killed without a word loses what it did since its last save.
    Any error, that of the last save included, carries ``.solution``.

    A checkpoint that cannot be read back exactly (cut off, altered by as little as one bit,
    incomplete) is reported by a warning that names it, put aside as ``damaged_step_<n>``, and the
    one before it is used.

    A checkpoint carries the fingerprint of its problem: a digest each of the objectives, the
    projection and the algorithm's step as they are traced, with all their numbers and what they
    close over, of data that is held in arrays, the start and the key. What differs is named, and
    the checkpoint refused. ``num_steps`` (but no fewer than are saved), callbacks, metrics, `keep`,
    `tol` and the sharding may change: a run that has converged goes on to a smaller `tol`, metrics
    that were added or left out are NaN where they are not. Functions and loaders that give data are
    compared by what is traced of them alone. One writer at a time: a directory in which another run
    writes is refused, here as long as that process lives, elsewhere for a minute after its last
    sign of life.

    Args:
      n: steps between two saves, at least 1. The end of the run is saved as well.
      directory: a folder of this run alone, made if need be; with several processes, one that all
        of them see.
      keep: how many checkpoints stay, at least 1. With 1 a damaged newest one has none before it.
      resume: what becomes of a checkpoint of another problem. ``"refuse"``: an error.
        ``"continue"``: the run goes on from its parameters, and from whatever state has the same
        structure; the rest (the kept iterate always) begins anew. ``stats["continued"]`` names what
        differs, what was taken and what was not.

    Returns:
      A value for ``solve_bilevel(..., checkpoint=...)`` or ``solve_multilevel(...,
      checkpoint=...)``. Needs the extra ``checkpoint``.

    Raises:
      TypeError, ValueError: for arguments of another kind; in the run, for a directory that holds
        checkpoints of another problem, another key, or of a run that started elsewhere;
        RuntimeError if all checkpoints in it are damaged.

    Examples:
      >>> import tempfile, jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: 0.5 * jnp.sum((y - 3.0) ** 2)
      >>> algorithm = bx.algorithms.double_loop(
      ...     bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.1)
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     saved = bx.checkpoint.every(10, folder)
      ...     run = lambda steps: bx.solve_bilevel(
      ...         inner,
      ...         outer,
      ...         jnp.zeros(2),
      ...         jnp.zeros(2),
      ...         algorithm=algorithm,
      ...         num_steps=steps,
      ...         checkpoint=saved,
      ...     )
      ...     first, more = run(20), run(30)  # does the last ten steps
      >>> first.stats["resumed_from"], more.stats["resumed_from"], len(more.history["value"])
      (0, 20, 30)
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: got {check.describe(directory)}; expected a path.")
    place = os.fspath(directory)
    if not isinstance(place, str) or not place or "\0" in place:
        raise ValueError(f"directory: got {place!r}; expected a path. Try 'runs/first'.")
    resume = numbers.choice(resume, "resume", ("refuse", "continue"))
    place = place if "://" in place else os.path.abspath(place)
    return Checkpointing(place, numbers.count(n, "n"), numbers.count(keep, "keep"), resume)


def __dir__() -> list[str]:
    return __all__


__all__ = ["Checkpointing", "every"]
