"""The mixed product ``∇²_xy g · q`` of first-order methods: exact, or by a central difference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.apart import apart
from bilevax.base import Ctx, Objective, PyTree, Scalar
from bilevax.results import RESULTS, warning

RADIUS = 0.01  # of a central difference, unless another is given


def exact(objective: Objective, inner: PyTree, outer: PyTree, ctx: Ctx, q: PyTree) -> PyTree:
    """One forward sweep over ``∇_x g``; nothing is kept."""

    def outer_gradient(inner):
        return jax.grad(objective, 1, has_aux=True)(inner, outer, ctx)[0]

    return apart(lambda inner, q: jax.jvp(outer_gradient, (inner,), (q,))[1], inner, q)


def central_difference(
    objective: Objective, inner: PyTree, outer: PyTree, ctx: Ctx, q: PyTree, radius: Scalar
) -> tuple[PyTree, Scalar]:
    """``[∇_x g(y + εq) − ∇_x g(y − εq)] / 2ε`` with ``ε = radius / ‖q‖``, both in the one context,
    and a mask of warnings.

    For ``q = 0`` both points are `y`, and the product is exactly zero.
    """
    size = tree.norm(q)
    eps = radius / jnp.where(size > 0, size, jnp.ones_like(size))

    def outer_gradient(inner):
        return jax.grad(objective, 1, has_aux=True)(inner, outer, ctx)[0]

    up, down = tree.axpy(eps, q, inner), tree.axpy(-eps, q, inner)
    above, below = apart(outer_gradient, up), apart(outer_gradient, down)
    difference = tree.sub(above, below)
    # In half precision a displacement may round away, and the difference with it; so does a
    # difference of gradients that is hardly more than their rounding.
    error = tree.norm(tree.axpy(-2 * eps, q, tree.sub(up, down)))
    unit, left = numbers.rounding_unit((inner, outer)), tree.norm(difference)
    noise = (size > 0) & (left < 10 * unit * tree.norm(above))
    lost = jnp.isfinite(size) & ((error > 0.2 * radius) | noise)
    return tree.scale(size / (2 * radius), difference), warning(lost, RESULTS.difference_lost)
