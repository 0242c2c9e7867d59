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
      tied: what `ties` says of the active ones.
    """

    mask: PyTree
    lengths: PyTree
    warnings: Any
    tied: Any


def lagrangian(objective: Objective, constraints: Objective) -> Any:
    r"""A function whose stationary point in ``(y, λ, μ)`` is the solution with its multipliers.

    ``g + λ'c + (a∘μ)'h − ½‖(1 − a)∘μ‖² − ½‖V'(λ, a∘μ)‖²`` with the mask `a` of active inequalities:
    zero derivatives are stationarity, the constraints, ``h = 0`` where active and ``μ = 0``
    elsewhere. `V` (`ties`) holds still what dependent constraints leave open of their multipliers.
    """

    def value(point, outer, mask, ctx: Ctx, tied: Any = None):
        inner, equality, inequality = point
        g = objective(inner, outer, ctx)[0]
        c, h = bound_like(constraints, objective)(inner, outer, ctx)[0]
        bound = jax.tree.map(jnp.multiply, mask, inequality)
        free = jax.tree.map(lambda a, mu: (1 - a) * mu, mask, inequality)
        terms = [tree.dot(equality, c), tree.dot(bound, h), -tree.dot(free, free) / 2]
        if tied is not None:
            open_ = vector((equality, bound), tied.dtype) @ tied
            terms.append(-jnp.sum(open_ * open_) / 2)
        return g + sum(term.astype(g.dtype) for term in terms if jnp.ndim(term) == 0)

    return value


def ties(
    objective: Objective, constraints: Objective, inner: PyTree, outer: PyTree, ctx: Ctx, mask: Any
) -> Any:
    r"""Which multipliers of the active constraints are not unique: V with ``C'V = 0``, a column for
    each direction in which they may change and columns of zeros.

    With ``−VV'`` in the block of the multipliers the system of the conditions of optimality is
    regular and keeps its solution: the change of the point, and of the multipliers the part across
    V. None where there is nothing to ask, or the Jacobian is too large to be written out.
    """
    found = _rows(objective, constraints, inner, outer, ctx)
    if found is None:
        return None
    rows, lengths = found
    return _ties(rows, lengths, vector(mask, rows[0].dtype))


def _ties(rows: Any, lengths: Any, mask: Any) -> Any:
    values, vectors = jnp.linalg.eigh(_gram(rows, lengths, _holding(rows, mask)))
    open_ = jnp.where((values <= _null(values))[None, :], vectors, 0)
    return open_ / jnp.concatenate(lengths)[:, None]


def come_apart(saddle: Any, point: PyTree, moved: PyTree, tied: PyTree) -> Any:
    """Whether dependent constraints come apart where ``moved`` moves, to second order in it and in
    the solution: ``n'(c, h)`` with multipliers n that act on nothing (`ties`), beside that with
    others of their size. ``saddle(point, moved)`` is the Lagrangian.
    """
    y, *_ = point

    def along(multipliers):
        def acting(y, moved):
            move = (tree.zeros_like(y), *multipliers)
            return jax.jvp(lambda p: saddle(p, moved), ((y, *point[1:]),), (move,))[1]

        gradient = jax.grad(acting, (0, 1))
        random = tree.normal_like(jax.random.key(1), (y, moved))
        first, second = jax.jvp(gradient, (y, moved), random)
        return jax.tree.leaves((first[1], second))

    other = tree.scale(tree.norm(tied), tree.normal_like(jax.random.key(2), tied))
    sizes = zip(along(tied), along(other), strict=True)
    apart = [
        tree.norm(a) > jnp.finfo(a.dtype).eps ** 0.4 * tree.norm(b) for a, b in sizes if a.size
    ]
    return jnp.any(jnp.stack(apart)) & (tree.norm(tied) > 0)


def _rows(
    objective: Objective, constraints: Objective, inner: PyTree, outer: PyTree, ctx: Ctx
) -> Any:
    """Gradients of both kinds of constraints, and their lengths."""
    limited, dtype = bound_like(constraints, objective), dense_dtype(inner)
    start = vector(inner, dtype)

    def limits(y):
        c, h = limited(unvector(y, inner), outer, ctx)[0]
        return vector(c, dtype), vector(h, dtype)

    many = sum(a.size for a in jax.eval_shape(limits, start))
    if not 0 < many * start.size <= ENTRIES:
        return None
    rows = jax.jacrev(limits)(start)
    return rows, [_positive(jnp.sqrt(jnp.sum(row**2, axis=1))) for row in rows]


def _holding(rows: Any, mask: Any) -> Any:
    """1 for all equalities and for the inequalities of a mask."""
    dtype = rows[0].dtype
    return jnp.concatenate([jnp.ones(len(rows[0]), dtype), mask.astype(dtype)])


def _directions(rows: Any, lengths: Any) -> Any:
    return jnp.concatenate([r / s[:, None] for r, s in zip(rows, lengths, strict=True)])


def _gram(rows: Any, lengths: Any, active: Any) -> Any:
    """Inner products of the directions of active constraints; ones for the others."""
    directions = active[:, None] * _directions(rows, lengths)
    return directions @ directions.T + jnp.diag(1 - active)


def _spanned(rows: Any, lengths: Any, mask: Any) -> Any:
    """Which inequalities have a gradient that those of the equalities and of the inequalities that
    hold the point are made of: without a multiplier of their own they change nothing.
    """
    holding = _holding(rows, mask)
    values, vectors = jnp.linalg.eigh(_gram(rows, lengths, holding))
    directions = _directions(rows, lengths)
    along = directions[len(rows[0]) :] @ (holding[:, None] * directions).T @ vectors
    null = values <= _null(values)
    shares = along**2 / jnp.where(null, 1, values)[None, :]
    left = 1 - jnp.sum(jnp.where(null[None, :], 0, shares), axis=1)
    return left <= _null(values)


def _null(values: Any) -> Any:
    """Up to which eigenvalues of these products are nothing."""
    return 10 * jnp.finfo(values.dtype).eps * len(values)


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
    start, form = vector(inner, dtype), limited(inner, outer, ctx)[0]
    c, h = (vector(kind, dtype) for kind in form)
    found = _rows(objective, constraints, inner, outer, ctx)
    rows, lengths = found or ((), [jnp.ones_like(c), jnp.ones_like(h)])
    way = -h / lengths[1]
    reach = _positive(jnp.maximum(jnp.sqrt(jnp.sum(start**2)), jnp.max(jnp.abs(way), initial=0.0)))
    tight = jnp.finfo(dtype).eps ** WEAK
    if multipliers is None:
        mask, weak = way <= near * reach, jnp.zeros(way.shape, bool)
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
        weak = jnp.maximum(held / force, way / reach) <= tight
        if rows:
            implied = weak & _spanned(rows, lengths, mask & ~weak)
            mask, weak = mask | implied, weak & ~implied
    warnings = warning(jnp.any(weak), RESULTS.weakly_active)
    tied = _ties(rows, lengths, mask) if rows else None
    if rows:
        warnings |= warning(jnp.any(tied != 0), RESULTS.dependent_constraints)
    mask = unvector(mask.astype(dtype), form[1])
    return Active(mask, unvector(lengths[1], form[1]), warnings, tied)


def _positive(sizes: Any) -> Any:
    return jnp.where(sizes > 0, sizes, 1)
