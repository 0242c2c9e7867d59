"""Unrolling through a transformer of six layers whose blocks are checkpointed: time and memory of
the ways to keep the solve."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax

import bilevax as bx
from benchmarks._accelerator import encoder
from benchmarks._accelerator.common import (
    Part,
    compile_all,
    interleaved,
    median,
    memory,
    peak,
    ratio,
)

WAYS = ("mixed", "step", "none")


def run(part: Part) -> None:
    small, full = (
        encoder.Shape(100, 16, 2, 2, 32, 8, causal=True),
        encoder.Shape(8192, 512, 6, 8, 2048, 256, causal=True),
    )
    shape, rows, steps, examples = (
        part.pick(small, full),
        part.pick(2, 16),
        part.pick(2, 8),
        part.pick(16, 1024),
    )
    optimizer = optax.adam(1e-4, eps_root=1e-8)

    def inner(y, x, batch):
        return encoder.weighted(
            encoder.token_losses(shape, y, batch["tokens"], remat=True), x, batch["index"]
        )

    def outer(y, x, batch):
        return jnp.mean(encoder.token_losses(shape, y, batch["tokens"], remat=True))

    train, valid = (
        encoder.texts(shape, jax.random.key(number), rows, examples) for number in (1, 2)
    )
    y, x = encoder.initial(shape, jax.random.key(0)), jnp.zeros(examples)

    def plain(y, x, batch):
        def step(carry, _):
            y, opt = carry
            updates, opt = optimizer.update(jax.grad(inner)(y, x, batch), opt, y)
            return (optax.apply_updates(y, updates), opt), None

        return jax.lax.scan(step, (y, optimizer.init(y)), length=steps)[0][0]

    def lowered(way):
        if way == "plain":
            return jax.jit(plain).lower(y, x, train)
        solver = bx.inner.optax(optimizer, steps)
        fn = bx.value_and_hypergrad(
            inner, outer, solver=solver, hypergradient=bx.hypergradient.unrolled(checkpoint=way)
        )
        return jax.jit(
            lambda y, x, a, b: (lambda found: (found.value, found.grad))(fn(y, x, a, b))
        ).lower(y, x, train, valid)

    compiled = compile_all(
        part, {way: partial(lowered, way) for way in ("plain", *part.pick(WAYS[:2], WAYS))}
    )
    part.note(parameters=encoder.size(y), steps=steps, batch=rows, length=shape.length)
    with part.device():
        entries = {
            way: partial(fn, y, x, train, *([] if way == "plain" else [valid]))
            for way, fn in compiled.items()
        }
        grads = {}
        for way, fn in list(entries.items()):
            del entries[way]  # what does not fit the device is not timed
            with part.recorded(way):
                out = jax.block_until_ready(fn())
                part.note(**{f"peak after {way}, MiB": peak()})
                if way != "plain":
                    grads[way] = out[1]
                entries[way] = fn
        seconds = interleaved(entries, part.pick(2, 5))
        for way in entries:
            apart = {}
            if way in grads and "mixed" in grads:
                apart = {
                    "from mixed": float(
                        jnp.linalg.norm(grads[way] - grads["mixed"])
                        / jnp.linalg.norm(grads["mixed"])
                    )
                }
            over = (
                {"over_plain": ratio(seconds[way], seconds["plain"])} if "plain" in entries else {}
            )
            part.add(
                way=way,
                milliseconds=1e3 * median(seconds[way]),
                seconds=seconds[way],
                **over,
                **memory(compiled[way]),
                **apart,
            )
