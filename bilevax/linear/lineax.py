"""Solvers of the lineax package, by an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax.base import Bound, Linear, PyTree
from bilevax.linear import _common
from bilevax.results import RESULTS


def lineax(solver: Any, *, symmetric: bool = True) -> Linear:
    r"""A lineax solver with this library's interface and verdicts.

    .. math::
        A x = b

    One matvec more than lineax does measures the residual.

    Args:
      solver: an instance, such as ``lineax.CG(rtol=1e-6, atol=0.0)`` or ``lineax.GMRES(...)``.
      symmetric: declare the operator symmetric positive semidefinite, as ``lineax.CG`` demands.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``; the iterative solvers start from
      `x0`. Codes: ``adjoint_not_converged`` where lineax reports a failure or the residual is above
      1, ``adjoint_nonfinite``.

    Raises:
      ImportError: if lineax is not installed.
      TypeError: if `solver` is no lineax solver.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lineax
      >>> from bilevax import linear
      >>> x, info = linear.lineax(lineax.CG(1e-6, 0.0))(
      ...     lambda v: jnp.array([1.0, 2.0]) * v, jnp.array([1.0, 1.0]), jnp.zeros(2)
      ... )
      >>> x.round(3).tolist(), int(info.code)
      ([1.0, 0.5], 0)

    Source: Rader, Lyons and Kidger 2023, Lineax: Unified Linear Solves and Linear Least-Squares in
    JAX and Equinox.
    """
    lx = _import()
    if not isinstance(solver, lx.AbstractLinearSolver):
        raise TypeError(
            f"solver: got {type(solver).__name__}; expected a lineax solver. Try "
            "lineax.CG(rtol=1e-6, atol=0.0)."
        )
    return Linear(
        Bound(
            "lineax",
            _lineax,
            solver=solver,
            symmetric=_common.Size(numbers.flag(symmetric, "symmetric")),
        )
    )


def _import() -> Any:
    try:
        import lineax as lx
    except ImportError as error:
        raise ImportError(
            "linear.lineax: the lineax package is not installed. Try pip install "
            '"bilevax[optimistix]", or linear.cg().'
        ) from error
    return lx


def _wide(v: Any) -> Any:
    return jax.tree.map(lambda u: u.astype(tree.accumulator(u)), v)


def _like(v: Any, b: PyTree) -> Any:
    return jax.tree.map(lambda u, w: u.astype(w.dtype), v, b)


def _lineax(
    matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None, *, solver: Any, symmetric: Any
) -> Any:
    lx = _import()
    b, x0 = _common.prepare(b, x0)
    # A tolerance that arrives as a traced float64 would promote float32 vectors.
    dtype = tree.dot(b, b).dtype
    solver = jax.tree.map(
        lambda u: (
            jnp.asarray(u, dtype) if isinstance(u, (float, jax.Array)) and tree.is_float(u) else u
        ),
        solver,
    )
    tags = lx.positive_semidefinite_tag if symmetric else ()
    # Half precisions are widened for lineax, which mixes them with float32; the matvec sees its own
    # dtype.
    operator = lx.FunctionLinearOperator(
        lambda v: _wide(matvec(_like(v, b))), jax.eval_shape(lambda: _wide(b)), tags
    )
    found = lx.linear_solve(operator, _wide(b), solver, options={"y0": _wide(x0)}, throw=False)
    finite = tree.all_finite(found.value)
    b_norm = tree.norm(b)
    nothing = b_norm == 0
    x = tree.where(nothing, tree.zeros_like(b), tree.where(finite, _like(found.value, b), x0))
    residual = _common.relative(tree.norm(tree.sub(b, matvec(x))), b_norm)
    failure = jnp.where(
        found.result == lx.RESULTS.successful, RESULTS.success, RESULTS.adjoint_not_converged
    )
    failure = jnp.where(finite, failure, RESULTS.adjoint_nonfinite)
    failure = jnp.where(nothing, RESULTS.success, failure).astype(
        jnp.int32
    )  # an iterative solver has no tolerance relative to nothing
    return x, _common.info(
        1 + jnp.asarray(found.stats.get("num_steps", tree.size(b)), jnp.int32), residual, failure
    )
