"""`value_and_hypergrad` inside a training loop of your own, with a Flax model and optax: learn the
penalty of each layer while training.

    python examples/my_own_loop.py

The loop, the batches, the optimizers and the logging are the caller's; bilevax gives the one number
that a loop cannot get from jax.grad alone: the gradient of the validation loss with respect to what
the training depends on. A two-layer perceptron is trained on 150 of scikit-learn's digits; the
outer parameters are the log-penalties of its two layers. Validation has 300 digits, of which the
last 100 are held out: they choose the kept step of either run. The baseline is the same loop with
the penalties left where they start.
"""

from __future__ import annotations

import time

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax import nnx

import bilevax as bx

TRAIN, OUTER, HELD_OUT, CLASSES = 150, 200, 100, 10
START = {"first": jnp.float32(-7.0), "second": jnp.float32(-7.0)}  # log-penalties


class Perceptron(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


GRAPH = nnx.graphdef(
    Perceptron(nnx.Rngs(0))
)  # the model's structure; its parameters travel as arguments


def losses(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        nnx.merge(GRAPH, params)(batch["x"]), batch["y"]
    )


def accuracy(params, batch):
    return jnp.mean(
        (jnp.argmax(nnx.merge(GRAPH, params)(batch["x"]), -1) == batch["y"]).astype(jnp.float32)
    )


# ---- the two levels, and the function that differentiates one through the other


def inner(params, penalties, batch):
    decay = sum(
        jnp.exp(penalties[name]) * jnp.sum(params[name]["kernel"].get_value() ** 2)
        for name in ("first", "second")
    )
    return jnp.mean(losses(params, batch)) + decay


def outer(params, penalties, batch):
    return jnp.mean(losses(params, batch))


SOLVER = bx.inner.optax(optax.adam(3e-3, eps_root=1e-12), steps=20)
hypergrad = bx.value_and_hypergrad(
    inner, outer, solver=SOLVER, hypergradient=bx.hypergradient.unrolled()
)


# ---- the loop


@jax.jit
def step(params, penalties, state, optimizer_state, parts, learning_rate):
    """Twenty steps of training, then one of the penalties."""
    estimate = hypergrad(params, penalties, parts["train"], parts["outer"], state=state)
    updates, optimizer_state = optax.adam(learning_rate).update(estimate.grad, optimizer_state)
    log = {
        "outer": estimate.value,
        "hypergradient": estimate.info["grad_norm"],
        "held": jnp.mean(losses(estimate.inner_params, parts["held"])),
        "test": accuracy(estimate.inner_params, parts["test"]),
        **penalties,
    }
    return (
        estimate.inner_params,
        optax.apply_updates(penalties, updates),
        estimate.state,
        optimizer_state,
        log,
    )


def train(seed, parts, steps, learning_rate):
    """The log of a run, and the test accuracy at the step of the smallest held-out loss."""
    params = nnx.state(Perceptron(nnx.Rngs(seed)), nnx.Param)
    penalties, optimizer_state = START, optax.adam(learning_rate).init(START)
    state = hypergrad.init(
        params
    )  # the inner optimizer's state, and what the method carries from call to call
    log = []
    for _ in range(steps):
        params, penalties, state, optimizer_state, row = step(
            params, penalties, state, optimizer_state, parts, learning_rate
        )
        log.append(row)
    log = {key: np.asarray([row[key] for row in log]) for key in log[0]}
    return log, log["test"][np.argmin(log["held"])]


def problem(seed):
    """One seed's split of the digits."""
    x, y = data.digits()
    order = np.random.default_rng(seed).permutation(len(x))
    parts = np.split(order, np.cumsum([TRAIN, OUTER, HELD_OUT]))
    return {
        name: {"x": jnp.asarray(x[part]), "y": jnp.asarray(y[part])}
        for name, part in zip(("train", "outer", "held", "test"), parts, strict=True)
    }


def main(argv=None):
    args = report.parse(
        report.parser(__doc__, full=dict(seeds=5, steps=60), small=dict(seeds=1, steps=5)), argv
    )
    begin = time.perf_counter()
    rates = {"penalties as they start": 0.0, "penalties learned": 0.2}
    rows, logs = {name: {"test": []} for name in rates}, {name: [] for name in rates}
    for seed in range(args.seeds):
        parts = problem(seed)
        for name, rate in rates.items():
            log, test = train(seed, parts, args.steps, rate)
            logs[name].append(log)
            rows[name]["test"].append(test)
    seconds = time.perf_counter() - begin
    learned = "penalties learned"
    print(report.table(rows, {"test": "test accuracy"}, better=(learned, "test")))
    print(
        f"Mean ± standard error over {args.seeds} seeds; differences are taken seed by seed. "
        f"{seconds:.1f} s in all."
    )

    with report.figure(args.out / "my_own_loop.svg", 2) as (_, (left, right)):
        steps = np.arange(args.steps)
        for (name, runs), color, line in zip(
            logs.items(), (report.ORANGE, report.BLUE), ("--", "-"), strict=True
        ):
            left.plot(
                steps,
                np.mean([run["held"] for run in runs], 0),
                line,
                color=color,
                label=name,
                linewidth=2,
            )
        left.set(
            xlabel="outer step (20 training steps each)",
            ylabel="held-out loss",
            title="Held-out loss, mean over seeds",
        )
        left.legend()
        for name, color, line in (("first", report.BLUE, "-"), ("second", report.RED, "--")):
            for i, run in enumerate(logs[learned]):
                right.plot(
                    steps,
                    np.exp(run[name]),
                    line,
                    color=color,
                    alpha=0.7,
                    label=f"{name} layer" if i == 0 else None,
                )
        right.set(
            xlabel="outer step",
            ylabel="penalty",
            yscale="log",
            title="The penalties, a line a seed",
        )
        right.legend()
    settings = dict(
        vars(args), train=TRAIN, outer=OUTER, held_out=HELD_OUT, start=START, solver=repr(SOLVER)
    )
    report.save(args.out / "my_own_loop.json", settings, rows, seconds)
    return rows


if __name__ == "__main__":
    report.run(main)
