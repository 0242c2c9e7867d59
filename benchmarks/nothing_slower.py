"""Whether a checkout is slower than another: steps, compilation and import, as ratios from
interleaved pairs in two processes.

    git worktree add /tmp/before v0.1.0
    python benchmarks/nothing_slower.py --before /tmp/before

Each checkout lives in a process of its own, which is asked for one measurement at a time, A B A B
(and B A in every other pair). Reported is the median of the pairs' ratios, now to before, with its
95 % interval by order statistics: its upper end is to be at most 1.05. Only public names are used,
so that any two versions can be compared. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PAIRS, QUICK_PAIRS = 30, 3


# ---- what is measured, in the process of one checkout


def digits(quick: bool) -> Callable[[int], Any]:
    """A network on digits, a weight decay a layer: 10 Adam steps, implicit with 5 CG iterations,
    Adam."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from sklearn.datasets import load_digits

    import bilevax as bx

    x, y = load_digits(return_X_y=True)
    x, y = x.astype(np.float32) / 16, y.astype(np.int32)
    train, held_out = (x[:900], y[:900]), (x[900:], y[900:])
    keys = jax.random.split(jax.random.key(0), 2)
    sizes = ((64, 32), (32, 10))
    start = [
        jax.random.normal(k, size) / size[0] ** 0.5 for k, size in zip(keys, sizes, strict=True)
    ]

    def loss(w, batch):
        logits = jnp.tanh(batch[0] @ w[0]) @ w[1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    def inner(w, decay, batch):
        return loss(w, batch) + sum(
            jnp.exp(d) * jnp.sum(leaf**2) for d, leaf in zip(decay, w, strict=True)
        )

    def outer(w, decay, batch):
        return loss(w, batch)

    method = bx.hypergradient.implicit(bx.linear.cg(maxiter=5), max_residual=jnp.inf)
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.adam(1e-2), 10), method, optax.adam(1e-2)
    )
    decays = jnp.full((2,), -6.0)

    def run(steps):
        return bx.solve_bilevel(
            inner,
            outer,
            start,
            decays,
            inner_data=train,
            outer_data=held_out,
            algorithm=algorithm,
            num_steps=steps,
        )

    return run


def soba(quick: bool) -> Callable[[int], Any]:
    """SOBA on data of the shape of a9a (32,561 rows, 123 features, a tenth of them one), a penalty
    a feature."""
    import jax
    import jax.numpy as jnp

    import bilevax as bx

    rows = 2000 if quick else 32561
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.bernoulli(keys[0], 0.11, (rows, 123)).astype(jnp.float32)
    y = jnp.sign(x @ jax.random.normal(keys[1], (123,)) + 0.1 * jax.random.normal(keys[2], (rows,)))
    half = rows * 3 // 4

    def loss(w, batch):
        return jnp.mean(jnp.logaddexp(0.0, -batch[1] * (batch[0] @ w)))

    def inner(w, penalty, batch):
        return loss(w, batch) + jnp.sum(jnp.exp(penalty) * w**2)

    def outer(w, penalty, batch):
        return loss(w, batch)

    data = dict(
        inner_data=bx.data.minibatches((x[:half], y[:half]), 64),
        outer_data=bx.data.minibatches((x[half:], y[half:]), 64),
    )
    algorithm, key = bx.algorithms.soba(0.1, 0.05), jax.random.key(1)

    def run(steps):
        return bx.solve_bilevel(
            inner,
            outer,
            jnp.zeros(123),
            jnp.full((123,), -5.0),
            algorithm=algorithm,
            num_steps=steps,
            key=key,
            **data,
        )

    return run


def levels(quick: bool) -> Callable[[int], Any]:
    """Three levels, the lowest solved inside the middle one's objective."""
    import jax
    import jax.numpy as jnp
    import optax

    import bilevax as bx

    a, b = (jax.random.normal(jax.random.key(i), (20, 20)) / 20**0.5 for i in range(2))
    descent, method = (
        bx.inner.optax(optax.sgd(0.1), 5),
        bx.hypergradient.implicit(bx.linear.cg(maxiter=10), max_residual=jnp.inf),
    )

    def lowest(p, batch):
        return jnp.sum(jnp.cosh(p["z"] - a @ p["y"])) + jnp.sum(p["z"] ** 2)

    def middle(p, batch):
        return jnp.sum((p["y"] - b @ p["x"]) ** 2) + jnp.sum(p["z"] ** 2)

    def top(p, batch):
        return jnp.sum((p["y"] - 1.0) ** 2) + 0.1 * jnp.sum(p["x"] ** 2)

    system = [
        bx.Level("z", lowest, solver=descent, hypergradient=method),
        bx.Level("y", middle, solver=descent, hypergradient=method),
        bx.Level("x", top, solver=optax.sgd(0.05)),
    ]
    start = {name: jnp.ones(20) for name in "zyx"}
    return lambda steps: bx.solve_multilevel(system, start, num_steps=steps, throw=False)


