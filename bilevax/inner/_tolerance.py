"""When a solver to a tolerance stops, and what it says then. Shared by `gradient_descent`, `agd` and `lbfgs`.

Converged: ``‖∇g(y)‖ <= tol · scale``, where `scale` is the largest gradient norm that any solve with this optimizer state began at (the first
solve's start, usually). A warm start, whose own first gradient is small already, is thereby held to the accuracy of the cold one and not to
a new, unreachable one; and a stateless use is the ordinary ``‖∇g(y)‖ <= tol · ‖∇g(y_0)‖``.

Stalled: `PATIENCE` accepted steps in a row (for `lbfgs`: 40 evaluations) that set no new best value and no new best gradient norm. Then the code
says success if the gradient is at its rounding level ``ROUNDING · eps · max(scale, L ‖y‖)`` (`eps` of the coarsest dtype among the leaves, `L` the
curvature that the solver met): no solver does better in this precision, whatever tolerance was asked for. Otherwise it says inner_not_converged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import base, tree
from bilevax._core import numbers
from bilevax.base import PyTree, Scalar
from bilevax.results import RESULTS

PATIENCE = 20
ROUNDING = 100.0


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
    """A point that no evaluation has been made at: its value is infinite, so any finite one is better."""
    dtype = scalar_dtype(params)
    return Point(params, jnp.asarray(jnp.inf, dtype), tree.zeros_like(params), jnp.asarray(jnp.inf, dtype), model)


def evaluate(objective, params: PyTree, outer: PyTree, ctx: base.Ctx) -> Point:
    """One value and gradient. The scalars are in the dtype that sums are taken in."""
    (value, (model, _)), grads = jax.value_and_grad(lambda y: objective(y, outer, ctx), has_aux=True)(params)
    model = jax.tree.map(like, model, ctx.model)
    return Point(params, value.astype(scalar_dtype(params)), grads, tree.norm(grads), model)


def is_finite(point: Point) -> Scalar:
    return jnp.isfinite(point.value) & jnp.isfinite(point.grad_norm)


def scalar_dtype(params: PyTree):
    """The dtype of inner products of `params`."""
    return jax.eval_shape(tree.norm, params).dtype


def like(new, old):
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


def verdict(point: Point, *, tol, scale, curvature, diverged=False) -> Scalar:
    """The `RESULTS` code of the returned point."""
    floor = ROUNDING * numbers.rounding_unit(point.params) * jnp.maximum(scale, curvature * tree.norm(point.params))
    small = point.grad_norm <= jnp.maximum(tol * scale, floor)
    code = jnp.where(small, jnp.int32(RESULTS.success), jnp.int32(RESULTS.inner_not_converged))
    return jnp.where(is_finite(point) & jnp.logical_not(diverged), code, jnp.int32(RESULTS.inner_nonfinite))
