"""A constrained lower level as functions of one vector, and what Newton's method needs of them at a
point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax._core import numbers
from bilevax._core.precision import under
from bilevax.base import Bound, Ctx, InnerSolver, InnerState, Objective, PyTree
from bilevax.inner._constraints import as_constraints, dense_dtype, unvector, vector
from bilevax.inner._mapping import bound_like
from bilevax.inner._quadratic import Program, violation
from bilevax.results import RESULTS


class Level(NamedTuple):
    """``value(y)`` and ``limits(y) -> (equality, inequality)`` on vectors, and the forms of
    both.
    """

    value: Any
    limits: Any
    start: Any
    params: PyTree
    shapes: PyTree

    def back(self, y: Any) -> PyTree:
        """A vector as inner parameters."""
        return unvector(y, self.params)

    def multipliers(self, equality: Any, inequality: Any) -> PyTree:
        """Vectors of multipliers in the form of the constraints."""
        return unvector(equality, self.shapes[0]), unvector(inequality, self.shapes[1])


def level(
    objective: Objective, constraints: Objective, params: PyTree, outer: PyTree, ctx: Ctx
) -> Level:
    """The level that `objective` and `constraints` make with these outer parameters."""
    dtype, limited = dense_dtype(params), bound_like(constraints, objective)
    shapes = jax.eval_shape(lambda y: limited(y, outer, ctx)[0], params)
    for name, kind in zip(("equality", "inequality"), shapes, strict=True):
        for leaf in jax.tree.leaves(kind):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"{name}: it returned {leaf}; expected floating-point arrays, zero or not "
                    "positive where the constraint holds."
                )

    def value(y):
        return objective(unvector(y, params), outer, ctx)[0].astype(dtype)

    def limits(y):
        given = limited(unvector(y, params), outer, ctx)[0]
        return vector(given[0], dtype), vector(given[1], dtype)

    return Level(value, limits, vector(params, dtype), params, shapes)


def around(given: Level, y: Any, equality: Any, inequality: Any) -> Program:
    """The quadratic program of a Newton step from `y`, in the step: second derivatives of the
    Lagrangian, constraints to first order.
    """
    c, h = given.limits(y)

    def lagrangian(y):
        c, h = given.limits(y)
        return given.value(y) + jnp.sum(equality * c) + jnp.sum(inequality * h)

    rows = jax.jacrev(given.limits)(y)
    return Program(jax.hessian(lagrangian)(y), jax.grad(given.value)(y), rows[0], -c, rows[1], -h)


def left(given: Level, y: Any, equality: Any, inequality: Any, curvature: Any) -> Any:
    """The largest relative violation of the conditions of optimality of the level itself;
    `curvature` is a Hessian of about the right size.
    """
    (c, h), rows = given.limits(y), jax.jacrev(given.limits)(y)
    # As a program in whole coordinates, so that what is left is compared with what it is the
    # difference of.
    bent = jax.grad(given.value)(y) - curvature @ y
    return violation(
        Program(curvature, bent, rows[0], rows[0] @ y - c, rows[1], rows[1] @ y - h),
        y,
        equality,
        inequality,
    )


def verdict(residual: Any, tol: Any) -> Any:
    """The `RESULTS` code of a point with this violation: solved to `tol`, or to what rounding
    allows.
    """
    allowed = jnp.maximum(jnp.asarray(tol, residual.dtype), 100 * jnp.finfo(residual.dtype).eps)
    code = jnp.where(
        residual <= allowed, jnp.int32(RESULTS.success), jnp.int32(RESULTS.inner_not_converged)
    )
    return jnp.where(jnp.isfinite(residual), code, jnp.int32(RESULTS.inner_nonfinite))


# ---- a solver made of a minimizer of such levels


class Solved(NamedTuple):
    """Where a minimizer ended, as vectors: the point, its multipliers, `left` of it, and the
    iterations done.
    """

    y: Any
    equality: Any
    inequality: Any
    residual: Any
    iterations: Any


def solver(
    name: str,
    step: Callable[..., Any],
    equality: Any,
    inequality: Any,
    maxiter: int,
    tol: float,
) -> InnerSolver:
    """The solver whose step is `step` with these settings."""
    settings = dict(
        constraints=as_constraints(equality, inequality),
        maxiter=numbers.count(maxiter, "maxiter"),
        tol=numbers.positive(tol, "tol", example=1e-8),
    )
    return InnerSolver(
        init=Bound("init", _init),
        step=Bound(name, step, **settings),
        reversible=False,
        constraints=settings["constraints"],
    )


def _init(params: PyTree) -> tuple[Any, ...]:
    return ()


def solve(
    minimize: Callable[[Level, int, Any], Solved],
    objective: Objective,
    state: InnerState,
    outer: PyTree,
    ctx: Ctx,
    *,
    constraints: Any,
    maxiter: int,
    tol: Any,
) -> tuple[InnerState, dict[str, Any]]:
    """A step of the solver: the whole solve by `minimize`."""
    value, (model, _) = objective(state.params, outer, ctx)
    given = level(objective, constraints, state.params, outer, ctx)
    end = under("highest", lambda: minimize(given, maxiter, tol))()
    info = {
        "value": value,
        "grad_norm": end.residual,
        "iterations": end.iterations,
        "multipliers": given.multipliers(end.equality, end.inequality),
        "code": verdict(end.residual, tol),
    }
    return InnerState(given.back(end.y), state.opt, model), info
