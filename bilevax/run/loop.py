"""Compiled chunks of steps, and what the host does between them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bilevax._core.peers import Peers
from bilevax.results import RESULTS, SolveError, failed
from bilevax.run import chunk, watch
from bilevax.run import store as store_lib
from bilevax.run.chunk import CHUNK, Plan, RunState
from bilevax.run.history import History
from bilevax.run.options import Options
from bilevax.run.recovery import Recovery
from bilevax.run.signals import Signals
from bilevax.run.solution import Solution
from bilevax.run.window import Window

LONGEST, QUICK = 4096, 0.1  # a call takes at most so many steps in about so many seconds: a failure or a signal is to be seen soon
GROWTH = 16  # the first calls are of one step, whose time nobody knows; each later one is at most so many times longer


class Loop:
    """A run on its way: where it stands, and how it goes on."""

    def __init__(self, plan: Plan, static, dynamic, run: RunState, sources, solution: Callable, options: Options):
        self.plan, self.static, self.dynamic, self.options = plan, static, dynamic, options
        self.run, self._solution = run, solution
        self.begin, self.start, self.first_chunk = time.perf_counter(), int(run.step), 0.0
        put = None if plan.layout is None else plan.layout.put_window
        self.window = Window(sources, options.num_steps, options.read_ahead, put)
        self.capacity = self.window.capacity if self.window.streaming else LONGEST if plan.layout is None else CHUNK
        self.length, self.each = 1, None  # steps of the next call, seconds a step
        self.history, self.recovery = History(), Recovery(options.on_failure)
        self.store: store_lib.Store | None = None
        self.peers, self.result, self.done, self.resumed = Peers(), RESULTS.success, 0, self.start
        self.called = dict.fromkeys(range(len(options.watchers)), 0)  # steps done when each watcher was called last

    # ---- the parts of a round

    def open(self, fingerprint: Callable[[], dict[str, Any]]) -> None:
        """Go on from a checkpoint where there is one."""
        options = self.options
        for watcher in options.watchers:
            if watcher.begin is not None:
                watcher.begin()
        if options.checkpoint is not None:
            self.store = store_lib.Store(options.checkpoint, self.start, fingerprint())
            if (found := self.store.restore(self.run, self.recovery.state(self.run))) is not None:
                self.run, recovery, rows = found
                self.history = History(rows)
                self.recovery.resume(recovery)
        self.resumed, self.result = int(self.run.step), RESULTS(int(self.run.code))
        self.done = self.resumed - self.start
        if self.store is not None and self.done > options.num_steps:
            raise ValueError(
                f"num_steps: got {options.num_steps}, fewer than the {self.done} steps that {self.store.spec.directory!r} has of this run; "
                "expected at least as many. Give this run a directory of its own."
            )
        self.called = dict.fromkeys(self.called, self.done)
        self.window.seek(self.resumed)

    @property
    def over(self) -> bool:
        return self.done >= self.options.num_steps or self.result is not RESULTS.success

    def steps(self) -> None:
        """One call of compiled steps: up to where somebody wants to look."""
        due = [every - self.done % every for every in map(self._every, self.options.watchers) if every]
        if self.store is not None:
            due.append(self.store.spec.every - (self.start + self.done) % self.store.spec.every)
        due.append(self.recovery.before(self.run, self.done))
        n = min([self.length, self.capacity, self.options.num_steps - self.done, *due])
        data, steps = self.window.read(self.start + self.done, n)
        if steps:
            since, first = time.perf_counter(), self.start + self.done
            self.run, rows, count = chunk.run_chunk(self.static, self.capacity, self.run, self.dynamic, data, steps)
            self.window.prefetch(self.length, self.start + self.options.num_steps)
            self.peers.wait(count)
            count = int(count)
            if self.plan.metrics is not None:
                rows = self.plan.metrics.read(jax.tree.map(np.asarray, rows), first, np)
            self.history.append(rows, count)
            self.done += count
            self._pace((time.perf_counter() - since) / max(count, 1))
            self.run, self.result = self.recovery.after(self.run, count)
            self.window.done(count)
        if self.window.exhausted and not self.over:
            self.result = RESULTS.data_exhausted

    def _every(self, watcher: watch.Callback) -> int | None:
        """Steps between two calls that a chunk is cut short for."""
        return (watcher.every or min(self.capacity, CHUNK)) if watcher.exact else None

    def _pace(self, each: float) -> None:
        """The length of the next call, by the time of this one. That of the first is mostly compilation."""
        if not self.first_chunk:
            self.first_chunk = time.perf_counter() - self.begin
            return
        self.length = max(1, min(int(QUICK / each), GROWTH * self.length))

    def look(self, heard: Signals) -> None:
        """Callbacks, signals, and what the other processes say of theirs."""
        over, stop = self.over, False
        event = None
        for i, watcher in enumerate(self.options.watchers):
            since, every = self.done - self.called[i], watcher.every or min(self.capacity, CHUNK)
            if over or (self.done % every == 0 if watcher.exact else since >= every):
                self.called[i] = self.done
                step, steps = int(self.run.step), self.options.num_steps
                resumed = self.resumed - self.start
                event = event or watch.Event(step, self.done, steps, self.history.all(), self.run, self.start, resumed)
                stop = bool(watcher.fn(event)) or stop
        said = self.peers.gather([stop, heard.terminate, heard.interrupt, self.length])
        stop, terminate, interrupt = (any(one[i] for one in said) for i in range(3))
        self.length = min(one[3] for one in said)
        if not over and (stop or terminate or interrupt):
            self.result = RESULTS.interrupted if interrupt else RESULTS.preempted if terminate else RESULTS.stopped

    def save(self) -> None:
        """Save the run where that is due."""
        step = self.start + self.done
        if self.store is None:
            return
        self.store.renew()
        due = self.over or step % self.store.spec.every == 0
        if due and self.store.saved != step and not self.result.failed:
            self.store.save(self.run, self.recovery.state(self.run), self.history.flat(), step)

    def finish(self, result: RESULTS) -> Solution:
        """What the run has come to."""
        rows = self.history.copy()
        stats: dict[str, Any] = {
            "steps": int(self.run.step) - self.start,
            "total_steps": int(self.run.step),
            "seconds": time.perf_counter() - self.begin,
            "first_chunk_seconds": self.first_chunk,
            "best_step": int(self.run.step) if self.run.best is None else int(self.run.best.step),
            "failed_steps": int(failed(rows["code"]).sum()) if rows else 0,
            "resumed_from": self.resumed,
            "algorithm": getattr(self.plan.algorithm.step, "name", getattr(self.plan.algorithm.step, "__name__", "")),
        }
        if self.store is not None:
            stats["checkpoint_seconds"] = self.store.seconds
            if self.store.continued is not None:
                stats["continued"] = self.store.continued
        return self._solution(self.run, result, rows, stats)


def drive(loop: Loop, fingerprint: Callable[[], dict[str, Any]]) -> Solution:
    """Chunk after chunk until the steps are done, a failure, the tolerance, or a word from outside."""
    options, error = loop.options, None
    numbers = (signal.SIGINT,) if options.checkpoint is None else (signal.SIGINT, signal.SIGTERM)
    with Signals(numbers) as heard:
        try:
            loop.open(fingerprint)
            while not loop.over:
                loop.steps()
                loop.look(heard)
                loop.save()
        except BaseException as first:
            error = first
        error = _closed(loop, error)
    if error is None and loop.result is RESULTS.interrupted and options.throw:
        error = KeyboardInterrupt()
    if error is not None:
        _attach(loop, error)
        raise error
    result = loop.result
    if result is RESULTS.success and options.tol is not None:
        result = RESULTS.tolerance_not_met
    out = loop.finish(result)
    if options.throw and result.failed:
        raise SolveError(result, out, f" at step {out.stats['total_steps']}")
    return out


def _closed(loop: Loop, error: BaseException | None) -> BaseException | None:
    """Close all that is open, each whatever becomes of the others; the first error, with a note of those that followed."""
    closers = [w.close for w in loop.options.watchers if w.close is not None]
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


def _attach(loop: Loop, error: BaseException) -> None:
    """Give an error what the run has come to, as far as it is known."""
    result = loop.result if loop.over else RESULTS.stopped
    lost: Any = None
    try:
        deleted = any(leaf.is_deleted() for leaf in jax.tree.leaves(loop.run) if isinstance(leaf, jax.Array))
        error.solution = None if deleted or not loop.run.code.is_ready() else loop.finish(result)  # type: ignore[attr-defined]
    except Exception as second:
        error.solution, lost = None, second  # type: ignore[attr-defined]
    if error.solution is not None:  # type: ignore[attr-defined]
        error.add_note("The run so far is in this error's .solution.")
        return
    saved = None if loop.store is None else loop.store.saved
    where = "nothing of it is saved" if saved is None else f"it is saved up to step {saved}"
    error.add_note(f"The state was in the call that did not return{f' ({lost})' if lost else ''}; {where}.")
