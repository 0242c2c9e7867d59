"""Fully first-order algorithms: F2SA of any order, BOME."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import tree
from bilevax._core import numbers, optimizer
from bilevax._core.types import Numeric, Transformation
from bilevax.algorithms._parts import steps as _steps
from bilevax.algorithms._parts.directions import (
    Directions,
    Outer,
    counts,
    descend,
    drawn_finite,
    inner_grad,
    report,
)
from bilevax.algorithms._parts.steps import StepSize
from bilevax.base import Algorithm, Bound, Draws, Feeds, InnerState, Problem, PyTree, StepInfo


class F2saState(NamedTuple):
    """Where F2SA stands: inner state, outer parameters, state of the outer step, and the minimisers
    of ``g + jνf`` (a leading axis).
    """

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    points: PyTree


def difference(order: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Places j and coefficients c of ``φ'(0) ≈ Σ_j c_j φ(jν) / ν``, exact on polynomials of degree
    `order`.

    Symmetric places ±1 to ±p/2 for even orders (the middle one has coefficient 0), 0 to p for odd
    ones.

    Args:
      order: p, at least 1.

    Returns:
      Two tuples of equal length.

    Examples:
      >>> difference(1), difference(2)
      (((0, 1), (-1.0, 1.0)), ((-1, 1), (-0.5, 0.5)))
    """
    places = (
        tuple(range(order + 1))
        if order % 2
        else tuple(j for j in range(-(order // 2), order // 2 + 1) if j)
    )
    powers = np.vander(np.asarray(places, np.float64), len(places), increasing=True).T
    if (
        order % 2 == 0
    ):  # the places leave out 0, whose row fixes nothing: match the odd and even powers 1 to p
        powers = powers * np.asarray(places, np.float64)
        return places, tuple(
            float(c) for c in np.linalg.solve(powers, np.eye(len(places))[0]).round(15)
        )
    return places, tuple(
        float(c) for c in np.linalg.solve(powers, np.eye(len(places))[1]).round(15)
    )


def f2sa(
    inner_step: Numeric,
    outer_step: StepSize,
    *,
    penalty: Numeric = 10.0,
    growth: Numeric = 1 / 7,
    order: int = 1,
    steps: int = 10,
    inner_decay: Numeric = 4 / 7,
    outer_decay: Numeric = 5 / 7,
) -> Algorithm:
    """F2SA: a finite difference, in the weight of f, of the derivative of ``min_y g + νf``.
    Gradients only.

    K times, for each place j: ``y_j −= a_t (∇_y g + jν_t ∇_y f)(y_j, x)``; then
    ``x −= b_t Σ_j c_j (∇_x g + jν_t ∇_x f)(y_j, x) / ν_t``, with ``λ_t = 1/ν_t = λ t^{growth}``.
    Order 1 has the places 0 and 1, so the outer direction is ``∇_x f(y_1, x) + λ_t (∇_x g(y_1, x) −
    ∇_x g(y_0, x))``; even orders have the places ±1 to ±p/2 and an error of ``O(ν^p)``. The places
    share their batches, and their steps are one vectorised pass.

    The default exponents are those for stochastic gradients; with full batches take
    ``inner_decay=0, outer_decay=1/3, growth=1/3``.

    Args:
      inner_step: ``a``, a positive number.
      outer_step: ``b``, a positive number or an optax transformation. Orders above 1 are analysed
        with normalised steps: ``optax.chain(optax.normalize_by_update_norm(), optax.sgd(b))``.
      penalty: λ, the penalty at the start.
      growth: exponent of its growth, 0 for a constant penalty.
      order: p.
      steps: K.
      inner_decay: exponent of the decay of `inner_step`.
      outer_decay: exponent of the decay of `outer_step`, where that is a number.

    Returns:
      An `Algorithm`, whose ``inner`` is ``y_0`` for odd orders, and the mean of ``y_{±1}`` for even
      ones.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.f2sa(0.1, 0.05, steps=5, order=2).draws
      Draws(inner=6, hyper=0, outer=6)

    Source: Kwon et al., "A fully first-order method for stochastic bilevel optimization" (ICML
    2023), algorithm 1; Chen, Li, Chayti and Zhang, "Faster gradient methods for highly-smooth
    stochastic bilevel optimization" (arXiv 2509.02937), for orders above 1.
    """
    settings = dict(
        step_size=numbers.positive(inner_step, "inner_step"),
        outer=_steps.transformation(outer_step, "outer_step"),
        penalty=numbers.positive(penalty, "penalty"),
        order=numbers.count(order, "order"),
        num=numbers.count(steps, "steps"),
        growth=numbers.positive(growth, "growth", zero=True),
        inner_decay=_steps.exponent(inner_decay, "inner_decay"),
        outer_decay=_steps.exponent(outer_decay, "outer_decay"),
    )
    return Algorithm(
        Bound("f2sa", _f2sa_init, **settings),
        Bound("f2sa", _f2sa_step, **settings),
        Draws(steps + 1, 0, steps + 1),
        finite=drawn_finite,
    )


def _f2sa_init(
    problem: Problem, inner: InnerState, x: PyTree, *, outer: Transformation, order: Any, **_: Any
) -> F2saState:
    _steps.warm_only(problem, "f2sa")
    places = difference(order)[0]
    points = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(places), *a.shape)), inner.params)
    return F2saState(inner, x, optimizer.init(outer, x), points)


