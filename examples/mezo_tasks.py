"""What MeZO is tried on: the last layer of SmolLM2-135M on SST-2, asked for the next word, and the
top two layers of MiniLM and a head on TREC. A model says how it is moved along a direction layer by
layer; what moving is, it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import data
import encoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import smollm
from flax import nnx
from jax import lax

import bilevax as bx

BATCH, RANK = 16, 8
LENGTH, BEFORE, BEHIND = 28, "Review: ", "\nSentiment:"
ANSWERS = " negative", " positive"
QUESTION, KINDS, MINILM_LAYERS = 16, 6, 6  # tokens of a question, its kinds
ALL, LORA, ZERO = "all", "adapters", "adapters, from a head of zeros"
SMOL, MINI = "SmolLM2 on SST-2", "MiniLM on TREC"


class Start(NamedTuple):
    """What is learned of a model, what is not, and ``logits(params, frozen, batch, direction,
    move)``, of the parameters ``move(params, direction)`` if there is a direction."""

    logits: Callable
    params: Any
    frozen: Any


class Task(NamedTuple):
    """Training, validation and test rows; where all weights and where adapters start; what a linear
    classifier of the last features comes to; and the starts of all layers, with a batch, as
    shapes."""

    sets: dict[str, dict]
    starts: dict[str, Start]
    linear: dict
    whole: Callable[[], tuple]


class Sizes(NamedTuple):
    """Of a task and its run."""

    train: int
    validation: int
    test: int
    layers: int  # trained
    tuning: int  # steps of MeZO for each rate of a grid; backpropagation a quarter
    points: int  # where validation looks
    share: float  # of the steps that are asked for
    fits: tuple[int, ...]  # steps of the linear classifier, of which validation chooses


def cross_entropy(logits, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def seen(params, direction, move):
    """Some of the parameters, as they are or moved."""
    return params if direction is None else move(params, direction)


def cut(arrays, sizes: Sizes):
    """Training, validation and test rows."""
    ends = np.cumsum([0, sizes.train, sizes.validation])
    ends = [*ends, len(arrays["y"])]
    names = ("train", "validation", "test")
    return {
        name: {key: jnp.asarray(a[i:j]) for key, a in arrays.items()}
        for name, i, j in zip(names, ends, ends[1:], strict=False)
    }


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


# ---- a linear classifier of features


@partial(jax.jit, static_argnums=(2, 3))
def probe(x, y, classes, steps):
    """By AdamW on all of them."""
    adam = optax.adamw(1e-2)
    params = {"w": jnp.zeros((x.shape[1], classes)), "b": jnp.zeros(classes)}
    of = lambda params: cross_entropy(x @ params["w"] + params["b"], y)

    def one(carry, _):
        updates, opt = adam.update(jax.grad(of)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), opt), None

    return lax.scan(one, (params, adam.init(params)), None, steps)[0][0]


def all_features(features, start: Start, part):
    of = jax.jit(features)
    rows = [slice(i, i + 100) for i in range(0, len(part["y"]), 100)]
    pieces = [jax.tree.map(lambda a, r=r: a[r], part) for r in rows]
    return jnp.concatenate([of(start.params, start.frozen, piece) for piece in pieces])


def fitted(features, start: Start, sets, fits: Sequence[int]):
    """The linear classifier of least validation loss, and its test accuracy."""
    x = {name: all_features(features, start, part) for name, part in sets.items()}
    classes = 1 + int(sets["train"]["y"].max())
    heads = [probe(x["train"], sets["train"]["y"], classes, steps) for steps in fits]
    of = lambda head, part: x[part] @ head["w"] + head["b"]
    losses = [float(cross_entropy(of(h, "validation"), sets["validation"]["y"])) for h in heads]
    best = int(np.argmin(losses))
    right = jnp.argmax(of(heads[best], "test"), -1) == sets["test"]["y"]
    return heads[best], {"test": float(jnp.mean(right)), "steps": fits[best], "losses": losses}


# ---- SmolLM2: the next word


def last_place(params, frozen, batch, direction=None, move=None, again=False):
    """What stands where the next word is asked for. The last layer is asked there alone, and so
    stands by itself."""

    def of(slices):
        params, frozen, direction = slices
        params = seen(params, direction, move)
        if not frozen:
            return params
        return {**frozen, **{name: (frozen[name], *pair) for name, pair in params.items()}}

    lower, last = (
        (params[part], frozen[part], None if direction is None else direction[part])
        for part in ("lower", "last")
    )
    x = smollm.through(lower, batch["hidden"].astype(jnp.float32), of, again)
    x = smollm.layer(of(last), x, batch["at"])[:, 0]
    return smollm.norm(x, frozen["norm"])


def next_word(params, frozen, *args, **keywords):
    """Which of two words comes next."""
    return last_place(params, frozen, *args, **keywords) @ frozen["answers"].T


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


def smollm_task(sizes: Sizes) -> Task:
    """Hidden states below the layers that are trained, kept in the user's cache."""
    arrays, answers = sentiment(sizes)
    below = smollm.LAYERS - sizes.layers
    hidden = smollm.hidden_states(arrays.pop("tokens"), below)
    weights = smollm.weights(below)
    weights["answers"] = weights["embed"][jnp.array(answers)]
    sets = cut({"hidden": hidden, **arrays}, sizes)
    return of_smollm(sets, weights, sizes)


