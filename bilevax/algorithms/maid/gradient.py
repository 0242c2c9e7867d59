"""The hypergradient at a solved inner point, and on request its certificate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import certificate, tree
from bilevax._core import numbers
from bilevax.algorithms._parts.directions import outer_pass
from bilevax.algorithms._parts.solving import adjoint_to, curvature, solve_to
from bilevax.base import Ctx, InnerSolver, InnerState, Problem, PyTree
from bilevax.certificate import Constants, ErrorBound, Probes, Sizes
from bilevax.results import RESULTS, ladder, warning

ADJOINT = 500  # most products in one adjoint solve
TIGHTEN = 30  # most tightenings of the accuracy for one certificate
ROUGH = 0.1  # relative residual above which an adjoint is rough
FACTOR = 0.5  # of the accuracies, at most, in one of them; at least its fifth power


class Gradient(NamedTuple):
    """The hypergradient z at an inner point, and how rough it is.

    Attributes:
      inner: the inner point.
      z: ``∇_x f − ∇²_xy g q``.
      q: the adjoint.
      value, aux: of the outer objective.
      f_y_norm: ``‖∇_y f‖``.
      inner_norm: ``‖∇_y g‖``.
      residual: the adjoint's, relative.
      error: ``⟨q, ∇_y g⟩``, to first order how far `value` is above that at the solution; 0 where
        the adjoint is too rough to tell.
      evaluations, products: spent.
      code, warnings: as in `StepInfo`.
    """

    inner: InnerState
    z: PyTree
    q: PyTree
    value: Any
    aux: PyTree
    f_y_norm: Any
    inner_norm: Any
    residual: Any
    error: Any
    evaluations: Any
    products: Any
    code: Any
    warnings: Any


class Certificate(NamedTuple):
    """A bound of the hypergradient's error, what it is made of, and the accuracies that it took."""

    bound: ErrorBound
    constants: Constants
    probes: Probes
    epsilon: Any
    delta: Any


def hypergradient(
    problem: Problem,
    inner: InnerState,
    x: PyTree,
    q: PyTree,
    delta: Any,
    contexts: tuple[Ctx, Ctx],
    scale: PyTree | None = None,
) -> Any:
    """`Gradient` with the adjoint solved from `q` to the relative residual `delta`, in the units
    that `scale` makes alike, and the products that a certificate goes on with.
    """
    y, model = inner.params, inner.model
    inner_ctx, outer_ctx = (ctx._replace(model=model) for ctx in contexts)
    f, products = outer_pass(problem, y, x, outer_ctx), curvature(problem, y, x, inner_ctx)
    adjoint = adjoint_to(products.hessian, f.y, q, delta, ADJOINT, scale)
    z = tree.sub(f.x, products.cross(adjoint.q))
    finite = dict(
        inner=tree.all_finite(y),
        value=jnp.isfinite(f.value),
        adjoint=adjoint.code != RESULTS.adjoint_nonfinite,
    )
    code = ladder(**finite, grad=tree.all_finite(z))
    rough = warning(adjoint.code == RESULTS.negative_curvature, RESULTS.negative_curvature)
    rough |= warning(
        adjoint.residual > jnp.maximum(2 * delta, ROUGH), RESULTS.adjoint_not_converged
    )
    zero = jnp.int32(0)
    error = jnp.where(adjoint.residual <= ROUGH, tree.dot(adjoint.q, products.grad), 0.0)
    gradient = Gradient(
        inner,
        z,
        adjoint.q,
        f.value,
        f.aux,
        tree.norm(f.y),
        tree.norm(products.grad),
        adjoint.residual,
        error,
        zero,
        adjoint.products + 1,
        code,
        rough,
    )
    return gradient, products


def certified(
    problem: Problem,
    solver: InnerSolver,
    known: Constants,
    max_error: Any,
    start: tuple[InnerState, PyTree, Probes],
    x: PyTree,
    accuracies: tuple[Any, Any],
    contexts: tuple[Ctx, Ctx],
    anew: Any,
) -> tuple[Gradient, Certificate]:
    """Solve and differentiate ever more accurately, until the bound ω of z's error is at most
    ``max_error ‖z‖`` or rounding forbids more.

    `anew`: the constants are estimated from random probes, not from those of a step before.
    """
    dtype = accuracies[0].dtype
    unit = numbers.rounding_unit(start[0].params)

    def once(inner, q, probes, epsilon, delta, tries):
        solved = solve_to(problem, solver, inner, x, contexts[0], epsilon)
        g, products = hypergradient(problem, solved.inner, x, q, delta, contexts)
        there = (
            contexts[0]._replace(model=solved.inner.model),
            contexts[1]._replace(model=solved.inner.model),
        )
        k, probes, spent = certificate.estimate(
            problem,
            known,
            probes,
            solved.inner.params,
            x,
            g.q,
            products,
            there,
            anew & (tries == 0),
        )
        residual = (g.residual * g.f_y_norm).astype(dtype)
        sizes = Sizes(
            tree.norm(solved.inner.params).astype(dtype), tree.norm(g.z).astype(dtype), unit
        )
        bound = certificate.bound(
            k,
            g.inner_norm.astype(dtype),
            residual,
            adjoint_norm=tree.norm(g.q).astype(dtype),
            sizes=sizes,
        )
        wanted = max_error * tree.norm(g.z).astype(dtype)
        floor = ((epsilon <= 4 * unit) | ~solved.ok) & (delta <= 4 * unit)
        done = (bound.total <= wanted) | floor | (g.code != 0) | (tries + 1 >= TIGHTEN)
        # What the bound asks for, but no more than five tightenings at once: z itself is not to be
        # trusted yet.
        ratio = lambda part: jnp.clip(
            0.25 * wanted / jnp.where(part > 0, part, jnp.ones_like(part)), FACTOR**5, FACTOR
        )
        next_epsilon = jnp.maximum(epsilon * ratio(bound.slope * bound.distance), 4 * unit)
        next_delta = jnp.maximum(delta * ratio(bound.weight * residual), 4 * unit)
        g = g._replace(evaluations=solved.evaluations, products=g.products + spent)
        made = Certificate(
            bound,
            k,
            probes,
            jnp.where(done, epsilon, next_epsilon),
            jnp.where(done, delta, next_delta),
        )
        return g, made, tries + 1, done

    def body(carry):
        g, made, tries, _ = carry
        new, made, tries, done = once(g.inner, g.q, made.probes, made.epsilon, made.delta, tries)
        spent = dict(
            evaluations=g.evaluations + new.evaluations, products=g.products + new.products
        )
        return new._replace(**spent), made, tries, done

    inner, q, probes = start
    shapes = jax.eval_shape(once, inner, q, probes, *accuracies, jnp.int32(0))
    g, made, tries, done = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), shapes
    )  # so that the solve stands in the loop, once
    made = made._replace(probes=probes, epsilon=accuracies[0], delta=accuracies[1])
    g, made, _, _ = lax.while_loop(
        lambda carry: ~carry[3], body, (g._replace(inner=inner, q=q), made, tries, done)
    )
    return g, made


def margin(k: Constants, f_y_norm: Any, error: Any) -> Any:
    """How far the value at an inner point may be from that at the solution, `error` away at
    most.
    """
    return f_y_norm * error + k.outer_smoothness * error**2 / 2
