"""Quadratic programs: a quadratic objective under affine constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bilevax.base import InnerSolver
from bilevax.inner import _local, _quadratic


def qp(
    equality: Callable[..., Any] | None = None,
    inequality: Callable[..., Any] | None = None,
    *,
    maxiter: int = 50,
    tol: float = 1e-8,
) -> InnerSolver:
    r"""Solve a convex quadratic program to rounding, whatever it starts from.

    .. math::
        \min_y g(y, x) \quad \text{subject to} \quad c(y, x) = 0, \quad h(y, x) \le 0

    with g quadratic and convex in y, c and h affine in y; all may depend on x in any way. A
    primal-dual interior point with Mehrotra's corrector, then one solve on the active set that it
    found, so active constraints hold to rounding and inactive ones have multipliers of exactly
    zero. One ``while_loop``, vectorised under ``vmap``; the Hessian is a dense matrix. An objective
    or a constraint of another kind is noticed, by the code ``inner_not_converged``, and so is a
    program without a solution.

    Args:
      equality: ``c(inner_params, outer_params, batch)``, a pytree of arrays that the solution makes
        zero; or `objective` of such a function. With
        `argmin`: ``c(inner_params, *args)``.
      inequality: ``h``, likewise, that it makes at most zero.
      maxiter: most iterations; a dozen is common.
      tol: relative violation of the conditions of optimality at which it stops, and below which a
        point counts as solved (or what rounding allows).

    Returns:
      An `InnerSolver` of one step, not reversible, with `constraints`. Differentiate it by
      ``hypergradient.kkt()`` (or ``implicit``, which then does the same), or call it through
      `argmin`. Its info has ``value`` (at the start), ``grad_norm`` (the relative violation at the
      end), ``iterations``, ``multipliers`` and ``code``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> near = lambda y, x: jnp.sum((y - x) ** 2)
      >>> simplex = bx.argmin(near, bx.inner.qp(lambda y, x: jnp.sum(y) - 1.0, lambda y, x: -y))
      >>> [round(float(a), 2) + 0.0 for a in simplex(jnp.zeros(3), jnp.array([0.9, 0.5, -1.0]))]
      [0.7, 0.3, 0.0]
      >>> [
      ...     round(float(a), 2) + 0.0
      ...     for a in jax.grad(lambda x: simplex(jnp.zeros(3), x)[0])(jnp.array([0.9, 0.5, -1.0]))
      ... ]
      [0.5, -0.5, 0.0]

    Source: Mehrotra, "On the implementation of a primal-dual interior point method" (SIAM J.
    Optimization 1992); Nocedal and Wright, Numerical Optimization (2006), section 16.6.
    """
    return _local.solver("qp", _solve, equality, inequality, maxiter, tol)


def _solve(*args: Any, **settings: Any) -> Any:
    return _local.solve(_minimize, *args, **settings)


def _minimize(given: _local.Level, maxiter: int, tol: Any) -> _local.Solved:
    zero = jnp.zeros_like(given.start)
    bare = [jnp.zeros_like(limit) for limit in given.limits(given.start)]
    program = _local.around(given, zero, *bare)
    point = _quadratic.minimize(program, maxiter=maxiter, tol=tol)
    found = point.y, point.equality, point.inequality
    return _local.Solved(*found, _local.left(given, *found, program.Q), point.iterations)
