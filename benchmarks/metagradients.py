"""What a metagradient costs in plain trainings, and what it predicts.

    python benchmarks/metagradients.py [costs] [prediction] [knobs] [--quick]

- costs: processor time (all threads) and wall clock of `replay.value_and_metagrad` over 512 steps
  of Adam on causal transformers of .14 and .39 million parameters, over plain training of the same
  steps as a loop of the host over one compiled step; they take turns in one process, half of a
  plain training before each replay and half after it.
- prediction: 192 steps on 512 examples, a character transformer and a perceptron on digits:
  trainings without 1 % of the examples (rank correlation), and with weights of .9 on those
  (relative error of the predicted changes).
- knobs: metasmoothness of a small convolutional network on digits, one knob of its training turned
  at a time, with the test loss that it costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import bilevax as bx
from benchmarks._accelerator import encoder
from benchmarks.harness import RESULTS, environment

# ---- costs


def clocks() -> np.ndarray:
    return np.array([time.process_time(), time.perf_counter()])


def costs(quick: bool) -> list[dict]:
    sizes = {"small": encoder.Shape(100, 64, 2, 4, 256, 64, causal=True)}
    sizes["large"] = sizes["small"]._replace(width=96, layers=3, hidden=384)
    out = []
    for name, rows, rounds in (("small", 16, 2), ("large", 8, 1)):
        found = cost(sizes[name], 8, 4, 1) if quick else cost(sizes[name], 512, rows, rounds)
        print(json.dumps(found), flush=True)
        out.append(found)
    return out


def cost(shape: encoder.Shape, steps: int, rows: int, rounds: int) -> dict:
    optimizer = optax.adam(1e-3, eps_root=1e-8)
    losses = partial(encoder.token_losses, shape, dtype=jnp.float32)

    def inner(y, x, batch):
        return jnp.mean(x[batch["index"]] * losses(y, batch["tokens"]))

    def outer(y, x, batch):
        return jnp.mean(losses(y, batch))

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocabulary, (256, shape.length + 1)).astype(np.int32)
    order = rng.integers(0, 256, (steps, rows)).astype(np.int32)
    batch_of = lambda step: {"tokens": tokens[order[step]], "index": order[step]}
    y, x = encoder.init(shape, jax.random.key(0)), jnp.ones(256)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(y, opt, x, batch):
        value, grads = jax.value_and_grad(inner)(y, x, batch)
        updates, opt = optimizer.update(grads, opt, y)
        return optax.apply_updates(y, updates), opt, value

    def plain(count=steps):
        state = (jax.tree.map(jnp.copy, y), optimizer.init(y))
        for number in range(count):
            *state, value = step(*state, x, batch_of(number))
        jax.block_until_ready(value)

    def replay(schedule, count=steps):
        fn = bx.replay.value_and_metagrad(inner, outer, optimizer, count, schedule=schedule)
        found = fn(y, x, bx.replay.reader(batch_of), tokens[:rows])
        return jax.block_until_ready(found.grad), found.info

    def clocked(fn, *args):
        begin = clocks()
        out = fn(*args)
        return clocks() - begin, out

    schedules = {"everything": bx.replay.everything(), "segments": bx.replay.segments()}
    plain(2)
    for schedule in schedules.values():
        replay(schedule, 4)  # compiled before the clock: another length compiles nothing
    ratios, held = {name: [] for name in schedules}, {}
    for _ in range(rounds):
        before = clocked(plain, steps // 2)[0]
        for name, schedule in schedules.items():
            took, (_, info) = clocked(replay, schedule)
            after = clocked(plain, steps // 2)[0]
            ratios[name].append((took / (before + after)).tolist())
            held[name], before = info["host_bytes"] / 2**20, after
    return {
        "parameters": encoder.size(y),
        "steps": steps,
        "rows": rows,
        "length": shape.length,
        "plain step, processor ms": float(after[0] / (steps // 2) * 1e3),
    } | {
        name: {
            "processor time over plain": [ratio[0] for ratio in ratios[name]],
            "wall clock over plain": [ratio[1] for ratio in ratios[name]],
            "held MiB": held[name],
        }
        for name in schedules
    }


# ---- prediction


def prediction(quick: bool) -> list[dict]:
    import attribution as example

    steps, subsets, examples = (8, 4, 64) if quick else (192, 32, 512)
    out = []
    for name, make in (("character model", example.text), ("digits", example.digits)):
        problem = make(1, quick)
        train = jax.tree.map(lambda a: a[:examples], problem.train)
        rng = np.random.default_rng(1)
        order = np.stack([rng.permutation(examples)[: problem.batch] for _ in range(steps)])
        rates = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10 + 1, steps)
        training = bx.attribution.training(
            problem.losses, optax.adam(rates, eps_root=1e-6), problem.params, train, order
        )
        found = bx.attribution.metagradient(training, problem.measure, problem.test)
        measure = jax.jit(jax.vmap(problem.measure, (0, None)))
        retrain = lambda weights: measure(training.retrain(weights), problem.test)  # noqa: B023
        judged = bx.attribution.linear_datamodeling_score(
            found, retrain, jax.random.key(1), subsets=subsets, fraction=0.01
        )
        value = np.asarray(found.value)
        part = np.asarray(retrain(jnp.asarray(1 - 0.1 * judged.removed, jnp.float32))) - value
        error = lambda changes, said: float(
            np.linalg.norm(changes - said) / np.linalg.norm(changes)
        )
        out.append(
            {
                "problem": name,
                "examples": examples,
                "steps": steps,
                "subsets": subsets,
                "left out": int(judged.removed[0].sum()),
                "rank correlation": judged.correlation,
                "standard error": judged.standard_error,
                "relative error, left out": error(judged.retrained - value, judged.predicted),
                "relative error, weights of .9": error(part, 0.1 * judged.predicted),
            }
        )
        print(json.dumps(out[-1]), flush=True)
    return out


# ---- knobs


def normalised(x, scale, shift):
    mean = x.mean((1, 2, 3), keepdims=True)
    return scale * (x - mean) / (x.std((1, 2, 3), keepdims=True) + 1e-3) + shift


def digit_losses(params, rows, *, pooling, normed, scale):
    """Losses of images ``[rows, 28, 28]``: two convolutions and a linear layer."""
    x, window = rows["x"][..., None], ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    for kernel, *norm in params["conv"]:
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        before = normed == "before"
        x = jax.nn.relu(normalised(x, *norm)) if before else normalised(jax.nn.relu(x), *norm)
        if pooling == "average":
            x = lax.reduce_window(x, 0.0, lax.add, *window) / 4
        else:
            x = lax.reduce_window(x, -jnp.inf, lax.max, *window)
    logits = scale * x.reshape(len(x), -1) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows["y"])


def digit_training(seed, data, drawn, *, eps_root, batch, width, **settings):
    keys = jax.random.split(jax.random.key(seed), 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) * np.prod(shape[:-1]) ** -0.5
    layer = lambda key, a, b: (normal(key, 3, 3, a, b), jnp.ones(b), jnp.zeros(b))
    params = {
        "conv": [layer(keys[0], 1, width), layer(keys[1], width, 2 * width)],
        "out": normal(keys[2], 49 * 2 * width, 10),
    }
    optimizer = optax.adam(3e-3, eps_root=eps_root)
    losses = partial(digit_losses, **settings)
    return bx.attribution.training(losses, optimizer, params, data, drawn[:, :batch])


BASE = dict(eps_root=0.0, normed="after", pooling="max", scale=1.0, batch=16, width=4)
KNOBS = {
    "as it is": {},
    "eps_root=1e-8": {"eps_root": 1e-8},
    "eps_root=1e-6": {"eps_root": 1e-6},
    "norm before the activation": {"normed": "before"},
    "average pooling": {"pooling": "average"},
    "output scale .1": {"scale": 0.1},
    "batch of 64": {"batch": 64},
    "three times as wide": {"width": 12},
    "all but the batch and the width": {
        "eps_root": 1e-6, "normed": "before", "pooling": "average", "scale": 0.1,
    },
}  # fmt: skip


def knobs(quick: bool) -> list[dict]:
    import data

    steps, examples, seeds = (6, 64, 1) if quick else (150, 512, 3)
    split, out = data.mnist(), {name: {"score": [], "test loss": []} for name in KNOBS}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rows, held = rng.permutation(len(split.y_train))[:examples], rng.permutation(2000)[:500]
        images = lambda a: jnp.asarray(a.reshape(-1, 28, 28))
        train = {"x": images(split.x_train[rows]), "y": jnp.asarray(split.y_train[rows])}
        test = {"x": images(split.x_test[held]), "y": jnp.asarray(split.y_test[held])}
        drawn = rng.integers(0, examples, (steps, 64))
        made = {
            name: digit_training(seed, train, drawn, **BASE | knob) for name, knob in KNOBS.items()
        }
        first, *others = KNOBS
        found = bx.attribution.metasmoothness(
            made[first].retrain,
            jnp.ones(examples),
            jnp.asarray(rng.choice([-1.0, 1.0], examples), jnp.float32),
            variants={name: made[name].retrain for name in others},
        )
        print(found.table(), flush=True)
        for name, one in ({first: found} | found.variants).items():
            params = made[name].retrain(jnp.ones(examples))
            out[name]["score"].append(one.score)
            out[name]["test loss"].append(float(jnp.mean(made[name].losses(params, test))))
    return [{"training": name, **row} for name, row in out.items()]


PARTS = {"costs": costs, "prediction": prediction, "knobs": knobs}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: numbers mean nothing")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results)")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"part: got {', '.join(sorted(unknown))}; expected of {', '.join(PARTS)}")
    path = args.out or (None if args.quick else RESULTS / "metagradients.json")
    for name in args.parts or PARTS:
        found = {"measured": PARTS[name](args.quick), "environment": environment()}
        if path is not None:
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(before | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
