"""An optimistix minimiser, least-squares solver or root finder as an inner solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevax import base
from bilevax._core import numbers
from bilevax.base import Objective, PyTree, Scalar
from bilevax.inner._adapter import ended, lenient, own_rules
from bilevax.inner._residual import agreed, as_residual, as_vector, flat


def optimistix(
    solver: Any, *, residual: Callable[..., Any] | None = None, maxiter: int = 256
) -> base.InnerSolver:
    """Solve the lower level with an optimistix minimiser, least-squares solver or root finder
    (``pip install bilevax[optimistix]``).

    Each solve starts at the last inner parameters and with fresh solver state; the hypergradient
    method differentiates, not optimistix.

    Args:
      solver: an optimistix minimiser: ``optimistix.BFGS(rtol=1e-6, atol=1e-6)``; or one that takes
        residuals: ``optimistix.LevenbergMarquardt``, ``GaussNewton``, ``Newton``, ``Chord``. Its
        tolerances are leaves.
      residual: ``(inner_params, outer_params, batch) -> array or pytree``, for the latter: what is
        brought to zero, or as near as least squares come. The inner objective is the sum of its
        squares, up to a factor; where it is another function, the code is not_stationary. For a
        root finder it has as many entries as the inner parameters.
      maxiter: most steps in one solve.

    Returns:
      An `InnerSolver` of one step, not reversible. Its info has ``value`` (at the start),
      ``grad_norm`` (at the end), ``iterations`` and ``code`` (inner_not_converged where optimistix
      reports anything but success).

    Raises:
      ImportError: if optimistix is not installed.
      TypeError, ValueError: if `solver` is of another kind, `residual` missing or not wanted, or
        `maxiter` not an int of at least 1.

    Examples:
      >>> import jax.numpy as jnp, optimistix, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.optimistix(optimistix.BFGS(rtol=1e-5, atol=1e-5))
      >>> g = bx.objective(lambda y, x, batch: jnp.sum(jnp.cosh(y - x)))
      >>> state, info = solver.step(g, base.InnerState(jnp.zeros(3)), jnp.ones(3), base.Ctx())
      >>> bool(jnp.allclose(state.params, 1.0, atol=1e-3)), int(info["code"])
      (True, 0)

    Source: Rader, Lyons and Kidger, Optimistix: modular optimisation in JAX and Equinox, 2024.
    """
    library = _library()
    kinds = {
        library.AbstractMinimiser: library.minimise,
        library.AbstractLeastSquaresSolver: library.least_squares,
        library.AbstractRootFinder: library.root_find,
    }
    kind = next((kind for kind in kinds if isinstance(solver, kind)), None)
    if kind is None:
        how = (
            " Try inner.fixed_point(mapping)."
            if isinstance(solver, library.AbstractFixedPointSolver)
            else ""
        )
        raise TypeError(
            f"solver: got {type(solver).__name__}; expected an optimistix minimiser, least-squares "
            "solver or root finder, such as "
            f"optimistix.BFGS(rtol=1e-6, atol=1e-6).{how}"
        )
    residual = as_residual(
        residual, f"optimistix.{type(solver).__name__}", kind is not library.AbstractMinimiser
    )
    maxiter = numbers.count(maxiter, "maxiter")
    name = f"optimistix.{type(solver).__name__}"
    settings = dict(solver=solver, maxiter=maxiter, residual=residual, run=kinds[kind])
    return base.InnerSolver(
        base.Bound("init", _init), base.Bound(name, _solve, **settings), 1, None, False
    )


def _library() -> Any:
    try:
        import optimistix
    except ImportError as error:
        raise ImportError(
            "inner.optimistix needs the package optimistix. Install it with: pip install "
            "'bilevax[optimistix]'"
        ) from error
    return optimistix


def _init(params: PyTree) -> tuple[Any, ...]:
    return ()


def _solve(
    objective: base.Objective,
    state: base.InnerState,
    outer: PyTree,
    ctx: base.Ctx,
    *,
    solver: Any,
    maxiter: int,
    residual: Objective | None,
    run: Callable[..., Any],
) -> tuple[base.InnerState, dict[str, Scalar]]:
    library, (start, back) = _library(), as_vector(residual, state.params)
    if residual is None:
        value = own_rules(lambda params, args: objective(params, args[0], base.Ctx(*args[1]))[0])
    else:
        value = own_rules(
            lambda params, args: flat(
                residual, objective, back(params), args[0], base.Ctx(*args[1])
            )
        )
    with lenient():
        found = run(value, solver, start, (outer, tuple(ctx)), max_steps=maxiter, throw=False)
        solved = found.result == library.RESULTS.successful
    end, info = ended(
        objective, state, back(found.value), outer, ctx, solved, found.stats["num_steps"]
    )
    return end, agreed(residual, objective, state.params, outer, ctx, info)
