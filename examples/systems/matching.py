"""A contrastive loss whose pairs are found by a combinatorial solver: an assignment of the views of
images to each other, and the encoder under it.

    python examples/systems/matching.py

After Nguyen et al., "LVM-Med: learning large-scale self-supervised vision models for medical
imaging via second-order graph matching" (NeurIPS 2023, arXiv 2306.11925). Chest X-rays without
labels, two augmented crops of each. Lower level: the assignment of the ones to the others that
makes the sum of their similarities largest, by SciPy. Upper level: the encoder; how many crops were
assigned to another image's. The solver has no derivative: that of its interpolation is taken.

Rows: the encoder as it was drawn; a contrastive loss with a softmax over the batch in place of the
assignment; both together; logistic regression on pixels; a network trained on the labels alone.
Encoders are judged by logistic regression on what they make of an image, its penalty chosen on
validation, from 10, 100 or all labels.

What came out (3 seeds, area in test from 100 labels): matched .903, as the encoder was drawn .905,
softmax .934, both .937; trained on the labels alone .942.
"""

from __future__ import annotations

import itertools
import sys
import time
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import report

import bilevax as bx

SIDE, CROP, BATCH, WIDTHS, CODE = 28, 20, 64, (16, 32, 64), 32
RATE, TEMPERATURE = 1e-3, 0.2
LABELS = {"10 labels": 10, "100 labels": 100, "all labels": None}
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
PIXELS, DRAWN, SUPERVISED = "pixels", "encoder as drawn", "trained on the labels"
SOFTMAX, MATCHED, BOTH = "contrastive, softmax", "matched", "softmax and matched"
# what the softmax's loss and the number of wrong pairs count
LOSSES = {SOFTMAX: (1.0, 0.0), MATCHED: (0.0, 1.0), BOTH: (1.0, 1.0)}
MARGIN, INTERPOLATION = 0.3, 0.3  # in cosines; chosen on validation, on a seed of its own


# ---- images and their views


def images(seed, small):
    """X-rays in [-1, 1], (n, SIDE, SIDE, 1), with labels, by part."""
    if small:  # digits, enlarged, of which the large ones are ill
        x, y = data.digits()
        x = np.kron(x.reshape(-1, 8, 8) * 255, np.ones((1, 4, 4)))[:, 2:-2, 2:-2]
        y = y // 5
        d = data.Xrays(x[:600], y[:600], x[600:1200], y[600:1200], x[1200:], y[1200:])
    else:
        d = data.pneumonia()
    scale = lambda x: jnp.asarray(x[..., None] / np.float32(127.5) - 1)
    parts = {
        "train": (d.x_train, d.y_train),
        "validation": (d.x_val, d.y_val),
        "test": (d.x_test, d.y_test),
    }
    rng = np.random.default_rng(seed)
    found = {}
    for name, (x, y) in parts.items():
        order = rng.permutation(len(x))[: 40 if small else None]
        found[name] = {"x": scale(x[order]), "y": y[order]}
    return found


def view(image, key):
    """A crop of an image, mirrored or not, its contrast and brightness changed, with noise."""
    place, mirror, tone, noise = jax.random.split(key, 4)
    row, column = jax.random.randint(place, (2,), 0, SIDE - CROP + 1)
    crop = lax.dynamic_slice(image, (row, column, jnp.zeros_like(row)), (CROP, CROP, 1))
    crop = jnp.where(jax.random.bernoulli(mirror), crop[:, ::-1], crop)
    contrast, brightness = jax.random.uniform(tone, (2,), minval=-0.4, maxval=0.4)
    return crop * (1 + contrast) + brightness + 0.1 * jax.random.normal(noise, crop.shape)


@jax.jit
def two_views(x, key):
    """Some images, each by two views."""
    rows, first, second = jax.random.split(key, 3)
    chosen = x[jax.random.choice(rows, len(x), (min(BATCH, len(x)),), replace=False)]
    each = lambda key: jax.vmap(view)(chosen, jax.random.split(key, len(chosen)))
    return each(first), each(second)


class Loader:
    """Batches of views, the same ones each time that it is gone through."""

    def __init__(self, x, key):
        self.x, self.key = x, key

    def __iter__(self):
        return (two_views(self.x, jax.random.fold_in(self.key, i)) for i in itertools.count())


# ---- networks


def network(key):
    """Three convolutions, two layers that only the losses of pairs see, and a head for labels."""
    keys = jax.random.split(key, 6)
    normal = lambda key, *shape: (
        jax.random.normal(key, shape) * np.sqrt(2 / np.prod(shape[:-1])).astype(np.float32)
    )
    widths = (1, *WIDTHS)
    convolutions = [
        {"w": normal(k, 3, 3, a, b), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=False)
    ]
    last = WIDTHS[-1]
    return {
        "convolutions": convolutions,
        "projection": (normal(keys[3], last, last), normal(keys[4], last, CODE)),
        "head": normal(keys[5], last, 1) / 4,
    }


