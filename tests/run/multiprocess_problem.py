"""One process of a run of several: ``python -m tests.run.multiprocess_problem rank processes port
folder steps [terminate]``."""

import os
import signal
import sys

import jax
import numpy as np
import optax

CASES = ("data_parallel", "fsdp")


def solve(
    rank: int, processes: int, folder, steps: int, devices=None, told: bool = False
) -> dict[str, dict]:
    """Both cases, from this process's rows; told to end, the last process is at its fourth step,
    and all stop."""
    import jax.numpy as jnp

    import bilevax as bx

    def inner(y, x, batch):
        return 0.5 * jnp.mean((batch["x"] @ y - batch["y"]) ** 2) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    def outer(y, x, batch):
        return 0.5 * jnp.mean((batch["x"] @ y - batch["y"]) ** 2)

    def rows(seed):
        rng = np.random.default_rng(seed)
        whole = {"x": rng.standard_normal((16, 8)), "y": rng.standard_normal(16)}
        return jax.tree.map(
            lambda a: a[rank * 16 // processes : (rank + 1) * 16 // processes], whole
        )

    def terminate(event):
        if event.step == 4 and rank == processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    sama = bx.algorithms.double_loop(
        bx.inner.optax(optax.adam(0.05), 2), bx.hypergradient.sama(), optax.adam(0.1)
    )
    cases = {
        "data_parallel": (
            bx.sharding.data_parallel(devices, mean=True),
            bx.algorithms.soba(0.1, 0.1),
        ),
        "fsdp": (bx.sharding.fsdp(devices, min_size=8), sama),
    }
    found = {}
    for name, (sharding, algorithm) in cases.items():
        train, valid = (bx.sharding.from_process(sharding, rows(seed)) for seed in (0, 1))
        out = bx.solve_bilevel(
            inner, outer, np.zeros(8), np.full(8, -2.0), inner_data=train, outer_data=valid,
            algorithm=algorithm, num_steps=steps, keep="last",
            sharding=sharding, checkpoint=bx.checkpoint.every(5, f"{folder}/{name}"),
            key=jax.random.key(0), progress=processes > 1,
            callbacks=[bx.callbacks.every(2, terminate)] if told else [],
        )  # fmt: skip
        everywhere = jax.jit(lambda a: a, out_shardings=sharding.named())
        params = [np.asarray(everywhere(a)) for a in (out.inner_params, out.outer_params)]
        result = {
            "inner": params[0],
            "outer": params[1],
            "value": out.history["value"],
            "from": out.stats["resumed_from"],
        }
        found[name] = result | {
            "steps": out.stats["steps"],
            "code": int(out.result),
            "devices": sharding.mesh.size,
        }
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    rank, processes, port, folder, steps = *map(int, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    for name, result in solve(rank, processes, folder, steps, told="terminate" in sys.argv).items():
        np.savez(f"{folder}/{name}.{processes}.{rank}.npz", **result)
