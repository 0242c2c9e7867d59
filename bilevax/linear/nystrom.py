"""Randomized Nyström approximation: a linear solver, and a preconditioner whose sketch is kept and
refreshed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Key, Numeric, PyTree
from bilevax.base import Bound, Linear, LinearInfo
from bilevax.linear import _common
from bilevax.linear.preconditioner import Preconditioner
from bilevax.results import RESULTS


class Sketch(NamedTuple):
    """An approximation ``A ≈ U diag(values) U'`` of rank r.

    Attributes:
      vectors: U', a pytree as the right-hand side with a leading axis of length r; orthonormal
        rows.
      values: eigenvalues, shape (r,), in ascending order.
      key: PRNG key of the next refresh.
      code: a `RESULTS` code: negative curvature where the sketch met it, else success.
    """

    vectors: PyTree
    values: jax.Array
    key: jax.Array
    code: jax.Array


def nystrom(rank: int = 10, rho: Numeric = 1e-2, *, key: Key | None = None) -> Linear:
    r"""Solve with a randomized low-rank approximation in place of the matrix, for positive
    semidefinite A of fast decaying spectrum.

    .. math::
        A \approx A\Omega (\Omega^\top A\Omega)^{-1} (A\Omega)^\top = U \Lambda U^\top, \qquad
        x = (U \Lambda U^\top + \rho I)^{-1} b
        = U (\Lambda + \rho)^{-1} U^\top b + \tfrac{1}{\rho} (b - U U^\top b)

    `rank` matvecs, and one for the residual of the system without :math:`\rho`; `rank` vectors of
    memory, twice while they are made. With as many columns as unknowns the second term is absent
    and x is exact up to :math:`\rho`. `x0` is what comes back on a failure.

    Args:
      rank: columns of the sketch; at most the number of unknowns is used.
      rho: the regulariser. Too small a value amplifies what the sketch has not seen; the residual
        tells.
      key: PRNG key of the test matrix, the same in each solve; None takes ``jax.random.key(0)``.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. An approximation has no tolerance to
      miss: the code is success where the residual is below that of x = 0, else
        ``adjoint_not_converged``, ``negative_curvature`` or ``adjoint_nonfinite``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.nystrom(rank=2, rho=1e-6)(
      ...     lambda v: jnp.array([1.0, 2.0]) * v, jnp.array([1.0, 1.0]), jnp.zeros(2)
      ... )
      >>> x.round(3).tolist(), int(info.iterations)
      ([1.0, 0.5], 3)

    Source: Hataya and Yamada 2023, Nyström Method for Accurate and Scalable Implicit
    Differentiation, in the stable form of Frangella, Tropp and Udell 2023, Randomized Nyström
    Preconditioning, algorithm 2.1.
    """
    rank = numbers.count(rank, "rank")
    rho = numbers.positive(rho, "rho", example=1e-2)
    key = None if key is None else numbers.key(key)
    return Linear(
        Bound("nystrom", _nystrom, rank=_common.Size(rank), rho=rho, key=key),
        products=rank + 1,
        approximate=True,
    )


def nystrom_preconditioner(
    rank: int = 10, rho: Numeric = 1e-2, *, key: Key | None = None
) -> Preconditioner:
    r"""A preconditioner for `cg` from a randomized low-rank approximation, whose sketch can serve
    many solves.

    .. math::
        P^{-1} v = (\lambda_r + \rho)\, U (\Lambda + \rho)^{-1} U^\top v + (v - U U^\top v)

    Args:
      rank: columns of the sketch and matvecs of a refresh; at most the number of unknowns is used.
      rho: the regulariser; the size of the eigenvalues below which nothing needs to be
        preconditioned, such as a weight decay.
      key: PRNG key of the first test matrix; each refresh draws a new one. None takes
        ``jax.random.key(0)``.

    Returns:
      A `Preconditioner`; its state is a `Sketch`.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> solver = linear.cg(preconditioner=linear.nystrom_preconditioner(rank=2, rho=1e-6))
      >>> matvec, b = lambda v: jnp.array([1.0, 100.0, 1.0, 1000.0]) * v, jnp.ones(4)
      >>> _, info = solver(matvec, b, jnp.zeros(4))  # a sketch of its own: two matvecs
      >>> preconditioner = solver.preconditioner
      >>> sketch = preconditioner.refresh(matvec, preconditioner.init(b))
      >>> _, info = linear.precondition(solver, sketch)(
      ...     matvec, b, jnp.zeros(4)
      ... )  # a sketch that is there already
      >>> int(info.code)
      0

    Source: Frangella, Tropp and Udell 2023, Randomized Nyström Preconditioning.
    """
    rank = numbers.count(rank, "rank")
    rho = numbers.positive(rho, "rho", example=1e-2)
    key = None if key is None else numbers.key(key)
    size = _common.Size(rank)
    return Preconditioner(
        init=Bound("init", _init, rank=size, key=key),
        refresh=Bound("refresh", _refresh),
        apply=Bound("nystrom_preconditioner", _apply, rho=rho),
        cost=Bound("cost", _cost, rank=size),
    )


def _cost(b: PyTree, *, rank: int) -> int:
    return min(int(rank), tree.size(b))


def _init(b: PyTree, *, rank: int, key: Any) -> Sketch:
    r = _cost(b, rank=rank)
    vectors = jax.tree.map(lambda u: jnp.zeros((r, *u.shape), u.dtype), b)
    key = jax.random.key(0) if key is None else key
    return Sketch(vectors, jnp.zeros(r, tree.dot(b, b).dtype), key, jnp.int32(RESULTS.success))


def _refresh(matvec: Callable[[PyTree], PyTree], state: Sketch) -> Sketch:
    key, draw = jax.random.split(state.key)
    like = jax.tree.map(lambda u: u[0], state.vectors)
    r = state.values.shape[0]
    dtype = state.values.dtype
    tiny = numbers.rounding_unit(dtype)
    omega = jax.vmap(lambda k: tree.normal_like(k, like))(jax.random.split(draw, r))
    for _ in range(
        2
    ):  # Cholesky QR, twice: orthonormal to rounding with nothing but inner products
        omega = _combine(_inverse_factor(_gram(omega, omega)), omega)
    image = lax.map(matvec, omega)
    # The shift keeps the core positive where A has rank below r; it is taken off the eigenvalues
    # again.
    shift = tiny * jnp.sqrt(tree.dot(image, image))
    image = tree.axpy(shift, omega, image)
    core = _gram(omega, image)
    values, rotation = jnp.linalg.eigh((core + core.T) / 2)
    noise = 10 * r * max(tiny, numbers.rounding_unit(like)) * jnp.max(jnp.abs(values))
    # Clipping an eigenvalue of the core is the jitter of its Cholesky factor, put only where it is
    # needed.
    floor = jnp.where(shift > 0, shift, 1)
    half = _combine(rotation.T / jnp.sqrt(jnp.maximum(values, floor))[:, None], image)
    squared, turn = jnp.linalg.eigh(_gram(half, half))
    vectors = _combine(turn.T / jnp.sqrt(jnp.maximum(squared, floor))[:, None], half)
    code = jnp.where(values[0] < -noise, RESULTS.negative_curvature, RESULTS.success)
    code = jnp.where(jnp.isfinite(values).all(), code, RESULTS.adjoint_nonfinite)
    return Sketch(vectors, jnp.maximum(squared - shift, 0), key, code.astype(jnp.int32))


def _gram(rows: PyTree, others: PyTree) -> jax.Array:
    """All inner products between two stacks of vectors, leafwise, so that they keep any
    sharding.
    """
    return jax.vmap(tree.rows_dot, in_axes=(None, 0), out_axes=1)(rows, others)


def _combine(matrix: jax.Array, rows: PyTree) -> PyTree:
    """``matrix @ rows`` on a stack of vectors."""
    return jax.vmap(tree.rows_sum, in_axes=(0, None))(matrix, rows)


def _inverse_factor(gram: jax.Array) -> jax.Array:
    factor = jnp.linalg.cholesky(gram)
    return jax.scipy.linalg.solve_triangular(
        factor, jnp.eye(gram.shape[0], dtype=gram.dtype), lower=True
    )


def _split(state: Sketch, v: PyTree) -> Any:
    """Coordinates of `v` in the sketch, and the rest of it."""
    inside = tree.rows_dot(state.vectors, v).astype(state.values.dtype)
    return inside, tree.sub(v, tree.rows_sum(inside, state.vectors))


def _apply(state: Sketch, v: PyTree, *, rho: Any) -> PyTree:
    rho = jnp.asarray(rho, state.values.dtype)
    inside, outside = _split(state, v)
    lowest = state.values[0] + rho
    return tree.add(tree.rows_sum(inside * (lowest / (state.values + rho)), state.vectors), outside)


def _nystrom(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree = None,
    *,
    rank: int,
    rho: Any,
    key: Any,
) -> tuple[PyTree, LinearInfo]:
    b, x0 = _common.prepare(b, x0)
    state = _refresh(matvec, _init(b, rank=rank, key=key))
    rho = jnp.asarray(rho, state.values.dtype)
    inside, outside = _split(state, b)
    x = tree.rows_sum(inside / (state.values + rho), state.vectors)
    complete = state.values.shape[0] == tree.size(b)
    x = x if complete else tree.axpy(1 / rho, outside, x)
    x = tree.where(state.code == 0, x, x0)
    residual = _common.relative(tree.norm(tree.sub(b, matvec(x))), tree.norm(b))
    worse = (state.code != 0) & (residual > 1)  # a start worse than zero
    x, residual = tree.where(worse, tree.zeros_like(x), x), jnp.where(worse, 1, residual)
    return x, _common.info(_cost(b, rank=rank) + 1, residual, state.code)
