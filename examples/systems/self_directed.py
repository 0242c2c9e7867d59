"""A learner that chooses what it learns from: weights of eight auxiliary tasks and of their
examples, from what it knows of itself, judged by its progress on a target.

    python examples/systems/self_directed.py

After Zhu, Wang and Xie, "Self-directed machine learning" (arXiv 2201.01289), of which it takes two
of five selections, tasks and data. Lower level: a network with a head for the target (three clothes
a class) and for each of eight tasks, trained on the target and on the weighted losses of the tasks.
Upper level: a weight for each task, and a network that weighs an example by what the learner is
aware of: its loss there, how sure it is, which task that is, how fast it has been learning it of
late. Judged by the target's validation loss after two more updates.

Of the eight tasks some help and some do not, and three in ten of their labels are wrong. Rows: the
target alone; all tasks at a weight of one, and at a tuned one; the best single task; a curriculum
by hand; leaving out the highest losses; who knows which tasks and labels are good; the two
selections alone and together; and the weights that were found, in a new training, as they are and
dealt to other tasks. Every row stops where validation accuracy is best.

What came out (5 seeds): .622, all tasks at a tuned weight .624, the best single task .630, the
target alone .587; who knows the good tasks and labels has .655.
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
from flax import nnx
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import report

import bilevax as bx

TASKS = (
    "mirrored clothes", "kinds of clothes", "how it is turned", "which quarter is dark",
    "digits", "photographs", "brightness", "names at random",
)  # fmt: skip
RELATED, BY_ITSELF = (0, 1), (2, 3)  # tasks of the target's own names, and tasks without names
SIDE, CLASSES, HIDDEN, AWARE = 14, 10, 64, 16
WRONG, BATCH, INNER, EVERY = 0.3, 16, 2, 20  # share of wrong labels; examples a task; updates
RATE, TASK_RATE, NET_RATE = 1e-3, 0.03, 0.003
SLOW, FAST = 0.99, 0.9  # memories of the tasks' losses
SCALES = (0.1, 0.2, 0.35, 0.6, 1.0)  # one over the temperatures
GRID = (0.1, 0.3, 1.0, 3.0)
KINDS = np.array([0, 1, 0, 2, 0, 3, 0, 3, 4, 3])  # tops, trousers, dresses, shoes, bags
ALONE, ALL, UNIFORM = "target alone", "all tasks", "all tasks, tuned weight"
SINGLE, HAND, LOW = "best single task", "curriculum by hand", "tuned weight, low losses"
KNOWN = "known good tasks and labels"
BY_TASK, BY_EXAMPLE, BOTH = "selected tasks", "selected examples", "self-directed"
FOUND, DEALT = "found weights, again", "found weights, dealt anew"
REFIT_ALONE, REFIT_ALL = "target alone, validation too", "tuned weight, validation too"
REFIT_SINGLE = "best single task, validation too"
REFIT_FOUND = "found weights, validation too"


class Sizes(NamedTuple):
    """Of a run: target's examples a class to train on and for validation, test examples, examples
    of a task; weights in the grid; whether the images are scikit-learn's digits alone; kinds of
    selection that are learned."""

    train: int = 3
    validation: int = 10
    test: int = 2000
    task: int = 1000
    grid: int = len(GRID)
    own: bool = False
    kinds: int = 3


# ---- the target and the tasks


def halved(x, side):
    """Grey images of 28 or 32, the middle 28 at half the size, (n, SIDE, SIDE) in [0, 1]."""
    x = x / np.float32(255 if x.dtype == np.uint8 else 1)
    x = x.reshape(len(x), side, side, -1).mean(-1)
    edge = (side - 2 * SIDE) // 2
    x = x[:, edge : side - edge, edge : side - edge]
    return x.reshape(len(x), SIDE, 2, SIDE, 2).mean((2, 4))


def sources(own):
    """Images and classes: clothes to train and to test on, digits, photographs."""
    if own:
        x, y = data.digits()
        x = np.kron(x.reshape(-1, 8, 8), np.ones((2, 2), np.float32))[:, 1:-1, 1:-1]
        return (x[:1000], y[:1000]), (x[1000:], y[1000:]), (x[::-1], y[::-1]), (1 - x, y)
    clothes, digits, photographs = data.fashion(), data.mnist(), data.cifar10()
    return (
        (halved(clothes.x_train, 28), clothes.y_train),
        (halved(clothes.x_test, 28), clothes.y_test),
        (halved(digits.x_train[:10_000], 28), digits.y_train[:10_000]),
        (halved(photographs.x_train, 32), photographs.y_train),
    )


def dark(x, which):
    """Images with one quarter of them black."""
    x, half = x.copy(), SIDE // 2
    for i, quarter in enumerate(which):
        top, left = half * (quarter // 2), half * (quarter % 2)
        x[i, top : top + half, left : left + half] = 0
    return x


def problem(found, seed, sizes):
    """The target's parts and the tasks, ``{"x", "y"}``; a task's label is ``right`` or drawn anew,
    as is every label of the last task."""
    rng = np.random.default_rng(seed)
    (x, y), (x_test, y_test), digits, photographs = found
    order = rng.permutation(len(y))
    rows = [order[y[order] == c][: sizes.train + sizes.validation] for c in range(CLASSES)]
    first = np.concatenate([r[: sizes.train] for r in rows])
    held = np.concatenate([r[sizes.train :] for r in rows])
    rest = np.setdiff1d(order, np.concatenate([first, held]))
    judge = rng.permutation(len(y_test))[: sizes.test]

    def some(x, y):
        at = rng.permutation(len(y))[: sizes.task]
        return x[at], y[at]

    def of_four(change):
        images, answers = some(x[rest], y[rest])[0], rng.integers(0, 4, sizes.task)
        return change(images[: len(answers)], answers[: len(images)]), answers

    turned = lambda x, by: np.stack([np.rot90(one, k) for one, k in zip(x, by, strict=True)])
    mirrored, names = some(x[rest], y[rest])
    clothes, kinds = some(x[rest], KINDS[y[rest]])
    bright = some(x[rest], y[rest])[0]
    level = bright.mean((1, 2))
    deciles = np.searchsorted(np.quantile(level, np.arange(0.1, 1, 0.1)), level)
    noise = some(x[rest], y[rest])[0]
    tasks = [
        (mirrored[:, :, ::-1], names), (clothes, kinds), of_four(turned), of_four(dark),
        some(*digits), some(*photographs), (bright, deciles),
        (noise, rng.integers(0, CLASSES, len(noise))),
    ]  # fmt: skip
    given, right = [], []
    for images, answers in tasks:
        answers = answers[: len(images)]
        anew = rng.integers(0, answers.max() + 1, len(answers))
        given.append(np.where(rng.random(len(answers)) < WRONG, anew, answers))
        right.append(given[-1] == answers)
    right[-1][:] = False
    flat = lambda x: jnp.asarray(x.reshape(*x.shape[:-2], -1), jnp.float32) - 0.3
    pick = lambda x, y, at: {"x": flat(x[at]), "y": jnp.asarray(y[at], jnp.int32)}
    return {
        "train": pick(x, y, first),
        "validation": pick(x, y, held),
        "test": pick(x_test, y_test, judge),
        "tasks": {
            "x": jnp.stack([flat(images) for images, _ in tasks]),
            "y": jnp.asarray(np.stack(given), jnp.int32),
            "right": jnp.asarray(np.stack(right)),
        },
    }


# ---- the learner


def learner(key):
    """A body for all, and a head for the target and each task."""
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) * (2 / shape[-2]) ** 0.5
    return {
        "in": normal(keys[0], SIDE * SIDE, HIDDEN),
        "mid": normal(keys[1], HIDDEN, HIDDEN),
        "bias": jnp.zeros((2, HIDDEN)),
        "heads": normal(keys[2], 1 + len(TASKS), HIDDEN, CLASSES) / 4,
    }


def body(net, x):
    x = jax.nn.relu(x @ net["in"] + net["bias"][0])
    return jax.nn.relu(x @ net["mid"] + net["bias"][1])


def target_logits(net, x):
    return body(net, x) @ net["heads"][0]


def target_loss(net, part):
    logits = target_logits(net, part["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, part["y"]))


def tempered(net, part):
    """The target's loss at the best of some temperatures: what was trained on few examples is too
    sure of itself, and would be judged by that alone."""
    logits = target_logits(net, part["x"])
    each = optax.softmax_cross_entropy_with_integer_labels
    at = [jnp.mean(each(scale * logits, part["y"])) for scale in SCALES]
    return jnp.min(jnp.stack(at))


def task_logp(net, batch):
    """Log probabilities of the tasks' examples, (tasks, n, classes)."""
    logits = jnp.einsum("tnh,thc->tnc", body(net, batch["x"]), net["heads"][1:])
    return jax.nn.log_softmax(logits)


