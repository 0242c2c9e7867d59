"""Which precision of matrix products an adjoint solve needs, and what the products cost.

A ridge regression with several outputs whose penalties are learned: matrix times matrix in every
product, its condition set by the data's spectrum, the answer by a dense solve in float64. The inner
point is given, exact to rounding: what is measured is the adjoint and the mixed product.
"""

from __future__ import annotations

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks._accelerator.common import Part, compile_all, interleaved, median

EPS = float(np.finfo(np.float32).eps)
STILL = bx.inner.optax(optax.set_to_zero(), 1)
CONDITIONS = (1e1, 1e2, 1e3, 1e4)
# Precision of the products: None is the library's own choice, by its tolerance.
MODES = {
    "library, tol 1e-6": (None, 1e-6), "library, tol 1e-2": (None, 1e-2),
    "user's default": ("default", 1e-6), "high": ("high", 1e-6),
    "highest": ("highest", 1e-6), "bfloat16 objective": (None, 1e-6),
}  # fmt: skip


def losses(w, batch):
    residual = batch["X"] @ w - batch["Y"]
    return 0.5 * jnp.mean(jnp.sum(residual * residual, axis=1))


def inner(w, x, batch):
    return losses(w, batch) + 0.5 * jnp.sum(jnp.exp(x)[:, None] * w * w)


def outer(w, x, batch):
    return losses(w, batch)


def half(fn):
    """The same with operands rounded to bfloat16, summed in float32: parameters, and so the
    adjoint, stay float32."""

    def rounded(w, x, batch):
        batch = jax.tree.map(lambda a: a.astype(jnp.bfloat16), batch)
        residual = jnp.matmul(
            batch["X"], w.astype(jnp.bfloat16), preferred_element_type=jnp.float32
        ) - batch["Y"].astype(jnp.float32)
        value = 0.5 * jnp.mean(jnp.sum(residual * residual, axis=1))
        return value + 0.5 * jnp.sum(jnp.exp(x)[:, None] * w * w) if fn is inner else value

    return rounded


def problem(n: int, d: int, c: int, condition: float) -> dict:
    """Data in float32, and the solution and the hypergradient of exactly that data in float64."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    spread = np.geomspace(1, condition**-0.5, d)
    made = []
    for _ in range(2):
        rows = np.linalg.qr(rng.standard_normal((n, d)))[0] * np.sqrt(n) * spread @ rotation
        made.append((rows.astype(np.float32), rng.standard_normal((n, c)).astype(np.float32)))
    x = np.full(d, np.log(0.1 / condition), np.float32)
    (X, Y), (V, T) = ((a.astype(np.float64), b.astype(np.float64)) for a, b in made)
    gram = X.T @ X / n + np.diag(np.exp(x.astype(np.float64)))
    w = np.linalg.solve(gram, X.T @ Y / n)
    q = np.linalg.solve(gram, V.T @ (V @ w - T) / n)
    exact = -np.exp(x.astype(np.float64)) * np.sum(w * q, axis=1)
    batches = [{"X": jnp.asarray(rows), "Y": jnp.asarray(targets)} for rows, targets in made]
    return {
        "w": jnp.asarray(w, jnp.float32),
        "x": jnp.asarray(x),
        "batches": batches,
        "exact": exact,
        "gram": gram,
        "condition": np.linalg.cond(gram),
    }


def run(part: Part) -> None:
    n, d, c = part.pick((64, 16, 8), (4096, 512, 256))
    forms = [
        problem(n, d, c, condition)
        for condition in (CONDITIONS[:2] if part.rehearse else CONDITIONS)
    ]
    modes = {name: MODES[name] for name in (list(MODES)[:3] if part.rehearse else MODES)}

    def under(precision):
        return jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()

    def gradient(name):
        precision, tol = modes[name]
        functions = (half(inner), half(outer)) if name.startswith("bfloat16") else (inner, outer)
        method = bx.hypergradient.implicit(bx.linear.cg(500, tol), max_residual=jnp.inf)
        fn = bx.value_and_hypergrad(*functions, solver=STILL, hypergradient=method)
        with under(precision):
            return jax.jit(lambda w, x, a, b: fn(w, x, a, b)).lower(
                forms[0]["w"], forms[0]["x"], *forms[0]["batches"]
            )

    def product(name):
        """One Hessian-vector product, eight in a row."""
        precision, _ = modes[name]
        function = half(inner) if name.startswith("bfloat16") else inner
        library = precision is None and not name.endswith("1e-2")

        def eight(w, x, a, v):
            _, hvp = jax.linearize(lambda w: jax.grad(function)(w, x, a), w)
            return jax.lax.fori_loop(0, 8, lambda i, v: hvp(v), v), hvp(v)

        with under("highest" if library and not name.startswith("bfloat16") else precision):
            return jax.jit(eight).lower(
                forms[0]["w"], forms[0]["x"], forms[0]["batches"][0], forms[0]["w"]
            )

    programs = {name: partial(gradient, name) for name in modes} | {
        f"product, {name}": partial(product, name) for name in modes
    }
    compiled = compile_all(part, programs)
    for name in modes:
        for form in forms:
            with part.recorded(f"{name}, condition {form['condition']:.0e}"):
                found = compiled[name](form["w"], form["x"], *form["batches"])
                error = np.linalg.norm(
                    np.asarray(found.grad, np.float64) - form["exact"]
                ) / np.linalg.norm(form["exact"])
                part.add(
                    products=name, condition=float(form["condition"]),
                    iterations=int(found.info["adjoint_iterations"]),
                    residual=float(found.info["adjoint_residual"]), error=float(error),
                    over_unit=float(error / (EPS * form["condition"])),
                )  # fmt: skip
    form = forms[0]
    v = np.random.default_rng(1).standard_normal(form["w"].shape).astype(np.float32)
    exact = form["gram"] @ v.astype(np.float64)
    with part.device():
        entries = {}
        for name in modes:
            if f"product, {name}" in compiled:
                entries[name] = partial(
                    compiled[f"product, {name}"],
                    form["w"],
                    form["x"],
                    form["batches"][0],
                    jnp.asarray(v),
                )
        seconds = interleaved(entries, part.pick(2, 9))
        for name, fn in entries.items():
            error = np.linalg.norm(np.asarray(fn()[1], np.float64) - exact) / np.linalg.norm(exact)
            part.add(
                one_product=name,
                microseconds=1e6 * median(seconds[name]) / 9,
                relative_error=float(error),
            )
