"""What the linear solvers share: how they start, and the verdict."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import PyTree
from bilevax.base import LinearInfo
from bilevax.results import RESULTS


def prepare(b: PyTree, x0: PyTree | None) -> tuple[PyTree, PyTree]:
    """Strongly typed `b` and `x0`; None stands for a zero `x0`."""
    b = tree.strong(b)
    return b, tree.zeros_like(b) if x0 is None else tree.strong(x0)


def singular(a_norm: Any, x_norm: Any, b_norm: Any) -> Any:
    """Whether x is so large that rounding in A x leaves less than a digit of b: the matrix is
    singular to working precision.
    """
    return numbers.rounding_unit(b_norm.dtype) * a_norm * x_norm > 0.1 * b_norm


def relative(residual_norm: Any, b_norm: Any) -> Any:
    """``residual_norm / b_norm``, and 0 where both vanish."""
    return residual_norm / jnp.where(b_norm == 0, jnp.ones_like(b_norm), b_norm)


def info(iterations: Any, residual: Any, failure: Any, tol: Any = None) -> LinearInfo:
    """A `LinearInfo` with its verdict: a failure met on the way, else nonfinite, else whether
    `residual` is at most `tol`.

    Methods without a tolerance (None) succeed where they beat x = 0.
    """
    solved = residual < 1 if tol is None else residual <= jnp.asarray(tol, residual.dtype)
    code = jnp.where(solved, RESULTS.success, RESULTS.adjoint_not_converged)
    code = jnp.where(jnp.isfinite(residual), code, RESULTS.adjoint_nonfinite)
    return LinearInfo(
        jnp.asarray(iterations, jnp.int32),
        residual,
        jnp.where(failure == 0, code, failure).astype(jnp.int32),
    )


@jax.tree_util.register_static
class Size(int):
    """An integer that shapes depend on: static even where the solver itself is an argument of a
    jitted function.
    """
