"""Any optimistix minimiser as an inner solver."""

from __future__ import annotations

from typing import Any

from bilevax import base
from bilevax._core import numbers
from bilevax.base import PyTree, Scalar
from bilevax.inner._adapter import ended, lenient, own_rules


def optimistix(solver: Any, *, maxiter: int = 256) -> base.InnerSolver:
    """Solve the lower level with an optimistix minimiser (``pip install bilevax[optimistix]``).

    Each solve starts at the last inner parameters and with fresh solver state; the hypergradient method differentiates, not optimistix.

    Args:
      solver: an optimistix minimiser: ``optimistix.BFGS(rtol=1e-6, atol=1e-6)``. Its tolerances are leaves.
      maxiter: most steps in one solve.

    Returns:
      An `InnerSolver` of one step, not reversible. Its info has ``value`` (at the start), ``grad_norm`` (at the end), ``iterations`` and ``code``
      (inner_not_converged where optimistix reports anything but success).

    Raises:
      ImportError: if optimistix is not installed.
      TypeError, ValueError: if `solver` is not a minimiser, or `maxiter` not an int of at least 1.

    Examples:
      >>> import jax.numpy as jnp, optimistix, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.optimistix(optimistix.BFGS(rtol=1e-5, atol=1e-5))
      >>> g = bx.objective(lambda y, x, batch: jnp.sum(jnp.cosh(y - x)))
      >>> state, info = solver.step(g, base.InnerState(jnp.zeros(3)), jnp.ones(3), base.Ctx())
      >>> bool(jnp.allclose(state.params, 1.0, atol=1e-3)), int(info["code"])
      (True, 0)

    References:
      Rader, Lyons and Kidger, Optimistix: modular optimisation in JAX and Equinox, 2024.
    """
    library = _library()
    if not isinstance(solver, library.AbstractMinimiser):
        residual = (library.AbstractLeastSquaresSolver, library.AbstractRootFinder, library.AbstractFixedPointSolver)
        why = ", which takes residuals or a mapping and not an objective" if isinstance(solver, residual) else ""
        how = " on the sum of the squared residuals, or inner.fixed_point(mapping)" if why else ""
        raise TypeError(
            f"solver: got {type(solver).__name__}{why}; expected an optimistix minimiser. Try optimistix.BFGS(rtol=1e-6, atol=1e-6){how}."
        )
    maxiter = numbers.count(maxiter, "maxiter")
    name = f"optimistix.{type(solver).__name__}"
    return base.InnerSolver(base.Bound("init", _init), base.Bound(name, _solve, solver=solver, maxiter=maxiter), 1, None, False)


def _library() -> Any:
    try:
        import optimistix
    except ImportError as error:
        raise ImportError("inner.optimistix needs the package optimistix. Install it with: pip install 'bilevax[optimistix]'") from error
    return optimistix


def _init(params: PyTree) -> tuple[Any, ...]:
    return ()


def _solve(
    objective: base.Objective, state: base.InnerState, outer: PyTree, ctx: base.Ctx, *, solver: Any, maxiter: int
) -> tuple[base.InnerState, dict[str, Scalar]]:
    library = _library()
    value = own_rules(lambda params, args: objective(params, args[0], base.Ctx(*args[1]))[0])
    with lenient():
        found = library.minimise(value, solver, state.params, (outer, tuple(ctx)), max_steps=maxiter, throw=False)
        solved = found.result == library.RESULTS.successful
    return ended(objective, state, found.value, outer, ctx, solved, found.stats["num_steps"])
