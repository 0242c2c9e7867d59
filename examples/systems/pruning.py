"""Which hundredth of a network's weights is worth keeping? Learn the mask and the weights under it
together (BiP), beside pruning by magnitude in six forms.

    python examples/systems/pruning.py

After Zhang et al., "Advancing model pruning via bi-level optimization" (NeurIPS 2022, arXiv
2210.04092). Lower level: the weights under a mask, some steps from where they stand, with a
proximal term that pulls back there. Upper level: a score for each weight, or for each unit; the
mask keeps the largest ones. Both levels read training batches, each its own. The hypergradient is
first-order: the network reads `m * w`, mask and weight in one product, so that the mixed derivative
needs no second derivative once the curvature is taken to be that of the proximal term. After the
search the weights are trained under the mask that was found.

A convolutional network on 10,000 images of CIFAR-10 at 16 x 16, and an MLP on 10,000 of
Fashion-MNIST. All rows of a study start from the same dense network and are counted in
gradient-epochs after it, a gradient on one batch counted once whichever level asked for it. Every
row's rates are the best of those tried on another seed, by 2,000 of the training images that were
held out for it. Test data chooses nothing.

What came out (convolutions, 99 % pruned, 3 seeds): BiP .403, one-shot pruning .301, gradual .343,
rewound IMP .390 at four times the gradients; without its implicit term BiP has .406.
"""

from __future__ import annotations

import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import bilevax as bx
from bilevax.base import Bound, Hypergradient
from bilevax.hypergradient.parts import forward

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import report

BATCH = 100
SHAPES = {  # of each layer's weights
    "mlp": ((784, 300), (300, 100), (100, 10)),
    "cnn": ((3, 3, 3, 24), (3, 3, 24, 48), (3, 3, 48, 96), (384, 10)),
}
WEIGHTS, UNITS = "weights", "units"
# After r of eight rounds, each of which keeps the same share, LAST^(r / 8) is left.
ROUNDS, LAST, JUDGED = 8, {WEIGHTS: 0.01, UNITS: 0.1}, {WEIGHTS: (4, 7, 8), UNITS: (8,)}
ON_WAY = 7  # judged where long rounds pass by
SHORT = 1  # epochs of a short round
STUDIES = ("cnn weights", "cnn units", "mlp weights", "mlp units")
SIZES = {  # of each layer, as shares of all weights
    net: np.array([np.prod(s) for s in shapes]) / sum(np.prod(s) for s in shapes)
    for net, shapes in SHAPES.items()
}
DENSE, ONE_SHOT, GRADUAL = "dense", "one-shot magnitude", "gradual magnitude"
SHARES = "gradual, by BiP's share of each layer"
REWIND, LONG = "IMP, rewound, long rounds", "IMP, going on, long rounds"
REWIND_SHORT, SHORT_ROUNDS = "IMP, rewound, short rounds", "IMP, going on, short rounds"
BIP, EXACT, DIRECT = "BiP", "BiP, exact mixed product", "BiP without its implicit term"
SEARCHES = (BIP, EXACT, DIRECT)
ROWS = (DENSE, ONE_SHOT, GRADUAL, REWIND, LONG, REWIND_SHORT, SHORT_ROUNDS, *SEARCHES, SHARES)


class Settings(NamedTuple):
    dense: int = 12  # epochs of the dense network, and
    budget: int = 12  # gradient-epochs after it of everything but long rounds,
    long: int = 6  # which have so many epochs each
    rate: float = 3e-3  # of Adam, for training under a fixed mask
    search: float = 0.6  # share of the budget that a search takes, the rest trains what it found
    inner: int = 3  # steps of the lower level in each step of the upper one
    inner_rate: float = 1e-3
    outer_rate: float = 200.0
    gamma: float = 1.0


def alike(names, **changes):
    return dict.fromkeys(names, changes)


