"""Two-loop algorithms with variance-reduced directions: MRBO, SUSTAIN and VRBO."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers, optimizer
from bilevax._core.types import Numeric, Transformation
from bilevax.algorithms._parts import memory
from bilevax.algorithms._parts import steps as _steps
from bilevax.algorithms._parts.directions import (
    Directions,
    counts,
    data_finite,
    descend,
    drawn_finite,
    inner_grad,
    outer_pass,
    report,
)
from bilevax.algorithms._parts.series import (
    Contexts,
    adjoint_hypergradient,
    neumann,
    neumann_settings,
    truncated,
)
from bilevax.algorithms._parts.steps import StepSize
from bilevax.base import Algorithm, Bound, Ctx, Draws, Feeds, InnerState, Problem, PyTree, StepInfo
from bilevax.data.draws import num_batches, whole


class MomentumState(NamedTuple):
    """Where MRBO, SUSTAIN or VRBO stands: the point, the state of the outer step, the last
    directions, and the point before.
    """

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    directions: tuple[Any, ...]
    previous: tuple[Any, ...]


def mrbo(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    momentum: Numeric = 0.5,
    neumann_step: Numeric | None = None,
    neumann_steps: int = 10,
    decay: Numeric = 1 / 3,
) -> Algorithm:
    """MRBO: STORM on the inner and the outer direction, the latter from a Neumann series at the new
    and the old point on shared batches.

    ``u = ∇_y g(z_t) + (1 − η_t)(u − ∇_y g(z_{t−1}))``, ``w = D(z_t) + (1 − η_t)(w − D(z_{t−1}))``,
    ``y −= a_t u``, ``x −= b_t w``, for ``z = (y, x)`` and ``D = ∇_x f − ∇²_xy g·q`` with q by
    `stocbio`'s series; ``a_t, b_t ∝ t^{−decay}`` and ``η_t ∝ t^{−2 decay}``, with ``η_1 = 1``.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      momentum: ``η``, in (0, 1].
      neumann_step: step of the series; default `inner_step`, where that is a number.
      neumann_steps: Hessian-vector products at each of the two points.
      decay: exponent of the decay of steps given as numbers; twice that of η. The paper's is 1/3.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.mrbo(0.1, 0.05, neumann_steps=8).draws
      Draws(inner=1, hyper=9, outer=1)

    Source: Yang, Ji and Liang, "Provably faster algorithms for bilevel optimization" (NeurIPS
    2021), algorithm 1.
    """
    return _storm("mrbo", inner_step, outer_step, momentum, neumann_step, neumann_steps, decay)


def sustain(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    momentum: Numeric = 0.5,
    neumann_step: Numeric | None = None,
    neumann_steps: int = 10,
    decay: Numeric = 1 / 3,
) -> Algorithm:
    """SUSTAIN: STORM on the inner and the outer direction, the latter from one random term of the
    Neumann series. The run needs a key.

    As `mrbo`, with ``q = Q c Π_{i<p} (I − c H_i) ∇_y f`` and ``p ~ U{0, ..., Q − 1}``, the same p
    and batches at the new and the old point.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      momentum: ``η``, in (0, 1].
      neumann_step: ``c``; default `inner_step`, where that is a number.
      neumann_steps: Q.
      decay: exponent of the decay of steps given as numbers; twice that of η. The paper's is 1/3.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, without a key.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.sustain(0.1, 0.05, neumann_steps=8).draws
      Draws(inner=1, hyper=9, outer=1)

    Source: Khanduri et al., "A near-optimal algorithm for stochastic bilevel optimization via
    double-momentum" (NeurIPS 2021), algorithm 1.
    """
    return _storm("sustain", inner_step, outer_step, momentum, neumann_step, neumann_steps, decay)


def _storm(
    name: str,
    inner_step: Any,
    outer_step: Any,
    momentum: Any,
    neumann_step: Any,
    neumann_steps: Any,
    decay: Any,
) -> Algorithm:
    settings = dict(
        name=name,
        inner=_steps.transformation(inner_step, "inner_step"),
        outer=_steps.transformation(outer_step, "outer_step"),
        momentum=numbers.positive(momentum, "momentum", upper=1),
        decay=_steps.exponent(decay),
        **neumann_settings(inner_step, neumann_step, neumann_steps),
    )
    return Algorithm(
        Bound(name, _storm_init, **settings),
        Bound(name, _storm_step, **settings),
        Draws(1, neumann_steps + 1, 1),
        finite=drawn_finite,
    )


def _storm_init(
    problem: Problem,
    state: InnerState,
    outer_params: PyTree,
    *,
    name: str,
    inner: Transformation,
    outer: Transformation,
    **_: Any,
) -> MomentumState:
    _steps.warm_only(problem, name)
    y, x = state.params, outer_params
    zeros = (tree.zeros_like(y), tree.zeros_like(x))
    return MomentumState(
        state._replace(opt=optimizer.init(inner, y)), x, optimizer.init(outer, x), zeros, (y, x)
    )


def _storm_step(
    problem: Problem,
    state: MomentumState,
    feeds: Feeds,
    *,
    name: str,
    inner: Transformation,
    outer: Transformation,
    momentum: Any,
    decay: Any,
    size: Any,
    terms: int,
) -> tuple[MomentumState, StepInfo]:
    y, x = here = (state.inner.params, state.outer)
    y_old, x_old = there = state.previous
    model = state.inner.model
    inner_ctx = problem.inner_draw(feeds.inner, 0)._replace(model=model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=model)
    hyper = Contexts(problem.hyper_draw, feeds.hyper, model)
    last = hyper.at(terms)

    u, new_model = inner_grad(problem, y, x, inner_ctx)
    u_old, _ = inner_grad(problem, y_old, x_old, inner_ctx)
    f, f_old = outer_pass(problem, y, x, outer_ctx), outer_pass(problem, y_old, x_old, outer_ctx)
    if name == "sustain":
        q, q_old = truncated(
            problem,
            (here, there),
            (f.y, f_old.y),
            hyper,
            terms,
            size,
            _steps.random_key(feeds, name),
        )
    else:
        q, q_old = neumann(problem, (here, there), (f.y, f_old.y), hyper, terms, size)
    w = adjoint_hypergradient(problem, y, x, q, f.x, last)
    w_old = adjoint_hypergradient(problem, y_old, x_old, q_old, f_old.x, last)

    smaller = _steps.decayed(feeds.done, decay)
    # The first step has nothing to remember; from there on η stays below 1, whatever it began at.
    weight = jnp.where(feeds.done == 0, 1.0, momentum * smaller**2)
    d_y, d_x = memory.storm(state.directions, (u, w), (u_old, w_old), weight)
    info = report(state.inner, state.outer, f, Directions(d_y, q, d_x), counts(2, 2 * terms + 2, 2))
    y, y_opt = _steps.move(inner, d_y, state.inner.opt, y, smaller)
    x, x_opt = _steps.move(outer, d_x, state.outer_opt, x, smaller, problem.project)
    return MomentumState(InnerState(y, y_opt, new_model), x, x_opt, (d_y, d_x), here), info


def vrbo(
    inner_step: Numeric,
    outer_step: StepSize,
    *,
    period: int,
    steps: int = 10,
    neumann_step: Numeric | None = None,
    neumann_steps: int = 10,
) -> Algorithm:
    """VRBO: SARAH on the inner and the outer direction along an inner loop, refreshed on the full
    data every `period` outer steps.

    ``(u, w) = (∇_y g, D)_full(y, x)`` where ``t mod period = 0``; ``x⁺ = x − b w``; then K times,
    from ``z⁻ = (y, x)`` and ``z = (y, x⁺)``: ``u += ∇_y g(z) − ∇_y g(z⁻)``, ``w += D(z) − D(z⁻)``,
    ``y −= a u``; D as in `mrbo`, by a Neumann series.

    Data must have a fixed number of batches (`data.partitioned`), or come whole.

    Args:
      inner_step: ``a``, a positive number.
      outer_step: ``b``, a positive number or an optax transformation.
      period: outer steps from one full refresh to the next.
      steps: K.
      neumann_step: step of the series; default `inner_step`.
      neumann_steps: Hessian-vector products at each of the two points.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, for data that is no partition.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.vrbo(0.1, 0.05, period=8, steps=3, neumann_steps=4).draws
      Draws(inner=3, hyper=15, outer=3)

    Source: Yang, Ji and Liang, "Provably faster algorithms for bilevel optimization" (NeurIPS
    2021), algorithm 2.
    """
    settings = dict(
        step_size=numbers.positive(inner_step, "inner_step"),
        outer=_steps.transformation(outer_step, "outer_step"),
        period=numbers.count(period, "period"),
        num=numbers.count(steps, "steps"),
        **neumann_settings(inner_step, neumann_step, neumann_steps),
    )
    return Algorithm(
        Bound("vrbo", _vrbo_init, **settings),
        Bound("vrbo", _vrbo_step, **settings),
        Draws(steps, steps * (neumann_steps + 1), steps),
        finite=data_finite,
    )


def _vrbo_init(
    problem: Problem, state: InnerState, outer_params: PyTree, *, outer: Transformation, **_: Any
) -> MomentumState:
    _steps.warm_only(problem, "vrbo")
    for draw in (problem.inner_draw, problem.hyper_draw, problem.outer_draw):
        num_batches(draw, "vrbo")
    y, x = state.params, outer_params
    return MomentumState(
        state, x, optimizer.init(outer, x), (tree.zeros_like(y), tree.zeros_like(x)), ()
    )


def _vrbo_step(
    problem: Problem,
    state: MomentumState,
    feeds: Feeds,
    *,
    step_size: Any,
    outer: Transformation,
    period: Any,
    num: int,
    size: Any,
    terms: int,
) -> tuple[MomentumState, StepInfo]:
    y, x, model = state.inner.params, state.outer, state.inner.model
    draws = (problem.inner_draw, problem.hyper_draw, problem.outer_draw)

    def estimates(
        points: Any, inner_ctx: Ctx, hyper: Contexts, outer_ctx: Ctx
    ) -> tuple[Any, Any, Any]:
        """``(∇_y g, D)`` at each point, on shared batches."""
        gradients = [inner_grad(problem, y, x, inner_ctx) for y, x in points]
        passes = [outer_pass(problem, y, x, outer_ctx) for y, x in points]
        adjoints = neumann(problem, points, tuple(f.y for f in passes), hyper, terms, size)
        last = hyper.at(terms)
        found = [
            (u, adjoint_hypergradient(problem, y, x, q, f.x, last))
            for (u, _), (y, x), q, f in zip(gradients, points, adjoints, passes, strict=True)
        ]
        return found, gradients[0][1], passes[0].value

    def full():
        inner_draw, hyper_draw, outer_draw = (whole(draw, "vrbo") for draw in draws)
        inner_ctx, outer_ctx = (
            inner_draw(feeds.inner, 0)._replace(model=model),
            outer_draw(feeds.outer, 0)._replace(model=model),
        )
        return estimates(((y, x),), inner_ctx, Contexts(hyper_draw, feeds.hyper, model), outer_ctx)[
            0
        ][0]

    refresh = feeds.done % period == 0
    d_y, d_x = lax.cond(refresh, full, lambda: state.directions)
    moved, x_opt = _steps.move(outer, d_x, state.outer_opt, x, project=problem.project)

    def body(i, carry):
        y, old, d, model, _ = carry
        inner_ctx, outer_ctx = (
            problem.inner_draw(feeds.inner, i)._replace(model=model),
            problem.outer_draw(feeds.outer, i)._replace(model=model),
        )
        hyper = Contexts(_shifted, (problem.hyper_draw, feeds.hyper, i * (terms + 1)), model)
        (new, past), model, value = estimates(((y, moved), old), inner_ctx, hyper, outer_ctx)
        d = memory.sarah(d, new, past)
        return descend(y, step_size, d[0]), (y, moved), d, model, value

    first = outer_pass(problem, y, x, problem.outer_draw(feeds.outer, 0)._replace(model=model))
    new_y, _, d, model, _ = lax.fori_loop(0, num, body, (y, (y, x), (d_y, d_x), model, first.value))
    batches = [num_batches(draw, "vrbo") for draw in draws]
    extra = jnp.where(refresh, 1, 0)
    calls = counts(
        2 * num + extra * batches[0],
        2 * num * (terms + 1) + extra * (terms + 1) * batches[1],
        2 * num + 1 + extra * batches[2],
    )
    info = report(state.inner, x, first, Directions(d_y, d[0], d_x), calls)
    return MomentumState(state.inner._replace(params=new_y, model=model), moved, x_opt, d, ()), info


def _shifted(stream: Any, i: Any) -> Any:
    draw, feed, offset = stream
    return draw(feed, offset + i)


__all__ = ["MomentumState", "mrbo", "sustain", "vrbo"]
