"""SAMA's headline: an encoder of 110 million parameters, data weights, mixed precision; each
method's outer step over a step of plain training."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevax as bx
from benchmarks._accelerator import encoder
from benchmarks._accelerator.common import (
    Part,
    compile_all,
    interleaved,
    loops,
    median,
    memory,
    peak,
    ratio,
)

HG, L = bx.hypergradient, bx.linear
PLAIN, GRADIENT = "plain", "outer gradient"
ORDER = (
    "sama",
    GRADIENT,
    "finite difference",
    "cg 5",
    "neumann 5",
    "sama, difference",
    "unrolled 2",
)


def problem(part: Part) -> tuple[encoder.Shape, int, int]:
    """The encoder's shape, the batch and the number of weighted examples."""
    return part.pick((encoder.Shape(500, 32, 2, 2, 64, 16), 4, 64), (encoder.BERT, 32, 8192))


def methods(number) -> dict[str, tuple[Any, int]]:
    """Each method and its inner steps; `number` is the damping of the linear systems, without which
    CG ends at the first negative curvature."""
    return {
        "sama": (HG.sama(), 1),
        "sama, difference": (HG.sama(product="difference"), 1),
        "finite difference": (HG.finite_difference(1e-5), 1),
        "cg 5": (
            HG.implicit(L.cg(5, 1e-12), damping=number, warm_start=False, max_residual=jnp.inf),
            1,
        ),
        "neumann 5": (
            HG.implicit(L.neumann(5, 1e-3), damping=number, warm_start=False, max_residual=jnp.inf),
            1,
        ),
        "unrolled 2": (HG.unrolled(), 2),
    }


def run(part: Part) -> None:
    shape, rows, examples = problem(part)
    optimizer, outer_optimizer = optax.adam(1e-5, eps_root=1e-12), optax.adam(1e-3)

    def inner(y, x, batch):
        return encoder.weighted(
            encoder.class_losses(shape, y, batch["tokens"], batch["labels"]), x, batch["index"]
        )

    def outer(y, x, batch):
        return jnp.mean(encoder.class_losses(shape, y, batch["tokens"], batch["labels"]))

    train, valid = (
        encoder.texts(shape, jax.random.key(number), rows, examples) for number in (1, 2)
    )
    fresh = lambda: (encoder.initial(shape, jax.random.key(0)), jnp.zeros(examples))
    names, damping = part.pick(["sama", "cg 5", "unrolled 2"], list(methods(1.0))), jnp.float32(1.0)

    def function(name, number):
        method, steps = methods(number)[name]
        return bx.value_and_hypergrad(
            inner, outer, solver=bx.inner.optax(optimizer, steps), hypergradient=method
        )

    def carry_of(name):
        y, x = fresh()
        if name == PLAIN:
            return y, x, optimizer.init(y), ()
        return y, x, function(name, 1.0).init(y), outer_optimizer.init(x)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(name, carry, number, train, valid):
        y, x, state, opt = carry
        if name == PLAIN:
            value, grads = jax.value_and_grad(inner)(y, x, train)
            updates, state = optimizer.update(grads, state, y)
            return (optax.apply_updates(y, updates), x, state, opt), {"value": value}
        found = function(name, number)(y, x, train, valid, state=state)
        updates, opt = outer_optimizer.update(found.grad, opt, x)
        info = {
            key: found.info[key]
            for key in ("code", "adjoint_iterations", "adjoint_residual")
            if key in found.info
        }
        return (found.inner_params, optax.apply_updates(x, updates), found.state, opt), {
            "value": found.value,
            **info,
        }

    gradient = jax.jit(lambda y, x, batch: jax.value_and_grad(outer, (0, 1))(y, x, batch))

    def lowered(name):
        if name == GRADIENT:
            return gradient.lower(*jax.eval_shape(fresh), valid)
        return step.lower(name, jax.eval_shape(partial(carry_of, name)), damping, train, valid)

    compiled = compile_all(
        part, {name: partial(lowered, name) for name in (PLAIN, *names, GRADIENT)}
    )
    part.note(parameters=encoder.size(jax.eval_shape(fresh)[0]), batch=rows, length=shape.length)
    with part.device():
        chosen: dict[str, float] = {}
        repeats, rounds = part.pick((1, 2), (8, 5))
        carries, codes = {}, {}

        def steps_of(name):
            number = jnp.float32(chosen.get(name, 1.0))

            def several():
                if name == GRADIENT:
                    y, x = carries[PLAIN][:2]
                    return [compiled[name](y, x, valid) for _ in range(repeats)][-1]
                for _ in range(repeats):
                    carries[name], info = compiled[name](carries[name], number, train, valid)
                codes[name] = info
                return carries[name]

            return several

        peaks: dict[str, float | None] = {}
        for name in (
            PLAIN,
            "finite difference",
            "sama, difference",
            "sama",
            "neumann 5",
            "cg 5",
            "unrolled 2",
        ):
            if name in ("cg 5", "neumann 5") and name in compiled:
                with part.recorded(f"damping of {name}"):
                    chosen[name] = _damping(part, name, compiled[name], carry_of, train, valid)
            if name in compiled:
                with part.recorded(f"memory of {name}"):
                    carries[name] = carry_of(name)
                    jax.block_until_ready(steps_of(name)())
                    peaks[name] = peak()
                    if name != PLAIN:
                        del carries[name]
        part.note(peak_after=peaks)
        # In turn with plain training: all states at once would not be what one run holds.
        for name in [name for name in ORDER if name in compiled]:
            if part.left() < 0:
                part.skip(name, "no time left")
                continue
            with part.recorded(name):
                if name != GRADIENT:
                    carries[name] = carry_of(name)
                seconds = interleaved({PLAIN: steps_of(PLAIN), name: steps_of(name)}, rounds)
                carries = {PLAIN: carries[PLAIN]}
                count = 2 if name == "unrolled 2" else 1
                each = [value / repeats for value in seconds[name]]
                info = {key: float(value) for key, value in codes.get(name, {}).items()}
                part.add(
                    method=name, seconds=each, milliseconds=1e3 * median(each), inner_steps=count,
                    plain_milliseconds=1e3 * median(seconds[PLAIN]) / repeats,
                    over_plain=ratio(seconds[name], seconds[PLAIN]),
                    **memory(compiled[name]), **loops(compiled[name]), **info,
                )  # fmt: skip
        part.add(method=PLAIN, **memory(compiled[PLAIN]), **loops(compiled[PLAIN]))
        _summary(part)


