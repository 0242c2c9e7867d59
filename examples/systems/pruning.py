"""Which hundredth of a network's weights is worth keeping? Learn the mask and the weights under it
together (BiP), beside pruning by magnitude in six forms.

    python examples/systems/pruning.py

After Zhang et al., "Advancing model pruning via bi-level optimization" (NeurIPS 2022, arXiv
2210.04092). Lower level: the weights under a mask, some steps from where they stand, with a
proximal term that pulls back there. Upper level: a score for each weight; the mask keeps the
largest ones. Both levels read training batches, each its own. The hypergradient is first-order: the
network reads `m * w`, mask and weight in one product, so that the mixed derivative needs no second
derivative once the curvature is taken to be that of the proximal term. After the search the weights
are trained under the mask that was found.

Fashion-MNIST, 10,000 training and 2,000 test images; an MLP of 784, 300, 100 and 10 units. All rows
start from the same dense network (10 epochs) and are counted in gradient-epochs after it, a
gradient on one batch counted once whichever level asked for it. The step of the scores was chosen
on another seed, by 2,000 of the training images that were held out for it; nothing else was tuned,
for no row. Test data chooses nothing.

What came out: BiP is level with gradual magnitude pruning at the same cost, and with iterative
pruning at four times the cost; its implicit term makes no difference beyond noise.
"""

from __future__ import annotations

import sys
import time
from functools import cache, partial
from itertools import pairwise
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

LAYERS, BATCH = (784, 300, 100, 10), 100
ROUNDS = (5, 10)  # after r rounds, each of which keeps the same share, 10^(-r/5) is left
SHORT = 1  # epochs of a short round
SPARSITY = {f"{100 * (1 - 0.01 ** (r / 10)):.1f} %": r for r in ROUNDS}
DENSE, ONE_SHOT, GRADUAL = "dense", "one-shot magnitude", "gradual magnitude"
REWIND, LONG = "IMP, rewound, long rounds", "IMP, going on, long rounds"
REWIND_SHORT, SHORT_ROUNDS = "IMP, rewound, short rounds", "IMP, going on, short rounds"
BIP, EXACT, DIRECT = "BiP", "BiP, exact mixed product", "BiP without its implicit term"
SEARCHES = (BIP, EXACT, DIRECT)
ROWS = (DENSE, ONE_SHOT, GRADUAL, REWIND, LONG, REWIND_SHORT, SHORT_ROUNDS, *SEARCHES)


class Settings(NamedTuple):
    dense: int = 10  # epochs of the dense network, and
    budget: int = 25  # gradient-epochs after it of everything but long rounds,
    long: int = 10  # which have so many epochs each
    rate: float = 3e-3  # of Adam, for training under a fixed mask
    search: float = 0.6  # share of the budget that a search takes, the rest trains what it found
    inner: int = 3  # steps of the lower level in each step of the upper one
    inner_rate: float = 1e-3
    outer_rate: float = 200.0
    gamma: float = 1.0


# ---- the network, whose weights are multiplied by a mask


def start(key):
    keys = jax.random.split(key, len(LAYERS) - 1)
    shapes = list(pairwise(LAYERS))
    normal = lambda k, s: jax.random.normal(k, s) * (2 / s[0]) ** 0.5
    return {
        "w": [normal(k, s) for k, s in zip(keys, shapes, strict=True)],
        "b": [jnp.zeros(s[1]) for s in shapes],
    }


def network(weights, biases, x):
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        x = jax.nn.relu(x @ w + b)
    return x @ weights[-1] + biases[-1]


