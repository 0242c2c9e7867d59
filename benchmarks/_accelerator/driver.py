"""solve_bilevel beside the same mathematics as one scan by hand, at steps of about .05, .5 and 5
ms; loops that the host reads; steps a call."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevax as bx
from benchmarks._accelerator.common import Part, compile_all, interleaved, loops, median, ratio

RATE, OUTER = 0.5, optax.adam(0.1)


class Size(NamedTuple):
    """Examples, features, inner steps, CG iterations (0: one step without a linear solve), outer
    steps a call."""

    rows: int
    features: int
    inner_steps: int
    cg: int
    steps: int


FULL = {
    ".05 ms": Size(256, 32, 1, 0, 4096),
    ".5 ms": Size(4096, 128, 10, 5, 512),
    "5 ms": Size(262_144, 256, 10, 5, 64),
}
SMALL = {"small": Size(16, 4, 1, 0, 16), "middle": Size(16, 4, 3, 3, 16)}


def losses(w, batch):
    return optax.softmax_cross_entropy_with_integer_labels(batch["X"] @ w, batch["y"])


def inner(w, logits, batch):
    return jnp.mean(jax.nn.sigmoid(logits[batch["place"]]) * losses(w, batch)) + 1e-2 * jnp.sum(
        w**2
    )


def outer(w, logits, batch):
    return jnp.mean(losses(w, batch))


def cg(matvec, b, x, count, fixed):
    """`count` iterations from `x`; with a test of the residual, as a ``while_loop``, or without, as
    a loop of known length."""
    r = b - matvec(x)

    def body(carry):
        x, r, p, rr = carry
        ap = matvec(p)
        a = rr / jnp.sum(p * ap)
        x, r = x + a * p, r - a * ap
        new = jnp.sum(r * r)
        return x, r, r + (new / rr) * p, new

    start = (x, r, r, jnp.sum(r * r))
    if fixed:
        return jax.lax.fori_loop(0, count, lambda i, c: body(c), start)[0]
    small = 1e-12 * jnp.sum(b * b)
    return jax.lax.while_loop(
        lambda c: (c[0][3] > small) & (c[1] < count), lambda c: (body(c[0]), c[1] + 1), (start, 0)
    )[0][0]


def by_hand(size: Size, fixed: bool):
    def step(carry, _, train, valid):
        w, q, logits, opt = carry
        w = jax.lax.fori_loop(
            0, size.inner_steps, lambda i, w: w - RATE * jax.grad(inner)(w, logits, train), w
        )
        # The adjoint and its right side at the precision that the library chooses for this
        # tolerance.
        with jax.default_matmul_precision("highest" if size.cg else None):
            value, b = jax.value_and_grad(outer)(w, logits, valid)
        if size.cg:
            with jax.default_matmul_precision("highest"):
                _, products = jax.linearize(lambda w: jax.grad(inner, (0, 1))(w, logits, train), w)
            q = cg(lambda v: products(v)[0], b, q, size.cg, fixed)
            mixed = products(q)[1]
        else:
            mixed = jax.jvp(lambda w: jax.grad(inner, 1)(w, logits, train), (w,), (b,))[1]
        grad = -mixed
        updates, opt = OUTER.update(grad, opt)
        return (w, q, optax.apply_updates(logits, updates), opt), (
            value,
            jnp.sqrt(jnp.sum(grad**2)),
        )

    def run(w, logits, train, valid):
        carry = (w, jnp.zeros_like(w), logits, OUTER.init(logits))
        return jax.lax.scan(lambda c, i: step(c, i, train, valid), carry, length=size.steps)

    return jax.jit(run)


def data(size: Size) -> tuple[Any, Any, Any, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    truth = jax.random.normal(keys[0], (size.features, 10))

    def draw(key, rows):
        X = jax.random.normal(key, (rows, size.features)) / jnp.sqrt(size.features)
        return {
            "X": X,
            "y": jnp.argmax(X @ truth, 1).astype(jnp.int32),
            "place": jnp.arange(rows, dtype=jnp.int32),
        }

    return (
        jnp.zeros((size.features, 10)),
        jnp.zeros(size.rows),
        draw(keys[1], size.rows),
        draw(keys[2], size.rows),
    )


def algorithm(size: Size):
    HG = bx.hypergradient
    method = (
        HG.implicit(bx.linear.cg(maxiter=size.cg, tol=1e-6), max_residual=jnp.inf)
        if size.cg
        else HG.one_step(1.0)
    )
    return bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(RATE), size.inner_steps), method, OUTER
    )


def ours(size: Size, problem, built, steps: int):
    w, logits, train, valid = problem
    found = bx.solve_bilevel(
        inner,
        outer,
        w,
        logits,
        inner_data=train,
        outer_data=valid,
        algorithm=built,
        num_steps=steps,
        keep="last",
        throw=False,
    )
    return found.outer_params, found.history["value"][-1]


def run(part: Part) -> None:
    sizes = part.pick(SMALL, FULL)
    problems = {name: data(size) for name, size in sizes.items()}
    built = {name: algorithm(size) for name, size in sizes.items()}
    hand = {
        (name, fixed): by_hand(size, fixed)
        for name, size in sizes.items()
        for fixed in ((False, True) if size.cg else (True,))
    }
    lowered = {
        f"{name}, {'fixed' if fixed else 'while'}": partial(fn.lower, *problems[name])
        for (name, fixed), fn in hand.items()
    }
    compiled = compile_all(part, lowered)
    for name, size in sizes.items():
        with part.recorded(f"compile ours, {name}"):
            jax.block_until_ready(ours(size, problems[name], built[name], size.steps))
    first = next(iter(sizes))
    for steps in part.pick((4,), (256, 1024)):
        with part.recorded(f"compile {steps} steps a call"):
            jax.block_until_ready(ours(sizes[first], problems[first], built[first], steps))
    with part.device():
        for name, size in sizes.items():
            if part.left() < 0:
                part.skip(name, "no time left")
                continue
            with part.recorded(name):
                entries = {
                    key.split(", ")[1]: partial(fn, *problems[name])
                    for key, fn in compiled.items()
                    if key.split(", ")[0] == name
                }
                entries["solve_bilevel"] = partial(
                    ours, size, problems[name], built[name], size.steps
                )
                seconds = interleaved(entries, part.pick(2, 5))
                reference = seconds.get("while", seconds["fixed"])
                for entry, times in seconds.items():
                    counted = (
                        loops(compiled[f"{name}, {entry}"])
                        if f"{name}, {entry}" in compiled
                        else {}
                    )
                    part.add(
                        step=name, entry=entry,
                        milliseconds_a_step=1e3 * median(times) / size.steps,
                        over_hand=ratio(times, reference),
                        over_fixed=ratio(times, seconds["fixed"]), **counted,
                    )  # fmt: skip
        name, size = first, sizes[first]
        for steps in part.pick((4, 16), (256, 1024, 4096)):
            if part.left() < 0:
                part.skip(f"{steps} steps a call", "no time left")
                continue
            with part.recorded(f"{steps} steps a call"):
                seconds = interleaved(
                    {"ours": partial(ours, size, problems[name], built[name], steps)},
                    part.pick(2, 5),
                )["ours"]
                part.add(steps_a_call=steps, milliseconds_a_step=1e3 * median(seconds) / steps)
