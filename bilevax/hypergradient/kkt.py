"""Implicit differentiation of a constrained lower level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevax import linear as linear_solvers
from bilevax._core.precision import asked_by, under
from bilevax._core.types import Numeric
from bilevax.base import (
    Bound,
    Ctx,
    Feed,
    Hypergradient,
    InnerState,
    Linear,
    LinearSolver,
    Lower,
    Objective,
    Pullback,
    PyTree,
    split,
)
from bilevax.hypergradient import _adjoint, _kkt
from bilevax.hypergradient._solve import forward_with
from bilevax.inner.parts import as_constraints


def kkt(
    equality: Callable[..., Any] | None = None,
    inequality: Callable[..., Any] | None = None,
    *,
    linear: LinearSolver | None = None,
    max_residual: Numeric | None = None,
) -> Hypergradient:
    r"""Implicit differentiation of ``y* = argmin_y g(y, x) subject to c(y, x) = 0, h(y, x) <= 0``,
    through its optimality conditions.

    .. math::
        \begin{pmatrix} \nabla^2_{yy} L & C^\top & H_a^\top \\ C & 0 & 0 \\ H_a & 0 & 0\end{pmatrix}
        \begin{pmatrix} q \\ p \\ r \end{pmatrix} = \begin{pmatrix} w \\ 0 \\ 0 \end{pmatrix},
        \qquad dx = -\nabla^2_{xy} L \; q - (\partial_x c)^\top p - (\partial_x h_a)^\top r,

    with the Lagrangian ``L = g + λ'c + μ'h``, ``C = ∂_y c`` and ``H_a`` the rows of ``∂_y h`` that
    are active (``h = 0``). Exact where active constraints are independent and have positive
    multipliers. Elsewhere the solution has one-sided derivatives at most, and one of them is
    returned with a warning: ``weakly_active`` (a multiplier of zero). Dependent constraints
    (looked for where their Jacobian has at most four million entries) have the warning
    ``dependent_constraints``; the derivative is exact where they stay dependent however ``x``
    moves, and a mean of the one-sided ones where it moves them apart. A point at which the
    conditions do not hold gives ``off_constraint`` (further from the constraints than a thousandth
    of its size) or ``not_stationary`` (as far from the minimum on them, or held by a multiplier of
    the wrong sign).

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      equality: ``c(inner_params, outer_params, batch)``, a pytree of floating-point arrays that the
        solution makes zero; or `objective` of such a function (keyed, stateful).
      inequality: ``h``, likewise, that it makes at most zero. With None for both, they are those of
        the solver (`inner.qp`, `inner.sqp`), and so are the multipliers; over another solver the
        multipliers are the least-squares ones.
      linear: solver for symmetric indefinite systems; default ``linear.lu()`` up to a thousand
        unknowns and multipliers, ``linear.minres()`` above.
      max_residual: relative residual of the system solved above which the warning
        ``adjoint_not_converged`` stands; ``jnp.inf`` accepts anything. None: the linear solver's
        own tolerance, and 0.1 for one without.

    Returns:
      A `Hypergradient` whose info has ``inner_grad_norm`` (``‖∇_y L‖``), ``constraint_norm``
      (``‖(c, max(h, 0))‖``), ``adjoint_iterations``, ``adjoint_residual``, ``gradients``, ``hvps``
      (products with the Lagrangian's Hessian) and ``mixed_products``.

    Raises:
      TypeError, ValueError: for arguments of another kind; over a solver without constraints, where
        none are given.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2) / 2
      >>> solver = bx.inner.qp(
      ...     lambda y, x, batch: jnp.sum(y) - 1.0, lambda y, x, batch: -y
      ... )  # the nearest point of the simplex
      >>> fn = bx.value_and_hypergrad(
      ...     inner, lambda y, x, batch: y[0], solver=solver, hypergradient=bx.hypergradient.kkt()
      ... )
      >>> fn(jnp.zeros(3), jnp.array([0.9, 0.5, -1.0])).grad.round(4).tolist()
      [0.5, -0.5, 0.0]

    Source: Fiacco, Introduction to Sensitivity and Stability Analysis in Nonlinear Programming
      (1983), sections 2.2 and 3.2; Amos and Kolter,
    "OptNet: differentiable optimization as a layer" (ICML 2017); Blondel et al., "Efficient and
    modular implicit differentiation" (NeurIPS 2022).
    """
    given = linear is not None
    linear, max_residual = _adjoint.check_settings(linear, max_residual, linear_solvers.lu())
    constraints = (
        None if equality is None and inequality is None else as_constraints(equality, inequality)
    )
    settings = dict(
        constraints=constraints,
        linear=linear if given else None,
        max_residual=max_residual,
        precision=asked_by(linear),
    )
    return Hypergradient(
        init=_init,
        vjp=Bound("kkt", _vjp, **settings),
        order=1,
        precision=asked_by(linear),
        mapping=constraints,
    )


def _init(inner: PyTree) -> Any:
    return ()


def _vjp(
    lower: Lower,
    inner_state: InnerState,
    outer: PyTree,
    feed: Feed,
    ctx: Ctx,
    state: PyTree,
    *,
    constraints: Objective | None,
    linear: Linear | None,
    max_residual: float | None,
    precision: str | None,
) -> tuple[InnerState, Pullback]:
    own = lower.solver.constraints
    if constraints is None and own is None:
        raise ValueError(
            f"equality: got None, and None for inequality, over {lower.solver!r}, which has none; "
            "expected them. Try kkt(equality, inequality)."
        )
    constraints = own if constraints is None else constraints
    solution, info, multipliers = forward_with(lower, inner_state, outer, feed)
    given = multipliers if own is not None and split(constraints)[0] == split(own)[0] else None
    ctx = ctx._replace(model=solution.model)

    def pullback(w):
        cotangent, said = _kkt.pull_back(
            constraints, lower, solution, outer, ctx, info, given, linear, max_residual, w
        )
        return cotangent, None, state, said

    return solution, under(precision, pullback)
