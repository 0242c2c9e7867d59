"""Fixed-point iteration, and the mappings of proximal and projected gradient steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import base, tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.base import Objective, PyTree, Scalar
from bilevax.inner import _tolerance as tolerance
from bilevax.inner._mapping import apply, as_mapping
from bilevax.results import RESULTS


def fixed_point(
    mapping: Callable[..., Any], maxiter: int = 1000, tol: Numeric = 1e-6
) -> base.InnerSolver:
    """Iterate a mapping until it stands still: lower levels that are constrained or not smooth, and
    equilibria.

    ``y_{t+1} = T(y_t, x)`` until ``‖T(y) − y‖ ≤ tol · max(‖y‖, ‖T(y_0) − y_0‖)``.

    Args:
      mapping: ``T(inner_params, outer_params, batch) -> inner_params``, a contraction near its
        fixed point; or `objective` of such a function (with ``keyed`` or ``stateful``).
        `proximal_map` makes those of proximal and projected gradient descent.
      maxiter: most iterations in one solve.
      tol: relative tolerance, as above.

    Returns:
      An `InnerSolver` of one step, not reversible; differentiate it by
      ``hypergradient.fixed_point`` with the same mapping, or by ``hypergradient.implicit``, which
      then does the same. Its info has ``value`` (the inner objective at the start), ``grad_norm``
      (``‖T(y) − y‖`` at the end), ``iterations`` and ``code``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.fixed_point(lambda y, x, batch: jnp.cos(y) * x)
      >>> g = bx.objective(lambda y, x, batch: jnp.sum((y - x * jnp.cos(y)) ** 2))
      >>> state, info = solver.step(
      ...     g, base.InnerState(jnp.ones(1), solver.init(jnp.ones(1))), jnp.ones(1), base.Ctx()
      ... )
      >>> bool(abs(state.params[0] - 0.739) < 1e-3), int(info["code"])
      (True, 0)

    Source: Banach 1922; for proximal gradient steps Combettes and Wajs, "Signal recovery by
    proximal forward-backward splitting" (2005).
    """
    mapping = as_mapping(mapping)
    maxiter = numbers.count(maxiter, "maxiter")
    tol = numbers.positive(tol, "tol", example=1e-6)
    step = base.Bound("fixed_point", _solve, mapping=mapping, maxiter=maxiter, tol=tol)
    optimality = base.Bound("fixed_point", _image, mapping=mapping)
    return base.InnerSolver(
        init=base.Bound("init", _init), step=step, steps=1, reversible=False, optimality=optimality
    )


def _image(
    objective: Objective, params: PyTree, outer: PyTree, ctx: base.Ctx, *, mapping: Objective
) -> PyTree:
    return apply(mapping, objective, params, outer, ctx)


def proximal_map(smooth: Callable[..., Any], prox: Callable[..., Any], step: Numeric) -> base.Bound:
    r"""The mapping of one proximal gradient step, whose fixed points minimize a smooth function
    plus one with a known proximal operator.

    .. math::
        T(y, x) = \mathrm{prox}_{s h(\cdot, x)}\big(y - s \nabla_y g(y, x)\big)

    Lasso: ``prox=lambda v, x, s: soft(v, s * jnp.exp(x))`` with ``soft(v, t) = sign(v) max(|v| − t,
    0)``. A constraint's prox is the projection: ``lambda v, x, s:
    optax.projections.projection_simplex(v)``, or ``projection_box``, ``projection_non_negative``.

    Args:
      smooth: ``g(inner_params, outer_params, batch) -> scalar``.
      prox: ``(inner_params, outer_params, step) -> inner_params``.
      step: step size s, at most 1/L for a gradient with Lipschitz constant L.

    Returns:
      A mapping ``(inner_params, outer_params, batch) -> inner_params`` for `inner.fixed_point` and
      ``hypergradient.fixed_point``.

    Raises:
      TypeError, ValueError: for functions that are none, or a step that is not positive.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> T = bx.inner.proximal_map(
      ...     lambda y, x, batch: jnp.sum((y - x) ** 2) / 2,
      ...     lambda v, x, s: optax.projections.projection_non_negative(v),
      ...     0.5,
      ... )
      >>> T(jnp.zeros(2), jnp.array([1.0, -1.0]), None).tolist()
      [0.5, 0.0]

    Source: Parikh and Boyd, "Proximal algorithms" (2014), section 4.2.
    """
    for name, fn in (("smooth", smooth), ("prox", prox)):
        if not callable(fn):
            raise TypeError(f"{name}: got {type(fn).__name__}; expected a function.")
    return base.Bound(
        "proximal_map", _proximal, smooth=smooth, prox=prox, step=numbers.positive(step, "step")
    )


def _proximal(
    inner: PyTree, outer: PyTree, batch: PyTree, *, smooth: Any, prox: Any, step: Any
) -> Any:
    floats, fixed = tree.partition(inner)
    grads = jax.grad(lambda floats: smooth(tree.combine(floats, fixed), outer, batch))(floats)
    return prox(tree.combine(tree.axpy(-step, grads, floats), fixed), outer, step)


def _init(params: PyTree) -> tuple[Any, ...]:
    return ()


class _Carry(NamedTuple):
    params: PyTree
    residual: Any
    first: Any
    iterations: Any


def _solve(
    objective: Objective,
    state: base.InnerState,
    outer: PyTree,
    ctx: base.Ctx,
    *,
    mapping: Objective,
    maxiter: int,
    tol: Any,
) -> tuple[base.InnerState, dict[str, Scalar]]:
    dtype, unit = tolerance.scalar_dtype(state.params), numbers.rounding_unit(state.params)
    infinite = jnp.asarray(jnp.inf, dtype)

    def going(c: _Carry):
        size = jnp.maximum(tree.norm(c.params), jnp.where(jnp.isfinite(c.first), c.first, 0))
        moving = c.residual > jnp.maximum(jnp.asarray(tol).astype(dtype), 2 * unit) * size
        return moving & (c.iterations < maxiter) & (jnp.isfinite(c.residual) | (c.iterations == 0))

    def body(c: _Carry) -> _Carry:
        new = jax.tree.map(
            tolerance.like, apply(mapping, objective, c.params, outer, ctx), c.params
        )
        residual = tree.norm(tree.sub(new, c.params))
        return _Carry(
            new, residual, jnp.where(c.iterations == 0, residual, c.first), c.iterations + 1
        )

    value, (model, _) = objective(state.params, outer, ctx)
    end = lax.while_loop(going, body, _Carry(state.params, infinite, infinite, jnp.int32(0)))
    size = jnp.maximum(tree.norm(end.params), end.first)
    small = end.residual <= jnp.maximum(jnp.asarray(tol).astype(dtype), 2 * unit) * size
    code = jnp.where(small, jnp.int32(RESULTS.success), jnp.int32(RESULTS.inner_not_converged))
    info = {
        "value": value,
        "grad_norm": end.residual,
        "iterations": end.iterations,
        "code": jnp.where(tree.all_finite(end.params), code, jnp.int32(RESULTS.inner_nonfinite)),
    }
    return base.InnerState(end.params, state.opt, model), info
