"""Conjugate gradients for several right sides at once, in one Krylov space for all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import PyTree
from bilevax.base import LinearInfo
from bilevax.results import RESULTS


def gram(U: PyTree, V: PyTree) -> Any:
    """Inner products of the rows of one block with those of another."""
    return jax.vmap(lambda u: tree.rows_dot(V, u))(U)


def mixed(M: Any, U: PyTree) -> PyTree:
    """The block whose rows are combinations of those of `U`."""
    return jax.vmap(lambda row: tree.rows_sum(row, U))(M)


def orthonormal(R: PyTree) -> tuple[PyTree, Any]:
    """``R = M Q`` with rows of Q orthonormal, or zero where R has fewer independent ones."""
    values, vectors = jnp.linalg.eigh(gram(R, R))
    kept = values > 100 * jnp.finfo(values.dtype).eps * values[-1]
    sizes = jnp.sqrt(jnp.where(kept, values, 1))
    Q = mixed(jnp.where(kept, 1 / sizes, 0)[:, None] * vectors.T, R)
    return Q, vectors * jnp.where(kept, sizes, 0)[None, :]


class _Carry(NamedTuple):
    X: PyTree
    P: PyTree  # directions
    Q: PyTree  # orthonormal rows; the residuals are C Q
    C: Any
    code: Any
    iterations: Any


def block_cg(
    matvec: Any, B: PyTree, X0: PyTree | None = None, *, maxiter: int, tol: Any
) -> tuple[PyTree, LinearInfo]:
    """Solve for every row of `B`; at most `maxiter` iterations, of a product a row each."""
    X0 = tree.zeros_like(B) if X0 is None else X0
    many = jax.tree.leaves(B)[0].shape[0]
    products = jax.vmap(matvec)
    sizes = jnp.sqrt(jnp.diagonal(gram(B, B)))
    target = jnp.maximum(jnp.asarray(tol, sizes.dtype), numbers.rounding_unit(B) / 2) * sizes
    warm = tree.norm(X0) != 0
    R = lax.cond(warm, lambda: tree.sub(B, products(X0)), lambda: B)
    Q, C = orthonormal(R)

    def left(C):
        return jnp.sqrt(jnp.sum(C * C, axis=1))

    def going(c: _Carry):
        return jnp.any(left(c.C) > target) & (c.code == RESULTS.success) & (c.iterations < maxiter)

    def body(c: _Carry) -> _Carry:
        AP = products(c.P)
        values, vectors = jnp.linalg.eigh(gram(c.P, AP))
        largest = jnp.max(jnp.abs(values))
        kept = values > 100 * jnp.finfo(values.dtype).eps * largest
        negative = jnp.any(values < -100 * jnp.finfo(values.dtype).eps * largest)
        inverse = (
            vectors * jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)[None, :]
        ) @ vectors.T
        X = tree.add(c.X, mixed(c.C @ inverse, c.P))
        Q, M = orthonormal(tree.sub(c.Q, mixed(inverse, AP)))
        P = tree.add(Q, mixed(M.T, c.P))
        finite = jnp.all(jnp.isfinite(M)) & jnp.isfinite(largest)
        code = jnp.where(
            finite,
            jnp.where(negative, RESULTS.negative_curvature, RESULTS.success),
            RESULTS.adjoint_nonfinite,
        ).astype(jnp.int32)
        new = _Carry(X, P, Q, c.C @ M, code, c.iterations + 1)
        return tree.where(
            negative | ~finite, c._replace(code=code, iterations=c.iterations + 1), new
        )

    start = _Carry(X0, Q, Q, C, jnp.int32(RESULTS.success), jnp.int32(0))
    end = lax.while_loop(going, body, start)
    residual = left(end.C) / jnp.where(sizes > 0, sizes, 1)
    code = jnp.where(jnp.all(left(end.C) <= target), RESULTS.success, RESULTS.adjoint_not_converged)
    code = jnp.where(end.code == RESULTS.success, code, end.code).astype(jnp.int32)
    return end.X, LinearInfo(many * (end.iterations + warm.astype(jnp.int32)), residual, code)
