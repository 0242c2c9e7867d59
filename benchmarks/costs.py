"""What a hypergradient costs, in units of what it is made of: the claims of the documentation, a
row each.

Time is taken in interleaved rounds. Memory is XLA's own count for the compiled program: temporary
buffers, and as "peak" these with arguments and outputs. Flops are XLA's count, too (a loop's body
once).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks.harness import RESULTS, Case, main
from bilevax.base import Ctx, Feed, InnerSolver, InnerState, Lower

HG = bx.hypergradient
WHOLE = "base step + outer gradient + SAMA"


class Measured(NamedTuple):
    out: Any
    mib: float
    peak: float
    gflop: float
    extra: dict


class Program:
    """A function with its arguments, compiled ahead of time, that reports its own temporary memory
    and flops with each result."""

    def __init__(self, fn, *args, extra=lambda out: {}):
        self.fn, self.args, self.extra = fn, args, extra

    def lower(self):
        self.lowered = jax.jit(self.fn).lower(*self.args)
        return self

    def compile(self):
        compiled = self.lowered.compile()
        costs = compiled.cost_analysis() or {}
        memory, gflop = compiled.memory_analysis(), float(costs.get("flops", float("nan"))) / 1e9
        mib = memory.temp_size_in_bytes / 2**20
        peak = mib + (memory.argument_size_in_bytes + memory.output_size_in_bytes) / 2**20

        def run():
            out = compiled(*self.args)
            return Measured(out, mib, peak, gflop, self.extra(out))

        return run

    def __call__(self):
        raise RuntimeError("Program: compile it first; the harness does, by lower().compile().")


def metrics(measured: Measured) -> dict[str, float]:
    return {
        "temp MiB": measured.mib,
        "peak MiB": measured.peak,
        "GFLOP": measured.gflop,
        **{k: float(v) for k, v in measured.extra.items()},
    }


# ---- an MLP whose examples are weighted and whose layers are decayed


def mlp(width: int, rows: int, depth: int, features: int):
    rng = np.random.default_rng(0)
    sizes = [features, *[width] * (depth - 1), 10]
    params = [
        (jnp.asarray(rng.standard_normal((a, b)) / np.sqrt(a), jnp.float32), jnp.zeros(b))
        for a, b in itertools.pairwise(sizes)
    ]
    batches = [
        (
            jnp.asarray(rng.standard_normal((rows, features)), jnp.float32),
            jnp.asarray(rng.integers(0, 10, rows), jnp.int32),
        )
        for _ in range(2)
    ]
    x = {"weights": jnp.zeros(rows), "decay": jnp.full(depth, -6.0)}
    return (mlp_inner, mlp_outer), params, x, batches


def losses(params, batch):
    hidden, labels = batch
    for w, b in params[:-1]:
        hidden = jnp.tanh(hidden @ w + b)
    w, b = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ w + b, labels)


def mlp_inner(params, x, batch):
    decay = sum(jnp.exp(d) * jnp.sum(w * w) for d, (w, _) in zip(x["decay"], params, strict=True))
    return jnp.mean(jax.nn.sigmoid(x["weights"]) * losses(params, batch)) + 0.5 * decay


def mlp_outer(params, x, batch):
    return jnp.mean(losses(params, batch))


# ---- cases


def unrolling(quick: bool):
    size = (16, 64, 3, 16) if quick else (128, 1024, 5, 64)
    (inner, outer), y, x, (train, valid) = mlp(*size)

    def program(steps, **settings):
        solver = bx.inner.optax(optax.sgd(0.1), steps)
        return Program(
            bx.value_and_hypergrad(
                inner, outer, solver=solver, hypergradient=HG.unrolled(**settings)
            ),
            y,
            x,
            train,
            valid,
        )

    yield Case(
        "unroll, T=64",
        {mode: program(64, checkpoint=mode) for mode in ("none", "step", "mixed", "sqrt")}
        | {"truncated to 8": program(64, last=8)},
        "none",
        metrics,
    )
    for steps in (16, 256):
        yield Case(
            f"unroll, T={steps}",
            {mode: program(steps, checkpoint=mode) for mode in ("mixed", "sqrt")},
            "mixed",
            metrics,
        )


def first_order(quick: bool):
    (inner, outer), y, x, (train, valid) = mlp(*((16, 64, 3, 16) if quick else (128, 1024, 10, 64)))
    solver = bx.inner.optax(optax.adam(1e-3), 1)
    objective = bx.objective(inner)
    start = solver.step(objective, InnerState(y, solver.init(y)), x, Ctx(train))[0]
    cotangent = jax.grad(outer)(y, x, valid)

    def base_step(y, opt, x, batch):
        return solver.step(objective, InnerState(y, opt), x, Ctx(batch))[0]

    def pullback(method):
        """The method alone: its solve does nothing."""
        idle = InnerSolver(
            solver.init,
            lambda objective, state, outer, ctx: (state, {"value": jnp.zeros(())}),
            1,
            solver.update,
        )

        def fn(y, opt, x, batch, w):
            lower = Lower(objective, idle, lambda feed, i: Ctx(feed.data))
            return method.vjp(
                lower, InnerState(y, opt), x, Feed(batch), Ctx(batch), method.init(y)
            )[1](w)[0]

        return Program(fn, start.params, start.opt, x, train, cotangent)

    def whole(method):
        fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)
        state = fn.init(y)
        return Program(
            lambda y, x, train, valid: fn(y, x, train, valid, state=state),
            start.params,
            x,
            train,
            valid,
        )

    methods = {
        "SAMA": HG.sama(),
        "SAMA, difference": HG.sama(product="difference"),
        "one step": HG.one_step(1e-3),
        "finite difference": HG.finite_difference(1e-3),
    }
    entries = {"base step": Program(base_step, start.params, start.opt, x, train)}
    entries |= {name: pullback(method) for name, method in methods.items()}
    entries |= {WHOLE: whole(HG.sama())}
    yield Case("first-order pullbacks, MLP, Adam", entries, "base step", metrics)


def implicit(quick: bool):
    (inner, outer), y, x, (train, valid) = mlp(*((16, 64, 3, 16) if quick else (128, 512, 3, 64)))
    steps, k = 10, 10
    objective, solver = bx.objective(inner), bx.inner.optax(optax.sgd(0.1), steps)
    method = HG.implicit(
        bx.linear.cg(maxiter=k, tol=1e-12), warm_start=False, damping=1.0, max_residual=jnp.inf
    )
    whole = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)

    def floor(y, x, train, valid):
        """K steps, the outer gradient, one linearised gradient, k products with it, one cross
        product; nothing else."""

        def step(y, _):
            return jax.tree.map(lambda a, g: a - 0.1 * g, y, jax.grad(inner)(y, x, train)), None

        y, _ = jax.lax.scan(step, y, length=steps)
        value, (w, direct) = jax.value_and_grad(outer, (0, 1))(y, x, valid)
        _, products = jax.linearize(lambda y: jax.grad(inner, (0, 1))(y, x, train), y)
        q = jax.lax.fori_loop(
            0, k, lambda i, q: jax.tree.map(lambda a, h: a - 0.01 * h, q, products(q)[0]), w
        )
        return value, jax.tree.map(jnp.subtract, direct, products(q)[1])

    entries = {
        "the ideal, by hand": Program(floor, y, x, train, valid),
        f"implicit, {k} CG": Program(
            whole, y, x, train, valid, extra=lambda out: {"CG": out.info["adjoint_iterations"]}
        ),
        "one inner gradient (G)": Program(
            lambda y, x, batch: jax.grad(objective, has_aux=True)(y, x, Ctx(batch))[0], y, x, train
        ),
    }
    yield Case(f"implicit, K={steps} and k={k}", entries, "the ideal, by hand", metrics)


def ridge_inner(w, x, batch):
    rows, targets = batch
    return jnp.mean(jax.nn.softplus(-targets * (rows @ w))) + 0.5 * jnp.sum(jnp.exp(x) * w * w)


def ridge_outer(w, x, batch):
    rows, targets = batch
    return jnp.mean(jax.nn.softplus(-targets * (rows @ w)))


def warm(quick: bool):
    n, d, length = (64, 20, 8) if quick else (500, 100, 50)
    rng = np.random.default_rng(0)
    spread = np.geomspace(1.0, 0.03, d)
    true = rng.standard_normal(d) / spread
    data = []
    for _ in range(2):
        rows = rng.standard_normal((n, d)) * spread
        data.append(
            (
                jnp.asarray(rows, jnp.float32),
                jnp.asarray(np.sign(rows @ true + rng.standard_normal(n)), jnp.float32),
            )
        )
    y, x = jnp.zeros(d), jnp.full(d, -6.0)

    def run(warm_start):
        method = HG.implicit(bx.linear.cg(maxiter=500, tol=1e-3), warm_start=warm_start)
        fn = bx.value_and_hypergrad(
            ridge_inner, ridge_outer, solver=bx.inner.lbfgs(tol=1e-5), hypergradient=method
        )

        def sequence(y, x, train, valid):
            def body(carry, _):
                y, x, state = carry
                out = fn(y, x, train, valid, state=state)
                return (out.inner_params, x - 2.0 * out.grad, out.state), (
                    out.info["adjoint_iterations"],
                    out.info["adjoint_residual"],
                )

            return jax.lax.scan(body, (y, x, fn.init(y)), length=length)[1]

        extra = lambda out: {
            "CG a step": jnp.mean(out[0][1:].astype(jnp.float32)),
            "worst residual": jnp.max(out[1]),
        }
        return Program(sequence, y, x, *data, extra=extra)

    yield Case(
        f"adjoint along {length} outer steps",
        {"cold": run(False), "warm": run(True)},
        "cold",
        metrics,
    )


def cases(args):
    for group in (unrolling, first_order, implicit, warm):
        yield from group(args.quick)


# ---- claims


def claims(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with what was measured, its bound, and whether it holds."""
    by_label = {
        case["label"].split(",")[0]
        if not case["label"].startswith("unroll")
        else case["label"]: case["entries"]
        for case in measured
    }
    unroll, short, long = (by_label[f"unroll, T={steps}"] for steps in (64, 16, 256))
    first = by_label["first-order pullbacks"]
    exact = next(entries for label, entries in by_label.items() if label.startswith("implicit"))
    adjoint = next(entries for label, entries in by_label.items() if label.startswith("adjoint"))

    def time(entry):
        return entry["ratio"]["median"]

    def memory(entry):
        return entry["metrics"]["temp MiB"]

    def peak(entry):
        return entry["metrics"]["peak MiB"]

    rows = [
        ("mixed-mode unroll, T=64: time over plain reverse", time(unroll["mixed"]), 0.4),
        (
            "mixed-mode unroll, T=64: memory over remat of each step",
            memory(unroll["mixed"]) / memory(unroll["step"]),
            1.0,
        ),
        (
            "sqrt checkpointing: memory at T=256 over T=16",
            memory(long["sqrt"]) / memory(short["sqrt"]),
            5.0,
        ),
        ("SAMA: time over a base step", time(first["SAMA"]), 2.2),
        ("SAMA: memory over a base step", peak(first["SAMA"]) / peak(first["base step"]), 1.3),
        (
            "base step, outer gradient and SAMA in one program: memory over a base step",
            peak(first[WHOLE]) / peak(first["base step"]),
            1.3,
        ),
        (
            "implicit: time over K G + k HVP + outer gradient + G by hand",
            time(next(e for n, e in exact.items() if n.startswith("implicit"))),
            1.15,
        ),
        (
            "warm adjoint: CG iterations over cold",
            adjoint["warm"]["metrics"]["CG a step"] / adjoint["cold"]["metrics"]["CG a step"],
            0.5,
        ),
    ]
    return [
        {"claim": claim, "measured": value, "at most": bound, "holds": bool(value <= bound)}
        for claim, value, bound in rows
    ]


def report(argv=None) -> list[dict[str, Any]]:
    measured = main(
        "costs", "What a hypergradient costs, in units of what it is made of.", cases, argv
    )
    rows = claims(measured)
    print("\n| claim | measured | at most | holds |\n| --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['claim']} | {row['measured']:.3g} | {row['at most']:.3g} | "
            f"{'yes' if row['holds'] else 'NO'} |"
        )
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given, _ = parser.parse_known_args(argv)
    path = given.out or (
        None if given.quick else RESULTS / "costs.json"
    )  # where the harness has just written
    if path is not None:
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "claims": rows}, indent=1) + "\n"
        )
    return rows


if __name__ == "__main__":
    report()
