"""Single-loop algorithms: one stochastic step each on the inner parameters, the adjoint and the
outer parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.algorithms._parts import memory, steps
from bilevax.algorithms._parts.directions import (
    Directions,
    combined,
    counts,
    drawn_finite,
    inner_grad,
    inner_pass,
    outer_pass,
    report,
)
from bilevax.algorithms._parts.steps import StepSize
from bilevax.algorithms._parts.triple import SingleLoopState, advance, as_moves, passes, start
from bilevax.base import Algorithm, Bound, Draws, Feeds, InnerState, Problem, PyTree, StepInfo


def soba(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    adjoint_step: StepSize | None = None,
    decay: Numeric = 0.5,
) -> Algorithm:
    """SOBA: stochastic gradient steps on all three variables at once.

    ``y −= a_t D_y``, ``v −= a_t D_v``, ``x −= b_t D_x``, all at the old point, with ``a_t, b_t ∝
    t^{−decay}``. One batch of the inner data serves the three parts of g, one of the outer data
    those of f; `hyper_data` is not used.

    Args:
      inner_step: ``a``, a positive number, or an optax transformation that takes ``D_y`` as
        gradient.
      outer_step: ``b``, likewise.
      adjoint_step: step of ``v``; default `inner_step`.
      decay: exponent of the decay of steps given as numbers; 0 for constant steps.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for steps that are neither a positive number nor a transformation.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2) / 2
      >>> outer = lambda y, x, batch: jnp.sum((y - 3.0) ** 2) / 2
      >>> algorithm = bx.algorithms.soba(0.5, 0.2, decay=0.0)
      >>> solution = bx.solve_bilevel(
      ...     inner, outer, jnp.zeros(2), jnp.zeros(2), algorithm=algorithm, num_steps=200
      ... )
      >>> bool(jnp.allclose(solution.outer_params, 3.0, atol=1e-3))
      True

    Source: Dagréou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms" (NeurIPS 2022), section 3.1.
    """
    settings = dict(
        moves=as_moves(inner_step, outer_step, adjoint_step), decay=steps.exponent(decay)
    )
    return Algorithm(
        Bound("soba", _soba_init, **settings),
        Bound("soba", _soba_step, **settings),
        Draws(1, 0, 1),
        finite=drawn_finite,
    )


def _soba_init(
    problem: Problem, inner: PyTree, outer: PyTree, *, moves: Any, decay: Any
) -> SingleLoopState:
    return start(problem, inner, outer, moves, "soba")


def _soba_step(
    problem: Problem, state: SingleLoopState, feeds: Feeds, *, moves: Any, decay: Any
) -> tuple[SingleLoopState, StepInfo]:
    inner_ctx, outer_ctx, g, f = passes(problem, state, feeds)
    d = combined(g, f)
    info = report(state.inner, state.outer, f, d, counts(1, 2, 1))
    return advance(problem, state, d, moves, g.model, (), steps.decayed(feeds.done, decay)), info


def ma_soba(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    adjoint_step: StepSize | None = None,
    momentum: Numeric = 0.1,
    decay: Numeric = 0.0,
) -> Algorithm:
    """MA-SOBA: SOBA with a moving average of the outer direction and constant steps.

    ``h = (1 − θ) h + θ D_x``, ``y −= a D_y``, ``v −= a D_v``, ``x −= b h``; h starts at the first
    ``D_x``.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      adjoint_step: step of ``v``; default `inner_step`.
      momentum: θ in (0, 1]; 1 is SOBA.
      decay: exponent of the decay of steps given as numbers.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.ma_soba(0.1, 0.05, momentum=0.2).draws
      Draws(inner=1, hyper=0, outer=1)

    Source: Chen, Xiao and Balasubramanian, "Optimal algorithms for stochastic bilevel optimization
    under relaxed smoothness conditions" (JMLR 2024), algorithm 1.
    """
    settings = dict(
        moves=as_moves(inner_step, outer_step, adjoint_step),
        momentum=numbers.positive(momentum, "momentum", upper=1),
        decay=steps.exponent(decay),
    )
    return Algorithm(
        Bound("ma_soba", _ma_soba_init, **settings),
        Bound("ma_soba", _ma_soba_step, **settings),
        Draws(1, 0, 1),
        finite=drawn_finite,
    )


def _ma_soba_init(
    problem: Problem, inner: PyTree, outer: PyTree, *, moves: Any, momentum: Any, decay: Any
) -> SingleLoopState:
    return start(problem, inner, outer, moves, "ma_soba", tree.zeros_like(outer))


def _ma_soba_step(
    problem: Problem, state: SingleLoopState, feeds: Feeds, *, moves: Any, momentum: Any, decay: Any
) -> tuple[SingleLoopState, StepInfo]:
    inner_ctx, outer_ctx, g, f = passes(problem, state, feeds)
    d = combined(g, f)
    mean = memory.momentum(state.memory, d.x, jnp.where(feeds.done == 0, 1.0, momentum))
    d = d._replace(x=mean)
    info = report(state.inner, state.outer, f, d, counts(1, 2, 1))
    return advance(problem, state, d, moves, g.model, mean, steps.decayed(feeds.done, decay)), info


class _Previous(NamedTuple):
    direction: PyTree
    outer: PyTree


def fsla(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    adjoint_step: StepSize | None = None,
    momentum: Numeric = 0.5,
    decay: Numeric = 0.5,
) -> Algorithm:
    """FSLA: stochastic gradient steps on ``y`` and ``v``, then STORM on ``x``.

    ``y⁺ = y − a_t ∇_y g(y, x)``, ``v⁺ = v − a_t D_v(y⁺, x, v)``, ``d = D_x(y⁺, x, v⁺) + (1 − η_t)(d
    − D_x(y, x⁻, v))``, ``x⁺ = x − b_t d``, with x⁻ the outer parameters before the last step and
    ``a_t, b_t, η_t ∝ t^{−decay}``. Each of the three lines draws its own batch (the second and
    third from `hyper_data`).

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      adjoint_step: step of ``v``; default `inner_step`.
      momentum: ``η`` at the start, in (0, 1].
      decay: exponent of the decay of η and of steps given as numbers.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.fsla(0.1, 0.05).draws
      Draws(inner=1, hyper=2, outer=2)

    Source: Li, Gu and Huang, "A fully single loop algorithm for bilevel optimization without
    Hessian inverse" (AAAI 2022), algorithm 1.
    """
    settings = dict(
        moves=as_moves(inner_step, outer_step, adjoint_step),
        momentum=numbers.positive(momentum, "momentum", upper=1),
        decay=steps.exponent(decay),
    )
    return Algorithm(
        Bound("fsla", _fsla_init, **settings),
        Bound("fsla", _fsla_step, **settings),
        Draws(1, 2, 2),
        finite=drawn_finite,
    )


def _fsla_init(
    problem: Problem, inner: PyTree, outer: PyTree, *, moves: Any, momentum: Any, decay: Any
) -> SingleLoopState:
    return start(problem, inner, outer, moves, "fsla", _Previous(tree.zeros_like(outer), outer))


def _fsla_step(
    problem: Problem, state: SingleLoopState, feeds: Feeds, *, moves: Any, momentum: Any, decay: Any
) -> tuple[SingleLoopState, StepInfo]:
    y_old, x, v_old = state.inner.params, state.outer, state.adjoint
    model = state.inner.model
    inner_ctx = problem.inner_draw(feeds.inner, 0)._replace(model=model)
    d_y, model = inner_grad(problem, y_old, x, inner_ctx)
    smaller = steps.decayed(feeds.done, decay)
    y, y_opt = steps.move(moves.y, d_y, state.inner.opt, y_old, smaller)

    hyper = [problem.hyper_draw(feeds.hyper, i)._replace(model=model) for i in range(2)]
    outer = [problem.outer_draw(feeds.outer, i)._replace(model=model) for i in range(2)]
    product = inner_pass(problem, y, x, v_old, hyper[0]).product
    d_v = tree.add(product, outer_pass(problem, y, x, outer[0]).y)
    v, v_opt = steps.move(moves.v, d_v, state.opt[0], v_old, smaller)

    f = outer_pass(problem, y, x, outer[1])
    new = tree.add(inner_pass(problem, y, x, v, hyper[1]).cross, f.x)
    x_old = state.memory.outer
    old = tree.add(
        inner_pass(problem, y_old, x_old, v_old, hyper[1]).cross,
        outer_pass(problem, y_old, x_old, outer[1]).x,
    )
    weight = jnp.where(
        feeds.done == 0, 1.0, momentum * smaller
    )  # the first step has nothing to remember
    d_x = memory.storm(state.memory.direction, new, old, weight)
    x_new, x_opt = steps.move(moves.x, d_x, state.opt[1], x, smaller, problem.project)

    inner = InnerState(y, y_opt, model)
    info = report(inner, x, f, Directions(d_y, d_v, d_x), counts(1, 3, 3))
    new_state = SingleLoopState(inner, x_new, v, (v_opt, x_opt), _Previous(d_x, x))
    return new_state, info


__all__ = ["SingleLoopState", "fsla", "ma_soba", "soba"]