def convolved(x, w, stride):
    """A convolution of 3 x 3 as one product, which a CPU likes better."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = x.shape[1], x.shape[2]
    moved = [
        padded[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(moved, -1) @ w.reshape(-1, w.shape[-1])


def features(params, x):
    """What an image, or a crop of any size, becomes: (n, WIDTHS[-1])."""
    for layer, stride in zip(params["convolutions"], (2, 2, 1), strict=True):
        x = jax.nn.relu(convolved(x, layer["w"], stride) + layer["b"])
    return jnp.mean(x, (1, 2))


def similarities(params, batch):
    """Cosines of each first view with each second one."""

    def code(x):
        first, second = params["projection"]
        found = jax.nn.relu(features(params, x) @ first) @ second
        return found / (jnp.linalg.norm(found, axis=1, keepdims=True) + 1e-6)

    return code(batch[0]) @ code(batch[1]).T


# ---- the assignment, and the encoder above it


def assigned(costs):
    """The permutation of least cost, as a matrix of zeros and ones."""
    found = np.zeros_like(costs)
    found[linear_sum_assignment(costs)] = 1
    return found


@cache
def levels(softmax, wrong, margin):
    """Cost of an assignment, with a margin by which the right one is to win; the encoder's loss:
    the softmax's, and how many were assigned wrongly."""

    def cost(assignment, params, batch):
        found = similarities(params, batch)
        return jnp.sum(assignment * (margin * jnp.eye(len(found)) - found))

    def loss(assignment, params, batch):
        total = wrong * jnp.sum(assignment * (1 - jnp.eye(len(assignment))))
        if softmax:
            logits = similarities(params, batch) / TEMPERATURE
            own = jnp.arange(len(logits))
            both = jnp.stack([logits, logits.T])
            total += (
                softmax
                * jnp.sum(
                    optax.softmax_cross_entropy_with_integer_labels(both, jnp.stack([own, own]))
                )
                / 2
            )
        return total / len(assignment)

    return cost, loss


@cache
def algorithm(matched, interpolation, steps):
    """Adam above the assignment, through its interpolation or, where the loss does not count it,
    past it."""
    # the loss is a mean: a pair's cost moves by one in so many
    through = bx.hypergradient.black_box(assigned, interpolation * BATCH, host=True)
    return bx.algorithms.double_loop(
        bx.inner.black_box(assigned, host=True),
        through if matched else bx.hypergradient.direct(),
        optax.adam(optax.cosine_decay_schedule(RATE, steps)),
    )


def wrong_pairs(assignment, params, batch):
    """The share of views to which another image's view is the nearest."""
    nearest = jnp.argmax(similarities(params, batch), 1)
    return {"wrong": jnp.mean(nearest != jnp.arange(len(nearest)))}


