"""When and why does a supernet collapse to skip connections, and what helps? Architecture search on
NAS-Bench-201's cells, where a table knows how good each of the 15,625 is.

    python examples/systems/darts.py

Lower level: the weights of a supernet, in which every edge of the cell is a mixture of five
operations (nothing, skip, 1x1 and 3x3 convolution, average pooling), on one half of the training
images. Upper level: the logits of the mixtures, on the other half (Liu, Simonyan and Yang, "DARTS",
ICLR 2019, arXiv 1806.09055). The order of the hypergradient is one argument. Then rows that are
meant to help: stopping before a third edge becomes a skip (Liang et al., DARTS+, arXiv
1909.06035), operations chosen by how much the supernet loses without them (Wang et al., ICLR 2021,
arXiv 2108.04392), and supernets split in two, twice, where the gradients of operations disagree
most (Hu et al., ICLR 2022, arXiv 2203.15207). Beside them random search with as many gradients as
the latter, and the cell that has 3x3 convolutions everywhere.

10,000 images of CIFAR-10 at 16 x 16; one cell in each of three stages of 4, 8 and 16 channels,
each of which begins by halving height and width; normalisation by the batch's statistics. The score
of a row is the percentile of its cell in the table of CIFAR-10 test accuracies (Dong and Yang,
"NAS-Bench-201", ICLR 2020), which decides nothing else. Needs nasbench201.npz in the folder that
BILEVAX_DATA names; a small run makes up images and a table.

What came out (6 seeds): percentile 60 by plain DARTS, 42 when it goes on for twice as long, 94 when
it is stopped early, 84 for split supernets, 65 for random search.
"""

from __future__ import annotations

import itertools
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import bilevax as bx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import report

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # from, to; the table's order
CHANNELS, CLASSES, SIZE, BATCH = (4, 8, 16), 10, 16, 64
SKIP, CONVOLUTION = 1, 3  # places among the operations
PROXY, TUNE, MATCHED = 3, 1, 4  # epochs of a proxy, of a selection's step; batches of a similarity
FIRST, DIFFERENCE, UNROLLED = "first order", "second order, difference", "second order, unrolled"
LONG = "first order, twice as long"
EARLY, PERTURBED = "first order, stopped early", "first order, by perturbation"
SPLIT = "split by gradients, first order"
RANDOM, EVOLVED = "random search", "regularised evolution"
ALIKE = "3x3 convolutions everywhere"
ROWS = (FIRST, LONG, DIFFERENCE, UNROLLED, EARLY, PERTURBED, SPLIT, RANDOM, EVOLVED, ALIKE)
POPULATION, TOURNAMENT = 5, 3
COST = {FIRST: 2, DIFFERENCE: 4, UNROLLED: 4}  # gradients of a step


# ---- the supernet: arrays are (channels, height, width, images), so that shifts move long rows


def start(key, channels=CHANNELS):
    keys = iter(jax.random.split(key, 64))
    normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[-2] ** -0.5
    stages, before = [], 3
    for c in channels:
        wide, narrow = normal(3, 9 * c, 3 * c), normal(3, c, 3 * c)
        stages.append({"into": normal(4 * before, c), "3x3": wide, "1x1": narrow})
        before = c
    return {"stages": stages, "head": {"w": normal(c, CLASSES), "b": jnp.zeros(CLASSES)}}


def neighbours(x):
    """The nine neighbours of each place, zero beyond the border, as channels."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    return jnp.concatenate([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)])


def normalized(x):
    x = x - jnp.mean(x, (1, 2, 3), keepdims=True)
    return x * lax.rsqrt(jnp.mean(x**2, (1, 2, 3), keepdims=True) + 1e-5)


def product(weights, x):
    return jnp.tensordot(weights, x, (0, 0))


def averaged(x):
    """The mean over each place's neighbours, first by columns and then by rows."""

    def near(n):
        band = sum(np.eye(n, k=k, dtype=np.float32) for k in (-1, 0, 1))
        return band / band.sum(0)

    return jnp.einsum("chwn,hg,wv->cgvn", x, near(x.shape[1]), near(x.shape[2]))