def _f2sa_step(
    problem: Problem,
    state: F2saState,
    feeds: Feeds,
    *,
    step_size: Any,
    outer: Transformation,
    penalty: Any,
    growth: Any,
    order: Any,
    num: int,
    inner_decay: Any,
    outer_decay: Any,
) -> tuple[F2saState, StepInfo]:
    places, coefficients = difference(order)
    x = state.outer
    nu = _steps.decayed(feeds.done, growth) / penalty
    size = step_size * _steps.decayed(feeds.done, inner_decay)
    weights = nu * jnp.asarray(places, nu.dtype)

    def penalised(y, weight, contexts, argnum):
        """Gradient of ``g + weight f`` in one of the levels; both objectives' parts and the model's
        state.
        """
        g, (model, _) = jax.grad(problem.inner, argnum, has_aux=True)(y, x, contexts[0])
        f = jax.grad(problem.outer, argnum, has_aux=True)(y, x, contexts[1])[0]
        return tree.axpy(weight, f, g), model

    def contexts(i, model):
        return problem.inner_draw(feeds.inner, i)._replace(model=model), problem.outer_draw(
            feeds.outer, i
        )._replace(model=model)

    def body(i, carry):
        points, model = carry
        d, models = jax.vmap(lambda y, weight: penalised(y, weight, contexts(i, model), 0))(
            points, weights
        )
        return descend(points, size, d), jax.tree.map(lambda m: m[-1], models)

    points, model = lax.fori_loop(0, num, body, (state.points, state.inner.model))
    last = contexts(num, model)
    parts, _ = jax.vmap(lambda y, weight: penalised(y, weight, last, 1))(points, weights)
    d_x = tree.scale(1 / nu, _weighted(coefficients, parts))
    y = (
        jax.tree.map(lambda a: a[0], points)
        if order % 2
        else _weighted([0.5 if abs(j) == 1 else 0.0 for j in places], points)
    )
    value, (_, aux) = problem.outer(y, x, last[1])
    d_y, _ = inner_grad(problem, y, x, last[0])

    moved, x_opt = _steps.move(
        outer, d_x, state.outer_opt, x, _steps.decayed(feeds.done, outer_decay), problem.project
    )
    inner = state.inner._replace(params=y, model=model)
    many = len(places)
    calls = counts((num + 1) * many + 1, 0, (num + 1) * many)
    info = report(
        inner,
        x,
        Outer(value, d_y, d_x, aux),
        Directions(d_y, d_y, d_x),
        calls,
        {"penalty": 1 / nu, "inner_grad_norm": tree.norm(d_y)},
    )
    return F2saState(inner, moved, x_opt, points), info


def _weighted(weights: Any, stacked: PyTree) -> PyTree:
    def leaf(a):
        return jnp.sum(
            a * jnp.asarray(weights, a.dtype).reshape((-1,) + (1,) * (a.ndim - 1)), axis=0
        )

    return jax.tree.map(leaf, stacked)


