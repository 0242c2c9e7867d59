"""Solves to an accuracy that is a value: the lower level to a relative distance, the adjoint to a
residual.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import check, linear
from bilevax.base import Ctx, Draw, InnerSolver, InnerState, Problem, PyTree
from bilevax.data import same
from bilevax.results import RESULTS

INNER = 1000  # most iterations of one inner solve


def check_solver(solver: Any, argument: str) -> None:
    """An inner solver whose tolerance can be set for each solve."""
    if not isinstance(solver, InnerSolver) or solver.to_tolerance is None:
        raise TypeError(
            f"{argument}: got {check.describe(solver)}; expected a solver to a tolerance. Try "
            "inner.lbfgs(), inner.agd() or inner.gradient_descent()."
        )


def full_batch_only(problem: Problem, name: str) -> None:
    """Refuse sampled data: an accuracy of a sampled problem says nothing of the whole."""
    draws: tuple[Draw, ...] = (problem.inner_draw, problem.outer_draw)
    for draw in draws:
        if draw is not same:
            raise ValueError(
                f"algorithm: got {name}, which needs the same data at every step, with data drawn "
                f"by {draw!r}; expected arrays (the whole is the "
                "batch), data.full(...) or None. Try algorithms.double_loop for batches."
            )


class Solved(NamedTuple):
    """An inner point, the norm of its gradient, the evaluations spent, whether the solver says that
    it is solved.
    """

    inner: InnerState
    grad_norm: Any
    evaluations: Any
    ok: Any


def solve_to(
    problem: Problem, solver: InnerSolver, inner: InnerState, outer: PyTree, ctx: Ctx, tol: Any
) -> Solved:
    """Run `solver` from `inner` until the distance to the solution is, by its own estimate, at most
    ``tol ‖y‖``.
    """
    assert solver.to_tolerance is not None  # what `check_solver` let in
    state, info = solver.to_tolerance(tol, INNER).step(
        problem.inner, inner, outer, ctx._replace(model=inner.model)
    )
    return Solved(state, info["grad_norm"], info["evaluations"], info["code"] == RESULTS.success)


class Curvature(NamedTuple):
    """Products with the second derivatives of g at a point."""

    hessian: Any  # v -> ∇²_yy g v
    cross: Any  # v -> ∇²_xy g v
    cross_transposed: Any  # w -> ∇²_yx g w
    grad: PyTree


def curvature(problem: Problem, y: PyTree, x: PyTree, ctx: Ctx) -> Curvature:
    """The inner gradient linearised once in each level; a part that nobody calls is dead code."""

    def gradients(y, x):
        return jax.grad(problem.inner, (0, 1), has_aux=True)(y, x, ctx)[0]

    (grad, _), products = jax.linearize(lambda y: gradients(y, x), y)
    _, transposed = jax.linearize(lambda x: gradients(y, x)[0], x)
    return Curvature(lambda v: products(v)[0], lambda v: products(v)[1], transposed, grad)


class Adjoint(NamedTuple):
    """The solution q of ``∇²_yy g q = ∇_y f``, its relative residual, the products spent, the
    solver's code.
    """

    q: PyTree
    residual: Any
    products: Any
    code: Any


def adjoint_to(
    hessian: Any, f_y: PyTree, start: PyTree, tol: Any, maxiter: int, scale: PyTree | None = None
) -> Adjoint:
    """Conjugate gradients from `start` until ``‖S(Hq − ∇_y f)‖ ≤ tol ‖S∇_y f‖``; cut at negative
    curvature, with the iterate that there is.

    S is diagonal, the root of `scale`, and one where that is None. The system is the scaled one,
    ``SHS u = S∇_y f`` with ``q = Su``: in exact arithmetic a preconditioner would do the same, but
    what rounding leaves of a product is told by the matrix that is multiplied, and unknowns in
    units of their own would be taken for a singular one.
    """
    solve = linear.cg(maxiter=maxiter, tol=jax.lax.stop_gradient(tol))
    if scale is None:
        q, info = solve(hessian, f_y, start)
    else:
        root = jax.tree.map(lambda d, b: jnp.sqrt(d).astype(b.dtype), scale, f_y)
        times = lambda v: jax.tree.map(jnp.multiply, root, v)
        from_ = jax.tree.map(jnp.divide, start, root)
        u, info = solve(lambda v: times(hessian(times(v))), times(f_y), from_)
        q = times(u)
    return Adjoint(q, info.residual, info.iterations, info.code)
