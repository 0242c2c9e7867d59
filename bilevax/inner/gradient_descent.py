"""Gradient descent to a tolerance."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from bilevax import base, tree
from bilevax._core import numbers, precision
from bilevax._core.types import Numeric
from bilevax.base import Objective, PyTree, Scalar
from bilevax.inner import _tolerance as tolerance

# A step, of the smallest curvature: zigzags hide the softest direction for a condition of them.
FORGET = 1.01
SUFFICIENT, GROW, SHRINK = 0.3, 1.25, 0.5


class DescentState(NamedTuple):
    """The next trial step (0 before the first solve)."""

    step_size: Any


def gradient_descent(
    step_size: Numeric | None = None, *, maxiter: int = 1000, tol: Numeric = 1e-6
) -> base.InnerSolver:
    """Gradient descent to a tolerance, with a fixed or a backtracked step and stall detection.

    ``y⁺ = y − t ∇_y g(y, x)``

    One step is a whole solve, a single ``while_loop`` with one value and gradient an iteration. A
    fixed number of fixed steps, which may be unrolled, is ``inner.optax(optax.sgd(t), steps)``.
    With ``step_size=None`` the step is halved until ``g(y⁺) <= g(y) − 0.3 t ‖∇g‖²`` (by slopes
    where rounding blurs the values), grows by a quarter after each accepted step, and is kept from
    solve to solve.

    It stops where two accepted iterates in a row have ``‖∇g‖ <= tol · m ‖y‖``, m the smallest
    curvature along the last steps: the distance that is left, which moves neither with the start,
    nor with the unit of y, nor with the scale of g. Where rounding forbids `tol`, the solve stops
    at the stall (20 steps without a new best value or gradient norm), and the code is success if
    the gradient is at its rounding level (``100 eps`` of curvature times ``‖y‖``) and the distance
    at most ``eps^0.4 ‖y‖``, inner_not_converged otherwise. Where the largest curvature was met long
    ago, as down an exponential, one gradient beside the point asks for it before the solve ends. A
    step that would leave the finite numbers is not taken; with a fixed step it ends the solve as
    inner_nonfinite.

    Args:
      step_size: fixed step, or None for backtracking.
      maxiter: most iterations (accepted steps) in one solve.
      tol: tolerance on the distance to the solution, relative to the solution's norm; at least 4
        rounding units.

    Returns:
      An `InnerSolver` of one step, not reversible. Its info has ``value`` (at the start),
      ``grad_norm`` (at the end), ``iterations``, ``evaluations`` and ``code``.

    Raises:
      TypeError, ValueError: if `maxiter` is not an int of at least 1, or `tol` or `step_size` is
        not a positive float.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.gradient_descent(tol=1e-5)
      >>> g = bx.objective(lambda y, x, batch: jnp.sum(jnp.cosh(y - x)))
      >>> y = jnp.zeros(3)
      >>> state, info = solver.step(g, base.InnerState(y, solver.init(y)), jnp.ones(3), base.Ctx())
      >>> bool(jnp.allclose(state.params, 1.0, atol=1e-4)), int(info["code"])
      (True, 0)

    Source: Armijo, Minimization of functions having Lipschitz continuous first partial derivatives,
    1966.
    """
    maxiter, tol = numbers.count(maxiter, "maxiter"), numbers.positive(tol, "tol", example=1e-6)
    fixed = None if step_size is None else numbers.positive(step_size, "step_size")
    return base.InnerSolver(
        init=base.Bound("init", _init),
        step=base.Bound(
            "gradient_descent",
            _solve,
            step_size=fixed,
            maxiter=maxiter,
            tol=tol,
            products=precision.needed(tol),
        ),
        reversible=False,
        to_tolerance=base.Bound("to_tolerance", _to_tolerance, step_size=fixed),
        gradients=maxiter,
    )


def _to_tolerance(tol: Any, maxiter: int, *, step_size: Any) -> base.InnerSolver:
    return gradient_descent(step_size, maxiter=maxiter, tol=tol)


def _init(params: PyTree) -> DescentState:
    return DescentState(jnp.zeros((), tolerance.scalar_dtype(params)))


class _Carry(NamedTuple):
    point: tolerance.Point
    opt: DescentState
    best: tolerance.Best
    bend: tolerance.Bend
    reach: Any
    first_value: Any
    iterations: Any
    evaluations: Any
    near: Any  # accepted iterates in a row that the tolerance lets pass
    diverged: Any
    asking: Any  # the next evaluation tells the curvature at the point
    stop: Any


def _solve(
    objective: Objective,
    state: base.InnerState,
    outer: PyTree,
    ctx: base.Ctx,
    *,
    step_size: Any,
    maxiter: int,
    tol: Any,
    products: str | None,
) -> tuple[base.InnerState, dict[str, Scalar]]:
    objective = precision.under(products, objective)
    params = state.params
    dtype, unit = tolerance.scalar_dtype(params), numbers.rounding_unit(params)
    tol = tolerance.least(tol, params)
    zero = jnp.zeros((), dtype)

    def body(carry: _Carry) -> _Carry:
        point, t, asking = carry.point, carry.opt.step_size, carry.asking
        first = (
            carry.evaluations == 0
        )  # the start is evaluated by the loop too, at gradient zero: one copy of the objective
        aside = tolerance.beside(point.params, carry.reach)
        at = tree.where(asking, aside, tree.axpy(-t, point.grads, point.params))
        trial = tolerance.evaluate(objective, at, outer, ctx)
        finite = tolerance.is_finite(trial)
        drop = jnp.where(first, zero, point.grad_norm**2)
        slope = -tree.dot(trial.grads, point.grads)
        if step_size is None:
            descends = trial.value <= point.value - SUFFICIENT * t * drop
            blurred = jnp.abs(trial.value - point.value) <= 10 * unit * jnp.abs(point.value)
            accepted = finite & (
                first | jnp.where(blurred, slope <= (1 - 2 * SUFFICIENT) * drop, descends)
            )
            start = jnp.where(t > 0, t, 1.0 / jnp.where(trial.grad_norm > 0, trial.grad_norm, 1.0))
            next_t = jnp.where(first, start, jnp.where(accepted, GROW * t, SHRINK * t))
        else:
            accepted = finite
            next_t = jnp.broadcast_to(jnp.asarray(step_size).astype(dtype), ())

        accepted = accepted & ~asking
        new = tree.where(accepted, trial, point)
        length = t * jnp.sqrt(drop)
        norm, counts = tree.norm(point.params), finite & ~first & ~asking
        turned = jnp.maximum(
            trial.grad_norm**2 + 2 * slope + drop, 0.0
        )  # the squared norm of the gradient's change
        bend = tolerance.update_bend(
            carry.bend, (slope + drop) * t, length**2, turned, norm, unit, counts, FORGET
        )
        reach = jnp.maximum(carry.reach, tree.norm(new.params))
        near = tolerance.near(carry.near, new, tol, reach, bend, accepted, first)
        best = tolerance.update_best(carry.best, trial, accepted)
        # A step so small that it no longer moves the point has nothing left to halve.
        lost = ~first & ~asking & ~accepted & (length <= 0.1 * unit * (norm + length))
        diverged = ~finite & ~asking & (first | (step_size is not None))
        done = (near >= tolerance.ROW) | (best.age >= tolerance.PATIENCE) | lost | diverged
        # What it would end by may rest on a curvature of long ago: asked once, it goes on if so.
        far = tree.norm(tree.sub(trial.params, point.params))
        change = tree.norm(tree.sub(trial.grads, point.grads))
        told, fell = tolerance.asked(carry.bend, point.params, finite, far, change)
        fell = asking & fell
        bend = tree.where(asking, told, bend)
        ask = done & ~asking & ~first & ~diverged & tolerance.doubtful(bend)
        return _Carry(
            tree.where(first, trial, new),
            DescentState(jnp.where(asking, t, next_t)),
            best._replace(age=jnp.where(fell, 0, best.age)),
            bend,
            reach,
            jnp.where(first, trial.value, carry.first_value),
            carry.iterations + (accepted & ~first).astype(jnp.int32),
            carry.evaluations + 1,
            jnp.where(fell, 0, near),
            diverged,
            ask,
            jnp.where(asking, ~fell, done & ~ask),
        )

    first_step, bend = state.opt.step_size, tolerance.no_bend(params)
    if step_size is not None:
        first_step = jnp.asarray(step_size).astype(dtype)
        # a fixed step that works is at most about 1/L
        bend = bend._replace(largest=1 / first_step, recent=1 / first_step)
    start = _Carry(
        point=tolerance.unevaluated(params, state.model),
        opt=DescentState(first_step),
        best=tolerance.first_best(params),
        bend=bend,
        reach=zero,
        first_value=zero,
        iterations=jnp.int32(0),
        evaluations=jnp.int32(0),
        near=jnp.int32(0),
        diverged=jnp.asarray(False),
        asking=jnp.asarray(False),
        stop=jnp.asarray(False),
    )
    end = lax.while_loop(lambda carry: ~carry.stop & (carry.iterations < maxiter), body, start)
    info = {
        "value": end.first_value,
        "grad_norm": end.point.grad_norm,
        "iterations": end.iterations,
        "evaluations": end.evaluations,
        "code": tolerance.verdict(
            end.point, end.near >= tolerance.ROW, end.stop, end.bend, end.diverged
        ),
    }
    return base.InnerState(end.point.params, end.opt, end.point.model), info
