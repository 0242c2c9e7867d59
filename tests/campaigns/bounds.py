"""The error bound and its certificate on random problems, rounding included: ``python -m
tests.campaigns.bounds --problems 1000``.

Three inexactnesses: in what tolerances control, in the solutions themselves, and none but rounding.
The last in float64 and in float32, against the float64 answer at the parameters as float32 holds
them. Nothing is added to a bound before it is compared. The last line is the summary.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)  # compiled once, run once

# batched factorizations from a pool of threads, each with a pool of its own, once stood still
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

import bilevax as bx  # noqa: E402
from bilevax.diagnostics import Constants  # noqa: E402
from tests.diagnostics.test_diagnostics import CURVED, SOLVER, N, bumpy, coupled, random_problem  # noqa: E402

KINDS = ("residuals", "solutions", "rounding", "rounding in float32")


def exact(p, x):
    gradient = jax.grad(bumpy)
    newton = lambda _, y: y - jnp.linalg.solve(jax.jacfwd(gradient)(y, x, p), gradient(y, x, p))
    y = jax.lax.fori_loop(0, 10, newton, jnp.linalg.solve(p["A"], -p["C"].T @ x))
    hessian, w = jax.jacfwd(gradient)(y, x, p), jax.grad(coupled)(y, x, p)
    q = jnp.linalg.solve(hessian, w)
    return (
        y,
        jax.grad(coupled, 1)(y, x, p) - jax.jacfwd(jax.grad(bumpy, 1))(y, x, p) @ q,
        hessian,
        q,
    )


def one(key, kind: int):
    p, x, mu, key = random_problem(key)
    keys = jax.random.split(key, 5)
    dtype = jnp.float32 if kind == 3 else jnp.float64
    cast = lambda value, to: jax.tree.map(lambda a: a.astype(to), value)
    p, x = cast(cast((p, x), dtype), jnp.float64)
    p["A"] = (p["A"] + p["A"].T) / 2
    y, want, hessian, q = exact(p, x)
    smallest = jnp.linalg.eigvalsh(p["A"])[0]
    sizes = (
        jnp.zeros(2)
        if kind > 1
        else 10 ** jax.random.uniform(keys[0], (2,), minval=-5.0, maxval=0.0)
    )

    def spoiled(key, size):
        direction = jax.random.normal(key, (N,))
        return size * (jnp.linalg.solve(hessian, mu * direction) if kind == 0 else direction)

    start, near = (
        y + spoiled(keys[1], sizes[0]),
        q + spoiled(keys[2], sizes[1] * jnp.linalg.norm(y) / mu),
    )
    method = bx.hypergradient.implicit(
        bx.linear.cg(tol=1e9 if kind < 2 else 1e-12), max_residual=jnp.inf
    )  # the first keeps its start
    fn = bx.value_and_hypergrad(bumpy, coupled, solver=SOLVER, hypergradient=method)
    given = cast((start, x, p), dtype)
    state = fn.init(given[0])
    est = fn(
        *given,
        given[2],
        state=state._replace(method=state.method._replace(adjoint=near.astype(dtype))),
    )
    cross = jax.jacfwd(jax.grad(bumpy, 1))(est.inner_params.astype(jnp.float64), x, p)
    norm = lambda a: jnp.linalg.norm(a, 2)
    wide = 1 + jnp.sum(p["v"] * x)
    constants = Constants(
        smallest, norm(cross), norm(p["F"]), norm(p["K"]), p["s"] * wide * CURVED,
        p["s"] * norm(p["v"]),
        smoothness=norm(p["A"]) + p["s"] * wide,
    )  # fmt: skip
    bound = bx.error_bound(cast(dict(est.info), jnp.float64), constants, est.inner_params)
    away = jnp.linalg.norm(est.inner_params.astype(jnp.float64) - y)
    return jnp.linalg.norm(est.grad.astype(jnp.float64) - want), bound.total, away, bound.distance


def certified(count: int) -> tuple[int, int]:
    """MAID's own bound, at each step of runs on random quadratics: violations and steps."""

    def problem(key):
        p, x, _, _ = random_problem(key)
        return p | {"s": jnp.zeros(())}, x

    ps, xs = jax.jit(jax.vmap(problem))(jax.random.split(jax.random.key(1), count))
    wrong, steps, solved = 0, 0, jax.jit(exact)
    for i in range(count):
        p, x = jax.tree.map(lambda a, i=i: a[i], (ps, xs))
        eigenvalues = np.linalg.eigvalsh(p["A"])
        norm = lambda a: float(np.linalg.norm(a, 2))
        known = Constants(
            float(eigenvalues[0]),
            norm(p["C"]),
            norm(p["F"]),
            norm(p["K"]),
            0.0,
            0.0,
            smoothness=float(eigenvalues[-1]),
        )
        out = bx.solve_bilevel(
            bumpy, coupled, jnp.zeros(N), x, inner_data=bx.data.full(p),
            outer_data=bx.data.full(p), num_steps=6, keep="last", throw=False,
            algorithm=bx.algorithms.maid(constants=known, max_error=0.5),
            metrics=lambda y, x, b: {f"x{j}": x[j] for j in range(x.size)},
        )  # fmt: skip
        for t in range(len(out.history["value"])):
            at = jnp.stack([out.history[f"x{j}"][t] for j in range(x.size)])
            want = np.linalg.norm(solved(p, at)[1])
            steps += 1
            wrong += abs(float(out.history["grad_norm"][t]) - want) > float(
                out.history["error_bound"][t]
            )
    return wrong, steps


def main(problems: int, runs: int) -> int:
    keys, wrong = jax.random.split(jax.random.key(0), problems), 0
    for kind, name in enumerate(KINDS):
        error, bound, away, distance = jax.device_get(
            jax.jit(
                lambda keys, kind=kind: lax.map(lambda key: one(key, kind), keys, batch_size=50)
            )(keys)
        )
        bad = ~((error <= bound) & (away <= distance))
        wrong += int(bad.sum())
        ratio = bound / np.maximum(error, 1e-300)
        print(
            f"{name}: {problems} problems, violated {int(bad.sum())}; bound over error "
            f"{np.quantile(ratio, [0, 0.1, 0.5, 0.9])}",
            flush=True,
        )
    violated, steps = certified(runs)
    print(f"certificate: {steps} steps of {runs} runs, violated {violated}")
    print(f"{problems} problems, {len(KINDS)} kinds: {wrong + violated} violations")
    return int(wrong + violated > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=8, help="runs of MAID with a certificate")
    args = parser.parse_args()
    raise SystemExit(main(args.problems, args.runs))
