"""Whether a long run, and many runs, stay as they began: memory and time over 200,000 steps and
2,000 calls (each leaves an entry in JAX's own caches, up to their limit); and what a digest costs.

python benchmarks/endurance.py [--quick]
"""

import argparse
import itertools
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from harness import RESULTS, environment

import bilevax as bx
from bilevax.run import digest

ALGORITHM = bx.algorithms.double_loop(
    bx.inner.optax(optax.sgd(0.5), 2),
    bx.hypergradient.implicit(bx.linear.cg(maxiter=2), max_residual=jnp.inf),
    optax.sgd(1e-5),
)


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


def outer(y, x, batch):
    return 0.5 * jnp.sum((y - 3.0) ** 2)


def solve(steps, **keywords):
    return bx.solve_bilevel(
        inner, outer, jnp.zeros(2), jnp.ones(2), algorithm=ALGORITHM, num_steps=steps, **keywords
    )


def megabytes():
    """Resident memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def long_run(steps):
    """Memory from a tenth of the run to its end, and the bytes of its history among it."""
    seen = []
    solution = solve(
        steps,
        callbacks=[
            bx.callbacks.every(
                steps // 10, lambda event: seen.append((time.perf_counter(), megabytes()))
            )
        ],
    )
    times = [b[0] - a[0] for a, b in itertools.pairwise(seen)]
    held = sum(column.nbytes for column in jax.tree.leaves(solution.history)) / 2**20
    return {
        "steps": steps,
        "growth_mb": seen[-1][1] - seen[0][1],
        "history_mb": held,
        "first_tenth_seconds": times[0],
        "last_tenth_seconds": times[-1],
    }


def many_calls(calls):
    """Memory, and processor time a call, of the second tenth and of the last: other work on the
    machine is no part of it."""
    spent, before = [], 0.0
    for call in range(calls):
        if call == calls // 10:
            before = megabytes()
        since = time.process_time()
        solve(3)
        spent.append(time.process_time() - since)
    tenth = calls // 10
    first, last = statistics.median(spent[tenth : 2 * tenth]), statistics.median(spent[-tenth:])
    return {
        "calls": calls,
        "growth_mb": megabytes() - before,
        "call_ms_at_first": 1e3 * first,
        "call_ms_at_last": 1e3 * last,
    }


def digests(megabytes):
    """Seconds a GB of what tells one data set from another."""
    out = {}
    for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16), ("uint8", jnp.uint8)):
        data = jnp.ones(megabytes * 2**20 // jnp.dtype(dtype).itemsize, dtype)
        digest.of_arrays([data])
        spent = []
        for _ in range(5):
            since = time.perf_counter()
            digest.of_arrays([data])
            spent.append(time.perf_counter() - since)
        out[f"{name}_seconds_a_gb"] = statistics.median(spent) * 1024 / megabytes
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of all, to see that it runs")
    given = parser.parse_args()
    less = 10 if given.quick else 1
    for _ in range(3):
        solve(40)  # compiled, and allocators have what they keep
    found = {
        "long run": long_run(200_000 // less),
        "many calls": many_calls(2000 // less),
        "digest": digests(256 // less),
    }
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if not given.quick:
        (RESULTS / "endurance.json").write_text(
            json.dumps({"environment": environment(), "found": found}, indent=1) + "\n"
        )
