"""One network from five that were finetuned apart: coefficients of their differences from the
network that they began from, learned without labels or by validation; and soups.

    python examples/systems/merging.py

After Yang et al., "AdaMerging: adaptive model merging for multi-task learning" (ICLR 2024, arXiv
2310.02575) and Wortsman et al., "Model soups" (ICML 2022, arXiv 2203.05482). A network pretrained
on a few examples of five tasks is finetuned on each of them alone, its heads fixed. Merged: the
pretrained weights and a sum of the differences, with a coefficient a task, or a task and layer.
They minimise the entropy of the merged network's predictions, on the test's own inputs or on
others, or the loss on validation, as it is or with the scale of the predictions taken out. There
is no lower level: the finetuned networks stand still.

Rows: the pretrained network; the mean of the finetuned ones; one coefficient for all by a grid on
validation; the learned coefficients; and what they are to come near to, one network trained on all
tasks together and five networks. Then soups of eight networks finetuned on one task.

What came out (5 seeds): by layer, on validation at the best temperature, .574, one coefficient
.540, pretrained .514; by the plain loss .542, by entropy .544 at best; trained together .752. A
learned soup .788, the best of eight .796.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import report

import bilevax as bx

TASKS = ("digits", "turned digits", "clothes", "clothes upside down", "photographs")
SIDE, CLASSES, WIDTHS = 14, 10, (200, 200, 200, 100)
LAYERS, SOUP, SOUP_TASK = len(WIDTHS), 8, 2
BATCH, ASKED, FINE = (
    50,
    32,
    3e-4,
)  # examples of a task, in training and of a step of coefficients; rate
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of coefficients, tried on validation
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)  # that logits are multiplied by
SHARPNESS = 3.0  # of predictions whose scale was taken out: logits of that spread
GRID = tuple(np.linspace(0.05, 1.0, 20).tolist())
PRETRAINED, UNIFORM, TUNED = "pretrained", "mean", "one coefficient, grid"
JOINT, APART = "trained jointly", "five networks"
BY_TASK, BY_LAYER = "by task", "by layer"
KINDS = ((BY_TASK, 1), (BY_LAYER, LAYERS))
ENTROPY, OTHERS, LABELS = "entropy of test inputs", "entropy of others", "validation loss"
UNSCALED, SCALED = "entropy of others, scale taken out", "validation loss, best temperature"
SEARCH = "search of accuracy, by layer"
BEST, MEAN_SOUP, GREEDY = "best of eight", "mean of eight", "greedy soup"
LEARNED, LEARNED_LAYER, ENSEMBLE = "learned soup", "learned soup, by layer", "ensemble"


class Sizes(NamedTuple):
    """Of a run: examples of a task to pretrain on, to finetune on, to validate on, without labels,
    to test on; training steps of either kind; rates and kinds of coefficients that are tried."""

    few: int = 50
    train: int = 2000
    validation: int = 500
    unlabelled: int = 1000
    test: int = 1000
    pretraining: int = 300
    finetuning: int = 400
    rates: int = len(RATES)
    kinds: int = len(KINDS)


# ---- five tasks


def images(x, side):
    """Grey images of 28 or 32, the middle 28 at half the size, (n, SIDE, SIDE) in [0, 1]."""
    x = x / np.float32(255 if x.dtype == np.uint8 else 1)
    x = x.reshape(len(x), side, side, -1).mean(-1)
    edge = (side - 2 * SIDE) // 2
    x = x[:, edge : side - edge, edge : side - edge]
    return x.reshape(len(x), SIDE, 2, SIDE, 2).mean((2, 4))


def tasks(seed, sizes):
    """Parts by name, each ``{"x": (tasks, n, pixels), "y": (tasks, n)}``."""
    turn = lambda x: np.rot90(x, axes=(1, 2))
    flip = lambda x: x[:, ::-1]
    keep = lambda x: x
    sources = [(data.mnist, 28, keep), (data.mnist, 28, turn), (data.fashion, 28, keep),
               (data.fashion, 28, flip), (data.cifar10, 32, keep)]  # fmt: skip
    rng, found = np.random.default_rng(seed), []
    counts = {"few": sizes.few, "train": sizes.train, "validation": sizes.validation,
              "unlabelled": sizes.unlabelled}  # fmt: skip
    for source, side, change in sources:
        d = source()
        order = rng.permutation(len(d.x_train))[: sum(counts.values())]
        pieces = np.split(order, np.cumsum(list(counts.values()))[:-1])
        parts = {name: (d.x_train[i], d.y_train[i]) for name, i in zip(counts, pieces, strict=True)}
        judge = rng.permutation(len(d.x_test))[: sizes.test]
        parts["test"] = (d.x_test[judge], d.y_test[judge])
        found.append({name: (change(images(x, side)), y) for name, (x, y) in parts.items()})
    stack = lambda name, i: np.stack([one[name][i] for one in found])
    return {
        name: {
            "x": jnp.asarray(stack(name, 0).reshape(len(TASKS), -1, SIDE * SIDE)) - 0.3,
            "y": jnp.asarray(stack(name, 1)),
        }
        for name in found[0]
    }


# ---- networks


def network(key):
    """A body that the tasks share, and a head for each."""
    sizes, keys = (SIDE * SIDE, *WIDTHS), jax.random.split(key, LAYERS + 1)
    normal = lambda key, *shape: jax.random.normal(key, shape) * (2 / shape[-2]) ** 0.5
    layers = [
        {"w": normal(k, a, b), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]
    heads = normal(keys[-1], len(TASKS), WIDTHS[-1], CLASSES) / 4
    return {"body": layers, "heads": heads}


def logits(body, head, x):
    for layer in body:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ head


def loss(body, head, batch):
    found = logits(body, head, batch["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, batch["y"]))


def accuracy(body, head, batch):
    return jnp.mean(jnp.argmax(logits(body, head, batch["x"]), -1) == batch["y"])


def drawn(part, count, key):
    """Some rows of each task."""
    rows = jax.random.randint(key, (len(TASKS), count), 0, part["y"].shape[1])
    return {name: jax.vmap(jnp.take, (0, 0, None))(a, rows, 0) for name, a in part.items()}


def trained(params, objective, draw, rate, steps, key):
    """Adam with a rate that falls to zero; a draw of a batch for each step."""

    def step(carry, args):
        params, state = carry
        key, scale = args
        updates, state = optax.scale_by_adam().update(
            jax.grad(objective)(params, draw(key)), state, params
        )
        move = lambda p, u: p - rate * scale * u
        return (jax.tree.map(move, params, updates), state), None

    scales = 0.5 + 0.5 * jnp.cos(jnp.pi * jnp.arange(steps) / steps)
    begin = params, optax.scale_by_adam().init(params)
    return lax.scan(step, begin, (jax.random.split(key, steps), scales))[0][0]


@partial(jax.jit, static_argnames=("steps", "batch"))
def together(params, part, rate, key, steps, batch):
    """All tasks by one body, and its heads."""
    each = jax.vmap(loss, (None, 0, 0))
    objective = lambda p, batch: jnp.mean(each(p["body"], p["heads"], batch))
    return trained(params, objective, partial(drawn, part, batch), rate, steps, key)


@partial(jax.jit, static_argnames="steps")
def apart(params, part, rates, key, steps):
    """A body for each task and rate, its head fixed: (tasks, ...) each array."""

    def one(task, head, rate, key):
        def draw(key):
            rows = jax.random.randint(key, (BATCH,), 0, len(task["y"]))
            return {name: a[rows] for name, a in task.items()}

        objective = lambda body, batch: loss(body, head, batch)
        return trained(params["body"], objective, draw, rate, steps, key)

    return jax.vmap(one)(part, params["heads"], rates, jax.random.split(key, len(rates)))


# ---- merging


def merged(base, differences, coefficients):
    """The base and a sum of differences; coefficients (differences, layers)."""
    return [
        {name: base[i][name] + jnp.tensordot(coefficients[:, i], layer[name], 1) for name in layer}
        for i, layer in enumerate(differences)
    ]


def by_layer(coefficients):
    """A coefficient a task is one for each of its layers."""
    return jnp.broadcast_to(coefficients, (coefficients.shape[0], LAYERS))


def entropy(body, head, batch):
    """Of the predictions: needs no label."""
    return spread_of(logits(body, head, batch["x"]))


def spread_of(logits):
    """The mean entropy of a softmax."""
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(logp) * logp, -1))


def entropy_unscaled(body, head, batch):
    """With the spread of a batch's logits given: to be sure by larger numbers gains nothing."""
    found = logits(body, head, batch["x"])
    return spread_of(SHARPNESS * found / jnp.std(found))


