"""A metagradient through a whole training, its states on the host: time over plain training,
memory, equal bits."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks._accelerator import encoder
from benchmarks._accelerator.common import Part, peak

FULL = encoder.Shape(36_000, 768, 15, 12, 3072, 512, causal=True)  # 134 million parameters
SMALL = encoder.Shape(50, 16, 2, 2, 32, 8, causal=True)


def run(part: Part) -> None:
    if not hasattr(bx, "replay"):
        part.skip("replay", "bx.replay is not there")
        return
    shape, rows, examples = part.pick(SMALL, FULL), part.pick(2, 16), part.pick(16, 8192)
    lengths = part.pick((4,), (16, 256))
    optimizer = optax.adam(1e-4, eps_root=1e-8)

    def inner(y, x, batch):
        losses = encoder.token_losses(shape, y, batch["tokens"], remat=True)
        return jnp.mean(x[batch["index"]] * losses)

    def outer(y, x, batch):
        return jnp.mean(encoder.token_losses(shape, y, batch["tokens"], remat=True))

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocabulary, (examples, shape.length)).astype(np.int32)
    order = rng.integers(0, examples, (max(lengths), rows)).astype(np.int32)
    batch_of = lambda step: {"tokens": tokens[order[step]], "index": order[step]}
    valid = {"tokens": jnp.asarray(tokens[:rows]), "index": jnp.arange(rows, dtype=jnp.int32)}
    y, x = encoder.initial(shape, jax.random.key(0)), jnp.ones(examples)
    part.note(parameters=encoder.size(y), batch=rows, length=shape.length)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(y, opt, x, batch):
        value, grads = jax.value_and_grad(inner)(y, x, batch)
        updates, opt = optimizer.update(grads, opt, y)
        return optax.apply_updates(y, updates), opt, value

    def plain(steps: int) -> float:
        """Seconds of the same training without a way back, its batches read likewise."""
        state: Any = jax.block_until_ready((jax.tree.map(jnp.copy, y), optimizer.init(y)))
        begin = time.perf_counter()
        for number in range(steps):
            *state, value = step(*state, x, batch_of(number))
        jax.block_until_ready(value)
        return time.perf_counter() - begin

    def metagradient(steps: int):
        fn = bx.replay.value_and_metagrad(inner, outer, optimizer, steps, throw=False)
        return fn(y, x, bx.replay.reader(batch_of), valid)

    # A replay of another length compiles its programs anew: the same ones, which a cache of this
    # process's own gives back.
    jax.config.update("jax_compilation_cache_dir", str(part.folder / f"{part.name} compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with part.recorded("compile plain"):
        plain(2)
    part.note(**{"peak of plain training, MiB": peak()})
    with part.recorded("compile"):
        metagradient(part.pick(2, 4))
    with part.device():
        _transfers(part, y)
        counted = part.pick(2, 32)
        plain_step = plain(counted) / counted
        for steps in lengths:
            expected = (
                5 * steps * plain_step
            )  # one that takes longer than its time is ended, and the rows before it are there
            if expected > part.left():
                part.skip(f"{steps} steps", f"would take {expected:.0f} s")
                continue
            with part.recorded(f"{steps} steps"):
                begin = time.perf_counter()
                found = metagradient(steps)
                seconds = time.perf_counter() - begin
                info, base = found.info, steps * plain_step
                part.add(
                    steps=steps, plain_seconds=base, seconds=seconds, over_plain=seconds / base,
                    there=info["seconds_there"],
                    back=info["seconds_back"], executed=info["executed"],
                    same_bits=info["checked"] > 0, code=int(info["code"]),
                    held=info["held"], host_MiB=info["host_bytes"] / 2**20, device_peak_MiB=peak(),
                    norm=float(jnp.linalg.norm(found.grad)),
                )  # fmt: skip


def _transfers(part: Part, params) -> None:
    """Parameters to the host and back: through NumPy, whose memory the system may page, and in the
    memory kind that it may not."""
    size = encoder.size(params) * 4
    device = jax.tree.leaves(params)[0].sharding

    def through_numpy():
        begin = time.perf_counter()
        there = jax.device_get(params)
        middle = time.perf_counter()
        jax.block_until_ready(jax.device_put(there, device))
        return middle - begin, time.perf_counter() - middle

    def pinned():
        begin = time.perf_counter()
        there = jax.block_until_ready(
            jax.device_put(params, device.with_memory_kind("pinned_host"))
        )
        middle = time.perf_counter()
        jax.block_until_ready(jax.device_put(there, device))
        return middle - begin, time.perf_counter() - middle

    for name, way in {"numpy": through_numpy, "pinned_host": pinned}.items():
        with part.recorded(f"transfer, {name}"):
            for _ in range(2):  # the first allocates
                params = jax.block_until_ready(
                    jax.tree.map(lambda a: a + 0, params)
                )  # an array keeps what the host has once read of it
                there, back = way()
            part.add(
                transfer=name,
                GB=size / 1e9,
                to_host_GB_s=size / there / 1e9,
                to_device_GB_s=size / back / 1e9,
            )
