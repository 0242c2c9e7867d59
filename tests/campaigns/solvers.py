"""Solvers to a tolerance on ten kinds of functions from starts up to 1e8 times as far out as the
solution: ``python -m tests.campaigns.solvers``.

Quadratics, powers, exponentials, kinks that are rounded, functions flat far off or far from the
origin, in six unknowns, from forty starts each, in both precisions. A solve that says success must
be near a dense Newton solve: within 1e-4 of its norm in float64 and 2e-2 in float32. The last line
is the summary.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)  # compiled once, run once

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from bilevax import base, inner  # noqa: E402
from bilevax.results import RESULTS  # noqa: E402

N, STARTS = 6, 40
GOALS = {"float32": 2e-2, "float64": 1e-4}
SOLVERS = {
    "gradient_descent": inner.gradient_descent(maxiter=3000),
    "agd": inner.agd(maxiter=3000),
    "lbfgs": inner.lbfgs(),
}

RNG = np.random.default_rng(0)
Q, _ = np.linalg.qr(RNG.normal(size=(N, N)))
ROWS, TARGETS, LINEAR = RNG.normal(size=(12, N)), RNG.normal(size=12), RNG.normal(size=N)


def rest(y):
    return jnp.asarray(ROWS, y.dtype) @ y - jnp.asarray(TARGETS, y.dtype)


def bent(y, condition):
    return jnp.asarray(Q @ np.diag(np.geomspace(1.0, condition, N)) @ Q.T, y.dtype) @ y


def quadratic(condition):
    return lambda y: y @ bent(y, condition) / 2 - jnp.asarray(LINEAR, y.dtype) @ y


FUNCTIONS = {  # and the sizes of the starts
    "fourth powers": (lambda y: jnp.sum(rest(y) ** 4) + y @ y / 2, (1e1, 1e3, 1e5)),
    "sixth powers": (lambda y: jnp.sum(rest(y) ** 6) / 6 + y @ y / 2, (1e1, 1e3)),
    "rounded kinks": (
        lambda y: jnp.sum(jnp.sqrt(1e-4 + rest(y) ** 2)) + 1e-3 * y @ y,
        (1e1, 1e3, 1e5),
    ),
    "log cosh": (
        lambda y: jnp.sum(jnp.logaddexp(rest(y), -rest(y))) + 1e-2 * y @ y,
        (1e1, 1e3),
    ),
    "softplus": (
        lambda y: jnp.mean(jax.nn.softplus(3 * rest(y))) + 1e-3 * jnp.sum((y - 1) ** 2),
        (1e1, 1e3),
    ),
    "quadratic, condition 1e3": (quadratic(1e3), (1e1, 1e4, 1e8)),
    "quadratic, condition 1e5": (quadratic(1e5), (1e1, 1e4)),
    "exponentials of squares": (
        lambda y: jnp.sum(jnp.exp(rest(y) ** 2 / 50)),
        (1e1, 3e1),
    ),
    "log-sum-exp": (lambda y: jax.nn.logsumexp(10 * rest(y)) + 5e-2 * y @ y, (1e1, 1e3)),
    "far from the origin": (
        lambda y: (y - 1e3) @ bent(y - 1e3, 1e3) / 2,
        (1e1, 1e4),
    ),
}


def newton(fn):
    def step(_, y):
        p = jnp.linalg.solve(jax.hessian(fn)(y), jax.grad(fn)(y))
        lengths = 0.5 ** jnp.arange(30.0)
        values = jax.vmap(lambda a: fn(y - a * p))(lengths)
        return y - lengths[jnp.nanargmin(values)] * p

    return np.asarray(jax.jit(lambda y: lax.fori_loop(0, 400, step, y))(jnp.zeros(N)))


def main() -> int:
    total = silent = reached = 0
    for name, (fn, sizes) in FUNCTIONS.items():
        exact = newton(fn)
        for dtype, goal in GOALS.items():
            for kind, solver in SOLVERS.items():

                def one(y, fn=fn, solver=solver):
                    state = base.InnerState(y, solver.init(y))
                    g = base.objective(lambda y, x, b: fn(y))
                    end, info = solver.step(g, state, jnp.ones((), y.dtype), base.Ctx())
                    return end.params, info["code"], info["evaluations"], fn(y)

                run, line = jax.jit(jax.vmap(one)), []
                for size in sizes:
                    draws = np.random.default_rng(3).normal(size=(STARTS, N))
                    found, code, spent, value = map(
                        np.asarray, run(jnp.asarray(size * draws, dtype))
                    )
                    begun = np.isfinite(value)  # a start that overflows is said by its code
                    error = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact)
                    near, success = error <= goal, code == RESULTS.success
                    quiet = begun & ~near & success
                    total, silent = total + int(begun.sum()), silent + int(quiet.sum())
                    reached += int((begun & near).sum())
                    line.append(
                        f"x{size:.0e} near {int(near[begun].sum())} of {int(begun.sum())}, silent "
                        f"{int(quiet.sum())}, said though near {int((begun & near & ~success).sum())}, "
                        f"{np.median(spent):.0f} evaluations"
                    )
                print(f"{name}, {dtype}, {kind}: " + "; ".join(line), flush=True)
    print(f"{total} solves: {reached} near the solution, {silent} silent")
    return int(silent > 0)


if __name__ == "__main__":
    raise SystemExit(main())
