"""How a run ends that an error cut short: all that is open closed, and the error given what the run
has come to.
"""

from __future__ import annotations

from typing import Any

import jax

from bilevax.results import RESULTS


def closed(loop: Any, error: BaseException | None) -> BaseException | None:
    """Close all that is open, each whatever becomes of the others; the first error, with a note of
    those that followed.
    """
    closers = [w.close for w in loop.options.watchers if w.close is not None]
    if error is not None:
        closers = [*loop.last_rows(), *closers]
    if loop.store is not None:
        closers.append(loop.store.close)
    for close in [*closers, lambda: loop.peers.close(error)]:  # noqa: B023 (called at once)
        try:
            close()
        except BaseException as late:
            if error is None:
                error = late
            else:
                error.add_note(f"Closing the run then met {type(late).__name__}: {late}")
    return error


def attach(loop: Any, error: BaseException) -> None:
    """Give an error what the run has come to, as far as it is known."""
    result = loop.result if loop.over else RESULTS.stopped
    lost: Any = None
    try:
        deleted = any(
            leaf.is_deleted() for leaf in jax.tree.leaves(loop.run) if isinstance(leaf, jax.Array)
        )
        error.solution = None if deleted or not loop.run.code.is_ready() else loop.finish(result)  # type: ignore[attr-defined]
    except Exception as second:
        error.solution, lost = None, second  # type: ignore[attr-defined]
    if error.solution is not None:  # type: ignore[attr-defined]
        error.add_note("The run so far is in this error's .solution.")
        return
    saved = None if loop.store is None else loop.store.saved
    where = "nothing of it is saved" if saved is None else f"it is saved up to step {saved}"
    error.add_note(
        f"The state was in the call that did not return{f' ({lost})' if lost else ''}; {where}."
    )
