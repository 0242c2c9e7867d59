"""What a returned pair of parameters is worth, whatever algorithm returned it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevax as bx
from _default.data import Problem
from bilevax import base


def judge(problem: Problem, y, x, model=None) -> dict[str, float]:
    """Values of the outer objective.

    ``F``: on held-out data, at the exact solution of the lower level at `x`, where that is no
    network and its data are not sampled. ``R``, ``RT``: of the returned model itself, on held-out
    and on test data.
    """
    outer = bx.objective(problem.outer)
    value = jax.jit(lambda y, b: outer(y, x, base.Ctx(b, None, model))[0])
    found = {"R": float(value(y, problem.held_out))}
    if problem.test is not None:
        found["RT"] = float(value(y, problem.test))
    if problem.batch is None and not problem.network:
        found["F"] = exact(problem, x)
    return {name: v for name, v in found.items() if jnp.isfinite(v)}


def exact(problem: Problem, x) -> float:
    """The outer objective at the solution of the lower level at `x`: by Newton's method from the
    start, in float64, damped by the Hessian's diagonal; no solver of the library has a hand in it.
    """
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            tree,
        )
        start, unravel = ravel_pytree(wide(problem.y))
        x, train, held_out = wide(x), wide(problem.train), wide(problem.held_out)
        g = lambda v: problem.inner(unravel(v), x, train)
        at = jax.jit(lambda v: (g(v), jax.grad(g)(v), jax.hessian(g)(v)))
        y, damping = np.asarray(start), 1e-3
        value, grad, hessian = map(np.asarray, at(y))
        for _ in range(1000):
            scale = np.sqrt(np.maximum(np.diag(hessian), np.finfo(float).tiny))
            matrix = hessian / np.outer(scale, scale)
            step = -np.linalg.solve(matrix + damping * np.eye(len(y)), grad / scale) / scale
            new = tuple(map(np.asarray, at(y + step)))
            if np.isfinite(new[0]) and new[0] <= value + 1e-15 * abs(value):
                done = damping <= 1e-9 and abs(grad @ step) <= 1e-20 * (1 + abs(value))
                y, (value, grad, hessian), damping = y + step, new, max(damping / 4, 1e-12)
                if done:
                    break
            elif damping < 1e12:
                damping *= 8
            else:
                break
        return float(problem.outer(unravel(jnp.asarray(y)), x, held_out))