CASES = {
    "digits, 10 Adam + CG 5": (digits, 300),
    "SOBA, a9a's shape": (soba, 20_000),
    "three levels": (levels, 1000),
}


def worker(quick: bool) -> None:
    """Answer measurements, one a line: seconds of a run that is compiled, or of compiling it
    anew."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    runs = {name: make(quick) for name, (make, _) in CASES.items()}
    for line in sys.stdin:
        what, name, steps = json.loads(line)
        if what == "compile":
            jax.clear_caches()
        begin = time.perf_counter()
        jax.block_until_ready(runs[name](steps).outer_params)
        print(json.dumps(time.perf_counter() - begin), flush=True)


# ---- the comparison


class Checkout:
    """A checkout's process."""

    def __init__(self, folder: Path, quick: bool):
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "OPENBLAS_NUM_THREADS": "1"}
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            *(["--quick"] if quick else []),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=folder,
        )

    def seconds(self, what: str, name: str, steps: int) -> float:
        """One measurement."""
        if what == "import":
            begin = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", "import bilevax"], check=True, env=self.environment
            )
            return time.perf_counter() - begin
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([what, name, steps]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the process of {self.environment['PYTHONPATH']} ended in {what} {name}"
            )
        return float(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval: the order statistics that it lies between with that
    probability, whatever the distribution."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.5**n, 0
    while k + 1 < n // 2 and outside + math.comb(n, k + 1) * 0.5**n <= 0.025:
        k += 1
        outside += math.comb(n, k) * 0.5**n
    return ordered[k], statistics.median(ordered), ordered[n - 1 - k]


def compared(
    before: Checkout, now: Checkout, what: str, name: str, steps: int, pairs: int
) -> dict[str, Any]:
    """The ratios of so many pairs, after one of each that does not count."""
    seconds: dict[str, list[float]] = {"before": [], "now": []}
    for pair in range(pairs + 1):
        both = {"before": before, "now": now}
        for side in ("before", "now") if pair % 2 else ("now", "before"):
            taken = both[side].seconds(what, name, steps)
            if pair:
                seconds[side].append(taken)
    low, median, high = interval(
        [b / a for a, b in zip(seconds["before"], seconds["now"], strict=True)]
    )
    return {
        "what": what,
        "case": name,
        "pairs": pairs,
        "seconds": seconds,
        "ratio": {"median": median, "low": low, "high": high},
    }


def main() -> None:
    """Compare, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, help="the checkout to compare with")
    parser.add_argument(
        "--now", type=Path, default=HERE, help="the checkout to judge (default: this one)"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        help=f"pairs of each measurement (default {PAIRS}; {QUICK_PAIRS} with --quick)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few pairs and steps, to see that it runs; nothing is written",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.quick)
    if args.before is None:
        parser.error("--before: expected a folder with a checkout of the package")
    pairs = args.pairs or (QUICK_PAIRS if args.quick else PAIRS)
    before, now = (Checkout(folder.resolve(), args.quick) for folder in (args.before, args.now))
    rows = []
    try:
        for name, (_, steps) in CASES.items():
            steps = max(10, steps // 50) if args.quick else steps
            for what, count in (("compile", 1), ("step", steps)):
                rows.append(compared(before, now, what, name, count, pairs))
                print(_line(rows[-1]), flush=True)
        rows.append(compared(before, now, "import", "import bilevax", 0, pairs))
        print(_line(rows[-1]), flush=True)
    finally:
        before.close()
        now.close()
    slower = [f"{row['what']} {row['case']}" for row in rows if row["ratio"]["high"] > 1.05]
    print(
        f"above 1.05: {', '.join(slower) or 'none'} ({pairs} interleaved pairs, two processes, the "
        "median's 95 % interval)"
    )
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "nothing_slower.json").write_text(
            json.dumps({"pairs": pairs, "rows": rows}, indent=1) + "\n"
        )
    return None


def _line(row: dict[str, Any]) -> str:
    ratio, times = (
        row["ratio"],
        {side: statistics.median(values) for side, values in row["seconds"].items()},
    )
    return (
        f"{row['what']:>8} {row['case']:<26} now / before {ratio['median']:.3f} "
        f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
        f"   {times['before'] * 1e3:.1f} ms, {times['now'] * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
