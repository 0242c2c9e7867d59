"""Which training examples taught a network its mistakes, and how are they unlearned?

    python examples/poisoning.py

Two ways of poisoning 1,000 MNIST digits. *Trigger*: 50 digits of other classes get a white square
in a corner and the label 0; afterwards test digits with that square are taken for zeros. *Flipped*:
40 of the sevens, which are about 100, are labelled 1. A perceptron is trained on all of it. Someone
notices ten wrong answers (test digits with the square, sevens taken for ones), writes down what
they should have been, and asks which examples are to blame: influence on the loss of the ten, by
the metagradient through the whole training, by influence functions with the damped Gauss-Newton
matrix, by TracIn, by the cosine of gradients; beside them the training loss of each example itself,
and a random order.

Examples that say the same stand in for each other: leaving out any one of them changes little. So
two methods are asked in rounds as well: a fifth of those to be left out goes, the network is
trained again, and the question is put again.

Then the tenth of the examples that a method blames most is left out, and the network is trained
again: how often is it fooled now (test digits with the square, test sevens), how often right on
clean test digits? Beside that, two ways of unlearning without training again, given the poison
itself: a Newton step with the damped Gauss-Newton matrix (influence functions' answer), and a tenth
of the training's steps on what is left. The truth is the training without the poison: how far are
the ten losses from what it gives, and how far is the change that the metagradient predicts to first
order?

What came out (six seeds): cosines of gradients find the poison (area under the curve .98 for the
trigger, .99 for flipped labels), TracIn flipped labels (1.00). The metagradient finds it worst of
the gradient methods (.55 and .77), though it predicts the removal of few examples best: fifty that
say the same stand in for each other. In rounds it finds .75 of the trigger in place of .39, cosines
.88 in one. A trigger works on 57 % of the digits with .88 of its examples gone, and unlearning
without training again does nothing to it; flipped labels are undone by all of these.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from sklearn.metrics import roc_auc_score

import bilevax as bx

META, ROUNDS, IMPLICIT, TRACIN, SIMILARITY, AGAIN, LOSS, RANDOM, TRUE = (
    "metagradient",
    "metagradient, in rounds",
    "implicit, Gauss-Newton",
    "TracIn",
    "gradient similarity",
    "gradient similarity, in rounds",
    "training loss",
    "random",
    "the poison itself",
)
NOTHING, NEWTON, FINETUNED = "nothing", "the poison, by a Newton step", "the poison, by finetuning"
COLORS = {
    META: report.BLUE,
    ROUNDS: report.SKY,
    IMPLICIT: report.ORANGE,
    TRACIN: report.GREEN,
    SIMILARITY: report.PURPLE,
    AGAIN: report.RED,
    LOSS: report.BROWN,
    RANDOM: report.GREY,
}
BATCH, QUERIES, DAMPING, FIRST_SEED = 50, 10, 0.03, 30
REMOVED, PARTS = 10, 5  # one example in so many is left out; the parts that rounds do it in


class Problem(NamedTuple):
    rows: Any  # the training examples
    poison: np.ndarray  # which of them are
    fooled: Any  # test digits that it is about, with their true labels
    wanted: int  # what the poison makes of them
    test: Any  # clean test digits


# ---- what is poisoned


def square(images):
    """With a white square in the lower right corner."""
    images = np.array(images).reshape(-1, 28, 28)
    images[:, 23:27, 23:27] = 1.0
    return images.reshape(len(images), -1)


def problem(kind, seed, small):
    count = 200 if small else 1000
    split, rng = data.mnist(), np.random.default_rng(seed)
    rows = rng.permutation(len(split.y_train))[:count]
    x, y = split.x_train[rows].copy(), split.y_train[rows].copy()
    test = rng.permutation(len(split.y_test))[: 500 if small else 2000]
    clean = {"x": split.x_test[test], "y": split.y_test[test]}
    wanted, touched, judged = {
        "trigger": (0, count // 20, len(test) // 2),
        "flipped": (1, count // 25, len(test) // 16),
    }[kind]
    about, told = (y != 0, clean["y"] != 0) if kind == "trigger" else (y == 7, clean["y"] == 7)
    poison = rng.choice(np.flatnonzero(about), touched, replace=False)
    fooled = jax.tree.map(lambda a: a[np.flatnonzero(told)[:judged]], clean)
    if kind == "trigger":
        x[poison], fooled["x"] = square(x[poison]), square(fooled["x"])
    y[poison] = wanted
    return Problem({"x": x, "y": y}, np.isin(np.arange(count), poison), fooled, wanted, clean)


# ---- training, and what is measured


def scores(params, x):
    (first, bias), (second, shift) = params
    return jnp.tanh(x @ first + bias) @ second + shift


def cross_entropy(logits, rows):
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows["y"])


def losses(params, rows):
    return cross_entropy(scores(params, rows["x"]), rows)


def measure(params, queries):
    return jnp.mean(losses(params, queries))


network = lambda params, rows: scores(params, rows["x"])
CURVED = bx.linear.gauss_newton(network, cross_entropy, bx.linear.cg(maxiter=50))
answers = jax.jit(lambda params, x: jnp.argmax(scores(params, x), -1))
each = jax.jit(losses)


@functools.cache  # the same object for the same training, which is then compiled once
def optimizer(steps):
    rates = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10 + 1, steps)
    return optax.adam(rates, eps_root=1e-6)


again = optax.adam(1e-3)


def start(seed):
    first, second = jax.random.split(jax.random.key(seed))
    return [
        (jax.random.normal(first, (784, 32)) / 28, jnp.zeros(32)),
        (jax.random.normal(second, (32, 10)) * 32**-0.5, jnp.zeros(10)),
    ]


def orders(count, steps, seed):
    """Epochs over the rows, cut into batches."""
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(count) for _ in range(steps * BATCH // count + 1)]
    return np.concatenate(epochs)[: steps * BATCH].reshape(steps, BATCH)


def of_weights(params, weights, queries):
    return measure(params, queries)


def in_rounds(train, influence, parts):
    """Leave out a part of those to be left out, ask again of the training without them, and so on:
    where many say the same, none of them matters while the others are there."""
    weights, score = np.ones(train.examples, np.float32), np.zeros(train.examples)
    for number in range(parts):
        blamed = np.where(weights == 0, -np.inf, influence(jnp.asarray(weights)))
        ranked = np.argsort(-blamed, kind="stable")
        worst = ranked[: train.examples // REMOVED // parts]
        weights[worst], score[worst] = 0.0, parts - number
    left = ranked[len(worst) : np.isfinite(blamed).sum()]
    score[left] = np.linspace(0.5, 0.0, len(left))  # the others as the last round has them
    return score


def blame(train, params, queries, steps, seed, parts=PARTS):
    """A score an example by each method: the higher, the more it is to blame."""
    ones, rows = jnp.ones(train.examples), train.data
    moments = np.linspace(max(1, steps // 5), steps, 5).astype(int)
    arguments = rows, queries
    found = {
        META: bx.attribution.metagradient(train, measure, queries),
        IMPLICIT: bx.attribution.implicit(
            losses, measure, params, *arguments, damping=DAMPING, linear=CURVED
        ),
        TRACIN: bx.attribution.tracin(
            losses, measure, train.retrain(ones, checkpoints=moments), *arguments
        ),
        SIMILARITY: bx.attribution.similarity(losses, measure, params, *arguments),
    }
    named = {name: np.asarray(influence.scores) for name, influence in found.items()}
    batches = bx.replay.reader(train.batch)
    fn = bx.replay.value_and_metagrad(train.objective, of_weights, train.optimizer, steps)
    through = lambda weights: np.asarray(fn(train.params, weights, batches, queries).grad)
    return named | {
        ROUNDS: in_rounds(train, through, parts),
        AGAIN: in_rounds(
            train, lambda weights: cosines(train.retrain(weights), rows, queries), parts
        ),
        LOSS: np.asarray(each(params, rows)),
        RANDOM: np.random.default_rng(seed).random(train.examples),
    }


def cosines(params, rows, queries):
    return np.asarray(bx.attribution.similarity(losses, measure, params, rows, queries).scores)


# ---- unlearning


@jax.jit
def newton(params, rows, left_out):
    """Where the parameters go, to first order about a minimum, when these examples go: one linear
    solve with the Gauss-Newton matrix (a network's Hessian has negative curvature)."""
    logits, along = jax.linearize(lambda params: scores(params, rows["x"]), params)
    back, chance = jax.linear_transpose(along, params), jax.nn.softmax(logits)

    def matvec(v):
        moved = chance * along(v)
        curved = (moved - chance * jnp.sum(moved, -1, keepdims=True)) / len(left_out)
        return jax.tree.map(lambda a, h: DAMPING * a + h, v, back(curved)[0])

    gone = lambda params: jnp.sum(left_out * losses(params, rows)) / len(left_out)
    right = jax.grad(gone)(params)
    change, _ = bx.linear.cg(maxiter=50)(matvec, right, jax.tree.map(jnp.zeros_like, right))
    return jax.tree.map(jnp.add, params, change)


def finetuned(params, rows, left_out, steps, seed):
    """A few more steps, on what is left."""
    rows = jax.tree.map(lambda a: a[~left_out], rows)
    order = orders(int((~left_out).sum()), steps, seed)
    train = bx.attribution.training(losses, again, params, rows, order)
    return train.retrain(jnp.ones(train.examples))


def one(kind, seed, steps, small):
    """All about one network: rows of who is to blame, rows of what is left out, and the change of
    the ten losses without the poison, as first order predicts it and as it is, and the time."""
    begin, p = time.perf_counter(), problem(kind, seed, small)
    count = len(p.poison)
    train = bx.attribution.training(
        losses, optimizer(steps), start(seed), p.rows, orders(count, steps, seed)
    )
    params = train.retrain(jnp.ones(count))
    wrong = np.flatnonzero(np.asarray(answers(params, p.fooled["x"])) == p.wanted)
    if len(wrong) == 0:  # nobody would notice anything
        wrong = np.arange(len(p.fooled["y"]))
    noticed = wrong[:QUERIES]
    queries = jax.tree.map(lambda a: a[noticed], p.fooled)
    others = np.setdiff1d(np.arange(len(p.fooled["y"])), noticed)
    blamed = blame(train, params, queries, steps, seed, 2 if small else PARTS)

    def judged(params):
        said = np.asarray(answers(params, p.fooled["x"]))[others]
        right = np.asarray(answers(params, p.test["x"])) == p.test["y"]
        return {"fooled": float(np.mean(said == p.wanted)), "clean": float(np.mean(right))}

    found, without = {}, {NOTHING: judged(params)}
    for name, score in blamed.items():
        gone = np.isin(np.arange(count), np.argsort(-score, kind="stable")[: count // REMOVED])
        found[name] = {
            "area": float(roc_auc_score(p.poison, score)),
            "found": float(np.mean(gone[p.poison])),
        }
        without[name] = judged(train.retrain(jnp.asarray(~gone, jnp.float32)))
    poison = jnp.asarray(p.poison, jnp.float32)
    retrained = train.retrain(1 - poison)
    without[TRUE] = judged(retrained)
    before, truth = np.asarray(each(params, queries)), np.asarray(each(retrained, queries))
    for name, other in (
        (NEWTON, newton(params, p.rows, poison)),
        (FINETUNED, finetuned(params, p.rows, p.poison, max(1, steps // 10), seed)),
    ):
        away = np.linalg.norm(np.asarray(each(other, queries)) - truth)
        without[name] = judged(other) | {"away": float(away / np.linalg.norm(truth - before))}
    said, gave = -float(blamed[META][p.poison].sum()), float(np.mean(truth - before))
    return found, without, (said, gave), time.perf_counter() - begin


# ---- the script


def draw(path, rows):
    with report.figure(path, len(rows), squeeze=False) as (_, (axes,)):
        for ax, (kind, (found, _)) in zip(axes, rows.items(), strict=True):
            report.bars(ax, found, "area", COLORS, "area under the curve")
            ax.set_title(kind)
    after = path.with_name(f"{path.stem}_left_out{path.suffix}")
    with report.figure(after, len(rows), height=5.4, squeeze=False) as (_, (axes,)):
        for ax, (kind, (_, without)) in zip(axes, rows.items(), strict=True):
            shown = {name: row for name, row in without.items() if name != RANDOM}
            report.bars(ax, shown, "fooled", COLORS, "part of digits that it fools")
            ax.set_title(f"{kind}, without")


def main(argv=None):
    full, small = dict(seeds=6, steps=300), dict(seeds=1, steps=30)
    args = report.parse(report.parser(__doc__, full=full, small=small, pieces=True), argv)
    fixed = dict(
        first_seed=FIRST_SEED, queries=QUERIES, damping=DAMPING, removed=REMOVED, parts=PARTS
    )
    work = dict(steps=args.steps, small=args.small)
    piece, results, changes, seconds = report.Pieces(args, fixed | work), {}, {}, 0.0
    for kind in ("trigger", "flipped")[: 1 if args.small else 2]:
        runs = [
            piece(f"{kind}, seed {seed}", functools.partial(one, kind, seed, **work))
            for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)
        ]
        seconds += sum(run[3] for run in runs)
        gather = lambda number: {
            name: {key: [run[number][name][key] for run in runs] for key in row}  # noqa: B023
            for name, row in runs[0][number].items()  # noqa: B023
        }
        results[kind] = gather(0), gather(1)
        changes[kind] = [run[2] for run in runs]
    columns = {"area": "area under the curve", "found": f"found, of one in {REMOVED} removed"}
    after = {"fooled": "fooled", "clean": "clean test digits", "away": "away from the truth"}
    for kind, (found, without) in results.items():
        print(f"{kind}\n\n{report.table(found, columns)}\n\n{report.table(without, after)}\n")
        said, gave = np.mean(changes[kind], 0)
        print(f"Mean change of the noticed losses: predicted {said:+.2f}, trained {gave:+.2f}\n")
    draw(args.out / "poisoning.svg", results)
    rows = {
        f"{kind}: {what}": part
        for kind, two in results.items()
        for what, part in zip(("who is to blame", "left out"), two, strict=True)
    }
    settings = vars(args) | fixed
    report.save(args.out / "poisoning.json", settings, rows, seconds, changes=changes)
    return rows


if __name__ == "__main__":
    report.run(main)
