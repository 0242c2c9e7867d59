"""What the methods that solve an adjoint system share: refusals, and how a linear solver's word
becomes theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax.base import (
    Ctx,
    Linear,
    LinearInfo,
    LinearSolver,
    Lower,
    Objective,
    PyTree,
    Scalar,
    as_linear,
)
from bilevax.linear.preconditioner import Point
from bilevax.results import RESULTS, first, warning

# residual above which an adjoint is called rough where its solver has no tolerance of its own
ROUGH = 0.1
# rounding units above this are those of half precision
HALF = 1e-4


def check_settings(linear: Any, max_residual: Any, default: LinearSolver) -> tuple[Linear, Any]:
    """The linear solver to use, and the residual to accept."""
    if max_residual is not None:
        max_residual = numbers.positive(max_residual, "max_residual", infinite=True, example=0.5)
    linear = default if linear is None else linear
    if not callable(linear):
        raise TypeError(
            f"linear: got {numbers.shown(linear)}; expected a solver (matvec, b, x0) -> (x, info), "
            "such as linear.cg(maxiter=20)."
        )
    numbers.takes(linear, "linear", "(matvec, b, x0) -> (x, info)")
    return as_linear(linear), max_residual


def point(objective: Objective, params: PyTree, outer: PyTree, ctx: Ctx, damping: Any) -> Point:
    """What a linear solver may know of the system beyond products: the inner objective, and how a
    user's function is called like it.
    """
    like = jax.tree.map(jnp.shape, params)

    def value(params: PyTree, batch: PyTree) -> Any:
        return objective(params, outer, ctx._replace(batch=batch))[0]

    def call(fn: Callable[..., Any], first: PyTree, batch: PyTree, key: Any = None) -> Any:
        inner = (
            jax.tree.structure(first) == jax.tree.structure(params)
            and jax.tree.map(jnp.shape, first) == like
        )

        def called(given: PyTree, *rest: Any, **keywords: Any) -> Any:
            found = fn(given if inner else first, *rest, **keywords)
            return (found, None) if objective.stateful else found

        made = Objective(called, stateful=objective.stateful, keyed=key is not None)
        adapted = made if objective.adapt is None else objective.adapt(made)
        return adapted(first if inner else params, outer, ctx._replace(batch=batch, key=key))[0]

    return Point(value, params, ctx.batch, call, damping)


def report(
    info: dict[str, Scalar], linear_info: LinearInfo, max_residual: Any, w: PyTree, **entries: Any
) -> dict[str, Scalar]:
    """The info of a pullback of `w`: a rough adjoint is a warning, and one that no number came of a
    failure.
    """
    code, warnings = verdict(linear_info, max_residual, w)
    iterations = jnp.asarray(linear_info.iterations, jnp.int32)
    given = {
        "adjoint_iterations": iterations,
        "adjoint_residual": linear_info.residual,
        "gradients": jnp.int32(1),
        "hvps": iterations,
        "mixed_products": jnp.int32(1),
    }
    said = {"code": first(info["code"], code), "warnings": info.get("warnings", 0) | warnings}
    return {**info, **given, **entries, **said}


def through_fixed_point(
    mapping: Any,
    linear: LinearSolver,
    solution: Any,
    outer: PyTree,
    info: Any,
    w: Any,
    start: Any,
    max_residual: Any,
) -> tuple[Any, ...]:
    """The pullback of a fixed point of ``mapping(inner, outer)``: the outer cotangent, the adjoint,
    the info.
    """

    def image(inner, outer):
        return jax.tree.map(lambda new, old: new.astype(old.dtype), mapping(inner, outer), inner)

    new, products = jax.vjp(image, solution, outer)
    q, linear_info = linear(lambda v: tree.sub(v, products(v)[0]), w, start)
    moved = tree.norm(tree.sub(new, solution))
    return products(q)[1], q, report(info, linear_info, max_residual, w, inner_grad_norm=moved)


def far_off(lower: Lower, opt: PyTree, w: PyTree, hq: PyTree, q: PyTree) -> Scalar:
    """The warning that q is `ROUGH`, however small its residual ``r = w − Hq``, by the inner
    solver's estimate B of the inverse Hessian: ``⟨r, Br⟩ > ROUGH² ⟨w, q⟩``, which is the relative
    error in the norm of H. It has no unit, and a residual has: with unknowns in units of their own
    a small one says nothing. ``⟨w, Bw⟩`` counts for ``⟨w, q⟩`` where it is larger: a B that knows
    nothing yet is the identity, whatever the unit of H.
    """
    product = lower.solver.inverse_hessian
    if product is None:
        return jnp.int32(0)
    opt, w, hq, q = jax.lax.stop_gradient((opt, w, hq, q))
    r = tree.sub(w, hq)
    size = jnp.maximum(jnp.abs(tree.dot(w, q)), tree.dot(w, product(opt, w)))
    far = tree.dot(r, product(opt, r)) > ROUGH**2 * size
    return warning(far, RESULTS.adjoint_not_converged)


def as_rounding_allows(linear_info: LinearInfo, w: PyTree) -> LinearInfo:
    """A solver's word on a system with the right side `w`, where a tolerance that was missed by
    rounding alone counts as met: that of the coarsest leaf, which finer ones beside it cannot mend.
    """
    unit = numbers.rounding_unit(w)
    met = linear_info.residual <= (100 if unit < HALF else 20) * unit
    missed = linear_info.code == RESULTS.adjoint_not_converged
    return linear_info._replace(
        code=jnp.where(missed & met, jnp.int32(RESULTS.success), linear_info.code)
    )


def verdict(linear_info: LinearInfo, max_residual: Any, w: PyTree) -> tuple[Scalar, Scalar]:
    """A linear solver's word on a system with the right side `w`, as ``(code, warnings)``.

    Failures: a residual that is not finite, and a breakdown that left nothing better than a zero
    adjoint.
    Warnings: a residual above `max_residual`, negative curvature, a breakdown. With
    ``max_residual=None`` the solver's own tolerance counts (down to what rounding allows), and
    `ROUGH` for solvers that have none.
    """
    residual, said = linear_info.residual, as_rounding_allows(linear_info, w).code
    if max_residual is None:
        rough = (said == RESULTS.adjoint_not_converged) | (residual > ROUGH)
    else:
        rough = residual > max_residual
    broken, negative = said == RESULTS.adjoint_breakdown, said == RESULTS.negative_curvature
    nothing = (
        broken & ~(residual < 1)
        | negative & ~jnp.isfinite(residual)
        | (said == RESULTS.adjoint_nonfinite)
    )
    code = jnp.where(
        jnp.isfinite(residual), jnp.int32(RESULTS.success), jnp.int32(RESULTS.adjoint_nonfinite)
    )
    code = jnp.where(nothing, said, code)
    warnings = warning(rough, RESULTS.adjoint_not_converged) | warning(
        broken, RESULTS.adjoint_breakdown
    )
    return code, warnings | warning(negative, RESULTS.negative_curvature)
