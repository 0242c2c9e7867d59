"""The three directions that stochastic bilevel algorithms are made of, from one pass through each
objective.

``D_y = ∇_y g``, ``D_v = ∇²_yy g·v + ∇_y f``, ``D_x = ∇²_xy g·v + ∇_x f``, whose common root has ``v
= −(∇²_yy g)⁻¹ ∇_y f`` and ``D_x`` the hypergradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax.base import Ctx, Draws, Feeds, InnerState, Problem, PyTree, StepInfo
from bilevax.results import ladder


class Inner(NamedTuple):
    """What one pass through the inner objective gives: ``∇_y g``, ``∇²_yy g·v``, ``∇²_xy g·v``, the
    model's new state.
    """

    grad: PyTree
    product: PyTree
    cross: PyTree
    model: PyTree = None


class Outer(NamedTuple):
    """What one pass through the outer objective gives: value, ``∇_y f``, ``∇_x f``, aux."""

    value: Any
    y: PyTree
    x: PyTree
    aux: PyTree = None


class Directions(NamedTuple):
    """``(D_y, D_v, D_x)``, shaped as inner parameters, inner parameters, outer parameters."""

    y: PyTree
    v: PyTree
    x: PyTree


def inner_pass(problem: Problem, y: PyTree, x: PyTree, v: PyTree, ctx: Ctx) -> Inner:
    """Gradient and both products with `v` by one forward-over-reverse pass: a jvp of ``∇g`` along
    ``(v, 0)``.
    """

    def gradients(y):
        (grad, grad_x), (model, _) = jax.grad(problem.inner, (0, 1), has_aux=True)(y, x, ctx)
        return (grad, grad_x), (grad, model)

    _, (product, cross), (grad, model) = jax.jvp(gradients, (y,), (v,), has_aux=True)
    return Inner(grad, product, cross, model)


def inner_grad(problem: Problem, y: PyTree, x: PyTree, ctx: Ctx) -> tuple[PyTree, PyTree]:
    """``∇_y g`` and the model's new state."""
    grad, (model, _) = jax.grad(problem.inner, has_aux=True)(y, x, ctx)
    return grad, model


def hessian_product(problem: Problem, y: PyTree, x: PyTree, v: PyTree, ctx: Ctx) -> PyTree:
    """``∇²_yy g·v``; the gradients that come along are dead code."""
    return inner_pass(problem, y, x, v, ctx).product


def outer_pass(problem: Problem, y: PyTree, x: PyTree, ctx: Ctx) -> Outer:
    """Value and both gradients of the outer objective."""
    (value, (_, aux)), (f_y, f_x) = jax.value_and_grad(problem.outer, (0, 1), has_aux=True)(
        y, x, ctx
    )
    return Outer(value, f_y, f_x, aux)


def combined(g: Inner, f: Outer) -> Directions:
    """``(D_y, D_v, D_x)`` of the two passes."""
    return Directions(g.grad, tree.add(g.product, f.y), tree.add(g.cross, f.x))


def descend(params: PyTree, size: Any, direction: PyTree) -> PyTree:
    """``params − size · direction``."""
    return tree.axpy(-size, direction, params)


def report(
    inner: InnerState,
    outer: PyTree,
    f: Outer,
    d: Directions,
    calls: dict[str, Any],
    diagnostics: dict[str, Any] | None = None,
) -> StepInfo:
    """The step's `StepInfo`: its code names the first of the quantities that left the finite
    numbers.

    Args:
      inner: the inner state that the value belongs to.
      outer: the outer parameters that it belongs to.
      f: the outer pass there.
      d: the directions that were taken; the norm of ``d.x`` stands for the hypergradient's.
      calls: oracle calls of the step by name, a batch each.
      diagnostics: further columns of the history.
    """
    grad_norm, lag = tree.norm(d.x), tree.norm(d.y)
    code = ladder(
        inner=jnp.isfinite(lag),
        value=jnp.isfinite(f.value),
        adjoint=tree.all_finite(d.v),
        grad=jnp.isfinite(grad_norm),
    )
    return StepInfo(
        f.value, grad_norm, (inner, outer), code, {**calls, **(diagnostics or {})}, f.aux, lag=lag
    )


def drawn_finite(problem: Problem, feeds: Feeds, draws: Draws) -> jax.Array:
    """Whether the batches of a step, so many of each stream, are finite."""
    ok = jnp.asarray(True)
    for draw, feed, count in zip(
        (problem.inner_draw, problem.hyper_draw, problem.outer_draw), feeds[:3], draws, strict=True
    ):
        if not count:  # of a stream read on the host there is no batch then, not even to trace
            continue
        fine = lambda i, ok, draw=draw, feed=feed: ok & tree.all_finite(draw(feed, i).batch)
        ok = fine(0, ok) if count == 1 else lax.fori_loop(0, count, fine, ok)
    return ok


def data_finite(problem: Problem, feeds: Feeds, draws: Draws) -> jax.Array:
    """Whether all data is finite: for steps that read the whole of it now and then."""
    return tree.all_finite((feeds.inner.data, feeds.hyper.data, feeds.outer.data))


def counts(inner_gradients: Any = 0, products: Any = 0, outer_gradients: Any = 0) -> dict[str, Any]:
    """Oracle calls of a step, a batch each: Python numbers where all steps take as many.

    `products` are Hessian-vector and mixed products, those of one pass counted apart.
    """
    return {
        "inner_gradients": inner_gradients,
        "products": products,
        "outer_gradients": outer_gradients,
    }
