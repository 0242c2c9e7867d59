"""Solves to an accuracy that is a value: the lower level to a gradient norm, the adjoint to a residual."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import check, linear, tree
from bilevax.base import Bound, Ctx, Draw, InnerSolver, InnerState, Problem, PyTree
from bilevax.data import same


def check_solver(solver: Any, argument: str) -> None:
    """An inner solver that stops at a tolerance which can be set for each solve."""
    ok = isinstance(solver, InnerSolver) and isinstance(solver.step, Bound) and {"tol", "maxiter"} <= set(solver.step.settings)
    if not ok:
        raise TypeError(
            f"{argument}: got {check.describe(solver)}; expected a solver to a tolerance. Try inner.lbfgs(), inner.agd() or inner.gradient_descent()."
        )


def full_batch_only(problem: Problem, name: str) -> None:
    """Refuse sampled data: an accuracy of a sampled problem says nothing of the whole."""
    draws: tuple[Draw, ...] = (problem.inner_draw, problem.outer_draw)
    for draw in draws:
        if draw is not same:
            raise ValueError(
                f"algorithm: got {name}, which needs the same data at every step, with data drawn by {draw!r}; expected arrays (the whole is the "
                "batch), data.full(...) or None. Try algorithms.double_loop for batches."
            )


NEWTON_STEPS, NEWTON_PRODUCTS = 10, 500


class Solved(NamedTuple):
    """An inner point, the norm of its gradient, the evaluations spent, the solver's code."""

    inner: InnerState
    grad_norm: Any
    evaluations: Any
    code: Any


def solve_to(problem: Problem, solver: InnerSolver, inner: InnerState, outer: PyTree, ctx: Ctx, target: Any, scale: Any) -> Solved:
    """Run `solver` from `inner` until ``‖∇_y g‖ ≤ target``; `scale` is a gradient norm that none of its starts exceeds.

    A first-order solver that gives up before is followed by Newton steps, their systems solved by conjugate gradients, for as long as each at least
    halves the gradient: what ill-conditioned lower levels need for the last digits. Their products count as evaluations.
    """
    assert isinstance(solver.step, Bound)  # what `check_solver` let in
    step = Bound(solver.step.name, solver.step.fn, **{**solver.step.settings, "tol": target / scale})
    opt = inner.opt._replace(scale=scale.astype(inner.opt.scale.dtype))
    state, info = step(problem.inner, inner._replace(opt=opt), outer, ctx._replace(model=inner.model))
    dtype = info["grad_norm"].dtype
    target = target.astype(dtype)
    ctx = ctx._replace(model=state.model)

    def newton(carry):
        y, norm, spent, _, count = carry
        there = curvature(problem, y, outer, ctx)
        correction = adjoint_to(there.hessian, there.grad, tree.zeros_like(y), 0.1 * target, NEWTON_PRODUCTS)
        moved = tree.sub(y, correction.q)
        new = tree.norm(jax.grad(problem.inner, has_aux=True)(moved, outer, ctx)[0]).astype(dtype)
        better = new <= 0.5 * norm
        return tree.where(better, moved, y), jnp.where(better, new, norm), spent + correction.products + 2, better, count + 1

    def unfinished(carry):
        _, norm, _, better, count = carry
        return (norm > target) & better & (count < NEWTON_STEPS) & jnp.isfinite(norm)

    start = (state.params, info["grad_norm"], info["evaluations"], jnp.asarray(True), jnp.int32(0))
    y, norm, spent, _, _ = jax.lax.while_loop(unfinished, newton, start)
    return Solved(state._replace(params=y), norm, spent, info["code"])


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
    """The solution q of ``∇²_yy g q = ∇_y f``, its absolute residual, the products spent, the solver's code."""

    q: PyTree
    residual: Any
    products: Any
    code: Any


def adjoint_to(hessian: Any, f_y: PyTree, start: PyTree, residual: Any, maxiter: int) -> Adjoint:
    """Conjugate gradients from `start` until ``‖Hq − ∇_y f‖ ≤ residual``."""
    size = tree.norm(f_y)
    tol = residual / jnp.where(size == 0, jnp.ones_like(size), size)
    q, info = linear.cg(maxiter=maxiter, tol=jax.lax.stop_gradient(tol))(hessian, f_y, start)
    return Adjoint(q, info.residual * size, info.iterations, info.code)
