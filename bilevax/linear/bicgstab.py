"""The stabilised biconjugate gradient method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric, PyTree
from bilevax.base import Bound, Linear
from bilevax.linear import _krylov


def bicgstab(maxiter: int = 100, tol: Numeric = 1e-6) -> Linear:
    r"""BiCGSTAB for systems without symmetry, such as ``(I − ∂T)' q = w`` of a fixed point, in
    short recurrences.

    .. math::
        s = r - \alpha A p, \quad x \leftarrow x + \alpha p + \omega s, \quad
        r \leftarrow s - \omega A s, \quad
        \alpha = \frac{\hat r^\top r}{\hat r^\top A p}, \quad \omega = \frac{s^\top A s}{\|A s\|^2}

    Two matvecs an iteration; one more for the residual at the end, and one for a start other than
    zero. Five vectors of memory.

    Args:
      maxiter: the most iterations.
      tol: stop at ``‖Ax − b‖ <= tol ‖b‖``.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. Codes are ``adjoint_breakdown`` (a
      division by nearly zero that starting anew from the measured residual does not cure),
      ``adjoint_nonfinite``, ``adjoint_not_converged``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.bicgstab()(
      ...     lambda v: jnp.array([[2.0, 1.0], [0.0, 1.0]]) @ v, jnp.array([3.0, 1.0]), jnp.zeros(2)
      ... )
      >>> x.round(3).tolist(), int(info.code)
      ([1.0, 1.0], 0)

    Source: van der Vorst 1992, Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG.
    """
    maxiter = numbers.count(maxiter, "maxiter")
    tol = numbers.positive(tol, "tol", example=1e-6)
    return Linear(Bound("bicgstab", _bicgstab, maxiter=maxiter), tol, 2 * maxiter)


class _State(NamedTuple):
    shadow: PyTree  # the fixed left vector
    # the residual; s in the second half of an iteration, where it is also what is multiplied
    r: PyTree
    p: PyTree
    ap: PyTree
    rho: Any
    alpha: Any
    second: Any  # which half


def _start(r: Any, r_norm: Any) -> Any:
    return _State(
        r, r, r, tree.zeros_like(r), r_norm**2, jnp.zeros_like(r_norm), jnp.asarray(False)
    ), r


def _nearly_zero(value: Any, scale: Any) -> Any:
    return ~(jnp.abs(value) > numbers.rounding_unit(value.dtype) * scale) & ~jnp.isnan(value)


def _step(x: Any, s: _State, p: Any, ap: Any, a_norm: Any) -> Any:
    return lax.cond(s.second, _second, _first, x, s, p, ap)


def _first(x: Any, s: _State, p: Any, ap: Any) -> Any:
    against = tree.dot(s.shadow, ap)
    breakdown = _nearly_zero(against, tree.norm(s.shadow) * tree.norm(ap))
    alpha = jnp.where(breakdown, 0, s.rho / jnp.where(breakdown, 1, against))
    r = tree.axpy(-alpha, ap, s.r)
    x = tree.axpy(alpha, p, x)
    return (
        x,
        s._replace(r=r, ap=ap, alpha=alpha, second=jnp.asarray(True)),
        r,
        _krylov.Step(tree.norm(r), jnp.asarray(False), breakdown),
    )


def _second(x: Any, s: _State, p: Any, ap: Any) -> Any:
    squared = tree.dot(ap, ap)
    along = tree.dot(p, ap)
    flat = _nearly_zero(along, tree.norm(p) * jnp.sqrt(squared))
    omega = jnp.where(flat, 0, along / jnp.where(flat, 1, squared))
    r = tree.axpy(-omega, ap, p)
    r_norm = tree.norm(r)
    x = tree.axpy(omega, p, x)
    rho = tree.dot(s.shadow, r)
    breakdown = flat | _nearly_zero(rho, tree.norm(s.shadow) * r_norm)
    beta = jnp.where(breakdown, 0, (rho / s.rho) * (s.alpha / jnp.where(flat, 1, omega)))
    direction = tree.axpy(beta, tree.axpy(-omega, s.ap, s.p), r)
    return (
        x,
        _State(s.shadow, r, direction, s.ap, rho, s.alpha, jnp.asarray(False)),
        direction,
        _krylov.Step(r_norm, jnp.asarray(False), breakdown),
    )


def _bicgstab(
    matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None, *, maxiter: int, tol: Any
) -> Any:
    return _krylov.run(matvec, b, x0, _start, _step, maxiter=2 * maxiter, tol=tol, progress=0.5)
