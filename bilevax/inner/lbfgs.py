"""L-BFGS to a tolerance."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import base, tree
from bilevax._core import numbers, precision
from bilevax._core.types import Numeric
from bilevax.base import Objective, PyTree, Scalar
from bilevax.inner import _tolerance as tolerance

FORGET = 1.1  # a step, of the smallest curvature
SUFFICIENT, CURVATURE = 1e-4, 0.9  # weak Wolfe conditions
SEARCH = 20  # evaluations in one line search before the memory is dropped, or the solve given up
FURTHER = 1e4  # times the unit step
# trials in a row that rounding hides, with a step below the tolerance, before the solve is done
LOST = 3


class LbfgsState(NamedTuple):
    """The memory of a solve, kept for the next one. ``S`` holds steps ``s``, differences of
    iterates, and ``U`` the changes ``u`` of the gradient.

    Attributes:
      steps: ``S``, like the parameters, each leaf with a leading axis ``(memory,)``, the oldest
        pair at `head`.
      changes: ``U``, likewise.
      inverse: ``(memory, memory)``, ``R⁻¹`` with ``R_ij = s_i·u_j`` where pair i is not newer than
        pair j; zero for slots not in use.
      diagonal: ``(memory,)``, ``s_i·u_i``; zero for slots not in use.
      head: the slot that is written next.
      scale: like the parameters; the initial inverse Hessian is ``Σ = gamma · diag(scale)``. 0
        before the first pair, as is `gamma`.
      curvature: the largest that the last solve met which moved far enough to tell; 0 before.
    """

    steps: PyTree
    changes: PyTree
    inverse: Any
    diagonal: Any
    head: Any
    scale: PyTree
    gamma: Any
    curvature: Any


def lbfgs(*, maxiter: int = 500, tol: Numeric = 1e-6, memory: int = 10) -> base.InnerSolver:
    """L-BFGS to ``‖H ∇_y g‖ <= tol · ‖y‖``, with a weak Wolfe line search and stall detection.

    ``y⁺ = y − t H ∇_y g(y, x)``, with ``H`` the inverse BFGS matrix of the last `memory` pairs ``s
    = y⁺ − y``, ``u = ∇g(y⁺) − ∇g(y)``.

    One step is a whole solve: a single ``while_loop`` whose body is one value and gradient. Search
    and descent share that one evaluation, so the objective is compiled once and an iteration whose
    unit step is accepted costs one evaluation; ``optax.lbfgs`` and jaxopt's L-BFGS compile it
    several times. ``H`` is applied in its compact form, from the small matrices of inner products,
    which takes four products with the memory and no sequential recursion over it. It begins at a
    diagonal that is updated as the BFGS matrix of a diagonal is, which knows the unit of each
    parameter: features in mixed units take a fifth to a thirtieth of the iterations. Pairs without
    positive curvature are skipped, and a search that fails, or goes 1e4 times further than the
    memory says, drops the memory, so non-convex lower levels and far starts are safe. Near the
    minimum, where values no longer tell two points apart, slopes decide (approximate Wolfe).

    It stops where two accepted iterates in a row have a quasi-Newton step ``‖H ∇g‖`` of at most
    ``tol · ‖y‖``: the distance that is left, which moves neither with the start, nor with the unit
    of y, nor with the scale of g. The memory is kept from solve to solve, so that a warm start
    takes fewer iterations; it cannot loosen the rule, since a step along which the memory is out of
    date fails the line search's test of curvature. Where rounding forbids `tol`, the solve stops
    when it loses the values of its trials, or at the stall (40 evaluations without a new best value
    or gradient norm). The code is success if the gradient is at its rounding level (``100 eps`` of
    curvature times ``‖y‖``) and ``‖H ∇g‖`` at most ``eps^0.4 ‖y‖`` (2e-3 in float32, 5e-7 in
    float64), inner_not_converged otherwise, and where `maxiter` ended the solve.

    Args:
      maxiter: most iterations (accepted steps) in one solve.
      tol: tolerance on the distance to the solution, relative to the solution's norm; at least 4
        rounding units.
      memory: pairs kept.

    Returns:
      An `InnerSolver` of one step, not reversible. Its info has ``value`` (at the start),
      ``grad_norm`` (at the end), ``iterations``, ``evaluations`` and ``code``.

    Raises:
      TypeError, ValueError: if `maxiter` or `memory` is not an int of at least 1, or `tol` is not a
        positive float.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.lbfgs(tol=1e-5)
      >>> g = bx.objective(lambda y, x, batch: jnp.sum(jnp.cosh(y - x)))
      >>> y = jnp.zeros(3)
      >>> state, info = solver.step(g, base.InnerState(y, solver.init(y)), jnp.ones(3), base.Ctx())
      >>> bool(jnp.allclose(state.params, 1.0, atol=1e-4)), int(info["code"])
      (True, 0)

    Source: Liu and Nocedal, On the limited memory BFGS method for large scale optimization, 1989.
    Byrd, Nocedal and Schnabel, Representations of quasi-Newton matrices and their use in limited
    memory methods, 1994 (compact form). Gilbert and Lemaréchal, Some numerical experiments with
    variable-storage quasi-Newton algorithms, 1989 (the diagonal). Hager and Zhang, A new conjugate
    gradient method with guaranteed descent, 2005 (approximate Wolfe). Lewis and Overton, Nonsmooth
    optimization via quasi-Newton methods, 2013 (bracketing).
    """
    maxiter, tol = numbers.count(maxiter, "maxiter"), numbers.positive(tol, "tol", example=1e-6)
    memory = numbers.count(memory, "memory")
    return base.InnerSolver(
        init=base.Bound("init", _init, memory=memory),
        step=base.Bound("lbfgs", _solve, maxiter=maxiter, tol=tol, products=precision.needed(tol)),
        reversible=False,
        to_tolerance=base.Bound("to_tolerance", _to_tolerance, memory=memory),
        gradients=maxiter,
        inverse_hessian=inverse_hessian_product,
        inverse_diagonal=_inverse_diagonal,
    )


def _to_tolerance(tol: Any, maxiter: int, *, memory: int) -> base.InnerSolver:
    return lbfgs(maxiter=maxiter, tol=tol, memory=memory)


def _init(params: PyTree, *, memory: int) -> LbfgsState:
    dtype = tolerance.scalar_dtype(params)
    rows = lambda: jax.tree.map(lambda p: jnp.zeros((memory, *p.shape), p.dtype), params)
    return LbfgsState(
        steps=rows(),
        changes=rows(),
        inverse=jnp.zeros((memory, memory), dtype),
        diagonal=jnp.zeros((memory,), dtype),
        head=jnp.int32(0),
        scale=jax.tree.map(lambda p: jnp.zeros(p.shape, tolerance.scalar_dtype(p)), params),
        gamma=jnp.zeros((), dtype),
        curvature=jnp.zeros((), dtype),
    )


# ---- the inverse Hessian estimate


def inverse_hessian_product(state: LbfgsState, v: PyTree) -> PyTree:
    """``H v`` with the inverse Hessian estimate that a solve left behind: positive definite, and
    ``v`` itself while no pair is kept.

    Args:
      state: the `opt` of the `InnerState` that an `lbfgs` step returned.
      v: like the inner parameters.

    Returns:
      ``H v``, like `v`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax.inner.lbfgs import inverse_hessian_product, lbfgs
      >>> inverse_hessian_product(lbfgs().init(jnp.zeros(2)), jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    gamma = jnp.where(state.gamma > 0, state.gamma, jnp.ones_like(state.gamma))
    return _apply(state, v, gamma)


def _apply(state: LbfgsState, v: PyTree, gamma: Scalar) -> PyTree:
    """The compact form: ``Hv = z + S R⁻ᵀ[D p − U'z]``, ``p = R⁻¹ S'v``, ``z = Σ (v − U p)``."""
    dtype = gamma.dtype
    p = _matvec(state.inverse, _products(state.steps, v))
    z = jax.tree.map(
        lambda u, rows, d: gamma * d.astype(dtype) * (u.astype(dtype) - _sum(p, rows)),
        v,
        state.changes,
        _known(state.scale),
    )
    a = _matvec(state.inverse.T, state.diagonal * p - _products(state.changes, z))
    return jax.tree.map(lambda u, z, rows: (z + _sum(a, rows)).astype(u.dtype), v, z, state.steps)


def _inverse_diagonal(state: LbfgsState) -> PyTree:
    return _known(state.scale)


def _known(scale: PyTree) -> PyTree:
    return jax.tree.map(lambda d: jnp.where(d > 0, d, jnp.ones_like(d)), scale)


def _sum(weights: jax.Array, rows: jax.Array) -> jax.Array:
    return lax.dot_general(
        weights,
        rows.astype(weights.dtype),
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )


def _matvec(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(
        a * b[None, :], axis=1
    )  # a dozen numbers: a fused sum costs less than a call of a matrix product


def _products(rows: PyTree, v: PyTree) -> jax.Array:
    """``(memory,)``: of each row with `v`. Contracting all trailing axes at once reshapes nothing,
    so shardings hold.
    """
    dtype = tolerance.scalar_dtype(v)

    def leaf(rows, u):
        axes, wide = (tuple(range(1, rows.ndim)), tuple(range(u.ndim))), tolerance.scalar_dtype(u)
        if rows.dtype != u.dtype:
            rows, u = rows.astype(wide), u.astype(wide)
        return lax.dot_general(
            rows,
            u,
            (axes, ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=wide,
        ).astype(dtype)

    parts = jax.tree.leaves(jax.tree.map(leaf, rows, v))
    return sum(parts[1:], parts[0])


def remember(state: LbfgsState, s: PyTree, u: PyTree, su: Scalar, keep: Scalar) -> LbfgsState:
    """Write a pair over the oldest one where `keep` holds.

    Dropping the oldest pair strikes the first row and column off ``R``, hence off ``R⁻¹``; a new
    last column ``(r, su)`` of ``R`` gives ``R⁻¹`` the column ``(−R⁻¹ r, 1) / su``. So the inverse
    is kept by products, with no order to sort and no system to solve.
    """
    size, head = state.diagonal.shape[0], state.head

    def write(rows, new):
        return rows.at[head].set(jnp.where(keep, new.astype(rows.dtype), rows[head]))

    steps = jax.tree.map(write, state.steps, s)
    here = jnp.arange(size, dtype=head.dtype) == head
    older = jnp.where(here[:, None] | here[None, :], jnp.zeros_like(su), state.inverse)
    su_safe = jnp.where(keep, su, jnp.ones_like(su))
    column = jnp.where(here, jnp.ones_like(su), -_matvec(older, _products(steps, u))) / su_safe
    inverse = jnp.where(here[None, :], column[:, None], older)
    scale, gamma = _rescaled(state, s, u, su, keep)
    return LbfgsState(
        steps,
        jax.tree.map(write, state.changes, u),
        jnp.where(keep, inverse, state.inverse),
        jnp.where(keep & here, su, state.diagonal),
        jnp.where(keep, (head + 1) % size, head).astype(head.dtype),
        scale,
        gamma,
        state.curvature,
    )


def _rescaled(
    state: LbfgsState, s: PyTree, u: PyTree, su: Scalar, keep: Scalar
) -> tuple[PyTree, Scalar]:
    """The initial matrix after a pair: ``Σ`` in the unit by which ``u'Σu = s'u``, then the diagonal
    of its BFGS update, ``Σ⁻¹ + uu'/s'u − Σ⁻¹ss'Σ⁻¹/s'Σ⁻¹s``. All but gamma is without a unit.
    """
    scale = _known(state.scale)
    total = lambda a: jnp.sum(jnp.stack([jnp.sum(x).astype(su.dtype) for x in jax.tree.leaves(a)]))
    uu = total(jax.tree.map(lambda d, u: d * u.astype(d.dtype) ** 2, scale, u))
    ss = total(jax.tree.map(lambda d, s: s.astype(d.dtype) ** 2 / d, scale, s))
    keep &= (uu > 0) & (ss > 0)
    by_u, by_s = (lax.rsqrt(jnp.where(keep, a, jnp.ones_like(a))) for a in (uu, ss))

    def leaf(d, s, u):
        s, u = s.astype(d.dtype), u.astype(d.dtype)
        grown = 1 / d + (u * by_u.astype(d.dtype)) ** 2
        new = grown - (s / d * by_s.astype(d.dtype)) ** 2
        floor = numbers.rounding_unit(d) * grown  # what is lost in the difference
        return jnp.where(keep, 1 / jnp.maximum(new, floor), d)

    gamma = jnp.where(keep, su / jnp.where(keep, uu, jnp.ones_like(uu)), state.gamma)
    new = jax.tree.map(leaf, scale, s, u)
    # No pair makes the product of the entries smaller, so that they would grow from solve to solve,
    # without end. The factor that they share is gamma's, and a power of four moves no digit.
    tops = [jnp.max(d, initial=0.0).astype(su.dtype) for d in jax.tree.leaves(new)]
    top = jnp.max(jnp.stack(tops))
    power = jnp.frexp(top)[1] // 2 * 2
    down = jnp.ldexp(jnp.ones_like(top), -power)

    def within(d):
        return jnp.maximum(d * down.astype(d.dtype), jnp.finfo(d.dtype).tiny ** 0.5)

    return jax.tree.map(within, new), jnp.ldexp(gamma, power)


# ---- the solve


class _Search(NamedTuple):
    """A line search under way: from the current point along `direction`, with slope `slope` there,
    trying the step `t` in ``(low, high)``.
    """

    direction: PyTree
    length: Any  # of the direction
    slope: Any
    t: Any
    low: Any
    low_slope: Any
    high: Any
    count: Any


class _Carry(NamedTuple):
    point: tolerance.Point
    memory: LbfgsState
    search: _Search
    best: tolerance.Best
    bend: tolerance.Bend
    reach: Any
    first_value: Any
    iterations: Any
    evaluations: Any
    converged: Any
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
    params, memory = state.params, state.opt
    dtype, unit = tolerance.scalar_dtype(params), numbers.rounding_unit(params)
    tol = tolerance.least(tol, params)
    zero, infinite = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype)

    def body(carry: _Carry) -> _Carry:
        point, search = carry.point, carry.search
        first = (
            carry.evaluations == 0
            # the start itself is evaluated by the loop, along a zero direction: one copy of the
            # objective
        )
        step = tree.scale(search.t, search.direction)
        trial = tolerance.evaluate(objective, tree.add(point.params, step), outer, ctx)
        finite = tolerance.is_finite(trial)
        slope = tree.dot(trial.grads, search.direction)

        # Values may have lost more to cancellation than their own size tells; slopes lose less.
        blurred = jnp.abs(trial.value - point.value) <= 0.1 * unit**0.5 * jnp.abs(point.value)
        descends = trial.value <= point.value + SUFFICIENT * search.t * search.slope
        enough = finite & jnp.where(blurred, slope <= (2 * SUFFICIENT - 1) * search.slope, descends)
        accepted = jnp.where(first, finite, enough & (slope >= CURVATURE * search.slope))

        new = tree.where(accepted, trial, point)
        change = tree.sub(trial.grads, point.grads)
        su, ss, uu = tree.dot(step, change), tree.dot(step, step), tree.dot(change, change)
        convex = su > unit * jnp.sqrt(
            ss * uu
        )  # also false at the start, whose step is zero, and for NaN
        reach = jnp.maximum(carry.reach, tree.norm(new.params))
        bend = tolerance.update_bend(
            carry.bend, su, ss, uu, tree.norm(point.params), unit, finite & ~first, FORGET
        )
        kept = remember(carry.memory, step, change, su, accepted & ~first & convex)

        # A search that finds nothing drops the memory once; without any memory there is nothing
        # left to try. One that slopes send `FURTHER` than the memory says drops it at once, with
        # its scale: a step down an exponential leaves curvatures of before, many decades too large.
        count = jnp.where(accepted, 0, search.count + 1)
        narrowed = _narrow(search._replace(count=count.astype(jnp.int32)), slope, enough, finite)
        bare = ~jnp.any(kept.diagonal > 0)
        far = ~bare & jnp.isinf(narrowed.high) & (narrowed.t > FURTHER)
        failed = ~accepted & ~first & (far | (count >= SEARCH))
        kept = kept._replace(
            inverse=jnp.where(failed, jnp.zeros_like(kept.inverse), kept.inverse),
            diagonal=jnp.where(failed, jnp.zeros_like(kept.diagonal), kept.diagonal),
            scale=tree.where(failed & far, tree.zeros_like(kept.scale), kept.scale),
            gamma=jnp.where(failed & far, jnp.zeros_like(kept.gamma), kept.gamma),
        )
        restart = accepted | failed

        gamma = jnp.where(
            kept.gamma > 0, kept.gamma, 1.0 / jnp.where(new.grad_norm > 0, new.grad_norm, 1.0)
        )
        direction = tree.neg(_apply(kept, new.grads, gamma))
        down = tree.dot(direction, new.grads)
        uphill = ~(down < 0)  # by rounding, or NaN
        direction = tree.where(uphill, tree.scale(-gamma, new.grads), direction)
        down = jnp.where(uphill, -gamma * new.grad_norm**2, down)
        length = tree.norm(direction)
        fresh = _Search(
            direction, length, down, jnp.ones_like(zero), zero, down, infinite, jnp.int32(0)
        )

        best = tolerance.update_best(carry.best, trial, accepted)
        best = best._replace(
            age=jnp.where(accepted, best.age, best.age + 1)
        )  # at the rounding level it is searches that cost
        target = tol * tolerance.size(new.params, reach)
        was = search.length * jnp.maximum(
            1.0, search.t
        )  # a longer step than the direction says that the memory is out of date
        arrived = accepted & ~first & (length <= target) & (was <= target)
        converged = arrived | (finite & accepted & (new.grad_norm == 0))
        known = bend._replace(largest=jnp.where(bend.largest > 0, bend.largest, memory.curvature))
        # A search that slopes send further out has lost nothing: its memory is out of date.
        lost = ~accepted & ~first & blurred & (count >= LOST) & (search.length <= target)
        lost = lost & jnp.isfinite(narrowed.high)
        lost = lost & jnp.all(jnp.stack(tolerance.at_rounding(point, known)))
        done = converged | lost | (best.age >= 2 * SEARCH) | (failed & bare) | (first & ~finite)
        return _Carry(
            tree.where(first, trial, new),
            kept,
            tree.where(restart, fresh, narrowed),
            best,
            bend,
            reach,
            jnp.where(first, trial.value, carry.first_value),
            carry.iterations + (accepted & ~first).astype(jnp.int32),
            carry.evaluations + 1,
            converged,
            done,
        )

    start = _Carry(
        point=tolerance.unevaluated(params, state.model),
        memory=memory,
        search=_Search(
            tree.zeros_like(params), zero, zero, zero, zero, zero, infinite, jnp.int32(0)
        ),
        best=tolerance.first_best(params),
        bend=tolerance.no_bend(params),
        reach=zero,
        first_value=infinite,
        iterations=jnp.int32(0),
        evaluations=jnp.int32(0),
        converged=jnp.asarray(False),
        stop=jnp.asarray(False),
    )
    end = lax.while_loop(lambda carry: ~carry.stop & (carry.iterations < maxiter), body, start)
    met = jnp.where(end.bend.largest > 0, end.bend.largest, memory.curvature)
    info = {
        "value": end.first_value,
        "grad_norm": end.point.grad_norm,
        "iterations": end.iterations,
        "evaluations": end.evaluations,
        "code": tolerance.verdict(
            end.point, end.converged, end.stop, end.bend._replace(largest=met)
        ),
    }
    return base.InnerState(
        end.point.params, end.memory._replace(curvature=met), end.point.model
    ), info


def _narrow(search: _Search, slope: Scalar, enough: Scalar, finite: Scalar) -> _Search:
    """The next step to try: the secant's zero of the slope, kept inside the bracket, or further out
    while there is no upper end.
    """
    t, low, low_slope = search.t, search.low, search.low_slope
    bend = slope - low_slope
    secant = low - low_slope * (t - low) / jnp.where(bend > 0, bend, 1.0)
    secant = jnp.where(
        finite & (bend > 0), secant, jnp.where(enough, jnp.inf, low + 0.1 * (t - low))
    )
    low_new, slope_new = jnp.where(enough, t, low), jnp.where(enough, slope, low_slope)
    high = jnp.where(enough, search.high, t)
    bounded = jnp.isfinite(high)
    width = jnp.where(bounded, high - low_new, 0.0)
    inside = jnp.clip(secant, low_new + 0.1 * width, high - 0.1 * width)
    # While the start itself is the lower end, the unit of the parameters may be orders of magnitude
    # off.
    inside = jnp.where((low_new == 0) & (search.count >= 3), jnp.minimum(inside, 0.1 * t), inside)
    outside = jnp.clip(secant, 2.0 * t, 10.0 * t)
    return search._replace(
        t=jnp.where(bounded, inside, outside), low=low_new, low_slope=slope_new, high=high
    )
