"""Lower levels that are given by their residuals: least squares, and systems of equations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevax import tree
from bilevax._core import numbers
from bilevax.base import Ctx, Objective, PyTree, Scalar
from bilevax.inner._mapping import apply, as_mapping
from bilevax.results import RESULTS

ASIDE = 0.1  # of the inner parameters' norm
# sine of the angle between the objective's gradient and that of the residuals' squares, above which
# they are two problems
APART = 1e-3


def as_residual(residual: Any, solver: str, wanted: bool) -> Objective | None:
    """The residual of a solver that takes one, and None for one that takes none."""
    if wanted and residual is None:
        raise TypeError(
            f"residual: got None with {solver}, which solves for a vector of residuals; expected "
            "residual=(inner_params, outer_params, batch) -> "
            "array or pytree, whose squares the inner objective sums. Try jnp.sum(residual(...) ** "
            "2) as that objective."
        )
    if residual is not None and not wanted:
        raise TypeError(
            f"residual: got {residual!r} with {solver}, which minimises the inner objective "
            "itself; expected None."
        )
    return as_mapping(residual, "residual") if wanted else None


def as_vector(residual: Objective | None, inner: PyTree) -> tuple[PyTree, Any]:
    """Inner parameters as one vector, which every solver of residuals takes, and the way back; as
    they are for a solver that minimises.
    """
    return (inner, lambda inner: inner) if residual is None else ravel_pytree(inner)


def flat(
    residual: Objective, objective: Objective, inner: PyTree, outer: PyTree, ctx: Ctx
) -> jax.Array:
    """All residuals as one vector."""
    return jnp.concatenate(
        [jnp.ravel(leaf) for leaf in jax.tree.leaves(apply(residual, objective, inner, outer, ctx))]
    )


def agreed(
    residual: Objective | None,
    objective: Objective,
    inner: PyTree,
    outer: PyTree,
    ctx: Ctx,
    info: dict[str, Scalar],
) -> dict[str, Scalar]:
    """`info`, its code not_stationary where the objective's gradient is not that of the residuals'
    squares, up to a factor.

    Both are compared beside `inner`, since near a solution both are rounding.
    """
    if residual is None:
        return info

    def squares(inner: PyTree) -> Scalar:
        vector = flat(residual, objective, inner, outer, ctx)
        return jnp.sum(vector * vector)

    aside = tree.normal_like(jax.random.key(0), inner)
    reach = ASIDE * jnp.maximum(tree.norm(inner), 1) / tree.norm(aside)
    there = jax.tree.map(lambda a, old: a.astype(old.dtype), tree.axpy(reach, aside, inner), inner)
    grads, other = (
        jax.grad(lambda inner: objective(inner, outer, ctx)[0])(there),
        jax.grad(squares)(there),
    )
    size, other_size = tree.norm(grads), tree.norm(other)
    told = jnp.isfinite(size) & jnp.isfinite(other_size) & (other_size > 0)
    one, two = (
        tree.scale(1 / jnp.where(told & (s > 0), s, jnp.ones_like(s)), v)
        for s, v in ((size, grads), (other_size, other))
    )
    apart = told & (tree.norm(tree.sub(one, two)) > max(APART, 30 * numbers.rounding_unit(inner)))
    code = jnp.where(
        apart & (info["code"] == RESULTS.success), jnp.int32(RESULTS.not_stationary), info["code"]
    )
    return {**info, "code": code}
