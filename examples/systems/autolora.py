"""How many components each adapter of a language model needs: learn which of a low-rank change to
keep, on one half of the data.

    python examples/systems/autolora.py

The top two layers of MiniLM get low-rank adapters at all six matrices, on 2,000 examples each of
SST-2 (sentiment) and TREC (kinds of questions). The four layers below are frozen, and their output
is computed once. Needs sst2_sent.json.gz and wrench_trec.json.gz in the folder that BILEVAX_DATA
names, and the extra ``text``. Inner level: adapters of eight rank-1 components and the head, on one
half of the training data. Outer level: a selection variable a component, a softmax over each
adapter's eight, judged on the other half. Components of at least 1/8 are kept, and a fresh adapter
of the ranks so found is trained on all of the data. Paper: Zhang et al., "AutoLoRA" (NAACL 2024,
arXiv 2403.09113).

What is fair. All rows are trained by the same optimizer for the same steps from the same seeds, and
their last iterate is taken. The uniform rank is rounded up, so that it has no fewer parameters.
Nothing is chosen on test data.

What came out (3 seeds): .770 on SST-2 and .909 on TREC, the uniform rank .770 and .903 with
slightly more parameters, and the learned ranks shuffled .769 and .911: as good as uniform, but not
because of where the ranks are.
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

import bilevax as bx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import encoder
import report

RANK, MOST, BATCH, INNER_STEPS = (
    8,
    16,
    16,
    3,
)  # MOST: components of an adapter that is trained with some of them masked
MATRICES = {
    "query": (384, 384),
    "key": (384, 384),
    "value": (384, 384),
    "attention_out": (384, 384),
    "up": (384, 1536),
    "down": (1536, 384),
}
LEARNING_RATE, OUTER_RATE = 2e-3, 0.1
AUTO, UNIFORM, TWICE, HEAD, SHUFFLED = (
    "AutoLoRA",
    "uniform, equal parameters",
    "uniform, twice",
    "head alone",
    "AutoLoRA's ranks, shuffled",
)


class Task(NamedTuple):
    """Hidden states, masks and labels of training and test examples."""

    name: str
    classes: int
    train: dict
    test: dict


class Sizes(NamedTuple):
    tasks: tuple[str, ...]
    train: int
    test: int
    layers: int  # frozen, of six
    steps: int  # of the training


FULL = Sizes(("SST-2", "TREC"), 2000, 600, 4, 64)
SMALL = Sizes(("TREC",), 64, 32, 5, 3)


# ---- data


def task(name: str, sizes: Sizes) -> Task:
    if name == "SST-2":
        splits = data.sst2()
        parts, length = (splits["train"], splits["test"]), 24
    else:
        splits = data.wrench("trec")
        parts, length = (
            ((splits["train"].texts, splits["train"].y), (splits["test"].texts, splits["test"].y)),
            16,
        )
    order = np.random.default_rng(0).permutation(len(parts[0][1]))[: sizes.train]
    train = [parts[0][0][i] for i in order], parts[0][1][order]
    test = parts[1][0][: sizes.test], parts[1][1][: sizes.test]
    hidden, mask = encoder.hidden_states([*train[0], *test[0]], sizes.layers, length)
    sets = {"hidden": hidden, "mask": mask, "y": np.concatenate([train[1], test[1]])}
    cut = len(train[1])
    return Task(
        name,
        1 + int(sets["y"].max()),
        *(
            {key: jnp.asarray(a[rows]) for key, a in sets.items()}
            for rows in (slice(cut), slice(cut, None))
        ),
    )


# ---- the model


def adapted(t: Task, sizes: Sizes, rank: int, gate, seed: int) -> encoder.Top:
    model = encoder.Top(sizes.layers, t.classes)
    if model.layers:
        bx.nn.add_lora(model, bx.nn.paths("layers"), rank, gate=gate, rngs=nnx.Rngs(seed))
    return model


def adapters(model) -> dict[str, bx.nn.LoRALinear]:
    """By ``layer/matrix``."""
    return {
        f"{number}/{name}": getattr(layer, name)
        for number, layer in enumerate(model.layers)
        for name in MATRICES
    }


def as_they_are(logits):
    return logits


LEARNED = nnx.Any(nnx.LoRAParam, bx.nn.paths("head"))


def loss(model, batch):
    logits = model(batch["hidden"], batch["mask"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


# ---- search


# Some of the encoder's outputs are zero up to rounding, so that gradients there are tiny and their
# squares zero: with eps_root Adam's update has a derivative for SAMA all the same.
SEARCH = bx.algorithms.double_loop(
    bx.inner.optax(
        bx.tunable(optax.adamw, learning_rate=LEARNING_RATE, weight_decay=1e-2, eps_root=1e-16),
        INNER_STEPS,
    ),
    bx.hypergradient.sama(),
    bx.tunable(optax.adam, learning_rate=OUTER_RATE),
)


def search(t: Task, sizes: Sizes, seed: int, steps: int, checkpoint) -> dict:
    """Selection variables of every adapter."""
    begin = time.perf_counter()
    order = np.random.default_rng(seed).permutation(len(t.train["y"]))
    halves = [{key: a[half] for key, a in t.train.items()} for half in np.array_split(order, 2)]
    net = bx.nn.from_nnx(
        adapted(t, sizes, RANK, jax.nn.softmax, seed), wrt=(LEARNED, bx.nn.GateParam)
    )
    problem = bx.nn.bilevel(loss, loss, model=net, train=(False, False))
    solution = bx.solve_bilevel(
        **problem.arguments,
        inner_data=bx.data.minibatches(halves[0], BATCH),
        outer_data=bx.data.minibatches(halves[1], BATCH),
        algorithm=SEARCH,
        num_steps=steps,
        key=jax.random.key(seed),
        keep="last",
        checkpoint=checkpoint,
    )
    report.unless_preempted(solution)
    gates = {
        name: np.asarray(adapter.gates)
        for name, adapter in adapters(problem.merge(solution)).items()
    }
    return {
        "gates": gates,
        "seconds": time.perf_counter() - begin,
        "value": solution.history["value"],
    }


# ---- training at given ranks


@partial(jax.jit, static_argnums=(0, 4))
def train(graphdef, learned, rest, sets, steps, key):
    """AdamW with a linear decay to zero; the last iterate. Frozen weights are an argument: closed
    over, they would be folded as constants."""
    opt = optax.adamw(optax.linear_schedule(LEARNING_RATE, 0.0, steps), weight_decay=1e-2)

    def step(carry, i):
        learned, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(sets["y"]))
        batch = jax.tree.map(lambda a: a[rows], sets)
        grads = jax.grad(lambda learned: loss(nnx.merge(graphdef, learned, rest), batch))(learned)
        updates, state = opt.update(grads, state, learned)
        return (optax.apply_updates(learned, updates), state), None

    return jax.lax.scan(step, (learned, opt.init(learned)), jnp.arange(steps))[0][0]


@partial(jax.jit, static_argnums=0)
def right(graphdef, learned, rest, batch):
    return (
        jnp.argmax(nnx.merge(graphdef, learned, rest)(batch["hidden"], batch["mask"]), -1)
        == batch["y"]
    )


def trained(t: Task, sizes: Sizes, ranks: dict[str, int], seed: int) -> dict:
    """Test accuracy with these ranks. Components beyond an adapter's rank are there, with a factor
    of zero, so that one program serves all ranks."""
    begin = time.perf_counter()
    model = adapted(t, sizes, MOST, as_they_are, seed)
    model.eval()
    for name, adapter in adapters(model).items():
        adapter.logits[...] = (jnp.arange(MOST) < ranks[name]).astype(jnp.float32)
    graphdef, learned, rest = nnx.split(model, LEARNED, ...)
    learned = train(graphdef, learned, rest, t.train, sizes.steps, jax.random.key(seed))
    hits, size = [], 128
    for i in range(0, len(t.test["y"]), size):
        rows = np.arange(i, i + size)
        batch = jax.tree.map(lambda a: a[rows % len(a)], t.test)  # noqa: B023 (mapped at once)
        hits.append(np.asarray(right(graphdef, learned, rest, batch))[rows < len(t.test["y"])])
    parameters = sum(rank * sum(MATRICES[name.split("/")[1]]) for name, rank in ranks.items())
    return {
        "test": float(np.mean(np.concatenate(hits))),
        "parameters": parameters,
        "seconds": time.perf_counter() - begin,
    }


def rows(t: Task, whole: Task, sizes: Sizes, seed: int, steps: int, checkpoint) -> dict:
    """`whole` holds what all six layers make of the texts, for the head alone."""
    found = search(t, sizes, seed, steps, checkpoint)
    ranks = {name: int(np.sum(gates >= 1 / RANK)) for name, gates in found["gates"].items()}
    cost = {name: sum(MATRICES[name.split("/")[1]]) for name in ranks}
    learned = sum(rank * cost[name] for name, rank in ranks.items())
    equal = -(-learned // sum(cost.values()))
    names = list(ranks)
    shuffled = dict(
        zip(
            names,
            (ranks[names[i]] for i in np.random.default_rng(seed).permutation(len(names))),
            strict=True,
        )
    )
    everywhere = lambda rank: dict.fromkeys(names, rank)
    choices = {
        UNIFORM: everywhere(equal),
        TWICE: everywhere(2 * equal),
        SHUFFLED: shuffled,
        AUTO: ranks,
    }
    out = {HEAD: trained(whole, sizes._replace(layers=6), {}, seed)}
    out |= {name: trained(t, sizes, chosen, seed) for name, chosen in choices.items()}
    out[AUTO]["search"] = found["seconds"]
    return {"rows": out, "ranks": ranks, "gates": found["gates"], "value": found["value"]}


# ---- main


def draw(path, results, found, sizes, seeds):
    colors = {
        AUTO: report.BLUE,
        UNIFORM: report.ORANGE,
        TWICE: report.RED,
        SHUFFLED: report.PURPLE,
        HEAD: report.GREY,
    }
    with report.figure(path, 2 * len(results), width=5.0, height=4.6, squeeze=False) as (fig, axes):
        for (name, table), left, right in zip(
            results.items(), axes[0][::2], axes[0][1::2], strict=True
        ):
            report.bars(left, table, "test", colors, "test accuracy")
            left.set_title(name + (", ± 2 standard errors" if seeds > 1 else ""))
            places = list(found[name][0]["ranks"])
            ranks = np.array(
                [[cell["ranks"][place] for place in places] for cell in found[name]], float
            ).mean(0)
            grid = ranks.reshape(-1, len(MATRICES))
            image = right.imshow(grid, cmap="viridis", vmin=0, vmax=RANK, aspect="auto")
            for (i, j), value in np.ndenumerate(grid):
                right.text(
                    j,
                    i,
                    f"{value:.1f}",
                    ha="center",
                    va="center",
                    color="white" if value < 5 else "black",
                )
            right.set_xticks(
                range(len(MATRICES)),
                [m.replace("attention_out", "attention\nout") for m in MATRICES],
                fontsize=9,
            )
            right.set_yticks(
                range(len(grid)), [f"layer {sizes.layers + i + 1}" for i in range(len(grid))]
            )
            right.set_title(f"{name}: learned ranks" + (", mean over seeds" if seeds > 1 else ""))
            fig.colorbar(image, ax=right, label="rank kept of 8")


def main(argv=None):
    args = report.parse(
        report.parser(
            __doc__, full=dict(seeds=3, steps=24), small=dict(seeds=1, steps=2), pieces=True
        ),
        argv,
    )
    sizes = SMALL if args.small else FULL
    begin = time.perf_counter()
    settings = {
        **sizes._asdict(),
        "outer_steps": args.steps,
        "rank": RANK,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "search": repr(SEARCH),
    }
    pieces = report.Pieces(args, settings)
    results, found = {}, {}
    for name in sizes.tasks:
        t, whole = task(name, sizes), task(name, sizes._replace(layers=6))
        make = lambda seed, t=t, whole=whole: rows(
            t, whole, sizes, seed, args.steps, pieces.checkpoint(f"{t.name}, search", every=20)
        )
        cells = found[name] = [
            pieces(f"{name}, seed {seed}", partial(make, seed)) for seed in range(args.seeds)
        ]
        results[name] = {
            row: {"test": [cell["rows"][row]["test"] for cell in cells]} for row in cells[0]["rows"]
        }
        for row, table in results[name].items():
            table["thousand parameters"] = [
                cell["rows"][row]["parameters"] / 1000 for cell in cells
            ]
        columns = {"test": "test accuracy", "thousand parameters": "thousand parameters"}
        print(f"\n{name}\n\n{report.table(results[name], columns, better=(AUTO, 'test'))}\n")
        searching = [cell["rows"][AUTO]["search"] for cell in cells]
        print(
            f"A search took {report.mean_se(searching, 1)} s. Ranks at the first seed: "
            f"{cells[0]['ranks']}",
            flush=True,
        )
    seconds = time.perf_counter() - begin
    draw(args.out / "autolora.svg", results, found, sizes, args.seeds)
    report.save(
        args.out / "autolora.json", {**vars(args), **settings}, results, seconds, found=found
    )
    print(f"{seconds:.0f} s in all.")
    return results


if __name__ == "__main__":
    report.run(main)
