"""Right on this device: closed forms by every method, batch statistics, graphs of levels, the error
bound; in float32, at "highest", and in bfloat16.

An error is relative, and beside it stands its quotient by the rounding unit times the condition of
the inner Hessian.
"""

from __future__ import annotations

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks._accelerator.common import Part
from tests.multilevel.multilevel_cases import CASES, reference
from tests.problems import (
    PROBLEMS,
    TEXTBOOK,
    flatten,
    neumann_quadratic,
    one_step_quadratic,
    unrolled_quadratic,
)

H, L = bx.hypergradient, bx.linear
STILL = bx.inner.optax(optax.set_to_zero(), 1)  # leaves the point where it is
UNITS = {
    "float32": float(np.finfo(np.float32).eps),
    "highest": float(np.finfo(np.float32).eps),
    "bfloat16": 2.0**-7,
}


def relative(actual, expected) -> float:
    actual, expected = flatten(actual), flatten(expected)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def single(tree):
    return jax.tree.map(
        lambda a: jnp.asarray(
            a, jnp.float32 if np.issubdtype(np.asarray(a).dtype, np.floating) else None
        ),
        tree,
    )


def rounded(objective):
    """Its arithmetic in bfloat16; parameters, and so adjoints, stay float32."""

    def cast(tree):
        return jax.tree.map(
            lambda a: (
                a.astype(jnp.bfloat16) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a
            ),
            tree,
        )

    def fn(y, x, batch):
        return objective(cast(y), cast(x), cast(batch)).astype(jnp.float32)

    return fn


def methods(form, mode) -> dict[str, tuple[Any, Any, Any]]:
    """Name -> (method, inner solver, answer), all of which start at the solution but for those with
    an answer of their own."""
    exact = form.hypergradient(form.outer_params)
    tol = 1e-6 if mode != "bfloat16" else 1e-3
    anything = dict(max_residual=jnp.inf)
    found = {
        "cg": (H.implicit(L.cg(500, tol), **anything), STILL, exact),
        "cholesky": (H.implicit(L.cholesky(), **anything), STILL, exact),
    }
    if mode == "float32":
        extra = {
            "minres": L.minres(500, tol),
            "gmres": L.gmres(100, tol),
            "bicgstab": L.bicgstab(500, tol),
            "lu": L.lu(),
        }
        found |= {
            name: (H.implicit(linear, **anything), STILL, exact) for name, linear in extra.items()
        }
        found |= {
            "low memory": (H.implicit(L.cg(500, tol), low_memory=True, **anything), STILL, exact)
        }
    if form.coefficients is not None:
        step, steps = 0.7 / form.smoothness.largest, 6
        descent = bx.inner.optax(optax.sgd(step), steps)
        for name, method in {
            "unrolled": H.unrolled(),
            "forward": H.forward(),
            "sqrt": H.unrolled(checkpoint="sqrt"),
        }.items():
            found[name] = method, descent, unrolled_quadratic(form, step, steps).hypergradient
        found["neumann 9"] = (
            H.implicit(L.neumann(9, step), **anything),
            STILL,
            neumann_quadratic(form, step, 9),
        )
        found["one step"] = H.one_step(0.2), STILL, one_step_quadratic(form, 0.2)
        found["finite difference"] = (
            H.finite_difference(0.2, radius=1.0),
            STILL,
            one_step_quadratic(form, 0.2),
        )
        still = optax.chain(optax.sgd(0.2), optax.scale(1.0))
        found["sama"] = (
            H.sama(),
            bx.inner.optax(still, 1),
            None,
        )  # of the point that its one step reaches
    return found


