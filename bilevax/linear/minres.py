"""The minimal residual method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric, PyTree
from bilevax.base import Bound, Linear
from bilevax.linear import _krylov
from bilevax.linear.preconditioner import Preconditioner, checked, started


def minres(
    maxiter: int = 100,
    tol: Numeric = 1e-6,
    *,
    preconditioner: Callable[[PyTree], PyTree] | Preconditioner | Linear | None = None,
) -> Linear:
    r"""MINRES for symmetric systems, definite or not: a saddle of the lower level, or the
    Lagrangian system of several levels.

    .. math::
        x_k = \operatorname{argmin}_{x \in x_0 + K_k(A, r_0)} \|b - Ax\|, \qquad
        K_k(A, r) = \mathrm{span}\{r, Ar, \dots, A^{k-1} r\}

    One matvec an iteration; one more for the residual at the end, and one for a start other than
    zero. Seven vectors of memory, nine with a preconditioner P, which shrinks the residual in the
    norm of P and stops by the plain one.

    Args:
      maxiter: the most iterations.
      tol: stop at ``‖Ax − b‖ <= tol ‖b‖``.
      preconditioner: an approximate inverse P of the absolute value of A, symmetric positive
        definite; as for `cg`.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. Codes are ``adjoint_breakdown`` (a
      singular matrix that cannot give b), ``adjoint_nonfinite``, ``adjoint_not_converged``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.minres()(
      ...     lambda v: jnp.array([1.0, -2.0]) * v, jnp.array([1.0, 1.0]), jnp.zeros(2)
      ... )
      >>> x.round(3).tolist(), int(info.code)
      ([1.0, -0.5], 0)

    Source: Paige and Saunders 1975, Solution of Sparse Indefinite Systems of Linear Equations.
    """
    maxiter = numbers.count(maxiter, "maxiter")
    tol = numbers.positive(tol, "tol", example=1e-6)
    return Linear(
        Bound("minres", _minres, maxiter=maxiter),
        tol,
        maxiter,
        indefinite=True,
        preconditioner=checked(preconditioner),
    )


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


class _Dual(NamedTuple):
    """With a preconditioner: what `_State` is in its norm, and in the plain one the Lanczos vector
    and the residual.
    """

    own: _State
    v: PyTree
    r: PyTree


def _start(r: Any, r_norm: Any) -> Any:
    zero = tree.zeros_like(r)
    none = jnp.zeros_like(r_norm)
    state = _State(zero, zero, zero, none, -jnp.ones_like(r_norm), none, none, none, r_norm)
    return state, tree.scale(1 / jnp.where(r_norm > 0, r_norm, 1), r)


def _step(x: Any, s: _State, v: Any, av: Any, a_norm: Any) -> Any:
    alpha = tree.dot(v, av)
    u = tree.axpy(-s.beta, s.v_old, tree.axpy(-alpha, v, av))
    beta = tree.norm(u)
    # Column k of the tridiagonal matrix is (beta_k, alpha_k, beta_k+1): the last rotation acts on
    # it, then a new one clears beta_k+1.
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


def _start_dual(
    r: PyTree, r_norm: Any, *, inverse: Callable[[PyTree], PyTree]
) -> tuple[_Dual, PyTree]:
    z = inverse(r)
    size = jnp.sqrt(jnp.maximum(tree.dot(r, z), 0)).astype(r_norm.dtype)
    scale = 1 / jnp.where(size > 0, size, 1)
    own, _ = _start(tree.zeros_like(r), size)
    return _Dual(own, tree.scale(scale, r), r), tree.scale(scale, z)


def _step_dual(
    x: PyTree, s: _Dual, z: PyTree, az: PyTree, a_norm: Any, *, inverse: Callable[[PyTree], PyTree]
) -> Any:
    """As `_step` with Lanczos vectors v and z = P v, orthonormal to each other."""
    old, v = s.own, s.v
    alpha = tree.dot(z, az)
    u = tree.axpy(-old.beta, old.v_old, tree.axpy(-alpha, v, az))
    y = inverse(u)
    beta = jnp.sqrt(jnp.maximum(tree.dot(u, y), 0)).astype(old.beta.dtype)
    upper = old.cos * old.delta + old.sin * alpha
    corner = old.sin * old.delta - old.cos * alpha
    gamma = jnp.hypot(corner, beta)
    # The size of P A is what the entries of its tridiagonal matrix say; that of A has another unit.
    breakdown = gamma <= 10 * numbers.rounding_unit(gamma.dtype) * (
        jnp.abs(alpha) + old.beta + jnp.abs(upper)
    )
    safe = jnp.where(breakdown, 1, gamma)
    cos, sin = corner / safe, beta / safe
    w = tree.scale(1 / safe, tree.axpy(-upper, old.w, tree.axpy(-old.epsilon, old.w_old, z)))
    x = tree.axpy(jnp.where(breakdown, 0, cos * old.phi), w, x)
    phi = sin * old.phi
    scale = 1 / jnp.where(beta > 0, beta, 1)
    ahead = tree.scale(scale, u)
    r = tree.where(breakdown, s.r, tree.axpy(-phi * cos, ahead, tree.scale(sin**2, s.r)))
    own = _State(v, w, old.w, beta, cos, sin, -old.cos * beta, old.sin * beta, phi)
    return (
        x,
        _Dual(own, ahead, r),
        tree.scale(scale, y),
        _krylov.Step(tree.norm(r).astype(phi.dtype), breakdown=breakdown),
    )


def _minres(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree = None,
    *,
    maxiter: int,
    tol: Any,
    preconditioner: Any = None,
) -> Any:
    inverse, setup = started(preconditioner, matvec, b)
    start: Callable[..., Any] = _start
    step: Callable[..., Any] = _step
    if inverse is not None:
        start, step = partial(_start_dual, inverse=inverse), partial(_step_dual, inverse=inverse)
    x, info = _krylov.run(matvec, b, x0, start, step, maxiter=maxiter, tol=tol, progress=0.5)
    return x, info._replace(iterations=info.iterations + setup)
