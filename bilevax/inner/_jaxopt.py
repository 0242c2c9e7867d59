"""A jaxopt minimiser as an inner solver."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import base, tree
from bilevax._core import numbers
from bilevax.base import Ctx, Objective, PyTree, Scalar
from bilevax.inner import _tolerance as tolerance
from bilevax.inner._adapter import ended, lenient, own_rules


def jaxopt(solver: Any, **settings: Any) -> base.InnerSolver:
    """Solve the lower level with a jaxopt solver, given as its class and keyword arguments.

    jaxopt binds the objective when a solver is built, so the solver is built inside, with the lower level's objective and with jaxopt's own
    differentiation off: the hypergradient method differentiates here. Each solve starts at the last inner parameters and with fresh solver state.

    Args:
      solver: a jaxopt class that minimises ``fun``: ``jaxopt.LBFGS``, ``BFGS``, ``NonlinearCG``, ``GradientDescent``, ``ProximalGradient``,
        ``ProjectedGradient``.
      **settings: its arguments but ``fun``, ``has_aux``, ``value_and_grad``, ``implicit_diff`` and ``unroll``; ``maxiter`` and ``tol`` above
        all. What its ``run`` takes beside the parameters goes here too: ``hyperparams_prox``, ``hyperparams_proj``, ``bounds``. These are
        constants; for those that outer parameters move, take ``inner.fixed_point`` of ``inner.proximal_map``. Floats are leaves.

    Returns:
      An `InnerSolver` of one step, not reversible. Solutions of a projected, proximal or bounded solver are fixed points of that step, which
      ``hypergradient.implicit`` then differentiates. Its info has ``value`` (at the start), ``grad_norm`` (at the end; jaxopt's own optimality
      error where there is a ``prox`` or ``projection``), ``iterations`` and ``code``: inner_not_converged where the error is above its ``tol``.

    Raises:
      TypeError: if `solver` is not a jaxopt class, or has no such argument; for jaxopt's SciPy wrappers, quadratic programs, least-squares and
        root solvers, which do not minimise ``fun`` in compiled code.

    Examples:
      >>> import warnings
      >>> warnings.simplefilter("ignore", DeprecationWarning)
      >>> import jax.numpy as jnp, jaxopt, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.jaxopt(jaxopt.LBFGS, maxiter=50, tol=1e-4)
      >>> g = bx.objective(lambda y, x, batch: jnp.sum(jnp.cosh(y - x)))
      >>> state, info = solver.step(g, base.InnerState(jnp.zeros(3)), jnp.ones(3), base.Ctx())
      >>> bool(jnp.allclose(state.params, 1.0, atol=1e-3)), int(info["code"])
      (True, 0)

    References:
      Blondel et al., Efficient and modular implicit differentiation, 2022 (jaxopt).
    """
    _refused(solver)
    if not inspect.isclass(solver) or not (hasattr(solver, "init_state") and hasattr(solver, "run")):
        raise TypeError(f"solver: got {solver!r}; expected a jaxopt class and its keyword arguments. Try inner.jaxopt(jaxopt.LBFGS, maxiter=100).")
    taken = inspect.signature(solver).parameters
    if "fun" not in taken:
        raise TypeError(f"solver: {solver.__name__} has no argument fun; expected a solver that minimises an objective, such as jaxopt.LBFGS.")
    ours = [name for name in ("fun", "has_aux", "value_and_grad", "implicit_diff", "unroll") if name in settings]
    if ours:
        raise TypeError(f"{ours[0]}: is set by bilevax; leave it out.")
    run_names = set(inspect.signature(solver.init_state).parameters) - {"self", "init_params", "args", "kwargs"}
    unknown = [name for name in settings if name not in taken and name not in run_names]
    if unknown:
        raise TypeError(f"{unknown[0]}: is no argument of jaxopt.{solver.__name__}; expected some of {', '.join(sorted(set(taken) - {'fun'}))}.")
    if "maxiter" in settings:
        settings["maxiter"] = numbers.count(settings["maxiter"], "maxiter")
    if "tol" in settings:
        settings["tol"] = numbers.positive(settings["tol"], "tol", example=1e-6)
    runtime = {name: settings.pop(name) for name in list(settings) if name not in taken}
    return base.InnerSolver(
        init=base.Bound("init", _init),
        step=base.Bound(f"jaxopt.{solver.__name__}", _solve, solver=solver, settings=settings, runtime=runtime),
        steps=1,
        update=None,
        reversible=False,
        optimality=_optimality(settings, runtime),
    )


def _refused(solver: Any) -> None:
    """The jaxopt classes that are no minimiser of ``fun(params)`` in compiled code, each with what takes its place."""
    name, taken = getattr(solver, "__name__", ""), inspect.signature(solver).parameters if inspect.isclass(solver) else {}
    if name.startswith("Scipy"):
        raise TypeError(f"solver: got jaxopt.{name}, which runs SciPy on the host; expected a solver in JAX. Try jaxopt.LBFGS.")
    if "matvec_A" in taken:
        raise TypeError(
            f"solver: got jaxopt.{name}, which solves quadratic programs given by their matrices; expected a minimiser of the objective. Try "
            "jaxopt.LBFGSB for bounds, inner.fixed_point(inner.proximal_map(...)) for a set with a projection."
        )
    if "residual_fun" in taken:
        raise TypeError(
            f"solver: got jaxopt.{name}, which takes a vector of residuals; expected a minimiser of the objective. Try jaxopt.LBFGS on the sum of "
            "their squares."
        )
    if any(each in taken for each in ("optimality_fun", "fixed_point_fun")) or name == "Broyden":
        raise TypeError(
            f"solver: got jaxopt.{name}, which solves equations; expected a minimiser of the objective. Try jaxopt.LBFGS on the sum of the squared "
            "residuals, or inner.fixed_point(mapping) with hypergradient.fixed_point()."
        )


def _optimality(settings: dict[Any, Any], runtime: dict[Any, Any]) -> base.Bound | None:
    """The mapping whose fixed points the solutions of a projected, proximal or bounded solver are."""
    if settings.get("prox") is not None:
        return base.Bound("prox", _prox_step, prox=settings["prox"], hyperparams=runtime.get("hyperparams_prox"))
    if settings.get("projection") is not None:
        return base.Bound("projection", _projected_step, projection=settings["projection"], hyperparams=runtime.get("hyperparams_proj"))
    if runtime.get("bounds") is not None:
        return base.Bound("bounds", _projected_step, projection=_clip, hyperparams=runtime["bounds"])
    return None


def _clip(params: PyTree, bounds: tuple[Any, ...]) -> PyTree:
    return jax.tree.map(jnp.clip, params, *bounds)


def _descent(objective: Objective, params: PyTree, outer: PyTree, ctx: base.Ctx) -> PyTree:
    return tree.sub(params, jax.grad(objective, has_aux=True)(params, outer, ctx)[0])


def _prox_step(objective: Objective, params: PyTree, outer: PyTree, ctx: Ctx, *, prox: Any, hyperparams: Any) -> Any:
    with _lenient():
        return prox(_descent(objective, params, outer, ctx), hyperparams, 1.0)


def _projected_step(objective: Objective, params: PyTree, outer: PyTree, ctx: Ctx, *, projection: Any, hyperparams: Any) -> Any:
    with _lenient():
        return projection(_descent(objective, params, outer, ctx), hyperparams)


def _init(params: PyTree) -> tuple[Any, ...]:
    return ()


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """What jaxopt needs: it mixes dtypes and ranks on its own, and warns of its age; none of that is the user's doing."""
    with warnings.catch_warnings(), lenient():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _solve(
    objective: base.Objective, state: base.InnerState, outer: PyTree, ctx: base.Ctx, *, solver: Any, settings: dict[Any, Any], runtime: dict[Any, Any]
) -> tuple[base.InnerState, dict[str, Scalar]]:
    value = own_rules(lambda params, outer, ctx: objective(params, outer, ctx)[0])
    taken = inspect.signature(solver).parameters
    off = {name: False for name in ("implicit_diff", "unroll") if name in taken}
    with _lenient():
        built = solver(fun=value, **settings, **off)
        params, inside = built.run(state.params, **runtime, outer=outer, ctx=ctx)
    error = jnp.asarray(inside.error).astype(tolerance.scalar_dtype(state.params))
    constrained = any(name in taken for name in ("prox", "projection"))
    said = {"grad_norm": error} if constrained else {}
    return ended(objective, state, params, outer, ctx, error <= jnp.asarray(built.tol).astype(error.dtype), inside.iter_num, **said)
