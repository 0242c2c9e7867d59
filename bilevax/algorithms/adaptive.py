"""Step sizes from accumulated gradient norms, with nothing to tune: S-TFBO and D-TFBO. For
deterministic problems.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.algorithms._parts import steps as _steps
from bilevax.algorithms._parts.directions import (
    Directions,
    combined,
    counts,
    descend,
    drawn_finite,
    hessian_product,
    inner_grad,
    inner_pass,
    outer_pass,
    report,
)
from bilevax.base import Algorithm, Bound, Draws, Feeds, InnerState, Problem, PyTree, StepInfo


class TfboState(NamedTuple):
    """Where S-TFBO or D-TFBO stands: inner state, outer parameters, adjoint, accumulated squares
    ``(β², γ², α²)``.
    """

    inner: InnerState
    outer: PyTree
    adjoint: PyTree
    squares: Any


def s_tfbo(initial: Numeric = 1.0) -> Algorithm:
    """S-TFBO: a single loop whose steps are inverse accumulated gradient norms; nothing needs
    tuning.

    ``β² += ‖D_y‖²``, ``γ² += ‖D_v‖²``, ``α² += ‖D_x‖²``; ``y −= D_y / β``, ``v −= D_v / max(β,
    γ)``, ``x −= D_x / (α max(β, γ))``, all at the old point.

    Args:
      initial: β, γ and α at the start. Theory allows any positive number.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: if `initial` is no positive number.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.s_tfbo().draws
      Draws(inner=1, hyper=0, outer=1)

    Source: Yang, Ban, Huang, Ma and Ji, "Tuning-free bilevel optimization: new algorithms and
    convergence analysis" (ICLR 2025), algorithm 2.
    """
    settings = dict(initial=numbers.positive(initial, "initial"))
    return Algorithm(
        Bound("s_tfbo", _init, name="s_tfbo", **settings),
        Bound("s_tfbo", _single, **settings),
        Draws(1, 0, 1),
        finite=drawn_finite,
    )


def _init(
    problem: Problem, inner: InnerState, outer: PyTree, *, name: str, initial: Any, **_: Any
) -> TfboState:
    _steps.warm_only(problem, name)
    dtype = tree.norm((inner.params, outer)).dtype
    return TfboState(
        inner, outer, tree.zeros_like(inner.params), jnp.full((3,), initial, dtype) ** 2
    )


def _single(
    problem: Problem, state: TfboState, feeds: Feeds, *, initial: Any
) -> tuple[TfboState, StepInfo]:
    (y, _, model), x, v = state.inner, state.outer, state.adjoint
    inner_ctx = problem.inner_draw(feeds.inner, 0)._replace(model=model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=model)
    g, f = inner_pass(problem, y, x, v, inner_ctx), outer_pass(problem, y, x, outer_ctx)
    d = combined(g, f)
    squares = state.squares + jnp.stack(
        [tree.dot(part, part).astype(state.squares.dtype) for part in d]
    )
    beta, gamma, alpha = jnp.sqrt(squares)
    both = jnp.maximum(beta, gamma)
    moved = descend(x, 1 / (alpha * both), d.x)
    info = report(state.inner, x, f, d, counts(1, 2, 1))
    inner = state.inner._replace(params=descend(y, 1 / beta, d.y), model=g.model)
    return TfboState(
        inner, _steps.projected(problem, moved), descend(v, 1 / both, d.v), squares
    ), info


def d_tfbo(
    initial: Numeric = 1.0,
    *,
    inner_tol: Numeric = 1e-3,
    adjoint_tol: Numeric = 1e-3,
    maxiter: int = 1000,
) -> Algorithm:
    """D-TFBO: two loops whose steps are inverse accumulated gradient norms; nothing needs tuning.

    ``β² += ‖∇_y g‖²``, ``y −= ∇_y g / β`` until ``‖∇_y g‖ ≤ inner_tol``; ``γ² += ‖D_v‖²``, ``v −=
    D_v / γ`` until ``‖D_v‖ ≤ adjoint_tol``; then ``α² += ‖D_x‖²``, ``x −= D_x / α``. Both loops
    start from the last y and v, and from ``β = γ = initial``.

    Args:
      initial: β, γ and (once) α at the start. Theory allows any positive number.
      inner_tol: gradient norm that the inner loop stops at. For T outer steps the paper takes
        ``T^{−1/2}``, here and below.
      adjoint_tol: the same for the adjoint.
      maxiter: most steps in each inner loop.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.d_tfbo().draws
      Draws(inner=1, hyper=0, outer=1)

    Source: Yang, Ban, Huang, Ma and Ji, "Tuning-free bilevel optimization: new algorithms and
    convergence analysis" (ICLR 2025), algorithm 1.
    """
    settings = dict(
        initial=numbers.positive(initial, "initial"),
        inner_tol=numbers.positive(inner_tol, "inner_tol"),
        adjoint_tol=numbers.positive(adjoint_tol, "adjoint_tol"),
        maxiter=numbers.count(maxiter, "maxiter"),
    )
    return Algorithm(
        Bound("d_tfbo", _init, name="d_tfbo", **settings),
        Bound("d_tfbo", _double, **settings),
        Draws(1, 0, 1),
        finite=drawn_finite,
    )


def _double(
    problem: Problem,
    state: TfboState,
    feeds: Feeds,
    *,
    initial: Any,
    inner_tol: Any,
    adjoint_tol: Any,
    maxiter: int,
) -> tuple[TfboState, StepInfo]:
    x, dtype = state.outer, state.squares.dtype
    start = jnp.asarray(initial).astype(dtype) ** 2

    def accumulate(evaluate, point, rest, tol):
        """``s += ‖d‖²``, ``point −= d/√s`` until ``‖d‖ ≤ tol``; the direction at the end is the
        returned point's own.
        """

        def body(carry):
            point, _, d, square, count = carry
            square = square + tree.dot(d, d).astype(dtype)
            point = descend(point, 1 / jnp.sqrt(square), d)
            d, rest = evaluate(point)
            return point, rest, d, square, count + 1

        def unfinished(carry):
            return (tree.norm(carry[2]) > tol) & (carry[4] < maxiter)

        d, rest = evaluate(point)
        point, rest, d, _, count = lax.while_loop(
            unfinished, body, (point, rest, d, start, jnp.int32(0))
        )
        return point, rest, d, count

    model = state.inner.model
    inner_ctx = problem.inner_draw(feeds.inner, 0)._replace(model=model)
    y, model, d_y, descents = accumulate(
        lambda y: inner_grad(problem, y, x, inner_ctx), state.inner.params, model, inner_tol
    )
    ctx = inner_ctx._replace(model=model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=model)
    f = outer_pass(problem, y, x, outer_ctx)
    v, _, d_v, products = accumulate(
        lambda v: (tree.add(hessian_product(problem, y, x, v, ctx), f.y), ()),
        state.adjoint,
        (),
        adjoint_tol,
    )
    d_x = tree.add(inner_pass(problem, y, x, v, ctx).cross, f.x)
    squares = state.squares.at[2].add(tree.dot(d_x, d_x).astype(dtype))
    moved = descend(x, 1 / jnp.sqrt(squares[2]), d_x)
    inner = state.inner._replace(params=y, model=model)
    info = report(inner, x, f, Directions(d_y, d_v, d_x), counts(descents + 1, products + 2, 1))
    return TfboState(inner, _steps.projected(problem, moved), v, squares), info


__all__ = ["TfboState", "d_tfbo", "s_tfbo"]
