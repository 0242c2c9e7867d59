"""Two tasks take turns with one encoder: learn how strongly each turn is held to the one before.

    python examples/systems/interleaving.py

After Ban and Xie, "Interleaving learning, with application to neural architecture search" (arXiv
2103.07018). Four lower levels in a chain: task A, task B, task A again, task B again. Each starts
from the encoder that the one before has trained, with the head of its own task, and is pulled back
to that encoder, layer by layer. Upper level: the strengths of these pulls, and which activation
each layer has (a softmax over three), judged by the validation loss of both tasks, each with the
encoder and head of its last turn. The hypergradient is exact: every turn is unrolled, and so is
where it starts. Each step of the upper level begins at a new random encoder.

Two kinds of tasks. Related: Fashion-MNIST, upright and turned by 40 degrees. Conflicting:
Fashion-MNIST and MNIST's digits. Few examples: five a class and task to train on, ten to validate
on. Rows that are compared take the same number of steps on each task: separate networks; one
encoder trained jointly; one task after the other; turns with one pull for all, tuned on
validation. Weight decay of every row is tuned on validation as well. Test data chooses nothing.

What came out (8 seeds): conflicting tasks .665, one encoder for both .618, separate networks .661;
related ones .650, .651 and .656.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy import ndimage

import bilevax as bx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import report

TRAIN, VALIDATION, TEST, ANGLE = 5, 10, 1000, 40  # examples a class; test examples; degrees
PIXELS, HIDDEN, CLASSES, TURNS = 784, 64, 10, 4  # of which even ones are task A's
STEPS, RATE = 25, 3e-3  # of Adam in each turn
DECAYS, PULLS = (1e-4, 1e-3, 1e-2), (0.0, 1e-3, 1e-2, 1e-1)
SEPARATE, SEQUENTIAL, JOINT = "separate", "one after the other", "joint"
COMMON, LEARNED = "turns, one tuned pull", "turns, learned pulls"
BOTH = "turns, learned pulls and activations"
REFIT, REFIT_SEPARATE = "turns, learned pulls, refit on all", "separate, refit on all"
ROWS = (SEPARATE, SEQUENTIAL, JOINT, COMMON, LEARNED, BOTH, REFIT_SEPARATE, REFIT)
KINDS = {"related": "Fashion-MNIST, upright and turned", "conflicting": "Fashion-MNIST and digits"}


# ---- the network: an encoder of two layers, and a head


def fresh(key):
    keys = jax.random.split(key, 3)
    sizes = [(PIXELS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, CLASSES)]
    weights = [jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, sizes, strict=True)]
    *encoder, head = [{"w": w, "b": jnp.zeros(w.shape[1])} for w in weights]
    return {"encoder": encoder, "head": head}


def scores(net, activations, x):
    for layer, logits in zip(net["encoder"], activations, strict=True):
        z = x @ layer["w"] + layer["b"]
        x = bx.nn.soft_choice(logits, [jax.nn.relu(z), jnp.tanh(z), z])
    return x @ net["head"]["w"] + net["head"]["b"]


def cross_entropy(net, upper, batch):
    """With equal shares of the activations where they are not `free`."""
    out = scores(net, batch["free"] * upper["activations"], batch["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]))


def squares(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


# ---- a turn, as an objective and as a level


def task_loss(net, upper, batch):
    return cross_entropy(net, upper, batch) + batch["decay"] * squares(net)


def name_of(turn):
    return f"turn {turn}"


def first_turn(params, batch):
    return task_loss(params[name_of(0)], params["upper"], batch)


def later_turn(params, batch, *, turn):
    """Task loss, and a pull for each layer to the encoder of the turn before."""
    net, before, upper = params[name_of(turn)], params[name_of(turn - 1)], params["upper"]
    held = [
        jnp.exp(pull) * squares(jax.tree.map(jnp.subtract, now, then))
        for pull, now, then in zip(
            upper["pulls"][turn - 1], net["encoder"], before["encoder"], strict=True
        )
    ]
    return task_loss(net, upper, batch) + 0.5 * sum(held)


def begin(params, key, *, turn):
    """The encoder of the turn before; the head of the task's own last turn, or a new one."""
    if turn == 0:
        return fresh(key)
    head = params[name_of(turn - 2)]["head"] if turn > 1 else fresh(key)["head"]
    return {"encoder": params[name_of(turn - 1)]["encoder"], "head": head}


