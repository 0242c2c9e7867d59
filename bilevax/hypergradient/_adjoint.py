"""What the methods that solve an adjoint system share: refusals, and how a linear solver's word becomes theirs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevax.base import LinearInfo, LinearSolver, Scalar
from bilevax.results import RESULTS, first


def check_settings(linear: Any, max_residual: Any, default: LinearSolver) -> LinearSolver:
    """The linear solver to use."""
    if not isinstance(max_residual, jax.core.Tracer) and not max_residual > 0:
        raise ValueError(f"max_residual: got {max_residual!r}; expected a positive number; jnp.inf accepts any residual.")
    linear = default if linear is None else linear
    if not callable(linear):
        raise TypeError(f"linear: got {linear!r}; expected a solver (matvec, b, x0) -> (x, info), such as linear.cg(maxiter=20).")
    return linear


def report(info: dict[str, Scalar], linear_info: LinearInfo, max_residual, **entries) -> dict[str, Scalar]:
    """The info of a pullback. Only a residual too large to use is a failure: stopping a warm-started solve early is how it is meant to be used."""
    accepted = linear_info.residual <= max_residual
    code = jnp.where(accepted, jnp.int32(RESULTS.success), jnp.maximum(linear_info.code, jnp.int32(RESULTS.adjoint_not_converged)))
    iterations = jnp.asarray(linear_info.iterations, jnp.int32)
    given = {
        "adjoint_iterations": iterations,
        "adjoint_residual": linear_info.residual,
        "gradients": jnp.int32(1),
        "hvps": iterations,
        "mixed_products": jnp.int32(1),
    }
    return {**info, **given, **entries, "code": first(info["code"], code)}
