"""solve_bilevel: check the input, run compiled chunks of steps, call callbacks between them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import callbacks as callbacks_lib
from bilevax import check, tree
from bilevax import checkpoint as checkpoint_lib
from bilevax.base import Algorithm, InnerState, PyTree, join, split
from bilevax.data import Source, Stream, as_source
from bilevax.results import RESULTS, SolveError
from bilevax.run import layout
from bilevax.run.chunk import CHUNK, Best, Plan, RunState, run_chunk, run_traced
from bilevax.run.metrics import Metrics, check_metrics
from bilevax.run.metrics import metrics as as_metrics
from bilevax.run.preemption import Preemption
from bilevax.run.solution import Solution
from bilevax.run.window import Window, first_context, source_draw
from bilevax.sharding import placement, report

LONGEST, QUICK = 4096, 0.1  # a later call takes up to so many steps in about so many seconds: a failure or a signal is to be seen soon
STREAM_CHUNK = 16  # the same for batches read on the host, which must be held stacked
ROLLBACK_CHUNK = 32  # the same where a failure undoes one or two chunks
PATIENCE = 10  # failures in a row after which a run that passes over failures ends all the same


def solve_bilevel(
    inner_objective: Callable,
    outer_objective: Callable,
    inner_params: PyTree,
    outer_params: PyTree,
    *,
    inner_data: Any = None,
    outer_data: Any = None,
    hyper_data: Any = None,
    algorithm: Algorithm | None = None,
    num_steps: int = 100,
    key: jax.Array | None = None,
    inner_init: Callable[[PyTree], PyTree] | None = None,
    project: Callable[[PyTree], PyTree] | None = None,
    model_state: PyTree = None,
    metrics: Metrics | Callable | None = None,
    tol: float | None = None,
    keep: str = "best",
    state: RunState | None = None,
    callbacks: Sequence[Callable] = (),
    progress: bool = False,
    checkpoint: checkpoint_lib.Checkpointing | None = None,
    sharding: placement.Sharding | None = None,
    on_failure: str = "stop",
    throw: bool = True,
) -> Solution:
    """Minimise an outer objective over the solutions of an inner one.

    ``min_x f(y*(x), x)`` with ``y*(x) = argmin_y g(y, x)``.

    Args:
      inner_objective: ``g(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      outer_objective: ``f(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      inner_params: pytree; where the lower level starts. Leaves that are not floating-point ride along unchanged.
      outer_params: pytree; where the upper level starts.
      inner_data: batches of the inner steps: a pytree of arrays with a common leading axis (the whole of it at every step), `data.minibatches` of
        one, a pure function ``(key, step) -> batch``, an iterable of batches, or None.
      outer_data: batches of the outer gradient, likewise.
      hyper_data: batches of second-order products; by default drawn from `inner_data`, apart from the inner steps' own.
      algorithm: an `Algorithm`. None picks one by a documented rule (``algorithms.default``). Build it once: an equal one built again
        compiles again unless its numbers are leaves (`tunable`).
      num_steps: outer steps.
      key: PRNG key; needed where data is sampled or an objective is keyed.
      inner_init: ``outer_params -> inner_params``, where every solve starts from a function of the outer parameters.
      project: ``outer_params -> outer_params``, applied after every outer step.
      model_state: initial model state of a stateful inner objective.
      metrics: `bilevax.metrics` of a function of held-out data, or the function itself.
      tol: stop when the hypergradient's norm is at most `tol` times its first value.
      keep: ``"best"`` returns the iterate of the smallest outer value (or of the metric that `metrics` selects), ``"last"`` the last.
      state: ``solution.state`` of an earlier run of the same problem, to go on from it; its parameters, key and step replace the arguments.
        ``inner_params`` and ``outer_params`` then only say the structure.
      callbacks: functions of a `callbacks.Event`, called between compiled chunks, on every process; returning True (on all of them) stops.
      progress: show a progress bar (extra ``progress``), on the first process.
      checkpoint: `checkpoint.every(n, directory)`: save the run, and resume it when it is started again.
      sharding: how the run lies on several devices: `sharding.data_parallel()`, `sharding.fsdp()`, `sharding.tasks()` or `sharding.by_path(...)`.
        None: as the arrays that are passed in lie.
      on_failure: what a failed step (non-finite numbers, a broken adjoint) does. "stop" undoes it and ends the run. "skip" undoes it and goes on with
        the next step's data. "rollback" goes back to the state of 32 to 64 steps before, and on with the next step's data, for failures that were
        long in the making; it keeps two more copies of the state. Failed steps keep their row of the history, with their code, and are counted in
        ``stats["failed_steps"]``. Ten failures in a row end the run under any policy; rolled back, those that are at most 256 steps apart.
      throw: raise a `SolveError` on failure; False returns the solution with its `RESULTS` code.

    Returns:
      A `Solution`. The caller's arrays are never donated. Under ``vmap`` or ``jit`` the whole run is traced as one loop: callbacks, iterables
      and `throw` do not apply, ``result`` is an integer array, and history rows after the last step are zero.

    Raises:
      TypeError, ValueError: for arguments that cannot work, before anything is compiled.
      SolveError: if the run fails and `throw`; the error's ``solution`` holds all that was reached.

    Example:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: 0.5 * jnp.sum((y - 3.0) ** 2)
      >>> algorithm = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.5))
      >>> solution = bx.solve_bilevel(inner, outer, jnp.zeros(2), jnp.zeros(2), algorithm=algorithm, num_steps=50)
      >>> bool(jnp.allclose(solution.outer_params, 3.0, atol=1e-4))
      True
    """
    # ---- refusals
    options = check_options(
        num_steps, metrics, tol, keep, callbacks, progress, throw, on_failure=on_failure, checkpoint=checkpoint, sharding=sharding
    )
    if algorithm is not None:
        check.algorithm(algorithm)
    if state is not None and not isinstance(state, RunState):
        raise TypeError(f"state: got {check.describe(state)}; expected solution.state of an earlier run, or None.")

    inner_source, outer_source = as_source(inner_data, "inner_data"), as_source(outer_data, "outer_data")
    hyper_source = inner_source if hyper_data is None else as_source(hyper_data, "hyper_data")
    sources = (inner_source, hyper_source, outer_source)
    inner_draw, hyper_draw, outer_draw = (source_draw(s) for s in sources)
    problem = check.problem(inner_objective, outer_objective, inner_draw, hyper_draw, outer_draw, inner_init, project)
    check.key(key if state is None else state.key, problem, any(isinstance(s, Source) and s.keyed for s in sources))
    inner_params, outer_params = check.arrays(inner_params, "inner_params"), check.arrays(outer_params, "outer_params")
    model_state = None if model_state is None else check.arrays(model_state, "model_state")
    for value, name in ((inner_params, "inner_params"), (outer_params, "outer_params")):
        check.params(value, name)
        check.finite(value, name)
    if algorithm is None:
        from bilevax.algorithms.default import default_algorithm  # here, so that importing the package loads no algorithm

        algorithm = default_algorithm(sources)

    (inner, inner_fixed), (outer, outer_fixed) = tree.partition(inner_params), tree.partition(outer_params)
    problem = check.bind_fixed(problem, inner_fixed, outer_fixed)
    contexts = [first_context(s, key if state is None else state.key) for s in (inner_source, outer_source)]
    model = model_state if state is None else state.algorithm.inner.model
    value_dtype = check.objectives(problem, inner, outer, model, *contexts)
    if options.metrics is not None:
        check_metrics(options.metrics, inner, outer, model, {"value", "grad_norm", "code", "aux"})
    start = InnerState(inner, (), model_state)
    return launch(problem, algorithm, sources, start, outer, (inner_fixed, outer_fixed), key, state, value_dtype, options)


# ---- the part that every driver shares


class Options(NamedTuple):
    """The arguments of a driver that say how to run and not what."""

    num_steps: int
    metrics: Metrics | None
    tol: Any  # a number, which may be traced, or None
    keep: str
    watchers: list
    throw: bool
    on_failure: str
    checkpoint: checkpoint_lib.Checkpointing | None
    sharding: placement.Sharding | None


def check_options(num_steps, metrics, tol, keep, callbacks, progress, throw, *, on_failure="stop", checkpoint=None, sharding=None) -> Options:
    """`Options`, or an error that names the argument."""
    num_steps = check.count(num_steps, "num_steps")
    if keep not in ("best", "last"):
        raise ValueError(f"keep: got {keep!r}; expected 'best' or 'last'.")
    if on_failure not in ("stop", "skip", "rollback"):
        raise ValueError(f"on_failure: got {on_failure!r}; expected 'stop', 'skip' or 'rollback'.")
    if tol is not None and not isinstance(tol, jax.core.Tracer) and (isinstance(tol, bool) or not isinstance(tol, (int, float)) or not tol > 0):
        raise ValueError(f"tol: got {tol!r}; expected a positive number, or None.")
    for name, flag in (("progress", progress), ("throw", throw)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {check.describe(flag)}; expected True or False.")
    if callable(callbacks) or not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks: got {check.describe(callbacks)}; expected a sequence of functions. Try callbacks=[fn].")
    if checkpoint is not None and not isinstance(checkpoint, checkpoint_lib.Checkpointing):
        raise TypeError(f"checkpoint: got {check.describe(checkpoint)}; expected checkpoint.every(n, directory), or None.")
    placement.check_sharding(sharding)
    watchers = [callbacks_lib.as_callback(fn, i) for i, fn in enumerate(callbacks)]
    if progress and jax.process_index() == 0:
        watchers.append(callbacks_lib.progress_bar())
    if metrics is not None and not isinstance(metrics, Metrics):
        metrics = as_metrics(metrics)
    return Options(num_steps, metrics, tol, keep, watchers, throw, on_failure, checkpoint, sharding)


def _first_state(plan: Plan, start: InnerState, outer: PyTree, key, score_dtype, keep: str) -> RunState:
    score = jnp.full((), jnp.inf, score_dtype)
    best = Best(score, jnp.zeros((), jnp.int32) - 1, start.params, start.model, outer) if keep == "best" else None
    zero = jnp.zeros((), jnp.int32)
    return RunState(plan.algorithm.init(plan.problem, start, outer), key, zero, zero, zero, jnp.zeros_like(score), best)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _placed_first_state(static, score_dtype, keep: str, dynamic: tuple, start: InnerState, outer: PyTree, key) -> RunState:
    plan = join(static, dynamic)
    return plan.layout.pin(_first_state(plan, start, outer, key, score_dtype, keep))


def launch(
    problem, algorithm, sources, start: InnerState, outer, fixed: tuple, key, state: RunState | None, value_dtype, options: Options
) -> Solution:
    """Run `algorithm` on `problem` from `start`, or on from `state`.

    All parameters are floating-point leaves; `fixed` holds the others, of the inner and of the outer ones.
    """
    inner_fixed, outer_fixed = fixed
    score_dtype = np.promote_types(value_dtype, np.float32)
    plan = Plan(problem, algorithm, options.metrics, options.tol)
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

    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((run, dynamic, [s.data for s in sources if isinstance(s, Source)]))):
        return _traced(static, dynamic, run, sources, solution, options)
    if options.sharding is not None and options.sharding.dry:
        return report.of_step(static, dynamic, run, sources, plan.algorithm.draws)  # type: ignore[return-value]
    return _driven(plan, static, dynamic, run, sources, solution, options)


def _traced(static, dynamic, run, sources, solution, options: Options) -> Solution:
    if any(isinstance(s, Stream) for s in sources) or options.watchers:
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
    num_steps, watchers, draws = options.num_steps, options.watchers, plan.algorithm.draws
    begin, start, first_chunk = time.perf_counter(), int(run.step), 0.0
    streaming = any(isinstance(s, Stream) for s in sources)
    capacity = min(num_steps, STREAM_CHUNK) if streaming else LONGEST if plan.layout is None else CHUNK
    shortest = length = min(capacity, CHUNK)  # of the next chunk
    window = Window(sources, draws, capacity, None if plan.layout is None else plan.layout.put_window)
    history = _History()
    store = None if options.checkpoint is None else checkpoint_lib.Store(options.checkpoint, start)
    if store is not None and (found := store.restore(run)) is not None:
        run, history.restored = found
    resumed, result = int(run.step), RESULTS(int(run.code))
    done = resumed - start
    window.skip(done)
    recovery = _Recovery(options.on_failure)

    def finish(result) -> Solution:
        rows = history.all()
        stats = {
            "steps": int(run.step) - start,
            "total_steps": int(run.step),
            "seconds": time.perf_counter() - begin,
            "first_chunk_seconds": first_chunk,
            "best_step": int(run.step) if run.best is None else int(run.best.step),
            "failed_steps": int((rows["code"] >= 10).sum()) if rows else 0,
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
                    count = int(count)
                    history.chunks.append(jax.tree.map(lambda a: np.asarray(a)[:count], rows))  # noqa: B023 (mapped at once)
                    done += count
                    each = (time.perf_counter() - since) / max(count, 1)
                    length = min(capacity, max(shortest, int(QUICK / each)))
                    first_chunk = first_chunk or time.perf_counter() - begin
                    run, result = recovery.after(run, count)
                    window.put_back(steps - count)
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

    codes = history.all().get("code", np.zeros(0, np.int32))
    if result is RESULTS.success and len(codes) and codes[-1] == RESULTS.inner_not_converged:
        result = RESULTS.inner_not_converged
    elif result is RESULTS.success and options.tol is not None:
        result = RESULTS.tolerance_not_met
    out = finish(result)
    if options.throw and result.failed:
        raise SolveError(result, out, f" at step {out.stats['total_steps']}")
    return out


class _History:
    """The rows so far: those of the chunks, after those of an earlier process."""

    def __init__(self) -> None:
        self.restored: dict[str, np.ndarray] | None = None  # columns by path
        self.chunks: list[dict] = []

    def all(self) -> dict:
        if self.restored is not None:
            like = self.chunks[0] if self.chunks else None
            self.chunks.insert(0, checkpoint_lib.as_history(self.restored, like))
            if like is not None:
                self.restored = None
            else:
                return self.chunks.pop(0)
        if len(self.chunks) > 1:
            self.chunks = [jax.tree.map(lambda *columns: np.concatenate(columns), *self.chunks)]
        return self.chunks[0] if self.chunks else {}


class _Recovery:
    """What becomes of a failed step: see `on_failure`."""

    def __init__(self, policy: str):
        self.policy, self.in_a_row, self.clean = policy, 0, 0
        self.snapshots: list = []

    def before(self, run: RunState, due: list[int]) -> None:
        """Prepare for a chunk, which `due` may shorten."""
        if self.policy == "rollback":
            due.append(ROLLBACK_CHUNK)
            if self.clean or not self.snapshots:
                self.snapshots = [*self.snapshots, (tree.copy(run.algorithm), run.step - run.skipped)][-2:]

    def after(self, run: RunState, count: int) -> tuple[RunState, RESULTS]:
        """The state to go on with after a chunk of `count` steps, the last of which may have failed."""
        result = RESULTS(int(run.code))
        self.clean += count
        if not result.failed:
            return run, result
        # A rolled-back run that diverges does so again only after the steps that it was taken back.
        row = self.clean == 1 if self.policy == "skip" else self.clean <= CHUNK
        self.in_a_row, self.clean = self.in_a_row + 1 if row else 1, 0
        if self.policy == "stop" or self.in_a_row >= PATIENCE:
            return run, result
        run = run._replace(code=jnp.zeros_like(run.code), step=run.step + 1, skipped=run.skipped + 1)
        if self.policy == "rollback":
            self.snapshots = self.snapshots[:1]
            algorithm, done = self.snapshots[0]
            run = run._replace(algorithm=tree.copy(algorithm), skipped=run.step - done)
        return run, RESULTS.success
