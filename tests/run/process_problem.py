"""One of two processes over gloo, in runs that something is wrong with: ``python -m
tests.run.process_problem MODES RANK PORT FOLDER``.

The modes, one after another in the same two processes, each print a line.
"""

import os
import pathlib
import signal
import sys

import jax

MODES, RANK, PORT, FOLDER = (
    sys.argv[1].split(","),
    int(sys.argv[2]),
    sys.argv[3],
    pathlib.Path(sys.argv[4]),
)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, RANK)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import bilevax as bx  # noqa: E402
from bilevax._core import peers  # noqa: E402
from bilevax.run import lock, store  # noqa: E402

peers.BEAT, peers.SILENCE = 1.0, 12.0  # what is waited for is the same in less time
SECOND = RANK == 1
ALGORITHM = bx.algorithms.double_loop(
    bx.inner.optax(optax.sgd(0.05), 2), bx.hypergradient.implicit(), optax.adam(0.01)
)


def inner(w, lam, batch):
    return jnp.mean((batch @ w - 1.0) ** 2) + jnp.exp(lam) * jnp.sum(w**2)


def outer(w, lam, batch):
    return jnp.mean((batch @ w - 1.0) ** 2)


def meddle(mode):
    def fn(event):
        if event.done < 64 or not SECOND:
            return False
        if mode == "raise":
            raise ZeroDivisionError("of this process alone")
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        return mode == "stop"

    return bx.callbacks.every(16, fn)


def solve(mode):
    rows = (
        np.random.default_rng(RANK)
        .standard_normal((5 if mode == "rows" and SECOND else 8, 4))
        .astype(np.float32)
    )
    if mode == "sees":  # a folder of another run, of which one process sees nothing
        FOLDER.joinpath("sees", "step_000000032").mkdir(parents=True, exist_ok=True)
        store.PATIENCE, store.Store.steps = 2, lambda self: [] if SECOND else [32]
    if mode == "taken" and not SECOND:
        FOLDER.joinpath("taken").mkdir()
        lock.Lock(FOLDER / "taken")
    sharding = bx.sharding.data_parallel()
    data = bx.sharding.from_process(sharding, rows)
    return bx.solve_bilevel(
        inner,
        outer,
        jnp.full(4, 1.0 if mode == "start" and SECOND else 0.0),
        jnp.float32(-3.0),
        inner_data=bx.data.minibatches(data, 8),
        outer_data=data,
        key=jax.random.key(int(mode == "key" and SECOND)),
        algorithm=ALGORITHM,
        num_steps=300 if mode == "steps" and SECOND else 400,
        sharding=sharding,
        checkpoint=bx.checkpoint.every(32, FOLDER / mode),
        callbacks=[meddle(mode)],
    )


steps = store.Store.steps
for mode in MODES:
    store.Store.steps = steps
    try:
        solution = solve(mode)
        print(mode, "DONE", solution.result.name, solution.stats["steps"], flush=True)
    except Exception as error:
        solution = getattr(error, "solution", None)
        print(
            mode,
            "ERROR",
            type(error).__name__,
            " ".join(str(error).split()),
            "| steps",
            solution and solution.stats["steps"],
            flush=True,
        )
os._exit(0)  # leaving in the ordinary way waits for the other process
