"""Implicit differentiation of a fixed point: constrained and non-smooth lower levels, and
equilibria.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevax import linear as linear_solvers
from bilevax import tree
from bilevax._core import numbers
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
    Pullback,
    PyTree,
)
from bilevax.hypergradient import _adjoint
from bilevax.hypergradient._solve import forward_with
from bilevax.inner.parts import apply, as_mapping


def fixed_point(
    mapping: Callable[..., Any],
    linear: LinearSolver | None = None,
    *,
    warm_start: bool = True,
    max_residual: Numeric | None = None,
) -> Hypergradient:
    r"""Implicit differentiation of ``y = T(y, x)``.

    .. math::
        (I - \partial_y T)^\top q = w, \qquad dx = (\partial_x T)^\top q

    With T a proximal or projected gradient step (`inner.proximal_map`) this differentiates lasso,
    elastic net, and lower levels on the
    simplex, a box or the non-negative orthant: on the active set, with the constraints that hold
    held. Right wherever T is differentiable at the solution, that is, off the kinks where the
    active set changes. The step size in T cancels.

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      mapping: ``T(inner_params, outer_params, batch) -> inner_params``, or `objective` of one
        (keyed, stateful). It need not be what the inner solver iterates: any mapping with the same
        fixed point will do.
      linear: solver of the adjoint system, which is not symmetric; default ``linear.gmres()``.
        ``linear.neumann(step=1.0)`` is the classical iteration ``q ← w + (∂T)'q``.
      warm_start: start from the adjoint of the last call.
      max_residual: relative residual of the system solved above which the warning
        ``adjoint_not_converged`` stands; ``jnp.inf`` accepts anything. None: the linear solver's
        own tolerance, and 0.1 for one without.

    Returns:
      A `Hypergradient` whose info has ``inner_grad_norm`` (here ``‖T(y, x) − y‖``),
      ``adjoint_iterations``, ``adjoint_residual``, and the cost in vector-Jacobian products of T:
      ``gradients`` (evaluations), ``hvps``, ``mixed_products``.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> smooth = lambda y, x, batch: jnp.sum((y - x) ** 2) / 2
      >>> T = bx.inner.proximal_map(
      ...     smooth, lambda v, x, s: optax.projections.projection_non_negative(v), 0.5
      ... )
      >>> method = bx.hypergradient.fixed_point(T)
      >>> outer = lambda y, x, batch: jnp.sum(y)
      >>> fn = bx.value_and_hypergrad(
      ...     smooth, outer, solver=bx.inner.fixed_point(T), hypergradient=method
      ... )
      >>> fn(jnp.ones(2), jnp.array([1.0, -1.0])).grad.round(
      ...     4
      ... ).tolist()  # the second coordinate is held at zero
      [1.0, 0.0]

    Source: Bertrand et al., "Implicit differentiation of Lasso-type models for hyperparameter
    optimization" (ICML 2020); Blondel et al., "Efficient and modular implicit differentiation"
    (NeurIPS 2022), section 2.2.
    """
    linear, max_residual = _adjoint.check_settings(linear, max_residual, linear_solvers.gmres())
    warm_start = numbers.flag(warm_start, "warm_start")
    own = as_mapping(mapping)
    settings = dict(
        mapping=own,
        linear=linear,
        warm_start=warm_start,
        max_residual=max_residual,
        precision=asked_by(linear),
    )
    return Hypergradient(
        init=Bound("fixed_point", _init, warm_start=warm_start),
        vjp=Bound("fixed_point", _vjp, **settings),
        order=1,
        precision=asked_by(linear),
        mapping=own,
    )


def _init(inner: PyTree, *, warm_start: bool) -> Any:
    return tree.zeros_like(inner) if warm_start else ()


def _vjp(
    lower: Lower,
    inner_state: InnerState,
    outer: PyTree,
    feed: Feed,
    ctx: Ctx,
    state: PyTree,
    *,
    mapping: Any,
    linear: Linear,
    warm_start: bool,
    max_residual: float | None,
    precision: str | None,
) -> tuple[InnerState, Pullback]:
    solution, info, _ = forward_with(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)

    def image(inner, outer):
        return apply(mapping, lower.objective, inner, outer, ctx)

    def pullback(w):
        start = state if warm_start else tree.zeros_like(w)
        found, q, report = _adjoint.through_fixed_point(
            image, linear, solution.params, outer, info, w, start, max_residual
        )
        return found, None, q if warm_start else (), report

    return solution, under(precision, pullback)
