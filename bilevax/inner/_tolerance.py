"""When a solver to a tolerance stops, and what it says then. Shared by `gradient_descent`, `agd`
and `lbfgs`.

Converged: two accepted iterates in a row from which the solution is, by the solver's own estimate,
no further than ``tol · ‖y‖``. The estimate is ``‖H ∇g‖`` with L-BFGS's inverse Hessian, and ``‖∇g‖
/ m`` with the smallest curvature `m` along the last steps elsewhere. It moves neither with the
start, nor with the unit of the parameters, nor with the scale of the objective, which a rule
relative to the first gradient does: from a poor start that one stops at garbage. For solutions near
zero, ``‖y‖`` is at least ``√eps`` times the farthest that the solve has been. Nothing of this is
carried to the next solve.

At rounding: the step that is left is within the tolerance, and a line search finds no better point.

Stalled: `PATIENCE` accepted steps in a row (for `lbfgs`: 40 evaluations) that set no new best value
and no new best gradient norm. The code then says success if the gradient is at its rounding level
``ROUNDING · eps · L ‖y‖`` (`eps` of the coarsest dtype among the leaves, `L` the curvature that the
solver met) and the estimated distance is at most ``eps^REACH ‖y‖``: no solver does better in this
precision, whatever was asked for. Otherwise, where rounding times condition leaves more than that,
or no rounding explains the stall, it says inner_not_converged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import base, tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.base import Objective, PyTree, Scalar
from bilevax.results import RESULTS

PATIENCE = 20
ROUNDING = 100.0
# 2e-3 in float32, 5e-7 in float64: what a solve that rounding has ended must have come to
REACH = 0.4


class Best(NamedTuple):
    """The best value and gradient norm so far, and the accepted steps since either was set."""

    value: Any
    grad_norm: Any
    age: Any


class Point(NamedTuple):
    """An inner point and what one evaluation there gave."""

    params: PyTree
    value: Any
    grads: PyTree
    grad_norm: Any
    model: PyTree


def unevaluated(params: PyTree, model: PyTree) -> Point:
    """A point that no evaluation has been made at: its value is infinite, so any finite one is
    better.
    """
    dtype = scalar_dtype(params)
    return Point(
        params,
        jnp.asarray(jnp.inf, dtype),
        tree.zeros_like(params),
        jnp.asarray(jnp.inf, dtype),
        model,
    )


def evaluate(objective: Objective, params: PyTree, outer: PyTree, ctx: base.Ctx) -> Point:
    """One value and gradient. The scalars are in the dtype that sums are taken in."""
    (value, (model, _)), grads = jax.value_and_grad(
        lambda y: objective(y, outer, ctx), has_aux=True
    )(params)
    model = jax.tree.map(like, model, ctx.model)
    return Point(params, value.astype(scalar_dtype(params)), grads, tree.norm(grads), model)


def is_finite(point: Point) -> Scalar:
    return jnp.isfinite(point.value) & jnp.isfinite(point.grad_norm)


def scalar_dtype(params: PyTree) -> Any:
    """The dtype of inner products of `params`."""
    return jax.eval_shape(tree.norm, params).dtype


def like(new: Any, old: Any) -> Any:
    """`new` with the dtype of `old`: a loop's carry may not drift."""
    if jnp.issubdtype(old.dtype, jax.dtypes.extended):
        return new
    return jax.lax.convert_element_type(new, old.dtype)


def first_best(params: PyTree) -> Best:
    infinite = jnp.asarray(jnp.inf, scalar_dtype(params))
    return Best(infinite, infinite, jnp.int32(0))


def update_best(best: Best, point: Point, accepted: Scalar) -> Best:
    """Count an accepted point; a rejected one leaves all as it was."""
    better = (point.value < best.value) | (point.grad_norm < best.grad_norm)
    age = jnp.where(better, jnp.int32(0), best.age + 1)
    new = Best(jnp.fmin(best.value, point.value), jnp.fmin(best.grad_norm, point.grad_norm), age)
    return tree.where(accepted, new, best)


