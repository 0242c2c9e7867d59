"""Random graphs of 3 to 5 levels by mixed methods, against descents differentiated as they stand:
``python -m tests.campaigns.graphs``.

A level follows some of the levels above it and has terms in some of those that follow it; each is
differentiated by a method drawn for it. The reference knows nothing of the library: every best
response is a long descent, level inside level, and the gradient is plain autodiff through all of
it. Graphs of one shape are lanes of one program, their coefficients random. The last line is the
summary.
"""

from __future__ import annotations

import argparse
import os
import random
import time

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
from tests.multilevel.multilevel_cases import Case, reference  # noqa: E402

H, L = bx.hypergradient, bx.linear
METHODS = {
    "cg": H.implicit(L.cg(maxiter=200, tol=1e-13)),
    "minres": H.implicit(L.minres(maxiter=200, tol=1e-13)),
    "cholesky": H.implicit(L.cholesky()),
    "unrolled": H.unrolled(),
    "forward": H.forward(),
}
STEPS, STEP = 40, 0.5
LANES = 5
DEEPEST = 3  # levels inside each other, the top one among them
ALLOWED = 1e-7


def fits(i: int, leaders: list[int], reacts: dict) -> bool:
    """Whether level i may have a term in one that follows `leaders`.

    One of them below i that does not react to i would have to be solved before i: such graphs are
    left out.
    """
    return i in leaders and all(k >= i or i in reacts[k] for k in leaders)


def shape(rng: random.Random, depth: int, chains: bool) -> tuple[dict, dict]:
    """Who follows whom and who has terms in whom, by number; the top level is number ``depth - 1``.
    `chains`: perhaps none inside another."""
    top = depth - 1
    while True:
        leaders = {
            i: sorted(rng.sample(range(i + 1, depth), rng.randint(1, min(2, top - i))))
            for i in range(top)
        }
        reacts = {i: set() for i in range(depth)}
        for i in reversed(range(top)):
            reacts[i] = set(leaders[i]).union(*(reacts[k] for k in leaders[i]))
        uses = {
            i: [j for j in range(i) if fits(i, leaders[j], reacts) and rng.random() < 0.6]
            for i in range(top)
        }
        inside = {i: closed(uses[i], leaders, i) for i in range(top)}
        uses[top] = [j for j in range(top) if rng.random() < 0.5]
        uses[top] += [j for j in range(top) if j not in closed(uses[top], leaders, top)]
        inside[top] = closed(uses[top], leaders, top)
        if nesting(inside, top) <= DEEPEST and (chains or any(inside[i] for i in range(top))):
            return leaders, {i: sorted(set(uses[i])) for i in uses} | {"inside": inside}


def closed(used, leaders, above) -> list[int]:
    """What a level needs solved: those that it uses, and whom they follow below it; leaders
    first."""
    found = set(used)
    while True:
        more = {k for j in found for k in leaders[j] if k < above} - found
        if not more:
            return sorted(found, reverse=True)
        found |= more


def nesting(inside, i) -> int:
    return 1 + max((nesting(inside, j) for j in inside[i]), default=0)


def build(leaders: dict, uses: dict, depth: int) -> Case:
    names = [f"l{i}" for i in range(depth - 1)] + ["x"]

    def objective(i):
        def fn(p, c):
            y, c = p[names[i]], c[names[i]]
            if i == depth - 1:
                return sum(
                    jnp.sum((p[names[j]] - c["t"][j]) ** 2) for j in uses[i]
                ) + 0.05 * jnp.sum(jnp.cosh(y))
            target = sum(
                c["a"][k] * jnp.sin(p[names[k]]) + c["b"][k] * p[names[k]] for k in leaders[i]
            )
            bend = (
                jnp.sum(jnp.cosh(y - target))
                + c["q"] * jnp.sum(y**4)
                + c["r"] * y[0] * jnp.tanh(y[1])
            )
            return bend + sum(c["s"] * jnp.sum((p[names[j]] - 0.4) ** 2) for j in uses[i])

        return fn

    inside = {names[i]: tuple(names[j] for j in found) for i, found in uses["inside"].items()}
    return Case({names[i]: objective(i) for i in range(depth)}, inside, STEPS, STEP)


def coefficients(key, names):
    def one(key):
        k = jax.random.split(key, 6)
        d = len(names)
        return {
            "a": 0.6 * jax.random.normal(k[0], (d, 1)), "b": 0.2 * jax.random.normal(k[1], (d, 1)), "t": 0.5 * jax.random.normal(k[2], (d,)),
            "q": 0.2 * jax.random.uniform(k[3]), "r": 0.3 * jax.random.uniform(k[4]), "s": 0.3 * jax.random.uniform(k[5]),
        }  # fmt: skip

    return {name: one(k) for name, k in zip(names, jax.random.split(key, len(names)), strict=True)}


def run(case: Case, chosen: dict[str, str], seed: int):
    names = case.names
    solver = bx.inner.optax(optax.sgd(STEP), STEPS)
    levels = [
        bx.Level(n, case.objectives[n], solver=solver, hypergradient=METHODS[chosen[n]])
        for n in names[:-1]
    ]
    fn = bx.value_and_multilevel_grad(
        [*levels, bx.Level("x", case.objectives["x"], solver=optax.sgd(0.1))]
    )

    def one(key):
        keys = jax.random.split(key, len(names) + 1)
        c = coefficients(keys[0], names)
        params = {
            name: 0.5 * jax.random.normal(k, (2,)) for name, k in zip(names, keys[1:], strict=True)
        }
        bound = case._replace(
            objectives={name: lambda p, _, name=name: case.objectives[name](p, c) for name in names}
        )
        value, grad = reference(bound)(params)
        est = fn(params, dict.fromkeys(names, c))
        error = jnp.linalg.norm(est.grad - grad) / jnp.linalg.norm(grad)
        return error, jnp.abs(est.value - value), est.info["code"], est.info["warnings"]

    return jax.device_get(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), LANES)))


def main(graphs: int, seed: int, first: int) -> int:
    wrong = silent = total = 0
    for number in range(first, -(-graphs // LANES)):
        rng = random.Random(f"{seed}/{number}")
        depth = (3, 4, 3, 5)[number % 4]
        leaders, uses = shape(rng, depth, number % 3 == 2)
        case = build(leaders, uses, depth)
        chosen = {n: rng.choice(list(METHODS)) for n in case.names[:-1]}
        began = time.perf_counter()
        error, value, code, warned = run(case, chosen, seed + number)
        bad = ~((error <= ALLOWED) & (value <= ALLOWED))
        wrong, silent = (
            wrong + int(bad.sum()),
            silent + int((bad & (code == 0) & (warned == 0)).sum()),
        )
        total += LANES
        told = ", ".join(
            f"{n} follows {[case.names[k] for k in leaders[i]]} by {chosen[n]}"
            for i, n in enumerate(case.names[:-1])
        )
        nested = {n: found for n, found in case.inside.items() if found and n != "x"}
        print(f"{depth} levels: {told}; inside {nested}: largest error {np.max(error):.1e}, codes {sorted(set(code.tolist()))}, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    print(f"{total} graphs: {wrong} wrong, {silent} of them silent")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--graphs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first shape's number")
    args = parser.parse_args()
    raise SystemExit(main(args.graphs, args.seed, args.first))
