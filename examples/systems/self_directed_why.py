"""Why does a learner that chooses its tasks (self_directed.py) find nothing? What judges it, and
how far it looks ahead, each changed alone.

    python examples/systems/self_directed_why.py

Weights of tasks only. The learner is judged by a hundred validation images or by a thousand, after
two or twenty updates; nobody trains on them. Every run has 1,200 updates, and the weights'
rate grows as their steps get fewer. The uniform weight, and that of the two related tasks, are
tuned, and every row is stopped, by the same validation images.

Then what the weights' derivative should have been: that of the target's test loss over the second
half of a training, by differences of whole trainings with one task's weight larger and smaller;
beside the mean of the hypergradients that the learner sees along a training at a weight of one.
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
import self_directed as own

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report

CELLS = ((10, 2), (10, 20), (100, 2), (100, 20))  # images a class that judge, updates ahead
TOLD = ((10, 2), (100, 2), (100, 20))  # where the hypergradients themselves are looked at
DELTA = 1.0  # a task's logit, up and down
STILL = optax.sgd(1e-6)  # the weights stay, and their change is the sum of what they were told
GOOD, UNIFORM, KNOWN = "related two tasks", own.UNIFORM, own.KNOWN
TASKS = len(own.TASKS)
ADAM = {ahead: optax.adam(own.TASK_RATE * ahead / own.INNER) for _, ahead in CELLS}


def judged_by(problems, many):
    """The same problems with fewer images a class that judge; the tasks stay."""

    def some(a):
        rows = a.reshape(a.shape[0], own.CLASSES, -1, *a.shape[2:])[:, :, :many]
        return rows.reshape(a.shape[0], -1, *a.shape[2:])

    return {**problems, "validation": jax.tree.map(some, problems["validation"])}


def steps_of(updates, ahead):
    return updates // ahead


def given(problems, keys, steps):
    """Rows whose weights are given, and the uniform one that was tuned."""
    seeds, ones = len(keys), np.ones(TASKS)
    follow = lambda by, **k: own.followed(problems, own.plan(by, seeds, steps, **k), keys, steps)
    good = np.isin(np.arange(TASKS), own.RELATED) * TASKS / len(own.RELATED)
    rows, tuned = {}, None
    for name, by, keywords in (
        (UNIFORM, ones, {}),
        (GOOD, good, {}),
        (KNOWN, good, {"only_right": True}),
    ):
        rows[name], which = own.chosen([follow(w * by, **keywords) for w in own.GRID])
        tuned = np.array(own.GRID)[which] if tuned is None else tuned
    return {"rows": rows, "tuned": tuned}


def learned(problems, keys, tuned, ahead, updates):
    """Selected tasks, and their weights in a new training."""
    begin = jnp.asarray(np.asarray(tuned)[:, None] * np.ones(TASKS), jnp.float32)
    history, by, _ = own.selected(
        problems, begin, keys, ("tasks",), steps_of(updates, ahead), ahead, ADAM[ahead]
    )
    by, steps = np.asarray(by).mean(-1), updates // own.INNER
    again = own.followed(problems, own.plan(by, len(keys), steps), keys, steps)
    return {
        "row": own.chosen([history])[0],
        "again": own.chosen([again])[0],
        "share": by / by.sum(-1, keepdims=True),
    }


def told(problems, keys, ahead, updates):
    """Mean hypergradient (seeds, tasks) along a training at a weight of one."""
    steps, begin = steps_of(updates, ahead), jnp.ones((len(keys), TASKS))
    _, _, end = own.selected(problems, begin, keys, ("tasks",), steps, ahead, STILL)
    return -np.asarray(end["tasks"]) / 1e-6 / (steps + 1)


def oracle(problems, keys, steps):
    """Derivative (seeds, tasks) of the test loss over the second half of a training."""
    seeds, out = len(keys), []
    follow = lambda by: own.followed(problems, own.plan(by, seeds, steps), keys, steps)["loss"]
    for task in np.eye(TASKS):
        ends = []
        for sign in (1, -1):
            by = TASKS * np.asarray(jax.nn.softmax(sign * DELTA * task))
            loss = np.asarray(follow(by))
            ends.append(loss[:, loss.shape[1] // 2 :].mean(1))
        out.append((ends[0] - ends[1]) / (2 * DELTA))
    return np.stack(out, -1)


def agreement(seen, should):
    """Of two derivatives (seeds, tasks), their means over tasks taken off, since weights are
    shares: correlation over tasks, a seed each and of the means, and how often signs agree."""
    seen, should = (np.asarray(a) - np.mean(a, -1, keepdims=True) for a in (seen, should))
    of = lambda a, b: float(np.corrcoef(a, b)[0, 1])
    return {
        "each": [of(a, b) for a, b in zip(seen, should, strict=True)],
        "means": of(seen.mean(0), should.mean(0)),
        "signs": np.mean(np.sign(seen) == np.sign(should), -1),
        "between seeds": float(
            np.mean([of(seen[i], seen[j]) for i in range(len(seen)) for j in range(i)])
        ),
    }


def draw(path, rows, seen, should):
    with report.figure(path, 2, width=5.4, height=4.6) as (_, (left, right)):
        report.bars(left, rows, "test", {}, "test accuracy on the target")
        place = np.arange(TASKS)
        scaled = lambda a: np.mean(a, 0) / np.std(np.mean(a, 0))
        for name, color in zip(
            seen, (report.SKY, report.BLUE, report.PURPLE, report.RED), strict=False
        ):
            right.plot(-scaled(seen[name]), place, "o", color=color, label=name, alpha=0.8)
        right.plot(-scaled(should), place, "k|", markersize=18, label="over a whole training")
        right.axvline(0.0, color=report.GREY)
        right.set_yticks(place, own.TASKS)
        right.invert_yaxis()
        right.set(xlabel="how much it helps, by derivative")
        right.legend(fontsize=7)


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=5, steps=600), small=dict(seeds=2, steps=40), pieces=True
    )
    parser.add_argument("--first", type=int, default=20, help="first seed")
    args = report.parse(parser, argv)
    cells, listened = (((1, 2),), ((1, 2),)) if args.small else (CELLS, TOLD)
    judges = sorted({many for many, _ in cells})
    sizes = own.Sizes(1, 1, 20, 40, own=True) if args.small else own.Sizes(validation=judges[-1])
    updates = args.steps * own.INNER
    settings = {
        **sizes._asdict(), "steps": args.steps, "seeds": args.seeds, "first": args.first,
        "judges": judges, "delta": DELTA, "rate": own.TASK_RATE, "rates": own.RATE,
    }  # fmt: skip
    begin, images = time.perf_counter(), own.sources(sizes.own)
    seeds = range(args.first, args.first + args.seeds)
    parts = [own.problem(images, seed, sizes) for seed in seeds]
    problems = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    keys = jax.vmap(jax.random.key)(jnp.array(list(seeds)))
    pieces = report.Pieces(args, settings)
    rows, found, seen, agree = {}, {}, {}, {}
    should = pieces("oracle", partial(oracle, problems, keys, args.steps))
    called = lambda many: f"{own.CLASSES * many} judges"
    for many in judges:
        name, judged = called(many), judged_by(problems, many)
        fixed = pieces(name, partial(given, judged, keys, args.steps))
        rows |= {f"{row}, {name}": one for row, one in fixed["rows"].items()}
        found[name] = {"tuned": fixed["tuned"]}
        for k in (k for of, k in cells if of == many):
            cell = f"{name}, {k} ahead"
            learn = partial(learned, judged, keys, fixed["tuned"], k, updates)
            found[cell] = pieces(cell, learn)
            rows[f"selected, {cell}"] = found[cell].pop("row")
            rows[f"found weights again, {cell}"] = found[cell].pop("again")
        here = {row: one for row, one in rows.items() if f", {name}" in row}
        better = (f"{UNIFORM}, {name}", "test")
        print("\n" + report.table(here, {"test": "test accuracy"}, better=better))
    for many, k in listened:
        cell = f"{called(many)}, {k} ahead"
        listen = partial(told, judged_by(problems, many), keys, k, updates)
        seen[cell] = pieces(f"{cell}, told", listen)
        agree[cell] = agreement(seen[cell], should)
    mean = lambda a: np.mean(a, 0).round(4).tolist()
    print(
        f"\nDerivative of the test loss, by differences: {mean(should)}\nWhat the learner is told:"
    )
    for cell in seen:
        print(f"{cell}: {mean(seen[cell])}\n  {agree[cell]}")
    for cell, one in found.items():
        if "share" in one:
            one["related"] = np.asarray(one["share"])[:, list(own.RELATED)].sum(-1)
            print(f"{cell}: share of the related two {one['related'].round(2)}")
    seconds = time.perf_counter() - begin
    draw(args.out / "self_directed_why.svg", rows, seen, should)
    more = {"found": found, "told": seen, "differences": should, "agreement": agree}
    path = args.out / "self_directed_why.json"
    report.save(path, {**vars(args), **settings}, rows, seconds, **more)
    print(f"{seconds:.0f} s in all.")


if __name__ == "__main__":
    report.run(main)