def loss_at_best_temperature(body, head, batch):
    """What accuracy does not see, how sure the predictions are, is chosen anew each time."""
    found = logits(body, head, batch["x"])
    at = lambda t: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(t * found, batch["y"]))
    return jnp.min(jax.vmap(at)(jnp.array(TEMPERATURES)))


def minimized(objective, start, data, rate, steps, key):
    """Where the outer objective falls to by Adam; there is nothing to solve below it."""
    solution = bx.solve_bilevel(
        lambda nothing, outer, batch: 0.5 * nothing**2,
        objective,
        jnp.zeros(()),
        start,
        outer_data=data,
        algorithm=bx.algorithms.double_loop(
            bx.inner.optax(optax.sgd(1.0), 1),
            bx.hypergradient.one_step(),
            bx.tunable(optax.adam, learning_rate=rate),
        ),
        num_steps=steps,
        key=key,
        keep="last",
    )
    return solution.outer_params


def coefficients_of(models, objective, part, start, rate, steps, key):
    """What minimises the mean of the objective over tasks, with the merged body in all of them."""
    base, differences, heads = models
    each = jax.vmap(objective, (None, 0, 0))

    def over_tasks(nothing, coefficients, batch):
        return jnp.mean(each(merged(base, differences, by_layer(coefficients)), heads, batch))

    return minimized(over_tasks, start, lambda key, step: drawn(part, ASKED, key), rate, steps, key)


