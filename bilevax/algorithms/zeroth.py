"""Zeroth order: PZOBO, whose Jacobian of the inner solve is estimated from perturbed solves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers, optimizer
from bilevax._core.types import Numeric, Transformation
from bilevax.algorithms._parts import steps as _steps
from bilevax.algorithms._parts.directions import (
    Directions,
    counts,
    descend,
    drawn_finite,
    inner_grad,
    outer_pass,
    report,
)
from bilevax.algorithms._parts.steps import StepSize
from bilevax.base import Algorithm, Bound, Draws, Feeds, InnerState, Problem, PyTree, StepInfo


class PzoboState(NamedTuple):
    """Where PZOBO stands: inner state, outer parameters, state of the outer step."""

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree


def pzobo(
    inner_step: Numeric,
    outer_step: StepSize,
    *,
    steps: int = 10,
    samples: int = 1,
    smoothing: Numeric = 1e-2,
) -> Algorithm:
    """PZOBO: K inner steps, the same from perturbed outer parameters, and their difference as a
    Jacobian-vector product. Gradients only.

    ``δ_j = (y_K(x + μu_j) − y_K(x)) / μ`` with ``u_j ~ N(0, I)``, all solves from the last inner
    point and on the same batches; ``x −= b (∇_x f + (1/Q) Σ_j ⟨δ_j, ∇_y f⟩ u_j)``. The run needs a
    key. The Q + 1 solves are one vectorised loop.

    The variance grows with the number of outer parameters; Q reduces it.

    Args:
      inner_step: ``a``, a positive number.
      outer_step: ``b``, a positive number or an optax transformation.
      steps: K.
      samples: Q.
      smoothing: μ.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, without a key.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.pzobo(0.1, 0.05, steps=5, samples=4).draws
      Draws(inner=5, hyper=0, outer=1)

    Source: Sow, Ji and Liang, "On the convergence theory for Hessian-free bilevel algorithms"
    (NeurIPS 2022), algorithm 1.
    """
    settings = dict(
        step_size=numbers.positive(inner_step, "inner_step"),
        outer=_steps.transformation(outer_step, "outer_step"),
        num=numbers.count(steps, "steps"),
        samples=numbers.count(samples, "samples"),
        smoothing=numbers.positive(smoothing, "smoothing"),
    )
    return Algorithm(
        Bound("pzobo", _init, **settings),
        Bound("pzobo", _step, **settings),
        Draws(steps, 0, 1),
        finite=drawn_finite,
        differentiates=False,
    )


def _init(
    problem: Problem, inner: InnerState, x: PyTree, *, outer: Transformation, **_: Any
) -> PzoboState:
    _steps.warm_only(problem, "pzobo")
    return PzoboState(inner, x, optimizer.init(outer, x))


def _step(
    problem: Problem,
    state: PzoboState,
    feeds: Feeds,
    *,
    step_size: Any,
    outer: Transformation,
    num: int,
    samples: int,
    smoothing: Any,
) -> tuple[PzoboState, StepInfo]:
    x = state.outer
    keys = jax.random.split(_steps.random_key(feeds, "pzobo"), samples)
    noise = jax.vmap(lambda key: tree.normal_like(key, x))(keys)
    points = jax.tree.map(
        lambda a, u: jnp.concatenate([a[None], a[None] + jnp.asarray(smoothing, a.dtype) * u]),
        x,
        noise,
    )

    def solve(x):
        def body(i, carry):
            y, model, _ = carry
            d, model = inner_grad(
                problem, y, x, problem.inner_draw(feeds.inner, i)._replace(model=model)
            )
            return descend(y, step_size, d), model, d

        return lax.fori_loop(
            0,
            num,
            body,
            (state.inner.params, state.inner.model, tree.zeros_like(state.inner.params)),
        )

    solved, models, directions = jax.vmap(solve)(points)
    y, model, d_y = jax.tree.map(lambda a: a[0], (solved, models, directions))
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=model)
    f = outer_pass(problem, y, x, outer_ctx)

    def contribution(perturbed, u):
        slope = tree.dot(tree.sub(perturbed, y), f.y) / smoothing
        return tree.scale(slope / samples, u)

    estimate = jax.tree.map(
        lambda a: jnp.sum(a, axis=0),
        jax.vmap(contribution)(jax.tree.map(lambda a: a[1:], solved), noise),
    )
    d_x = tree.add(f.x, estimate)
    moved, x_opt = _steps.move(outer, d_x, state.outer_opt, x, project=problem.project)
    inner = state.inner._replace(params=y, model=model)
    info = report(inner, x, f, Directions(d_y, f.y, d_x), counts(num * (samples + 1), 0, 1))
    return PzoboState(inner, moved, x_opt), info


__all__ = ["PzoboState", "pzobo"]
