"""What holds at a point of a constrained lower level: which inequalities are active, which only
just, and whether they depend on each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax.base import Ctx, Objective, PyTree
from bilevax.inner._constraints import dense_dtype, unvector, vector
from bilevax.inner._mapping import bound_like
from bilevax.results import RESULTS, warning

ENTRIES = 4_000_000  # of the constraints' Jacobian, up to which it is written out
# a constraint is weakly active where its slack and its multiplier are both below eps to this power:
# 6e-7, in float32 2e-3
WEAK = 0.4


class Active(NamedTuple):
    """What is known of the constraints at a point.

    Attributes:
      mask: of the inequalities in their own form, 1 where active.
      lengths: of their gradients, likewise.
      warnings: what is to be said of all constraints.
    """

    mask: PyTree
    lengths: PyTree
    warnings: Any


def lagrangian(objective: Objective, constraints: Objective) -> Any:
    r"""A function whose stationary point in ``(y, λ, μ)`` is the solution with its multipliers.

    ``g + λ'c + (a∘μ)'h − ½‖(1 − a)∘μ‖²`` with the mask `a` of active inequalities: zero derivatives
    are stationarity, the constraints, ``h = 0`` where active and ``μ = 0`` elsewhere.
    """

    def value(point, outer, mask, ctx: Ctx):
        inner, equality, inequality = point
        g = objective(inner, outer, ctx)[0]
        c, h = bound_like(constraints, objective)(inner, outer, ctx)[0]
        bound = jax.tree.map(jnp.multiply, mask, inequality)
        free = jax.tree.map(lambda a, mu: (1 - a) * mu, mask, inequality)
        terms = tree.dot(equality, c), tree.dot(bound, h), -tree.dot(free, free) / 2
        return g + sum(term.astype(g.dtype) for term in terms if jnp.ndim(term) == 0)

    return value


def active(
    objective: Objective,
    constraints: Objective,
    inner: PyTree,
    outer: PyTree,
    ctx: Ctx,
    multipliers: PyTree | None,
    near: float = 1e-3,
) -> Active:
    """The active inequalities at a point.

    With multipliers: those whose multiplier is more of what holds the point than their slack is of
    its way. Without: those whose boundary is no further than `near` times the size of the point.
    """
    limited, dtype = bound_like(constraints, objective), dense_dtype(inner)
    start = vector(inner, dtype)

    def limits(y):
        c, h = limited(unvector(y, inner), outer, ctx)[0]
        return vector(c, dtype), vector(h, dtype)

    c, h = limits(start)
    small = (c.size + h.size) * start.size <= ENTRIES
    if small:
        rows = jax.jacrev(limits)(start)
        lengths = [_positive(jnp.sqrt(jnp.sum(row**2, axis=1))) for row in rows]
    else:
        lengths = [jnp.ones_like(c), jnp.ones_like(h)]
    way = -h / lengths[1]
    reach = _positive(jnp.maximum(jnp.sqrt(jnp.sum(start**2)), jnp.max(jnp.abs(way), initial=0.0)))
    form = limited(inner, outer, ctx)[0][1]
    tight = jnp.finfo(dtype).eps ** WEAK
    if multipliers is None:
        mask, weak = way <= near * reach, jnp.zeros((), bool)
        meeting = mask
    else:
        # What holds the point: the gradient, which may be the difference of larger forces, as its
        # change towards the origin tells.
        gradient, bent = jax.jvp(
            jax.grad(lambda y: objective(y, outer, ctx)[0]), (inner,), (inner,)
        )
        pulls = [jnp.sqrt(jnp.sum(vector(force, dtype) ** 2)) for force in (gradient, bent)]
        held = vector(multipliers[1], dtype) * lengths[1]
        force = _positive(jnp.maximum(jnp.maximum(*pulls), jnp.max(jnp.abs(held), initial=0.0)))
        mask = held / force > way / reach
        meeting = mask | (way / reach <= tight)
        weak = jnp.any(jnp.maximum(held / force, way / reach) <= tight)
    warnings = warning(weak, RESULTS.weakly_active)
    if small and c.size + h.size:
        directions = jnp.concatenate(
            [
                rows[0] / lengths[0][:, None],
                meeting[:, None].astype(dtype) * rows[1] / lengths[1][:, None],
            ]
        )
        absent = jnp.concatenate([jnp.zeros_like(c), (~meeting).astype(dtype)])
        least = jnp.linalg.eigvalsh(directions @ directions.T + jnp.diag(absent))[0]
        warnings |= warning(
            least <= 10 * jnp.finfo(dtype).eps * len(absent), RESULTS.dependent_constraints
        )
    return Active(unvector(mask.astype(dtype), form), unvector(lengths[1], form), warnings)


def _positive(sizes: Any) -> Any:
    return jnp.where(sizes > 0, sizes, 1)
