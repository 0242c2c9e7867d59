"""For a method of your own: a problem with an exact answer, and the checks that every method of the
library passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax import check
from bilevax._core import numbers
from bilevax._core.showing import tidy
from bilevax._core.types import Key
from bilevax.base import Hypergradient, InnerSolver, PyTree
from bilevax.estimate import value_and_hypergrad
from bilevax.inner import optax as optax_solver
from bilevax.results import RESULTS


class Quadratic(NamedTuple):
    """``g = ½y'Ay + x'Cy + a'y`` and ``f = ½y'Fy + ½x'x``, with ``y*(x) = −A⁻¹(a + C'x)``; the
    inner parameters are a dict of two leaves.

    Attributes:
      inner_objective: ``g(inner_params, outer_params, batch)``.
      outer_objective: ``f(inner_params, outer_params, batch)``.
      inner_params: where to begin below.
      outer_params: where to begin above.
      solution: ``outer_params -> inner_params``, the best response.
      hypergradient: ``outer_params -> `` the exact hypergradient.
      largest: the largest eigenvalue of ``A``, whose smallest is 1.
    """

    inner_objective: Callable[..., Any]
    outer_objective: Callable[..., Any]
    inner_params: PyTree
    outer_params: PyTree
    solution: Callable[[PyTree], PyTree]
    hypergradient: Callable[[PyTree], PyTree]
    largest: float


def quadratic(
    key: Key,
    *,
    inner_size: int = 6,
    outer_size: int = 4,
    condition: float = 3.0,
    dtype: Any = float,
) -> Quadratic:
    """A random quadratic bilevel problem whose hypergradient is known.

    Args:
      key: PRNG key.
      inner_size: number of inner parameters, at least 2.
      outer_size: number of outer parameters.
      condition: condition number of the inner Hessian.
      dtype: of all parameters.

    Returns:
      A `Quadratic`.

    Raises:
      ValueError: for sizes too small, or ``condition < 1``.

    Examples:
      >>> import jax, bilevax as bx
      >>> problem = bx.testing.quadratic(jax.random.key(0))
      >>> bx.value_and_hypergrad(
      ...     problem.inner_objective,
      ...     problem.outer_objective,
      ...     solver=bx.inner.lbfgs(tol=1e-5),
      ...     hypergradient=bx.hypergradient.implicit(),
      ... )(problem.inner_params, problem.outer_params).grad.shape
      (4,)
    """
    if numbers.count(inner_size, "inner_size") < 2:
        raise ValueError(f"inner_size: got {inner_size}; expected at least 2.")
    numbers.count(outer_size, "outer_size")
    condition = numbers.positive(condition, "condition", example=3.0)
    if condition < 1:
        raise ValueError(f"condition: got {condition}; expected at least 1.")
    numbers.key(key)
    dtype = numbers.floating(dtype, "dtype")
    keys = jax.random.split(key, 6)
    basis, _ = jnp.linalg.qr(jax.random.normal(keys[0], (inner_size, inner_size), dtype))
    hessian = (basis * jnp.linspace(1, condition, inner_size, dtype=basis.dtype)[None, :]) @ basis.T
    cross = jax.random.normal(keys[1], (outer_size, inner_size), dtype)
    linear = jax.random.normal(keys[2], (inner_size,), dtype)
    root = jax.random.normal(keys[3], (inner_size, inner_size), dtype) / jnp.asarray(
        inner_size**0.5, dtype
    )
    weight = root @ root.T
    head = inner_size // 2

    def flat(y):
        return jnp.concatenate([y["head"], y["tail"]])

    def parts(y):
        return {"head": y[:head], "tail": y[head:]}

    def inner_objective(y, x, batch):
        y = flat(y)
        return 0.5 * y @ (hessian @ y) + x @ (cross @ y) + linear @ y

    def outer_objective(y, x, batch):
        y = flat(y)
        return 0.5 * y @ (weight @ y) + 0.5 * x @ x

    def solution(x):
        return parts(-jnp.linalg.solve(hessian, linear + cross.T @ x))

    def hypergradient(x):
        return x - cross @ jnp.linalg.solve(hessian, weight @ flat(solution(x)))

    start = parts(jax.random.normal(keys[4], (inner_size,), dtype))
    return Quadratic(
        inner_objective,
        outer_objective,
        start,
        jax.random.normal(keys[5], (outer_size,), dtype),
        solution,
        hypergradient,
        float(condition),
    )


def check_method(
    method: Hypergradient,
    solver: InnerSolver | None = None,
    *,
    exact: bool = True,
    rtol: float = 1e-3,
) -> None:
    """What is asked of every hypergradient method, asked of yours.

    On a `quadratic`: the shapes, dtypes and structure of what it returns; `jax.jit` and `jax.vmap`;
    that a second call with other values does not trace again; that an outer objective without inner
    parameters gives its own gradient; and, if `exact`, the hypergradient itself.

    Args:
      method: a `Hypergradient`.
      solver: the inner solver that it is asked with; by default 200 steps of gradient descent.
      exact: whether it claims to be exact. A first-order method does not.
      rtol: relative error that is let pass.

    Raises:
      AssertionError: naming the first thing that is not so.
      TypeError: if `method` is not a `Hypergradient`.

    Examples:
      >>> import bilevax as bx
      >>> bx.testing.check_method(bx.hypergradient.implicit())
    """
    if not isinstance(method, Hypergradient):
        raise TypeError(f"method: got {check.describe(method)}; expected a Hypergradient.")
    exact, rtol = numbers.flag(exact, "exact"), numbers.positive(rtol, "rtol", example=1e-3)
    problem = quadratic(jax.random.key(0))
    solver = optax_solver(optax.sgd(1 / problem.largest), 200) if solver is None else solver
    check.pieces(solver, method)
    traces = 0

    def counted(y, x, batch):
        nonlocal traces
        traces += 1
        return problem.inner_objective(y, x, batch)

    fn = value_and_hypergrad(counted, problem.outer_objective, solver=solver, hypergradient=method)
    jitted = jax.jit(lambda y, x: fn(y, x))
    y, x = problem.inner_params, problem.outer_params
    found = jitted(y, x)
    before = traces
    again = jitted(y, x + 1)
    _require(
        traces == before,
        "a second call with other values traced the objective again: is a number of it static, or "
        "a new function each time?",
    )
    _require(
        jax.tree.structure(found.grad) == jax.tree.structure(x),
        "the gradient has another structure than the outer parameters",
    )
    _require(
        found.grad.shape == x.shape and found.grad.dtype == x.dtype,
        f"the gradient is {found.grad.dtype}{list(found.grad.shape)}",
    )
    _require("code" in found.info, "info has no 'code'")
    _require(
        not RESULTS(int(found.info["code"])).failed,
        f"the method reports {RESULTS(int(found.info['code'])).name} on a well-conditioned "
        "quadratic",
    )
    for name, value in found.info.items():
        _require(
            jnp.ndim(value) == 0,
            f"info[{name!r}] is no scalar, and the history has a column for each",
        )

    stacked = jax.vmap(lambda x: fn(y, x).grad)(jnp.stack([x, x + 1]))
    for one, single in zip(stacked, (found.grad, again.grad), strict=True):
        _require(_error(one, single) < rtol, "vmap and a loop differ")

    plain = value_and_hypergrad(
        problem.inner_objective,
        lambda y, x, batch: jnp.sum(x**2),
        solver=solver,
        hypergradient=method,
    )
    _require(
        _error(jax.jit(plain)(y, x).grad, 2 * x) < rtol,
        "where the outer objective reads no inner parameter, the gradient is not its own",
    )
    if exact:
        for at, got in ((x, found.grad), (x + 1, again.grad)):
            error = _error(got, problem.hypergradient(at))
            _require(error < rtol, f"the hypergradient is wrong by {error:.1e} (relative)")


def _error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected)) / max(float(np.linalg.norm(expected)), 1e-30)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def __dir__() -> list[str]:
    return __all__


__all__ = ["Quadratic", "check_method", "quadratic"]

tidy(sys.modules[__name__])
