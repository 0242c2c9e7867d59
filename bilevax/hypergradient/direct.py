"""The direct term alone: the lower level's solution counts as a constant."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from bilevax import tree
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Lower, Pullback, PyTree
from bilevax.hypergradient._solve import forward_with


def direct() -> Hypergradient:
    """The outer objective's own derivative, at a solution that counts as a constant: ``dx = ∂_x
    f(y, x)``.

    What the solution's motion adds, ``(∂y/∂x)' ∂_y f``, is left out, so that no derivative of the
    inner objective is taken. This is the first-order form of architecture search, where the outer
    objective reads the architecture itself and costs one gradient. It is right where ``∂_y f`` is
    zero, and elsewhere off by what was left out, however well the lower level is solved. A
    network's statistics (its model state) are taken as constants like the solution, which is no
    warning here. A derivative of ``Estimate.inner_params`` is zero, too. Of several objectives, one
    that does not read the outer parameters itself has a hypergradient of zero.

    Returns:
      A first-order `Hypergradient` (``order=1``). Its info has the counters ``gradients``, ``hvps``
      and ``mixed_products``, all zero, and ``inner_grad_norm``, of the last gradient that the
      solver took.

    Raises:
      ValueError: when run, for outer parameters that the outer objective does not read: they would
        have no derivative at all. As the method of a `Level`: put ``jax.lax.stop_gradient`` around
        that level's parameters in the objective that reads them.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(x * y)
      >>> solver = bx.inner.optax(optax.sgd(0.5), steps=1)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=solver, hypergradient=bx.hypergradient.direct()
      ... )
      >>> fn(jnp.zeros(1), jnp.full(1, 3.0)).grad.tolist()  # y alone; all of it is y + x = 6
      [3.0]

    Source: Liu, Simonyan and Yang, "DARTS: Differentiable architecture search" (ICLR 2019),
    section 2.3, first-order approximation; Lorraine, Vicol and Duvenaud, "Optimizing millions of
    hyperparameters by implicit differentiation" (AISTATS 2020), equation 1, direct gradient.
    """
    return Hypergradient(
        _init,
        Bound("direct", _vjp),
        sees_model=True,  # takes the statistics' cotangent, too, and leaves it
        batches=0,
        cost=_cost,
        extends=False,
        constant=True,
    )


def _cost(solver: Any) -> dict[str, Any]:
    return {"gradients": 0, "hvps": 0, "mixed_products": 0}


def _init(inner: PyTree) -> Any:
    return ()


def _vjp(
    lower: Lower, inner_state: InnerState, outer: PyTree, feed: Feed, ctx: Ctx, state: PyTree
) -> tuple[InnerState, Pullback]:
    # what holds the solution in place, a constraint, say, plays no part either
    solution, info, _ = forward_with(lower, inner_state, outer, feed)
    counts = {name: jnp.int32(count) for name, count in _cost(lower.solver).items()}
    return solution, lambda cotangent: (tree.zeros_like(outer), None, state, {**info, **counts})
