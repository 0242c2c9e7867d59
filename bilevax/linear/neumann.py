"""The truncated Neumann series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.base import Bound, Linear, PyTree
from bilevax.linear import _common
from bilevax.linear.preconditioner import Preconditioner, checked, started

# enough to be within a factor 2 of the largest of a million eigenvalues, which is what convergence
# asks for
_POWER_STEPS = 10


def neumann(
    terms: int = 10,
    step: Numeric | None = None,
    *,
    preconditioner: Callable[[PyTree], PyTree] | Preconditioner | Linear | None = None,
) -> Linear:
    r"""The first terms of the Neumann series: the inverse that stochastic bilevel methods estimate.

    .. math::
        x = a \sum_{i < K} (I - a A)^i b, \qquad b - A x = (I - a A)^K b, \qquad
        \text{preconditioned: } x = a \sum_{i < K} (I - a P A)^i P b

    K matvecs, the last of which measures the residual; no starting point is used (`x0` is ignored).
    The series converges for symmetric positive definite A and :math:`0 < a < 2 / \lambda_{max}`.
    Three vectors of memory.

    Args:
      terms: the number K of terms.
      step: the step a. None takes ``1 / λ`` with an estimate λ of the largest eigenvalue of A, or P
        A, by power iteration, 10 matvecs more a solve.
      preconditioner: an approximate inverse P, as for `cg`; with `ekfac` this is ASTRA's iteration.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. A truncation has no tolerance to
      miss: the code is success where the residual is below that of x = 0, ``adjoint_not_converged``
        where it is not (the series diverges), or ``adjoint_nonfinite``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.neumann(2, step=0.5)(
      ...     lambda v: jnp.array([1.0, 2.0]) * v, jnp.array([1.0, 1.0]), jnp.zeros(2)
      ... )
      >>> x.tolist(), int(info.iterations)
      ([0.75, 0.5], 2)

    Source: Lorraine, Vicol and Duvenaud 2020, Optimizing Millions of Hyperparameters by Implicit
    Differentiation, algorithm 3; Wang et al. 2025, Better Training Data Attribution via Better
    Inverse Hessian-Vector Products, for the preconditioned form.
    """
    terms = numbers.count(terms, "terms")
    if step is not None:
        step = numbers.positive(step, "step", example=0.1)
    return Linear(
        Bound("neumann", _neumann, terms=_common.Size(terms), step=step),
        products=terms + (_POWER_STEPS if step is None else 0),
        approximate=True,
        preconditioner=checked(preconditioner),
    )


def largest_eigenvalue(
    matvec: Callable[[PyTree], PyTree], like: Any, steps: int = _POWER_STEPS
) -> Any:
    """An estimate from below of the largest absolute eigenvalue of a symmetric operator, by power
    iteration from a fixed random vector.
    """
    v = tree.add(
        tree.normal_like(jax.random.key(0), like), tree.zeros_like(like)
    )  # the sum has the sharding of `like`

    def body(_, carry):
        v, size = carry
        v = matvec(tree.scale(1 / jnp.where(size > 0, size, 1), v))
        return v, tree.norm(v)

    return lax.fori_loop(0, steps, body, (v, tree.norm(v)))[1]


def _neumann(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree = None,
    *,
    terms: int,
    step: Any,
    preconditioner: Any = None,
) -> Any:
    b, _ = _common.prepare(b, b)
    b_norm = tree.norm(b)
    inverse, cost = started(preconditioner, matvec, b)
    inverse = inverse or (lambda v: v)
    cost += int(terms)
    if step is None:
        size = largest_eigenvalue(lambda v: inverse(matvec(v)), b)
        step = 1 / jnp.where(size > 0, size, 1)
        cost += _POWER_STEPS
    step = jnp.asarray(step, b_norm.dtype)

    last = int(terms) - 1

    def body(i, carry):
        # The last product is of x itself: it costs what the identity b - Ax = (I - aA)^K b would,
        # which hides rounding.
        p, total = carry
        product = matvec(p)
        product = (
            product if preconditioner is None else tree.where(i == last, product, inverse(product))
        )
        r = tree.axpy(-jnp.where(i == last, 1, step), product, tree.where(i == last, b, p))
        total = tree.where(i == last, total, tree.add(total, r))
        return tree.where(i == last - 1, tree.scale(step, total), r), total

    first = inverse(b)
    r, total = lax.fori_loop(0, last + 1, body, (first if last else tree.scale(step, first), first))
    return tree.scale(step, total), _common.info(
        cost, _common.relative(tree.norm(r), b_norm), jnp.int32(0)
    )
