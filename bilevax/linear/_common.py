"""What the linear solvers share: checks of factory arguments, the rounding unit, and the verdict."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax.base import LinearInfo
from bilevax.results import RESULTS

PyTree = Any


def check_count(name: str, value) -> None:
    """Refuse a count that is no integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}; expected an integer >= 1. Try {name}=10.")
    if value < 1:
        raise ValueError(f"{name}: got {value!r}; expected an integer >= 1. Try {name}=10.")


def check_positive(name: str, value, example: float) -> None:
    """Refuse a concrete number that is not positive; traced ones pass."""
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or (hasattr(value, "dtype") and jnp.ndim(value) == 0)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}; expected a positive number. Try {name}={example}.")
    if not value > 0:
        raise ValueError(f"{name}: got {value!r}; expected a positive number. Try {name}={example}.")


def prepare(b: PyTree, x0: PyTree | None) -> tuple[PyTree, PyTree]:
    """Strongly typed `b` and `x0`; None stands for a zero `x0`."""
    b = tree.strong(b)
    return b, tree.zeros_like(b) if x0 is None else tree.strong(x0)


def eps(b: PyTree) -> float:
    """The largest rounding unit among the leaves."""
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(b)), default=0.0)


def singular(a_norm, x_norm, b_norm):
    """Whether x is so large that rounding in A x leaves less than a digit of b: the matrix is singular to working precision."""
    return float(jnp.finfo(b_norm.dtype).eps) * a_norm * x_norm > 0.1 * b_norm


def relative(residual_norm, b_norm):
    """``residual_norm / b_norm``, and 0 where both vanish."""
    return residual_norm / jnp.where(b_norm == 0, jnp.ones_like(b_norm), b_norm)


def info(iterations, residual, failure, tol=None) -> LinearInfo:
    """A `LinearInfo` with its verdict: a failure met on the way, else nonfinite, else whether `residual` is at most `tol`.

    Methods without a tolerance (None) succeed where they beat x = 0.
    """
    solved = residual < 1 if tol is None else residual <= jnp.asarray(tol, residual.dtype)
    code = jnp.where(solved, RESULTS.success, RESULTS.adjoint_not_converged)
    code = jnp.where(jnp.isfinite(residual), code, RESULTS.adjoint_nonfinite)
    return LinearInfo(jnp.asarray(iterations, jnp.int32), residual, jnp.where(failure == 0, code, failure).astype(jnp.int32))


@jax.tree_util.register_static
class Size(int):
    """An integer that shapes depend on: static even where the solver itself is an argument of a jitted function."""


def rows_dot(rows: PyTree, v: PyTree) -> jax.Array:
    """Inner products of `v` with each row of a stack of vectors (a leading axis on each leaf)."""
    return jax.vmap(tree.dot, in_axes=(0, None))(rows, v)


def rows_sum(coefficients: jax.Array, rows: PyTree) -> PyTree:
    """``sum_i coefficients[i] rows[i]``, summed in float32 or wider."""

    def leaf(u):
        dtype = tree._accumulator(u)
        c = coefficients.astype(dtype).reshape((-1,) + (1,) * (u.ndim - 1))
        return jnp.sum(c * u.astype(dtype), axis=0).astype(u.dtype)

    return jax.tree.map(leaf, rows)
