"""One-step differentiation: the identity in place of the inverse Hessian."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Lower, Pullback, PyTree
from bilevax.hypergradient import _product
from bilevax.hypergradient._solve import forward


def one_step(scale: Numeric = 1.0) -> Hypergradient:
    """The adjoint is the cotangent itself, times a number: ``dx = −∇²_xy g · (scale · w)``.

    The derivative of a single gradient step of size `scale` taken at the solution: the first term
    of the Neumann series. Its error does not go away with more inner steps; it is small where
    ``scale · ∇²_yy g`` is close to the identity. One mixed product, whatever the solver.

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      scale: positive; the inner step size gives T1-T2, a bound on ``1 / λ_max`` of the inner
        Hessian the safest direction.

    Returns:
      A first-order `Hypergradient` (``order=1``). Its info has the counters ``gradients``, ``hvps``
      and ``mixed_products``, and ``inner_grad_norm``, of the last gradient that the solver took.

    Raises:
      TypeError, ValueError: if `scale` is not a positive, finite number.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y)
      >>> method = bx.hypergradient.one_step(scale=0.25)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=bx.inner.optax(optax.sgd(0.5), 1), hypergradient=method
      ... )
      >>> fn(jnp.zeros(1), jnp.ones(1)).grad.tolist()
      [0.5]

    Source: Luketina et al., "Scalable gradient-based tuning of continuous regularization
    hyperparameters" (ICML 2016), T1-T2; Bolte, Pauwels and Vaiter, "One-step differentiation of
    iterative algorithms" (NeurIPS 2023).
    """
    scale = numbers.positive(scale, "scale", example=1.0)
    by_difference = Hypergradient(
        _init,
        Bound("one_step", _vjp, scale=scale, product="difference"),
        order=1,
        cost=Bound("cost", _cost, product="difference"),
    )
    exact = Bound("one_step", _vjp, scale=scale, product="exact")
    return Hypergradient(
        _init,
        exact,
        order=1,
        cost=Bound("cost", _cost, product="exact"),
        first_order_form=by_difference,
    )


def _cost(solver: Any, *, product: Any) -> dict[Any, Any]:
    exact = product == "exact"
    return {"gradients": 0 if exact else 2, "hvps": 0, "mixed_products": 1 if exact else 0}


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
    scale: Any,
    product: str,
) -> tuple[InnerState, Pullback]:
    solution, info = forward(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)

    def pullback(w):
        warnings = info["warnings"]
        if product == "exact":
            cross = _product.exact(lower.objective, solution.params, outer, ctx, w)
        else:
            cross, lost = _product.central_difference(
                lower.objective, solution.params, outer, ctx, w, _product.RADIUS
            )
            warnings = warnings | lost
        counts = {
            name: jnp.int32(count) for name, count in _cost(lower.solver, product=product).items()
        }
        return tree.scale(-scale, cross), None, state, {**info, **counts, "warnings": warnings}

    return solution, pullback
