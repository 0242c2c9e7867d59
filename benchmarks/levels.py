"""What levels cost: a nested level, its compilation, a ladder of diamonds, and a three-level step
against its parts.

`flops` is XLA's count for the compiled gradient, a loop's body once. A product is timed as one call
from Python and in a compiled loop: the first holds what a call costs whatever it does, the second
nothing but arithmetic.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks.harness import Case, main
from bilevax import tree
from bilevax.data import same
from bilevax.multilevel import nested
from bilevax.multilevel.gradient import MultilevelGradFn
from bilevax.multilevel.level import checked

HG, DIM = bx.hypergradient, 24


# ---- levels stacked in each other, and in a ladder


def follower(name, above, below, matrix):
    """Strongly convex in `name`, bent, following `above`; `below` reacts to it and comes back in a
    term of its own."""

    def objective(p, batch):
        own = (
            0.5 * jnp.sum((p[name] - matrix @ p[above]) ** 2)
            + jnp.sum(jnp.cosh(p[name]))
            + 0.1 * jnp.sum(p[name]) ** 2
        )
        return own + (0.3 * jnp.sum(jnp.sin(p[below]) ** 2) if below else 0.0)

    return objective


def stacked(depth, steps, linear):
    """`depth` levels nested in each other under the top one, and where they start."""
    rng = np.random.default_rng(0)
    names = [f"l{i}" for i in range(depth)] + ["x"]
    solver = bx.inner.optax(optax.sgd(0.2), steps)
    levels = [
        bx.Level(
            name,
            follower(
                name,
                names[i + 1],
                names[i - 1] if i else None,
                jnp.asarray(rng.standard_normal((DIM, DIM)) / DIM**0.5),
            ),
            solver=solver,
            hypergradient=HG.implicit(linear),
        )
        for i, name in enumerate(names[:-1])
    ]
    top = bx.Level(
        "x",
        lambda p, batch: jnp.sum((p[names[-2]] - 1.0) ** 2) + 0.1 * jnp.sum(p["x"] ** 2),
        solver=optax.sgd(0.1),
    )
    return [*levels, top], {name: jnp.asarray(0.3 * rng.standard_normal(DIM)) for name in names}


def ladder(rungs):
    """``2 ** rungs`` paths: two levels a rung read the one below, a third reads both."""

    mix = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)) / 8**0.5)

    def reads(name, below):
        # With elementwise arithmetic alone, XLA would do the levels below again inside each fused
        # kernel, and count it.
        return lambda p, batch: (
            0.5 * jnp.sum((p[name] - sum(jnp.sin(mix @ p[b]) for b in below)) ** 2)
            + jnp.sum(jnp.cosh(mix @ p[name]))
        )

    solver, method = bx.inner.optax(optax.sgd(0.3), 3), HG.implicit(bx.linear.cg(maxiter=3))
    levels, below = [], "x"
    for i in range(rungs):
        for name, of in ((f"a{i}", [below]), (f"b{i}", [below]), (f"n{i}", [f"a{i}", f"b{i}"])):
            levels.append(bx.Level(name, reads(name, of), solver=solver, hypergradient=method))
        below = f"n{i}"
    levels.append(bx.Level("x", lambda p, batch: jnp.sum(p[below] ** 2), solver=optax.sgd(0.1)))
    return levels, {level.name: jnp.ones(8) for level in levels}


# ---- cases


def product(depth, joint, count=None):
    """One product of the linear system that a level with `depth` levels inside it is differentiated
    with, at a given point.

    `joint`: the Hessian of the Lagrangian; otherwise that of the total objective, with the linear
    solves of the levels inside. A number `count` puts that many products into one loop.
    """
    levels, params = stacked(depth + 1, 20, bx.linear.cg(maxiter=DIM))
    system = MultilevelGradFn(levels).system(params, dict.fromkeys(params), {}, None, {})
    name = f"l{depth}"
    side, given = nested.lower(system, name), {n: params[n] for n in system.graph[name].total}
    feed = nested.level_feed(
        system, name, params, dict.fromkeys(params), None, jnp.zeros((), jnp.int32)
    )
    start = nested.start_state(
        system,
        name,
        {
            n: bx.base.InnerState(params[n], system.solvers[n].init(params[n]))
            for n in system.solvers
        },
    )
    ctx = nested.hyper_context(side, feed)._replace(model=start.model)
    if joint:
        u = jax.jit(lambda: nested.point(system, name, start.params, given, ctx))()
        gradient = jax.grad(lambda u: nested.lagrangian(system, name, u, given, ctx))
    else:
        u, gradient = start.params, jax.grad(lambda y: side.objective(y, given, ctx)[0])

    _, hvp = jax.jit(lambda u: jax.linearize(gradient, u))(
        u
    )  # once for each solve, as a linear solver has it

    def run(hvp, v):
        if count is None:
            return hvp(v)

        def body(_, v):
            hv = hvp(v)
            return jax.tree.map(lambda a: a / jnp.sqrt(1.0 + tree.dot(hv, hv)), hv)

        return jax.lax.fori_loop(0, count, body, v)

    compiled = jax.jit(run).lower(hvp, u).compile()
    return tree.size(u), lambda: compiled(hvp, u)


def step_and_parts(rows, width, steps):
    """A step of three chained levels, and programs of its parts: both lower levels' gradient steps,
    each pullback, the outer gradient."""
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.standard_normal((rows, width)))
    target = jnp.asarray(rng.standard_normal(rows))

    def z_objective(p, batch):
        x, t = batch
        return jnp.mean(
            jnp.log(jnp.cosh(jnp.tanh(x @ p["z"]["w"]) @ p["z"]["v"] - t))
        ) + 0.05 * sum(jnp.sum(a**2) for a in jax.tree.leaves(p["z"])) * (1 + jnp.sum(p["x"] ** 2))

    def y_objective(p, batch):
        x, t = batch
        near = sum(
            jnp.sum((a - b) ** 2)
            for a, b in zip(jax.tree.leaves(p["y"]), jax.tree.leaves(p["z"]), strict=True)
        )
        return jnp.mean(jnp.log(jnp.cosh(jnp.tanh(x @ p["y"]["w"]) @ p["y"]["v"] - t))) + 0.5 * near

    def x_objective(p, batch):
        x, t = batch
        return jnp.mean((jnp.tanh(x @ p["y"]["w"]) @ p["y"]["v"] - t) ** 2)

    solver = bx.inner.optax(optax.sgd(0.1), steps)
    method = HG.implicit(bx.linear.cg(maxiter=5, tol=1e-30), warm_start=False, max_residual=jnp.inf)
    model = {
        "w": jnp.asarray(rng.standard_normal((width, 64)) / width**0.5),
        "v": jnp.asarray(rng.standard_normal(64) / 8),
    }
    params = {"z": model, "y": model, "x": jnp.zeros(4)}
    batches = dict.fromkeys(params, (data, target))
    levels = [
        bx.Level("z", z_objective, solver=solver, hypergradient=method),
        bx.Level("y", y_objective, solver=solver, hypergradient=method),
        bx.Level("x", x_objective, solver=optax.sgd(0.1)),
    ]
    whole = bx.value_and_multilevel_grad(levels)

    def solve(objective, name, params):
        lower = bx.base.Lower(
            bx.objective(lambda y, others, batch: objective({**others, name: y}, batch)),
            solver,
            same,
        )
        feed = bx.base.Feed((data, target), None, jnp.zeros((), jnp.int32))
        others = {n: v for n, v in params.items() if n != name}
        return lower, feed, others, bx.base.InnerState(params[name], solver.init(params[name]))

    def part(objective, name):
        def run(params):
            lower, feed, others, state = solve(objective, name, params)
            solution, pullback = method.vjp(
                lower, state, others, feed, lower.draw(feed, steps), method.init(params[name])
            )
            return solution.params, pullback(jax.tree.map(jnp.ones_like, params[name]))[0]

        return run

    def outer(params):
        return jax.value_and_grad(lambda p: x_objective(p, (data, target)))(params)

    parts = [jax.jit(part(z_objective, "z")), jax.jit(part(y_objective, "y")), jax.jit(outer)]
    compiled = [p.lower(params).compile() for p in parts]
    return jax.jit(lambda: whole(params, batches).grad), lambda: [p(params) for p in compiled]


class Counted:
    """A gradient whose result is the flops of its compiled program."""

    def __init__(self, levels, params):
        self.fn, self.params = bx.value_and_multilevel_grad(checked(levels)), params

    def lower(self):
        self.lowered = jax.jit(lambda p: self.fn(p).grad).lower(self.params)
        return self

    def compile(self):
        compiled = self.lowered.compile()
        flops = float((compiled.cost_analysis() or {}).get("flops", float("nan")))

        def run():
            return compiled(self.params), flops

        return run

    def __call__(self):
        raise RuntimeError("Counted: compile it first; the harness does, by lower().compile().")


def cases(args):
    count = 100 if args.quick else 1000
    for label, joint, many in (
        ("one product, Lagrangian", True, None),
        (f"{count} products in a loop, Lagrangian", True, count),
        ("one product, nested solves", False, None),
    ):
        made = {f"{d} nested below": product(d, joint, many) for d in (1, 2, 3)}
        sizes = ", ".join(str(size) for size, _ in made.values())
        yield Case(
            f"{label} ({sizes} unknowns)",
            {name: run for name, (_, run) in made.items()},
            reference="1 nested below",
        )
    for depth in (2, 3):
        levels, params = stacked(depth, 5, bx.linear.minres(maxiter=50))
        yield Case(
            f"gradient over {depth} nested levels of {DIM}",
            {"gradient": Counted(levels, params)},
            reference="gradient",
        )
    rungs = (1, 2, 5) if args.quick else range(1, 11)
    yield Case(
        "ladder of diamonds",
        {f"{r} rungs": Counted(*ladder(r)) for r in rungs},
        reference=f"{5 if not args.quick else 1} rungs",
        metrics=lambda out: {"flops": out[1]},
    )
    whole, parts = step_and_parts(*((256, 32, 5) if args.quick else (2048, 64, 10)))
    yield Case(
        "three-level step",
        {"step": whole, "its parts, one after another": parts},
        reference="its parts, one after another",
    )


if __name__ == "__main__":
    main("levels", "What nested levels, many levels and one level more cost.", cases)
