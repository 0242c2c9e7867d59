"""Two processes train one model and learn its penalties together, as two machines would.

    python examples/multihost.py    # starts both processes here, and a single one to compare with
    python examples/multihost.py --rank 0 --processes 2 --address 10.0.0.1:1234    # on each machine

A softmax regression on scikit-learn's digits with a penalty for each of its 64 features. Every
process reads its own half of the rows; the rows of a batch are split over all devices of all
processes, and the gradients are averaged between them. JAX's own runtime does the talking
(``jax.distributed``): over gloo between CPUs, and over NCCL or a TPU slice's own network between
accelerators without a change here. All processes run this same program and save together; only the
first one prints. The run is repeated by one process alone, in double precision. Twenty steps: after
some more, training itself makes more and more of the last bit in which two runs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEVICES = 4  # in all, CPU cores made to look like so many
ROWS = 512  # for training, and as many for validation


def worker(args: argparse.Namespace) -> None:
    """One process of the run."""
    import jax

    jax.config.update("jax_enable_x64", True)
    if args.processes > 1:
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # On Slurm, Kubernetes and TPU slices the arguments are found in the environment:
        # jax.distributed.initialize() alone.
        jax.distributed.initialize(args.address, args.processes, args.rank)

    import data
    import jax.numpy as jnp
    import numpy as np
    import optax

    import bilevax as bx

    def loss(w, batch):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ w, batch["y"]))

    def inner(w, log_penalty, batch):
        return loss(w, batch) + 0.5 * jnp.sum(jnp.exp(log_penalty)[:, None] * w**2)

    def outer(w, log_penalty, batch):
        return loss(w, batch)

    def own(x, y):
        """The rows that this process reads: here a part of one file, on a cluster a file of its
        own."""
        rows = slice(args.rank * ROWS // args.processes, (args.rank + 1) * ROWS // args.processes)
        return {"x": x[rows].astype(np.float64), "y": y[rows]}

    x, y = data.digits()
    sharding = bx.sharding.data_parallel(mean=True)
    train, valid = (
        bx.sharding.from_process(sharding, own(x[part], y[part]))
        for part in (slice(0, ROWS), slice(ROWS, 2 * ROWS))
    )
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.5), 10),
        bx.hypergradient.implicit(bx.linear.cg(maxiter=10), max_residual=np.inf),
        optax.adam(0.1),
    )
    begin = time.perf_counter()
    solution = bx.solve_bilevel(
        inner, outer, np.zeros((64, 10)), np.full(64, -6.0), inner_data=train, outer_data=valid,
        algorithm=algorithm, num_steps=args.steps,
        sharding=sharding, checkpoint=bx.checkpoint.every(max(1, args.steps // 2), args.saved,
        keep=1),
    )  # fmt: skip
    if jax.process_index() == 0:  # only one of them writes
        values = solution.history["value"]
        print(
            f"{jax.process_count()} process(es), "
            f"{jax.device_count()} devices, "
            f"{jax.local_device_count()} of them here: "
            f"validation loss {values[0]:.4g} -> {values[-1]:.4g} in "
            f"{time.perf_counter() - begin:.1f} s",
            flush=True,
        )
        result = {
            "value": solution.history["value"].tolist(),
            "penalties": np.asarray(solution.outer_params).tolist(),
            "stats": solution.stats,
        }
        Path(args.result).write_text(json.dumps(result))


def launch(processes: int, steps: int, folder: Path) -> dict:
    """All processes of a run on this machine; the first one's result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    count = DEVICES // processes
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
    }
    result = folder / f"{processes}.json"
    command = [
        sys.executable,
        __file__,
        "--processes",
        str(processes),
        "--steps",
        str(steps),
        "--address",
        address,
        "--result",
        str(result),
    ]
    command += ["--saved", str(folder / f"saved{processes}"), "--rank"]
    children = [
        subprocess.Popen([*command, str(rank)], env=environment) for rank in range(processes)
    ]
    try:
        failed = [rank for rank, child in enumerate(children) if child.wait(timeout=600)]
    finally:
        for child in children:
            child.kill()
    if failed:
        raise SystemExit(f"process {failed[0]} of {processes} failed; see its output above")
    return json.loads(result.read_text())


def main(argv=None):
    import numpy as np
    import report

    parser = report.parser(__doc__, full=dict(seeds=1, steps=20), small=dict(seeds=1, steps=6))
    parser.add_argument("--rank", type=int, help="be this process of a run, and start no other")
    parser.add_argument("--processes", type=int, default=2, help="processes of the run")
    parser.add_argument(
        "--address", default="127.0.0.1:12345", help="host and port of the first process"
    )
    parser.add_argument(
        "--saved", default="saved", help="folder of checkpoints that all processes see, with --rank"
    )
    parser.add_argument(
        "--result", default="result.json", help="where the first process writes, with --rank"
    )
    args = report.parse(parser, argv)
    if args.rank is not None:
        worker(args)
        return None

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        together, alone = (
            launch(processes, args.steps, Path(folder)) for processes in (args.processes, 1)
        )
    gap = max(
        np.max(np.abs(np.asarray(together[name]) - alone[name])) for name in ("value", "penalties")
    )
    rows = {
        name: {
            "first": [run["value"][0]],
            "last": [run["value"][-1]],
            "seconds": [run["stats"]["seconds"]],
        }
        for name, run in ((f"{args.processes} processes", together), ("one process", alone))
    }
    print(report.table(rows, {"first": "first loss", "last": "last loss", "seconds": "seconds"}))
    print(f"Largest difference of any loss or penalty between the two runs: {gap:.1e}.")
    with report.figure(args.out / "multihost.svg", 1) as (_, ax):
        ax.plot(alone["value"], color=report.ORANGE, linewidth=5, alpha=0.5, label="one process")
        ax.plot(together["value"], color=report.BLUE, label=f"{args.processes} processes")
        ax.set(
            xlabel="outer step", ylabel="validation loss", title="One run, on one machine or two"
        )
        ax.legend()
    report.save(
        args.out / "multihost.json", dict(vars(args)), rows, time.perf_counter() - begin, gap=gap
    )
    if gap > 1e-10:
        raise SystemExit("the two runs differ by more than rounding")
    return rows


if __name__ == "__main__":
    import report

    report.run(main)