def losses_of(logp, batch):
    return -jnp.take_along_axis(logp, batch["y"][..., None], -1)[..., 0]


# ---- self-awareness


def fresh_memory():
    """Of the tasks' mean losses, that of long ago and that of late."""
    return {
        "slow": jnp.full(len(TASKS), jnp.log(10.0)),
        "fast": jnp.full(len(TASKS), jnp.log(10.0)),
    }


def remembered(memory, losses):
    now = lax.stop_gradient(jnp.mean(losses, -1))
    mix = lambda old, share: share * old + (1 - share) * now
    return {"slow": mix(memory["slow"], SLOW), "fast": mix(memory["fast"], FAST)}


def awareness(logp, memory):
    """What the learner knows of itself, beside its loss, at each example: how unsure it is; how
    much it has learned of this task of late, and how far it is; which task it is."""
    tasks, n, _ = logp.shape
    unsure = -jnp.sum(jnp.exp(logp) * logp, -1)
    each = lambda value: jnp.broadcast_to(value[:, None], (tasks, n))
    known = [unsure, each(10 * (memory["slow"] - memory["fast"])), each(memory["fast"])]
    which = jnp.broadcast_to(jnp.eye(tasks)[:, None], (tasks, n, tasks))
    return lax.stop_gradient(jnp.concatenate([jnp.stack(known, -1), which], -1))


