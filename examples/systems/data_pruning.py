"""Which half of a training set can go? Learn a weight for each of 20,000 MNIST digits, and keep the
largest; no clean example is needed.

    python examples/systems/data_pruning.py

Of the 20,000 rows 30 % repeat others and 20 % have a wrong label; nobody says which. After Choe et
al., "Making scalable meta learning practical" (NeurIPS 2023, arXiv 2310.05674), section 4.3: data
pruning by weights that SAMA learns from the training data alone. Inner level: two models, each on
one half of the rows, on weighted examples, with AdamW. Outer level: the logit of each weight,
judged by each model on the half that it has not seen, with the labels as they are. There the loss
is 1 - p(label): with a fifth of the labels drawn at random its expectation is least for the same
model as without noise (Ghosh et al., AAAI 2017), while cross-entropy asks for a model that is as
unsure as the labels are wrong: under it the weights learn to keep them.

Then models of the same kind are trained from scratch, for the same number of steps, on the share of
rows with the largest weights, against random rows, EL2N and forgetting scores from either end, a
random part of the 80 % of lowest loss, and an oracle that knows what is wrong and what repeats.
Settings were chosen on other seeds, with training images in place of test images. Test data chooses
nothing.

What came out: the half with the largest weights is better than all rows (linear .913 for .898, five
seeds; MLP .953 for .951, three) and much better than a random half (.887 and .919). So is a random
half of the 80 % of lowest loss (.913, .951), for the price of one training run; at 30 % the learned
weights are ahead.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.metrics import roc_auc_score

import bilevax as bx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import report

CLASSES, PIXELS, HIDDEN = 10, 784, 128
REPEATED, WRONG = 0.3, 0.2
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
BATCH, RATE = 100, 3e-3  # of every training run, and of the inner level
WEIGHTS, RANDOM, LOW, ORACLE = (
    "learned weights",
    "random",
    "random part of lowest-loss 80 %",
    "oracle: right and not repeated first",
)
EL2N_HARD, EL2N_EASY, FORGOTTEN, REMEMBERED = (
    "EL2N, hardest",
    "EL2N, easiest",
    "most forgotten",
    "least forgotten",
)
ROWS = (WEIGHTS, RANDOM, EL2N_HARD, EL2N_EASY, FORGOTTEN, REMEMBERED, LOW, ORACLE)


class Sizes(NamedTuple):
    rows: int
    test: int
    train_steps: int  # of each model that is scored
    early_steps: int  # of each of the models that EL2N averages
    search_batch: int  # of the outer gradient, and of the weights that a step moves, on each half


FULL, SMALL = Sizes(20_000, 10_000, 2000, 200, 1000), Sizes(1000, 1000, 50, 20, 100)


# ---- the models


def linear(key):
    return [(jnp.zeros((PIXELS, CLASSES)), jnp.zeros(CLASSES))]


def mlp(key):
    first, second = jax.random.split(key)
    normal = jax.random.normal
    layers = (
        normal(first, (PIXELS, HIDDEN)) * (2 / PIXELS) ** 0.5,
        normal(second, (HIDDEN, CLASSES)) * (1 / HIDDEN) ** 0.5,
    )
    return [(w, jnp.zeros(w.shape[1])) for w in layers]


MODELS = {"linear": linear, "MLP": mlp}


def scores(params, x):
    *hidden, (w, b) = params
    for weight, bias in hidden:
        x = jax.nn.relu(x @ weight + bias)
    return x @ w + b


def losses(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(scores(params, x), y)


@jax.jit
def accuracy(params, x, y):
    return jnp.mean((jnp.argmax(scores(params, x), -1) == y).astype(jnp.float32))


@partial(jax.jit, static_argnums=5)
def train(params, x, y, kept, number, steps, key):
    """AdamW for a fixed number of steps on the first `number` of the rows `kept`; and the rows and
    hits of each batch, for forgetting scores."""
    opt = optax.adamw(optax.cosine_decay_schedule(RATE, steps))

    def step(carry, i):
        params, state = carry
        rows = kept[jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, number)]

        def loss(params):
            out = scores(params, x[rows])
            return jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(out, y[rows])
            ), jnp.argmax(out, -1) == y[rows]

        grads, hits = jax.grad(loss, has_aux=True)(params)
        updates, state = opt.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (rows, hits)

    (params, _), seen = lax.scan(step, (params, opt.init(params)), jnp.arange(steps))
    return params, seen


# ---- the search: two halves side by side, axis 0 of the parameters and axis 1 of the data


def weighted(params, logits, batch):
    weights = jax.nn.sigmoid(logits[batch["place"]])
    return jnp.sum(weights * losses(params, batch["x"], batch["y"])) / jnp.sum(weights)


def unlikely(params, batch):
    return 1 - jnp.mean(
        jnp.take_along_axis(jax.nn.softmax(scores(params, batch["x"])), batch["y"][:, None], 1)
    )


def inner(params, logits, batch):
    return jnp.sum(jax.vmap(weighted, in_axes=(0, 1, 1))(params, logits, batch))


def outer(params, logits, batch):
    """Each model on the other half."""
    return jnp.sum(
        jax.vmap(unlikely, in_axes=(0, 1))(params, jax.tree.map(lambda a: a[:, ::-1], batch))
    )


def sgd_of_unit_entries(learning_rate, size):
    """A logit moves when its example is drawn and not in between, by how far it stands out in its
    batch."""
    return optax.chain(
        optax.normalize_by_update_norm(scale_factor=size**0.5), optax.sgd(learning_rate)
    )


def algorithm(sizes):
    return bx.algorithms.double_loop(
        bx.inner.optax(optax.adamw(RATE), 3),
        bx.hypergradient.sama(),
        sgd_of_unit_entries(0.3, 2.0 * sizes.search_batch),
    )


def search(d, model, method, steps, sizes, seed, checkpoint):
    """The logits of all weights, and the run."""
    half = len(d["y"]) // 2

    def halves(a):
        return jnp.swapaxes(jnp.reshape(a, (2, half, *a.shape[1:])), 0, 1)

    train = {
        "x": halves(d["x"]),
        "y": halves(d["y"]),
        "place": jnp.stack([jnp.arange(half)] * 2, 1),
    }
    start = jax.vmap(MODELS[model])(jax.random.split(jax.random.key(seed), 2))
    solution = bx.solve_bilevel(
        inner,
        outer,
        start,
        jnp.zeros((half, 2)),
        inner_data=bx.data.minibatches(train, BATCH),
        hyper_data=bx.data.minibatches(train, sizes.search_batch),
        outer_data=bx.data.minibatches(
            {name: train[name] for name in ("x", "y")}, sizes.search_batch
        ),
        algorithm=method,
        num_steps=steps,
        key=jax.random.key(seed),
        keep="last",
        checkpoint=checkpoint,
    )
    report.unless_preempted(solution)
    return np.asarray(solution.outer_params).T.reshape(-1), solution


# ---- what it is compared with: each an order of the rows, what is kept longest first


def el2n(d, model, sizes, seed, models=5):
    """Paul et al. (NeurIPS 2021): the length of p - onehot(y) early in training, averaged over
    models."""
    total, everything = 0.0, jnp.arange(len(d["y"]))
    for k in range(models):
        key = jax.random.fold_in(jax.random.key(seed), k)
        params, _ = train(
            MODELS[model](key), d["x"], d["y"], everything, len(everything), sizes.early_steps, key
        )
        total += jnp.linalg.norm(
            jax.nn.softmax(scores(params, d["x"])) - jax.nn.one_hot(d["y"], CLASSES), axis=-1
        )
    return np.asarray(total) / models


def forgetting(seen, size):
    """Toneva et al. (ICLR 2019): how often a row was right when seen and wrong the next time; a row
    never right counts as most forgotten."""
    count, before, ever = np.zeros(size), np.zeros(size, bool), np.zeros(size, bool)
    for rows, hits in zip(*map(np.asarray, seen), strict=True):
        count[rows[before[rows] & ~hits]] += 1
        before[rows], ever[rows] = hits, ever[rows] | hits
    return np.where(ever, count, np.inf)


def orders(d, model, weights, sizes, seed):
    """Row -> the order in which training rows are kept; and one training run on everything."""
    rng = np.random.default_rng(1000 + seed)
    size = len(d["y"])
    tie = rng.permutation(size)  # equal scores are broken at random
    by = lambda score: np.lexsort((tie, score))
    key = jax.random.key(50 + seed)
    full, seen = train(
        MODELS[model](key), d["x"], d["y"], jnp.arange(size), size, sizes.train_steps, key
    )
    easy = np.argsort(np.asarray(losses(full, d["x"], d["y"])))
    low = easy[: size * 4 // 5]
    length, forgotten = el2n(d, model, sizes, seed), forgetting(seen, size)
    out = {
        WEIGHTS: by(-weights),
        RANDOM: rng.permutation(size),
        EL2N_HARD: by(-length),
        EL2N_EASY: by(length),
        FORGOTTEN: by(-forgotten),
        REMEMBERED: by(forgotten),
        LOW: np.concatenate([rng.permutation(low), easy[len(low) :]]),
        ORACLE: by(2 * d["wrong"] + again(d)),
    }
    return out, float(accuracy(full, *d["test"]))


def again(d):
    """Rows whose image has come before; among the rows with right labels a right one is first."""
    place = np.lexsort((np.arange(len(d["image"])), d["wrong"]))
    _, first = np.unique(d["image"][place], return_index=True)
    out = np.ones(len(place), int)
    out[place[first]] = 0
    return out


# ---- data and runs


def problem(mnist, seed, sizes):
    rng = np.random.default_rng(100 + seed)
    image = rng.permutation(len(mnist.y_train))[: round((1 - REPEATED) * sizes.rows)]
    image = rng.permutation(
        np.concatenate([image, rng.choice(image, sizes.rows - len(image), replace=False)])
    )
    wrong = rng.permutation(sizes.rows) < round(WRONG * sizes.rows)
    y = mnist.y_train[image]
    y = np.where(wrong, (y + rng.integers(1, CLASSES, sizes.rows)) % CLASSES, y).astype(np.int32)
    test = jnp.asarray(mnist.x_test[: sizes.test]), jnp.asarray(mnist.y_test[: sizes.test])
    return {
        "x": jnp.asarray(mnist.x_train[image]),
        "y": jnp.asarray(y),
        "image": image,
        "wrong": wrong,
        "test": test,
    }


def one(d, model, method, steps, sizes, seed, checkpoint):
    """All rows of one model at one seed."""
    search(d, model, method, 1, sizes, seed, None)  # compile, so that the clocks below measure work
    begin = time.process_time()
    weights, solution = search(d, model, method, steps, sizes, seed, checkpoint)
    searching = time.process_time() - begin
    kept, full = orders(d, model, weights, sizes, seed)
    key = jax.random.key(70 + seed)
    args = MODELS[model](key), d["x"], d["y"]
    begin = time.process_time()
    jax.block_until_ready(
        train(*args, jnp.arange(len(d["y"])), len(d["y"]), sizes.train_steps, key)
    )
    training = time.process_time() - begin
    rows = {}
    for name, order in kept.items():
        rows[name] = {}
        for share in SHARES:
            params, _ = train(
                *args, jnp.asarray(order), round(share * len(order)), sizes.train_steps, key
            )
            rows[name][f"{share:.0%}"] = float(accuracy(params, *d["test"]))
    wrong = {
        name: [float(np.mean(d["wrong"][order[: round(share * len(order))]])) for share in SHARES]
        for name, order in kept.items()
    }
    cost = {
        "search": searching,
        "training": training,
        "resumed": solution.stats["resumed_from"] > 0,
    }
    found = {
        "auc": float(roc_auc_score(d["wrong"], -weights)),
        "logits": weights.round(3),
        "wrong": d["wrong"].astype(int),
    }
    return {"rows": rows, "full": full, "wrong kept": wrong, "cost": cost, **found}


def draw(path, results, full, first):
    style = {
        WEIGHTS: (report.BLUE, "o-"),
        RANDOM: (report.BROWN, "s-"),
        EL2N_HARD: (report.RED, "v:"),
        EL2N_EASY: (report.RED, "^-"),
        FORGOTTEN: (report.PURPLE, "v:"),
        REMEMBERED: (report.PURPLE, "^-"),
        LOW: (report.ORANGE, "D-"),
        ORACLE: (report.GREY, "--"),
    }
    percent = [100 * share for share in SHARES]
    with report.figure(path, 3, width=5.6, height=5.2) as (fig, axes):
        for ax, model in zip(axes, results, strict=False):
            for name, (color, line) in style.items():
                mean = np.array([np.mean(results[model][name][f"{share:.0%}"]) for share in SHARES])
                ax.plot(
                    percent,
                    mean,
                    line,
                    color=color,
                    linewidth=2.5 if name == WEIGHTS else 1.4,
                    markersize=5,
                    label=name,
                )
            ax.axhline(np.mean(full[model]), color=report.GREEN, linestyle="-.", label="all rows")
            shown = [
                np.mean(results[model][name][f"{share:.0%}"])
                for name in (WEIGHTS, RANDOM, LOW, ORACLE)
                for share in SHARES
            ]
            ax.set_ylim(min(shown) - 0.015, max(shown) + 0.006)
            ax.invert_xaxis()
            ax.set(
                xlabel="rows kept (%)",
                ylabel="test accuracy",
                title=f"{model}, mean over seeds (lines may leave the frame)",
            )
            ax.grid()
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, ncols=5, loc="outside lower center", fontsize=10)
        logits, wrong = np.asarray(first["logits"]), np.asarray(first["wrong"]) > 0
        bins = np.linspace(*np.quantile(logits, [0.002, 0.998]), 41)
        kinds = {"right label": logits[~wrong], "wrong label": logits[wrong]}
        report.two_kinds(axes[2], kinds, bins)
        axes[2].set(
            xlabel="logit of the learned weight",
            ylabel="training rows",
            title="Weights, linear, first seed",
        )


def main(argv=None):
    parser = report.parser(
        __doc__,
        full=dict(seeds=5, steps=500, mlp_seeds=3),
        small=dict(seeds=1, steps=5, mlp_seeds=1),
        pieces=True,
    )
    parser.add_argument(
        "--mlp-seeds",
        type=int,
        help="random seeds of the MLP, 0 to leave it out (default 3, with --small 1)",
    )
    args = report.parse(parser, argv)
    sizes = SMALL if args.small else FULL
    mnist = data.mnist()
    begin = time.perf_counter()
    method = algorithm(sizes)
    settings = {
        "steps": args.steps,
        **sizes._asdict(),
        "batch": BATCH,
        "rate": RATE,
        "repeated": REPEATED,
        "wrong": WRONG,
    }
    pieces = report.Pieces(args, settings)
    results, full, auc, cost, first = {}, {}, {}, {}, None
    for model, seeds in zip(MODELS, (args.seeds, args.mlp_seeds), strict=True):
        found = []
        for seed in range(seeds):
            name = f"{model}, seed {seed}"

            def make(model=model, seed=seed):
                return one(
                    problem(mnist, seed, sizes),
                    model,
                    method,
                    args.steps,
                    sizes,
                    seed,
                    pieces.checkpoint("search", 100),
                )

            found.append(pieces(name, make))
        if not found:
            continue
        first = first or found[0]
        columns = [f"{share:.0%}" for share in SHARES]
        results[model] = {
            row: {column: [f["rows"][row][column] for f in found] for column in columns}
            for row in ROWS
        }
        full[model], auc[model], cost[model] = (
            [f["full"] for f in found],
            [f["auc"] for f in found],
            [f["cost"] for f in found],
        )
        kept = np.mean([f["wrong kept"][WEIGHTS] for f in found], 0)
        print(
            f"\n{model}: test accuracy keeping a share of the rows, mean ± standard error over "
            f"{len(found)} seed(s)"
        )
        print(f"all rows: {report.mean_se(full[model])}\n")
        print(report.table(results[model], {column: column for column in columns}))
        print(f"\nAt 50 %: {WEIGHTS} is above the others by\n" + gains(results[model]))
        print(
            f"AUC of the weights for wrong labels {report.mean_se(auc[model])}; wrong among the "
            f"kept half {kept[SHARES.index(0.5)]:.3f}."
        )
        clean = [c for c in cost[model] if not c["resumed"]]
        ratio = [c["search"] / c["training"] for c in clean]
        if ratio:
            times = [np.mean([c[key] for c in clean]) for key in ("search", "training")]
            print(
                f"The search took {times[0]:.1f} s of processor time, one training run "
                f"{times[1]:.1f} s: {np.mean(ratio):.1f} times as much."
            )
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "data_pruning.svg", results, full, first)
    report.save(
        args.out / "data_pruning.json",
        {**vars(args), **settings, "method": repr(method)},
        results,
        seconds,
        full=full,
        auc=auc,
        cost=cost,
    )
    return results


def gains(rows):
    best = np.asarray(rows[WEIGHTS]["50%"])
    return "\n".join(
        f"  {report.mean_se(best - np.asarray(rows[name]['50%']), signed=True)}  {name}"
        for name in ROWS
        if name != WEIGHTS
    )


if __name__ == "__main__":
    report.run(main)