# By row: what was best where 99 % of the weights or 90 % of the units go, on 2,000 training images
# of another seed that were held out. Not tuned: by units rewound rounds, on the MLP all its rounds
# by units and those rewound or long by weights; they take what one-shot or short rounds take.
TUNED = {
    ("cnn", WEIGHTS): {
        **alike((ONE_SHOT, REWIND, REWIND_SHORT), rate=2e-2),
        **alike((LONG,), rate=3e-3),
        **alike((SHORT_ROUNDS,), rate=1e-2),
        **alike((GRADUAL, SHARES), rate=6e-3),
        **alike((BIP, EXACT), rate=2e-2, outer_rate=300.0),
        **alike((DIRECT,), rate=1e-2, outer_rate=300.0),
    },
    ("mlp", WEIGHTS): {
        **alike((ONE_SHOT, REWIND, LONG, REWIND_SHORT, SHORT_ROUNDS), rate=1e-2),
        **alike((GRADUAL, SHARES), rate=6e-3),
        **alike(SEARCHES, rate=6e-3, outer_rate=200.0),
    },
    ("cnn", UNITS): {
        **alike((ONE_SHOT, GRADUAL, REWIND, REWIND_SHORT, SHORT_ROUNDS), rate=6e-3),
        **alike((BIP, EXACT), rate=1e-2, outer_rate=0.3, search=0.3),
        **alike((DIRECT,), rate=1e-2, outer_rate=3.0, search=0.3),
    },
    ("mlp", UNITS): {
        **alike((ONE_SHOT, REWIND, REWIND_SHORT, SHORT_ROUNDS), rate=6e-3),
        **alike((GRADUAL,), rate=3e-3),
        **alike(SEARCHES, rate=6e-3, outer_rate=0.3, search=0.3),
    },
}


# ---- the networks, whose weights are multiplied by a mask


def start(key, shapes):
    normal = lambda k, s: jax.random.normal(k, s) * (2 / np.prod(s[:-1])) ** 0.5
    keys = jax.random.split(key, len(shapes))
    return {
        "w": [normal(k, s) for k, s in zip(keys, shapes, strict=True)],
        "b": [jnp.zeros(s[-1]) for s in shapes],
    }


def network(weights, biases, x):
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        x = jax.nn.relu(layer(w, b, x))
    return layer(weights[-1], biases[-1], x)


def layer(w, b, x):
    """Of units, or a convolution of stride two, which is a product with patches."""
    if w.ndim == 2:
        return x.reshape(len(x), -1) @ w + b
    side, x = x.shape[1], jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + side : 2, j : j + side : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, -1) @ w.reshape(-1, w.shape[-1]) + b