AWARENESS, _ = nnx.split(bx.nn.WeightNet(3 + len(TASKS), AWARE, rngs=nnx.Rngs(0)))


def weights(upper, logp, losses, memory, begin):
    """Of examples, (tasks, n): that of the task, whose mean over tasks stays what it was, times
    twice the network's, which begins at 1/2."""
    by_task = begin
    if "tasks" in upper:
        by_task = jnp.sum(begin) * jax.nn.softmax(upper["tasks"])
    out = jnp.broadcast_to(by_task[:, None], losses.shape)
    if "net" in upper:
        net, known = nnx.merge(AWARENESS, upper["net"]), awareness(logp, memory)
        flat = known.reshape(-1, known.shape[-1])
        out = out * 2 * net(losses.reshape(-1), flat).reshape(losses.shape)
    return out


def weighted_loss(net, upper, batch, memory):
    """The target, and the tasks' mean."""
    logp = task_logp(net, batch)
    losses = losses_of(logp, batch)
    by = weights(upper, logp, losses, memory, batch["begin"])
    value = target_loss(net, batch["target"]) + jnp.mean(by * losses)
    return value, remembered(memory, losses)


LOWER = bx.objective(weighted_loss, stateful=True)


def progress(net, upper, part):
    """The target's loss after the updates; what it was before does not depend on the weights."""
    return tempered(net, part)


def watched(net, upper, parts):
    hit = lambda part: jnp.mean(jnp.argmax(target_logits(net, part["x"]), -1) == part["y"])
    return {
        "validation": tempered(net, parts["validation"]),
        "held": hit(parts["validation"]),
        "test": hit(parts["test"]),
        "loss": tempered(net, parts["test"]),
    }


def drawn(tasks, key):
    """Some rows of each task."""
    rows = jax.random.randint(key, (*tasks["y"].shape[:1], BATCH), 0, tasks["y"].shape[1])
    return {name: jax.vmap(lambda a, i: a[i])(a, rows) for name, a in tasks.items()}


OPT = optax.adam(RATE, eps_root=1e-12)
UPPER = {"tasks": optax.adam(TASK_RATE), "net": optax.adam(NET_RATE)}