# ---- BOME


class BomeState(NamedTuple):
    """Where BOME stands: inner state, outer parameters, and the states of the joint step on
    both.
    """

    inner: InnerState
    outer: PyTree
    opt: PyTree


def bome(
    inner_step: Numeric, outer_step: StepSize, *, steps: int = 10, barrier: Numeric = 0.5
) -> Algorithm:
    """BOME: descend f while a dynamic barrier drives the optimality gap of the lower level to zero.
    Gradients only.

    ``ŷ`` is K gradient steps from y; ``q(y, x) = g(y, x) − g(ŷ, x)`` with ŷ held fixed;
    ``λ = max(η‖∇q‖² − ⟨∇f, ∇q⟩, 0) / ‖∇q‖²``; ``(y, x) −= b (∇f + λ∇q)``, gradients in (y, x)
    together.

    Args:
      inner_step: step size of the K steps.
      outer_step: ``b``, a positive number or an optax transformation of the pair (inner parameters,
        outer parameters).
      steps: K.
      barrier: η, positive.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.bome(0.1, 0.05, steps=5).draws
      Draws(inner=6, hyper=0, outer=1)

    Source: Ye, Liu, Wright, Stone and Liu, "BOME! Bilevel optimization made easy" (NeurIPS 2022),
    algorithm 1.
    """
    settings = dict(
        step_size=numbers.positive(inner_step, "inner_step"),
        outer=_steps.transformation(outer_step, "outer_step"),
        num=numbers.count(steps, "steps"),
        barrier=numbers.positive(barrier, "barrier"),
    )
    return Algorithm(
        Bound("bome", _bome_init, **settings),
        Bound("bome", _bome_step, **settings),
        Draws(steps + 1, 0, 1),
        finite=drawn_finite,
    )


def _bome_init(
    problem: Problem, inner: InnerState, x: PyTree, *, outer: Transformation, **_: Any
) -> BomeState:
    _steps.warm_only(problem, "bome")
    return BomeState(inner, x, optimizer.init(outer, (inner.params, x)))


def _bome_step(
    problem: Problem,
    state: BomeState,
    feeds: Feeds,
    *,
    step_size: Any,
    outer: Transformation,
    num: int,
    barrier: Any,
) -> tuple[BomeState, StepInfo]:
    y, x = state.inner.params, state.outer

    def body(i, carry):
        point, model = carry
        d, model = inner_grad(
            problem, point, x, problem.inner_draw(feeds.inner, i)._replace(model=model)
        )
        return descend(point, step_size, d), model

    solved, model = lax.fori_loop(0, num, body, (y, state.inner.model))
    inner_ctx = problem.inner_draw(feeds.inner, num)._replace(model=model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=model)
    gradient = jax.value_and_grad(problem.inner, (0, 1), has_aux=True)
    (g, _), (g_y, g_x) = gradient(y, x, inner_ctx)
    (g_solved, _), (_, solved_x) = gradient(
        solved, x, inner_ctx
    )  # ŷ is a constant: its own gradient does not count
    gap = (g_y, tree.sub(g_x, solved_x))
    (value, (_, aux)), f = jax.value_and_grad(problem.outer, (0, 1), has_aux=True)(y, x, outer_ctx)
    squared = tree.dot(gap, gap)
    multiplier = jnp.maximum(barrier * squared - tree.dot(f, gap), 0) / jnp.where(
        squared == 0, 1, squared
    )
    d = tree.axpy(multiplier, gap, f)
    (y_new, x_new), opt = _steps.move(outer, d, state.opt, (y, x))
    info = report(
        state.inner,
        x,
        Outer(value, f[0], f[1], aux),
        Directions(d[0], d[0], d[1]),
        counts(num + 2, 0, 1),
        {"multiplier": multiplier, "gap": g - g_solved},
    )
    return BomeState(
        state.inner._replace(params=y_new, model=model), _steps.projected(problem, x_new), opt
    ), info


__all__ = ["BomeState", "F2saState", "bome", "difference", "f2sa"]