def least(tol: Any, params: PyTree) -> Any:
    """`tol`, but not below what the dtype can tell apart."""
    dtype = scalar_dtype(params)
    return jnp.maximum(jnp.asarray(tol).astype(dtype), 4 * numbers.rounding_unit(params))


def size(params: PyTree, reach: Scalar) -> Scalar:
    """The norm that distances are relative to; `reach` is the largest that the solve has met."""
    return jnp.maximum(tree.norm(params), numbers.rounding_unit(params) ** 0.5 * reach)


class Bend(NamedTuple):
    """Curvatures along the steps of a solve: the largest, and the smallest of the last ones
    (infinite before any).
    """

    largest: Any
    smallest: Any


FORGET = 1.1  # a step: growth of the smallest curvature until a step meets a smaller one


def no_bend(params: PyTree) -> Bend:
    zero = jnp.zeros((), scalar_dtype(params))
    return Bend(zero, zero + jnp.inf)


def update_bend(
    bend: Bend,
    su: Scalar,
    ss: Scalar,
    uu: Scalar,
    point_norm: Scalar,
    unit: Numeric,
    counts: Scalar,
) -> Bend:
    """`bend` after a step ``s`` that changed the gradient by ``u``, where `counts`; changes that
    may be rounding tell nothing.
    """
    met = su / jnp.where(ss > 0, ss, jnp.ones_like(ss))
    counts = counts & (ss > 0)
    long = counts & (jnp.sqrt(ss) > unit**0.5 * point_norm)
    largest = jnp.where(long, jnp.maximum(bend.largest, met), bend.largest)
    clear = counts & (su > 0) & (jnp.sqrt(uu) > 10 * unit * largest * point_norm)
    return Bend(largest, jnp.where(clear, jnp.minimum(FORGET * bend.smallest, met), bend.smallest))


ROW = 2  # accepted iterates in a row


def near(
    row: Scalar,
    point: Point,
    tol: Scalar,
    reach: Scalar,
    bend: Bend,
    accepted: Scalar,
    first: Scalar,
) -> Scalar:
    """How many accepted iterates in a row are by ``‖∇g‖ / m`` within the tolerance; a zero gradient
    is `ROW` of them.
    """
    close = (
        (point.grad_norm <= tol * size(point.params, reach) * bend.smallest)
        & jnp.isfinite(bend.smallest)
        & ~first
    )
    row = jnp.where(accepted, jnp.where(close, row + 1, 0), row)
    return jnp.where(accepted & (point.grad_norm == 0), ROW, row).astype(jnp.int32)


def at_rounding(point: Point, bend: Bend) -> tuple[Scalar, Scalar]:
    """Whether the gradient that is left may be rounding alone, and whether the solution is near
    enough all the same.

    Where no curvature was met, the gradient alone decides.
    """
    unit, norm = numbers.rounding_unit(point.params), tree.norm(point.params)
    clear = jnp.isfinite(bend.smallest)
    distance = jnp.where(
        clear,
        point.grad_norm / jnp.where(clear, bend.smallest, jnp.ones_like(norm)),
        jnp.zeros_like(norm),
    )
    return point.grad_norm <= ROUNDING * unit * bend.largest * norm, distance <= unit**REACH * norm


def verdict(point: Point, converged: Scalar, bend: Bend, diverged: Any = False) -> Scalar:
    """The `RESULTS` code of the returned point."""
    level, near = at_rounding(point, bend)
    code = jnp.where(
        jnp.where(level, near, converged),
        jnp.int32(RESULTS.success),
        jnp.int32(RESULTS.inner_not_converged),
    )
    return jnp.where(
        is_finite(point) & jnp.logical_not(diverged), code, jnp.int32(RESULTS.inner_nonfinite)
    )
