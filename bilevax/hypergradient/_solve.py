"""What every method does first: run the lower level without differentiating it, and say how that
went.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax.base import Feed, Hypergradient, InnerSolver, InnerState, Lower, PyTree, Scalar
from bilevax.results import RESULTS, as_warning, unless, warning, worst


def summary(inner_info: dict[str, Scalar], solution: InnerState) -> dict[str, Scalar]:
    """The info of a solve in scalars: last value, last gradient's norm, iterations and evaluations
    in all, and a code that knows divergence.

    The objective's aux, where the solver hands it on, is that of the last step.
    A solver that stopped short of its tolerance says so in the mask ``warnings``.

    ``inner_grad_norm`` is that of the last gradient that the solver took, where it reports one. A
    method that evaluates the gradient at the solution itself puts that norm in its place.
    """
    out = {"inner_value": inner_info["value"][-1]}
    if "grad_norm" in inner_info:
        out["inner_grad_norm"] = inner_info["grad_norm"][-1]
    for name in ("iterations", "evaluations"):
        if name in inner_info:
            out[f"inner_{name}"] = jnp.sum(inner_info[name])
    if "aux" in inner_info:
        out["inner_aux"] = jax.tree.map(lambda a: a[-1], inner_info["aux"])
    code = unless(tree.all_finite(solution.params), RESULTS.inner_nonfinite)
    warnings = jnp.int32(0)
    if "code" in inner_info:
        said, warnings = as_warning(inner_info["code"][-1])
        code = worst(said, code)
    return {**out, "code": code, "warnings": warnings}


def forward_with(
    lower: Lower, inner_state: InnerState, outer: PyTree, feed: Feed
) -> tuple[InnerState, dict[str, Scalar], PyTree]:
    """Solve the lower level; nothing of it is differentiated. With the multipliers of its
    constraints, None where it has none.
    """
    inner_state, outer, feed = lax.stop_gradient((inner_state, outer, feed))
    solution, info = lax.stop_gradient(lower.run(inner_state, outer, feed))
    multipliers = (
        jax.tree.map(lambda a: a[-1], info["multipliers"]) if "multipliers" in info else None
    )
    return solution, summary(info, solution), multipliers


def forward(
    lower: Lower, inner_state: InnerState, outer: PyTree, feed: Feed
) -> tuple[InnerState, dict[str, Scalar]]:
    """Solve the lower level; nothing of it is differentiated. For methods that know nothing of
    constraints, which are told of here.
    """
    solution, info, _ = forward_with(lower, inner_state, outer, feed)
    held = warning(lower.solver.constraints is not None, RESULTS.not_stationary)
    return solution, {**info, "warnings": info["warnings"] | held}


def over(method: Hypergradient, solver: InnerSolver) -> Hypergradient:
    """`method` over `solver`: what assumes a stationary point has no second derivative at a
    mapping's fixed point, or under constraints.
    """
    plain = solver.optimality is None and solver.constraints is None
    return method if plain or method.linear is None else method._replace(order=1, linear=None)