@partial(jax.jit, static_argnames=("names", "steps", "ahead", "upper"))
def selected(problems, begin, keys, names, steps, ahead=INNER, upper=None):
    """Both levels, all seeds side by side: the history of what is watched, and the weights of
    tasks and, at the end, of each example; and the outer variables. `upper`: their optimizer, where
    it is another."""
    transforms, every = {n: upper or UPPER[n] for n in names}, EVERY * INNER // ahead
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(OPT, ahead),
        bx.hypergradient.unrolled(),
        optax.multi_transform(transforms, {n: n for n in names}),
    )

    def one(parts, begin, key):
        net_key, run_key = jax.random.split(key)
        start = {
            "tasks": jnp.zeros(len(TASKS)),
            "net": nnx.split(bx.nn.WeightNet(3 + len(TASKS), AWARE, rngs=nnx.Rngs(0)))[1],
        }

        def draw(key, step):
            return {**drawn(parts["tasks"], key), "target": parts["train"], "begin": begin}

        solution = bx.solve_bilevel(
            LOWER,
            progress,
            learner(net_key),
            {name: start[name] for name in names},
            inner_data=draw,
            outer_data=parts["validation"],
            model_state=fresh_memory(),
            algorithm=algorithm,
            num_steps=steps + 1,  # what is watched is watched after the steps 0, every, ...
            key=run_key,
            metrics=bx.metrics(watched, parts, every=every),
            keep="last",
        )
        logp = task_logp(solution.inner_params, parts["tasks"])
        losses = losses_of(logp, parts["tasks"])
        by = weights(solution.outer_params, logp, losses, solution.model_state, begin)
        history = {name: solution.history[name][every::every] for name in watched_names}
        return history, by, solution.outer_params

    watched_names = ("validation", "held", "test", "loss")
    return jax.vmap(one)(problems, begin, keys)


@partial(jax.jit, static_argnames="steps")
def followed(problems, plans, keys, steps):
    """Training by a plan, all seeds side by side: weights (updates, tasks), a share of the highest
    losses of each task that is left out, and whether wrong labels are."""

    def one(parts, plan, key):
        net_key, run_key = jax.random.split(key)
        net = learner(net_key)

        def objective(net, batch, by):
            losses = losses_of(task_logp(net, batch), batch)
            most = jnp.quantile(lax.stop_gradient(losses), 1 - plan["dropped"], -1)[:, None]
            kept = (losses <= most) & (batch["right"] | ~plan["only_right"])
            return target_loss(net, parts["train"]) + jnp.mean(by[:, None] * kept * losses)

        def update(carry, args):
            net, state = carry
            key, by = args
            grad = jax.grad(objective)(net, drawn(parts["tasks"], key), by)
            updates, state = OPT.update(grad, state, net)
            return (optax.apply_updates(net, updates), state), None

        def some(carry, args):
            carry = lax.scan(update, carry, args)[0]
            return carry, watched(carry[0], None, parts)

        each = jax.random.split(run_key, steps * INNER).reshape(-1, EVERY * INNER)
        plan_by = plan["tasks"].reshape(-1, EVERY * INNER, len(TASKS))
        return lax.scan(some, (net, OPT.init(net)), (each, plan_by))[1]

    return jax.vmap(one)(problems, plans, keys)


# ---- rows


def plan(by_task, seeds, steps, dropped=0.0, only_right=False):
    """For all seeds; `by_task` (tasks,), (seeds, tasks), or (updates, tasks) by name."""
    by = np.asarray(by_task, np.float32)
    if by.ndim < 3:
        by = np.broadcast_to(by, (seeds, len(TASKS)))[:, None]
    by = np.broadcast_to(by, (seeds, steps * INNER, len(TASKS)))
    return {
        "tasks": jnp.asarray(by),
        "dropped": jnp.full(seeds, dropped),
        "only_right": jnp.full(seeds, only_right),
    }


