"""Implicit differentiation of an equality-constrained lower level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import linear as linear_solvers
from bilevax import tree
from bilevax._core.precision import asked_by, under
from bilevax._core.types import Numeric
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Linear, LinearSolver, Lower, Pullback, PyTree
from bilevax.hypergradient import _adjoint
from bilevax.hypergradient._solve import forward
from bilevax.inner.parts import as_mapping, bound_like
from bilevax.results import RESULTS, warning

OFF = 1e-3  # distance from the constraint, relative to the solution, above which the conditions do not hold


def kkt(constraint: Callable[..., Any], linear: LinearSolver | None = None, *, max_residual: Numeric | None = None) -> Hypergradient:
    r"""Implicit differentiation of ``y* = argmin_y g(y, x) subject to c(y, x) = 0``, through its optimality conditions.

    .. math::
        \begin{pmatrix} \nabla^2_{yy} L & J^\top \\ J & 0 \end{pmatrix}
        \begin{pmatrix} q \\ p \end{pmatrix} = \begin{pmatrix} w \\ 0 \end{pmatrix},
        \qquad dx = -\nabla^2_{xy} L \; q - (\partial_x c)^\top p,

    with the Lagrangian ``L = g + λ'c`` and ``J = ∂_y c``. The multiplier is the least-squares one at the solver's point, from a second system
    of the same shape with the identity in place of the Hessian. The constraints must be independent there (J of full row rank), and the
    solver must leave the point on them: ``constraint_norm`` in the info says how far off it is, and the warning ``off_constraint`` stands where that
    is more than a thousandth of the solution.

    Args:
      constraint: ``c(inner_params, outer_params, batch)``, a pytree of floating-point arrays that the solution makes zero; or `objective` of
        such a function (keyed, stateful).
      linear: solver for symmetric indefinite systems; default ``linear.minres()``. ``linear.lu()`` for small problems.
      max_residual: relative residual of the system solved above which the warning ``adjoint_not_converged``
        stands; ``jnp.inf`` accepts anything. None: the linear solver's own tolerance, and 0.1 for one without.

    Returns:
      A `Hypergradient` whose info has ``inner_grad_norm`` (``‖∇_y L‖``), ``constraint_norm`` (``‖c‖``), ``adjoint_iterations``,
      ``adjoint_residual``, ``gradients``, ``hvps`` (products with the Lagrangian's Hessian) and ``mixed_products``.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2) / 2
      >>> constraint = lambda y, x, batch: jnp.sum(y) - 1.0
      >>> T = bx.inner.proximal_map(inner, lambda v, x, s: v - (jnp.sum(v) - 1.0) / v.size, 1.0)  # the projection onto the plane
      >>> outer = lambda y, x, batch: y[0]
      >>> fn = bx.value_and_hypergrad(inner, outer, solver=bx.inner.fixed_point(T), hypergradient=bx.hypergradient.kkt(constraint))
      >>> fn(jnp.zeros(2), jnp.array([1.0, 3.0])).grad.round(4).tolist()
      [0.5, -0.5]

    Source: Fiacco, Introduction to Sensitivity and Stability Analysis in Nonlinear Programming (1983), section 2.2; Blondel et al., "Efficient
    and modular implicit differentiation" (NeurIPS 2022), section 2.2.
    """
    linear, max_residual = _adjoint.check_settings(linear, max_residual, linear_solvers.minres())
    condition = as_mapping(constraint, "constraint")
    settings = dict(constraint=condition, linear=linear, max_residual=max_residual, precision=asked_by(linear))
    return Hypergradient(init=_init, vjp=Bound("kkt", _vjp, **settings), order=1, precision=asked_by(linear), mapping=condition)


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
    constraint: Any,
    linear: Linear,
    max_residual: float | None,
    precision: str | None,
) -> tuple[InnerState, Pullback]:
    solution, info = forward(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)
    inner, limited = solution.params, bound_like(constraint, lower.objective)

    def violated(inner, outer):
        return limited(inner, outer, ctx)[0]

    def pullback(w):
        value, jacobian = jax.linearize(lambda inner: violated(inner, outer), inner)
        transposed = jax.linear_transpose(jacobian, inner)
        gradient = jax.grad(lower.objective, has_aux=True)(inner, outer, ctx)[0]

        def saddle(top):
            return lambda v: (tree.add(top(v[0]), transposed(v[1])[0]), jacobian(v[0]))

        # The least-squares multiplier: minimize ‖∇g + J'λ‖, whose remainder is ∇_y L.
        zero = tree.zeros_like(value)
        (remainder, multiplier), first_info = linear(saddle(lambda v: v), (tree.neg(gradient), zero), (tree.zeros_like(inner), zero))

        def lagrangian_gradients(inner):
            def lagrangian(inner, outer):
                value = lower.objective(inner, outer, ctx)[0]
                return value + tree.dot(multiplier, violated(inner, outer)).astype(value.dtype)

            return jax.grad(lagrangian, (0, 1))(inner, outer)

        _, products = jax.linearize(lagrangian_gradients, inner)
        (q, p), linear_info = linear(saddle(lambda v: products(v)[0]), (w, zero), (tree.zeros_like(w), zero))
        _, by_outer = jax.vjp(lambda outer: violated(inner, outer), outer)
        cotangent = tree.neg(tree.add(products(q)[1], by_outer(p)[0]))
        residual, code = jnp.maximum(linear_info.residual, first_info.residual), jnp.maximum(linear_info.code, first_info.code)
        worse = linear_info._replace(residual=residual, code=code)
        # The distance to the constraint, by one gradient step of ‖c‖².
        size = tree.norm(value)
        away = size**2 > OFF * tree.norm(transposed(value)[0]) * tree.norm(inner)
        off = info["warnings"] | warning(away & (size > 0), RESULTS.off_constraint)
        report = _adjoint.report({**info, "warnings": off}, worse, max_residual, inner_grad_norm=tree.norm(remainder), constraint_norm=size)
        return cotangent, None, state, report

    return solution, under(precision, pullback)
