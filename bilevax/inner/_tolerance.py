"""When a solver to a tolerance stops, and what it says then. Shared by `gradient_descent`, `agd`
and `lbfgs`.

Converged: two accepted iterates in a row from which the solution is, by the solver's own estimate,
no further than ``tol · ‖y‖``. The estimate is ``‖H ∇g‖`` with L-BFGS's inverse Hessian, and ``‖∇g‖
/ m`` with the smallest curvature `m` along the last steps elsewhere. It moves neither with the
start, nor with the unit of the parameters, nor with the scale of the objective, which a rule
relative to the first gradient does: from a poor start that one stops at garbage. For solutions near
zero, ``‖y‖`` is at least ``eps^¾`` times the farthest that the solve has been. Nothing of this is
carried to the next solve.

At rounding: the step that is left is within the tolerance, and a line search finds no better point.

Stalled: `PATIENCE` accepted steps in a row (for `lbfgs`: 40 evaluations) that set no new best value
and no new best gradient norm. The code then says success if the gradient is at its rounding level
``ROUNDING · eps · L ‖y‖`` (`eps` of the coarsest dtype among the leaves, `L` the curvature that the
solver met) and the estimated distance is at most ``eps^REACH ‖y‖``: no solver does better in this
precision, whatever was asked for. Otherwise, where rounding times condition leaves more than that,
or no rounding explains the stall, it says inner_not_converged.

The curvature `L` may be one that only a far start had (down an exponential it falls by decades),
where every later gradient would count as rounding. `gradient_descent` and `agd` therefore ask,
before they end, where the last curvatures are less than the largest: by one gradient beside the
point, and go on with what it tells. `lbfgs` drops a memory that its search shows to be out of
date.
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
    return jnp.maximum(tree.norm(params), numbers.rounding_unit(params) ** 0.75 * reach)


class Bend(NamedTuple):
    """Curvatures along the steps of a solve: the largest, the smallest of the last ones (infinite
    before any), and the largest of the last ones.
    """

    largest: Any
    smallest: Any
    recent: Any


FADE = 4.0  # a step: how the largest of the last curvatures falls until a step meets a larger one
DOUBT = 3.0  # the largest curvature over that of the last ones: is it still met here?


def no_bend(params: PyTree) -> Bend:
    zero = jnp.zeros((), scalar_dtype(params))
    return Bend(zero, zero + jnp.inf, jnp.zeros_like(zero))


def update_bend(
    bend: Bend,
    su: Scalar,
    ss: Scalar,
    uu: Scalar,
    point_norm: Scalar,
    unit: Numeric,
    counts: Scalar,
    forget: float,
) -> Bend:
    """`bend` after a step ``s`` that changed the gradient by ``u``, where `counts`; changes that
    may be rounding tell nothing. The smallest curvature grows by `forget` a step until a step meets
    a smaller one.
    """
    met = su / jnp.where(ss > 0, ss, jnp.ones_like(ss))
    counts = counts & (ss > 0)
    long = counts & (jnp.sqrt(ss) > unit**0.5 * point_norm)
    largest = jnp.where(long, jnp.maximum(bend.largest, met), bend.largest)
    recent = jnp.where(counts, bend.recent / FADE, bend.recent)
    recent = jnp.where(long, jnp.maximum(recent, met), recent)
    clear = counts & (su > 0) & (jnp.sqrt(uu) > 10 * unit * largest * point_norm)
    # Of a long step whose change rounding may hide, the curvature is at most that of the change.
    most = jnp.where(clear, met, jnp.sqrt(uu / jnp.where(ss > 0, ss, jnp.ones_like(ss))))
    told = clear | (long & (uu > 0))
    smallest = jnp.where(told, jnp.minimum(forget * bend.smallest, most), bend.smallest)
    return Bend(largest, smallest, recent)


def doubtful(bend: Bend) -> Scalar:
    """Whether the largest curvature, of which rounding is a part, was met long ago: there, or
    nowhere near this point, as after steps down an exponential. One gradient beside the point
    tells.
    """
    return bend.largest > DOUBT * bend.recent


def beside(params: PyTree, reach: Scalar) -> PyTree:
    """A point ``√eps`` of the norm from `params`, in no direction of the problem's own."""

    def mixed(number: int, leaf: Any) -> Any:
        phase = jnp.asarray(number + 1.0, scalar_dtype(leaf))
        for axis in range(leaf.ndim):
            count = jax.lax.broadcasted_iota(phase.dtype, leaf.shape, axis)
            phase = phase * 1.7 + (12.9898 + 7.31 * axis) * count
        hashed = jnp.sin(phase) * 43758.5453
        return jnp.where(hashed - jnp.floor(hashed) < 0.5, -1.0, 1.0).astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(params)
    signs = jax.tree.unflatten(structure, [mixed(i, leaf) for i, leaf in enumerate(leaves)])
    length = numbers.rounding_unit(params) ** 0.5 * size(params, reach)
    return tree.axpy(length / tree.norm(signs), signs, params)


def asked(
    bend: Bend, params: PyTree, finite: Scalar, length: Scalar, turn: Scalar
) -> tuple[Bend, Scalar]:
    """`bend` after a gradient that is `turn` other, `length` beside the point, and whether the
    largest curvature turned out to be of long ago. Along random signs a curvature ``L`` in one
    direction of n is met as ``L / √n``.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    here = count**0.5 * turn / length
    fell = finite & (here > 0) & (10 * here < bend.largest)
    known, new = bend._replace(recent=bend.largest), Bend(here, jnp.full_like(here, jnp.inf), here)
    return tree.where(fell, new, known), fell


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


def verdict(
    point: Point, converged: Scalar, stopped: Scalar, bend: Bend, diverged: Any = False
) -> Scalar:
    """The `RESULTS` code of the returned point; `stopped`: by itself, not by the limit on its
    iterations, where a gradient below rounding tells nothing: the curvature that makes it so may be
    that of a far start.
    """
    level, near = at_rounding(point, bend)
    code = jnp.where(
        jnp.where(level, near & stopped, converged),
        jnp.int32(RESULTS.success),
        jnp.int32(RESULTS.inner_not_converged),
    )
    return jnp.where(
        is_finite(point) & jnp.logical_not(diverged), code, jnp.int32(RESULTS.inner_nonfinite)
    )