def closed_form(part: Part, name: str, mode: str) -> None:
    form = PROBLEMS[name]
    entries = methods(form, mode)
    inner, outer = (
        (rounded(form.inner), rounded(form.outer))
        if mode == "bfloat16"
        else (form.inner, form.outer)
    )
    y, x, a, b = single(
        (form.solution(form.outer_params), form.outer_params, form.inner_batch, form.outer_batch)
    )
    start = single(form.inner_params)

    @jax.jit
    def run(y, start, x, a, b):
        out = {}
        for key, (method, solver, _) in entries.items():
            fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)
            found = fn(y if solver is STILL else start, x, a, b)
            out[key] = (
                found.grad,
                found.inner_params,
                found.info["code"],
                found.info.get("adjoint_iterations", 0),
            )
        return out

    with jax.default_matmul_precision("highest") if mode == "highest" else contextlib.nullcontext():
        out = jax.device_get(run(y, start, x, a, b))
    condition = float(np.linalg.cond(form.inner_hessian(form.outer_params)))
    for key, (grad, reached, code, iterations) in out.items():
        want = entries[key][2]
        if want is None:
            want = one_step_quadratic(form, 0.2, inner_params=jax.tree.map(np.float64, reached))
        error = relative(grad, want)
        part.add(
            problem=name, mode=mode, method=key, error=error, condition=condition,
            over_unit=error / (UNITS[mode] * condition), code=int(code),
            iterations=int(iterations),
        )  # fmt: skip


# ---- against the same program in float64 on the host


def in_double(fn, *args):
    """`fn` and its arguments in float64 on the host's processor."""
    with (
        jax.enable_x64(True),
        jax.default_device(jax.devices("cpu")[0]),
        jax.numpy_dtype_promotion("standard"),
    ):
        wide = jax.tree.map(
            lambda a: (
                jnp.asarray(np.asarray(a), jnp.float64)
                if np.asarray(a).dtype.kind == "f"
                else jnp.asarray(np.asarray(a))
            ),
            args,
        )
        return jax.device_get(jax.jit(fn)(*wide))


def batch_norm(y, x, batch, model):
    """A layer with batch statistics, data weights, and running statistics as the model's state."""
    hidden = batch["X"] @ y["in"]
    mean, var = jnp.mean(hidden, axis=0), jnp.var(hidden, axis=0)
    normal = (hidden - mean) / jnp.sqrt(var + 1e-3) * y["scale"] + y["shift"]
    logits = jnp.tanh(normal) @ y["out"]
    losses = (
        jax.nn.logsumexp(logits, axis=1)
        - jnp.take_along_axis(logits, batch["y"][:, None], axis=1)[:, 0]
    )
    model = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, model, {"mean": mean, "var": var})
    decay = 0.05 * sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(y))
    return jnp.mean(jax.nn.sigmoid(x[batch["place"]]) * losses) + decay, model


def validated(y, x, batch, model):
    """By the running statistics."""
    normal = (batch["X"] @ y["in"] - model["mean"]) / jnp.sqrt(model["var"] + 1e-3) * y[
        "scale"
    ] + y["shift"]
    logits = jnp.tanh(normal) @ y["out"]
    losses = (
        jax.nn.logsumexp(logits, axis=1)
        - jnp.take_along_axis(logits, batch["y"][:, None], axis=1)[:, 0]
    )
    return jnp.mean(losses), model


def network(part: Part, name: str) -> None:
    rows, features, width = part.pick((16, 4, 8), (512, 64, 128))
    rng = np.random.default_rng(0)
    y = {
        "in": rng.standard_normal((features, width)) / np.sqrt(features), "scale": np.ones(width),
        "shift": np.zeros(width),
        "out": rng.standard_normal((width, 4)) / np.sqrt(width),
    }  # fmt: skip
    draw = lambda: {
        "X": rng.standard_normal((rows, features)),
        "y": rng.integers(0, 4, rows).astype(np.int32),
        "place": np.arange(rows, dtype=np.int32),
    }
    model = {"mean": np.zeros(width), "var": np.ones(width)}
    args = jax.tree.map(
        lambda a: np.float32(a) if a.dtype.kind == "f" else a,
        (y, np.zeros(rows), draw(), draw(), model),
    )
    inner, outer = bx.objective(batch_norm, stateful=True), bx.objective(validated, stateful=True)
    method = {
        "unrolled": H.unrolled(),
        "cg": H.implicit(L.cg(100, 1e-5), damping=1.0, max_residual=jnp.inf),
        "sama": H.sama(),
    }[name]
    solver = bx.inner.optax(optax.sgd(0.1, momentum=0.9), 5)
    fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)

    def grad(y, x, a, b, model):
        return fn(y, x, a, b, state=fn.init(y, model_state=model)).grad

    want = in_double(grad, *args)
    for mode in ("float32", "highest"):
        with (
            jax.default_matmul_precision("highest")
            if mode == "highest"
            else contextlib.nullcontext()
        ):
            error = relative(jax.jit(grad)(*jax.tree.map(jnp.asarray, args)), want)
        part.add(
            problem="batch norm", mode=mode, method=name, error=error, over_unit=error / UNITS[mode]
        )


