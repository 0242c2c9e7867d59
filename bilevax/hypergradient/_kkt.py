"""The pullback of a constrained solution: one symmetric system in the solution and its
multipliers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevax import linear as linear_solvers
from bilevax import tree
from bilevax.base import Linear, PyTree
from bilevax.hypergradient import _adjoint
from bilevax.inner.parts import active, bound_like, lagrangian, ties, unvector, vector
from bilevax.results import RESULTS, warning

# distance from where the conditions hold, relative to the solution, above which they do not
OFF = 1e-3
SMALL = 1000  # unknowns up to which the system is factorised where nobody chose a solver


def chosen(linear: Linear | None, unknowns: PyTree) -> Linear:
    """The linear solver asked for, or one for a system of this size."""
    if linear is not None:
        return linear
    return linear_solvers.lu() if tree.size(unknowns) <= SMALL else linear_solvers.minres()


def pull_back(
    constraints: Any,
    lower: Any,
    solution: Any,
    outer: PyTree,
    ctx: Any,
    info: Any,
    multipliers: PyTree,
    linear: Any,
    max_residual: Any,
    w: PyTree,
) -> tuple[PyTree, dict[str, Any]]:
    """The outer cotangent, and the info; `multipliers` are the solver's own, None where it has
    none.
    """
    inner, objective, limited = (
        solution.params,
        lower.objective,
        bound_like(constraints, lower.objective),
    )
    found = active(objective, constraints, inner, outer, ctx, multipliers, OFF)
    (c, h), by_inner = jax.vjp(lambda inner: limited(inner, outer, ctx)[0], inner)
    gradient = jax.grad(objective, has_aux=True)(inner, outer, ctx)[0]
    nothing = tree.zeros_like((inner, c, h))
    solve = chosen(linear, nothing)
    mask, warnings, tied = found.mask, found.warnings, found.tied
    if multipliers is None:
        # The least-squares ones: minimize ‖∇g + C'λ + Hₐ'μ‖, with the identity in place of the
        # Hessian.
        estimated, said = solve(
            _saddle(lambda v: v, limited, inner, outer, ctx, mask, tied),
            (tree.neg(gradient), *nothing[1:]),
            nothing,
        )
        multipliers = estimated[1:]
        signed, wrong = _signs(gradient, multipliers[1], mask, found.lengths)
        warnings |= signed
        mask = jax.tree.map(lambda a, bad: a * (1 - bad), mask, wrong)
        tied = ties(objective, constraints, inner, outer, ctx, mask)
        multipliers = (multipliers[0], jax.tree.map(jnp.multiply, mask, multipliers[1]))
    else:
        said = None
    point = (inner, *multipliers)
    value = lagrangian(objective, constraints)

    def gradients(point):
        return jax.grad(value, (0, 1))(point, outer, mask, ctx, tied)

    (conditions, _), products = jax.linearize(gradients, point)
    q, linear_info = solve(lambda v: products(v)[0], (w, *nothing[1:]), nothing)
    cotangent = tree.neg(products(q)[1])
    if said is not None:
        worse = (
            jnp.maximum(linear_info.residual, said.residual),
            jnp.maximum(linear_info.code, said.code),
        )
        linear_info = linear_info._replace(residual=worse[0], code=worse[1])
    violated = (c, jax.tree.map(lambda a: jnp.maximum(a, 0), h))
    size, norm = tree.norm(violated), tree.norm(inner)
    # The distance to the constraints by one gradient step of ‖(c, max(h, 0))‖², and to stationarity
    # by one along the remainder.
    away = (size**2 > OFF * tree.norm(by_inner(violated)[0]) * norm) & (size > 0)
    remainder = conditions[0]
    left = tree.norm(remainder)
    bend = (
        jnp.abs(tree.dot(remainder, products((remainder, *nothing[1:]))[0][0]))
        / jnp.where(left > 0, left, 1) ** 2
    )
    rounding = jnp.sqrt(jnp.finfo(left.dtype).eps) * jnp.maximum(
        tree.norm(gradient), tree.norm(tree.sub(remainder, gradient))
    )
    moving = (left > OFF * bend * norm) & (left > rounding)
    warnings |= warning(away, RESULTS.off_constraint) | warning(moving, RESULTS.not_stationary)
    told = {**info, "warnings": info["warnings"] | warnings}
    return cotangent, _adjoint.report(
        told, linear_info, max_residual, w, inner_grad_norm=left, constraint_norm=size
    )


def _saddle(
    top: Any, limited: Any, inner: PyTree, outer: PyTree, ctx: Any, mask: Any, tied: Any
) -> Any:
    """The system ``(top, C', Hₐ'; C, 0, 0; Hₐ, 0, −(1 − a))`` as a product, with ``−VV'`` in the
    block of the multipliers.
    """
    _, jacobian = jax.linearize(lambda inner: limited(inner, outer, ctx)[0], inner)
    transposed = jax.linear_transpose(jacobian, inner)

    def product(v):
        inner, equality, inequality = v
        held = jax.tree.map(jnp.multiply, mask, inequality)
        c, h = jacobian(inner)
        free = jax.tree.map(lambda a, h, mu: a * h - (1 - a) * mu, mask, h, inequality)
        if tied is not None:
            open_ = unvector(tied @ (vector((equality, held), tied.dtype) @ tied), (c, free))
            c, free = tree.sub((c, free), open_)
        return tree.add(top(inner), transposed((equality, held))[0]), c, free

    return product


def _signs(gradient: PyTree, inequality: Any, mask: Any, lengths: Any) -> tuple[Any, PyTree]:
    """Warnings of multipliers that are nothing (weakly active) or of the wrong sign (no minimum),
    and the mask of both.
    """
    force = tree.norm(gradient)
    if not jax.tree.leaves(inequality):
        return jnp.int32(0), inequality
    tight = jnp.finfo(force.dtype).eps ** 0.4
    pushes = jnp.where(force > 0, force, 1) * tight
    small = jax.tree.map(
        lambda a, mu, size: (a > 0) & (mu * size <= pushes), mask, inequality, lengths
    )
    against = jax.tree.map(
        lambda a, mu, size: (a > 0) & (mu * size < -pushes), mask, inequality, lengths
    )

    def some(flags):
        return jnp.any(jnp.stack([jnp.any(flag) for flag in jax.tree.leaves(flags)]))

    warnings = warning(some(small), RESULTS.weakly_active) | warning(
        some(against), RESULTS.not_stationary
    )
    return warnings, jax.tree.map(lambda flag, mu: flag.astype(mu.dtype), small, inequality)
