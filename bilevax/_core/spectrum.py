"""Extreme eigenvalues and singular values of operators that are known by their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import PyTree

# a Ritz value below minus so much of the largest is negative curvature, and not rounding
NEGATIVE = 1e-3


class Space(NamedTuple):
    """An orthonormal basis V of the Krylov space of a start, and what the operator does on it.

    Attributes:
      basis: rows of V, a leading axis on each leaf; zero beyond an invariant space.
      images: ``A V``, in the same form.
      gram: ``V' A V``; zero rows and columns beyond an invariant space.
      used: which rows are not zero.
    """

    basis: PyTree
    images: PyTree
    gram: jax.Array
    used: jax.Array


def krylov(matvec: Callable[[PyTree], PyTree], start: PyTree, products: int) -> Space:
    """The space of ``start, A start, ..., A^(products - 1) start`` by Lanczos with full
    reorthogonalisation, as one loop.

    Args:
      matvec: symmetric.
      start: a vector, not zero.
      products: dimension of the space.
    """
    dtype = tree.norm(start).dtype
    basis = jax.tree.map(lambda a: jnp.zeros((products, *a.shape), a.dtype), start)
    tiny = 100 * numbers.rounding_unit(dtype)

    def body(i, carry):
        basis, images, gram, v = carry
        image = matvec(v)
        basis, images = (
            jax.tree.map(lambda rows, a: rows.at[i].set(a), rows, a)
            for rows, a in ((basis, v), (images, image))
        )
        column = tree.rows_dot(basis, image).astype(dtype)
        rest = tree.sub(image, tree.rows_sum(column, basis))
        # twice is enough (Kahan)
        rest = tree.sub(rest, tree.rows_sum(tree.rows_dot(basis, rest), basis))
        size = tree.norm(rest)
        alive = size > tiny * tree.norm(image)
        inverse = 1 / jnp.where(alive, size, jnp.ones_like(size))
        v = tree.scale(jnp.where(alive, inverse, jnp.zeros_like(size)), rest)
        return basis, images, gram.at[:, i].set(column), v

    gram = jnp.zeros((products, products), dtype)
    basis, images, gram, _ = lax.fori_loop(
        0, products, body, (basis, basis, gram, tree.unit(start))
    )
    gram = jnp.triu(gram) + jnp.triu(gram, 1).T
    return Space(basis, images, gram, jax.vmap(tree.norm)(basis).astype(dtype) > 0.5)


def smallest_eigenpair(
    matvec: Callable[[PyTree], PyTree], start: PyTree, products: int
) -> tuple[Any, PyTree]:
    """Ritz value and vector of the Krylov space of `start`: a lower estimate of the smallest
    eigenvalue, and where to go on from.

    The Ritz value θ is above the smallest eigenvalue; what is returned is ``max(θ − ‖Hw − θw‖,
    θ/2)``, since an eigenvalue lies that near.

    Args:
      matvec: symmetric.
      start: a vector, not zero.
      products: dimension of the space.
    """
    basis, images, gram, used = krylov(matvec, start, products)
    # Directions beyond an invariant space are zero rows: kept out of the minimum.
    largest = jnp.max(jnp.abs(jnp.diagonal(gram))) + 1
    gram = gram + jnp.diag(jnp.where(used, jnp.zeros_like(largest), 1e3 * largest))
    values, vectors = jnp.linalg.eigh(jnp.where(jnp.isfinite(gram), gram, jnp.zeros_like(gram)))
    theta, vector = values[0], tree.rows_sum(vectors[:, 0], basis)
    residual = tree.norm(tree.axpy(-theta, vector, tree.rows_sum(vectors[:, 0], images)))
    return jnp.maximum(theta - residual, theta / 2), vector


def power(image: Callable[..., Any], start: PyTree, rounds: Any) -> tuple[Any, PyTree]:
    """Power iteration: ``image(v) -> (what is measured at a unit v, where to go on)``; the last
    measure, and the last direction.
    """

    def body(_, carry):
        measured, moved = image(carry[1])
        return measured, tree.unit(moved)

    start = tree.unit(start)
    measured = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(image, start)[0])
    return lax.fori_loop(0, rounds, body, (measured, start))
