"""Factorisations of the materialised matrix, for small problems and as references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import PyTree
from bilevax.base import Bound, Linear
from bilevax.linear import _common
from bilevax.results import RESULTS

# entries of a vector; the matrix is then 128 MiB in float64, and its matvecs run at once
LIMIT = 4096


def cholesky() -> Linear:
    r"""Solve a symmetric positive definite system by a Cholesky factorisation of the materialised
    matrix.

    .. math::
        A = L L^\top, \qquad x = L^{-\top} L^{-1} b

    As many matvecs as there are unknowns, vectorised; at most 4,096 unknowns. Half precisions are
    factorised in float32. `x0` is what comes back on a failure.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. Codes are ``negative_curvature``
      (not positive definite), ``adjoint_breakdown`` (singular to rounding),
      ``adjoint_nonfinite``, ``adjoint_not_converged`` (the residual is above the square root of the
      rounding unit, as for a matrix without symmetry).

    Raises:
      ValueError: when called with more than 4,096 unknowns.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.cholesky()(
      ...     lambda v: jnp.array([[2.0, 1.0], [1.0, 2.0]]) @ v, jnp.array([3.0, 3.0]), jnp.zeros(2)
      ... )
      >>> x.round(3).tolist(), int(info.iterations)
      ([1.0, 1.0], 2)

    Source: Golub and Van Loan 2013, Matrix Computations, section 4.2.
    """
    return Linear(Bound("cholesky", _cholesky), exact=True)


def lu() -> Linear:
    r"""Solve any invertible system by an LU factorisation of the materialised matrix.

    .. math::
        P A = L U, \qquad x = U^{-1} L^{-1} P b

    As many matvecs as there are unknowns, vectorised; at most 4,096 unknowns. Half precisions are
    factorised in float32. `x0` is what comes back on a failure.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. Codes are ``adjoint_breakdown``
      (singular to rounding), ``adjoint_nonfinite``, ``adjoint_not_converged`` (the residual is
      above the square root of the rounding unit).

    Raises:
      ValueError: when called with more than 4,096 unknowns.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.lu()(
      ...     lambda v: jnp.array([[0.0, 1.0], [-1.0, 0.0]]) @ v,
      ...     jnp.array([2.0, 1.0]),
      ...     jnp.zeros(2),
      ... )
      >>> x.round(3).tolist(), int(info.code)
      ([-1.0, 2.0], 0)

    Source: Golub and Van Loan 2013, Matrix Computations, section 3.4.
    """
    return Linear(Bound("lu", _lu), exact=True, indefinite=True)


def _materialise(matvec: Callable[[PyTree], PyTree], b: PyTree, name: str) -> Any:
    """The matrix and the right-hand side in one dtype wide enough for LAPACK, and the way back to a
    pytree.
    """
    n = tree.size(b)
    if n > LIMIT:
        raise ValueError(
            f"b: got {n} unknowns; linear.{name} materialises the matrix and expects at most "
            f"{LIMIT}. Try linear.cg()."
        )
    leaves, treedef = jax.tree.flatten(b)
    dtype = tree.accumulator(*leaves)

    def flat(v):
        return jnp.concatenate([jnp.ravel(u).astype(dtype) for u in jax.tree.leaves(v)])

    def unflat(v):
        parts, at = [], 0
        for leaf in leaves:
            parts.append(v[at : at + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            at += leaf.size
        return treedef.unflatten(parts)

    columns = jax.vmap(lambda e: flat(matvec(unflat(e))))(jnp.eye(n, dtype=dtype))
    return columns.T, flat(b), unflat


def _finished(a: Any, x: Any, rhs: Any, x0: PyTree, unflat: Any, failure: Any) -> Any:
    x = jax.tree.map(lambda new, old: jnp.where(failure == 0, new, old), unflat(x), x0)
    flat = jnp.concatenate([jnp.ravel(u).astype(a.dtype) for u in jax.tree.leaves(x)])
    residual = _common.relative(jnp.linalg.norm(rhs - a @ flat), jnp.linalg.norm(rhs))
    worse = (failure != 0) & (residual > 1)  # a start worse than zero
    x, residual = tree.where(worse, tree.zeros_like(x), x), jnp.where(worse, 1, residual)
    return x, _common.info(rhs.size, residual, failure, numbers.rounding_unit(x0) ** 0.5)


def _cholesky(matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None) -> Any:
    b, x0 = _common.prepare(b, x0)
    a, rhs, unflat = _materialise(matvec, b, "cholesky")
    factor = jnp.linalg.cholesky((a + a.T) / 2)
    pivots = jnp.diagonal(factor) ** 2
    singular = jnp.min(pivots) <= rhs.size * numbers.rounding_unit(a.dtype) * jnp.max(
        jnp.diagonal(a)
    )
    # The factorisation gives NaN for an indefinite matrix and, by rounding, for about half of the
    # singular ones: the spectrum decides.
    lowest, highest = _extremes((a + a.T) / 2, jnp.all(jnp.isfinite(pivots)))
    negative = lowest < -rhs.size * numbers.rounding_unit(a.dtype) * highest
    failure = jnp.where(
        singular | ~jnp.isfinite(pivots).all(), RESULTS.adjoint_breakdown, RESULTS.success
    )
    failure = jnp.where(negative, RESULTS.negative_curvature, failure)
    failure = jnp.where(
        jnp.isfinite(a).all() & jnp.isfinite(rhs).all(), failure, RESULTS.adjoint_nonfinite
    ).astype(jnp.int32)
    x = jax.scipy.linalg.cho_solve((factor, True), rhs)
    return _finished(a, x, rhs, x0, unflat, failure)


def _extremes(a: Any, definite: Any) -> Any:
    """Smallest and largest absolute eigenvalue, computed only where the matrix did not prove
    definite.
    """

    def measure(a):
        values = jnp.linalg.eigvalsh(jnp.where(jnp.isfinite(a), a, 0))
        return values[0], jnp.max(jnp.abs(values))

    zero = jnp.zeros((), a.dtype)
    return jax.lax.cond(definite, lambda a: (zero, zero), measure, a)


def _lu(matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None) -> Any:
    b, x0 = _common.prepare(b, x0)
    a, rhs, unflat = _materialise(matvec, b, "lu")
    factors = jax.scipy.linalg.lu_factor(a)
    pivots = jnp.abs(jnp.diagonal(factors[0]))
    singular = ~(jnp.min(pivots) > rhs.size * numbers.rounding_unit(a.dtype) * jnp.max(jnp.abs(a)))
    failure = jnp.where(singular, RESULTS.adjoint_breakdown, RESULTS.success)
    failure = jnp.where(
        jnp.isfinite(a).all() & jnp.isfinite(rhs).all(), failure, RESULTS.adjoint_nonfinite
    ).astype(jnp.int32)
    return _finished(a, jax.scipy.linalg.lu_solve(factors, rhs), rhs, x0, unflat, failure)
