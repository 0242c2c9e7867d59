"""Time and memory of a bilevel step on paper: flops and collectives as counted, machines as sold.

    python benchmarks/scaling_model.py            # the table of docs/scaling.md
    python benchmarks/scaling_model.py --check    # against small steps: bytes between eight virtual
                                                  # devices, memory under fsdp, times on one device

Everything is per step: K inner steps, the method's own work, one outer gradient. ``G`` is the work
of one inner gradient on the batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import NamedTuple


class Machine(NamedTuple):
    """One accelerator: peak bfloat16 flops, the part of it that a well-tuned training step reaches,
    memory, and what one device sends to the others.

    `link` is the bandwidth in bytes a second of an all-reduce's ring through one device; `latency`
    what a hop costs.
    """

    name: str
    flops: float
    utilisation: float
    memory: float
    link: float
    latency: float


H100 = Machine("H100, 8 a host, 400 Gb/s each between hosts", 989e12, 0.4, 80e9, 50e9, 5e-6)
TPU = Machine("TPU v5p slice", 459e12, 0.5, 95e9, 90e9, 1e-6)


class Method(NamedTuple):
    """What a hypergradient costs beyond the K inner steps, in inner gradients and in all-reduces
    (inner-sized, outer-sized), and inner vectors held.

    An outer gradient on a batch of the same size is one gradient and one all-reduce, counted in.
    """

    gradients: float
    inner_sums: float
    outer_sums: float
    vectors: float


def method(name: str, inner_steps: int, iterations: int) -> Method:
    """DESIGN's counts: a Hessian-vector product costs 1.9 gradients, a mixed product 2; k is the
    number of iterations.

    The counted all-reduces of tests/sharding/test_sharding.py: SAMA 2Y + X, differences Y + 2X, CG
    (2 + k) Y + X, unrolled (1 + K) Y + K X.
    """
    K, k = inner_steps, iterations
    return {
        "plain training": Method(0, 0, 0, 0),
        "sama": Method(1 + 1 + 2, 2, 1, 2),
        "difference": Method(1 + 2, 1, 2, 2),
        "implicit": Method(1 + 1 + 1.9 * k + 1.9, 2 + k, 1, 4),
        "unrolled": Method(1 + 2.9 * K, 1 + K, K, K + 2),
    }[name]


class Cost(NamedTuple):
    """Seconds of computing and of communicating in a step, bytes sent by a device, bytes that a
    device holds, and the ratio to plain training."""

    compute: float
    communicate: float
    sent: float
    held: float
    ratio: float


def ring(size: float, devices: int, machine: Machine) -> float:
    """Seconds of an all-reduce of `size` bytes: every device sends 2 (D − 1)/D of it, in 2 (D − 1)
    hops (a tree's logarithm for the latency)."""
    if devices == 1:
        return 0.0
    return (
        2 * (devices - 1) / devices * size / machine.link
        + 2 * math.ceil(math.log2(devices)) * machine.latency
    )


def step_flops(params: float, tokens: float) -> float:
    """One gradient of a transformer: two flops a parameter and token forward, four backward."""
    return 6 * params * tokens


def cost(
    params: float,
    devices: int,
    machine: Machine,
    name: str,
    *,
    inner_steps: int = 10,
    iterations: int = 10,
    tokens: float = 4096,
    outer: float = 1e6,
    layers: int = 64,
    fsdp: bool = True,
) -> Cost:
    """One outer step with `tokens` tokens a device and gradient, in bfloat16 with float32 Adam;
    `outer` learned numbers.

    Held under fsdp, a device's part of: parameters in float32 and bfloat16, gradient and two
    moments in float32 (18 bytes a parameter), the method's vectors in float32 (4 bytes each), and
    one gathered layer with its activations. The weights are gathered twice in each gradient
    (forward and backward)
    beside the reduced gradient: 3 times a half all-reduce of bfloat16.
    """

    def seconds(which: Method) -> tuple[float, float, float]:
        gradients, sums = inner_steps + which.gradients, inner_steps + which.inner_sums
        compute = gradients * step_flops(params, tokens) / (machine.flops * machine.utilisation)
        if fsdp:  # every pass gathers the weights twice (bfloat16) and scatters what it sums
            size = 2 * params
            sent = 1.5 * size * 2 * (devices - 1) / devices
            communicate = gradients * 1.5 * ring(size, devices, machine) + which.outer_sums * ring(
                4 * outer, devices, machine
            )
            return compute, communicate, gradients * sent + which.outer_sums * 8 * outer
        sent = sums * 2 * params + which.outer_sums * 4 * outer
        communicate = sums * ring(2 * params, devices, machine) + which.outer_sums * ring(
            4 * outer, devices, machine
        )
        return compute, communicate, 2 * (devices - 1) / devices * sent

    chosen = method(name, inner_steps, iterations)
    compute, communicate, sent = seconds(chosen)
    plain_compute, plain_communicate, _ = seconds(method("plain training", inner_steps, iterations))
    share = devices if fsdp else 1
    width = math.sqrt(params / (12 * layers))
    activations = (
        tokens * width * (2 * layers + 2 * 34)
    )  # layer inputs kept, one layer rematerialised
    held = (
        params * (18 + 4 * chosen.vectors) / share + 4 * params / layers + activations + 16 * outer
    )
    step = max(compute, communicate)  # they overlap where a compiler schedules them so
    return Cost(compute, communicate, sent, held, step / max(plain_compute, plain_communicate))


SIZES = {"1B": 1e9, "7B": 7e9, "13B": 13e9, "70B": 70e9}
DEVICES = (8, 64, 512, 4096)


def table(machine: Machine, name: str) -> str:
    lines = [
        "| inner parameters | " + " | ".join(f"{d} devices" for d in DEVICES) + " |",
        "|---|" + "---|" * len(DEVICES),
    ]
    for label, params in SIZES.items():
        cells = []
        for devices in DEVICES:
            c = cost(params, devices, machine, name)
            fits = f"{c.held / 1e9:.0f} GB" + ("" if c.held < machine.memory else " (too large)")
            cells.append(f"{max(c.compute, c.communicate):.3g} s, {fits}, {c.ratio:.2f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def problem(width: int, hidden: int, rows: int):
    """A network of three layers whose features are scaled: objectives, start, batches."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def net(y, x):
        return jnp.tanh(jnp.tanh(x @ y["a"]) @ y["b"]) @ y["c"]

    def inner(y, x, batch):
        return jnp.mean((net(y, batch * jnp.exp(x)[None]) - 1.0) ** 2)

    def outer(y, x, batch):
        return jnp.mean((net(y, batch) - 1.0) ** 2)

    rng = np.random.default_rng(0)
    shapes = {"a": (width, hidden), "b": (hidden, hidden), "c": (hidden, 1)}
    y = {
        name: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }
    data = [jnp.asarray(rng.standard_normal((rows, width)), jnp.float32) for _ in range(2)]
    return inner, outer, y, jnp.zeros(width, jnp.float32), jax.tree.map(jnp.asarray, data)


def algorithms(inner_steps: int, iterations: int) -> dict:
    import jax.numpy as jnp
    import optax

    import bilevax as bx

    methods = {
        "sama": bx.hypergradient.sama(),
        "difference": bx.hypergradient.finite_difference(),
        "implicit": bx.hypergradient.implicit(
            bx.linear.cg(maxiter=iterations, tol=1e-12), max_residual=jnp.inf
        ),
        "unrolled": bx.hypergradient.unrolled(),
    }
    solver = bx.inner.optax(optax.sgd(0.1), inner_steps)
    return {
        name: bx.algorithms.double_loop(solver, method, optax.sgd(0.1))
        for name, method in methods.items()
    }


def check_bytes() -> list[dict]:
    """Bytes all-reduced in a step as XLA counts them on the devices there are, beside the
    formulas."""
    import jax

    import bilevax as bx

    K, k = 4, 5
    inner, outer, y, x, data = problem(64, 128, 256)
    Y, X = (4 * sum(leaf.size for leaf in jax.tree.leaves(value)) for value in (y, x))
    out = []
    for name, algorithm in algorithms(K, k).items():
        keywords = dict(inner_data=data[0], outer_data=data[1], algorithm=algorithm)
        report = bx.sharding.dry_run(
            bx.solve_bilevel,
            inner,
            outer,
            y,
            x,
            sharding=bx.sharding.data_parallel(mean=True),
            **keywords,
        )
        passes = k if name == "implicit" else 1
        counted = sum(
            c.bytes * c.times * (passes if c.loop else 1)
            for c in report.collectives
            if c.bytes >= X and c.kind == "all-reduce"
        )
        model = method(name, K, k)
        paper = (K + model.inner_sums) * Y + model.outer_sums * X
        out.append(
            {"method": name, "measured": counted, "on paper": paper, "ratio": counted / paper}
        )
    return out


def check_times(rounds: int = 7) -> list[dict]:
    """Time of a step over that of its K inner steps, on one device, beside the formula's flops."""
    import time

    import jax
    import numpy as np

    import bilevax as bx

    K, k, steps = 10, 10, 5
    inner, outer, y, x, data = problem(256, 512, 1024)

    @jax.jit
    def plain(y):
        return jax.lax.fori_loop(
            0,
            K * steps,
            lambda i, y: jax.tree.map(lambda p, g: p - 0.1 * g, y, jax.grad(inner)(y, x, data[0])),
            y,
        )

    def run(algorithm):
        solution = bx.solve_bilevel(
            inner,
            outer,
            y,
            x,
            inner_data=data[0],
            outer_data=data[1],
            algorithm=algorithm,
            num_steps=steps,
            keep="last",
        )
        return solution.outer_params

    runs = {
        "plain training": lambda: plain(y),
        **{name: (lambda a=a: run(a)) for name, a in algorithms(K, k).items()},
    }
    seconds: dict = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, fn in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(fn())
            if i:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    base = np.asarray(seconds.pop("plain training"))
    out = []
    for name, values in seconds.items():
        model = method(name, K, k)
        measured, paper = float(np.median(np.asarray(values) / base)), (K + model.gradients) / K
        out.append(
            {"method": name, "measured": measured, "on paper": paper, "ratio": measured / paper}
        )
    return out


def check_layers(layers: int = 16, width: int = 256, rows: int = 8192) -> list[dict]:
    """MiB a device for one SAMA step of a deep network under fsdp: layers as one scan and written
    out, each with a checkpoint around it, and without. (With few rows the compiler rather gathers
    activations and leaves the weights where they are.)"""
    import jax
    import jax.numpy as jnp
    import optax

    import bilevax as bx

    def layer(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    light = jax.checkpoint(layer)

    def stacked(y, h):
        return jax.lax.scan(light, h, y)[0]

    def written_out(y, h):
        for w in y:
            h = light(h, w)[0]
        return h

    def kept(y, h):
        for w in y:
            h = layer(h, w)[0]
        return h

    def zeros(*stack):
        return {
            "up": jnp.zeros((*stack, width, 8 * width)),
            "down": jnp.zeros((*stack, 8 * width, width)),
        }

    data, out = jnp.ones((rows, width)), []
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 2), bx.hypergradient.sama(), optax.sgd(0.1)
    )
    apart = [zeros() for _ in range(layers)]
    for name, forward, y in (
        ("one scan", stacked, zeros(layers)),
        ("written out", written_out, apart),
        ("written out, no checkpoint", kept, apart),
    ):

        def inner(y, x, batch, forward=forward):
            return jnp.mean((forward(y, batch * jnp.exp(x)[None]) - 1.0) ** 2)

        def outer(y, x, batch, forward=forward):
            return jnp.mean((forward(y, batch) - 1.0) ** 2)

        keywords = dict(
            inner_data=data,
            outer_data=data,
            algorithm=algorithm,
            keep="last",
            sharding=bx.sharding.fsdp(),
        )
        report = bx.sharding.dry_run(
            bx.solve_bilevel, inner, outer, y, jnp.zeros(width), **keywords
        )
        whole = sum(4 * leaf.size for leaf in jax.tree.leaves(y))
        out.append(
            {
                "layers": name,
                "parameters": whole / 2**20,
                "state": report.state_bytes / 2**20,
                "peak": report.peak_bytes / 2**20,
            }
        )
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with small compiled steps")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "scaling_model.json"
    )
    args = parser.parse_args(argv)
    if args.check:
        os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
        checks = {
            "bytes all-reduced": check_bytes(),
            "time over the K inner steps alone": check_times(),
            "MiB a device": check_layers(),
        }
        for what, rows in checks.items():
            print(
                f"\n| {what} | " + " | ".join(list(rows[0])[1:]) + " |\n|" + "---|" * len(rows[0])
            )
            for row in rows:
                print(
                    "| "
                    + " | ".join(
                        value if isinstance(value, str) else f"{value:.5g}"
                        for value in row.values()
                    )
                    + " |"
                )
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(checks, indent=1) + "\n")
        return checks
    for machine in (H100, TPU):
        for name in ("sama", "implicit"):
            print(
                f"\n{machine.name}, {name}: seconds a step, memory a device, times plain training\n"
            )
            print(table(machine, name))
    return None


if __name__ == "__main__":
    main()