def under(mask, params, batch):
    """Cross-entropy of the network under a mask."""
    out = network(masked(mask, params["w"]), params["b"], batch["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]))


def masked(mask, weights):
    """By units, the classes stay: there is no mask for the last weights."""
    return [m * w for m, w in zip(mask, weights, strict=False)] + weights[len(mask) :]


def magnitudes(weights, kind):
    """Of each weight; or the root mean square of the weights that lead to a unit or channel."""
    if kind == WEIGHTS:
        return [jnp.abs(w) for w in weights]
    square = lambda w: jnp.mean(w**2, tuple(range(w.ndim - 1)), keepdims=True)
    return [jnp.sqrt(square(w)) for w in weights[:-1]]


def whole(params, kind):
    return jax.tree.map(jnp.ones_like, magnitudes(params["w"], kind))


# ---- BiP: the two levels, and the pullback between them


def masked_loss(params, scores, batch):
    """Both levels: keeps the weights with positive scores; a score moves as its mask would."""
    kept = [(s > 0).astype(s.dtype) for s in scores]
    return under(bx.nn.straight_through(kept, scores), params, batch)


def largest(scores, keep):
    """Scores moved so that the share `keep` of them, over all layers, is positive."""
    flat = jnp.concatenate([jnp.ravel(s) for s in scores])

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        more = jnp.sum(flat > middle) > keep * flat.size
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    _, threshold = lax.fori_loop(0, 40, halve, (jnp.min(flat), jnp.max(flat)))
    return [s - threshold for s in scores]


def share(scores, kind, keep):
    """Of all weights, or of each layer's units, or of each layer's weights where `keep` has a
    number for each layer."""
    if kind == WEIGHTS and jnp.ndim(keep) == 0:
        return largest(scores, keep)
    keep = jnp.broadcast_to(keep, len(scores))
    return [largest([s], k)[0] for s, k in zip(scores, keep, strict=True)]


def bilinear(scale):
    """The pullback through `m * w` with a lower level whose curvature is `1 / scale`: for a
    cotangent c of w, `-scale * m * c * (gradient of the loss in m * w)`. The gradient in w has the
    mask in it already."""
    vjp = Bound("bilinear", _bilinear, scale=scale)
    return Hypergradient(lambda inner: (), vjp, order=1, extends=False)


def _bilinear(lower, inner_state, outer, feed, ctx, state, *, scale):
    solution, info = forward(lower, inner_state, outer, feed)

    def pullback(cotangent):
        grads, _ = jax.grad(lower.objective, has_aux=True)(solution.params, outer, ctx)
        # of a weight; a unit's score moves all that lead to it
        mixed = [
            -scale * jnp.sum(g * c, tuple(np.flatnonzero(np.equal(s.shape, 1))), keepdims=True)
            for s, g, c in zip(outer, grads["w"], cotangent["w"], strict=False)
        ]
        return mixed, None, state, info

    return solution, pullback


def pull_back(gamma, steps):
    """Proximal term `gamma / 2 * |w - w_0|^2` around where each solve of so many steps began."""

    def update(updates, state, params):
        count, anchor = state
        first = count % steps == 0
        anchor = jax.tree.map(lambda a, p: jnp.where(first, p, a), anchor, params)
        pulled = jax.tree.map(lambda u, p, a: u + gamma * (p - a), updates, params, anchor)
        return pulled, (count + 1, anchor)

    return optax.GradientTransformation(lambda params: (jnp.int32(0), params), update)


METHODS = {
    BIP: lambda s: bilinear(1 / s.gamma),
    EXACT: lambda s: bx.hypergradient.one_step(1 / s.gamma),
    DIRECT: lambda s: bx.hypergradient.direct(),
}
COST = {BIP: 2, EXACT: 3, DIRECT: 1}  # of an upper step, in gradients; a mixed product is two


@cache
def movers(s, steps):
    """Built once, so that the searches that differ in a number are one program."""
    weights = optax.chain(pull_back(s.gamma, s.inner), optax.adam(s.inner_rate))
    scores = optax.sgd(optax.cosine_decay_schedule(s.outer_rate, steps), momentum=0.9)
    return bx.inner.optax(weights, s.inner), scores


@cache
def algorithm(name, s, steps):
    solver, optimizer = movers(s, steps)
    return bx.algorithms.double_loop(solver, METHODS[name](s), optimizer)


@cache
def project(kind, keep):
    return partial(share, kind=kind, keep=keep)


def bip(problem, dense, name, s, keep, key):
    """A mask with this share of the weights, and the weights trained under it. All searches take as
    many steps; what one costs less is left for training."""
    steps = round(s.search * s.budget * problem["epoch"]) // (s.inner + COST[BIP])
    source = bx.data.minibatches(problem["train"], BATCH)
    solution = bx.solve_bilevel(
        masked_loss,
        masked_loss,
        dense,
        magnitudes(dense["w"], problem["kind"]),
        inner_data=source,
        outer_data=source,
        algorithm=algorithm(name, s, steps),
        project=project(problem["kind"], keep),
        num_steps=steps,
        key=key,
        keep="last",
    )
    mask = [(x > 0).astype(x.dtype) for x in solution.outer_params]
    rest = s.budget * problem["epoch"] - steps * (s.inner + COST[name])
    return mask, train(solution.inner_params, mask, problem["train"], s.rate, rest, key)


# ---- magnitudes


@jax.jit
def train(params, mask, rows, rate, steps, key):
    """Adam under a fixed mask, its rate falling to zero over the steps by half a cosine."""
    return trained(params, rows, rate, steps, key, lambda params, i: mask)[0]


@partial(jax.jit, static_argnames="kind")
def by_magnitude(weights, mask, keep, kind):
    """The mask of the largest of the weights, or units, that are left."""
    left = [m * s for m, s in zip(mask, magnitudes(weights, kind), strict=True)]
    return [(s > 0).astype(s.dtype) for s in share(left, kind, keep)]


@partial(jax.jit, static_argnames="kind")
def gradual(params, rows, rate, steps, keep, key, kind):
    """Zhu and Gupta (arXiv 1710.01878): sparsity rises by a cubic over the first three fifths."""
    every = whole(params, kind)

    def mask(params, i):
        part = jnp.minimum(i / (0.6 * steps), 1.0)
        return by_magnitude(params["w"], every, keep + (1 - keep) * (1 - part) ** 3, kind)

    params, mask = trained(params, rows, rate, steps, key, mask, every=steps // 50 + 1)
    return mask, params


def trained(params, rows, rate, steps, key, mask_at, every=None):
    opt, size = optax.scale_by_adam(), len(rows["y"])

    def step(i, carry):
        params, state, mask = carry
        if every is not None:  # what is masked has no gradient, and its magnitude is then zero
            mask = lax.cond(i % every == 0, lambda: mask_at(params, i), lambda: mask)
            params = {**params, "w": masked(mask, params["w"])}
        at = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, size)
        batch = jax.tree.map(lambda a: a[at], rows)
        grads = jax.grad(lambda p: under(mask, p, batch))(params)
        updates, state = opt.update(grads, state, params)
        now = -rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
        return jax.tree.map(lambda p, u: p + now * u, params, updates), state, mask

    params, _, mask = lax.fori_loop(0, steps, step, (params, opt.init(params), mask_at(params, 0)))
    return params, mask


def iterative(problem, dense, lengths, keep, rewind, rate, key):
    """Magnitude pruning in rounds (Han et al., NeurIPS 2015), each starting from where the last
    one ended or from `rewind`, early weights of the dense network (Frankle et al., ICML 2020);
    mask and weights after each round."""
    kind, out = problem["kind"], []
    params, mask = dense, whole(dense, kind)
    for r, epochs in enumerate(lengths, 1):
        mask = by_magnitude(params["w"], mask, keep ** (r / len(lengths)), kind)
        begun, steps = params if rewind is None else rewind, epochs * problem["epoch"]
        params = train(begun, mask, problem["train"], rate, steps, jax.random.fold_in(key, r))
        out.append((mask, params))
    return out


# ---- runs


def images_of(net, small):
    """Fashion-MNIST for the MLP, CIFAR-10 at 16 x 16 for the convolutions; noise in small."""
    if small:
        rng, shape = np.random.default_rng(0), (784,) if net == "mlp" else (16, 16, 3)
        y = rng.integers(0, 10, 600).astype(np.int32)
        x = rng.normal(size=(600, *shape)).astype(np.float32) + y.reshape(-1, *[1] * len(shape)) / 5
        return data.Split(x[:500], y[:500], x[500:], y[500:])
    if net == "mlp":
        return data.fashion()
    given = data.cifar10()
    x, y = (
        a.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4), dtype=np.float32) / 255
        for a in (given.x_train, given.x_test)
    )
    mean, spread = x.mean((0, 1, 2)), x.std((0, 1, 2))
    return given._replace(x_train=(x - mean) / spread, x_test=(y - mean) / spread)