@partial(jax.jit, static_argnames=("objective", "steps", "layers"))
def learned(models, objective, part, begin, rates, key, steps, layers):
    """Coefficients for each rate, side by side; all begin at one number."""
    start = jnp.full((len(TASKS), layers), begin)
    one = lambda rate: coefficients_of(models, objective, part, start, rate, steps, key)
    return jax.vmap(one)(rates)


@jax.jit
def judged(models, coefficients, part):
    """Accuracy of each task, by sets of coefficients."""
    base, differences, heads = models
    each = jax.vmap(accuracy, (None, 0, 0))
    one = lambda c: each(merged(base, differences, by_layer(c)), heads, part)
    return lax.map(one, coefficients)


def searched(accuracy, begin):
    """Without any gradient: one coefficient after the other, whatever accuracy is best at, in
    falling steps."""
    found = np.full((len(TASKS), LAYERS), begin, np.float32)
    best = accuracy(found[None])[0]
    for by in (0.1, 0.1, 0.05, 0.05):
        for place in np.ndindex(found.shape):
            tried = np.repeat(found[None], 4, 0)
            tried[(slice(None), *place)] += by * np.array([-2, -1, 1, 2])
            hits = accuracy(tried)
            if hits.max() > best:
                best, found = hits.max(), tried[int(hits.argmax())]
    return found


# ---- soups


def soup_of(ingredients, head, part, layers, rate, steps, key):
    """Shares of the ingredients, a softmax, by the loss on validation."""
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape[1:]), ingredients)
    shares = lambda free: by_layer(jax.nn.softmax(free, 0))

    def validation(nothing, free, batch):
        return loss(merged(zero, ingredients, shares(free)), head, batch)

    found = minimized(
        validation,
        jnp.zeros((SOUP, layers)),
        bx.data.minibatches(part, min(ASKED, len(part["y"]))),
        rate,
        steps,
        key,
    )
    return shares(found)


def greedy(hits):
    """Take ingredients by their own accuracy, each if the mean with it is no worse. `hits`: from a
    list of ingredients to accuracy."""
    order = sorted(range(SOUP), key=lambda i: -hits([i]))
    taken = [order[0]]
    for i in order[1:]:
        if hits([*taken, i]) >= hits(taken):
            taken.append(i)
    return taken


