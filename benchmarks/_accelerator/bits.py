"""The same to the bit: two runs in one process, two processes, and a run resumed from its middle;
with and without deterministic kernels."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks._accelerator.common import Part

FLAGS = {"no flags": "", "deterministic": "--xla_gpu_deterministic_ops=true"}


def digest(tree: Any) -> str:
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        whole.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return whole.hexdigest()[:16]


def mlp(y, batch):
    hidden = jnp.tanh(batch["X"] @ y["a"])
    return optax.softmax_cross_entropy_with_integer_labels(
        jnp.tanh(hidden @ y["b"]) @ y["c"], batch["y"]
    )


def text(y, batch):
    """Its gradient adds into rows of a table that many tokens share."""
    hidden = jnp.mean(y["a"][batch["tokens"]], axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(
        jnp.tanh(hidden @ y["b"]) @ y["c"], batch["y"]
    )


def image(y, batch):
    hidden = jax.lax.conv_general_dilated(
        batch["image"], y["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    hidden = jax.lax.conv_general_dilated(
        jnp.tanh(hidden), y["b"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return optax.softmax_cross_entropy_with_integer_labels(
        jnp.mean(jnp.tanh(hidden), axis=(1, 2)) @ y["c"], batch["y"]
    )


def problem(name: str, small: bool):
    width, rows = (8, 64) if small else (256, 4096)
    keys = jax.random.split(jax.random.key(0), 8)
    normal = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(shape[-2])
    data = {
        "y": jax.random.randint(keys[0], (rows,), 0, 10, jnp.int32),
        "place": jnp.arange(rows, dtype=jnp.int32),
    }
    if name == "mlp":
        data["X"], y = (
            jax.random.normal(keys[1], (rows, width)),
            {"a": normal(keys[2], width, width), "b": normal(keys[3], width, width)},
        )
    elif name == "text":
        data["tokens"] = jax.random.randint(keys[1], (rows, 64), 0, 100, jnp.int32)
        y = {"a": jax.random.normal(keys[2], (100, width)), "b": normal(keys[3], width, width)}
    else:
        width = width // 4
        data["image"] = jax.random.normal(keys[1], (rows, 16, 16, 3))
        y = {
            "a": 0.1 * jax.random.normal(keys[2], (3, 3, 3, width)),
            "b": 0.1 * jax.random.normal(keys[3], (3, 3, width, width)),
        }
    y["c"] = normal(keys[4], width, 10)
    return {"mlp": mlp, "text": text, "image": image}[name], y, jnp.zeros(rows), data


def algorithms():
    HG, solver = bx.hypergradient, bx.inner.optax(optax.adam(1e-3, eps_root=1e-8), 4)
    linear = HG.implicit(bx.linear.cg(5), damping=1.0, max_residual=jnp.inf)
    return {
        "unrolled": bx.algorithms.double_loop(solver, HG.unrolled(), optax.adam(1e-2)),
        "cg": bx.algorithms.double_loop(solver, linear, optax.adam(1e-2)),
    }


def child(small: bool) -> None:
    """All digests of this process, as one line of JSON."""
    found: dict[str, Any] = {}
    for name in ("mlp",) if small else ("text", "mlp", "image"):
        losses, y, x, data = problem(name, small)
        inner = lambda y, x, batch, losses=losses: jnp.mean(
            jax.nn.sigmoid(x[batch["place"]]) * losses(y, batch)
        )
        outer = lambda y, x, batch, losses=losses: jnp.mean(losses(y, batch))
        source = bx.data.minibatches(data, 16 if small else 256)
        for kind, algorithm in algorithms().items():
            if kind == "cg" and name == "image":
                continue

            def solve(
                steps,
                inner=inner,
                outer=outer,
                y=y,
                x=x,
                source=source,
                algorithm=algorithm,
                **more,
            ):
                return bx.solve_bilevel(
                    inner, outer, y, x, inner_data=source, outer_data=source, algorithm=algorithm,
                    num_steps=steps, key=jax.random.key(1),
                    keep="last", throw=False, **more,
                )  # fmt: skip

            steps = 8 if small else 40
            whole, again, half = solve(steps), solve(steps), solve(steps // 2)
            rest = solve(steps // 2, state=half.state)
            digests = [digest((run.inner_params, run.outer_params)) for run in (whole, again, rest)]
            row = {
                "digest": digests[0],
                "two runs": digests[0] == digests[1],
                "resumed": digests[0] == digests[2],
                "finite": _finite(whole),
            }
            with tempfile.TemporaryDirectory() as folder:
                kept = bx.checkpoint.every(steps // 2, folder)
                solve(steps // 2, checkpoint=kept)
                later = solve(steps, checkpoint=kept)
                row["from a checkpoint"] = (
                    digest((later.inner_params, later.outer_params)) == digests[0]
                )
            if not row["two runs"]:
                row["apart"] = float(
                    max(
                        jnp.max(jnp.abs(a - b))
                        for a, b in zip(
                            *map(jax.tree.leaves, (whole.inner_params, again.inner_params)),
                            strict=True,
                        )
                    )
                )
            found[f"{name}, {kind}"] = row
            print(json.dumps(found), flush=True)


def _finite(run) -> bool:
    return all(
        bool(jnp.all(jnp.isfinite(leaf)))
        for leaf in jax.tree.leaves((run.inner_params, run.outer_params))
    )


def run(part: Part) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "benchmarks._accelerator.bits",
        *(["--small"] if part.rehearse else []),
    ]

    def process(item):
        flags, number = item
        env = {
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS[flags]}".strip(),
        }
        return subprocess.run(
            command, capture_output=True, text=True, cwd=root, env=env, check=False
        )

    items = [
        (flags, number)
        for flags in part.pick(["no flags"], FLAGS)
        for number in range(part.pick(1, 2))
    ]
    with ThreadPoolExecutor(len(items)) as pool:
        done = dict(zip(items, pool.map(process, items), strict=True))
    for flags in dict.fromkeys(flags for flags, _ in items):
        outs = []
        for (name, number), ended in done.items():
            if name == flags:
                if ended.returncode:
                    part.record["errors"][f"{flags}, process {number}"] = ended.stderr[-2000:]
                lines = ended.stdout.strip().splitlines()
                outs.append(json.loads(lines[-1]) if lines else {})
        for what, row in outs[0].items():
            row = dict(row)
            mine = row.pop("digest")
            if len(outs) > 1 and what in outs[1]:
                row["two processes"] = outs[1][what]["digest"] == mine
            apart = row.pop("apart", 0.0)
            part.add(flags=flags, problem=what, **row, largest_difference=apart)
    with part.device():
        pass


if __name__ == "__main__":
    child("--small" in sys.argv)
