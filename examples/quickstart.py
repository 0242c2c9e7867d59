"""Forty percent of the training labels are wrong, and only 60 examples are known to be clean: learn
a weight for each training example.

    python examples/quickstart.py

The data are scikit-learn's handwritten digits; an annotator has written the next digit on 40 % of
800 training images. The model is a softmax regression with a penalty.
Inner level: the model, trained on weighted examples. Outer level: the logit of each weight, judged
by the trained model's loss on 40 of the clean examples. The other 20 say when to stop, and choose
the penalty wherever one is chosen. All that is not used so far is the test set, which chooses
nothing (but in the row that says so).
"""

from __future__ import annotations

import time
from functools import partial

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import bilevax as bx

TRAIN, OUTER, HELD_OUT, WRONG, CLASSES = 800, 40, 20, 0.4, 10
L2 = 1e-3  # of every row that doesn't choose its own
GRID = jnp.logspace(-4, 0, 20)
EVERYTHING, CHOSEN, HINDSIGHT = (
    "everything",
    "everything, best of 20 penalties",
    "... best of them on test",
)
CLEAN, BILEVEL, ORACLE = "clean examples only", "bilevel", "oracle: right labels only"
ROWS = (EVERYTHING, CHOSEN, HINDSIGHT, CLEAN, BILEVEL, ORACLE)


# ---- the model


def logits(w, x):
    return x @ w["w"] + w["b"]


def losses(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(w, x), y)


def accuracy(w, x, y):
    return jnp.mean((jnp.argmax(logits(w, x), -1) == y).astype(jnp.float32))


def penalty(w, l2):
    return 0.5 * l2 * (jnp.sum(w["w"] ** 2) + jnp.sum(w["b"] ** 2))


def start(x):
    return {"w": jnp.zeros((x.shape[-1], CLASSES)), "b": jnp.zeros(CLASSES)}


# ---- the bilevel problem: two functions


def inner(w, scores, batch):
    """Train on weighted examples; a weight of 1/2 each to begin with, hence the factor."""
    x, y = batch
    return jnp.mean(2 * jax.nn.sigmoid(scores) * losses(w, x, y)) + penalty(w, L2)


def outer(w, scores, batch):
    """Judge the trained model on clean examples."""
    return jnp.mean(losses(w, *batch))


def held_out(w, scores, batches):
    """Recorded at every step: the loss that decides when to stop, and the test accuracy for the
    picture."""
    clean, test = batches
    return {"held_out": jnp.mean(losses(w, *clean)), "test": accuracy(w, *test)}


ALGORITHM = bx.algorithms.double_loop(
    bx.inner.optax(optax.sgd(0.5, momentum=0.9), steps=10),
    bx.hypergradient.unrolled(),
    optax.adam(0.5),
)


def bilevel(d, steps):
    return bx.solve_bilevel(
        inner,
        outer,
        start(d["x"]),
        jnp.zeros(len(d["x"])),
        inner_data=(d["x"], d["y"]),
        outer_data=(d["x_outer"], d["y_outer"]),
        algorithm=ALGORITHM,
        num_steps=steps,
        metrics=bx.metrics(
            held_out, ((d["x_held"], d["y_held"]), (d["x_test"], d["y_test"])), select="held_out"
        ),
    )


# ---- what it is compared with: one model, trained to the end


def weighted_loss(w, x, y, weight, l2):
    return jnp.sum(weight * losses(w, x, y)) / jnp.sum(weight) + penalty(w, l2)


train = bx.argmin(weighted_loss, bx.inner.lbfgs(maxiter=300, tol=1e-3), tol=jnp.inf)


def grid(d, x, y):
    """A model for each of the 20 penalties, their held-out losses and test accuracies."""
    models = jax.lax.map(lambda l2: train(start(x), x, y, jnp.ones(len(y)), l2), GRID)
    held = jax.vmap(lambda w: jnp.mean(losses(w, d["x_held"], d["y_held"])))(models)
    return held, jax.vmap(lambda w: accuracy(w, d["x_test"], d["y_test"]))(models)


