"""Reference hypergradients: the lower level polished as far as the precision goes, in double
precision where the objectives allow it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevax import inner as inner_solvers
from bilevax import linear, tree
from bilevax._core import numbers
from bilevax._core.types import Key
from bilevax.base import Ctx, Feed, InnerSolver, InnerState, Lower, Problem, PyTree
from bilevax.data import same

KINDS = ("dense", "finite_difference", "solver")
SMALL = 512  # inner unknowns up to which the dense reference is taken without being asked for
LARGEST = 4096  # and up to which it can be asked for
ALL = 32  # outer unknowns up to which finite differences are taken in every direction
NEWTON = 60


class Reference(NamedTuple):
    """A reference at given outer parameters, and what explains a difference from it. Norms are of
    flat vectors.

    Attributes:
      kind: one of `KINDS`.
      precision: name of the dtype it was computed in.
      value: the outer objective at the polished solution.
      grad: the hypergradient, flat; for finite differences in some directions its projection on
        their span.
      directions: orthonormal rows, or None where `grad` is the whole hypergradient.
      at_point: exact implicit hypergradient at the given inner point instead of the polished one,
        flat.
      scale: size of the terms that make up the hypergradient, before they cancel.
      inner_distance: ``‖y − y*‖ / max(‖y*‖, 1e-3 ‖y‖)``.
      inner_grad_norm: ``‖∇_y g‖`` at the given point.
      polished_grad_norm: the same at the polished one.
      curvature: smallest eigenvalue of the inner Hessian over the largest absolute one; NaN where
        it was not computed.
      newton: length of the Newton step that is left at the polished point, relative to it: far from
        zero where that is no stationary point.
      kink: ``|h'_+ − h'_−|`` over the size of the slopes, along the hypergradient: far from zero
        where h is not differentiable.
    """

    kind: str
    precision: str
    value: Any
    grad: Any
    directions: Any
    at_point: Any
    scale: Any
    inner_distance: Any
    inner_grad_norm: Any
    polished_grad_norm: Any
    curvature: Any
    newton: Any
    kink: Any


class Point(NamedTuple):
    """What both levels are evaluated with: contexts are frozen, so that every evaluation sees the
    same randomness.
    """

    start: PyTree
    solution: PyTree
    outer: PyTree
    inner_ctx: Ctx
    outer_ctx: Ctx
    model: PyTree = None  # the state that the solve begins with; the contexts have that of its end


def widen(values: PyTree) -> PyTree:
    """Floating-point leaves in float64, inside an x64 context."""

    def leaf(a):
        return (
            a.astype(jnp.float64)
            if isinstance(a, (jax.Array, np.ndarray)) and jnp.issubdtype(a.dtype, jnp.floating)
            else a
        )

    return jax.tree.map(leaf, values)


def frozen(feed: Feed, i: Any) -> Ctx:
    """Draw: the same batch and the same key every time, since a derivative needs a function."""
    return Ctx(feed.data, feed.key)


def reference(
    problem: Problem, solver: InnerSolver, point: Point, kind: str, directions: int | None, key: Key
) -> Reference:
    """The reference of a kind, in double precision if the objectives can be evaluated there, else
    in their own.
    """

    def compute(point):
        return _compute(problem, solver, point, kind, directions, key)

    seen = _drawn(problem, point)
    with jax.enable_x64(True):
        wide = widen(jax.tree.map(jnp.asarray, point))
        # An objective may fix its own dtypes: then it either refuses these, or computes in its own
        # precision regardless.
        dtypes = None
        with contextlib.suppress(TypeError, ValueError):
            inner = jax.eval_shape(
                lambda p: problem.inner(p.solution, p.outer, p.inner_ctx)[0], wide
            )
            outer = jax.eval_shape(
                lambda p: problem.outer(p.solution, p.outer, p.outer_ctx)[0], wide
            )
            dtypes = [inner.dtype, outer.dtype]
        if dtypes == [jnp.float64] * 2 and _alike(seen, _drawn(problem, wide)):
            return compute(wide)
    return compute(point)


def _drawn(problem: Problem, point: Point) -> list[np.ndarray]:
    """What comes of the keys at this point, if there are any."""
    if point.inner_ctx.key is None:
        return []

    def look(p):
        values = [problem.inner(p.solution, p.outer, p.inner_ctx)[0]]
        values.append(problem.outer(p.solution, p.outer, p.outer_ctx)[0])
        if problem.inner_init is not None:
            values.append(problem.inner_init(p.outer, p.inner_ctx.key)[0])
        return values

    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(look)(point))]


def _alike(narrow: list[np.ndarray], wide: list[np.ndarray]) -> bool:
    """Whether the draws are the same: of one key JAX makes other numbers in double precision, where
    an objective does not say in which it draws.
    """
    pairs = zip(narrow, wide, strict=True)
    return all(
        np.allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max(initial=0.0), equal_nan=True)
        for a, b in pairs
    )


def _compute(
    problem: Problem, solver: InnerSolver, point: Point, kind: str, directions: int | None, key: Any
) -> Reference:
    x, unravel_x = ravel_pytree(point.outer)
    y_given, unravel_y = ravel_pytree(point.solution)
    dtype = jnp.promote_types(x.dtype, y_given.dtype)
    small = y_given.size <= SMALL or kind == "dense"
    y_start = ravel_pytree(point.start)[0]

    def g(y, x, point):
        return problem.inner(unravel_y(y), unravel_x(x), point.inner_ctx)[0]

    def f(y, x, point, model=None):
        ctx = point.outer_ctx if model is None else point.outer_ctx._replace(model=model)
        return problem.outer(unravel_y(y), unravel_x(x), ctx)[0]

    def moving(x, point):
        """The solver's own steps, statistics included: the outer value that they lead to, and the
        point.
        """
        outer = unravel_x(x)
        state = InnerState(unravel_y(y_start), (), point.model)
        if problem.inner_init is not None:
            begun, model = problem.inner_init(outer, point.inner_ctx.key)
            state = state._replace(params=begun, model=point.model if model is None else model)
        state = state._replace(opt=tree.strong(solver.first(state.params, outer)))
        lower = Lower(problem.inner, solver, problem.inner_draw, problem.outer.trajectory)
        end, info = lower.run(state, outer, Feed(point.inner_ctx.batch, point.inner_ctx.key, 0))
        seen = info["steps"] if problem.outer.trajectory else end.params
        value = problem.outer(seen, outer, point.outer_ctx._replace(model=end.model))[0]
        return value, ravel_pytree(end.params)[0]

    def best_response(x, y, point):
        if kind == "solver":
            return moving(x, point)[1]
        if small:
            return newton(lambda y: g(y, x, point), y)
        polish = inner_solvers.lbfgs(maxiter=5000, tol=1e-14, memory=20)
        lower = Lower(problem.inner, polish, same)
        start = unravel_y(y)
        state = InnerState(start, polish.init(start), point.inner_ctx.model)
        end, _ = lower.run(state, unravel_x(x), Feed(point.inner_ctx.batch, point.inner_ctx.key, 0))
        return ravel_pytree(end.params)[0]

    def implicit(y, x, point):
        """Hypergradient by an exact adjoint at any inner point, ``(f_x, C q)``, and the
        curvature.
        """
        f_y, f_x = jax.grad(f, (0, 1))(y, x, point)

        def gradients(y):
            return jax.grad(g, (0, 1))(y, x, point)

        _, products = jax.linearize(gradients, y)
        if small:
            hessian = jax.vmap(lambda v: products(v)[0])(jnp.eye(y.size, dtype=y.dtype))
            values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
            largest = jnp.max(jnp.abs(values))
            tiny = 10 * y.size * numbers.rounding_unit(values.dtype) * largest
            safe = jnp.abs(values) > tiny  # no response along a flat direction: the pseudo-inverse
            q = vectors @ (jnp.where(safe, 1 / jnp.where(safe, values, 1), 0) * (vectors.T @ f_y))
            curvature = values[0] / jnp.where(largest > 0, largest, 1)
            left = jnp.where(safe, 1 / jnp.where(safe, values, 1), 0) * (
                vectors.T @ gradients(y)[0]
            )
        else:
            q, _ = linear.minres(maxiter=2000, tol=1e-12)(
                lambda v: products(v)[0], f_y, jnp.zeros_like(f_y)
            )
            curvature = jnp.full((), jnp.nan, y.dtype)
            left, _ = linear.minres(maxiter=2000, tol=1e-6)(
                lambda v: products(v)[0], gradients(y)[0], jnp.zeros_like(f_y)
            )
        return f_x, products(q)[1], curvature, jnp.linalg.norm(left)

    count = (
        None if directions is None and x.size <= ALL else (16 if directions is None else directions)
    )
    if count is not None and count >= x.size:
        count = None

    def run(point, key):
        x, y_given = ravel_pytree(point.outer)[0], ravel_pytree(point.solution)[0]
        y = best_response(x, y_given, point)
        f_x, pulled, curvature, left = implicit(y, x, point)
        remaining = left / jnp.maximum(
            jnp.linalg.norm(y), 1e-3 * jnp.linalg.norm(y_start) + jnp.finfo(y.dtype).tiny
        )
        unit = numbers.rounding_unit(dtype)
        step = unit ** (1 / 3) * jnp.maximum(1.0, jnp.linalg.norm(x))

        def h(x):
            if kind == "solver":
                return moving(x, point)[0].astype(dtype)
            response = best_response(x, y, point)
            return f(response, x, point).astype(dtype)

        value = moving(x, point)[0] if kind == "solver" else f(y, x, point)
        grad, rows = f_x - pulled, None
        if kind != "dense":
            rows = (
                jnp.eye(x.size, dtype=x.dtype)
                if count is None
                else jnp.linalg.qr(jax.random.normal(key, (x.size, count), x.dtype))[0].T
            )
            slopes = lax.map(
                lambda d: (
                    (h(x + step.astype(x.dtype) * d) - h(x - step.astype(x.dtype) * d)) / (2 * step)
                ),
                rows,
            )
            grad = rows.T @ slopes.astype(x.dtype)
        norm = jnp.linalg.norm(grad)
        along = (grad / jnp.where(norm > 0, norm, 1)).astype(x.dtype)
        ahead, behind = lax.map(
            lambda s: h(x + (s * step).astype(x.dtype) * along), jnp.asarray([1.0, -1.0], dtype)
        )
        middle = h(x)
        forward, backward = (ahead - middle) / step, (middle - behind) / step
        # The slopes of a smooth h differ by step × h'', and the central one from the
        # hypergradient's norm by less.
        noise = 100 * unit * jnp.abs(middle) / step
        size = jnp.abs(forward) + jnp.abs(backward) + norm + jnp.sqrt(step) + noise
        kink = (
            jnp.maximum(jnp.abs(forward - backward), jnp.abs((forward + backward) / 2 - norm))
            / size
        )
        at_x, at_pulled, _, _ = implicit(y_given, x, point)
        distance = jnp.linalg.norm(y_given - y) / jnp.maximum(
            jnp.linalg.norm(y), 1e-3 * jnp.linalg.norm(y_given) + jnp.finfo(y.dtype).tiny
        )
        gradients = [jnp.linalg.norm(jax.grad(g)(point_y, x, point)) for point_y in (y_given, y)]
        scale = jnp.linalg.norm(f_x) + jnp.linalg.norm(grad - f_x)
        return (
            value,
            grad,
            rows,
            at_x - at_pulled,
            scale,
            distance,
            *gradients,
            curvature,
            remaining,
            kink,
        )

    (
        value,
        grad,
        rows,
        at_point,
        scale,
        distance,
        at_norm,
        polished_norm,
        curvature,
        remaining,
        kink,
    ) = jax.device_get(jax.jit(run)(point, key))
    whole = kind == "dense" or count is None
    return Reference(
        kind, str(np.dtype(dtype)), float(value), grad, None if whole else rows, at_point,
        float(scale), float(distance), float(at_norm),
        float(polished_norm), float(curvature), float(remaining), float(kink),
    )  # fmt: skip


def newton(g: Callable[..., Any], y: jax.Array) -> jax.Array:
    """Minimize a small smooth function down to rounding: Newton steps with the absolute Hessian,
    halved until they descend.
    """
    gradient = jax.grad(g)
    unit = numbers.rounding_unit(y.dtype)

    def body(carry):
        y, norm, best, best_norm, stalls, count = carry
        grad = gradient(y)
        values, vectors = jnp.linalg.eigh(jax.jacfwd(gradient)(y))
        size = jnp.maximum(
            jnp.abs(values), 10 * y.size * unit * jnp.max(jnp.abs(values)) + jnp.finfo(y.dtype).tiny
        )
        step = -(vectors @ ((vectors.T @ grad) / size))
        value, slope = g(y), jnp.sum(grad * step)

        def shorten(state):
            t, tried = state
            return t / 2, tried + 1

        def rejected(state):
            t, tried = state
            new = g(y + t * step)
            noise = 10 * unit * jnp.abs(value)
            return ~(new <= value + 1e-4 * t * slope + noise) & (tried < 40)

        t, _ = lax.while_loop(rejected, shorten, (jnp.ones((), y.dtype), 0))
        y = y + t * step
        norm = jnp.linalg.norm(gradient(y))
        better = norm < 0.9 * best_norm
        stalls = jnp.where(better, 0, stalls + 1)
        keep = norm < best_norm
        return (
            y,
            norm,
            jnp.where(keep, y, best),
            jnp.where(keep, norm, best_norm),
            stalls,
            count + 1,
        )

    norm = jnp.linalg.norm(gradient(y))
    start = (y, norm, y, norm, 0, 0)
    end = lax.while_loop(lambda c: (c[4] < 5) & (c[5] < NEWTON) & (c[1] > 0), body, start)
    return end[2]
