"""A jaxopt minimiser as an inner solver."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import base, tree
from bilevax._core import numbers
from bilevax.base import Ctx, Objective, PyTree, Scalar
from bilevax.inner import _tolerance as tolerance
from bilevax.inner._adapter import ended, lenient, own_rules
from bilevax.inner._residual import agreed, as_residual, as_vector, flat


def jaxopt(
    solver: Any, *, residual: Callable[..., Any] | None = None, **settings: Any
) -> base.InnerSolver:
    """Solve the lower level with a jaxopt solver, given as its class and keyword arguments.

    jaxopt binds the objective when a solver is built, so the solver is built inside, with the lower
    level's objective and with jaxopt's own differentiation off: the hypergradient method
    differentiates here. Each solve starts at the last inner parameters and with fresh solver state.

    Args:
      solver: a jaxopt class that minimises ``fun``: ``jaxopt.LBFGS``, ``BFGS``, ``NonlinearCG``,
        ``GradientDescent``, ``ProximalGradient``, ``ProjectedGradient``, ``MirrorDescent``; or one
        that takes residuals: ``jaxopt.GaussNewton``, ``LevenbergMarquardt``, ``Broyden``.
      residual: ``(inner_params, outer_params, batch) -> array or pytree``, for the latter: what is
        brought to zero, or as near as least squares come. The inner objective is the sum of its
        squares, up to a factor; where it is another function, the code is not_stationary.
      **settings: its arguments but ``fun``, ``has_aux``, ``value_and_grad``, ``implicit_diff`` and
        ``unroll``; ``maxiter`` and ``tol`` above all. What its ``run`` takes beside the parameters
        goes here too: ``hyperparams_prox``, ``hyperparams_proj``, ``bounds``. These are constants;
        for those that outer parameters move, take ``inner.fixed_point`` of ``inner.proximal_map``.
        Floats are leaves.

    Returns:
      An `InnerSolver` of one step, not reversible. Solutions of a projected, proximal or bounded
      solver are fixed points of that step, which ``hypergradient.implicit`` then differentiates.
      Its info has ``value`` (at the start), ``grad_norm`` (at the end; jaxopt's own optimality
      error where there is a ``prox`` or ``projection``), ``iterations`` and ``code``:
      inner_not_converged where the error is above its ``tol``.

    Raises:
      TypeError: if `solver` is not a jaxopt class, or has no such argument; for a `residual` that
        is missing or not wanted; for jaxopt's SciPy wrappers, quadratic programs and other root
        solvers, which do not minimise ``fun`` in compiled code.

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

    Source: Blondel et al., Efficient and modular implicit differentiation, 2022 (jaxopt).
    """
    _refused(solver)
    if not inspect.isclass(solver) or not (
        hasattr(solver, "init_state") and hasattr(solver, "run")
    ):
        raise TypeError(
            f"solver: got {numbers.describe(solver)}; expected a jaxopt class and its keyword "
            "arguments. Try inner.jaxopt(jaxopt.LBFGS, maxiter=100)."
        )
    taken = inspect.signature(solver).parameters
    solves_residuals = _takes_residuals(solver)
    residual = as_residual(residual, f"jaxopt.{solver.__name__}", solves_residuals)
    if "fun" not in taken and not solves_residuals:
        raise TypeError(
            f"solver: {solver.__name__} has no argument fun; expected a solver that minimises an "
            "objective, such as jaxopt.LBFGS."
        )
    ours = [
        name
        for name in ("fun", "residual_fun", "has_aux", "value_and_grad", "implicit_diff", "unroll")
        if name in settings
    ]
    if ours:
        raise TypeError(f"{ours[0]}: is set by bilevax; leave it out.")
    run_names = set(inspect.signature(solver.init_state).parameters) - {
        "self",
        "init_params",
        "args",
        "kwargs",
    }
    unknown = [name for name in settings if name not in taken and name not in run_names]
    if unknown:
        known = ", ".join(sorted(set(taken) - {"fun", "residual_fun"}))
        raise TypeError(
            f"{unknown[0]}: is no argument of jaxopt.{solver.__name__}; expected some of {known}."
        )
    if "maxiter" in settings:
        settings["maxiter"] = numbers.count(settings["maxiter"], "maxiter")
    if "tol" in settings:
        settings["tol"] = numbers.positive(settings["tol"], "tol", example=1e-6)
    runtime = {name: settings.pop(name) for name in list(settings) if name not in taken}
    return base.InnerSolver(
        init=base.Bound("init", _init),
        step=base.Bound(
            f"jaxopt.{solver.__name__}",
            _solve,
            solver=solver,
            settings=settings,
            runtime=runtime,
            residual=residual,
        ),
        steps=1,
        update=None,
        reversible=False,
        optimality=_optimality(settings, runtime),
    )


def _refused(solver: Any) -> None:
    """The jaxopt classes that are no minimiser of ``fun(params)`` in compiled code, each with what
    takes its place.
    """
    a_class = inspect.isclass(solver) and solver.__module__ != "builtins"
    name = getattr(solver, "__name__", "")
    taken = inspect.signature(solver).parameters if a_class else {}
    if name.startswith("Scipy"):
        raise TypeError(
            f"solver: got jaxopt.{name}, which runs SciPy on the host; expected a solver in JAX. "
            "Try jaxopt.LBFGS."
        )
    if "matvec_A" in taken:
        raise TypeError(
            f"solver: got jaxopt.{name}, which solves quadratic programs given by their matrices; "
            "expected a minimiser of the objective. Try "
            "jaxopt.LBFGSB for bounds, inner.fixed_point(inner.proximal_map(...)) for a set with a "
            "projection."
        )
    if "block_prox" in taken:
        raise TypeError(
            f"solver: got jaxopt.{name}, which takes an objective composed of a linear map; "
            "expected a minimiser of any objective. Try "
            "jaxopt.ProximalGradient with its prox."
        )
    if any(each in taken for each in ("optimality_fun", "fixed_point_fun")):
        raise TypeError(
            f"solver: got jaxopt.{name}, which solves equations of another form; expected a "
            "minimiser of the objective. Try jaxopt.Broyden with "
            "residual=, or inner.fixed_point(mapping) with hypergradient.fixed_point()."
        )


def _takes_residuals(solver: Any) -> bool:
    return "residual_fun" in inspect.signature(solver).parameters or solver.__name__ == "Broyden"


def _optimality(settings: dict[Any, Any], runtime: dict[Any, Any]) -> base.Bound | None:
    """The mapping whose fixed points the solutions of a projected, proximal or bounded solver
    are.
    """
    if settings.get("prox") is not None:
        return base.Bound(
            "prox", _prox_step, prox=settings["prox"], hyperparams=runtime.get("hyperparams_prox")
        )
    if settings.get("projection") is not None:
        return base.Bound(
            "projection",
            _projected_step,
            projection=settings["projection"],
            hyperparams=runtime.get("hyperparams_proj"),
        )
    if settings.get("projection_grad") is not None:
        return base.Bound(
            "mirror",
            _mirror_step,
            projection_grad=settings["projection_grad"],
            hyperparams=runtime.get("hyperparams_proj"),
        )
    if runtime.get("bounds") is not None:
        return base.Bound(
            "bounds", _projected_step, projection=_clip, hyperparams=runtime["bounds"]
        )
    return None


def _clip(params: PyTree, bounds: tuple[Any, ...]) -> PyTree:
    return jax.tree.map(jnp.clip, params, *bounds)


def _descent(objective: Objective, params: PyTree, outer: PyTree, ctx: base.Ctx) -> PyTree:
    return tree.sub(params, jax.grad(objective, has_aux=True)(params, outer, ctx)[0])


def _prox_step(
    objective: Objective, params: PyTree, outer: PyTree, ctx: Ctx, *, prox: Any, hyperparams: Any
) -> Any:
    with _lenient():
        return prox(_descent(objective, params, outer, ctx), hyperparams, 1.0)


def _projected_step(
    objective: Objective,
    params: PyTree,
    outer: PyTree,
    ctx: Ctx,
    *,
    projection: Any,
    hyperparams: Any,
) -> Any:
    with _lenient():
        return projection(_descent(objective, params, outer, ctx), hyperparams)


def _mirror_step(
    objective: Objective,
    params: PyTree,
    outer: PyTree,
    ctx: Ctx,
    *,
    projection_grad: Any,
    hyperparams: Any,
) -> PyTree:
    with _lenient():
        return projection_grad(
            params, jax.grad(objective, has_aux=True)(params, outer, ctx)[0], 1.0, hyperparams
        )


def _init(params: PyTree) -> tuple[Any, ...]:
    return ()


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """What jaxopt needs: it mixes dtypes and ranks on its own, and warns of its age; none of that
    is the user's doing.
    """
    with warnings.catch_warnings(), lenient():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _solve(
    objective: base.Objective,
    state: base.InnerState,
    outer: PyTree,
    ctx: base.Ctx,
    *,
    solver: Any,
    settings: dict[Any, Any],
    runtime: dict[Any, Any],
    residual: Objective | None,
) -> tuple[base.InnerState, dict[str, Scalar]]:
    start, back = as_vector(residual, state.params)
    if residual is None:
        value = own_rules(lambda params, outer, ctx: objective(params, outer, ctx)[0])
    else:
        value = own_rules(
            lambda params, outer, ctx: flat(residual, objective, back(params), outer, ctx)
        )
    taken = inspect.signature(solver).parameters
    off = {name: False for name in ("implicit_diff", "unroll") if name in taken}
    with _lenient():
        built = solver(
            **{"residual_fun" if "residual_fun" in taken else "fun": value}, **settings, **off
        )
        params, inside = built.run(start, **runtime, outer=outer, ctx=ctx)
    error = jnp.asarray(inside.error).astype(tolerance.scalar_dtype(state.params))
    constrained = any(name in taken for name in ("prox", "projection", "projection_grad"))
    said = {"grad_norm": error} if constrained else {}
    solved = error <= jnp.asarray(built.tol).astype(error.dtype)
    end, info = ended(objective, state, back(params), outer, ctx, solved, inside.iter_num, **said)
    return end, agreed(residual, objective, state.params, outer, ctx, info)
