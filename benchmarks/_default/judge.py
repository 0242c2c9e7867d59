"""What a returned pair of parameters is worth, whatever algorithm returned it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import bilevax as bx
from _default.data import Problem
from bilevax import base

ITERATIONS = {
    False: 3000,
    True: 500,
}  # of the judge's solve; by whether the lower level is a network


@functools.cache
def _solver(network: bool):
    return bx.inner.lbfgs(maxiter=ITERATIONS[network], tol=1e-7)


def judge(problem: Problem, y, x, model=None) -> dict[str, float]:
    """Values of the outer objective.

    ``F``: on held-out data, after the lower level is solved again at `x` to rounding, from its
    start (of a network: from `y`, the branch that the run is on). ``R``, ``RT``: of the returned
    model itself, on held-out and on test data.
    """
    outer = bx.objective(problem.outer)
    value = jax.jit(lambda y, b: outer(y, x, base.Ctx(b, None, model))[0])
    found = {"R": float(value(y, problem.held_out))}
    if problem.test is not None:
        found["RT"] = float(value(y, problem.test))
    if problem.batch is None:
        inner, solver = bx.objective(problem.inner), _solver(problem.network)
        start = y if problem.network else problem.y
        state = base.InnerState(start, solver.init(start))
        solved, _ = jax.jit(lambda s: solver.step(inner, s, x, base.Ctx(problem.train)))(state)
        found["F"] = float(value(solved.params, problem.held_out))
    return {name: v for name, v in found.items() if jnp.isfinite(v)}
