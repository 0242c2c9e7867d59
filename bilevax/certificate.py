"""An error bound of an inexact hypergradient, from constants that are known or estimated on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax.base import Ctx, Problem, PyTree
from bilevax.linear._common import rows_dot, rows_sum

if TYPE_CHECKING:
    from bilevax.algorithms._parts.solving import Curvature

RITZ = 6  # products with the Hessian in one refinement of its smallest eigenpair
FIRST = 8  # refinements at the first step


class Constants(NamedTuple):
    """Constants of a problem; None is estimated. All norms are Euclidean, over all leaves together.

    Attributes:
      strong_convexity: smallest eigenvalue of ``∇²_yy g``.
      cross: largest singular value of ``∇²_xy g``.
      outer_smoothness: Lipschitz constant of ``∇_y f`` in y.
      outer_cross: Lipschitz constant of ``∇_x f`` in y; 0 where the outer objective is a sum of a function of y and one of x.
      hessian_lipschitz: Lipschitz constant of ``∇²_yy g`` in y.
      cross_lipschitz: Lipschitz constant of ``∇²_xy g`` in y.
    """

    strong_convexity: Any = None
    cross: Any = None
    outer_smoothness: Any = None
    outer_cross: Any = None
    hessian_lipschitz: Any = None
    cross_lipschitz: Any = None


class Probes(NamedTuple):
    """What estimates are refined from, step by step: the last strong convexity, extreme vectors, and the largest Lipschitz constants met."""

    modulus: Any
    lowest: PyTree
    cross: PyTree
    outer: PyTree
    hessian_lipschitz: Any
    cross_lipschitz: Any


def probes(inner: PyTree) -> Probes:
    """First probes, from a fixed key: the run stays deterministic."""
    keys = jax.random.split(jax.random.key(0), 3)
    zero = jnp.zeros((), tree.norm(inner).dtype)
    lowest, cross, outer = (_unit(tree.normal_like(key, inner)) for key in keys)
    return Probes(jnp.ones_like(zero), lowest, cross, outer, zero, jnp.zeros_like(zero))


def _unit(v: PyTree) -> PyTree:
    size = tree.norm(v)
    return tree.scale(1 / jnp.where(size == 0, jnp.ones_like(size), size), v)


def smallest_eigenpair(matvec: Any, start: PyTree, products: int = RITZ) -> tuple[Any, PyTree]:
    """Ritz value and vector of the Krylov space of `start`: a lower estimate of the smallest eigenvalue, and where to go on from.

    The Ritz value θ is above the smallest eigenvalue; what is returned is ``max(θ − ‖Hw − θw‖, θ/2)``, since an eigenvalue lies that near.

    Args:
      matvec: symmetric.
      start: a vector, not zero.
      products: dimension of the space.
    """
    dtype = tree.norm(start).dtype
    basis = jax.tree.map(lambda a: jnp.zeros((products, *a.shape), a.dtype), start)
    tiny = numbers.rounding_unit(dtype)

    def body(i, carry):
        basis, images, gram, v = carry
        hv = matvec(v)
        basis = jax.tree.map(lambda rows, a: rows.at[i].set(a), basis, v)
        images = jax.tree.map(lambda rows, a: rows.at[i].set(a), images, hv)
        column = rows_dot(basis, hv).astype(dtype)
        gram = gram.at[:, i].set(column)
        rest = tree.sub(hv, rows_sum(column, basis))
        rest = tree.sub(rest, rows_sum(rows_dot(basis, rest), basis))  # twice is enough (Kahan)
        size = tree.norm(rest)
        alive = size > 100 * tiny * tree.norm(hv)
        return basis, images, gram, tree.scale(jnp.where(alive, 1 / jnp.where(alive, size, jnp.ones_like(size)), jnp.zeros_like(size)), rest)

    start = _unit(start)
    basis, images, gram, _ = lax.fori_loop(0, products, body, (basis, basis, jnp.zeros((products, products), dtype), start))
    gram = jnp.triu(gram) + jnp.triu(gram, 1).T
    # Directions beyond an invariant space are zero rows: kept out of the minimum.
    used = jax.vmap(tree.norm)(basis).astype(dtype) > 0.5
    largest = jnp.max(jnp.abs(jnp.diagonal(gram))) + 1
    gram = jnp.where(used[:, None] & used[None, :], gram, jnp.zeros_like(gram)) + jnp.diag(jnp.where(used, jnp.zeros_like(largest), 1e3 * largest))
    values, vectors = jnp.linalg.eigh(jnp.where(jnp.isfinite(gram), gram, jnp.zeros_like(gram)))
    theta, vector = values[0], rows_sum(vectors[:, 0], basis)
    residual = tree.norm(tree.axpy(-theta, vector, rows_sum(vectors[:, 0], images)))
    return jnp.maximum(theta - residual, theta / 2), vector


def estimate(
    problem: Problem, known: Constants, p: Probes, y: PyTree, x: PyTree, q: PyTree, products: Curvature, contexts: tuple[Ctx, Ctx], first: Any
) -> tuple[Constants, Probes, Any]:
    """All constants at a point, refined probes, and the products spent.

    `first`: refine from random probes, not from those of a step before.
    """
    inner_ctx, outer_ctx = contexts
    dtype, spent = p.hessian_lipschitz.dtype, jnp.int32(0)
    rounds = jnp.where(first, FIRST, 1)
    out: dict[str, Any] = {name: None if value is None else jnp.asarray(value).astype(dtype) for name, value in known._asdict().items()}

    if known.strong_convexity is None:

        def refine(_, carry):
            return smallest_eigenpair(products.hessian, carry[1])

        value, lowest = lax.fori_loop(0, rounds, refine, (jnp.zeros((), dtype), p.lowest))
        out["strong_convexity"] = value
        p, spent = p._replace(lowest=lowest), spent + RITZ * rounds
    if known.cross is None:

        def power(_, carry):
            image = products.cross(carry[1])
            return tree.norm(image).astype(dtype), _unit(products.cross_transposed(image))

        value, probe = lax.fori_loop(0, 2 * rounds, power, (jnp.zeros((), dtype), p.cross))
        out["cross"] = value
        p, spent = p._replace(cross=tree.where(value > 0, probe, p.cross)), spent + 4 * rounds
    if known.outer_smoothness is None or known.outer_cross is None:
        gradients = lambda y: jax.grad(problem.outer, (0, 1), has_aux=True)(y, x, outer_ctx)[0]
        _, outer_products = jax.linearize(gradients, y)

        def power(_, carry):
            image, cross = outer_products(carry[2])
            return tree.norm(image).astype(dtype), tree.norm(cross).astype(dtype), _unit(image)

        zero = jnp.zeros((), dtype)
        smooth, cross, probe = lax.fori_loop(0, 2 * rounds, power, (zero, zero, p.outer))
        out["outer_smoothness"] = smooth if known.outer_smoothness is None else out["outer_smoothness"]
        out["outer_cross"] = cross if known.outer_cross is None else out["outer_cross"]
        p, spent = p._replace(outer=tree.where(smooth > 0, probe, p.outer)), spent + 2 * rounds
    if known.hessian_lipschitz is None or known.cross_lipschitz is None:
        # The change of both products with q along the direction that the solution is in, as far as the gradient tells.
        def at(y):
            gradients = lambda y: jax.grad(problem.inner, (0, 1), has_aux=True)(y, x, inner_ctx)[0]
            return jax.jvp(gradients, (y,), (_unit(q),))[1]

        _, (hessian, cross) = jax.jvp(at, (y,), (_unit(products.grad),))
        hessian, cross = (jnp.nan_to_num(tree.norm(a).astype(dtype)) for a in (hessian, cross))
        p = p._replace(hessian_lipschitz=jnp.maximum(p.hessian_lipschitz, hessian), cross_lipschitz=jnp.maximum(p.cross_lipschitz, cross))
        out["hessian_lipschitz"] = p.hessian_lipschitz if known.hessian_lipschitz is None else out["hessian_lipschitz"]
        out["cross_lipschitz"] = p.cross_lipschitz if known.cross_lipschitz is None else out["cross_lipschitz"]
        spent = spent + 2
    # A lower level that is not strongly convex has no bound; a tiny modulus makes it large, and divisions safe.
    floor = numbers.rounding_unit(dtype) ** 0.5 * (out["cross"] + float(jnp.finfo(dtype).tiny) ** 0.5)
    out["strong_convexity"] = jnp.maximum(out["strong_convexity"], floor)
    return Constants(**out), p._replace(modulus=out["strong_convexity"]), spent


class Bound(NamedTuple):
    """``‖z − ∇h‖ ≤ total``, and how it depends on the accuracies: ``total = slope ε + weight δ + bend ε²``."""

    total: Any
    slope: Any
    weight: Any
    inner_error: Any


def error_bound(k: Constants, grad_norm: Any, residual: Any, q_norm: Any) -> Bound:
    """The bound at an inner gradient norm and an adjoint residual.

    With ``ε = ‖∇_y g‖/μ ≥ ‖y − y*‖`` and ``s = ‖q‖ + δ/μ ≥ ‖H⁻¹∇_y f‖``:
    ``‖z − ∇h‖ ≤ ‖B‖/μ δ + (L_fx + L_B s + ‖B‖(L_f + L_H s)/μ) ε + L_B (L_f + L_H s)/μ ε²``.

    Source: Ehrhardt and Roberts, "Analyzing inexact hypergradients for bilevel learning" (IMA J. Appl. Math. 2024), theorem 2.1, with
    ``‖H⁻¹∇_y f‖`` bounded through q.
    """
    mu = k.strong_convexity
    error = grad_norm / mu
    s = q_norm + residual / mu
    turn = (k.outer_smoothness + k.hessian_lipschitz * s) / mu
    slope = k.outer_cross + k.cross_lipschitz * s + k.cross * turn
    weight = k.cross / mu
    return Bound(weight * residual + slope * error + k.cross_lipschitz * turn * error**2, slope, weight, error)
