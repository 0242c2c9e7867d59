"""The double loop: solve the lower level from where it stands, take a hypergradient, step the outer
parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from bilevax import check, starts, tree
from bilevax._core import optimizer
from bilevax._estimate import begun, pulled, told
from bilevax.algorithms._parts.directions import drawn_finite
from bilevax.base import (
    Algorithm,
    Bound,
    Draws,
    Feeds,
    Hypergradient,
    InnerSolver,
    InnerState,
    Problem,
    PyTree,
    StepInfo,
)
from bilevax.results import RESULTS, warning


class DoubleLoopState(NamedTuple):
    """Where a double loop stands: inner state, outer parameters, outer optimizer's state, method's
    state.
    """

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    method: PyTree


def double_loop(
    inner_solver: InnerSolver,
    hypergradient: Hypergradient,
    outer_optimizer: optax.GradientTransformation,
) -> Algorithm:
    """K inner steps from the last inner point, one hypergradient, one step of the outer optimizer.

    ``y_{t+1} = solver(g(·, x_t), y_t)``; ``x_{t+1} = project(optimizer(x_t, ∇f(y_{t+1}, x_t)))``.
    Inner parameters, both optimizers and the adjoint are warm-started from step to step.

    Args:
      inner_solver: an `InnerSolver`.
      hypergradient: a `Hypergradient` method.
      outer_optimizer: any optax transformation. Numbers bound by `bilevax.tunable` are leaves:
        others of them cost no new trace.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError: for arguments of another kind.

    Examples:
      >>> import optax, bilevax as bx
      >>> bx.algorithms.double_loop(
      ...     bx.inner.optax(optax.sgd(0.1), 10),
      ...     bx.hypergradient.implicit(bx.linear.cg(maxiter=10)),
      ...     optax.adam(1e-2),
      ... ).draws
      Draws(inner=10, hyper=1, outer=1)

    Source: Pedregosa, "Hyperparameter optimization with approximate gradient" (ICML 2016); Arbel
    and Mairal, "Amortized implicit differentiation for stochastic bilevel optimization" (ICLR
    2022), on warm-starting both systems.
    """
    check.pieces(inner_solver, hypergradient, "inner_solver")
    check.transformation(outer_optimizer, "outer_optimizer")
    settings = dict(
        inner_solver=inner_solver, hypergradient=hypergradient, outer_optimizer=outer_optimizer
    )
    draws, around = Draws(inner_solver.steps, 1, 1), Bound("double_loop", _around, **settings)
    init, step = Bound("double_loop", _init, **settings), Bound("double_loop", _step, **settings)
    # A batch that was not finite is looked for afterwards: in the step, a GPU's compiler turns that
    # branch into a check of all batches.
    return Algorithm(init, step, draws, finite=drawn_finite, around=around)


def _around(
    wrap: Any,
    *,
    inner_solver: InnerSolver,
    hypergradient: Hypergradient,
    outer_optimizer: optax.GradientTransformation,
) -> Any:
    return double_loop(inner_solver, wrap(hypergradient), outer_optimizer)


def _init(
    problem: Problem,
    inner: InnerState,
    outer: PyTree,
    *,
    inner_solver: InnerSolver,
    hypergradient: Hypergradient,
    outer_optimizer: optax.GradientTransformation,
) -> DoubleLoopState:
    check.trajectory(problem, hypergradient)
    inner = inner._replace(opt=inner_solver.first(inner.params, outer))
    return DoubleLoopState(
        inner, outer, optimizer.init(outer_optimizer, outer), hypergradient.init(inner.params)
    )


def _step(
    problem: Problem,
    state: DoubleLoopState,
    feeds: Feeds,
    *,
    inner_solver: InnerSolver,
    hypergradient: Hypergradient,
    outer_optimizer: optax.GradientTransformation,
) -> tuple[DoubleLoopState, StepInfo]:
    starts.structure(problem, inner_solver, hypergradient, state.inner, state.outer, feeds)

    def estimate(outer):
        begin = begun(problem, inner_solver, hypergradient, state.inner, outer, feeds, state.method)
        solution, pullback = hypergradient.vjp(*begin.call)
        return pulled(problem, hypergradient, begin, solution, pullback, feeds)

    inner, est = estimate(state.outer)
    again = _value_fn(lambda outer: estimate(outer)[1])
    extra = dict(
        value=est.value,
        grad=est.grad,
        value_fn=again,
        grad_fn=lambda outer, i: jax.grad(again)(outer),
    )
    outer, outer_opt = optimizer.moved(
        outer_optimizer, est.grad, state.outer_opt, state.outer, problem.project, **extra
    )
    info = told(est.value, est.info, (inner, state.outer), est.aux)
    if inner_solver.to_tolerance is not None:
        info = info._replace(
            scored=(info.warnings & warning(True, RESULTS.inner_not_converged)) == 0
        )
    elif (
        inner_solver.steps == 1 and "inner_grad_norm" in est.info
    ):  # a single step has not caught up, and does not know
        info = info._replace(lag=est.info["inner_grad_norm"])
    return DoubleLoopState(inner, outer, outer_opt, est.state), info


def _value_fn(solve: Any) -> Any:
    """The outer value at other outer parameters, solved again, with the hypergradient as its
    derivative: for optimizers that search.
    """

    @jax.custom_vjp
    def value(outer):
        return solve(outer).value

    def forward(outer):
        est = solve(outer)
        return est.value, est.grad

    value.defvjp(forward, lambda grad, cotangent: (tree.scale(cotangent, grad),))
    return value


__all__ = ["DoubleLoopState", "double_loop"]
