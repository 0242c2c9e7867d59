"""Restarted accelerated gradient descent to a tolerance."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from bilevax import base, tree
from bilevax._core import numbers, precision
from bilevax._core.types import Numeric
from bilevax.base import Objective, PyTree, Scalar
from bilevax.inner import _tolerance as tolerance

FORGET = 1.03  # a step, of the smallest curvature
SEARCH = 60  # rejected trials in a row before the solve is given up


class AgdState(NamedTuple):
    """The step size (0 before the first solve)."""

    step_size: Any


def agd(*, maxiter: int = 1000, tol: Numeric = 1e-6) -> base.InnerSolver:
    """Nesterov's accelerated gradient descent with adaptive restart, to a tolerance, with stall
    detection.

    ``y⁺ = z − t ∇_y g(z, x)``, ``z⁺ = y⁺ + (θ − 1)/θ⁺ (y⁺ − y)``, ``θ⁺ = (1 + √(1 + 4θ²))/2``;
    restarted (θ = 1) when ``⟨∇g(z), y⁺ − y⟩ > 0``.

    For convex lower levels; of the order of ``√κ`` iterations where plain descent takes ``κ``,
    without being told the strong convexity. One step is a whole solve, a single ``while_loop`` with
    one value and gradient an iteration. The step size needs no evaluation of its own: a trial
    ``z⁺`` is rejected, and the step shortened, where ``‖∇g(z⁺) − ∇g(z)‖ > ‖z⁺ − z‖ / t``. It
    doubles until the first rejection of a solve, and is kept from solve to solve.

    It stops where two accepted iterates in a row have ``‖∇g‖ <= tol · m ‖y‖``, m the smallest
    curvature along the last steps: the distance that is left, which moves neither with the start,
    nor with the unit of y, nor with the scale of g. Where rounding forbids `tol`, the solve stops
    at the stall (20 steps without a new best value or gradient norm), and the code is success if
    the gradient is at its rounding level (``100 eps`` of curvature times ``‖y‖``) and the distance
    at most ``eps^0.4 ‖y‖``, inner_not_converged otherwise. Where the largest curvature was met long
    ago, as down an exponential, one gradient beside the point asks for it before the solve ends.

    Args:
      maxiter: most iterations (accepted steps) in one solve.
      tol: tolerance on the distance to the solution, relative to the solution's norm; at least 4
        rounding units.

    Returns:
      An `InnerSolver` of one step, not reversible. Its info has ``value`` (at the start),
      ``grad_norm`` (at the end), ``iterations``, ``evaluations`` and ``code``.

    Raises:
      TypeError, ValueError: if `maxiter` is not an int of at least 1, or `tol` is not a positive
        float.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.agd(tol=1e-5)
      >>> g = bx.objective(lambda y, x, batch: jnp.sum(jnp.cosh(y - x)))
      >>> y = jnp.zeros(3)
      >>> state, info = solver.step(g, base.InnerState(y, solver.init(y)), jnp.ones(3), base.Ctx())
      >>> bool(jnp.allclose(state.params, 1.0, atol=1e-4)), int(info["code"])
      (True, 0)

    Source: Nesterov, A method of solving a convex programming problem with convergence rate
    O(1/k²), 1983. O'Donoghue and Candès, Adaptive restart for accelerated gradient schemes, 2015
    (gradient scheme).
    """
    maxiter, tol = numbers.count(maxiter, "maxiter"), numbers.positive(tol, "tol", example=1e-6)
    return base.InnerSolver(
        init=base.Bound("init", _init),
        step=base.Bound("agd", _solve, maxiter=maxiter, tol=tol, products=precision.needed(tol)),
        reversible=False,
        to_tolerance=base.Bound("to_tolerance", _to_tolerance),
        gradients=maxiter,
    )


def _to_tolerance(tol: Any, maxiter: int) -> base.InnerSolver:
    return agd(maxiter=maxiter, tol=tol)


def _init(params: PyTree) -> AgdState:
    return AgdState(jnp.zeros((), tolerance.scalar_dtype(params)))


class _Carry(NamedTuple):
    point: tolerance.Point  # z, where the gradient is known: what is returned
    last: PyTree  # y
    theta: Any
    opt: AgdState
    best: tolerance.Best
    bend: tolerance.Bend
    reach: Any
    growing: Any
    rejected: Any
    first_value: Any
    iterations: Any
    evaluations: Any
    near: Any  # accepted iterates in a row that the tolerance lets pass
    asking: Any  # the next evaluation tells the curvature at the point
    stop: Any


def _solve(
    objective: Objective,
    state: base.InnerState,
    outer: PyTree,
    ctx: base.Ctx,
    *,
    maxiter: int,
    tol: Any,
    products: str | None,
) -> tuple[base.InnerState, dict[str, Scalar]]:
    objective = precision.under(products, objective)
    params = state.params
    dtype, unit = tolerance.scalar_dtype(params), numbers.rounding_unit(params)
    tol = tolerance.least(tol, params)
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)

    def body(carry: _Carry) -> _Carry:
        point, t, asking = carry.point, carry.opt.step_size, carry.asking
        first = (
            carry.evaluations == 0
        )  # the start is evaluated by the loop too, at gradient zero: one copy of the objective
        y = tree.axpy(-t, point.grads, point.params)
        move = tree.sub(y, carry.last)
        restart = tree.dot(point.grads, move) > 0
        theta = (1 + jnp.sqrt(1 + 4 * carry.theta**2)) / 2
        momentum = jnp.where(restart | first, zero, (carry.theta - 1) / theta)
        aside = tolerance.beside(point.params, carry.reach)
        at = tree.where(asking, aside, tree.axpy(momentum, move, y))
        trial = tolerance.evaluate(objective, at, outer, ctx)
        finite = tolerance.is_finite(trial)

        move_z, change = tree.sub(trial.params, point.params), tree.sub(trial.grads, point.grads)
        length, turn = tree.norm(move_z), tree.norm(change)
        noise = 10 * unit * carry.bend.largest * tree.norm(point.params)
        smooth = turn * t <= length + noise * t
        accepted = finite & ~asking & (first | smooth)
        measured = 0.9 * length / jnp.where(turn > 0, turn, one)
        shorter = jnp.where(finite, jnp.clip(measured, 0.1 * t, 0.8 * t), 0.1 * t)
        growing = carry.growing & (first | accepted)
        longer = jnp.where(growing & (2 * t * turn <= length), 2 * t, t)
        begin = jnp.where(t > 0, 2 * t, 1.0 / jnp.where(trial.grad_norm > 0, trial.grad_norm, one))
        next_t = jnp.where(first, begin, jnp.where(accepted, longer, shorter))

        new = tree.where(accepted, trial, point)
        su, counts = tree.dot(move_z, change), finite & ~first & ~asking
        bend = tolerance.update_bend(
            carry.bend, su, length**2, turn**2, tree.norm(point.params), unit, counts, FORGET
        )
        reach = jnp.maximum(carry.reach, tree.norm(new.params))
        best = tolerance.update_best(carry.best, trial, accepted)
        rejected = jnp.where(accepted, 0, carry.rejected + 1).astype(jnp.int32)
        lost = (rejected >= SEARCH) | (first & ~finite)
        moved = accepted & ~first
        near = tolerance.near(carry.near, new, tol, reach, bend, accepted, first)
        done = (near >= tolerance.ROW) | (best.age >= tolerance.PATIENCE) | lost
        # What it would end by may rest on a curvature of long ago: asked once, it goes on if so,
        # with the step and without the momentum that the point has.
        told, fell = tolerance.asked(carry.bend, point.params, finite, length, turn)
        fell = asking & fell
        bend = tree.where(asking, told, bend)
        ask = done & ~asking & ~first & tolerance.doubtful(bend)
        theta = jnp.where(moved, jnp.where(restart, one, theta), carry.theta)
        return _Carry(
            tree.where(first, trial, new),
            tree.where(fell, point.params, tree.where(moved, y, carry.last)),
            jnp.where(fell, one, theta),
            AgdState(jnp.where(fell, 1 / bend.largest, jnp.where(asking, t, next_t))),
            best._replace(age=jnp.where(fell, 0, best.age)),
            bend,
            reach,
            fell | jnp.where(asking, carry.growing, growing),
            jnp.where(fell, 0, rejected),
            jnp.where(first, trial.value, carry.first_value),
            carry.iterations + moved.astype(jnp.int32),
            carry.evaluations + 1,
            jnp.where(fell, 0, near),
            ask,
            jnp.where(asking, ~fell, done & ~ask),
        )

    start = _Carry(
        point=tolerance.unevaluated(params, state.model),
        last=params,
        theta=one,
        opt=state.opt,
        best=tolerance.first_best(params),
        bend=tolerance.no_bend(params),
        reach=zero,
        growing=jnp.asarray(True),
        rejected=jnp.int32(0),
        first_value=zero,
        iterations=jnp.int32(0),
        evaluations=jnp.int32(0),
        near=jnp.int32(0),
        asking=jnp.asarray(False),
        stop=jnp.asarray(False),
    )
    end = lax.while_loop(lambda carry: ~carry.stop & (carry.iterations < maxiter), body, start)
    info = {
        "value": end.first_value,
        "grad_norm": end.point.grad_norm,
        "iterations": end.iterations,
        "evaluations": end.evaluations,
        "code": tolerance.verdict(end.point, end.near >= tolerance.ROW, end.stop, end.bend),
    }
    return base.InnerState(end.point.params, end.opt, end.point.model), info