def validation_loss(params, batch):
    last = [params[name_of(turn)] for turn in (TURNS - 2, TURNS - 1)]
    losses = [
        cross_entropy(net, params["upper"], part) for net, part in zip(last, batch, strict=True)
    ]
    return (losses[0] + losses[1]) / 2


def levels():
    solver = bx.inner.optax(optax.adam(RATE, eps_root=1e-12), STEPS)
    turns = [
        bx.Level(
            name_of(turn),
            first_turn if turn == 0 else partial(later_turn, turn=turn),
            solver=solver,
            hypergradient=bx.hypergradient.unrolled(),
            start=partial(begin, turn=turn),
        )
        for turn in range(TURNS)
    ]
    rates = {
        "pulls": optax.adam(0.1),
        "activations": optax.adam(0.03),
    }
    top = optax.multi_transform(rates, {name: name for name in rates})
    return (*turns, bx.Level("upper", validation_loss, solver=top))


CHAIN = levels()
SOLVED = bx.value_and_multilevel_grad(CHAIN)


@partial(jax.jit, static_argnames="steps")
def learn(tasks, upper, decay, free, key, steps):
    """Upper variables from the validation loss, and the history of that loss, for all seeds."""

    def of_seed(tasks, upper, decay, key):
        train = [{**task["train"], "decay": decay, "free": free} for task in tasks]
        held = [{**task["validation"], "free": free} for task in tasks]
        solution = bx.solve_multilevel(
            CHAIN,
            {**{name_of(turn): fresh(key) for turn in range(TURNS)}, "upper": upper},
            data={
                **{name_of(turn): bx.data.full(train[turn % 2]) for turn in range(TURNS)},
                "upper": bx.data.full(held),
            },
            num_steps=steps,
            key=key,
            keep="last",
        )
        return solution.outer_params, solution.history["value"]

    return jax.vmap(of_seed)(tasks, upper, decay, key)


# ---- every row: train with given upper variables


def fit(loss, params, steps):
    opt = optax.adam(RATE)

    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (params, opt.init(params)), None, length=steps)[0][0]


def by_turns(train, upper, key):
    """Each task's network after its last turn: the levels, solved once."""
    names = [name_of(turn) for turn in range(TURNS)]
    batches = {name: train[turn % 2] for turn, name in enumerate(names)}
    params = {**dict.fromkeys(names, fresh(key)), "upper": upper}
    solved = SOLVED(params, {**batches, "upper": train}, key=key)
    return [solved.inner_params[name] for name in names[-2:]]


def separately(train, upper, key):
    steps = STEPS * TURNS // 2
    return [fit(lambda n, b=b: task_loss(n, upper, b), fresh(key), steps) for b in train]


def one_after_the_other(train, upper, key):
    steps = STEPS * TURNS // 2
    first = fit(lambda n: task_loss(n, upper, train[0]), fresh(key), steps)
    begun = {"encoder": first["encoder"], "head": fresh(key)["head"]}
    return [first, fit(lambda n: task_loss(n, upper, train[1]), begun, steps)]


def jointly(train, upper, key):
    net = fresh(key)
    both = {"encoder": net["encoder"], "heads": [net["head"], net["head"]]}
    of = lambda both: [{"encoder": both["encoder"], "head": head} for head in both["heads"]]
    loss = lambda both: sum(task_loss(n, upper, b) for n, b in zip(of(both), train, strict=True))
    return of(fit(loss, both, STEPS * TURNS // 2))


FITS = {SEPARATE: separately, SEQUENTIAL: one_after_the_other, JOINT: jointly, COMMON: by_turns}


def judged(nets, upper, tasks, part):
    """Loss and accuracy, mean over the tasks."""
    found = []
    for net, task in zip(nets, tasks, strict=True):
        out, y = scores(net, upper["activations"], task[part]["x"]), task[part]["y"]
        hit = jnp.mean((jnp.argmax(out, -1) == y).astype(jnp.float32))
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, y))
        found.append(jnp.stack([loss, hit]))
    return jnp.mean(jnp.stack(found), 0)