def soups(params, parts, seed, steps, sizes):
    """Eight networks of one task, by rate and order of the data, and their soups."""
    task = {name: jax.tree.map(lambda a: a[SOUP_TASK], part) for name, part in parts.items()}
    head = params["heads"][SOUP_TASK]
    copies = jax.tree.map(lambda a: jnp.repeat(a[None], SOUP, 0), task["train"])
    heads = jnp.repeat(head[None], SOUP, 0)
    rates = jnp.geomspace(FINE / 3, FINE * 3, SOUP)
    key = jax.random.key(seed + 2000)
    found = apart({"body": params["body"], "heads": heads}, copies, rates, key, sizes.finetuning)
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape[1:]), found)

    @jax.jit
    def hits(shares, part):
        return accuracy(merged(zero, found, shares), head, part)

    def of(taken, part="validation"):
        shares = jnp.zeros(SOUP).at[jnp.array(taken)].set(1 / len(taken))
        return float(hits(by_layer(shares[:, None]), task[part]))

    taken = greedy(of)
    out = {
        BEST: of(taken[:1], "test"),
        MEAN_SOUP: of(list(range(SOUP)), "test"),
        GREEDY: of(taken, "test"),
    }
    for name, layers in ((LEARNED, 1), (LEARNED_LAYER, LAYERS))[: sizes.kinds]:
        make = jax.jit(
            lambda rate, layers=layers: soup_of(
                found, head, task["validation"], layers, rate, steps, key
            )
        )
        tried = [make(jnp.float32(rate)) for rate in RATES[: sizes.rates]]
        best = max(tried, key=lambda shares: float(hits(shares, task["validation"])))
        out[name] = float(hits(best, task["test"]))
    x, y = task["test"]["x"], task["test"]["y"]
    mean = jnp.mean(jax.nn.softmax(jax.vmap(logits, (0, None, None))(found, head, x)), 0)
    out[ENSEMBLE] = float(jnp.mean(jnp.argmax(mean, -1) == y))
    return out


# ---- runs


