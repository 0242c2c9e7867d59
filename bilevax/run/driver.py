"""From a problem and an algorithm to a `Solution`: the state made, or taken over; what follows is
the loop's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import check, tree
from bilevax._core import peers
from bilevax.base import Algorithm, InnerState, PyTree, join, split
from bilevax.run import fingerprint, layout
from bilevax.run.chunk import one_step
from bilevax.run.judging import first_watch
from bilevax.run.metrics import Metrics
from bilevax.run.options import Options
from bilevax.run.solution import Solution
from bilevax.run.state import Best, Plan, Ready, RunState
from bilevax.run.window import first_data, stream_of
from bilevax.sharding.placement import automatic


def ready(
    problem: Any,  # a `Problem`, or the levels of a multilevel one
    algorithm: Algorithm,
    named: dict[str, Any],
    start: InnerState,
    outer: PyTree,
    fixed: tuple[Any, ...],
    key: Any,
    state: RunState | None,
    value_dtype: Any,
    options: Options,
    functions: dict[str, tuple[Any, ...]],
    warnings: int = 0,
) -> Ready:
    """`algorithm` on `problem`, about to begin at `start`, or to go on from `state`.

    All parameters are floating-point leaves; `fixed` holds the others, of the inner and of the
    outer ones. `named` are the sources by argument. `functions` are those that the problem is made
    of, each with arguments to trace it on: what a checkpoint tells other problems by. `warnings` is
    the mask of those that stand at every step.
    """
    given = (
        problem,
        algorithm,
        named,
        start,
        outer,
        fixed,
        key,
        state,
        score_dtype_of(value_dtype),
        functions,
        options.metrics,
        options.tol,
    )
    sources = tuple(named.values())
    if options.sharding is None:
        sources, start, outer, fixed, key, state = automatic(
            (sources, start, outer, fixed, key, state)
        )
    print_of = functools.cache(lambda: _fingerprint(*given))
    if jax.process_count() > 1 and options.sharding is not None:
        _agree(options, print_of()["parts"])
    inner_fixed, outer_fixed = fixed
    score_dtype = score_dtype_of(value_dtype)
    plan = Plan(
        problem,
        algorithm,
        options.metrics,
        options.tol,
        strict=options.strict,
        warnings=warnings,
    )
    if options.sharding is not None:
        key = key if state is None else state.key
        sharding = layout.of_problem(options.sharding, problem, start)
        options = options._replace(sharding=sharding)
        plan, sources, start, outer, key, spec = layout.place(
            sharding, plan, sources, start, outer, key
        )
    begin = lambda start, outer, key: _first_state(
        plan, start, outer, key, score_dtype, options.keep
    )
    if options.sharding is not None or state is not None:
        shapes = jax.eval_shape(begin, start, outer, key)
    if options.sharding is not None:
        plan = plan._replace(layout=layout.of_run(options.sharding, shapes, start, outer, spec))
    static, dynamic = split(plan)
    dynamic = automatic(dynamic) if plan.layout is None else plan.layout.put_everywhere(dynamic)

    if state is not None:
        check.same_structure(
            state.algorithm,
            shapes.algorithm,
            "state",
            "a fresh state of this problem and algorithm",
        )
        best = state.best
        if options.keep == "best" and best is None:
            point = state.algorithm
            best = Best(
                jnp.full((), jnp.inf, state.first_norm.dtype),
                state.step,
                point.inner.params,
                point.inner.model,
                point.outer,
            )
        run = state._replace(
            code=jnp.zeros((), jnp.int32), best=best if options.keep == "best" else None, place=None
        )
        run = tree.copy(run if plan.layout is None else plan.layout.put(run))
    elif plan.layout is None:
        run = tree.copy(begin(start, outer, key))
    else:
        run = tree.copy(
            _placed_first_state(static, score_dtype, options.keep, dynamic, start, outer, key)
        )

    def solution(run: RunState, result, history: dict[Any, Any], stats: dict[Any, Any]) -> Solution:
        best, last = (
            run.best,
            (run.algorithm.inner.params, run.algorithm.inner.model, run.algorithm.outer),
        )
        if best is None:
            kept_inner, model, kept_outer = last
        else:  # where no step's iterate could be scored, the last
            kept_inner, model, kept_outer = tree.where(
                best.step >= 0, (best.inner, best.model, best.outer), last
            )
        return Solution(
            tree.combine(kept_inner, inner_fixed),
            tree.combine(kept_outer, outer_fixed),
            model,
            result,
            history,
            run,
            stats,
        )

    return Ready(
        plan,
        static,
        dynamic,
        run,
        sources,
        solution,
        options,
        print_of,
        None if state is None else state.place,
    )


def _agree(options: Options, parts: dict[str, str]) -> None:
    """Refuse settings and problems that differ between the processes of a run: one would wait for
    ever, or compute something else.
    """
    saved = options.checkpoint
    told = {
        **{
            name: str(getattr(options, name))
            for name in ("num_steps", "tol", "keep", "on_failure", "strict")
        },
        "callbacks": str([watcher.every for watcher in options.watchers if watcher.exact]),
        "checkpoint": str(saved and (saved.every, saved.directory, saved.keep, saved.resume)),
        **{name: value[:12] for name, value in parts.items()},
    }
    peers.agree(
        told,
        "processes",
        "Expected every process to make the same call. Try the same seed, files and arguments on "
        "all of them.",
    )


def score_dtype_of(value_dtype: Any) -> Any:
    """What values of the outer objective are compared in."""
    return np.promote_types(value_dtype, np.float32)


def _fingerprint(
    problem: Any,  # a `Problem`, or the levels of a multilevel one
    algorithm: Algorithm,
    sources: dict[Any, Any],
    start: Any,
    outer: PyTree,
    fixed: Any,
    key: Any,
    state: Any,
    score_dtype: Any,
    functions: Any,
    metrics: Metrics | None,
    tol: Any,
) -> dict[str, Any]:
    """The parts that make this problem, before anything of it is placed on devices: how a run lies
    there is no part of it.
    """
    traced = {name: fingerprint.of_function(fn, *args) for name, (fn, args) in functions.items()}
    plan = Plan(problem, algorithm, None, None)
    static, dynamic = split(plan)
    key = key if state is None else state.key
    shapes = jax.eval_shape(
        lambda start, outer, key: _first_state(plan, start, outer, key, score_dtype, "last"),
        start,
        outer,
        key,
    )
    data = tuple(first_data(source) for source in sources.values())
    traced["algorithm"] = fingerprint.of_function(
        lambda d, s, b: one_step(join(static, d), s, b), dynamic, shapes, data
    )
    held = {
        name: s.data
        for name, s in sources.items()
        if stream_of(s) is None and jax.tree.leaves(s.data)
    }
    if held.get("hyper_data") is held.get("inner_data"):
        held.pop("hyper_data", None)
    key, kind = fingerprint.typed(key)
    parts = {
        **traced,
        "numbers of the algorithm": fingerprint.of_settings(algorithm),
        **{name: fingerprint.of_values(data) for name, data in held.items()},
        "start": fingerprint.of_values(
            (start, outer, fixed) if state is None else (state.algorithm, state.step, fixed)
        ),
        "key": fingerprint.of_values(key),
    }
    shown = {"algorithm": fingerprint.shown(algorithm), "key": f"{kind} {parts['key'][:8]}"}
    return {
        "versions": fingerprint.versions(),
        "parts": parts,
        "traced": list(traced),
        "shown": shown,
        "kind of key": kind,
        "score": _score(metrics, start, outer),
        "tol": None if tol is None else float(tol),  # what a saved run that converged has met
    }


def _score(metrics: Metrics | None, start: InnerState, outer: PyTree) -> str:
    """What iterates are kept by: no part of the problem, but scores of two kinds do not compare."""
    if metrics is None or metrics.select is None:
        return "value"

    chosen, name = metrics, metrics.select

    def score(inner, outer, model):
        return chosen.fn(inner, outer, chosen.data, *((model,) if chosen.stateful else ()))[name]

    traced = fingerprint.of_function(score, start.params, outer, start.model)
    return f"{name}, {chosen.mode}, {traced}"


def _first_state(
    plan: Plan, start: InnerState, outer: PyTree, key: Any, score_dtype: Any, keep: str
) -> RunState:
    score = jnp.full((), jnp.inf, score_dtype)
    best = (
        Best(score, jnp.zeros((), jnp.int32) - 1, start.params, start.model, outer)
        if keep == "best"
        else None
    )
    zero = jnp.zeros((), jnp.int32)
    return RunState(
        plan.algorithm.init(plan.problem, start, outer),
        key,
        zero,
        zero,
        zero,
        jnp.zeros_like(score),
        best,
        first_watch(score),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _placed_first_state(
    static: Any,
    score_dtype: Any,
    keep: str,
    dynamic: tuple[Any, ...],
    start: InnerState,
    outer: PyTree,
    key: Any,
) -> RunState:
    plan = join(static, dynamic)
    return plan.layout.pin(_first_state(plan, start, outer, key, score_dtype, keep))