def rows_of(task, decay, refit=False):
    """A task's training rows, and with `refit` its validation rows as well."""
    parts = ("train", "validation") if refit else ("train",)
    joined = {name: jnp.concatenate([task[p][name] for p in parts]) for name in ("x", "y")}
    return {**joined, "decay": decay, "free": jnp.float32(1.0)}


@partial(jax.jit, static_argnames=("name", "refit"))
def evaluate(name, tasks, upper, decay, key, refit=False):
    """Validation loss and test accuracy of a row, and each task's test accuracy, for all seeds."""

    def of_seed(tasks, upper, decay, key):
        nets = FITS[name]([rows_of(task, decay, refit) for task in tasks], upper, key)
        test = [judged([n], upper, [t], "test")[1] for n, t in zip(nets, tasks, strict=True)]
        return judged(nets, upper, tasks, "validation")[0], (test[0] + test[1]) / 2, jnp.stack(test)

    return jax.vmap(of_seed)(tasks, upper, decay, key)


def uniform(pull, seeds):
    """Upper variables with one pull everywhere; as good as none for 0."""
    value = np.log(max(pull, 1e-8))
    return {
        "pulls": jnp.full((seeds, TURNS - 1, 2), value, jnp.float32),
        "activations": jnp.zeros((seeds, 2, 3)),
    }


# ---- runs


def turned(x, angle):
    x = x.reshape(-1, 28, 28)
    return ndimage.rotate(x, angle, axes=(1, 2), reshape=False, order=1).reshape(len(x), -1)


def task(x, y, x_test, y_test, rng):
    """Rows of each class for training and validation, and test rows."""
    order = rng.permutation(len(y))
    place = [order[y[order] == c][: TRAIN + VALIDATION] for c in range(CLASSES)]
    train = np.concatenate([p[:TRAIN] for p in place])
    held = np.concatenate([p[TRAIN:] for p in place])
    test = rng.permutation(len(y_test))[:TEST]
    pick = lambda x, y, at: {"x": x[at], "y": y[at]}
    return {
        "train": pick(x, y, train),
        "validation": pick(x, y, held),
        "test": pick(x_test, y_test, test),
    }


def problem(kind, fashion, digits, seed):
    rng = np.random.default_rng(100 + seed)
    first = task(*fashion, rng)
    other = task(*(fashion if kind == "related" else digits), rng)
    if kind == "related":
        for part in other.values():
            part["x"] = turned(part["x"], ANGLE)
    return [first, other]


def one(kind, fashion, digits, seeds, steps, refit):
    """All rows of one kind of tasks, all seeds side by side."""
    found = [problem(kind, fashion, digits, seed) for seed in seeds]
    tasks = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(v) for v in a]), *found)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    count, results, extra = len(seeds), {}, {}
    chosen, decays, pulls = {}, DECAYS, PULLS
    if not refit:  # a small run
        decays, pulls = DECAYS[:2], PULLS[:2]
    for name in FITS:
        tried = []
        for pull in pulls if name == COMMON else pulls[:1]:
            for decay in decays:
                upper = uniform(pull, count)
                out = evaluate(name, tasks, upper, jnp.full(count, decay, jnp.float32), keys)
                tried.append((np.full(count, pull), np.full(count, decay), *map(np.asarray, out)))
        best = np.argmin([t[2] for t in tried], 0)
        pick = lambda i, tried=tried, best=best: np.stack(
            [tried[b][i][s] for s, b in enumerate(best)]
        )
        chosen[name] = pick(0), jnp.asarray(pick(1), jnp.float32)
        results[name] = columns(pick(3), pick(4))
    pull, decay = chosen[COMMON]
    starts = [uniform(max(p, PULLS[1]), 1) for p in pull]
    upper = jax.tree.map(lambda *a: jnp.concatenate(a), *starts)
    for name in (LEARNED, BOTH):
        other = jax.vmap(jax.random.fold_in, (0, None))(keys, 7)
        learned, values = learn(tasks, upper, decay, jnp.float32(name == BOTH), other, steps)
        _, test, each = evaluate(COMMON, tasks, learned, decay, keys)
        results[name] = columns(test, each)
        extra[name] = {**learned, "value": values}
    if refit:
        separate, turns = uniform(0.0, count), {k: extra[LEARNED][k] for k in upper}
        for name, of, upper in ((REFIT_SEPARATE, SEPARATE, separate), (REFIT, COMMON, turns)):
            _, test, each = evaluate(of, tasks, upper, chosen[of][1], keys, refit=True)
            results[name] = columns(test, each)
    rows = {name: results[name] for name in ROWS if name in results}
    return {"rows": rows, "common pull": pull, **extra}


