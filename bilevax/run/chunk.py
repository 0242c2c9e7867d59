"""A run: chunks of steps of an algorithm, each one compiled program, and what the host does between
them.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import results, tree
from bilevax._core import numbers
from bilevax._core.peers import Peers
from bilevax._core.refusal import undifferentiable
from bilevax._core.settings import name_of
from bilevax.base import join
from bilevax.results import RESULTS, SolveError, as_warning, strictly, warning
from bilevax.run import store as store_lib
from bilevax.run import watch
from bilevax.run.ending import attach, closed, late, stats
from bilevax.run.feeds import afterwards, feeds, orders
from bilevax.run.history import History
from bilevax.run.judging import improves, lost, settled, undone, watched
from bilevax.run.recovery import Recovery
from bilevax.run.rows import packing, row_of, write
from bilevax.run.signals import Signals
from bilevax.run.solution import Solution
from bilevax.run.state import CHUNK, Best, Plan, Ready, RunState
from bilevax.run.waiting import compiling
from bilevax.run.window import Window, stream_of
from bilevax.sharding.report import Compiled

MOST_VALUES = 2**18  # a call takes more steps only where their history is that small
# a call takes at most so many steps in about so many seconds: a failure or a signal is seen soon
LONGEST, QUICK = 4096, 0.1
# bytes of a state that may be kept while a call goes past steps that somebody looks at
LOOK_BACK = 2**26
# the first calls are of one step, whose time nobody knows; each later one may be this much longer
GROWTH = 16


# ---- one step, and many of them as one program


def one_step(
    plan: Plan, state: RunState, data: tuple[Any, ...], known: tuple[Any, ...] | None = None
) -> tuple[RunState, dict[Any, Any]]:
    """One step of the algorithm and what the driver adds to it: the row of the history, the kept
    iterate, the stop and the undo.
    """
    algorithm, info = plan.algorithm.step(
        plan.problem, state.algorithm, feeds(plan, state, data, known)
    )
    inner, outer = info.point
    code, warned = as_warning(info.code)
    watch, diverged = watched(state.watch, info, state.step)
    warnings = warned | info.warnings | diverged | plan.warnings
    code, gone = strictly(code, warnings, plan.strict), lost(algorithm)
    stopped = results.failed(code)
    code, failed = jnp.where(stopped | (gone == 0), code, gone), stopped | (gone != 0)
    row = {
        "value": info.value,
        "grad_norm": info.grad_norm,
        "code": code,
        "warnings": warnings,
        **info.diagnostics,
    }
    score = info.value
    if plan.metrics is not None:
        measured = plan.metrics.row(inner.params, outer, inner.model, state.step)
        if taken := sorted(set(measured) & set(row)):
            raise ValueError(
                f"metrics: got the names {taken}, which are columns of the history already; "
                f"expected others than {sorted(row)}."
            )
        row.update(plan.metrics.written(measured, state.step))
        if plan.metrics.select is not None:
            score = measured[plan.metrics.select] * (1 if plan.metrics.mode == "min" else -1)
            unusable = warning(
                ~jnp.isfinite(score) & (state.step % plan.metrics.every == 0),
                RESULTS.metric_nonfinite,
            )
            warnings, row["warnings"] = warnings | unusable, warnings | unusable
    if info.aux is not None:
        row["aux"] = info.aux

    grad_norm = jnp.asarray(info.grad_norm, state.first_norm.dtype)
    if plan.tol is None:
        first_norm, converged = (
            state.first_norm,
            jnp.asarray(False),
        )  # `_chunk` finds it out afterwards
    else:
        first_norm = jnp.where(
            (state.first_norm == 0) & ~failed, grad_norm, state.first_norm
        )  # of the first step that did not fail
        # An adjoint that starts at zero can make the first direction zero anywhere: twice in a row,
        # and it is a solution.
        converged = (
            ~failed
            & (warnings == 0)
            & (grad_norm <= plan.tol * first_norm)
            & ((first_norm > 0) | (state.step > 0))
        )
        converged &= settled(watch, info, plan.tol)
    best = state.best
    if best is not None:
        score = jnp.asarray(score, best.score.dtype)
        chosen = plan.metrics is not None and plan.metrics.select is not None
        better, watch = improves(watch, info, best, score, chosen, plan.algorithm.descends)
        better &= ~failed
        watch = tree.where(better, watch, watch._replace(kept=state.watch.kept))
        best = tree.where(better, Best(score, state.step, inner.params, inner.model, outer), best)
    code = jnp.where(
        failed, code, jnp.where(converged, jnp.int32(RESULTS.converged), jnp.int32(RESULTS.success))
    )
    step = state.step + jnp.where(failed, 0, 1).astype(state.step.dtype)
    new = RunState(
        undone(plan, failed, state.algorithm, algorithm),
        state.key,
        step,
        state.skipped,
        code,
        first_norm,
        best,
        watch,
    )
    return (
        (new, row) if plan.layout is None else (plan.layout.pin(new), plan.layout.everywhere(row))
    )


def _chunk(
    static: Any,
    capacity: int,
    state: RunState,
    dynamic: tuple[Any, ...],
    data: tuple[Any, ...],
    n: Any,
    most_values: int | None = None,
) -> Any:
    """At most `n` steps, fewer after a failure or at the tolerance. `n` is a value, so chunks of
    any length share one program.

    `capacity` is the most that `n` may be; where the history of so many steps had more than
    `most_values` numbers, fewer steps are done.
    """
    plan = join(static, dynamic)
    same: dict[str, Any] = {}  # columns of Python numbers, which no step changes

    def moving(state, dynamic, data, known):
        state, row = one_step(join(static, dynamic), state, data, known)
        for name in (
            "code",
            "warnings",
        ):  # exact, and one more entry of a vector that is written anyway
            row[name] = row[name].astype(state.first_norm.dtype)
        same.update({name: value for name, value in row.items() if isinstance(value, int)})
        return state, {name: value for name, value in row.items() if name not in same}

    step = jax.jit(moving)  # traced once, for the shapes and for the loop
    shapes = jax.eval_shape(
        lambda: step(state, dynamic, data, row_of(orders(plan, state, data, 1), 0))
    )[1]
    if most_values is not None:
        capacity = min(
            capacity, max(CHUNK, most_values // sum(leaf.size for leaf in jax.tree.leaves(shapes)))
        )
    known, first = orders(plan, state, data, capacity), state.step
    pack, unpack = packing(shapes)
    rows = jax.tree.map(
        lambda s: jnp.zeros((capacity, *s.shape), s.dtype), jax.eval_shape(pack, shapes)
    )

    state = state._replace(step=None)  # one counter is enough
    # scalars travel together: each by itself would be a kernel a step
    together, apart = packing(state)

    def unfinished(carry):
        i, state, _ = carry
        return (i < jnp.minimum(n, capacity)) & (apart(state).code == 0)

    def body(carry):
        i, state, rows = carry
        state = apart(state)._replace(step=first + i)
        state, row = step(state, dynamic, data, row_of(known, i))
        rows = jax.tree.map(lambda buffer, value: write(buffer, value, i), rows, pack(row))
        return i + 1, together(state._replace(step=None)), rows

    count, state, rows = lax.while_loop(
        unfinished, body, (jnp.zeros((), jnp.int32), together(state), rows)
    )
    state = apart(state)
    state = state._replace(step=first + count - results.failed(state.code).astype(first.dtype))
    rows = jax.vmap(unpack)(rows)
    rows |= {name: rows[name].astype(jnp.int32) for name in ("code", "warnings")}
    rows |= {name: jnp.full((capacity,), value, jnp.int32) for name, value in same.items()}
    state, rows = afterwards(plan, state, rows, count, data)
    return (
        (state, rows, count)
        if plan.layout is None
        else (plan.layout.pin(state), *plan.layout.everywhere((rows, count)))
    )


run_chunk = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))(
    functools.partial(_chunk, most_values=MOST_VALUES)
)
run_traced = _chunk  # the same inside another program


# ---- the host


def drive(ready: Ready) -> Solution:
    """Chunk after chunk until the steps are done, a failure, the tolerance, or a word from
    outside.
    """
    options, error = ready.options, None
    if ready.traced:
        return _whole(ready)
    if options.sharding is not None and options.sharding.dry:
        raise _compiled(ready)
    loop = Loop(ready)
    numbers = (signal.SIGINT,) if options.checkpoint is None else (signal.SIGINT, signal.SIGTERM)
    with Signals(numbers) as heard:
        try:
            loop.open()
            while not loop.over:
                loop.steps()
                loop.look(heard)
                loop.save()
        except BaseException as first:
            error = first
        error = closed(loop, error)
        result = late(loop.result, heard, loop.peers.count)
        if error is None and result is RESULTS.interrupted and options.throw:
            error = KeyboardInterrupt()
        if error is not None:
            attach(loop, error)
            raise error
        if result is RESULTS.success and options.tol is not None:
            result = RESULTS.tolerance_not_met
        out = loop.finish(result)
    if options.throw and result.failed:
        raise SolveError(result, out, f" at step {out.stats['total_steps']}")
    return out


def _compiled(ready: Ready) -> Compiled:
    """One step, compiled and not run."""
    put = ready.plan.layout.put_window
    data, _ = Window(ready.sources, 1, 1, put).read(0, 1)
    step = jax.jit(
        lambda dynamic, run, data: one_step(join(ready.static, dynamic), run, data),
        donate_argnums=(1,),
    )
    return Compiled(step.lower(ready.dynamic, ready.run, data).compile(), ready.run)


def _whole(ready: Ready) -> Solution:
    """All steps as a part of somebody's own program."""
    options, run = ready.options, ready.run
    if any(map(stream_of, ready.sources)) or options.watchers:
        raise ValueError(
            "callbacks, progress and iterables of batches: got one under a JAX transformation; "
            "expected none, since nothing of the host runs there."
        )
    if (
        options.checkpoint is not None
        or options.sharding is not None
        or options.on_failure != "stop"
    ):
        raise ValueError(
            "checkpoint, sharding and on_failure: got one under a JAX transformation; expected "
            "their defaults there, since nothing of the host runs. "
            "Shard the arrays that are passed in, and save solution.state from outside."
        )
    steps, first = options.num_steps, run.step
    why = (
        f"{options.name}: got a derivative through a whole run, which is a loop until it is told "
        "to stop and has none; expected one of its "
        "solution or of one step. Try argmin for the solution map, or value_and_hypergrad in a "
        "loop of your own."
    )
    run, dynamic, data = undifferentiable(
        why, (run, ready.dynamic, tuple(s.data for s in ready.sources))
    )
    run, rows, count = run_traced(ready.static, steps, run, dynamic, data, steps)
    if options.metrics is not None:
        rows = options.metrics.read(rows, first, jnp)
    return ready.solution(
        run,
        run.code,
        rows,
        {"steps": count, "best_step": run.best.step if run.best is not None else run.step},
    )