def cell(weights, mix, x):
    """Four nodes. All convolutions that leave one are a single product, as if edges led to each of
    the last three nodes, those that there are not with shares of zero; one source after the other
    in a loop, which is compiled once."""
    places = np.array(EDGES)
    shares = jnp.zeros((3, 3, len(OPERATIONS))).at[places[:, 0], places[:, 1] - 1].set(mix)

    def leave(nodes, edges):
        source, share, wide, narrow = edges
        x = nodes[source]
        active = jax.nn.relu(x)
        wide = normalized(product(wide, neighbours(active))).reshape(3, -1)
        narrow = normalized(product(narrow, active)).reshape(3, -1)
        _, skip, one, three, pool = share.T
        out = jnp.stack([skip, pool], 1) @ jnp.stack([x.ravel(), averaged(x).ravel()])
        for strength, made in ((one, narrow), (three, wide)):
            out += jnp.einsum("t,tp->tp", strength, made)  # whose derivatives are products as well
        return nodes.at[1:].add(out.reshape(3, *x.shape)), None

    nodes = jnp.concatenate([x[None], jnp.zeros((3, *x.shape))])
    edges = jnp.arange(3), shares, weights["3x3"], weights["1x1"]
    return lax.scan(leave, nodes, edges)[0][3]


def halved(weights, x):
    """A 2x2 convolution with a stride of two."""
    c, h, w, n = x.shape
    parts = jnp.moveaxis(x.reshape(c, h // 2, 2, w // 2, 2, n), (2, 4), (1, 2))
    return normalized(product(weights, parts.reshape(4 * c, h // 2, w // 2, n)))


def scores(weights, mix, x):
    x = jnp.transpose(x, (3, 1, 2, 0))
    for number, stage in enumerate(weights["stages"]):
        x = cell(stage, mix, halved(stage["into"], jax.nn.relu(x) if number else x))
    x = jnp.mean(jax.nn.relu(normalized(x)), (1, 2))
    return x.T @ weights["head"]["w"] + weights["head"]["b"]


def mixture(cells):
    """Softmax over the operations that are allowed on each edge."""
    return jax.nn.softmax(jnp.where(cells["allowed"], cells["logits"], -1e9))


def mixed_loss(weights, mix, batch):
    out = scores(weights, mix, batch["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]))


def loss(weights, cells, batch):
    """Both levels."""
    return mixed_loss(weights, mixture(cells), batch)


# ---- the search


METHODS = {
    FIRST: bx.hypergradient.direct(),
    DIFFERENCE: bx.hypergradient.finite_difference(scale=0.05),  # the mean rate of the weights
    UNROLLED: bx.hypergradient.unrolled(),
}
LOGITS = bx.tunable(optax.adam, learning_rate=1.2e-2, b1=0.5)


def falling(steps):
    """SGD with momentum, its rate falling by half a cosine over so many steps."""
    part = lambda i: jnp.minimum(i / steps, 1.0)
    rate = lambda i: 0.004 + 0.096 * 0.5 * (1 + jnp.cos(jnp.pi * part(i)))
    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.add_decayed_weights(5e-4),
        optax.sgd(rate, momentum=0.9),
    )


def search(d, order, epochs, weights, allowed, key):
    """Weights, and the mixture after each epoch. The optimizers are those of the paper, their rates
    larger, for shorter runs."""
    cells = {"logits": 1e-3 * jax.random.normal(key, allowed.shape), "allowed": allowed}
    solver = bx.inner.optax(bx.tunable(falling, steps=float(epochs * d["epoch"])), 1)
    mixtures = []

    def note(event):
        now = {**cells, "logits": event.state.algorithm.outer["logits"]}
        mixtures.append(np.asarray(mixture(now)))

    solution = bx.solve_bilevel(
        loss, loss, weights, cells,
        inner_data=bx.data.minibatches(d["train"], BATCH),
        outer_data=bx.data.minibatches(d["other"], BATCH),
        algorithm=bx.algorithms.double_loop(solver, METHODS[order], LOGITS),
        callbacks=[bx.callbacks.Callback(note, every=d["epoch"])],
        num_steps=epochs * d["epoch"], key=key, keep="last",
    )  # fmt: skip
    report.unless_preempted(solution)
    return solution.inner_params, mixtures


@jax.jit
def train(weights, mix, rows, epochs, key):
    """The weights of a fixed mixture, or of one cell, for some epochs."""
    steps = epochs * (len(rows["y"]) // BATCH)
    opt = falling(steps)

    def step(i, carry):
        weights, state = carry
        at = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(rows["y"]))
        grads = jax.grad(mixed_loss)(weights, mix, jax.tree.map(lambda a: a[at], rows))
        updates, state = opt.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    return lax.fori_loop(0, steps, step, (weights, opt.init(weights)))[0]


@jax.jit
def accuracy(weights, mix, rows):
    """On the first 2,048 rows, in batches as large as in training."""
    count = min(2048, len(rows["y"])) // BATCH
    parts = jax.tree.map(lambda a: a[: count * BATCH].reshape(count, BATCH, *a.shape[1:]), rows)
    hit = lambda b: jnp.mean((jnp.argmax(scores(weights, mix, b["x"]), -1) == b["y"]).astype("f4"))
    return jnp.mean(lax.map(hit, parts))


def one_hot(chosen):
    return jax.nn.one_hot(jnp.asarray(chosen), len(OPERATIONS))


def chosen(mix):
    """The strongest operation of each edge but "none", as the paper derives its cells."""
    return [1 + int(np.argmax(row[1:])) for row in np.asarray(mix)]


# ---- what may help


def by_perturbation(d, weights, mix, rng, key):
    """Edge by edge, the operation without which the supernet loses most; then some training."""
    mix, out = np.array(mix), [0] * len(EDGES)
    for edge in rng.permutation(len(EDGES)):
        found = []
        for operation in range(1, len(OPERATIONS)):
            without = mix.copy()
            without[edge, operation] = 0.0
            without[edge] /= without[edge].sum() + 1e-9
            found.append(float(accuracy(weights, jnp.asarray(without), d["other"])))
        out[edge] = 1 + int(np.argmin(found))
        mix[edge] = np.eye(len(OPERATIONS))[out[edge]]
        key, part = jax.random.split(key)
        weights = train(weights, jnp.asarray(mix), d["train"], TUNE, part)
    return out


@jax.jit
def similarities(weights, mix, batch):
    """For each edge the cosines between the gradients of the weights that its operations share."""

    def gradient(edge, operation):
        forced = mix.at[edge].set(jax.nn.one_hot(operation, len(OPERATIONS)))
        grads = jax.grad(mixed_loss)(weights, forced, batch)
        return jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(grads)])

    def edge_of(edge):
        g = lax.map(partial(gradient, edge), jnp.arange(len(OPERATIONS)))
        g = g / (jnp.linalg.norm(g, axis=1, keepdims=True) + 1e-12)
        return g @ g.T

    return lax.map(edge_of, jnp.arange(len(EDGES)))


def cut(cosines, allowed):
    """The edge and the halves of its operations whose gradients agree least with each other."""
    best = (np.inf, None, None)
    for edge, table in enumerate(np.asarray(cosines)):
        operations = np.flatnonzero(allowed[edge])
        for code in range(1, 2 ** (len(operations) - 1)) if len(operations) > 3 else ():
            one = operations[[bool(code >> i & 1) for i in range(len(operations))]]
            other = np.setdiff1d(operations, one)
            across = table[np.ix_(one, other)].mean()
            if min(len(one), len(other)) >= 2 and across < best[0]:
                best = (across, edge, one)
    return best[1], best[2]


def split(allowed, edge, one):
    halves = np.array(allowed), np.array(allowed)
    halves[0][edge], halves[1][edge] = False, allowed[edge]
    halves[0][edge, one], halves[1][edge, one] = True, False
    return halves


def few_shot(d, epochs, weights, allowed, key):
    """A third of the epochs for one supernet, which is split twice; a sixth for each of the four;
    of their cells the one that does best by proxy. And the cosines of the first split."""
    weights, _ = search(d, FIRST, epochs // 3, weights, allowed, key)
    batch, leaves = jax.tree.map(lambda a: a[: MATCHED * BATCH], d["train"]), [np.asarray(allowed)]
    tables = []
    for _ in range(2):
        grown = []
        for kept in leaves:
            equal = mixture({"logits": jnp.zeros(kept.shape), "allowed": jnp.asarray(kept)})
            tables.append(np.asarray(similarities(weights, equal, batch)))
            grown += split(kept, *cut(tables[-1], kept))
        leaves = grown
    found = []
    for number, kept in enumerate(leaves):
        part = jax.random.fold_in(key, number)
        _, mixtures = search(d, FIRST, epochs // 6, weights, jnp.asarray(kept), part)
        found.append(chosen(mixtures[-1]))
    return max(found, key=lambda cell: proxy(d, cell, key)), tables[0]


# ---- by evaluation alone


def proxy(d, cell, key):
    weights = train(start(key, d["channels"]), one_hot(cell), d["train"], PROXY, key)
    return float(accuracy(weights, one_hot(cell), d["other"]))


def random_search(d, count, rng, key):
    """The best of so many cells by proxy."""
    cells = rng.integers(0, len(OPERATIONS), (count, len(EDGES))).tolist()
    proxies = [proxy(d, cell, jax.random.fold_in(key, i)) for i, cell in enumerate(cells)]
    return cells[int(np.argmax(proxies))]


def evolution(evaluate, count, rng):
    """The best of so many cells of which all but the first few are the best of three that are
    alive, one operation changed; the oldest dies."""
    draw = lambda: rng.integers(0, len(OPERATIONS), len(EDGES)).tolist()
    history = []
    for number in range(count):
        cell = draw()
        if number >= POPULATION:
            alive = history[-POPULATION:]
            asked = rng.choice(POPULATION, TOURNAMENT, replace=False)
            cell = list(max((alive[i] for i in asked), key=lambda member: member[0])[1])
            edge = rng.integers(len(EDGES))
            others = [o for o in range(len(OPERATIONS)) if o != cell[edge]]
            cell[edge] = int(rng.choice(others))
        history.append((evaluate(cell, number), cell))
    return max(history, key=lambda member: member[0])[1]


# ---- the table, and runs


def table():
    path = data.local("nasbench201.npz")
    if path is None:
        raise data.Unavailable("nasbench201.npz is not in the folder that BILEVAX_DATA names.")
    with np.load(path) as file:
        return dict(zip(file["cell"].tolist(), file["cifar10_test"], strict=True))


def made_up():
    """A table that counts convolutions, and images of noise: for a small run."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (640, 32, 32, 3)), rng.integers(0, CLASSES, 640, dtype=np.int32)
    cells = itertools.product(range(len(OPERATIONS)), repeat=len(EDGES))
    return {name_of(c): c.count(CONVOLUTION) for c in cells}, data.Split(x, y, x, y)


def name_of(cell):
    """As the table has it: ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``."""
    nodes = [
        "".join(
            f"{OPERATIONS[o]}~{source}|"
            for (source, to), o in zip(EDGES, cell, strict=True)
            if to == target
        )
        for target in (1, 2, 3)
    ]
    return "+".join("|" + node for node in nodes)


def percentile(cell, known):
    own = known[name_of(cell)]
    return 100 * float(np.mean([value < own for value in known.values()]))


def problem(images, seed, rows, channels):
    x = images.x_train.astype(np.float32).reshape(-1, SIZE, 2, SIZE, 2, 3).mean((2, 4)) / 255
    x = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    order = np.random.default_rng(100 + seed).permutation(len(x))[:rows]
    part = lambda at: {"x": jnp.asarray(x[at]), "y": jnp.asarray(images.y_train[at])}
    first, second = np.array_split(order, 2)
    sizes = {"epoch": len(first) // BATCH, "channels": channels}
    return {"train": part(first), "other": part(second), **sizes}


def shot_epochs(d, epochs):
    """What splitting costs, in epochs of gradients: a search, four proxies, the similarities."""
    matched = 3 * len(EDGES) * len(OPERATIONS) * min(MATCHED / d["epoch"], 1)
    return COST[FIRST] * (epochs // 3 + 4 * (epochs // 6)) + 4 * PROXY + matched


def row_of(cell, known, gradients):
    return {
        "percentile": percentile(cell, known),
        "test": float(known[name_of(cell)]),
        "skips": cell.count(SKIP),
        "gradients": gradients,
    }


def evolved(d, known, seed, epochs):
    """For as many gradients as random search."""
    key, count = jax.random.key(seed), int(np.ceil(shot_epochs(d, epochs) / PROXY))
    evaluate = lambda cell, i: proxy(d, cell, jax.random.fold_in(key, i))
    cell = evolution(evaluate, count, np.random.default_rng(300 + seed))
    return {"row": row_of(cell, known, count * PROXY * d["epoch"]), "cell": name_of(cell)}


def one(d, known, seed, epochs, orders):
    key, rng = jax.random.key(seed), np.random.default_rng(200 + seed)
    begun, allowed = start(key, d["channels"]), jnp.ones((len(EDGES), len(OPERATIONS)), bool)
    cells, gradients, trace = {}, {}, {}
    runs = {order: (order, epochs) for order in orders} | {LONG: (FIRST, 2 * epochs)}
    for name, (order, length) in runs.items():
        weights, mixtures = search(d, order, length, begun, allowed, key)
        cells[name], gradients[name] = chosen(mixtures[-1]), COST[order] * length
        trace[name] = mixtures
        if name == FIRST:
            cells[PERTURBED] = by_perturbation(d, weights, mixtures[-1], rng, key)
            gradients[PERTURBED] = gradients[FIRST] + TUNE * len(EDGES)
            stop = next((i for i, m in enumerate(mixtures) if chosen(m).count(SKIP) >= 3), epochs)
            cells[EARLY] = chosen(mixtures[max(stop - 1, 0)])
            gradients[EARLY] = COST[FIRST] * min(stop + 1, epochs)
    cells[SPLIT], cosines = few_shot(d, epochs, begun, allowed, key)
    gradients[SPLIT] = shot_epochs(d, epochs)
    count = int(np.ceil(gradients[SPLIT] / PROXY))
    cells[RANDOM], gradients[RANDOM] = random_search(d, count, rng, key), count * PROXY
    cells[ALIKE], gradients[ALIKE] = [CONVOLUTION] * len(EDGES), 0
    return {
        "rows": {
            name: row_of(cells[name], known, gradients[name] * d["epoch"])
            for name in ROWS
            if name in cells
        },
        "cells": {name: name_of(cell) for name, cell in cells.items()},
        "by epoch": {run: [percentile(chosen(m), known) for m in trace[run]] for run in trace},
        "strengths": {run: np.mean(trace[run], 1) for run in trace},
        "similarities": cosines,
    }


def draw(path, rows, found):
    """When it collapses, what wins then, and whose gradients agree."""
    colors = {FIRST: report.ORANGE, LONG: report.RED, DIFFERENCE: report.BROWN}
    hues = (report.GREY, report.RED, report.SKY, report.BLUE, report.ORANGE)
    with report.figure(path, 3, width=5.2, height=4.4) as (_, (left, middle, right)):
        for run in found[0]["by epoch"]:
            values = np.mean([f["by epoch"][run] for f in found], 0)
            epochs = 1 + np.arange(len(values))
            left.plot(epochs, values, "o-", color=colors.get(run, report.PURPLE), label=run)
        for name, color in ((SPLIT, report.BLUE), (RANDOM, report.GREEN)):
            left.axhline(np.mean(rows[name]["percentile"]), color=color, ls="--", label=name)
        left.set(xlabel="epoch", ylabel="percentile of the cell in the table", ylim=(0, 102))
        left.legend(loc="lower left")
        strengths = np.mean([f["strengths"][LONG] for f in found], 0)
        names = [name.replace("nor_", "").replace("_", " ") for name in OPERATIONS]
        for values, name, color in zip(strengths.T, names, hues, strict=True):
            middle.plot(1 + np.arange(len(values)), values, color=color, label=name)
        middle.set(xlabel="epoch", ylabel="strength, mean over edges", title=LONG)
        middle.legend()
        cosines = np.mean([np.mean(f["similarities"], 0) for f in found], 0)
        right.pcolormesh(cosines[::-1], cmap="Blues", vmin=-0.5, vmax=1.5)
        for (i, j), value in np.ndenumerate(cosines[::-1]):
            right.text(j + 0.5, i + 0.5, f"{value:.2f}", color="k", ha="center", va="center")
        right.set_xticks(np.arange(len(names)) + 0.5, names, rotation=30, ha="right")
        right.set_yticks(np.arange(len(names)) + 0.5, names[::-1])
        right.set_title("cosines of the weights' gradients, edge by edge")


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=6, steps=12), small=dict(seeds=1, steps=6), pieces=True
    )
    parser.add_argument(
        "--all", action="store_true", help="also the hypergradient through the step (dearer)"
    )
    args = report.parse(parser, argv)
    known, images = made_up() if args.small else (table(), data.cifar10())
    begin = time.perf_counter()
    rows, channels = (2 * BATCH, CHANNELS[:1]) if args.small else (len(images.y_train), CHANNELS)
    few = [FIRST] if args.small else [FIRST, DIFFERENCE]
    settings = {"epochs": args.steps, "rows": rows, "channels": channels}
    settings["orders"] = orders = list(METHODS) if args.all else few
    pieces = report.Pieces(args, settings)
    of = lambda seed: (problem(images, seed, rows, channels), known, seed, args.steps)
    found = []
    for seed in range(args.seeds):
        one_seed = pieces(f"seed {seed}", lambda seed=seed: one(*of(seed), orders))
        more = pieces(f"seed {seed}, evolution", lambda seed=seed: evolved(*of(seed)))
        one_seed["rows"][EVOLVED], one_seed["cells"][EVOLVED] = more["row"], more["cell"]
        found.append(one_seed)
    results = {
        name: {key: [f["rows"][name][key] for f in found] for key in found[0]["rows"][name]}
        for name in ROWS
        if name in found[0]["rows"]
    }
    names = {"percentile": "percentile", "test": "table's accuracy", "skips": "skips",
             "gradients": "gradients"}  # fmt: skip
    print(report.table(results, names, better=(SPLIT, "percentile"), digits=1))
    print("percentile after each epoch, mean over seeds")
    for run in found[0]["by epoch"]:
        path = np.mean([f["by epoch"][run] for f in found], 0)
        print(f"  {run:32} " + " ".join(f"{p:.0f}" for p in path))
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "darts.svg", results, found)
    kept = ("cells", "by epoch", "strengths", "similarities")
    report.save(
        args.out / "darts.json",
        {**vars(args), **settings},
        results,
        seconds,
        **{key: [f[key] for f in found] for key in kept},
    )


if __name__ == "__main__":
    report.run(main)
