"""Every level trains on each batch of its loader once and in order, in all combinations: ``python
-m tests.campaigns.run_loaders``.

Inner steps K of 1, 3 and 10, levels that move in every, every 2nd and every 5th step, two to four
levels, each method. In one run the levels have a loader, a K and an `every` of their own, so that
the nine pairs of them take nine runs with two levels, five with three and three with four; each
method begins at another pair. ``--method`` takes one of them, ``--same`` gives all levels of a run
the same pair: 27 runs a method. The last line is the summary: with nothing set, 136 runs in some
190 s of processor time, none wrong when this was written.
"""

import argparse
import itertools
import os
import time
from collections.abc import Iterator

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)  # compiled once, run once

import jax
import jax.numpy as jnp

import bilevax as bx
from tests.data.test_loaders import METHODS, Numbers, chain, empty, expected, seen

STEPS = 11
PAIRS = list(itertools.product((1, 3, 10), (1, 2, 5)))  # K and every

Pairs = tuple[tuple[int, int], ...]  # of each level below the top, lowest first


def runs(method: str, same: bool) -> Iterator[Pairs]:
    """The pairs of each run."""
    first = list(METHODS).index(method)
    for lower in (1, 2, 3):
        if same:
            yield from ((pair,) * lower for pair in PAIRS)
            continue
        for begin in range(first, first + len(PAIRS), lower):
            yield tuple(PAIRS[k % len(PAIRS)] for k in range(begin, begin + lower))


def one(pairs: Pairs, method: str) -> str | None:
    """What was wrong, or None."""
    levels = chain(len(pairs) + 1, *([pair[i] for pair in pairs] for i in (0, 1)), METHODS[method])
    loaders = {level.name: Numbers(5 + k) for k, level in enumerate(levels[:-1])}
    out = bx.solve_multilevel(
        levels, {level.name: jnp.zeros(()) for level in levels}, data=loaders, num_steps=STEPS,
        key=jax.random.key(0), keep="last",
        model_state={
            name: empty(inner_steps * STEPS + 5)
            for name, (inner_steps, _) in zip(loaders, pairs, strict=True)
        },
    )  # fmt: skip
    for (name, loader), (inner_steps, every) in zip(loaders.items(), pairs, strict=True):
        trained = inner_steps * -(-STEPS // every)
        got = seen(out.model_state[name])
        if got != expected(trained, loader.rows) or loader.reads != trained:
            return f"level {name}: {loader.reads} batches read for {trained}, trained on {got}"
    return None


def main(methods: list[str], same: bool) -> None:
    count = wrong = 0
    begin = time.process_time()
    for method in methods:
        for pairs in runs(method, same):
            fault = one(pairs, method)
            count, wrong = count + 1, wrong + (fault is not None)
            if fault:
                print(f"(K, every) = {pairs}, {method}: {fault}", flush=True)
            jax.clear_caches()
        print(f"{method}: {count} runs so far, {wrong} wrong", flush=True)
    print(
        f"{count} runs of {', '.join(methods)}: {wrong} wrong, in "
        f"{time.process_time() - begin:.0f} s of processor time"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=list(METHODS))
    parser.add_argument("--same", action="store_true", help="one pair in all levels of a run")
    given = parser.parse_args()
    main(list(METHODS) if given.method is None else [given.method], given.same)