def graph(part: Part, name: str) -> None:
    case = CASES[name]
    *lower, upper = case.objectives
    params = case.params()
    want = in_double(reference(case), params)[1]
    descent = bx.inner.optax(bx.tunable(optax.sgd, learning_rate=case.step_size), case.steps)
    exact = H.implicit(L.cg(maxiter=50, tol=1e-6))
    levels = [bx.Level(n, case.objectives[n], solver=descent, hypergradient=exact) for n in lower]
    levels.append(
        bx.Level(upper, case.objectives[upper], solver=bx.tunable(optax.sgd, learning_rate=0.1))
    )
    found = jax.jit(bx.value_and_multilevel_grad(levels))(single(params))
    error = relative(found.grad, want)
    part.add(
        problem=f"levels: {name}",
        mode="float32",
        method="cg",
        error=error,
        over_unit=error / UNITS["float32"],
    )


def bound(part: Part) -> None:
    """The error bound holds, at a point that is not solved and with a loose adjoint."""
    form = PROBLEMS["ridge"]
    solver, method = (
        bx.inner.optax(optax.sgd(1 / form.smoothness.largest), 20),
        H.implicit(L.cg(500, 1e-2)),
    )
    args = single((form.inner_params, form.outer_params, form.inner_batch, form.outer_batch))
    found = jax.jit(
        bx.value_and_hypergrad(form.inner, form.outer, solver=solver, hypergradient=method)
    )(*args)
    constants = bx.diagnostics.estimate_constants(
        form.inner, form.outer, found.inner_params, *args[1:]
    )
    limit = float(bx.error_bound(found.info, constants).total)
    error = float(
        np.linalg.norm(flatten(found.grad) - flatten(form.hypergradient(form.outer_params)))
    )
    part.add(bound="ridge", error=error, limit=limit, holds=bool(error <= limit))


def run(part: Part) -> None:
    names = part.pick(TEXTBOOK[:1], TEXTBOOK)
    pairs = itertools.product(
        ("float32",) if part.rehearse else ("float32", "highest", "bfloat16"), names
    )
    jobs = {f"{name}, {mode}": partial(closed_form, part, name, mode) for mode, name in pairs}
    jobs |= {
        f"batch norm, {name}": partial(network, part, name)
        for name in part.pick(("unrolled",), ("unrolled", "cg", "sama"))
    }
    jobs |= {
        f"levels: {name}": partial(graph, part, name)
        for name in part.pick(("nested3",), ("chain3", "nested3", "diamond"))
    }
    jobs |= {"bound": partial(bound, part)}

    def one(item):
        with part.recorded(item[0]):
            item[1]()

    with ThreadPoolExecutor(part.pick(2, 12)) as pool:
        list(pool.map(one, jobs.items()))
    rows = [
        row
        for row in part.record["rows"]
        if row.get("mode") in ("float32", "highest") and "condition" in row
    ]
    worst = max(rows, key=lambda row: row["over_unit"])
    part.note(
        found={
            "worst error of the closed forms over unit x condition": worst["over_unit"],
            "at": f"{worst['problem']}, {worst['method']}",
        }
    )
    with part.device():
        pass