def pretrained(params, x, losses, margin, interpolation, steps, key):
    """The encoder by pairs alone, and the share of views, always the same ones, that are nearest to
    another image's, after each twentieth of the steps."""
    cost, loss = levels(*losses, margin)
    views, rows = bx.data.episodes(Loader(x, key)), min(BATCH, len(x))
    each = max(1, steps // 20)
    solution = bx.solve_bilevel(
        cost,
        loss,
        jnp.zeros((rows, rows)),
        params,
        inner_data=views,
        outer_data=views,
        algorithm=algorithm(losses[1] > 0, interpolation, steps),
        num_steps=steps,
        keep="last",
        metrics=bx.metrics(wrong_pairs, two_views(x, jax.random.fold_in(key, steps)), every=each),
    )
    return solution.outer_params, solution.history["wrong"][::each]


# ---- judging


def area(score, y):
    """Under the curve of true against false positives."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, np.asarray(score)))


def labelled(y, count, seed):
    """Rows of which the label is known: as many of either kind; None for all rows."""
    if count is None:
        return np.arange(len(y))
    rng = np.random.default_rng(seed + 500)
    return np.concatenate([rng.permutation(np.flatnonzero(y == k))[: count // 2] for k in (0, 1)])


def probed(codes, parts, rows):
    """Logistic regression on what the images became, its penalty by validation: area in test and
    validation."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = codes["train"].mean(0), codes["train"].std(0) + 1e-6
    x = {name: (np.asarray(code) - mean) / spread for name, code in codes.items()}
    y, best = parts["train"]["y"][rows], None
    for penalty in PENALTIES:
        fit = LogisticRegression(C=penalty, class_weight="balanced", max_iter=1000)
        fit.fit(x["train"][rows], y)
        score = lambda name, fit=fit: area(fit.decision_function(x[name]), parts[name]["y"])
        found = {"validation": score("validation"), "test": score("test")}
        if best is None or found["validation"] > best["validation"]:
            best = found
    return best


@partial(jax.jit, static_argnames="steps")
def supervised(params, x, y, key, steps):
    """Training on views of labelled images, as many of either kind in a batch: the network after
    each tenth of the steps."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, 10 * steps))
    chance = jnp.where(y == 1, 1 / jnp.sum(y == 1), 1 / jnp.sum(y == 0)) / 2

    def loss(params, x, y):
        logits = (features(params, x) @ params["head"])[:, 0]
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, y))

    def step(carry, key):
        params, state = carry
        rows, views = jax.random.split(key)
        rows = jax.random.choice(rows, len(x), (BATCH,), p=chance)
        seen = jax.vmap(view)(x[rows], jax.random.split(views, BATCH))
        updates, state = optimizer.update(jax.grad(loss)(params, seen, y[rows]), state, params)
        return (optax.apply_updates(params, updates), state), None

    def tenth(carry, key):
        carry = lax.scan(step, carry, jax.random.split(key, steps))[0]
        return carry, carry[0]

    return lax.scan(tenth, (params, optimizer.init(params)), jax.random.split(key, 10))[1]


def one_seed(seed, steps, small):
    """Area in test by row and labels, and wrong pairs by step."""
    parts = images(seed, small)
    keys = jax.random.split(jax.random.key(seed), 3)
    first, x = network(keys[0]), parts["train"]["x"]
    encoder = {name: first[name] for name in ("convolutions", "projection")}
    code = jax.jit(lambda params, x: features(params, x))
    codes_of = lambda params: {name: np.asarray(code(params, p["x"])) for name, p in parts.items()}
    encoders, wrong = {DRAWN: encoder}, {}
    for name, losses in LOSSES.items():
        encoders[name], curve = pretrained(
            encoder, x, losses, MARGIN, INTERPOLATION, steps, keys[1]
        )
        wrong[name] = np.asarray(curve)
    codes = {name: codes_of(params) for name, params in encoders.items()}
    codes[PIXELS] = {n: np.asarray(p["x"]).reshape(len(p["x"]), -1) for n, p in parts.items()}
    judge = jax.jit(jax.vmap(lambda p, x: (features(p, x) @ p["head"])[:, 0], (0, None)))
    out = {}
    for label, count in LABELS.items():
        rows = labelled(parts["train"]["y"], count, seed)
        for name in (PIXELS, *encoders):
            out.setdefault(name, {})[label] = probed(codes[name], parts, rows)
        y = jnp.asarray(parts["train"]["y"][rows], jnp.float32)
        nets = supervised(first, x[rows], y, keys[2], max(1, steps // 10))
        scores = {n: np.asarray(judge(nets, parts[n]["x"])) for n in ("validation", "test")}
        tried = [area(score, parts["validation"]["y"]) for score in scores["validation"]]
        best = int(np.argmax(tried))
        out.setdefault(SUPERVISED, {})[label] = {
            "validation": tried[best], "test": area(scores["test"][best], parts["test"]["y"]),
        }  # fmt: skip
    return {"areas": out, "wrong": wrong}


def draw(path, found, rows):
    colors = {SOFTMAX: report.ORANGE, MATCHED: report.BLUE, BOTH: report.PURPLE}
    colors[SUPERVISED] = report.GREEN
    with report.figure(path, 3, width=5.0) as (_, (left, middle, right)):
        for ax, label in ((left, "10 labels"), (middle, "100 labels")):
            report.bars(ax, rows, label, colors, f"area under the curve in test, {label}")
        for name in LOSSES:
            curve = np.mean([one["wrong"][name] for one in found], 0)
            share = np.arange(len(curve)) / len(curve)
            right.plot(100 * share, 100 * curve, color=colors[name], label=name)
        right.set(xlabel="training, %", ylabel="views nearest to another image's, %", ylim=0)
        right.legend()


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=3, steps=1000), small=dict(seeds=1, steps=2), pieces=True
    )
    args = report.parse(parser, argv)
    settings = {
        "steps": args.steps, "small": args.small, "batch": BATCH, "widths": WIDTHS, "code": CODE,
        "rate": RATE, "temperature": TEMPERATURE, "margin": MARGIN,
        "interpolation": INTERPOLATION, "penalties": PENALTIES, "crop": CROP,
    }  # fmt: skip
    begin = time.perf_counter()
    pieces = report.Pieces(args, settings)
    found = [
        pieces(f"seed {seed}", partial(one_seed, seed, args.steps, args.small))
        for seed in range(args.seeds)
    ]
    rows = {
        name: {label: [one["areas"][name][label]["test"] for one in found] for label in LABELS}
        for name in found[0]["areas"]
    }
    print("\n" + report.table(rows, {label: label for label in LABELS}))
    for label in LABELS:
        print("\n" + report.table(rows, {label: label}, better=(MATCHED, label)))
    last = {name: np.mean([one["wrong"][name][-1] for one in found]) for name in LOSSES}
    print(f"\nwrong pairs at the end: { {name: round(float(v), 3) for name, v in last.items()} }")
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "matching.svg", found, rows)
    path = args.out / "matching.json"
    report.save(path, {**vars(args), **settings}, rows, seconds, seeds=found)


if __name__ == "__main__":
    report.run(main)
