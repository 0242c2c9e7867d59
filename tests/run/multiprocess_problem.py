"""One process of a run of several: ``python -m tests.run.multiprocess_problem rank processes port folder steps [terminate]``."""

# ruff: noqa: E402 (jax is told of the other processes before anything that could ask it for its devices)

import os
import signal
import sys

import jax

jax.config.update("jax_enable_x64", True)
rank, processes, port, folder, steps = *map(int, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)

import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx

SAMA = bx.algorithms.double_loop(bx.inner.optax(optax.adam(0.05), 2), bx.hypergradient.sama(), optax.adam(0.1))
CASES = {
    "data_parallel": (bx.sharding.data_parallel(mean=True), bx.algorithms.soba(0.1, 0.1)),
    "fsdp": (bx.sharding.fsdp(min_size=8), SAMA),
}


def inner(y, x, batch):
    return 0.5 * jnp.mean((batch["x"] @ y - batch["y"]) ** 2) + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def outer(y, x, batch):
    return 0.5 * jnp.mean((batch["x"] @ y - batch["y"]) ** 2)


def rows(seed):
    rng = np.random.default_rng(seed)
    whole = {"x": rng.standard_normal((16, 8)), "y": rng.standard_normal(16)}
    return jax.tree.map(lambda a: a[rank * 16 // processes : (rank + 1) * 16 // processes], whole)


def terminate(event):
    if event.step == 4 and rank == processes - 1:  # one process is told, all stop
        os.kill(os.getpid(), signal.SIGTERM)


for name, (sharding, algorithm) in CASES.items():
    train, valid = (bx.sharding.from_process(sharding, rows(seed)) for seed in (0, 1))
    out = bx.solve_bilevel(
        inner, outer, np.zeros(8), np.full(8, -2.0), inner_data=train, outer_data=valid, algorithm=algorithm, num_steps=steps, keep="last",
        sharding=sharding, checkpoint=bx.checkpoint.every(5, f"{folder}/{name}"), key=jax.random.key(0), progress=True,
        callbacks=[bx.callbacks.every(2, terminate)] if "terminate" in sys.argv else [],
    )  # fmt: skip
    everywhere = jax.jit(lambda a: a, out_shardings=sharding.named())
    params = [np.asarray(everywhere(a)) for a in (out.inner_params, out.outer_params)]
    result = {"inner": params[0], "outer": params[1], "value": out.history["value"], "from": out.stats["resumed_from"], "steps": out.stats["steps"]}
    np.savez(f"{folder}/{name}.{processes}.{rank}.npz", code=int(out.result), devices=jax.device_count(), **result)