def columns(test, each):
    each = np.asarray(each)
    return {"test": np.asarray(test), "task A": each[:, 0], "task B": each[:, 1]}


def draw(path, found):
    colors = {LEARNED: report.BLUE, BOTH: report.SKY, COMMON: report.ORANGE, JOINT: report.GREEN}
    with report.figure(path, 3, width=5.2, height=4.6) as (_, axes):
        for ax, (kind, result) in zip(axes, found.items(), strict=False):
            report.bars(ax, result["rows"], "test", colors, "test accuracy, mean of both tasks")
            ax.set_title(KINDS[kind])
        labels = ["A to B", "B to A", "A to B again"]
        for kind, color, shift in zip(
            found, (report.BLUE, report.ORANGE), (-0.12, 0.12), strict=False
        ):
            pulls = np.exp(np.asarray(found[kind][LEARNED]["pulls"]))
            for layer, marker in ((0, "o"), (1, "s")):
                low, middle, high = np.quantile(pulls[:, :, layer], [0.25, 0.5, 0.75], axis=0)
                axes[2].errorbar(
                    np.arange(len(labels)) + shift + 0.05 * layer,
                    middle,
                    yerr=[middle - low, high - middle],
                    fmt=marker,
                    color=color,
                    label=f"{kind}, layer {layer + 1}",
                )
        axes[2].set_yscale("log")
        axes[2].set_xticks(range(len(labels)), labels)
        axes[2].set(ylabel="learned pull", title="Pulls, median and quartiles over seeds")
        axes[2].set_ylim(bottom=1e-5)  # room for the legend
        axes[2].legend(loc="lower left")


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=8, steps=40), small=dict(seeds=1, steps=2), pieces=True
    )
    args = report.parse(parser, argv)
    fashion, digits = data.fashion(), data.mnist()
    begin = time.perf_counter()
    settings = {
        "steps": args.steps, "seeds": args.seeds, "train": TRAIN, "validation": VALIDATION,
        "turn": STEPS, "rate": RATE, "decays": DECAYS, "pulls": PULLS,
    }  # fmt: skip
    pieces, found = report.Pieces(args, settings), {}
    for kind, what in KINDS.items():
        make = partial(one, kind, fashion, digits, range(args.seeds), args.steps, not args.small)
        found[kind] = pieces(kind, make)
        print(f"\n{what}: test accuracy, mean ± standard error over {args.seeds} seed(s)\n")
        names = {"test": "mean of both", "task A": "task A", "task B": "task B"}
        print(report.table(found[kind]["rows"], names, better=(LEARNED, "test")))
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "interleaving.svg", found)
    report.save(
        args.out / "interleaving.json",
        {**vars(args), **settings},
        {kind: result["rows"] for kind, result in found.items()},
        seconds,
        learned={
            kind: {name: result[name] for name in (LEARNED, BOTH)} for kind, result in found.items()
        },
        common={kind: result["common pull"] for kind, result in found.items()},
    )


if __name__ == "__main__":
    report.run(main)