def chosen(histories):
    """Of several histories ``{name: (seeds, times)}`` that of the best validation accuracy, the
    lower loss where that is equal, for each seed, and its place in time."""
    stacked = {n: np.stack([np.asarray(h[n]) for h in histories]) for n in histories[0]}
    score = stacked["held"] - 1e-6 * stacked["validation"]
    which, seeds = score.max(2).argmax(0), np.arange(score.shape[1])
    at = score[which, seeds].argmax(1)
    row = {name: value[which, seeds, at] for name, value in stacked.items()}
    return {**row, "end": stacked["test"][which, seeds, -1], "time": at}, which


def by_hand(weight, seeds, steps):
    """First what needs no names, then what has the target's, then the target alone."""
    time = np.arange(steps * INNER) / (steps * INNER)
    by = np.zeros((steps * INNER, len(TASKS)), np.float32)
    for tasks, first, last in ((BY_ITSELF, 0.0, 0.3), (RELATED, 0.2, 0.7)):
        by[np.ix_((time >= first) & (time < last), tasks)] = weight * len(TASKS) / len(tasks)
    return np.broadcast_to(by, (seeds, *by.shape))


def all_rows(problems, keys, seeds, steps, sizes):
    """Every row: what is watched where validation is best, and what was found."""
    ones, zero = np.ones(len(TASKS)), np.zeros(len(TASKS))
    grid = GRID[-sizes.grid :]
    follow = lambda by, **k: followed(problems, plan(by, seeds, steps, **k), keys, steps)
    rows, notes, say = {}, {}, lambda name: print(f"  {name}", flush=True)
    rows[ALONE], _ = chosen([follow(zero)])
    uniform = [follow(w * ones) for w in grid]
    rows[ALL], _ = chosen([uniform[grid.index(1.0) if 1.0 in grid else 0]])
    rows[UNIFORM], which = chosen(uniform)
    tuned = np.array(grid)[which]
    say(UNIFORM)
    single = len(TASKS) * np.eye(len(TASKS))[: None if sizes.grid > 1 else 2]
    rows[SINGLE], best = chosen([follow(tuned[:, None] * one) for one in single])
    notes["single"] = best
    say(SINGLE)
    rows[HAND], _ = chosen([follow(by_hand(w, seeds, steps)) for w in grid])
    rows[LOW], _ = chosen([follow(w * ones, dropped=WRONG) for w in grid])
    good = np.isin(np.arange(len(TASKS)), RELATED) * len(TASKS) / len(RELATED)
    rows[KNOWN], _ = chosen([follow(w * good, only_right=True) for w in grid])
    say(KNOWN)
    begin = jnp.asarray(tuned[:, None] * ones, jnp.float32)
    kinds = {BY_TASK: ("tasks",), BY_EXAMPLE: ("net",), BOTH: ("tasks", "net")}
    for name, names in list(kinds.items())[-sizes.kinds :]:
        history, by, _ = selected(problems, begin, keys, names, steps)
        rows[name], _ = chosen([history])
        right = np.asarray(problems["tasks"]["right"])
        by = np.asarray(by)
        mean = lambda a, where: (a * where).sum(-1) / np.maximum(where.sum(-1), 1)
        notes[name] = {
            "tasks": by.mean(-1), "right": mean(by, right), "wrong": mean(by, ~right),
            "curve": np.asarray(history["test"]), "validation": np.asarray(history["validation"]),
        }  # fmt: skip
        say(name)
    found = notes[BY_TASK if sizes.kinds > 1 else BOTH]["tasks"]
    rows[FOUND], _ = chosen([follow(found)])
    dealt = np.stack([np.random.default_rng(i).permutation(one) for i, one in enumerate(found)])
    rows[DEALT], _ = chosen([follow(dealt)])
    # For as long as validation said, since it is trained on now.
    join = lambda a, b: jnp.concatenate([a, b], 1)
    both = jax.tree.map(join, problems["train"], problems["validation"])
    joined = {**problems, "train": both}
    for name, of, by in (
        (REFIT_ALONE, ALONE, zero), (REFIT_ALL, UNIFORM, tuned[:, None] * ones),
        (REFIT_SINGLE, SINGLE, tuned[:, None] * single[best]), (REFIT_FOUND, FOUND, found),
    ):  # fmt: skip
        history = followed(joined, plan(by, seeds, steps), keys, steps)
        at = rows[of]["time"]
        pick = lambda a, at=at: np.asarray(a)[np.arange(seeds), at]
        rows[name] = {"test": pick(history["test"]), "time": at}
    notes["tuned"], notes["alone"] = tuned, np.asarray(follow(zero)["test"])
    notes["uniform"] = np.asarray(followed(
        problems, plan(tuned[:, None] * ones, seeds, steps), keys, steps)["test"])  # fmt: skip
    return {"rows": rows, "notes": notes}