def of_smollm(sets, weights, sizes: Sizes) -> Task:
    starts = smol(weights, 0)
    linear = fitted(last_place, starts[ALL], sets, sizes.fits)[1]
    return Task(sets, starts, linear, whole_smollm)


def made_up(sizes: Sizes) -> Task:
    """The same without the files, of random weights, for a small run."""
    rng, many = np.random.default_rng(0), sizes.train + sizes.validation + sizes.test
    weights = smollm.random(jax.random.key(0), sizes.layers)
    weights["answers"] = weights["embed"][:2]
    arrays = {
        "hidden": rng.normal(size=(many, 6, smollm.WIDTH)).astype(np.float16),
        "at": rng.integers(2, 6, many),
        "y": rng.integers(0, 2, many),
    }
    return of_smollm(cut(arrays, sizes), weights, sizes)


def whole_smollm():
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


# ---- MiniLM: kinds of questions


def sentence(graphdef, params, frozen, batch, direction=None, move=None, again=False):
    """Mean over tokens of what the stacked layers make of hidden states, entries of size one."""

    def layer(x, slices):
        params, frozen, direction = slices
        model = nnx.merge(graphdef, seen(params, direction, move), frozen, copy=True)
        return model(x, batch["mask"]), None

    layers = (
        params["layers"], frozen["layers"], None if direction is None else direction["layers"]
    )  # fmt: skip
    x = batch["hidden"].astype(jnp.float32)
    x = lax.scan(jax.checkpoint(layer) if again else layer, x, layers)[0]
    kept = batch["mask"].astype(x.dtype)[..., None]
    mean = jnp.sum(x * kept, 1) / jnp.sum(kept, 1)
    return mean * (mean.shape[-1] ** 0.5 / jnp.linalg.norm(mean, axis=-1, keepdims=True))


def kinds(graphdef, params, frozen, batch, direction=None, move=None, again=False):
    x = sentence(graphdef, params, frozen, batch, direction, move, again)
    head = seen(params["head"], None if direction is None else direction["head"], move)
    return x @ head["w"] + head["b"]


def ones(logits):
    """Every component of an adapter counts."""
    return jnp.ones_like(logits)


def minilm(top) -> tuple[dict[str, Start], Callable]:
    """Layers of `encoder.Top`, stacked, and a head of zeros; and the features of all weights."""
    width = top.head.in_features
    head = {"w": jnp.zeros((width, KINDS)), "b": jnp.zeros(KINDS)}

    def stacked(kind):
        parts = [nnx.split(layer, kind, ...) for layer in top.layers]
        graphdefs, *states = zip(*parts, strict=True)
        stack = lambda some: {"layers": jax.tree.map(lambda *a: jnp.stack(a), *some)}
        return graphdefs[0], *map(stack, states)

    graphdef, params, frozen = stacked(nnx.Param)
    starts = {ALL: Start(partial(kinds, graphdef), params | {"head": head}, frozen)}
    features = partial(sentence, graphdef)
    bx.nn.add_lora(top, bx.nn.paths("layers"), RANK, gate=ones, rngs=nnx.Rngs(0))
    graphdef, params, frozen = stacked(nnx.LoRAParam)
    starts[LORA] = Start(partial(kinds, graphdef), params | {"head": head}, frozen)
    return starts, features


def minilm_task(sizes: Sizes) -> Task:
    """TREC with its own validation and test rows; hidden states below the layers that are trained
    are kept in the user's cache."""
    splits, rng = data.wrench("trec"), np.random.default_rng(0)
    texts, y = [], []
    for name, many in zip(("train", "valid", "test"), sizes[:3], strict=True):
        rows = rng.permutation(len(splits[name].y))[:many]
        texts += [splits[name].texts[i] for i in rows]
        y += [splits[name].y[rows]]
    first = MINILM_LAYERS - sizes.layers
    hidden, mask = encoder.hidden_states(texts, first, QUESTION)
    sets = cut({"hidden": hidden, "mask": mask, "y": np.concatenate(y)}, sizes)
    starts, features = minilm(encoder.Top(first, KINDS))
    head, linear = fitted(features, starts[ALL], sets, sizes.fits)
    headed = {
        kind: start._replace(params=start.params | {"head": head}) for kind, start in starts.items()
    }
    return Task(sets, {**headed, ZERO: starts[LORA]}, linear, whole_minilm)


def whole_minilm():
    """Shapes of all of MiniLM's layers, embeddings apart, and of a batch."""
    starts = {
        kind: Start(start.logits, shapes(start.params), shapes(start.frozen))
        for kind, start in minilm(encoder.Top(0, KINDS))[0].items()
    }
    width = starts[ALL].params["head"]["w"].shape[0]
    batch = {
        "hidden": jax.ShapeDtypeStruct((BATCH, QUESTION, width), jnp.float16),
        "mask": jax.ShapeDtypeStruct((BATCH, QUESTION), bool),
        "y": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    return starts, batch


TASKS = {SMOL: smollm_task, MINI: minilm_task}
