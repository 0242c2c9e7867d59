"""What the recipes share: small data sets, and convolutional networks that train in seconds."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bilevax as bx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data as examples_data
import omniglot_tasks


def script(main: Callable[..., float], steps: int, **small) -> None:
    """Run `main` with the flags that every recipe has.

    ``--small`` takes this many `steps` and the `small` arguments, and its number means nothing;
    ``--out`` keeps the number as JSON. A recipe that has forms takes one as ``--form``.
    """
    parser = argparse.ArgumentParser(description=sys.modules[main.__module__].__doc__)
    parser.add_argument("--small", action="store_true", help="few steps; its number means nothing")
    parser.add_argument("--steps", type=int, help="outer steps")
    parser.add_argument("--out", type=Path, help="folder for a JSON file with the number")
    if "form" in inspect.signature(main).parameters:
        parser.add_argument("--form", help="which form of the method")
    given = vars(parser.parse_args())
    out, quick = given.pop("out"), given.pop("small")
    arguments = {"steps": steps, **small} if quick else {}
    if quick:  # compiles longer than it runs
        jax.config.update("jax_disable_most_optimizations", True)
    arguments |= {name: value for name, value in given.items() if value is not None}
    try:
        number = main(**arguments)
    except examples_data.Unavailable as error:
        if not quick:
            raise SystemExit(str(error)) from None
        print(f"skipped: {error}")
    else:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            name = "_".join([Path(sys.argv[0]).stem, *filter(None, [given.get("form")])])
            (out / f"{name}.json").write_text(json.dumps({"number": number, **arguments}))


def digits(sizes=(300, 300, 500), seed=0, noise=0.0):
    """Digits of 8 x 8 in parts of these sizes, dicts of ``x``, ``y`` and ``i``; of the first part a
    share `noise` is labelled at random."""
    x, y = map(np.asarray, examples_data.digits())
    rng = np.random.default_rng(seed)
    order, parts, begin = rng.permutation(len(x)), [], 0
    for size in sizes:
        rows = order[begin : begin + size]
        parts.append(
            {
                "x": x[rows].reshape(-1, 8, 8, 1).astype(np.float32),
                "y": y[rows].astype(np.int32),
                "i": np.arange(size),
            }
        )
        begin += size
    wrong = rng.random(sizes[0]) < noise
    parts[0]["y"] = np.where(wrong, rng.integers(0, 10, sizes[0]), parts[0]["y"]).astype(np.int32)
    return [{name: jnp.asarray(a) for name, a in part.items()} for part in parts]


class CNN(nnx.Module):
    """Two convolutions with BatchNorm, Dropout, a head."""

    def __init__(self, rngs, width=16, rate=0.1):
        self.first = nnx.Conv(1, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), strides=2, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.norm(self.first(x)))))
        return self.head(self.drop(x.reshape(len(x), -1)))


class CharacterCNN(nnx.Module):
    """Three convolutions with BatchNorm on the statistics of the batch, a head of five classes.
    Kernels are matrices: each task has its own."""

    def __init__(self, rngs, width=32):
        sizes = ((1, width), (width, width), (width, width))
        self.convs = nnx.List([nnx.Linear(9 * a, b, use_bias=False, rngs=rngs) for a, b in sizes])
        norm = lambda: nnx.BatchNorm(width, use_running_average=False, rngs=rngs)
        self.norms = nnx.List([norm() for _ in sizes])
        self.head = nnx.Linear(4 * width, 5, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(omniglot_tasks.convolution(conv.kernel[...], x)))
        return self.head(x.reshape(len(x), -1))


def dense(w, x):
    """Scores of one hidden layer."""
    return jnp.tanh(x.reshape(len(x), -1) @ w["a"]) @ w["b"]


def cross_entropy(scores, labels):
    """Of each row."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def accuracy(model, part):
    """Share of right answers in evaluation mode."""
    model.eval()
    return float(jnp.mean(jnp.argmax(model(part["x"]), -1) == part["y"]))


# ---- sinusoids


def sine_network(w, x):
    """Two hidden layers of 40."""
    h = jnp.tanh(x @ w["a"] + w["b"][None])
    return jnp.tanh(h @ w["c"] + w["d"][None]) @ w["e"]


def sine_start(key):
    """Its parameters."""
    a, c, e = jax.random.split(key, 3)
    normal = lambda key, m, n: jax.random.normal(key, (m, n)) / jnp.sqrt(m)
    return {
        "a": normal(a, 1, 40),
        "b": jnp.zeros(40),
        "c": normal(c, 40, 40),
        "d": jnp.zeros(40),
        "e": normal(e, 40, 1),
    }


def sines(tasks):
    """``(key, step) -> tasks``: amplitude and phase at random, 10 points to adapt to and 20 to be
    asked about."""

    def sample(key, step):
        ka, kp, kx = jax.random.split(key, 3)
        x = jax.random.uniform(kx, (tasks, 30, 1), minval=-5.0, maxval=5.0)
        a = jax.random.uniform(ka, (tasks, 1, 1), minval=0.1, maxval=5.0)
        y = a * jnp.sin(x - jax.random.uniform(kp, (tasks, 1, 1), maxval=jnp.pi))
        return {"support": (x[:, :10], y[:, :10]), "query": (x[:, 10:], y[:, 10:])}

    return sample


STILL = optax.set_to_zero()  # for an outer level that only asks how it stands


@functools.cache  # the same data each time: what it is compiled to is compiled once
def sine_episodes(tasks):
    drawn = bx.data.episodes(sines(tasks))
    return drawn.map(lambda t: t["support"]), drawn.map(lambda t: t["query"])


def adapted(form, start, optimizer, steps, key, tasks=8):
    """A run over sampled sinusoids of a form ``(inner, outer, solver, method,
    inner_init)`` of meta-learning."""
    inner, outer, solver, method, begin = form
    support, query = sine_episodes(tasks)
    loop = bx.algorithms.double_loop(solver, method, optimizer)
    return bx.solve_bilevel(
        inner, outer, begin(start), start, inner_data=support, outer_data=query, inner_init=begin,
        algorithm=loop,
        num_steps=steps, key=jax.random.key(key), keep="last",
    )  # fmt: skip


def compared(name, forms, start, steps, test, how=None):
    """Train by a form, then adapt to new tasks by `how` (default: the same form) from what was
    learned and from `start`: both errors."""
    trained = adapted(forms[name], start, optax.adam(3e-3), steps, 0).outer_params
    form = forms[how or name]
    errors = [
        float(adapted(form, at, STILL, test, 1).history["value"].mean()) for at in (trained, start)
    ]
    print(f"{name}: error {errors[0]:.3f} after {steps} meta-steps, {errors[1]:.3f} before")
    return errors[0]


def census(seed=0, sizes=(1000, 2000)):
    """Rows of the census data in parts of these sizes, dicts of ``x`` (its shorter columns), ``y``
    and ``male``."""
    found = examples_data.adult()
    kept = [
        i
        for i, name in enumerate(found.names)
        if not name.startswith(("country", "occupation", "workclass", "education="))
    ]
    order, parts, begin = np.random.default_rng(seed).permutation(found.train), [], 0
    for size in sizes:
        rows = order[begin : begin + size]
        columns = {"x": found.x[rows][:, kept], "y": found.y[rows], "male": found.male[rows]}
        parts.append({name: jnp.asarray(a, jnp.float32) for name, a in columns.items()})
        begin += size
    return parts
