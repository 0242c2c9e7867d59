"""Digits with a decay a weight, against Betty (torch): each of its methods beside ours, one core
each side, full batch.

    python -m venv /tmp/betty && /tmp/betty/bin/pip install torch
    /tmp/betty/bin/pip install --ignore-requires-python --no-deps betty-ml==0.2.1
    python benchmarks/betty.py --python /tmp/betty/bin/python

Betty 0.2.1 asks for a Python below 3.11 but runs on later ones; it lives in a process of its own,
fed line by line, so that neither library sees the other. Both sides start from zero weights, take
10 Adam steps inside and one outside an outer step, and see the same images, as many for training as
for validation. An entry's run is 100 outer steps, set-up included, through `solve_bilevel` here and
through `Engine.run` there.
"""

import argparse
import atexit
import json
import os
import subprocess
import sys
from pathlib import Path

# One core for both, before jax starts its threads; the worker inherits it.
if hasattr(os, "sched_setaffinity") and __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Case, main
from sklearn.datasets import load_digits

import bilevax as bx

PROBLEM = dict(
    steps=100,
    inner_steps=10,
    inner_rate=0.01,
    outer_rate=0.1,
    start=-5.0,
    cg=5,
    terms=6,
    neumann_step=0.1,
    radius=0.01,
    classes=10,
)
HERE = Path(__file__).resolve().parent


def digits(rows):
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32) / 16
    return {
        name: (x[cut], y[cut])
        for name, cut in (
            ("train", slice(rows)),
            ("valid", slice(600, 600 + rows)),
            ("test", slice(1200, None)),
        )
    }


def loss(w, batch):
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(
            batch[0] @ w["weight"].T + w["bias"], batch[1]
        )
    )


def inner(w, decay, batch):
    return loss(w, batch) + 0.5 * sum(jnp.sum(jnp.exp(decay[name]) * w[name] ** 2) for name in w)


def outer(w, decay, batch):
    return loss(w, batch)


def methods(problem):
    """Betty's name -> the same mathematics here."""
    H, L = bx.hypergradient, bx.linear
    return {
        "cg": H.implicit(L.cg(maxiter=problem["cg"]), max_residual=jnp.inf),
        "neumann": H.implicit(
            L.neumann(problem["terms"], step=problem["neumann_step"]),
            warm_start=False,
            max_residual=jnp.inf,
        ),
        "darts": H.finite_difference(radius=problem["radius"]),
        "sama": H.sama(),
    }


class Ours:
    """One run of `solve_bilevel`."""

    def __init__(self, problem, data, method):
        self.data, self.steps = data, problem["steps"]
        solver = bx.inner.optax(optax.adam(problem["inner_rate"]), problem["inner_steps"])
        self.algorithm = bx.algorithms.double_loop(
            solver, method, optax.adam(problem["outer_rate"])
        )
        self.w = {
            "weight": jnp.zeros((problem["classes"], 64)),
            "bias": jnp.zeros(problem["classes"]),
        }
        self.x = jax.tree.map(lambda a: jnp.full(a.shape, problem["start"]), self.w)

    def __call__(self):
        train, valid = self.data["train"], self.data["valid"]
        return bx.solve_bilevel(
            inner,
            outer,
            self.w,
            self.x,
            inner_data=train,
            outer_data=valid,
            algorithm=self.algorithm,
            num_steps=self.steps,
            keep="last",
        )


class Worker:
    """Betty in its own process."""

    def __init__(self, python, problem, data):
        # -I: or `import betty` would find this file.
        command = [python, "-I", str(HERE / "_betty_worker.py")]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        atexit.register(self.process.kill)
        self._say(
            json.dumps(
                problem
                | {
                    "data": {
                        name: [part.tolist() for part in parts] for name, parts in data.items()
                    }
                }
            )
        )

    def _say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def run(self, method):
        self._say(method)
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"Betty's {method}: {answer['error']}")
        return answer


def measured(data):
    def metrics(out):
        if isinstance(out, dict):  # Betty's
            return {name: out[name] for name in ("valid loss", "test accuracy")}
        w = out.inner_params
        x, y = data["test"]
        return {
            "valid loss": float(loss(w, data["valid"])),
            "test accuracy": float(jnp.mean(jnp.argmax(x @ w["weight"].T + w["bias"], 1) == y)),
        }

    return metrics


def cases(python):
    def generate(args):
        problem = PROBLEM | (dict(steps=10) if args.quick else {})
        for rows in (200,) if args.quick else (200, 600):
            data = digits(rows)
            worker = Worker(python, problem, data)
            on_device = jax.tree.map(jnp.asarray, data)
            for name, method in methods(problem).items():
                entries = {
                    "Betty": lambda name=name, worker=worker: worker.run(name),
                    "bilevax": Ours(problem, on_device, method),
                }
                yield Case(
                    f"{name}, {rows} images, {problem['steps']} steps",
                    entries,
                    "Betty",
                    measured(on_device),
                )
            worker.process.kill()

    return generate


def available(python) -> bool:
    try:
        return (
            subprocess.run(
                [python, "-I", "-c", "import torch, betty"], capture_output=True, check=False
            ).returncode
            == 0
        )
    except OSError:
        return False


def run(argv=None):
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--python", default=sys.executable, help="the Python that has torch and betty-ml"
    )
    given, rest = parser.parse_known_args(argv)
    if not available(given.python) and not {"-h", "--help"} & set(rest):
        print(
            f"betty: skipped, since {given.python} has no torch or no betty-ml. How to get them, "
            f"and --python, are in {Path(__file__).name}."
        )
        return None
    return main("betty", __doc__.split("\n\n")[0], cases(given.python), rest)


if __name__ == "__main__":
    run()
