"""How long the first result takes: imports, README's ten lines, and the first call of four
algorithms, beside another checkout of the library.

    python benchmarks/first_calls.py [--against CHECKOUT] [--rounds 5] [--count] [--out FILE]

Each measurement is a process of its own with an empty compilation cache; checkouts and algorithms
take turns. `--count` takes no time but counts what the compiler is given: operations and loops of
the largest program, as lowered. Take times on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
README = "README's ten lines"
NAMES = (README, "default", "double loop", "SAMA", "SOBA")


def problem():
    """Ridge regression with a penalty a feature, 20 of them: what a first look at the library is
    like."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.RandomState(0)
    rows = rng.randn(160, 20).astype(np.float32)
    targets = (rows[:, :5].sum(1) + rng.randn(160)).astype(np.float32)
    loss = lambda w, x, b: jnp.mean((b["x"] @ w - b["y"]) ** 2)
    inner = lambda w, x, b: loss(w, x, b) + jnp.sum(jnp.exp(x) * w * w)
    halves = [
        {"x": jnp.asarray(rows[a:b]), "y": jnp.asarray(targets[a:b])}
        for a, b in ((0, 60), (60, 160))
    ]
    return inner, loss, jnp.zeros(20), jnp.zeros(20), halves


def algorithm(name: str):
    import optax

    import bilevax as bx

    adam = bx.inner.optax(optax.adam(1e-2, eps_root=1e-8), 10)
    return {
        "default": lambda: None,
        "double loop": lambda: bx.algorithms.double_loop(
            adam, bx.hypergradient.implicit(bx.linear.cg(maxiter=10)), optax.adam(1e-2)
        ),
        "SAMA": lambda: bx.algorithms.double_loop(adam, bx.hypergradient.sama(), optax.adam(1e-2)),
        "SOBA": lambda: bx.algorithms.soba(0.1, 0.1),
    }[name]()


def readme() -> str:
    """The first block of Python in README."""
    return re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL).group(1)


def worker(name: str) -> None:
    """One measurement, printed as JSON: seconds of the import and of the first call."""
    began = time.perf_counter()
    import bilevax as bx

    imported = time.perf_counter()
    if name == README:
        exec(readme(), {})
        print(json.dumps({"import": imported - began, "all": time.perf_counter() - began}))
        return
    inner, outer, y, x, (train, held_out) = problem()
    chosen = algorithm(name)
    ready = time.perf_counter()
    bx.solve_bilevel(
        inner,
        outer,
        y,
        x,
        inner_data=train,
        outer_data=held_out,
        algorithm=chosen,
        num_steps=10,
        throw=False,
    )
    print(json.dumps({"import": imported - began, "first call": time.perf_counter() - ready}))


def measured(checkout: Path, name: str, dump: str | None = None) -> dict:
    environment = dict(
        os.environ, PYTHONPATH=str(checkout), JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="0"
    )
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if dump:
        environment["JAX_DUMP_IR_TO"] = dump
    call = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
    done = subprocess.run(
        call, env=environment, cwd=checkout, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def counted(checkout: Path, name: str) -> dict:
    """Operations and loops of the largest program that is lowered, and of all."""
    with tempfile.TemporaryDirectory() as folder:
        measured(checkout, name, folder)
        texts = [path.read_text() for path in Path(folder).rglob("*.mlir")]
    sizes = sorted(
        (
            len(re.findall(r"(?:stablehlo|chlo|func)\.\w+|call @", text)),
            text.count("stablehlo.while"),
        )
        for text in texts
    )
    return {
        "operations": sizes[-1][0],
        "loops": sizes[-1][1],
        "of all programs": sum(size for size, _ in sizes),
        "programs": len(sizes),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--count", action="store_true", help="count operations, take no time")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(args.worker)
        return 0
    checkouts = {"here": HERE} | ({"against": args.against.resolve()} if args.against else {})
    names = [name for name in NAMES if args.only in name]
    rows = []
    if args.count:
        for name in names:
            rows += [
                {"name": name, "checkout": label} | counted(path, name)
                for label, path in checkouts.items()
            ]
            print("\n".join(str(row) for row in rows[-len(checkouts) :]), flush=True)
    else:
        taken: dict = {}
        for _ in range(args.rounds):
            for name in names:
                for label, path in checkouts.items():
                    for part, seconds in measured(path, name).items():
                        taken.setdefault((name, part, label), []).append(seconds)
        print(
            "| what | part | "
            + " | ".join(checkouts)
            + " |\n| --- | --- |"
            + " --- |" * len(checkouts)
        )
        for name, part in dict.fromkeys(key[:2] for key in taken):
            medians = [statistics.median(taken[name, part, label]) for label in checkouts]
            rows.append({"name": name, "part": part} | dict(zip(checkouts, medians, strict=True)))
            print(
                f"| {name} | {part} | " + " | ".join(f"{m:.2f} s" for m in medians) + " |",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