def problem(images, net, kind, seed, held_out=0):
    """Training rows and the rows that judge: the test set, or rows held out of the training set."""
    order = np.random.default_rng(100 + seed).permutation(len(images.y_train))
    order, held = order[: len(order) - held_out], order[len(order) - held_out :]
    shift = 0.29 if net == "mlp" else 0.0
    part = lambda x, y, at: {"x": jnp.asarray(x[at]) - shift, "y": jnp.asarray(y[at])}
    return {
        "train": part(images.x_train, images.y_train, order),
        "judge": part(images.x_train, images.y_train, held)
        if held_out
        else part(images.x_test, images.y_test, slice(None)),
        "epoch": len(order) // BATCH,
        "kind": kind,
        "shapes": SHAPES[net],
    }


@jax.jit
def accuracy(params, mask, rows):
    out = network(masked(mask, params["w"]), params["b"], rows["x"])
    return jnp.mean((jnp.argmax(out, -1) == rows["y"]).astype(jnp.float32))


def dense_network(problem, s, seed):
    """After one epoch, where rewound rounds begin, and at its end."""
    key = jax.random.key(seed)
    params = start(key, problem["shapes"])
    mask = whole(params, WEIGHTS)
    early = train(params, mask, problem["train"], s.rate, problem["epoch"], key)
    return early, train(early, mask, problem["train"], s.rate, s.dense * problem["epoch"], key)


