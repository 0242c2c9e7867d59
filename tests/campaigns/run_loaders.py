"""Every level trains on each batch of its loader once and in order, in all combinations: ``python
-m tests.campaigns.run_loaders``.

Inner steps K of 1, 3 and 10, two to four levels, levels that move in every, every 2nd and every 5th
step, each method. ``--method`` takes one of them. The last line is the summary.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp

import bilevax as bx
from tests.data.test_loaders import METHODS, Numbers, chain, empty, expected, seen

STEPS = 11


def one(inner_steps: int, depth: int, every: int, method: str) -> str | None:
    """What was wrong, or None."""
    levels = chain(depth, (inner_steps,) * (depth - 1), (every,) * (depth - 1), METHODS[method])
    loaders = {level.name: Numbers(5 + k) for k, level in enumerate(levels[:-1])}
    out = bx.solve_multilevel(
        levels, {level.name: jnp.zeros(()) for level in levels}, data=loaders, num_steps=STEPS,
        key=jax.random.key(0), keep="last",
        model_state={name: empty(inner_steps * STEPS + 5) for name in loaders},
    )  # fmt: skip
    for name, loader in loaders.items():
        trained = inner_steps * -(-STEPS // every)
        got = seen(out.model_state[name])
        if got != expected(trained, loader.rows) or loader.reads != trained:
            return f"level {name}: {loader.reads} batches read for {trained}, trained on {got}"
    return None


def main(methods: list[str]) -> None:
    cases = list(itertools.product((1, 3, 10), (2, 3, 4), (1, 2, 5), methods))
    wrong, begin = 0, time.process_time()
    for case in cases:
        fault = one(*case)
        wrong += fault is not None
        if fault:
            print("K={}, {} levels, every={}, {}: ".format(*case) + fault, flush=True)
        jax.clear_caches()
    print(
        f"{len(cases)} combinations of {', '.join(methods)}: {wrong} wrong, in "
        f"{time.process_time() - begin:.0f} s of processor time"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=list(METHODS))
    given = parser.parse_args().method
    main(list(METHODS) if given is None else [given])
