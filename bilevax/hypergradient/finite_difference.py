"""One-step differentiation by a central difference: first-order memory, gradients only."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Lower, Pullback, PyTree
from bilevax.hypergradient import _product
from bilevax.hypergradient._solve import forward


def finite_difference(scale: Numeric = 1.0, *, radius: Numeric = 0.01) -> Hypergradient:
    """As `one_step`, its mixed product from two gradients.

    ``dx = −scale · [∇_x g(y + εw) − ∇_x g(y − εw)] / 2ε`` with ``ε = radius / ‖w‖``. Truncation is
    of order ``radius²``, rounding of order ``eps / radius`` times the size of ``∇_x g``: `radius`
    is the distance, in the units of the inner parameters, that the two points are moved. Both are
    evaluated with one key, one batch and one model state, so that dropout masks and samples cancel.
    A zero cotangent gives zero.

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      scale: positive; the inner step size gives DARTS.
      radius: positive.

    Returns:
      A first-order `Hypergradient` (``order=1``). Its info has the counters ``gradients``, ``hvps``
      and ``mixed_products``, and ``inner_grad_norm``, of the last gradient that the solver took; it
      warns of ``difference_lost`` where the displacement rounds away in the inner parameters'
      dtype, or leaves of the difference hardly more than rounding.

    Raises:
      TypeError, ValueError: if `scale` or `radius` is not a positive, finite number.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y)
      >>> method = bx.hypergradient.finite_difference(scale=0.25)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=bx.inner.optax(optax.sgd(0.5), 1), hypergradient=method
      ... )
      >>> fn(jnp.zeros(1), jnp.ones(1)).grad.round(3).tolist()
      [0.5]

    Source: Liu, Simonyan and Yang, "DARTS: Differentiable architecture search" (ICLR 2019),
    equation 8 and its rule for ε.
    """
    settings = dict(
        scale=numbers.positive(scale, "scale", example=1.0),
        radius=numbers.positive(radius, "radius", example=0.01),
    )
    return Hypergradient(
        init=_init, vjp=Bound("finite_difference", _vjp, **settings), order=1, cost=_cost
    )


def _cost(solver: Any) -> dict[Any, Any]:
    return {"gradients": 2, "hvps": 0, "mixed_products": 0}


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
    radius: Any,
) -> tuple[InnerState, Pullback]:
    solution, info = forward(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)

    def pullback(w):
        product, warnings = _product.central_difference(
            lower.objective, solution.params, outer, ctx, w, radius
        )
        counts = {"gradients": jnp.int32(2), "hvps": jnp.int32(0), "mixed_products": jnp.int32(0)}
        return (
            tree.scale(-scale, product),
            None,
            state,
            {**info, **counts, "warnings": info["warnings"] | warnings},
        )

    return solution, pullback
