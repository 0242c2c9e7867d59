"""The generalised minimal residual method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric, PyTree
from bilevax.base import Bound, Linear
from bilevax.linear import _common, _krylov


def gmres(maxiter: int = 100, tol: Numeric = 1e-6, *, restart: int = 20) -> Linear:
    r"""Restarted GMRES for any invertible system: the safest choice without symmetry, at the price
    of memory.

    .. math::
        x_k = \operatorname{argmin}_{x \in x_0 + K_k(A, r_0)} \|b - Ax\|, \qquad
        K_k(A, r) = \mathrm{span}\{r, Ar, \dots, A^{k-1} r\}

    One matvec an iteration, one more for the residual at each restart and at the end. ``restart +
    1`` vectors of memory.

    Args:
      maxiter: the most iterations over all restarts.
      tol: stop at ``‖Ax − b‖ <= tol ‖b‖``.
      restart: the dimension k at which the space is dropped and begun anew.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. Codes are ``adjoint_breakdown`` (a
      singular matrix that cannot give b), ``adjoint_nonfinite``, ``adjoint_not_converged``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.gmres()(
      ...     lambda v: jnp.array([[0.0, 1.0], [-1.0, 0.0]]) @ v,
      ...     jnp.array([2.0, 1.0]),
      ...     jnp.zeros(2),
      ... )
      >>> x.round(3).tolist(), int(info.code)
      ([-1.0, 2.0], 0)

    Source: Saad and Schultz 1986, GMRES: A Generalized Minimal Residual Algorithm for Solving
    Nonsymmetric Linear Systems.
    """
    maxiter = numbers.count(maxiter, "maxiter")
    tol = numbers.positive(tol, "tol", example=1e-6)
    restart = numbers.count(restart, "restart")
    return Linear(
        Bound("gmres", _gmres, maxiter=maxiter, restart=_common.Size(min(restart, maxiter))),
        tol,
        maxiter,
        indefinite=True,
    )


class _State(NamedTuple):
    basis: PyTree  # orthonormal, leading axis restart
    triangle: Any  # (restart, restart), the Hessenberg matrix after the rotations
    cos: Any
    sin: Any
    rhs: Any  # (restart,), the rotated right-hand side
    phi: Any  # its last entry: the norm of the residual
    j: Any


def _placed(at: Any, row: Any, rows: Any) -> Any:
    """`rows` with `row` where `at` says; a select and no scatter, which would have to be told of
    the rows' sharding.
    """
    return jax.vmap(tree.where, in_axes=(0, None, 0))(at, row, rows)


def _start(r: Any, r_norm: Any, *, m: Any) -> Any:
    unit = tree.scale(1 / jnp.where(r_norm > 0, r_norm, 1), r)
    basis = jax.vmap(tree.where, in_axes=(0, None, None))(
        jnp.arange(m, dtype=jnp.int32) == 0, unit, tree.zeros_like(unit)
    )
    zeros = jnp.zeros(m, r_norm.dtype)
    return _State(
        basis, jnp.eye(m, dtype=r_norm.dtype), zeros, zeros, zeros, r_norm, jnp.int32(0)
    ), unit


def _step(x: Any, s: _State, v: Any, w: Any, a_norm: Any, *, m: Any) -> Any:
    # Classical Gram-Schmidt done twice is as orthogonal as the modified form, and reads the basis
    # in one pass. Unused rows are zero.
    h = tree.rows_dot(s.basis, w)
    w = tree.sub(w, tree.rows_sum(h, s.basis))
    again = tree.rows_dot(s.basis, w)
    w = tree.sub(w, tree.rows_sum(again, s.basis))
    beta = tree.norm(w)
    tiny = numbers.rounding_unit(beta.dtype)
    beta = jnp.where(beta <= tiny * a_norm, 0, beta)  # the space is invariant

    def rotate(i, h):
        upper, lower = s.cos[i] * h[i] + s.sin[i] * h[i + 1], s.cos[i] * h[i + 1] - s.sin[i] * h[i]
        return jnp.where(i < s.j, h.at[i].set(upper).at[i + 1].set(lower), h)

    h = lax.fori_loop(0, m - 1, rotate, h + again)
    gamma = jnp.hypot(h[s.j], beta)
    breakdown = gamma <= 10 * tiny * a_norm
    safe = jnp.where(breakdown, 1, gamma)
    cos, sin = h[s.j] / safe, beta / safe
    # A column without a pivot gets a unit diagonal and no weight: the others are solved for as if
    # it had not been.
    index = jnp.arange(m, dtype=jnp.int32)
    at = index == s.j
    column = jnp.where(at, safe, jnp.where(index < s.j, h, 0))
    phi = jnp.where(breakdown, s.phi, -sin * s.phi)
    p = tree.scale(1 / jnp.where(beta > 0, beta, 1), w)
    state = _State(
        basis=_placed(index == s.j + 1, p, s.basis),
        triangle=jnp.where(at[None, :], column[:, None], s.triangle),
        cos=jnp.where(at, cos, s.cos),
        sin=jnp.where(at, sin, s.sin),
        rhs=jnp.where(at, jnp.where(breakdown, 0, cos * s.phi), s.rhs),
        phi=phi,
        j=s.j + 1,
    )
    return x, state, p, _krylov.Step(jnp.abs(phi), restart=s.j + 1 == m, breakdown=breakdown)


def _finish(x: Any, s: _State) -> Any:
    weights = jax.scipy.linalg.solve_triangular(s.triangle, s.rhs)
    return tree.add(x, tree.rows_sum(weights, s.basis))


def _gmres(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree = None,
    *,
    maxiter: int,
    tol: Any,
    restart: Any,
) -> Any:
    start, step = partial(_start, m=int(restart)), partial(_step, m=int(restart))
    return _krylov.run(
        matvec, b, x0, start, step, _finish, maxiter=maxiter, tol=tol, progress=0.999
    )
