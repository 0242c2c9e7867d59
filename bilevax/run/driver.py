"""From a problem and an algorithm to a `Solution`: the state made, then compiled chunks of steps and what the host does between them."""

from __future__ import annotations

import contextlib
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import callbacks as callbacks_lib
from bilevax import check, tree
from bilevax.base import InnerState, PyTree, join, split
from bilevax.results import RESULTS, SolveError, failed
from bilevax.run import dry, layout
from bilevax.run import store as store_lib
from bilevax.run.chunk import CHUNK, Best, Plan, RunState, run_chunk, run_traced
from bilevax.run.history import History
from bilevax.run.options import Options
from bilevax.run.preemption import Preemption
from bilevax.run.recovery import Recovery
from bilevax.run.solution import Solution
from bilevax.run.window import Window, stream_of

LONGEST, QUICK = 4096, 0.1  # a later call takes up to so many steps in about so many seconds: a failure or a signal is to be seen soon


def launch(
    problem, algorithm, sources, start: InnerState, outer, fixed: tuple, key, state: RunState | None, value_dtype, options: Options
) -> Solution:
    """Run `algorithm` on `problem` from `start`, or on from `state`.

    All parameters are floating-point leaves; `fixed` holds the others, of the inner and of the outer ones.
    """
    inner_fixed, outer_fixed = fixed
    score_dtype = np.promote_types(value_dtype, np.float32)
    plan = Plan(problem, algorithm, options.metrics, options.tol, strict=options.strict)
    if options.sharding is not None:
        key = key if state is None else state.key
        plan, sources, start, outer, key = layout.place(options.sharding, plan, sources, start, outer, key)
    shapes = jax.eval_shape(lambda start, outer, key: _first_state(plan, start, outer, key, score_dtype, options.keep), start, outer, key)
    if options.sharding is not None:
        plan = plan._replace(layout=layout.of_run(options.sharding, plan, shapes, start, outer))
    static, dynamic = split(plan)
    if plan.layout is not None:
        dynamic = plan.layout.put_everywhere(dynamic)

    if state is not None:
        check.same_structure(state.algorithm, shapes.algorithm, "state", "a fresh state of this problem and algorithm")
        best = state.best
        if options.keep == "best" and best is None:
            point = state.algorithm
            best = Best(jnp.full((), jnp.inf, state.first_norm.dtype), state.step, point.inner.params, point.inner.model, point.outer)
        run = state._replace(code=jnp.zeros((), jnp.int32), best=best if options.keep == "best" else None)
        run = tree.copy(run if plan.layout is None else plan.layout.put(run))
    elif plan.layout is None:
        run = tree.copy(_first_state(plan, start, outer, key, score_dtype, options.keep))
    else:
        run = tree.copy(_placed_first_state(static, score_dtype, options.keep, dynamic, start, outer, key))

    def solution(run: RunState, result, history: dict, stats: dict) -> Solution:
        best = run.best
        if best is None:
            kept_inner, model, kept_outer = run.algorithm.inner.params, run.algorithm.inner.model, run.algorithm.outer
        else:
            kept_inner, model, kept_outer = best.inner, best.model, best.outer
        return Solution(tree.combine(kept_inner, inner_fixed), tree.combine(kept_outer, outer_fixed), model, result, history, run, stats)

    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((run, dynamic, [s.data for s in sources if stream_of(s) is None]))):
        return _traced(static, dynamic, run, sources, solution, options)
    if options.sharding is not None and options.sharding.dry:
        return dry.of_step(static, dynamic, run, sources)  # type: ignore[return-value]
    return _driven(plan, static, dynamic, run, sources, solution, options)


def _first_state(plan: Plan, start: InnerState, outer: PyTree, key, score_dtype, keep: str) -> RunState:
    score = jnp.full((), jnp.inf, score_dtype)
    best = Best(score, jnp.zeros((), jnp.int32) - 1, start.params, start.model, outer) if keep == "best" else None
    zero = jnp.zeros((), jnp.int32)
    return RunState(plan.algorithm.init(plan.problem, start, outer), key, zero, zero, zero, jnp.zeros_like(score), best)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _placed_first_state(static, score_dtype, keep: str, dynamic: tuple, start: InnerState, outer: PyTree, key) -> RunState:
    plan = join(static, dynamic)
    return plan.layout.pin(_first_state(plan, start, outer, key, score_dtype, keep))


