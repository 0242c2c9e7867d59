"""Random two-level problems by every method and linear solver, against dense references: ``python
-m tests.campaigns.differential``.

Exact methods are compared with the dense hypergradient, approximate ones with the dense formula of
what they compute, methods that follow the solver's steps with the derivative of a hand-written
loop, sampled ones by confidence interval. A problem is random in its coefficients, its terms and
its size of everything; problems of one structure (pytrees, dtypes) are lanes of one program. A
result is *wrong* where it is further off than rounding times condition explains, and *silent* where
it is so with a code and warnings of nothing. The last line is the summary.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import NamedTuple

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)  # compiled once, run once

# batched factorizations from a pool of threads, each with a pool of its own, once stood still
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import bilevax as bx  # noqa: E402

H, L = bx.hypergradient, bx.linear
STEP, K, LAST, TERMS, RHO = 0.05, 6, 2, 4, 0.1
ROWS = 7


class Structure(NamedTuple):
    """Shapes and dtypes of both levels."""

    inner: object
    outer: object


def leaf(*shape, dtype=jnp.float64):
    return jax.ShapeDtypeStruct(shape, dtype)


STRUCTURES = {
    "array": Structure(leaf(5), leaf(3)),
    "dict": Structure({"w": leaf(2, 2), "b": leaf()}, {"penalty": leaf(), "weights": leaf(2)}),
    "nested": Structure((leaf(2), {"a": leaf(1, 3)}), [leaf(2), (leaf(),)]),
    "mixed": Structure(
        {"wide": leaf(3), "single": leaf(2, dtype=jnp.float32)},
        {"x": leaf(2, dtype=jnp.float32), "s": leaf()},
    ),
    "single": Structure({"w": leaf(4, dtype=jnp.float32)}, leaf(2, dtype=jnp.float32)),
    "one": Structure(leaf(), leaf()),
}


def size(shapes):
    return sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes))


def flat(value):
    return jnp.concatenate([jnp.ravel(a).astype(jnp.float64) for a in jax.tree.leaves(value)])


def like(shapes, vector):
    leaves, start = [], 0
    for s in jax.tree.leaves(shapes):
        count = int(np.prod(s.shape))
        leaves.append(vector[start : start + count].reshape(s.shape).astype(s.dtype))
        start += count
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


# ---- problems


def coefficients(key, n, m):
    """One random problem: strongly convex, of condition 1 to 20, each term there or not."""
    k = iter(jax.random.split(key, 20))
    normal = lambda *shape: jax.random.normal(next(k), shape)
    there = lambda: jax.random.bernoulli(next(k), 0.7).astype(jnp.float64)
    Q, R = (jnp.linalg.qr(normal(n, n))[0] for _ in range(2))
    spread = 10 ** jax.random.uniform(next(k), (n,), minval=-2.0, maxval=0.0)
    return {
        "A": (Q * (0.02 + 2 * spread)) @ Q.T,
        "a": normal(n),
        "C": normal(m, n) * 10 ** jax.random.uniform(next(k), (), minval=-2.0, maxval=0.5),
        "quartic": there() * jax.random.uniform(next(k), (n,)),
        "rows": there() * normal(ROWS, n),
        "shift": normal(ROWS, m),
        "penalty": there(),
        "bend": there() * 0.3 * normal(m),
        "F": (R * jax.random.uniform(next(k), (n,), minval=0.1, maxval=1.0)) @ R.T,
        "t": normal(n),
        "K": there() * normal(m, n),
        "h": there() * normal(m),
    }


def inner_flat(v, u, c):
    quadratic = v @ c["A"] @ v / 2 + c["a"] @ v + u @ c["C"] @ v
    quartic = jnp.sum(c["quartic"] * v**4) / 4
    softplus = jnp.mean(jax.nn.softplus(c["rows"] @ v + c["shift"] @ u))
    penalty = c["penalty"] * jnp.exp(jnp.tanh(u[0])) * v @ v / 2
    return (
        quadratic
        + quartic
        + softplus
        + penalty
        + jnp.sum(jnp.sin(u) * c["bend"]) ** 2 * jnp.sum(jnp.log(jnp.cosh(v)))
    )


def outer_flat(v, u, c):
    away = v - c["t"]
    return away @ c["F"] @ away / 2 + u @ c["K"] @ v + jnp.sum(jnp.sin(u * c["h"]))


def inner(y, x, c):
    return inner_flat(flat(y), flat(x), c)


def outer(y, x, c):
    return outer_flat(flat(y), flat(x), c)


# ---- methods, and what each is to give


def methods(unit):
    """Name -> (method, solver, kind); `kind` names the reference."""
    still = bx.inner.optax(optax.sgd(0.0), 1)
    steps = bx.inner.optax(optax.sgd(STEP), K)
    exact = {
        "cg": L.cg(maxiter=400, tol=1e-14),
        "cg nystrom": L.cg(maxiter=400, tol=1e-14, preconditioner=L.nystrom_preconditioner(2)),
        "minres": L.minres(maxiter=400, tol=1e-14),
        "gmres": L.gmres(tol=1e-14),
        "bicgstab": L.bicgstab(maxiter=400, tol=1e-14),
        "cholesky": L.cholesky(),
        "lu": L.lu(),
    }
    mapping = bx.objective(
        lambda y, x, c: jax.tree.map(
            lambda a, g: a - (STEP * g).astype(a.dtype), y, jax.grad(inner)(y, x, c)
        )
    )
    found = {
        f"implicit {name}": (H.implicit(linear), still, "exact") for name, linear in exact.items()
    }
    found |= {
        "implicit low memory": (H.implicit(exact["cg"], low_memory=True), still, "exact"),
        "implicit damped": (H.implicit(exact["cg"], damping=RHO), still, "damped"),
        "implicit neumann": (
            H.implicit(L.neumann(TERMS, step=STEP), max_residual=jnp.inf),
            still,
            "neumann",
        ),
        "implicit identity": (
            H.implicit(L.identity(STEP), max_residual=jnp.inf),
            still,
            "one step",
        ),
        "fixed point": (H.fixed_point(mapping, L.gmres(tol=1e-14)), still, "exact"),
        "one step": (H.one_step(STEP), still, "one step"),
        "finite difference": (
            H.finite_difference(STEP, radius=difference_radius(unit)),
            still,
            "one step",
        ),
        "sama": (H.sama(), bx.inner.optax(optax.sgd(STEP), 1), "one step after"),
        "unrolled none": (H.unrolled(checkpoint="none"), steps, "steps"),
        "unrolled step": (H.unrolled(checkpoint="step"), steps, "steps"),
        "unrolled sqrt": (H.unrolled(checkpoint="sqrt"), steps, "steps"),
        "unrolled mixed": (H.unrolled(), steps, "steps"),
        "forward": (H.forward(), steps, "steps"),
        "unrolled last": (H.unrolled(last=LAST), steps, "last steps"),
    }
    return found


SAMPLED = H.zeroth_order(samples=400, scale=1e-3)


def references(v0, u, c):
    """The dense answers: (solution, kind -> gradient), and the condition of the Hessian at the
    solution."""
    gradient = lambda v, u: jax.grad(inner_flat)(v, u, c)

    def newton(_, v):
        g, hessian = gradient(v, u), jax.jacfwd(gradient)(v, u)
        p = jnp.linalg.solve(hessian, g)
        lengths = 0.5 ** jnp.arange(12.0)
        values = jax.vmap(lambda s: inner_flat(v - s * p, u, c))(lengths)
        return v - lengths[jnp.argmin(values)] * p

    y = jax.lax.fori_loop(0, 60, newton, v0)

    def pulled(adjoint, v):
        f_y, f_x = jax.grad(outer_flat, (0, 1))(v, u, c)
        return f_x - jax.jacfwd(gradient, 1)(v, u).T @ adjoint(jax.jacfwd(gradient)(v, u), f_y)

    def series(hessian, w):
        total, term = jnp.zeros_like(w), w
        for _ in range(TERMS):
            total, term = total + term, term - STEP * hessian @ term
        return STEP * total

    def after(start, count, u):
        v = start
        for _ in range(count):
            v = v - STEP * gradient(v, u)
        return v

    middle, end = jax.lax.stop_gradient(after(v0, K - LAST, u)), after(v0, 1, u)
    eye = jnp.eye(v0.size)
    kinds = {
        "exact": pulled(jnp.linalg.solve, y),
        "damped": pulled(lambda h, w: jnp.linalg.solve(h + RHO * eye, w), y),
        "neumann": pulled(series, y),
        "one step": pulled(lambda h, w: STEP * w, y),
        "one step after": pulled(lambda h, w: STEP * w, end),
        "steps": jax.grad(lambda u: outer_flat(after(v0, K, u), u, c))(u),
        "last steps": jax.grad(lambda u: outer_flat(after(middle, LAST, u), u, c))(u),
    }
    return y, kinds, jnp.linalg.cond(jax.jacfwd(gradient)(y, u))


def tolerances(unit, condition, name):
    """The relative error that rounding explains: a hundred units, times the condition where a
    system is solved."""
    solves = (name.startswith("implicit") and "identity" not in name) or name == "fixed point"
    radius = difference_radius(unit)
    difference = 100 * unit / radius + 100 * radius**2 if name == "finite difference" else 0.0
    return 100 * unit * jnp.where(solves, condition, 10.0) + difference


def difference_radius(unit):
    return 1e-4 if unit < 1e-10 else 1e-2


def run(structure: Structure, count: int, seed: int):
    n, m = size(structure.inner), size(structure.outer)
    unit = max(
        float(jnp.finfo(s.dtype).eps) for s in jax.tree.leaves((structure.inner, structure.outer))
    )
    table = methods(unit)

    def posed(key):
        keys = jax.random.split(key, 4)
        c = coefficients(keys[0], n, m)
        v0, u = jax.random.normal(keys[1], (n,)), jax.random.normal(keys[2], (m,))
        start, x = like(structure.inner, v0), like(structure.outer, u)
        v0, u = flat(start), flat(x)  # as the dtypes hold them
        return (
            c,
            start,
            x,
            references(v0, u, c),
            jnp.linalg.norm(jax.grad(outer_flat)(v0, u, c)),
            keys[3],
        )

    def by(name):
        method, solver, kind = table[name]
        fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)

        def one(posed):
            c, start, x, (y, kinds, condition), size, _ = posed
            at = start if "steps" in kind or "after" in kind else like(structure.inner, y)
            est = fn(at, x, c, c)
            scale = jnp.maximum(jnp.linalg.norm(kinds[kind]), 1e-2 * size)
            error = jnp.linalg.norm(flat(est.grad) - kinds[kind]) / scale
            return (
                error,
                error / tolerances(unit, condition, name),
                est.info["code"],
                est.info["warnings"],
            )

        return one

    def sampled(posed):
        c, start, x, (_, kinds, _), _, key = posed
        fn = bx.value_and_hypergrad(
            inner, outer, solver=bx.inner.optax(optax.sgd(STEP), K), hypergradient=SAMPLED
        )
        draws = jax.vmap(lambda key: flat(fn(start, x, c, c, key=key).grad))(
            jax.random.split(key, 8)
        )
        spread = jnp.linalg.norm(jnp.std(draws, axis=0, ddof=1)) / jnp.sqrt(8.0)
        noise = (
            1e3 * unit / 1e-3 * (1 + jnp.linalg.norm(kinds["steps"]))
        )  # rounding, divided by the width of the smoothing
        error = jnp.linalg.norm(jnp.mean(draws, axis=0) - kinds["steps"])
        return error, error / (5 * spread + noise), jnp.int32(0), jnp.int32(0)

    over = lambda fn: jax.device_get(
        jax.jit(jax.vmap(fn))(problems)
    )  # one small program each: one large one takes the compiler minutes
    problems = jax.jit(jax.vmap(posed))(jax.random.split(jax.random.key(seed), count))
    found = {name: over(by(name)) for name in table}
    return found | {"zeroth order": over(sampled)}, np.asarray(problems[3][2])


def main(problems: int, only: str, seed: int) -> int:
    wrong = silent = total = 0
    chosen = {name: s for name, s in STRUCTURES.items() if only in name}
    each = -(-problems // len(STRUCTURES))
    for number, (name, structure) in enumerate(chosen.items()):
        began = time.perf_counter()
        found, condition = run(structure, each, seed + number)
        total += each
        print(
            f"{name}: {each} problems, conditions {condition.min():.1f} to {condition.max():.0f}, "
            f"{time.perf_counter() - began:.0f} s"
        )
        for method, (error, ratio, code, warned) in found.items():
            bad = ~(ratio <= 1)
            quiet = bad & (code == 0) & (warned == 0)
            wrong, silent = wrong + int(bad.sum()), silent + int(quiet.sum())
            said = int(((code != 0) | (warned != 0)).sum())
            print(
                f"  {method:20s} largest error {np.nanmax(error):.1e}, of what is allowed "
                f"{np.max(ratio):.2g}, said {said}, wrong {int(bad.sum())}"
            )
    print(
        f"{total} problems, {len(found)} methods and solvers each: {wrong} wrong, {silent} of them "
        "silent"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--only", default="", help="part of a structure's name")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    raise SystemExit(main(args.problems, args.only, args.seed))
