"""One hypergradient: solve, take the outer gradient, pull it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import starts, tree
from bilevax._core.apart import apart
from bilevax._core.precision import under
from bilevax.base import (
    Ctx,
    Estimate,
    Feed,
    Feeds,
    Hypergradient,
    InnerSolver,
    InnerState,
    Lower,
    Problem,
    Pullback,
    PyTree,
    Scalar,
    StepInfo,
    as_cotangent,
)
from bilevax.results import RESULTS, as_warning, failed, ladder, strictly


class Call(NamedTuple):
    """The arguments of a method's ``vjp``."""

    lower: Lower
    inner: InnerState
    outer: PyTree
    feed: Feed
    ctx: Ctx
    state: PyTree


class Begun(NamedTuple):
    """A hypergradient about to be taken: ``method.vjp(*call)``, and the pullback of a start that
    depends on outer parameters (or None).
    """

    call: Call
    from_start: Callable[..., Any] | None


def begun(
    problem: Problem,
    solver: InnerSolver,
    method: Hypergradient,
    inner: InnerState,
    outer: PyTree,
    feeds: Feeds,
    state: PyTree,
) -> Begun:
    """What `method` is called with to solve the lower level from `inner`."""
    inner, from_start = starts.started(problem, solver, method, inner, outer, feeds)
    if starts.takes_key(
        problem.inner_init
    ):  # another network each time: nothing of the last one's adjoint is of use
        state = method.init(inner.params)
    lower = Lower(problem.inner, solver, problem.inner_draw, problem.outer.trajectory)
    return Begun(
        Call(lower, inner, outer, feeds.inner, problem.hyper_draw(feeds.hyper, 0), state),
        from_start,
    )


def estimate(
    problem: Problem,
    solver: InnerSolver,
    method: Hypergradient,
    inner: InnerState,
    outer: PyTree,
    feeds: Feeds,
    state: PyTree,
) -> tuple[InnerState, Estimate]:
    """Solve the lower level from `inner` and differentiate the outer objective at its solution, on
    floating-point leaves only.

    Returns the solved inner state, and an `Estimate` whose `state` is the method's and whose info
    has ``code``, ``warnings`` and ``grad_norm``. After a failure it looks whether a batch is to
    blame.
    """
    begin = begun(problem, solver, method, inner, outer, feeds, state)
    solution, est = pulled(problem, method, begin, *method.vjp(*begin.call), feeds)
    code = _blame_batch(problem, solver, feeds, est.info["code"])
    return solution, est._replace(info={**est.info, "code": code})


def pulled(
    problem: Problem,
    method: Hypergradient,
    begin: Begun,
    solution: InnerState,
    pullback: Pullback,
    feeds: Feeds,
) -> tuple[InnerState, Estimate]:
    """The outer objective at what ``method.vjp`` has solved, its gradient there pulled back: the
    solved inner state, and the estimate.
    """
    outer = begin.call.outer
    floats, rest = tree.partition(solution.model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)

    def value_of(params, outer, floats):
        return problem.outer(params, outer, outer_ctx._replace(model=tree.combine(floats, rest)))

    places = (0, 1, 2) if method.sees_model else (0, 1)
    value_and_grads = under(method.precision, jax.value_and_grad(value_of, places, has_aux=True))
    (value, (_, aux)), (inner_cotangent, direct, *seen) = apart(
        value_and_grads, solution.params, outer, floats
    )
    cotangent, init_cotangent, state, info = pullback(
        as_cotangent(method, inner_cotangent, *(seen or [None]))
    )
    grad = tree.add(direct, cotangent)
    if begin.from_start is not None:
        grad = tree.add(grad, begin.from_start(init_cotangent))
    if problem.outer.trajectory:
        solution = solution._replace(params=jax.tree.map(lambda a: a[-1], solution.params))
    outer_ctx = outer_ctx._replace(model=solution.model)

    grad_norm = tree.norm(grad)
    said, warned = as_warning(info["code"])
    warnings = (
        warned
        | info.get("warnings", 0)
        | (
            0
            if method.sees_model
            else starts.constant_statistics(problem, solution, outer, outer_ctx)
        )
    )
    code = ladder(
        said,
        inner=said != RESULTS.inner_nonfinite,
        value=jnp.isfinite(value),
        adjoint=jnp.isfinite(info["inner_grad_norm"]) if "inner_grad_norm" in info else True,
        grad=jnp.isfinite(grad_norm),
    )
    info = {**info, "grad_norm": grad_norm, "code": code, "warnings": warnings}
    return solution, Estimate(value, grad, solution.params, state, info, aux)


_NONFINITE = (
    RESULTS.inner_nonfinite,
    RESULTS.outer_nonfinite,
    RESULTS.adjoint_nonfinite,
    RESULTS.hypergradient_nonfinite,
)


def _blame_batch(problem: Problem, solver: InnerSolver, feeds: Feeds, code: Any) -> Any:
    """After something became non-finite, and only then, look whether a batch already was: its draws
    are pure, so they can be drawn again.
    """

    def finite(ctx):
        return tree.agreed(tree.all_finite(ctx.batch), code)

    def batches_finite():
        def inner(i, ok):
            return ok & finite(problem.inner_draw(feeds.inner, i))

        ok = lax.fori_loop(0, solver.steps, inner, jnp.asarray(True))
        ok &= finite(problem.hyper_draw(feeds.hyper, 0))
        return ok & finite(problem.outer_draw(feeds.outer, 0))

    nonfinite = jnp.any(jnp.asarray([code == c for c in _NONFINITE]))
    clean = lax.cond(nonfinite, batches_finite, lambda: jnp.asarray(True))
    return jnp.where(clean, code, jnp.int32(RESULTS.nonfinite_batch))


def told(
    value: Scalar, info: dict[str, Scalar], point: tuple[InnerState, PyTree], aux: PyTree
) -> StepInfo:
    """What a step reports that took one hypergradient, with `info`, at `point`."""
    diagnostics = {
        name: entry for name, entry in info.items() if name not in ("code", "warnings", "grad_norm")
    }
    return StepInfo(
        value, info["grad_norm"], point, info["code"], diagnostics, aux, info["warnings"]
    )


def guarded(out: Estimate, before: PyTree, strict: int) -> Estimate:
    """An estimate as a loop may be given it that reads no codes: after a failure its `grad` is NaN,
    and its `state` the one `before`.

    `strict` is the mask of the warnings that count as failures.
    """
    code = strictly(out.info["code"], out.info["warnings"], strict)
    bad = failed(code)
    return out._replace(
        grad=tree.nan_where(bad, out.grad),
        state=tree.where(bad, before, out.state),
        info={**out.info, "code": code},
    )