def others(d):
    """Test accuracy of every other row."""

    def join(*names):
        return [jnp.concatenate([d[f"{axis}{name}"] for name in names]) for axis in "xy"]

    def test(x, y, weight, l2):
        return accuracy(train(start(x), x, y, weight, l2), d["x_test"], d["y_test"])

    everything, clean = join("", "_outer", "_held"), join("_outer", "_held")
    held, tested = grid(d, *join("", "_outer"))
    clean_held, _ = grid(d, *join("_outer"))
    ones = lambda pair: jnp.ones(len(pair[1]))
    return {
        EVERYTHING: test(*everything, ones(everything), L2),
        CHOSEN: tested[jnp.argmin(held)],
        HINDSIGHT: jnp.max(tested),
        CLEAN: test(*clean, ones(clean), GRID[jnp.argmin(clean_held)]),
        ORACLE: test(d["x"], d["y"], 1.0 - d["wrong"], L2),
    }


# ---- data


def problem(seed):
    """One seed's split of the digits, its first part mislabelled."""
    x, y = data.digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    train, outer, held, test = np.split(order, np.cumsum([TRAIN, OUTER, HELD_OUT]))
    noisy, wrong = data.confuse_labels(rng, y[train], WRONG, CLASSES)
    d = {"x": x[train], "y": noisy, "wrong": wrong.astype(np.float32)}
    for name, part in (("outer", outer), ("held", held), ("test", test)):
        d[f"x_{name}"], d[f"y_{name}"] = x[part], y[part]
    return d


def main(argv=None):
    args = report.parse(
        report.parser(__doc__, full=dict(seeds=10, steps=30), small=dict(seeds=2, steps=10)), argv
    )
    begin = time.perf_counter()
    d = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[problem(seed) for seed in range(args.seeds)]
    )

    solution = jax.jit(jax.vmap(partial(bilevel, steps=args.steps)))(d)  # all seeds at once
    compared = jax.jit(jax.vmap(others))(d)
    tests = {
        **compared,
        BILEVEL: jax.vmap(accuracy)(solution.inner_params, d["x_test"], d["y_test"]),
    }
    rows = {name: {"test": np.asarray(tests[name])} for name in ROWS}

    weights, wrong = np.asarray(jax.nn.sigmoid(solution.outer_params)), np.asarray(d["wrong"]) > 0
    seconds = time.perf_counter() - begin
    print(report.table(rows, {"test": "test accuracy"}, better=(BILEVEL, "test")))
    print(f"Mean ± standard error over {args.seeds} seeds; differences are taken seed by seed.")
    print(
        f"Mean weight: {weights[wrong].mean():.2f} of wrong examples, {weights[~wrong].mean():.2f} "
        f"of right ones. {seconds:.1f} s in all."
    )

    with report.figure(args.out / "quickstart.svg", 3, width=5.0) as (_, (left, middle, right)):
        report.bars(
            left,
            rows,
            "test",
            {BILEVEL: report.BLUE, ORACLE: report.GREY, CLEAN: report.RED},
            "test accuracy",
        )
        left.set_title("Test accuracy, ± 2 standard errors")
        history = {key: np.asarray(solution.history[key]) for key in ("value", "held_out", "test")}
        steps = np.arange(args.steps)
        for key, label, color, line in (
            ("value", "clean, trained on", report.ORANGE, "--"),
            ("held_out", "clean, held out", report.BLUE, "-"),
        ):
            middle.plot(steps, history[key].mean(0), line, color=color, label=label, linewidth=2)
        kept = np.asarray(solution.stats["best_step"])
        middle.plot(
            kept,
            history["held_out"][np.arange(args.seeds), kept],
            "o",
            color=report.BLUE,
            alpha=0.6,
            label="kept step, one a seed",
        )
        middle.set(xlabel="outer step", ylabel="loss", title="Stopped on held-out examples")
        middle.set_ylim(bottom=0)
        middle.legend()
        bins = np.linspace(0, 1, 26)
        kinds = {"right label": weights[~wrong], "wrong label": weights[wrong]}
        report.two_kinds(right, kinds, bins)
        right.set(
            xlabel="learned weight",
            ylabel="training examples, all seeds",
            title="What the weights found",
        )
    settings = dict(
        vars(args),
        train=TRAIN,
        outer=OUTER,
        held_out=HELD_OUT,
        wrong=WRONG,
        l2=L2,
        grid=GRID,
        algorithm=repr(ALGORITHM),
    )
    report.save(args.out / "quickstart.json", settings, rows, seconds, kept_steps=kept)
    return rows


if __name__ == "__main__":
    report.run(main)
