"""Combinatorial lower levels, differentiated by interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Lower, Pullback, PyTree
from bilevax.hypergradient._solve import forward_with
from bilevax.inner.black_box import minimize


def black_box(
    minimizer: Callable[..., Any], interpolation: Numeric = 1.0, *, host: bool = False
) -> Hypergradient:
    r"""The gradient of a piecewise affine interpolation of a piecewise constant solution map.

    .. math::
        dx = \nabla^2_{xy} g \; \frac{y_\lambda - y}{\lambda}, \qquad
        y = \operatorname{argmin}_{y \in Y} \langle c(x), y \rangle, \quad
        y_\lambda = \operatorname{argmin}_{y \in Y} \langle c(x) + \lambda w, y \rangle, \quad
        c = \nabla_y g

    The true derivative is zero almost everywhere; this one points to where the answer changes. One
    solve more.

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      minimizer: as for ``inner.black_box``.
      interpolation: λ > 0, about as large as the changes of the costs that change the answer:
        smaller is more faithful and less informative.
      host: as for ``inner.black_box``.

    Returns:
      A `Hypergradient`. Its info has ``changed``, the distance ``‖y_λ − y‖`` (zero is no
      information at this λ, try a larger one), and the cost.

    Raises:
      TypeError, ValueError: for a minimizer that cannot be called, an interpolation that is not
        positive.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> smallest = lambda c: jax.nn.one_hot(jnp.argmin(c), c.size)
      >>> inner, outer = (
      ...     (lambda y, x, batch: jnp.sum(x * y)),
      ...     (lambda y, x, batch: jnp.sum(jnp.array([1.0, 0.0]) * y)),
      ... )
      >>> solver, method = (
      ...     bx.inner.black_box(smallest),
      ...     bx.hypergradient.black_box(smallest, interpolation=2.0),
      ... )
      >>> fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)
      >>> fn(
      ...     jnp.zeros(2), jnp.array([0.1, 0.4])
      ... ).grad.tolist()  # the first should cost more, the second less
      [-0.5, 0.5]

    Source: Vlastelica et al., "Differentiation of blackbox combinatorial solvers" (ICLR 2020),
    algorithm 1.
    """
    if not callable(minimizer):
        raise TypeError(
            f"minimizer: got {type(minimizer).__name__}; expected a function costs -> inner_params."
        )
    interpolation = numbers.positive(interpolation, "interpolation", example=1.0)
    settings = dict(
        minimizer=minimizer, interpolation=interpolation, host=numbers.flag(host, "host")
    )
    return Hypergradient(
        init=_init, vjp=Bound("black_box", _vjp, **settings), order=1, extends=False
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
    minimizer: Callable[..., Any],
    interpolation: Any,
    host: bool,
) -> tuple[InnerState, Pullback]:
    solution, info, _ = forward_with(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)

    def pullback(w):
        def costs(outer):
            return jax.grad(lower.objective, has_aux=True)(solution.params, outer, ctx)[0]

        given, transposed = jax.vjp(costs, outer)
        change = tree.sub(
            minimize(minimizer, host, tree.axpy(interpolation, w, given)), solution.params
        )
        report = {
            **info,
            "gradients": jnp.int32(1),
            "hvps": jnp.int32(0),
            "mixed_products": jnp.int32(1),
            "changed": tree.norm(change),
        }
        return transposed(tree.scale(1 / interpolation, change))[0], None, state, report

    return solution, pullback
