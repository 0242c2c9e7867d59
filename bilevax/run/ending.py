"""How a run ends: what is said of it and, where an error cut it short, all that is open closed, and
the error given what the run has come to.
"""

from __future__ import annotations

import time
from typing import Any

import jax

from bilevax._core.settings import name_of
from bilevax.results import RESULTS, failed


def closed(loop: Any, error: BaseException | None) -> BaseException | None:
    """Close all that is open, each whatever becomes of the others; the first error, with a note of
    those that followed.
    """
    closers = [w.close for w in loop.begun if w.close is not None]
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


def late(result: RESULTS, heard: Any, processes: int) -> RESULTS:
    """The result of a run whose last steps, or last save, a signal met: there was nothing left to
    cut short, but who sent it is to be heard. Of several processes, which must go on alike, only
    an interrupt is.
    """
    if heard.interrupt and not result.failed:
        return RESULTS.interrupted
    if heard.terminate and result is RESULTS.success and processes == 1:
        return RESULTS.preempted
    return result


def attach(loop: Any, error: BaseException) -> None:
    """Give an error what the run has come to, as far as it is known."""
    result = loop.result if loop.over else RESULTS.stopped
    lost: Any = None
    # any exception takes an attribute, which the type of exceptions does not say
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


def stats(loop: Any, rows: dict[str, Any]) -> dict[str, Any]:
    """What is said of a run beside its result: ``Solution.stats``."""
    out: dict[str, Any] = {
        "steps": int(loop.run.step) - loop.start,
        "total_steps": int(loop.run.step),
        "seconds": time.perf_counter() - loop.begin,
        "first_chunk_seconds": loop.first_chunk,
        "best_step": int(loop.run.step) if loop.run.best is None else int(loop.run.best.step),
        "failed_steps": int(failed(rows["code"]).sum()) if rows else 0,
        "resumed_from": loop.resumed,
        "algorithm": name_of(loop.plan.algorithm.step),
    }
    begun, ended = loop.history.names()
    if begun or ended:
        out["columns"] = {"begun": begun, "ended": ended}
    if loop.store is not None:
        out["checkpoint_seconds"] = loop.store.seconds
        if loop.store.continued is not None:
            out["continued"] = loop.store.continued
    return out
