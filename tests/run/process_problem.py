"""One of two processes over gloo, in a run that something is wrong with: ``python -m tests.run.process_problem MODE RANK PORT FOLDER``."""

import os
import signal
import sys

import jax

MODE, RANK, PORT, FOLDER = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, RANK)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import bilevax as bx  # noqa: E402

SECOND = RANK == 1
DATA = np.random.default_rng(RANK).standard_normal((5 if MODE == "rows" and SECOND else 8, 4)).astype(np.float32)


def inner(w, lam, batch):
    return jnp.mean((batch @ w - 1.0) ** 2) + jnp.exp(lam) * jnp.sum(w**2)


def outer(w, lam, batch):
    return jnp.mean((batch @ w - 1.0) ** 2)


def meddle(event):
    if event.done < 64 or not SECOND:
        return False
    if MODE == "raise":
        raise ZeroDivisionError("of this process alone")
    if MODE == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    return MODE == "stop"


try:
    sharding = bx.sharding.data_parallel()
    data = bx.sharding.from_process(sharding, DATA)
    solution = bx.solve_bilevel(
        inner,
        outer,
        jnp.full(4, 1.0 if MODE == "start" and SECOND else 0.0),
        jnp.float32(-3.0),
        inner_data=bx.data.minibatches(data, 8),
        outer_data=data,
        key=jax.random.key(int(MODE == "key" and SECOND)),
        algorithm=bx.algorithms.double_loop(bx.inner.optax(optax.sgd(0.05), 2), bx.hypergradient.implicit(), optax.adam(0.01)),
        num_steps=300 if MODE == "steps" and SECOND else 400,
        sharding=sharding,
        checkpoint=bx.checkpoint.every(32, FOLDER),
        callbacks=[bx.callbacks.every(16, meddle)],
    )
    print("DONE", solution.result.name, solution.stats["steps"], flush=True)
except Exception as error:
    solution = getattr(error, "solution", None)
    print("ERROR", type(error).__name__, " ".join(str(error).split()), "| steps", solution and solution.stats["steps"], flush=True)
    os._exit(1)  # leaving in the ordinary way waits for the other process