def _traced(static, dynamic, run, sources, solution, options: Options) -> Solution:
    if any(map(stream_of, sources)) or options.watchers:
        raise ValueError(
            "callbacks, progress and iterables of batches: got one under a JAX transformation; expected none, since nothing of the host runs there."
        )
    if options.checkpoint is not None or options.sharding is not None or options.on_failure != "stop":
        raise ValueError(
            "checkpoint, sharding and on_failure: got one under a JAX transformation; expected their defaults there, since nothing of the host runs. "
            "Shard the arrays that are passed in, and save solution.state from outside."
        )
    steps = options.num_steps
    run, rows, count = run_traced(static, steps, run, dynamic, tuple(s.data for s in sources), steps)
    return solution(run, run.code, rows, {"steps": count, "best_step": run.best.step if run.best is not None else run.step})


def _driven(plan: Plan, static, dynamic, run: RunState, sources, solution, options: Options) -> Solution:
    """Chunk after chunk until the steps are done, a failure, the tolerance, or a word from outside."""
    num_steps, watchers = options.num_steps, options.watchers
    begin, start, first_chunk = time.perf_counter(), int(run.step), 0.0
    put = None if plan.layout is None else plan.layout.put_window
    window = Window(sources, num_steps, options.read_ahead, put)
    capacity = window.capacity if window.streaming else LONGEST if plan.layout is None else CHUNK
    shortest = length = min(capacity, CHUNK)  # of the next chunk
    history = History()
    store = None if options.checkpoint is None else store_lib.Store(options.checkpoint, start)
    if store is not None and (found := store.restore(run)) is not None:
        run, history.restored = found
    resumed, result = int(run.step), RESULTS(int(run.code))
    done = resumed - start
    window.seek(resumed)
    recovery = Recovery(options.on_failure)

    def finish(result) -> Solution:
        rows = history.all()
        stats = {
            "steps": int(run.step) - start,
            "total_steps": int(run.step),
            "seconds": time.perf_counter() - begin,
            "first_chunk_seconds": first_chunk,
            "best_step": int(run.step) if run.best is None else int(run.best.step),
            "failed_steps": int(failed(rows["code"]).sum()) if rows else 0,
            "resumed_from": resumed,
        }
        if store is not None:
            stats["checkpoint_seconds"] = store.seconds
        return solution(run, result, rows, stats)

    with contextlib.ExitStack() as ends:
        for watcher in watchers:
            if watcher.close is not None:
                ends.callback(watcher.close)
        asked = None if store is None else ends.enter_context(Preemption())
        if store is not None:
            ends.callback(store.close)
        try:
            while done < num_steps and result is RESULTS.success:
                due = [every - done % every for every in (w.every or shortest for w in watchers)]
                if store is not None:
                    due.append(store.spec.every - (start + done) % store.spec.every)
                recovery.before(run, due)
                data, steps = window.read(start + done, min([length, num_steps - done, *due]))
                if steps:
                    since = time.perf_counter()
                    run, rows, count = run_chunk(static, capacity, run, dynamic, data, steps)
                    window.prefetch(num_steps - done - steps)
                    count = int(count)
                    history.chunks.append(jax.tree.map(lambda a: np.asarray(a)[:count], rows))  # noqa: B023 (mapped at once)
                    done += count
                    each = (time.perf_counter() - since) / max(count, 1)
                    length = min(capacity, max(shortest, int(QUICK / each)))
                    first_chunk = first_chunk or time.perf_counter() - begin
                    run, result = recovery.after(run, count)
                    window.done(count)
                if window.exhausted and result is RESULTS.success and done < num_steps:
                    result = RESULTS.data_exhausted
                over = done >= num_steps or result is not RESULTS.success
                event = None
                for watcher in watchers:
                    if over or done % (watcher.every or shortest) == 0:
                        event = event or callbacks_lib.Event(int(run.step), done, num_steps, history.all(), run)
                        if watcher.fn(event) and not over:
                            result = RESULTS.stopped
                if asked is not None and asked() and not over:
                    result = RESULTS.preempted
                over = done >= num_steps or result is not RESULTS.success
                if store is not None and store.saved != start + done and not result.failed and (over or (start + done) % store.spec.every == 0):
                    store.save(run, history.all(), start + done)
        except Exception as error:
            error.solution = finish(RESULTS.stopped)  # type: ignore[attr-defined]
            error.add_note("The run so far is in this error's .solution.")
            raise

    if result is RESULTS.success and options.tol is not None:
        result = RESULTS.tolerance_not_met
    out = finish(result)
    if options.throw and result.failed:
        raise SolveError(result, out, f" at step {out.stats['total_steps']}")
    return out
