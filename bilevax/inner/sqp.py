"""Sequential quadratic programming: smooth objectives under smooth constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax.base import InnerSolver
from bilevax.inner import _local, _quadratic

HALVINGS = 25  # of a step, before the search gives up
SUFFICIENT = 1e-4  # share of the promised decrease
# values of merit that a new one is compared with: curved constraints need not descend at once
MEMORY = 4
STALL = 8  # steps without a better point


def sqp(
    equality: Callable[..., Any] | None = None,
    inequality: Callable[..., Any] | None = None,
    *,
    maxiter: int = 50,
    tol: float = 1e-8,
) -> InnerSolver:
    r"""Solve a smooth constrained problem by a sequence of quadratic programs with a line search.

    .. math::
        \min_y g(y, x) \quad \text{subject to} \quad c(y, x) = 0, \quad h(y, x) \le 0

    Each step minimizes the second-order model of the Lagrangian on the linearised constraints
    (`inner.qp`'s method), and is halved until the merit ``g + ν(‖c‖₁ + ‖max(h, 0)‖₁)`` descends.
    The Hessian is dense, and made positive definite where it is not; of several local solutions it
    finds the one that its start leads to.

    Args:
      equality: ``c(inner_params, outer_params, batch)``, a pytree of arrays that the solution makes
        zero; or `objective` of such a function. With
        `argmin`: ``c(inner_params, *args)``.
      inequality: ``h``, likewise, that it makes at most zero.
      maxiter: most steps.
      tol: relative violation of the conditions of optimality at which it stops.

    Returns:
      An `InnerSolver` of one step, not reversible, with `constraints`. Differentiate it by
      ``hypergradient.kkt()`` (or ``implicit``, which then does the same), or call it through
      `argmin`. Its info has ``value`` (at the start), ``grad_norm`` (the relative violation at the
      end), ``iterations``, ``multipliers`` and ``code``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> inner, circle = (
      ...     lambda y, r: jnp.sum((y - jnp.array([3.0, 4.0])) ** 2),
      ...     lambda y, r: y @ y - r**2,
      ... )
      >>> fn = bx.argmin(inner, bx.inner.sqp(inequality=circle))
      >>> [
      ...     round(float(a), 2)
      ...     for a in (fn(jnp.ones(2), 2.0)[0], jax.grad(lambda r: fn(jnp.ones(2), r)[0])(2.0))
      ... ]
      [1.2, 0.6]

    Source: Nocedal and Wright, Numerical Optimization (2006), algorithm 18.3; Grippo, Lampariello
    and Lucidi, "A nonmonotone line search technique for Newton's method" (SIAM J. Numerical
    Analysis 1986).
    """
    return _local.solver("sqp", _solve, equality, inequality, maxiter, tol)


class _Carry(NamedTuple):
    y: Any
    equality: Any
    inequality: Any
    weight: Any  # ν
    merits: Any  # the last few, at the weight that each was taken with
    best: tuple[Any, ...]  # y, multipliers, residual
    stalled: Any
    iterations: Any


def _convex(program: _quadratic.Program) -> tuple[_quadratic.Program, Any]:
    """The same program on its equalities, with a Hessian that is positive definite: where it was so
    there, unchanged. And what its multipliers lack.

    On ``Ad = b`` a multiple of ``A'A`` changes the multipliers of the equalities alone.
    """
    size = 10 * jnp.maximum(jnp.max(jnp.abs(program.Q)), jnp.finfo(program.Q.dtype).tiny)
    lengths = jnp.sum(program.A**2, axis=1)
    weights = size / jnp.where(lengths > 0, lengths, 1)
    values, vectors = jnp.linalg.eigh(
        program.Q + program.A.T @ (weights[:, None] * program.A), symmetrize_input=True
    )
    floor = 1e-4 * jnp.sqrt(jnp.finfo(program.Q.dtype).eps) * size
    lifted = jnp.where(values < floor, jnp.maximum(jnp.abs(values), floor), values)
    return program._replace(Q=(vectors * lifted[None, :]) @ vectors.T), weights * program.b


def _violated(limits: Any) -> Any:
    return jnp.sum(jnp.abs(limits[0])) + jnp.sum(jnp.maximum(limits[1], 0))


def _solve(*args: Any, **settings: Any) -> Any:
    return _local.solve(_minimize, *args, **settings)


def _minimize(given: _local.Level, maxiter: int, tol: Any) -> _local.Solved:
    start, dtype = given.start, given.start.dtype
    floor = jnp.maximum(jnp.asarray(tol, dtype), 10 * jnp.finfo(dtype).eps)
    bare = [jnp.zeros_like(limit) for limit in given.limits(start)]

    def going(c: _Carry):
        return (c.best[3] > floor) & (c.stalled < STALL) & (c.iterations < maxiter)

    def body(c: _Carry) -> _Carry:
        here, limits = given.value(c.y), given.limits(c.y)
        program = _local.around(given, c.y, c.equality, c.inequality)
        convex, lacking = _convex(program)
        step = _quadratic.minimize(convex, maxiter=50, tol=floor)
        equality, inequality = step.equality + lacking, step.inequality
        largest = jnp.maximum(
            jnp.max(jnp.abs(equality), initial=0.0), jnp.max(inequality, initial=0.0)
        )
        weight = jnp.maximum(c.weight, 1.5 * largest)
        promised = jnp.sum(program.p * step.y) - weight * _violated(limits)
        merit = here + weight * _violated(limits)
        merits = jnp.roll(c.merits, 1).at[0].set(merit)
        reference = jnp.max(jnp.where(jnp.isfinite(merits), merits, -jnp.inf))
        slack = 10 * jnp.finfo(dtype).eps * (jnp.abs(here) + weight)

        def searching(carry):
            length, tried = carry
            y = c.y + length * step.y
            reached = given.value(y) + weight * _violated(given.limits(y))
            return ~(reached <= reference + SUFFICIENT * length * promised + slack) & (
                tried < HALVINGS
            )

        length, _ = lax.while_loop(
            searching, lambda t: (t[0] / 2, t[1] + 1), (jnp.ones((), dtype), jnp.int32(0))
        )
        y = c.y + length * step.y
        residual = _local.left(given, y, equality, inequality, program.Q)
        better = residual < c.best[3]
        best = jax.tree.map(
            lambda new, old: jnp.where(better, new, old),
            (y, equality, inequality, residual),
            c.best,
        )
        stalled = jnp.where(better, 0, c.stalled + jnp.where(jnp.isfinite(residual), 1, STALL))
        return _Carry(y, equality, inequality, weight, merits, best, stalled, c.iterations + 1)

    none, nothing = bare
    first = (start, none, nothing, jnp.asarray(jnp.inf, dtype))
    merits = jnp.full((MEMORY,), -jnp.inf, dtype)
    end = lax.while_loop(
        going,
        body,
        _Carry(
            start, none, nothing, jnp.zeros((), dtype), merits, first, jnp.int32(0), jnp.int32(0)
        ),
    )
    y, equality, inequality, residual = end.best
    return _local.Solved(y, equality, inequality, residual, end.iterations)