def draw(path, found):
    rows, notes = found["rows"], found["notes"]
    colors = dict.fromkeys((BY_TASK, BY_EXAMPLE, BOTH, FOUND, REFIT_FOUND), report.BLUE)
    colors |= {UNIFORM: report.ORANGE, KNOWN: report.GREEN}
    with report.figure(path, 3, width=5.4, height=5.2) as (_, (left, middle, right)):
        report.bars(left, rows, "test", colors, "test accuracy on the target")
        place = np.arange(len(TASKS))
        for name, color, shift in ((BY_TASK, report.BLUE, -0.15), (BOTH, report.PURPLE, 0.15)):
            if name not in notes:
                continue
            by = np.asarray(notes[name]["tasks"]) / np.asarray(notes["tuned"])[:, None]
            for one in by:
                middle.plot(one, place + shift, "o", color=color, alpha=0.5)
            middle.plot(by.mean(0), place + shift, "|", color=color, markersize=16, label=name)
        middle.axvline(1.0, color=report.GREY)
        middle.set_yticks(place, TASKS)
        middle.invert_yaxis()
        middle.set(xlabel="weight of a task at the end, times that of all tasks")
        middle.legend()
        curves = {BOTH: notes[BOTH]["curve"], UNIFORM: notes["uniform"], ALONE: notes["alone"]}
        for (name, curve), color in zip(
            curves.items(), (report.PURPLE, report.ORANGE, report.GREY), strict=True
        ):
            mean = np.mean(curve, 0)
            right.plot(np.arange(len(mean)) * EVERY * INNER, mean, color=color, label=name)
        right.set(xlabel="updates", ylabel="test accuracy on the target")
        right.legend(loc="lower right")


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=5, steps=600), small=dict(seeds=2, steps=EVERY), pieces=True
    )
    parser.add_argument("--first", type=int, default=0, help="first seed")
    args = report.parse(parser, argv)
    sizes = Sizes(1, 1, 20, 40, 1, True, 1) if args.small else Sizes()
    settings = {
        **sizes._asdict(), "steps": args.steps, "seeds": args.seeds, "first": args.first,
        "wrong": WRONG, "batch": BATCH, "inner": INNER, "grid": GRID, "hidden": HIDDEN,
        "rates": (RATE, TASK_RATE, NET_RATE), "memories": (SLOW, FAST),
    }  # fmt: skip
    begin, images = time.perf_counter(), sources(sizes.own)
    seeds = range(args.first, args.first + args.seeds)
    parts = [problem(images, seed, sizes) for seed in seeds]
    problems = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    keys = jax.vmap(jax.random.key)(jnp.array(list(seeds)))
    pieces = report.Pieces(args, settings)
    make = partial(all_rows, problems, keys, args.seeds, args.steps, sizes)
    found = pieces("all rows", make)
    names = {"test": "test accuracy", "end": "at the end", "held": "validation"}
    print("\n" + report.table(found["rows"], names, better=(BOTH, "test")))
    print(f"\nTuned weight {found['notes']['tuned']}; best single task {found['notes']['single']}")
    for name in (name for name in (BY_TASK, BY_EXAMPLE, BOTH) if name in found["notes"]):
        note = {k: np.mean(found["notes"][name][k], 0) for k in ("tasks", "right", "wrong")}
        print(f"\n{name}: weights of tasks, of right and of wrong labels\n")
        for i, task in enumerate(TASKS):
            print(f"{task:24s}" + "  ".join(f"{note[k][i]:.3f}" for k in note))
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "self_directed.svg", found)
    path = args.out / "self_directed.json"
    report.save(path, {**vars(args), **settings}, found["rows"], seconds, notes=found["notes"])


if __name__ == "__main__":
    report.run(main)
