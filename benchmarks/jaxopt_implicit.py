"""One hypergradient of logistic regression, n=2000, d=500, a penalty a weight: against jaxopt's
L-BFGS with its implicit gradient.

    python benchmarks/jaxopt_implicit.py

Both sides solve to the same relative tolerance; the error of each hypergradient against an exact
dense solve stands beside its time.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from harness import Case, main

import bilevax as bx

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt
    from jaxopt import linear_solve


def problem(n, d, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n + n // 2, d))
    y = np.sign(x @ (rng.normal(size=d) * 3 / np.sqrt(d)) + rng.normal(size=len(x)))
    parts = (x[:n], y[:n]), (x[n:], y[n:])
    return (
        jax.tree.map(lambda a: jnp.asarray(a, dtype), parts),
        jnp.zeros(d, dtype),
        jnp.full(d, -4.0, dtype),
    )


def inner(w, lam, batch):
    return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w))) + 0.5 * jnp.sum(
        jnp.exp(lam) * w**2
    )


def outer(w, lam, batch):
    return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w)))


def exact(train, valid, lam):
    """Newton in numpy, float64, and the dense implicit gradient."""
    (x, y), (u, v), lam = jax.tree.map(lambda a: np.asarray(a, np.float64), (train, valid, lam))
    w, sigmoid = np.zeros(x.shape[1]), lambda z: 1 / (1 + np.exp(-z))
    for _ in range(30):
        p = sigmoid(-y * (x @ w))
        hessian = (x.T * (p * (1 - p))) @ x / len(y) + np.diag(np.exp(lam))
        w = w - np.linalg.solve(hessian, -(x.T @ (y * p)) / len(y) + np.exp(lam) * w)
    p = sigmoid(-y * (x @ w))
    hessian = (x.T * (p * (1 - p))) @ x / len(y) + np.diag(np.exp(lam))
    return (
        -np.exp(lam) * w * np.linalg.solve(hessian, -(u.T @ (v * sigmoid(-v * (u @ w)))) / len(v))
    )


def ours(method, tol):
    fn = bx.value_and_hypergrad(inner, outer, solver=bx.inner.lbfgs(tol=tol), hypergradient=method)
    return lambda w, lam, train, valid: fn(w, lam, train, valid).grad


def peer(adjoint, tol):
    """jaxopt stops at an absolute gradient norm: `tol` is already multiplied by the first one."""
    solver = jaxopt.LBFGS(
        inner, maxiter=500, tol=tol, implicit_diff=True, implicit_diff_solve=adjoint
    )
    return lambda w, lam, train, valid: jax.grad(
        lambda lam: outer(solver.run(w, lam, train).params, lam, valid)
    )(lam)


def cases(args):
    n, d = (200, 50) if args.quick else (2000, 500)
    for dtype, tol in ((jnp.float32, 1e-3), (jnp.float32, 1e-4), (jnp.float64, 1e-6)):
        with jax.enable_x64(dtype == jnp.float64):
            (train, valid), w, lam = problem(n, d, dtype)
            start = float(jnp.linalg.norm(jax.grad(inner)(w, lam, train)))
            truth = exact(train, valid, lam)
            entries = {
                "jaxopt, CG adjoint": peer(
                    functools.partial(linear_solve.solve_cg, tol=tol, maxiter=200), tol * start
                ),
                "jaxopt, its default adjoint": peer(linear_solve.solve_normal_cg, tol * start),
                "bilevax, implicit(cg)": ours(
                    bx.hypergradient.implicit(bx.linear.cg(tol=tol), warm_start=False), tol
                ),
                "bilevax, shine(refine)": ours(bx.hypergradient.shine(refine=200, tol=tol), tol),
            }
            yield Case(
                f"{np.dtype(dtype).name}, tol {tol:g}",
                {
                    name: _Entry(jax.jit(entry), (w, lam, train, valid))
                    for name, entry in entries.items()
                },
                "jaxopt, CG adjoint",
                lambda grad, truth=truth: {
                    "relative error": np.linalg.norm(np.asarray(grad, np.float64) - truth)
                    / np.linalg.norm(truth)
                },
            )


class _Entry:
    """An entry with arguments, so that the data is not folded into the program."""

    def __init__(self, jitted, args):
        self.jitted, self.args = jitted, args

    def lower(self):
        self.lowered = self.jitted.lower(*self.args)
        return self

    def compile(self):
        compiled = self.lowered.compile()
        return lambda: compiled(*self.args)


if __name__ == "__main__":
    main(
        "jaxopt_implicit",
        "A hypergradient of logistic regression against jaxopt's implicit gradient.",
        cases,
    )