def under(mask, params, batch):
    """Cross-entropy of the network under a mask."""
    out = network([m * w for m, w in zip(mask, params["w"], strict=True)], params["b"], batch["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]))


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
        mixed = [-scale * g * c for g, c in zip(grads["w"], cotangent["w"], strict=True)]
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
    DIRECT: lambda s: bilinear(0.0),
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


project = cache(lambda keep: partial(largest, keep=keep))


def bip(problem, dense, name, s, keep, key):
    """A mask with this share of the weights, and the weights trained under it. All searches take as
    many steps; what one costs less is left for training."""
    steps = round(s.search * s.budget * problem["epoch"]) // (s.inner + COST[BIP])
    source = bx.data.minibatches(problem["train"], BATCH)
    solution = bx.solve_bilevel(
        masked_loss,
        masked_loss,
        dense,
        [jnp.abs(w) for w in dense["w"]],
        inner_data=source,
        outer_data=source,
        algorithm=algorithm(name, s, steps),
        project=project(keep),
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


@jax.jit
def by_magnitude(weights, mask, keep):
    """The mask of the largest of the weights that are left."""
    left = [m * jnp.abs(w) for m, w in zip(mask, weights, strict=True)]
    return [(s > 0).astype(s.dtype) for s in largest(left, keep)]


@jax.jit
def gradual(params, rows, rate, steps, keep, key):
    """Zhu and Gupta (arXiv 1710.01878): sparsity rises by a cubic over the first three fifths."""
    whole = [jnp.ones_like(w) for w in params["w"]]

    def mask(params, i):
        part = jnp.minimum(i / (0.6 * steps), 1.0)
        return by_magnitude(params["w"], whole, keep + (1 - keep) * (1 - part) ** 3)

    params, mask = trained(params, rows, rate, steps, key, mask, every=steps // 50 + 1)
    return mask, params


def trained(params, rows, rate, steps, key, mask_at, every=None):
    opt, size = optax.scale_by_adam(), len(rows["y"])

    def step(i, carry):
        params, state, mask = carry
        if every is not None:  # what is masked has no gradient, and its magnitude is then zero
            mask = lax.cond(i % every == 0, lambda: mask_at(params, i), lambda: mask)
            params = {**params, "w": [m * w for m, w in zip(mask, params["w"], strict=True)]}
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
    params, mask, out = dense, [jnp.ones_like(w) for w in dense["w"]], []
    for r, epochs in enumerate(lengths, 1):
        mask = by_magnitude(params["w"], mask, keep ** (r / len(lengths)))
        begun, steps = params if rewind is None else rewind, epochs * problem["epoch"]
        params = train(begun, mask, problem["train"], rate, steps, jax.random.fold_in(key, r))
        out.append((mask, params))
    return out


# ---- runs


def problem(images, seed, held_out, rows):
    """Training rows and the rows that judge: the test set, or rows held out of the training set."""
    order = np.random.default_rng(100 + seed).permutation(len(images.y_train))
    order, held = order[: len(order) - held_out], order[len(order) - held_out :]
    part = lambda x, y, at: {"x": jnp.asarray(x[at]) - 0.29, "y": jnp.asarray(y[at])}
    return {
        "train": part(images.x_train, images.y_train, order[:rows]),
        "judge": part(images.x_train, images.y_train, held)
        if held_out
        else part(images.x_test, images.y_test, slice(None)),
        "epoch": len(order[:rows]) // BATCH,
    }


@jax.jit
def accuracy(params, mask, rows):
    out = network([m * w for m, w in zip(mask, params["w"], strict=True)], params["b"], rows["x"])
    return jnp.mean((jnp.argmax(out, -1) == rows["y"]).astype(jnp.float32))


def dense_network(problem, s, seed):
    """After one epoch, where rewound rounds begin, and at its end."""
    key = jax.random.key(seed)
    params = start(key)
    whole = [jnp.ones_like(w) for w in params["w"]]
    early = train(params, whole, problem["train"], s.rate, problem["epoch"], key)
    return early, train(early, whole, problem["train"], s.rate, s.dense * problem["epoch"], key)


def measured(mask, params, problem, epochs):
    """Accuracy of a row, its gradient-epochs after the dense network, the share of each layer."""
    left = [jnp.mean(m) for m in mask]
    return {"accuracy": accuracy(params, mask, problem["judge"]), "epochs": epochs, "left": left}


def one(problem, name, s, rounds, seed, networks):
    early, dense = networks
    key, keep = jax.random.fold_in(jax.random.key(seed), 1), 0.01 ** (rounds / 10)
    whole, rows = [jnp.ones_like(w) for w in dense["w"]], problem["train"]
    steps = s.budget * problem["epoch"]
    if name == DENSE:
        return measured(whole, dense, problem, 0)
    if name == ONE_SHOT:
        mask = by_magnitude(dense["w"], whole, keep)
        params = train(dense, mask, rows, s.rate, steps, key)
    elif name == GRADUAL:
        mask, params = gradual(dense, rows, s.rate, steps, keep, key)
    elif name in SEARCHES:
        mask, params = bip(problem, dense, name, s, keep, key)
    else:
        lengths = [SHORT] * (rounds - 1) + [s.budget - SHORT * (rounds - 1)]
        rewind = early if name == REWIND_SHORT else None
        mask, params = iterative(problem, dense, lengths, keep, rewind, s.rate, key)[-1]
    return measured(mask, params, problem, s.budget)


def long_rounds(problem, name, s, seed, networks):
    """All sparsities of a row of long rounds, each on the way to the next."""
    early, dense = networks
    rewind, key = early if name == REWIND else None, jax.random.fold_in(jax.random.key(seed), 1)
    lengths = [s.long] * ROUNDS[-1]
    found = iterative(problem, dense, lengths, 0.01, rewind, s.rate, key)
    return {
        sparsity: measured(*found[r - 1], problem, r * s.long) for sparsity, r in SPARSITY.items()
    }


def draw(path, results):
    colors = {BIP: report.BLUE, DIRECT: report.SKY, ONE_SHOT: report.BROWN, GRADUAL: report.GREEN}
    colors |= {REWIND: report.RED, SHORT_ROUNDS: report.ORANGE, LONG: report.PURPLE}
    with report.figure(path, 2, width=7.0, height=5.0) as (_, (left, right)):
        title, rows = list(results.items())[-1]
        report.bars(left, rows, "accuracy", colors, f"test accuracy, {title} of the weights pruned")
        for place, (name, row) in enumerate(list(rows.items())[1:]):
            right.plot(
                np.mean(row["epochs"]),
                np.mean(row["accuracy"]),
                "os^vDPX*p"[place],
                markersize=9,
                color=colors.get(name, report.GREY),
                label=name,
            )
        right.margins(x=0.15, y=0.1)
        right.set(xlabel="gradient-epochs after the dense network", ylabel="test accuracy")
        right.set_title("Accuracy by cost")
        right.legend(fontsize=9, loc="lower center")


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=5, steps=25), small=dict(seeds=1, steps=12), pieces=True
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also 90 %% pruned, and the exact mixed product (twice as long)",
    )
    args = report.parse(parser, argv)
    s, rows = Settings(budget=args.steps), None
    if args.small:
        s, rows = s._replace(dense=1, long=1), 500
    images = data.fashion()
    begin = time.perf_counter()
    settings = {**s._asdict(), "rounds": ROUNDS, "short": SHORT, "batch": BATCH, "layers": LAYERS}
    pieces, results = report.Pieces(args, settings), {}
    names = [name for name in ROWS if args.all or name != EXACT]
    targets = SPARSITY if args.all else dict(list(SPARSITY.items())[-1:])
    found = {sparsity: {name: [] for name in names} for sparsity in targets}
    for seed in range(args.seeds):
        d = problem(images, seed, 0, rows)
        networks = dense_network(d, s, seed)
        for name in (REWIND, LONG):
            make = partial(long_rounds, d, name, s, seed, networks)
            made = pieces(f"{name}, seed {seed}", make)
            for sparsity in targets:
                found[sparsity][name].append(made[sparsity])
        for sparsity, rounds in targets.items():
            for name in names:
                if name not in (REWIND, LONG):
                    make = partial(one, d, name, s, rounds, seed, networks)
                    found[sparsity][name].append(pieces(f"{sparsity}, {name}, seed {seed}", make))
    for sparsity, made in found.items():
        results[sparsity] = {
            name: {key: [f[key] for f in made[name]] for key in ("accuracy", "epochs")}
            for name in names
        }
        print(f"\n{sparsity} of the weights pruned, over {args.seeds} seed(s)\n")
        columns = {"accuracy": "test accuracy", "epochs": "gradient-epochs"}
        print(report.table(results[sparsity], columns, better=(BIP, "accuracy")))
    left = {name: np.mean([f["left"] for f in made[name]], 0) for name in names}
    print("\nshare of each layer's weights that is left, at the last of these")
    for name in names[1:]:
        print(f"  {name:32} " + " ".join(f"{share:7.2%}" for share in left[name]))
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "pruning.svg", results)
    rows = results if len(results) > 1 else results[sparsity]
    report.save(args.out / "pruning.json", {**vars(args), **settings}, rows, seconds, left=left)


if __name__ == "__main__":
    report.run(main)
