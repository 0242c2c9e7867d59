"""The identity in place of the inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.base import Bound, Linear, LinearInfo, PyTree
from bilevax.linear import _common
from bilevax.results import RESULTS


def identity(scale: Numeric = 1.0) -> Linear:
    r"""The right-hand side itself, scaled: the adjoint of one-step and T1-T2 hypergradients.

    .. math::
        x = a b

    Its one matvec measures the residual, and is dead code in a program that does not read it. `x0`
    is ignored.

    Args:
      scale: the factor a; the inner step size makes x the adjoint of one gradient step.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. The code is success or
      ``adjoint_nonfinite``: how far x is from a solution is what the residual says.

    Raises:
      TypeError, ValueError: for a scale of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.identity(0.5)(lambda v: 4.0 * v, jnp.array([1.0, 2.0]), jnp.zeros(2))
      >>> x.tolist(), float(info.residual)
      ([0.5, 1.0], 1.0)

    Source: Luketina, Berglund, Greff and Raiko 2016, Scalable Gradient-Based Tuning of Continuous
    Regularization Hyperparameters.
    """
    scale = numbers.positive(scale, "scale", example=1.0)
    return Linear(Bound("identity", _identity, scale=scale), products=1, approximate=True)


def _identity(
    matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None, *, scale: Any
) -> Any:
    b, _ = _common.prepare(b, b)
    x = tree.scale(scale, b)
    residual = _common.relative(tree.norm(tree.sub(b, matvec(x))), tree.norm(b))
    code = jnp.where(jnp.isfinite(residual), RESULTS.success, RESULTS.adjoint_nonfinite)
    return x, LinearInfo(jnp.int32(1), residual, code.astype(jnp.int32))
