"""solve_bilevel: what is asked, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from bilevax import check, starts, tree
from bilevax import checkpoint as checkpoint_lib
from bilevax._call import prepared
from bilevax._core.transfers import by_intent
from bilevax._core.types import Key
from bilevax.base import Algorithm, InnerState, PyTree
from bilevax.data.draws import with_number
from bilevax.data.episodes import numbered, refuse_other_tasks
from bilevax.data.sources import as_source
from bilevax.results import RESULTS
from bilevax.run.chunk import drive
from bilevax.run.driver import ready
from bilevax.run.metrics import Metrics, check_metrics
from bilevax.run.options import check_options
from bilevax.run.solution import Solution
from bilevax.run.state import RunState
from bilevax.run.watch import Callback
from bilevax.run.window import (
    first_context,
    needs_key,
    reading,
    refuse_one_pass,
    refuse_shared,
    source_draw,
)
from bilevax.sharding import placement


@by_intent
def solve_bilevel(
    inner_objective: Callable[..., Any],
    outer_objective: Callable[..., Any],
    inner_params: PyTree,
    outer_params: PyTree,
    *,
    inner_data: Any = None,
    outer_data: Any = None,
    hyper_data: Any = None,
    algorithm: Algorithm | None = None,
    num_steps: int = 100,
    key: Key | None = None,
    inner_init: Callable[[PyTree], PyTree] | None = None,
    project: Callable[[PyTree], PyTree] | None = None,
    model_state: PyTree = None,
    metrics: Metrics | Callable[..., Any] | None = None,
    tol: float | None = None,
    keep: str = "best",
    state: RunState | None = None,
    callbacks: Sequence[Callable[..., Any] | Callback] = (),
    progress: bool = False,
    checkpoint: checkpoint_lib.Checkpointing | None = None,
    sharding: placement.Sharding | None = None,
    on_failure: str = "stop",
    read_ahead: int | None = None,
    strict: bool | Collection[RESULTS] = False,
    throw: bool = True,
) -> Solution:
    """Minimise an outer objective over the solutions of an inner one.

    ``min_x f(y*(x), x)`` with ``y*(x) = argmin_y g(y, x)``.

    Args:
      inner_objective: ``g(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      outer_objective: ``f(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      inner_params: pytree; where the lower level starts. Leaves that are not floating-point ride
        along unchanged.
      outer_params: pytree; where the upper level starts.
      inner_data: batches of the inner steps: a pytree of arrays with a common leading axis (the
        whole of it at every step), `data.minibatches` of one, a pure function ``(key, step) ->
        batch``, an iterable of batches (each trained on once, in order), `data.episodes` of one of
        these (one draw an outer step, which both levels see), or None.
      outer_data: batches of the outer gradient, likewise.
      hyper_data: batches of second-order products; by default drawn from `inner_data`, apart from
        the inner steps' own, or, where that is an iterable, the last one that the step has trained
        on.
      algorithm: an `Algorithm`. None picks one by a documented rule (``algorithms.default``). Build
        it once: an equal one built again compiles again unless its numbers are leaves (`tunable`).
      num_steps: outer steps.
      key: PRNG key; needed where data is sampled or an objective is keyed.
      inner_init: ``outer_params -> inner_params``, where every solve starts from a function of the
        outer parameters; ``(outer_params, key) -> inner_params``, whose second argument is named
        `key`, where each outer step begins at a new draw. It may return ``(inner_params,
        model_state)``; otherwise statistics go on from where the last solve left them.
      project: ``outer_params -> outer_params``, applied after every outer step.
      model_state: initial model state of a stateful inner objective.
      metrics: `bilevax.metrics` of a function of held-out data, or the function itself.
      tol: stop when the hypergradient's norm is at most `tol` times its first value.
      keep: ``"best"`` returns the iterate of the smallest outer value (or of the metric that
        `metrics` selects; of `maid`, which only descends, the latest whose value can be told),
        ``"last"`` the last.
      state: ``solution.state`` of an earlier run of the same problem, to go on from it; its
        parameters, key and step replace the arguments. ``inner_params`` and ``outer_params`` then
        only say the structure.
      callbacks: functions of a `callbacks.Event`, called between compiled chunks, on every process;
        returning True (on all of them) stops.
      progress: show a progress bar (extra ``progress``), on the first process.
      checkpoint: `checkpoint.every(n, directory)`: save the run, and resume it when it is started
        again.
      sharding: how the run lies on several devices: `sharding.data_parallel()`, `sharding.fsdp()`,
        `sharding.tasks()` or `sharding.by_path(...)`.
        None: as the arrays that are passed in lie.
      on_failure: what a failed step (non-finite numbers, a broken adjoint) does. "stop" undoes it
        and ends the run. "skip" undoes it and goes on with the next step's data. "rollback" goes
        back to the state of 32 to 64 steps before, and on with the next step's data, for failures
        that were long in the making; it keeps two more copies of the state. Failed steps keep their
        row of the history, with their code, and are counted in ``stats["failed_steps"]``. Ten
        failures in a row end the run under any policy; rolled back, those that are at most 256
        steps apart.
      read_ahead: outer steps for which batches of iterables are read on the host before they are
        needed, those that run included. None: as many as fit in 256 MiB, at least two, at most 32.
      strict: warnings that are to be failures. What is known to be rough about a step (an adjoint
        above its tolerance, an unsolved lower level) is a warning: it stands in the history's
        column ``warnings``, ``Solution.warnings`` counts it, and the run goes on. True makes
        failures of all, a set such as ``{RESULTS.negative_curvature}`` of those in it.
      throw: raise a `SolveError` on failure; False returns the solution with its `RESULTS` code.

    Returns:
      A `Solution`. The caller's arrays are never donated. Under ``vmap`` or ``jit`` the whole run
      is traced as one loop: callbacks, iterables and `throw` do not apply, ``result`` is an integer
      array, and history rows after the last step are zero.

    Raises:
      TypeError, ValueError: for arguments that cannot work, before anything is compiled.
      SolveError: if the run fails and `throw`; the error's ``solution`` holds all that was reached.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: 0.5 * jnp.sum((y - 3.0) ** 2)
      >>> algorithm = bx.algorithms.double_loop(
      ...     bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.5)
      ... )
      >>> solution = bx.solve_bilevel(
      ...     inner, outer, jnp.zeros(2), jnp.zeros(2), algorithm=algorithm, num_steps=50
      ... )
      >>> bool(jnp.allclose(solution.outer_params, 3.0, atol=1e-4))
      True
    """
    # ---- refusals
    options = check_options(
        num_steps, metrics, tol, keep, callbacks, progress, throw,
        on_failure=on_failure, checkpoint=checkpoint, sharding=sharding, read_ahead=read_ahead,
        strict=strict,
    )  # fmt: skip
    if algorithm is not None:
        check.algorithm(algorithm)
    if state is not None and not isinstance(state, RunState):
        raise TypeError(
            f"state: got {check.describe(state)}; expected solution.state of an earlier run, or "
            "None."
        )

    inner_source, outer_source = (
        as_source(inner_data, "inner_data"),
        as_source(outer_data, "outer_data"),
    )
    hyper_source = inner_source if hyper_data is None else as_source(hyper_data, "hyper_data")
    sources = numbered((inner_source, hyper_source, outer_source))
    refuse_shared(sources)
    inner_draw, hyper_draw, outer_draw = (source_draw(s) for s in sources)
    problem = check.problem(
        inner_objective, outer_objective, inner_draw, hyper_draw, outer_draw, inner_init, project
    )
    refuse_other_tasks(problem, inner_source, outer_source)
    run_key = key if state is None else state.key
    sampled = run_key is None and any(map(needs_key, sources))
    call = prepared(problem, inner_params, outer_params, model_state, run_key, sampled=sampled)
    if state is not None:
        refuse_one_pass(sources)
        call = call._replace(model=state.algorithm.inner.model)
    inner, outer, model = call.inner, call.outer, call.model
    inner_ctx, outer_ctx = (first_context(source, run_key) for source in (sources[0], sources[2]))
    problem, value_dtype = call.traced(
        inner_ctx, outer_ctx, 1 if algorithm is None else algorithm.draws.inner
    )
    if options.metrics is not None:
        measured = check_metrics(
            options.metrics, inner, outer, model, {"value", "grad_norm", "code", "warnings", "aux"}
        )
        options = options._replace(metrics=measured)
    start = InnerState(inner, (), model)
    if problem.project is not None and state is None:
        outer = problem.project(outer)  # where the run starts, and what it may return, is inside
    if algorithm is None:
        from bilevax.algorithms.default import (
            default_algorithm,
        )  # here, so that importing the package loads no algorithm

        algorithm = default_algorithm(
            problem, sources, start, outer, key, None if state is None else state.algorithm
        )
    warnings = 0
    if algorithm.around is None and algorithm.differentiates:
        # what has a hypergradient method looks for itself, with all that the method can see
        starts.linked(problem, start, outer, (with_number(problem.inner, inner_ctx), outer_ctx))
        warnings = starts.constant_statistics(problem, start, outer, outer_ctx)
    problem = reading(problem, algorithm.draws, sources)
    functions = {
        "inner_objective": (
            problem.inner,
            (inner, outer, with_number(problem.inner, inner_ctx)._replace(model=model)),
        ),
        "outer_objective": (problem.outer, (inner, outer, outer_ctx._replace(model=model))),
        "project": (project or (lambda x: x), (tree.combine(call.outer, call.fixed[1]),)),
    }
    named = dict(zip(("inner_data", "hyper_data", "outer_data"), sources, strict=True))
    return drive(
        ready(
            problem,
            algorithm,
            named,
            start,
            outer,
            call.fixed,
            key,
            state,
            value_dtype,
            options,
            functions,
            warnings,
        )
    )