def measured(mask, params, problem, epochs):
    """Accuracy of a row, its gradient-epochs after the dense network, the share of each layer."""
    left = [jnp.mean(m) for m in mask]
    return {"accuracy": accuracy(params, mask, problem["judge"]), "epochs": epochs, "left": left}


def one(problem, name, s, rounds, seed, networks, shares=None):
    early, dense = networks
    kind, rows = problem["kind"], problem["train"]
    key, keep = jax.random.fold_in(jax.random.key(seed), 1), share_left(kind, rounds)
    every, steps = whole(dense, kind), s.budget * problem["epoch"]
    if name == DENSE:
        return measured(every, dense, problem, 0)
    if name == ONE_SHOT:
        mask = by_magnitude(dense["w"], every, keep, kind)
        params = train(dense, mask, rows, s.rate, steps, key)
    elif name in (GRADUAL, SHARES):
        part = keep if shares is None else jnp.asarray(shares)
        mask, params = gradual(dense, rows, s.rate, steps, part, key, kind)
    elif name in SEARCHES:
        mask, params = bip(problem, dense, name, s, keep, key)
    else:
        lengths = [SHORT] * (rounds - 1) + [s.budget - SHORT * (rounds - 1)]
        rewind = early if name == REWIND_SHORT else None
        mask, params = iterative(problem, dense, lengths, keep, rewind, s.rate, key)[-1]
    return measured(mask, params, problem, s.budget)


def share_left(kind, rounds):
    return LAST[kind] ** (rounds / ROUNDS)


def long_rounds(problem, name, s, seed, networks):
    """All sparsities of a row of long rounds, each on the way to the next."""
    early, dense = networks
    rewind, key = early if name == REWIND else None, jax.random.fold_in(jax.random.key(seed), 1)
    lengths, kind = [s.long] * ROUNDS, problem["kind"]
    found = iterative(problem, dense, lengths, LAST[kind], rewind, s.rate, key)
    return {r: measured(*found[r - 1], problem, r * s.long) for r in JUDGED[kind]}


def studied(pieces, net, kind, args):
    """Rows by sparsity: what every seed gave."""
    images, found = images_of(net, args.small), {}
    left_out = () if args.all else (EXACT,)
    left_out += () if kind == WEIGHTS else (SHARES, LONG)
    left_out += (DIRECT, REWIND_SHORT) if args.small else ()
    names = [name for name in ROWS if name not in left_out]
    s = Settings(dense=1, budget=args.steps, long=1) if args.small else Settings(budget=args.steps)
    tuned = {name: s._replace(**TUNED[net, kind].get(name, {})) for name in names}
    for seed in range(args.seeds):
        d = problem(images, net, kind, seed)
        networks = dense_network(d, s, seed)
        place = f"{net}, {kind}, seed {seed}"
        for name in (n for n in names if n in (REWIND, LONG)):
            make = partial(long_rounds, d, name, tuned[name], seed, networks)
            for rounds, made in pieces(f"{place}, {name}", make).items():
                found.setdefault(int(rounds), {}).setdefault(name, []).append(made)
        for rounds in JUDGED[kind][-1:] if args.small else (r for r in JUDGED[kind] if r != ON_WAY):
            for name in names:
                if name in (REWIND, LONG):
                    continue
                shares = found[rounds][BIP][-1]["left"] if name == SHARES else None
                make = partial(one, d, name, tuned[name], rounds, seed, networks, shares)
                of_row = found[rounds].setdefault(name, [])
                of_row.append(pieces(f"{place}, {rounds} rounds, {name}", make))
    return {
        f"{net}, {1 - share_left(kind, rounds):.1%} of the {kind}": {
            name: {key: [f[key] for f in rows[name]] for key in ("accuracy", "epochs", "left")}
            for name in names
            if name in rows
        }
        for rounds, rows in sorted(found.items())
    }


