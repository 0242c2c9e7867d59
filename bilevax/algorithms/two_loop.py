"""Two-loop algorithms: several stochastic steps on the inner parameters and on the adjoint for each
outer step: AmIGO, StocBiO, BSA, TTSA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax

from bilevax import tree
from bilevax._core import numbers, optimizer
from bilevax._core.types import Numeric, Transformation
from bilevax.algorithms._parts import steps as _steps
from bilevax.algorithms._parts.directions import (
    Directions,
    counts,
    drawn_finite,
    hessian_product,
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
from bilevax.base import Algorithm, Bound, Draws, Feed, Feeds, InnerState, Problem, PyTree


class TwoLoopState(NamedTuple):
    """Where a two-loop algorithm stands: inner state, outer parameters, state of the outer step,
    and the adjoint with the state of its step.
    """

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    adjoint: tuple[Any, ...] = ()


def descent(
    problem: Problem,
    state: InnerState,
    outer: PyTree,
    feed: Feed,
    opt: Any,
    num: int,
    decayed: Callable[..., Any] = lambda i: 1.0,
) -> tuple[InnerState, PyTree]:
    """`num` stochastic steps on the inner parameters, a fresh batch each, and the last direction;
    the i-th is taken ``decayed(i)`` times.
    """

    def body(i, carry):
        state, _ = carry
        d, model = inner_grad(
            problem, state.params, outer, problem.inner_draw(feed, i)._replace(model=state.model)
        )
        y, y_opt = _steps.move(opt, d, state.opt, state.params, decayed(i))
        return InnerState(y, y_opt, model), d

    return _loop(num, body, (state, tree.zeros_like(state.params)))


def _loop(num: int, body: Any, carry: Any) -> Any:
    return (
        body(0, carry) if isinstance(num, int) and num == 1 else lax.fori_loop(0, num, body, carry)
    )


def _settings(inner_step: Any, outer_step: Any, num: int) -> Any:
    return dict(
        inner=_steps.transformation(inner_step, "inner_step"),
        outer=_steps.transformation(outer_step, "outer_step"),
        num=numbers.count(num, "steps"),
    )


def _start(
    problem: Problem,
    state: InnerState,
    outer_params: PyTree,
    inner: PyTree,
    outer: PyTree,
    name: str,
) -> TwoLoopState:
    _steps.warm_only(problem, name)
    return TwoLoopState(
        state._replace(opt=optimizer.init(inner, state.params)),
        outer_params,
        optimizer.init(outer, outer_params),
    )


def _outer_move(
    problem: Problem, state: TwoLoopState, opt: Any, d_x: PyTree, decayed: Any = 1.0
) -> tuple[PyTree, PyTree]:
    return _steps.move(opt, d_x, state.outer_opt, state.outer, decayed, problem.project)


# ---- AmIGO


def amigo(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    steps: int = 10,
    adjoint_step: StepSize | None = None,
    adjoint_steps: int | None = None,
) -> Algorithm:
    """AmIGO: stochastic steps on the inner parameters, stochastic steps on a warm-started adjoint,
    one outer step.

    K times ``y −= a ∇_y g(y, x)``; M times ``q −= c (∇²_yy g·q − ∇_y f(y, x))``; ``x −= b (∇_x f −
    ∇²_xy g·q)``. Every step draws a fresh batch of the inner data (of `hyper_data` for those with
    second derivatives); one batch of the outer data serves the whole outer step.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      steps: K.
      adjoint_step: ``c``; default `inner_step`.
      adjoint_steps: M; default `steps`.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.amigo(0.1, 0.05, steps=5).draws
      Draws(inner=5, hyper=6, outer=1)

    Source: Arbel and Mairal, "Amortized implicit differentiation for stochastic bilevel
    optimization" (ICLR 2022), algorithm 1.
    """
    adjoint_steps = steps if adjoint_steps is None else adjoint_steps
    settings = _settings(inner_step, outer_step, steps)
    settings["adjoint"] = _steps.transformation(
        inner_step if adjoint_step is None else adjoint_step, "adjoint_step"
    )
    settings["adjoint_num"] = numbers.count(adjoint_steps, "adjoint_steps")
    return Algorithm(
        Bound("amigo", _amigo_init, **settings),
        Bound("amigo", _amigo_step, **settings),
        Draws(steps, adjoint_steps + 1, 1),
        finite=drawn_finite,
    )


def _amigo_init(
    problem: Problem,
    state: Any,
    outer_params: PyTree,
    *,
    inner: Transformation,
    outer: Transformation,
    adjoint: Transformation,
    **_: Any,
) -> TwoLoopState:
    q = tree.zeros_like(state.params)
    return _start(problem, state, outer_params, inner, outer, "amigo")._replace(
        adjoint=(q, optimizer.init(adjoint, q))
    )


def _amigo_step(
    problem: Problem,
    state: TwoLoopState,
    feeds: Feeds,
    *,
    inner: Transformation,
    outer: Transformation,
    num: int,
    adjoint: Transformation,
    adjoint_num: Any,
) -> Any:
    x = state.outer
    point, d_y = descent(problem, state.inner, x, feeds.inner, inner, num)
    y = point.params
    hyper = Contexts(problem.hyper_draw, feeds.hyper, point.model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=point.model)
    f = outer_pass(problem, y, x, outer_ctx)

    def body(i, carry):
        q, q_opt, _ = carry
        d = tree.sub(hessian_product(problem, y, x, q, hyper.at(i)), f.y)
        q, q_opt = _steps.move(adjoint, d, q_opt, q)
        return q, q_opt, d

    q, q_opt, d_v = _loop(adjoint_num, body, (*state.adjoint, tree.zeros_like(y)))
    last = hyper.at(adjoint_num)
    d_x = adjoint_hypergradient(problem, y, x, q, f.x, last)
    info = report(point, x, f, Directions(d_y, d_v, d_x), counts(num, adjoint_num + 1, 1))
    return TwoLoopState(point, *_outer_move(problem, state, outer, d_x), (q, q_opt)), info


# ---- StocBiO


def stocbio(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    steps: int = 10,
    neumann_step: Numeric | None = None,
    neumann_steps: int = 10,
) -> Algorithm:
    """StocBiO: stochastic steps on the inner parameters, a Neumann series with fresh batches, one
    outer step.

    K times ``y −= a ∇_y g(y, x)``; ``q = c Σ_{j=0}^{Q} Π_{i≤j} (I − c H_i) ∇_y f``; ``x −= b (∇_x f
    − ∇²_xy g·q)``.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      steps: K.
      neumann_step: ``c``, below 2 over the largest inner curvature; default `inner_step`, where
        that is a number.
      neumann_steps: Q, Hessian-vector products.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.stocbio(0.1, 0.05, steps=5, neumann_steps=8).draws
      Draws(inner=5, hyper=9, outer=1)

    Source: Ji, Yang and Liang, "Bilevel optimization: convergence analysis and enhanced design"
    (ICML 2021), algorithms 2 and 3.
    """
    settings = dict(
        **_settings(inner_step, outer_step, steps),
        **neumann_settings(inner_step, neumann_step, neumann_steps),
    )
    return Algorithm(
        Bound("stocbio", _two_loop_init, name="stocbio", **settings),
        Bound("stocbio", _stocbio_step, **settings),
        Draws(steps, neumann_steps + 1, 1),
        finite=drawn_finite,
    )


def _two_loop_init(
    problem: Problem,
    state: Any,
    outer_params: PyTree,
    *,
    name: str,
    inner: Transformation,
    outer: Transformation,
    **_: Any,
) -> TwoLoopState:
    return _start(problem, state, outer_params, inner, outer, name)


def _stocbio_step(
    problem: Problem,
    state: TwoLoopState,
    feeds: Feeds,
    *,
    inner: Transformation,
    outer: Transformation,
    num: int,
    size: Any,
    terms: int,
) -> Any:
    x = state.outer
    point, d_y = descent(problem, state.inner, x, feeds.inner, inner, num)
    y = point.params
    hyper = Contexts(problem.hyper_draw, feeds.hyper, point.model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=point.model)
    f = outer_pass(problem, y, x, outer_ctx)
    (q,) = neumann(problem, ((y, x),), (f.y,), hyper, terms, size)
    last = hyper.at(terms)
    d_x = adjoint_hypergradient(problem, y, x, q, f.x, last)
    info = report(point, x, f, Directions(d_y, q, d_x), counts(num, terms + 1, 1))
    return TwoLoopState(point, *_outer_move(problem, state, outer, d_x)), info


# ---- BSA, TTSA


def bsa(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    steps: int = 10,
    neumann_step: Numeric | None = None,
    neumann_steps: int = 10,
    inner_decay: Numeric = 0.5,
    outer_decay: Numeric = 0.5,
) -> Algorithm:
    """BSA: stochastic steps on the inner parameters, one random term of the Neumann series, one
    outer step.

    K times ``y −= a ∇_y g(y, x)``; ``q = Q c Π_{i<p} (I − c H_i) ∇_y f`` with ``p ~ U{0, ..., Q −
    1}``; ``x −= b_t (∇_x f − ∇²_xy g·q)``. The run needs a key.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      steps: K.
      neumann_step: ``c``, at most 1 over the largest inner curvature; default `inner_step`, where
        that is a number.
      neumann_steps: Q.
      inner_decay: exponent of the decay of `inner_step`, counted in inner steps, where that is a
        number.
      outer_decay: exponent of the decay of `outer_step`, counted in outer steps, where that is a
        number.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, without a key.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.bsa(0.1, 0.05, steps=5, neumann_steps=8).draws
      Draws(inner=5, hyper=8, outer=1)

    Source: Ghadimi and Wang, "Approximation methods for bilevel programming" (arXiv 1802.02246),
    algorithms 2 and 3.
    """
    settings = dict(
        **_settings(inner_step, outer_step, steps),
        **neumann_settings(inner_step, neumann_step, neumann_steps),
        inner_decay=_steps.exponent(inner_decay, "inner_decay"),
        outer_decay=_steps.exponent(outer_decay, "outer_decay"),
    )
    return Algorithm(
        Bound("bsa", _two_loop_init, name="bsa", **settings),
        Bound("bsa", _bsa_step, **settings),
        Draws(steps, neumann_steps, 1),
        finite=drawn_finite,
    )


def ttsa(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    neumann_step: Numeric | None = None,
    neumann_steps: int = 10,
    inner_decay: Numeric = 0.4,
    outer_decay: Numeric = 0.6,
) -> Algorithm:
    """TTSA: one stochastic inner step, one random term of the Neumann series, one slower outer
    step.

    `bsa` with K = 1 and two time scales: ``a_t ∝ t^{−0.4}``, ``b_t ∝ t^{−0.6}``. The run needs a
    key.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      neumann_step: ``c``, at most 1 over the largest inner curvature; default `inner_step`, where
        that is a number.
      neumann_steps: Q.
      inner_decay: exponent of the decay of `inner_step`, where that is a number.
      outer_decay: exponent of the decay of `outer_step`, where that is a number.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, without a key.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.ttsa(0.1, 0.05, neumann_steps=8).draws
      Draws(inner=1, hyper=8, outer=1)

    Source: Hong, Wai, Wang and Yang, "A two-timescale stochastic algorithm framework for bilevel
    optimization" (SIAM J. Optim. 2023), algorithm 1.
    """
    return bsa(
        inner_step,
        outer_step,
        steps=1,
        neumann_step=neumann_step,
        neumann_steps=neumann_steps,
        inner_decay=inner_decay,
        outer_decay=outer_decay,
    )


def _bsa_step(
    problem: Problem,
    state: TwoLoopState,
    feeds: Feeds,
    *,
    inner: Transformation,
    outer: Transformation,
    num: int,
    size: Any,
    terms: int,
    inner_decay: Any,
    outer_decay: Any,
) -> Any:
    x = state.outer
    point, d_y = descent(
        problem,
        state.inner,
        x,
        feeds.inner,
        inner,
        num,
        lambda i: _steps.decayed(num * feeds.done + i, inner_decay),
    )
    y = point.params
    hyper = Contexts(problem.hyper_draw, feeds.hyper, point.model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=point.model)
    f = outer_pass(problem, y, x, outer_ctx)
    (q,) = truncated(
        problem, ((y, x),), (f.y,), hyper, terms, size, _steps.random_key(feeds, "bsa")
    )
    last = hyper.at(terms - 1)
    d_x = adjoint_hypergradient(problem, y, x, q, f.x, last)
    # Half of the series is expected; the products are counted as if all of it were.
    info = report(point, x, f, Directions(d_y, q, d_x), counts(num, terms, 1))
    return TwoLoopState(
        point, *_outer_move(problem, state, outer, d_x, _steps.decayed(feeds.done, outer_decay))
    ), info


__all__ = ["TwoLoopState", "amigo", "bsa", "stocbio", "ttsa"]