class Loop:
    """A run on its way: where it stands, and how it goes on."""

    def __init__(self, ready: Ready):
        plan, static, dynamic, run, sources, solution, options, fingerprint, self._place = ready
        self.plan, self.static, self.dynamic, self.options = plan, static, dynamic, options
        self.run, self._solution, self._fingerprint = run, solution, fingerprint
        self.begin, self.start, self.first_chunk = time.perf_counter(), int(run.step), 0.0
        put = None if plan.layout is None else plan.layout.put_window
        self.window = Window(sources, options.num_steps, options.read_ahead, put)
        self.capacity = (
            self.window.capacity
            if self.window.streaming
            else LONGEST
            if plan.layout is None
            else CHUNK
        )
        self.length, self.each = 1, None  # steps of the next call, seconds a step
        self.history, self.recovery = History(), Recovery(options.on_failure)
        self.store: store_lib.Store | None = None
        self.peers, self.result, self.done, self.resumed = Peers(), RESULTS.success, 0, self.start
        self.first = 0  # steps that were done before the last call
        self.called = [0] * len(options.watchers)  # steps done when each watcher was called last
        self.begun: list[watch.Callback] = []  # those that are to be closed
        self.every = [w.every or min(self.capacity, CHUNK) for w in options.watchers]
        small = sum(leaf.nbytes for leaf in jax.tree.leaves(run)) <= LOOK_BACK
        self.looks_back = (
            small
            and self.peers.count == 1
            and options.on_failure == "stop"
            and not self.window.streaming
        )
        self.reads_state = [not (watcher.exact and self.looks_back) for watcher in options.watchers]
        # what the last call was given, where its steps may have to be done again
        self.before: tuple[Any, ...] | None = None

    # ---- the parts of a round

    def open(self) -> None:
        """Go on from a checkpoint where there is one."""
        options = self.options
        for watcher in options.watchers:
            if watcher.begin is not None:
                watcher.begin()
            self.begun.append(watcher)
        if options.checkpoint is not None:
            self.store = store_lib.Store(
                options.checkpoint, self.start, self._fingerprint(), self.peers
            )
            if (found := self.store.restore(self.run, self.recovery.state(self.run))) is not None:
                self.run, recovery, rows = found
                if self.store.asked_for_more(options.tol):
                    self.run = self.run._replace(code=jnp.zeros_like(self.run.code))
                self._place = self.store.place
                self.history = History(rows)
                self.recovery.resume(recovery)
        self.resumed, self.result = int(self.run.step), RESULTS(int(self.run.code))
        self.done = self.first = self.resumed - self.start
        self.called = [self.done] * len(self.called)
        if self.store is not None and self.done > options.num_steps:
            raise ValueError(
                f"num_steps: got {options.num_steps}, fewer than the {self.done} steps that "
                f"{self.store.spec.directory!r} has of this run; "
                "expected at least as many. Give this run a directory of its own."
            )
        self.window.seek(self.resumed, self._place)
        if self.store is not None and (others := self.window.differing(self.store.batches)):
            warnings.warn(
                f"{', '.join(others)}: gives other batches than when the checkpoint at step "
                f"{self.resumed} was written; expected the same, in the same order, for the run to "
                "end as if it had not been cut. It goes on with those that come. Try a fixed seed "
                "for the shuffling.",
                RuntimeWarning,
                stacklevel=5,
            )

    @property
    def over(self) -> bool:
        return self.done >= self.options.num_steps or self.result is not RESULTS.success

    def steps(self) -> None:
        """One call of compiled steps: up to where the state is to be seen."""
        exact = [
            (i, every - self.done % every)
            for i, every in enumerate(self.every)
            if self.options.watchers[i].exact
        ]
        due = [left for i, left in exact if self.reads_state[i]]
        if self.store is not None:
            due.append(self.store.spec.every - (self.start + self.done) % self.store.spec.every)
        due.append(self.recovery.before(self.run, self.done))
        n = min([self.length, self.capacity, self.options.num_steps - self.done, *due])
        data, steps = self.window.read(self.start + self.done, n)
        self.first = self.done
        if steps:
            since, first = time.perf_counter(), self.start + self.done
            passed = any(left < steps for _, left in exact)
            self.before = (tree.copy(self.run), data, self.done) if passed else None
            with (
                contextlib.nullcontext()
                if self.first_chunk
                else compiling(name_of(self.plan.algorithm.step))
            ):
                self.run, rows, count = run_chunk(
                    self.static, self.capacity, self.run, self.dynamic, data, steps
                )
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

    def _pace(self, each: float) -> None:
        """The length of the next call, by the time of this one. That of the first is mostly
        compilation.
        """
        if not self.first_chunk:
            self.first_chunk = time.perf_counter() - self.begin
            return
        self.length = max(1, min(int(QUICK / each), GROWTH * self.length))

    def look(self, heard: Signals) -> None:
        """Callbacks, signals, and what the other processes say of theirs."""
        stop = False
        for place in self._passed():
            try:
                stop = self._call(place, self._due(place))
            except BaseException:
                self._back(place)
                raise
            if stop or heard.terminate or heard.interrupt:
                self._back(place)
                break
        else:
            over = self.over
            stop = self._call(self.done, self._uncalled() if over else self._due(self.done))
        self.before = None
        said = self.peers.gather([stop, heard.terminate, heard.interrupt, self.length])
        stop, terminate, interrupt = (any(one[i] for one in said) for i in range(3))
        self.length = min(one[3] for one in said)
        if not self.over and (stop or terminate or interrupt):
            self.result = (
                RESULTS.interrupted
                if interrupt
                else RESULTS.preempted
                if terminate
                else RESULTS.stopped
            )
            self._call(self.done, self._uncalled())

    def _passed(self) -> list[int]:
        """The steps done, before the end of the last call, at which somebody is to look."""
        watched = (
            every
            for every, watcher in zip(self.every, self.options.watchers, strict=True)
            if watcher.exact
        )
        places = {
            place
            for every in watched
            for place in range(self.first - self.first % every + every, self.done, every)
        }
        return sorted(places)

    def _due(self, done: int) -> list[int]:
        """The watchers that are to be called after so many steps."""
        each = enumerate(zip(self.options.watchers, self.every, self.called, strict=True))
        end = done == self.done  # of a call, when those may look that need not be exact
        return [
            i
            for i, (watcher, every, last) in each
            if (done % every == 0 if watcher.exact else end and done - last >= every)
        ]

    def _uncalled(self) -> list[int]:
        """The watchers that have not seen the last step: each is called once more at the end."""
        return [i for i, last in enumerate(self.called) if last != self.done]

    def _call(self, done: int, watchers: list[int]) -> bool:
        """Let these watchers look at the run as it was after so many steps: whether one of them
        says stop.
        """
        stop = False
        failed = (
            done == self.done and self.result.failed
        )  # a step that is in the history and not in the state
        event = watch.Event.seen(
            self.start + done - failed,
            done,
            self.options.num_steps,
            self._rows,
            self._state,
            self.start,
            self.resumed - self.start,
        )
        for i in watchers:
            self.called[i], self._calling = done, i
            said = self.options.watchers[i].fn(event)
            try:
                stop = bool(said) or stop
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"callbacks[{i}]: returned {numbers.describe(said)}; expected True to end the "
                    "run, or nothing."
                ) from error
        return stop

    def last_rows(self) -> list[Callable[[], Any]]:
        """What gives the logs the rows that they have not seen, where the run ends by an error."""
        late = [i for i in self._uncalled() if not self.options.watchers[i].exact]
        return [functools.partial(self._call, self.done, [i]) for i in late]

    def _rows(self, done: int) -> dict[str, Any]:
        return self.history.all(len(self.history) - self.done + done)

    def _state(self, done: int) -> RunState:
        """The state after so many steps of the last call. Who asks for one that was passed will
        find the calls cut short for it.
        """
        if done == self.done:
            return self.run
        if self.before is None or not self.before[2] < done < self.done:
            raise RuntimeError(
                f"state: got a look at step {self.start + done}, of which the run has gone on; "
                "expected one while the callback is called."
            )
        self.reads_state[self._calling] = True
        return self._again(done)

    def _again(self, done: int) -> RunState:
        # called only where a call went past a look, which kept what it was given
        run, data, first = self.before  # type: ignore[misc]
        return run_chunk(
            self.static, self.capacity, tree.copy(run), self.dynamic, data, done - first
        )[0]

    def _back(self, done: int) -> None:
        """Let the run be what it was after so many steps: those of the last call are done again up
        to there.
        """
        self.run, self.result = jax.block_until_ready(self._again(done)), RESULTS.success
        self.history.cut(len(self.history) - self.done + done)
        self.done = done

    def save(self) -> None:
        """Save the run where that is due."""
        step = self.start + self.done
        if self.store is None:
            return
        self.store.renew()
        due = self.over or step % self.store.spec.every == 0
        if due and self.store.saved != step and not self.result.failed:
            self.store.save(
                self.run,
                self.recovery.state(self.run),
                self.history.flat(),
                step,
                self.window.places(),
                self.window.digests(),
            )

    def finish(self, result: RESULTS) -> Solution:
        """What the run has come to."""
        rows = self.history.copy()
        return self._solution(
            self.run._replace(place=self.window.places()), result, rows, stats(self, rows)
        )