COLORS = {BIP: report.BLUE, DIRECT: report.SKY, ONE_SHOT: report.BROWN, GRADUAL: report.GREEN}
COLORS |= {REWIND: report.RED, SHORT_ROUNDS: report.ORANGE, LONG: report.PURPLE}


def draw(path, results):
    """Fronts of accuracy against what is left, and accuracy by cost where least is left."""
    fronts = {}
    for title, rows in results.items():
        fronts.setdefault(title.split(",")[0] + title[title.rindex(" ") :], []).append(rows)
    fronts = {title: found for title, found in fronts.items() if title.endswith(WEIGHTS)} or fronts
    with report.figure(path, 2 * len(fronts), width=4.8, height=4.8) as (_, axes):
        for (title, found), left, right in zip(fronts.items(), axes[::2], axes[1::2], strict=True):
            for place, name in enumerate(n for n in ROWS if n in found[-1] and n != DENSE):
                rows = [rows[name] for rows in found if name in rows]
                epochs = np.mean(rows[-1]["epochs"])
                style = dict(
                    marker="os^vDPX*p"[place], color=COLORS.get(name, report.GREY), label=name
                )
                y = [np.mean(r["accuracy"]) for r in rows]
                sizes = SIZES[title.split()[0]]
                x = [np.mean([np.dot(z, sizes[: len(z)]) for z in r["left"]]) for r in rows]
                left.plot(100 * np.array(x), y, **style)
                right.plot(epochs, y[-1], linestyle="", markersize=9, **style)
            left.set(xscale="log", xlabel="% of the weights left", ylabel="test accuracy")
            left.set_title(title)
            right.set(xlabel="gradient-epochs after the dense network")
            right.set_title("where least is left, by cost")
        axes[0].legend(fontsize=8)


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=3, steps=12), small=dict(seeds=1, steps=8), pieces=True
    )
    parser.add_argument("--all", action="store_true", help="also the exact mixed product")
    parser.add_argument("--only", nargs="+", choices=STUDIES, help="some of the studies")
    args = report.parse(parser, argv)
    args.only = args.only or (STUDIES[-1:] if args.small else STUDIES)
    begin = time.perf_counter()
    settings = {
        **Settings(budget=args.steps)._asdict(), "rounds": ROUNDS, "left at the end": LAST,
        "short": SHORT, "batch": BATCH, "shapes": SHAPES,
    }  # fmt: skip
    tuned, results = {study: TUNED[tuple(study.split())] for study in args.only}, {}
    for study in args.only:
        pieces = report.Pieces(args, {**settings, "tuned": tuned[study]})
        results |= studied(pieces, *study.split(), args)
    columns = {"accuracy": "test accuracy", "epochs": "gradient-epochs"}
    for title, rows in results.items():
        print(f"\n{title} pruned, over {args.seeds} seed(s)\n")
        print(report.table(rows, columns, better=(BIP, "accuracy") if BIP in rows else None))
        if BIP in rows:
            print("\nshare of each layer that is left")
            for name in rows:
                parts = np.mean(rows[name]["left"], 0)
                print(f"  {name:40} " + " ".join(f"{part:7.2%}" for part in parts))
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "pruning.svg", results)
    left = {
        title: {name: np.mean(row["left"], 0) for name, row in rows.items()}
        for title, rows in results.items()
    }
    figures = {
        title: {name: {k: row[k] for k in columns} for name, row in rows.items()}
        for title, rows in results.items()
    }
    settings |= {"tuned": tuned}
    report.save(args.out / "pruning.json", {**vars(args), **settings}, figures, seconds, left=left)


if __name__ == "__main__":
    report.run(main)