def _damping(part: Part, name: str, compiled, carry_of, train, valid) -> float:
    """The least damping at which the solve takes its five steps in each of some training steps, and
    none to measure a residual below rounding."""
    tried = {}
    for number in part.pick((100.0,), (100.0, 1e3, 1e4, 1e5)):
        carry, counts = carry_of(name), []
        for _ in range(part.pick(1, 6)):
            carry, info = compiled(carry, jnp.float32(number), train, valid)
            counts.append(int(info["adjoint_iterations"]))
        tried[number] = counts
        if set(counts) == {5}:
            break
    part.note(
        **{
            f"adjoint iterations by damping, {name}": {
                str(number): counts for number, counts in tried.items()
            }
        }
    )
    return min(tried, key=lambda number: sum(abs(count - 5) for count in tried[number]))


def _summary(part: Part) -> None:
    """The promises beside what was measured."""
    rows = {row["method"]: row for row in part.record["rows"]}
    if "sama" not in rows or PLAIN not in rows:
        return
    sama, plain = rows["sama"], rows[PLAIN]
    outer = rows.get(GRADIENT, {}).get("over_plain", float("nan"))
    over = sama["over_plain"]
    found = {
        "sama: whole outer step (one inner step) over a plain step": over,
        "sama: its pullback alone over a plain step": over - 1 - outer,
        "sama: outer step of ten inner steps over ten plain steps": (9 + over) / 10,
        "sama: memory over plain training": sama["peak MiB"] / plain["peak MiB"],
    }
    for name in ("cg 5", "neumann 5", "finite difference"):
        if name in rows:
            found[f"sama: throughput over {name}"] = rows[name]["over_plain"] / over
            found[f"{name}: memory over sama"] = rows[name]["peak MiB"] / sama["peak MiB"]
    part.note(found=found)
