"""The minimal residual method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric, PyTree
from bilevax.base import Bound, Linear
from bilevax.linear import _krylov


def minres(maxiter: int = 100, tol: Numeric = 1e-6) -> Linear:
    r"""MINRES for symmetric systems, definite or not: a saddle of the lower level, or the Lagrangian system of several levels.

    .. math::
        x_k = \operatorname{argmin}_{x \in x_0 + K_k(A, r_0)} \|b - Ax\|, \qquad K_k(A, r) = \mathrm{span}\{r, Ar, \dots, A^{k-1} r\}

    One matvec an iteration; one more for the residual at the end, and one for a start other than zero. Seven vectors of memory.

    Args:
      maxiter: the most iterations.
      tol: stop at ``‖Ax − b‖ <= tol ‖b‖``.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. Codes: ``adjoint_breakdown`` (a singular matrix that cannot give b),
      ``adjoint_nonfinite``, ``adjoint_not_converged``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.minres()(lambda v: jnp.array([1.0, -2.0]) * v, jnp.array([1.0, 1.0]), jnp.zeros(2))
      >>> x.round(3).tolist(), int(info.code)
      ([1.0, -0.5], 0)

    Reference:
      Paige and Saunders 1975, Solution of Sparse Indefinite Systems of Linear Equations.
    """
    maxiter = numbers.count(maxiter, "maxiter")
    tol = numbers.positive(tol, "tol", example=1e-6)
    return Linear(Bound("minres", _minres, maxiter=maxiter), tol, maxiter, indefinite=True)


class _State(NamedTuple):
    v_old: PyTree  # Lanczos vector before p
    w: PyTree  # the last two search directions
    w_old: PyTree
    beta: Any  # subdiagonal of the tridiagonal matrix
    cos: Any  # last rotation
    sin: Any
    delta: Any  # entries of the next column, after the rotations so far
    epsilon: Any
    phi: Any  # norm of the residual


def _start(r: Any, r_norm: Any) -> Any:
    zero = tree.zeros_like(r)
    none = jnp.zeros_like(r_norm)
    state = _State(zero, zero, zero, none, -jnp.ones_like(r_norm), none, none, none, r_norm)
    return state, tree.scale(1 / jnp.where(r_norm > 0, r_norm, 1), r)


def _step(x: Any, s: _State, v: Any, av: Any, a_norm: Any) -> Any:
    alpha = tree.dot(v, av)
    u = tree.axpy(-s.beta, s.v_old, tree.axpy(-alpha, v, av))
    beta = tree.norm(u)
    # Column k of the tridiagonal matrix is (beta_k, alpha_k, beta_k+1): the last rotation acts on it, then a new one clears beta_k+1.
    upper = s.cos * s.delta + s.sin * alpha
    corner = s.sin * s.delta - s.cos * alpha
    gamma = jnp.hypot(corner, beta)
    breakdown = gamma <= 10 * numbers.rounding_unit(gamma.dtype) * a_norm
    safe = jnp.where(breakdown, 1, gamma)
    cos, sin = corner / safe, beta / safe
    w = tree.scale(1 / safe, tree.axpy(-upper, s.w, tree.axpy(-s.epsilon, s.w_old, v)))
    x = tree.axpy(jnp.where(breakdown, 0, cos * s.phi), w, x)
    state = _State(v, w, s.w, beta, cos, sin, -s.cos * beta, s.sin * beta, sin * s.phi)
    p = tree.scale(1 / jnp.where(beta > 0, beta, 1), u)
    return x, state, p, _krylov.Step(jnp.where(breakdown, s.phi, state.phi), breakdown=breakdown)


def _minres(matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None, *, maxiter: int, tol: Any) -> Any:
    return _krylov.run(matvec, b, x0, _start, _step, maxiter=maxiter, tol=tol, progress=0.5)