def one_seed(seed, steps, sizes):
    """Accuracy of each row and task in test, the coefficients, and the soups."""
    parts = tasks(seed, sizes)
    keys = jax.random.split(jax.random.key(seed), 4)
    params = together(
        network(keys[0]), parts["few"], 1e-3, keys[1], sizes.pretraining, min(BATCH, sizes.few)
    )
    rates = jnp.full(len(TASKS), FINE)
    bodies = apart(params, parts["train"], rates, keys[2], sizes.finetuning)
    base, heads = params["body"], params["heads"]
    models = base, jax.tree.map(lambda a, b: a - b, bodies, base), heads
    best = lambda tried: int(np.argmax(np.mean(judged(models, tried, parts["validation"]), 1)))
    test = lambda c: np.asarray(judged(models, c[None], parts["test"])[0])
    each = jax.jit(jax.vmap(accuracy, (0, 0, 0)))
    grid = jnp.array([[[c]] * len(TASKS) for c in GRID])
    chosen = {TUNED: GRID[best(grid)]}
    out = {
        PRETRAINED: test(0 * grid[0]),
        UNIFORM: test(jnp.full((len(TASKS), 1), 1 / len(TASKS))),
        TUNED: test(grid[best(grid)]),
    }
    curve = np.mean(judged(models, grid, parts["test"]), 1)
    objectives = {ENTROPY: (entropy, "test"), OTHERS: (entropy, "unlabelled"),
                  UNSCALED: (entropy_unscaled, "unlabelled"), LABELS: (loss, "validation"),
                  SCALED: (loss_at_best_temperature, "validation")}  # fmt: skip
    for name, (objective, part) in objectives.items():
        for kind, layers in KINDS[-sizes.kinds :]:
            tried = learned(
                models, objective, parts[part], chosen[TUNED], jnp.array(RATES[: sizes.rates]),
                keys[3], steps, layers,
            )  # fmt: skip
            row = f"{name}, {kind}"
            chosen[row] = np.asarray(tried[best(tried)])
            out[row] = test(tried[best(tried)])
            out[f"{row}: rate"] = [RATES[best(tried)]]
    if sizes.kinds > 1:
        mean = lambda tried: np.mean(judged(models, jnp.asarray(tried), parts["validation"]), 1)
        chosen[SEARCH] = searched(mean, chosen[TUNED])
        out[SEARCH] = test(jnp.asarray(chosen[SEARCH]))
    all_steps = len(TASKS) * sizes.finetuning
    joint = together(params, parts["train"], 1e-3, keys[2], all_steps, BATCH // len(TASKS))
    same = jax.tree.map(lambda a: jnp.repeat(a[None], len(TASKS), 0), joint["body"])
    out[JOINT] = each(same, joint["heads"], parts["test"])
    out[APART] = each(bodies, heads, parts["test"])
    rates = {name: out.pop(name)[0] for name in list(out) if name.endswith(": rate")}
    made = soups(params, parts, seed, steps, sizes)
    return {"test": out, "chosen": chosen, "curve": curve, "rates": rates, "soups": made}


def table_of(found):
    """Mean accuracy over tasks, and of each task, by seed; then the soups."""
    rows = {}
    for name in found[0]["test"]:
        by_task = np.array([one["test"][name] for one in found])
        each = {task: by_task[:, i].tolist() for i, task in enumerate(TASKS)}
        rows[name] = {"mean": by_task.mean(1).tolist(), **each}
    return rows


def soups_of(found):
    return {name: {"test": [one["soups"][name] for one in found]} for name in found[0]["soups"]}


def draw(path, found):
    rows = table_of(found)
    colors = {TUNED: report.ORANGE, JOINT: report.GREEN, APART: report.GREEN}
    colors |= {n: report.BLUE if LABELS in n else report.PURPLE for n in rows if ", by" in n}
    with report.figure(path, 3, width=5.2, height=5.0) as (_, (left, middle, right)):
        report.bars(left, rows, "mean", colors, "accuracy, mean of five tasks")
        for one in found:
            middle.plot(GRID, one["curve"], color=report.ORANGE, alpha=0.6)
        middle.set(xlabel="one coefficient for all", ylabel="accuracy, mean of five tasks")
        shades = {LEARNED: report.BLUE, LEARNED_LAYER: report.BLUE, ENSEMBLE: report.GREEN}
        report.bars(
            right, soups_of(found), "test", shades, f"accuracy, soups of {TASKS[SOUP_TASK]}"
        )


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=5, steps=200), small=dict(seeds=1, steps=2), pieces=True
    )
    args = report.parse(parser, argv)
    sizes = Sizes(10, 20, 10, 10, 10, 2, 2, 1, 1) if args.small else Sizes()
    settings = {
        **sizes._asdict(), "steps": args.steps, "tasks": TASKS, "widths": WIDTHS, "batch": BATCH,
        "asked": ASKED, "fine": FINE, "rates": RATES, "temperatures": TEMPERATURES,
        "sharpness": SHARPNESS, "grid": GRID, "soup": SOUP,
    }  # fmt: skip
    begin = time.perf_counter()
    pieces = report.Pieces(args, settings)
    found = [
        pieces(f"seed {seed}", partial(one_seed, seed, args.steps, sizes))
        for seed in range(args.seeds)
    ]
    rows, soup = table_of(found), soups_of(found)
    print("\n" + report.table(rows, {"mean": "mean", **{t: t for t in TASKS}}))
    above = report.table(rows, {"mean": "mean"}, better=(f"{SCALED}, {BY_LAYER}", "mean"))
    print("\n" + above + "\n\n" + report.table(soup, {"test": "test"}, better=(LEARNED, "test")))
    print(f"\nOne coefficient: {[one['chosen'][TUNED] for one in found]}")
    for name in found[0]["rates"]:
        print(f"{name}: rates {[one['rates'][name] for one in found]}")
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "merging.svg", found)
    path = args.out / "merging.json"
    report.save(path, {**vars(args), **settings}, rows, seconds, soups=soup, seeds=found)


if __name__ == "__main__":
    report.run(main)
