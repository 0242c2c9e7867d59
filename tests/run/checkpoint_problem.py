"""A small sampled run that is saved, in a module of its own for the processes that are killed.

``python -m tests.run.checkpoint_problem`` reads lines ``directory result log`` and forks a process
for each, whose number it prints: forks of one process that has imported everything are on their way
in a second.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx

STEPS, EVERY = 150, 5
ALGORITHM = bx.algorithms.soba(0.1, 0.1)


def inner(y, x, batch):
    return 0.5 * jnp.mean((batch["x"] @ y["w"] - batch["y"]) ** 2) + 0.5 * jnp.exp(x) * jnp.sum(
        y["w"] ** 2
    )


def outer(y, x, batch):
    return 0.5 * jnp.mean((batch["x"] @ y["w"] - batch["y"]) ** 2)


def data(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((32, 4)).astype(np.float32)
    return {"x": x, "y": (x @ np.ones(4) + 0.3 * rng.standard_normal(32)).astype(np.float32)}


TRAIN, VALID = data(0), data(1)


def solve(num_steps=STEPS, key=7, **keywords):
    arguments = {
        "inner_data": bx.data.minibatches(TRAIN, 8), "outer_data": bx.data.minibatches(VALID, 8),
        "algorithm": ALGORITHM,
        "key": None if key is None else jax.random.key(key), **keywords,
    }  # fmt: skip
    return bx.solve_bilevel(
        inner,
        outer,
        {"w": jnp.zeros(4, jnp.float32)},
        jnp.float32(-1.0),
        num_steps=num_steps,
        **arguments,
    )


def bits(solution) -> dict:
    """Everything of the run that must come back, as arrays by name."""
    state = solution.state._replace(key=jax.random.key_data(solution.state.key))
    arrays = {"history" + k: v for k, v in solution.history.items()} | {
        f"state{i}": a for i, a in enumerate(jax.tree.leaves(state))
    }
    return {name: np.asarray(a) for name, a in arrays.items()} | {
        "outer": np.asarray(solution.outer_params)
    }


def _child(directory: str, result: str, log: str) -> None:
    with open(log, "a") as file:

        def note(event):
            file.write(f"{event.step}\n")
            file.flush()

        file.write("begun\n")
        file.flush()
        solution = solve(
            checkpoint=bx.checkpoint.every(EVERY, directory, keep=2),
            callbacks=[bx.callbacks.every(EVERY, note)],
        )
    np.savez(result + ".part.npz", resumed=solution.stats["resumed_from"], **bits(solution))
    os.replace(result + ".part.npz", result)


if __name__ == "__main__":
    import orbax.checkpoint  # noqa: F401 (before the fork)

    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _child(*line.split())
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
