"""Convex quadratic programs on dense matrices: a primal-dual interior point, then one solve on the
active set that it found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve, lu_factor, lu_solve, solve_triangular

BOUNDARY = 0.99  # share of the way to the boundary that a step may go
# Iterations without a better point after which rounding has the word: from a start that is off the
# constraints the violation may grow for several before it falls.
STALL = 10
REFINE = 3  # rounds of iterative refinement on the active set


class Program(NamedTuple):
    """``min ½y'Qy + p'y`` subject to ``Ay = b`` and ``Gy <= h``; shapes ``(n, n), (n,), (q, n),
    (q,), (m, n), (m,)``.
    """

    Q: Any
    p: Any
    A: Any
    b: Any
    G: Any
    h: Any


class Point(NamedTuple):
    """A solution, the multipliers of its constraints, and the largest relative violation of the
    conditions of optimality.
    """

    y: Any
    equality: Any
    inequality: Any
    residual: Any
    iterations: Any


class _Carry(NamedTuple):
    y: Any
    equality: Any
    inequality: Any
    slack: Any
    best: Point
    stalled: Any
    iterations: Any


def minimize(program: Program, *, maxiter: int, tol: Any) -> Point:
    """Solve a convex program until no condition is violated by more than `tol` of what it is made
    of.

    Rows of the constraints are brought to length one, so that neither their units nor those of the
    objective matter.
    """
    scaled, sizes = _scaled(program)
    point = _interior(scaled, maxiter, tol) if program.h.size else _start(scaled)
    polished = _polished(scaled, point)
    better = polished.residual < point.residual
    point = jax.tree.map(lambda new, old: jnp.where(better, new, old), polished, point)
    return point._replace(
        equality=point.equality / sizes[0], inequality=point.inequality / sizes[1]
    )


def violation(program: Program, y: Any, equality: Any, inequality: Any, slack: Any = None) -> Any:
    """The largest violation of stationarity, of the constraints, of the signs and of
    complementarity, each relative to its own terms.
    """
    Q, p, A, b, G, h = program
    slack = h - G @ y if slack is None else slack
    forces = (Q @ y, p, A.T @ equality, G.T @ inequality)
    force = _largest(*forces)
    reach = _largest(A @ y, b, G @ y, h)
    stationary = _over(_largest(sum(forces)), force)
    feasible = _over(_largest(A @ y - b, jnp.minimum(slack, 0), G @ y + slack - h), reach)
    signs = _over(_largest(jnp.minimum(inequality, 0)), force)
    gap = _over(_largest(inequality * slack), force * reach)
    return jnp.maximum(jnp.maximum(stationary, feasible), jnp.maximum(signs, gap))


def _largest(*arrays: Any) -> Any:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(a), initial=0.0) for a in arrays]))


def _over(size: Any, unit: Any) -> Any:
    """``size / unit``, and `size` where there is nothing to compare with."""
    return size / jnp.where(unit > 0, unit, 1)


def _scaled(program: Program) -> tuple[Program, tuple[Any, Any]]:
    Q, p, A, b, G, h = program

    def lengths(rows):
        size = jnp.sqrt(jnp.sum(rows * rows, axis=1))
        return jnp.where(size > 0, size, 1)

    a, g = lengths(A), lengths(G)
    return Program(Q, p, A / a[:, None], b / a, G / g[:, None], h / g), (a, g)


def _curvature(Q: Any) -> Any:
    """What is added to a diagonal that may be zero."""
    largest = jnp.max(jnp.abs(jnp.diagonal(Q)), initial=0.0)
    return jnp.sqrt(jnp.finfo(Q.dtype).eps) * jnp.where(largest > 0, largest, 1) * 1e-3


def _factor(program: Program, weights: Any) -> Any:
    """Solver of ``(Q + G'WG) dy + A' dλ = r,  A dy = t``."""
    Q, _, A, b, G, _ = program
    unit = _curvature(Q)
    matrix = Q + G.T @ (weights[:, None] * G) + unit * jnp.eye(len(Q), dtype=Q.dtype)
    lower = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    if not b.size:
        return lambda r, t: (cho_solve((lower, True), r), t)
    half = solve_triangular(lower, A.T, lower=True)
    schur = half.T @ half
    tiny = jnp.finfo(Q.dtype).eps * 10 * jnp.max(jnp.diagonal(schur))
    outer = jnp.linalg.cholesky(
        schur + tiny * jnp.eye(len(schur), dtype=Q.dtype), symmetrize_input=False
    )

    def solve(r, t):
        u = solve_triangular(lower, r, lower=True)
        multiplier = cho_solve((outer, True), half.T @ u - t)
        return solve_triangular(lower, u - half @ multiplier, lower=True, trans=1), multiplier

    return solve


def _start(program: Program) -> Point:
    """The solution on the equalities, which is all there is without inequalities."""
    y, equality = _factor(program, jnp.ones_like(program.h))(
        -program.p + program.G.T @ program.h, program.b
    )
    inequality = program.G @ y - program.h
    return Point(y, equality, inequality, violation(program, y, equality, inequality), jnp.int32(0))


def _interior(program: Program, maxiter: int, tol: Any) -> Point:
    Q, p, A, b, G, h = program
    many = len(h)
    first = _start(program)

    def inside(v):  # Mehrotra's start: moved into the cone where it is out of it
        least = jnp.min(v)
        return jnp.where(
            least > 0, v, v - least + jnp.maximum(jnp.max(jnp.abs(v)), jnp.finfo(v.dtype).tiny)
        )

    start = (first.y, first.equality, inside(first.inequality), inside(-first.inequality))
    unknown = Point(*start[:3], jnp.asarray(jnp.inf, Q.dtype), jnp.int32(0))
    floor = jnp.maximum(jnp.asarray(tol, Q.dtype), 4 * jnp.finfo(Q.dtype).eps)

    def going(c: _Carry):
        return (c.best.residual > floor) & (c.stalled < STALL) & (c.iterations < maxiter)

    def body(c: _Carry) -> _Carry:
        y, equality, z, s = c.y, c.equality, c.inequality, c.slack
        solve = _factor(program, z / s)
        stationary, level, inner = Q @ y + p + A.T @ equality + G.T @ z, A @ y - b, G @ y + s - h

        def direction(gap):
            push = (z * inner - gap) / s
            dy, dequality = solve(-stationary - G.T @ push, -level)
            ds = -inner - G @ dy
            return dy, dequality, -(gap + z * ds) / s, ds

        def length(dz, ds):
            steps = jnp.where(
                jnp.stack([dz, ds]) < 0,
                -jnp.stack([z, s]) / jnp.where(jnp.stack([dz, ds]) < 0, jnp.stack([dz, ds]), 1),
                jnp.inf,
            )
            return jnp.min(steps)

        mean = jnp.sum(s * z) / many
        _, _, dz, ds = direction(s * z)
        reach = jnp.minimum(length(dz, ds), 1)
        after = jnp.sum((s + reach * ds) * (z + reach * dz)) / many
        centred = (after / mean) ** 3
        dy, dequality, dz, ds = direction(s * z + ds * dz - centred * mean)
        step = jnp.minimum(BOUNDARY * length(dz, ds), 1)
        y, equality, z, s = y + step * dy, equality + step * dequality, z + step * dz, s + step * ds
        residual = violation(program, y, equality, z, s)
        better = residual < c.best.residual
        best = jax.tree.map(
            lambda new, old: jnp.where(better, new, old),
            Point(y, equality, z, residual, c.iterations + 1),
            c.best,
        )
        stalled = jnp.where(better, 0, c.stalled + jnp.where(jnp.isfinite(residual), 1, STALL))
        return _Carry(y, equality, z, s, best, stalled, c.iterations + 1)

    end = lax.while_loop(going, body, _Carry(*start, unknown, jnp.int32(0), jnp.int32(0)))
    return end.best._replace(iterations=end.iterations)


def _polished(program: Program, point: Point) -> Point:
    """The minimum on the constraints that are active at a point, by one factorisation of its
    conditions.
    """
    Q, p, A, b, G, h = program
    n, q, m = len(p), len(b), len(h)
    slack = h - G @ point.y
    active = (point.inequality > slack).astype(Q.dtype)
    rows = active[:, None] * G
    system = jnp.block(
        [
            [Q, A.T, rows.T],
            [A, jnp.zeros((q, q), Q.dtype), jnp.zeros((q, m), Q.dtype)],
            [rows, jnp.zeros((m, q), Q.dtype), -jnp.diag(1 - active)],
        ]
    )
    right = jnp.concatenate([-p, b, active * h])
    unit = _curvature(Q)
    regular = system + jnp.diag(
        unit * jnp.concatenate([jnp.ones(n, Q.dtype), -jnp.ones(q + m, Q.dtype)])
    )
    factors = lu_factor(regular)
    start = jnp.concatenate([point.y, point.equality, active * point.inequality])

    def refine(_, x):
        return x + lu_solve(factors, right - system @ x)

    solved = lax.fori_loop(0, REFINE, refine, start)
    y, equality, inequality = jnp.split(solved, [n, n + q])
    residual = violation(program, y, equality, inequality)
    return Point(
        y,
        equality,
        inequality,
        jnp.where(jnp.isfinite(residual), residual, jnp.inf),
        point.iterations,
    )
