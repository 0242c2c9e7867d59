"""A learned prompt and the weights that read it, on two halves of a few labelled images.

    python examples/systems/prompts.py

After Zhang et al., "BLO-SAM: bi-level optimization based finetuning of the segment anything model
for overfitting-preventing semantic segmentation" (ICML 2024, arXiv 2402.16338). An encoder is
pretrained by denoising crops of electron micrographs, and stays as it is. Lower level: adapters and
a decoder that draws the membranes, on two labelled images. Upper level: a prompt, tokens that the
decoder attends to, on two others. The two splits are to prevent overfitting.

Rows: weights and prompt trained jointly on all four images; weights alone under a prompt that
stands still; jointly on half; two levels, both on all images; two levels on two splits; weights
trained again on all images under the prompt that was found; and jointly on the images of
validation, too. Every row stops where validation is best; what it would have been at the end stands
beside it. Then with a patch of each image labelled, where overfitting is seen; ``--cases`` has
others, with more steps and a larger prompt.

What came out (5 seeds): Dice .729 on two splits, .732 jointly, .738 with all images in both levels;
with patches .680, .691 and .694.
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

FIRST, SECOND, THIRD, WIDTH, TOKEN = 8, 16, 24, 12, 16  # channels, of the decoder, of a token
CROP, BATCH, RATE, PROMPT_RATE = 32, 4, 3e-3, 3e-3
NOISE, DENOISED = 0.7, 16  # of the pretraining's crops, in units of an image's spread; a batch
JOINT, WEIGHTS, HALF = "jointly, all", "weights alone, all", "jointly, half"
SAME, SPLITS, DIRECT = (
    "two levels, all in both",
    "two levels, two splits",
    "the same, no implicit term",
)
AGAIN, MORE = "prompt found, weights on all", "jointly, validation too"


class Sizes(NamedTuple):
    """Of a run: labelled images, those of validation and of test; side of an image; updates of the
    encoder; how often a row is measured;
    whether two rows are enough."""

    labelled: int = 4
    validation: int = 3
    test: int = 10
    side: int = 256
    pretraining: int = 400
    measured: int = 16
    few: bool = False


class Case(NamedTuple):
    """Where overfitting is looked for: tokens of the prompt; updates, as a multiple of the common
    number; the side of the labelled part of an image, in places of the mask (0: all of it)."""

    tokens: int = 4
    longer: float = 1.0
    extent: int = 0


CASES = {
    "four images": Case(),
    "four patches": Case(longer=1 / 3, extent=CROP),
    "four images, longer": Case(longer=8 / 3),
    "four images, large prompt": Case(tokens=64, longer=8 / 3),
    "four patches, large prompt": Case(tokens=64, extent=CROP),
}


# ---- images


def membranes():
    """ISBI 2012: 30 slices of 512 x 512, and where there is membrane."""
    path = data.local("isbi_membrane.npz")
    if path is None:
        raise data.Unavailable(
            "isbi_membrane.npz is not on this machine: put it into the folder that BILEVAX_DATA "
            "names. It has `x`, 30 images of 512 x 512, and `y`, the bits of their masks."
        )
    with np.load(path) as file:
        return file["x"].astype(np.float32), 1 - np.unpackbits(file["y"], axis=-1)


def made_up(count, side, seed=0):
    """Cells of a random plane, and the lines between them."""
    rng, at = np.random.default_rng(seed), np.stack(np.mgrid[:side, :side], -1)[..., None, :]
    x, y = [], []
    for _ in range(count):
        middles = rng.uniform(0, side, (side // 6, 2))
        near = np.sort(np.linalg.norm(at - middles, axis=-1), -1)
        y.append(near[..., 1] - near[..., 0] < 3)
        x.append(150 - 80 * y[-1] + rng.normal(0, 30, (side, side)))
    return np.float32(x), np.stack(y)


def pooled(x, by):
    n, side, _ = x.shape
    return x.reshape(n, side // by, by, side // by, by).mean((2, 4))


# ---- the encoder, pretrained by denoising


def kernel(key, size, into, out):
    return jax.random.normal(key, (size, size, into, out)) * (2 / (size * size * into)) ** 0.5


def conv(x, w):
    """By one matrix product over the places around each, which is what two cores are good at."""
    (_, high, wide, _), size = x.shape, w.shape[0]
    edge = size // 2
    x = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    around = [x[:, i : i + high, j : j + wide] for i in range(size) for j in range(size)]
    return jnp.concatenate(around, -1) @ w.reshape(-1, w.shape[-1])


def down(x):
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def up(x):
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


def fresh_encoder(key):
    shapes = {
        "a": (1, FIRST), "b": (FIRST, FIRST), "c": (FIRST, SECOND), "d": (SECOND, SECOND),
        "e": (SECOND, THIRD), "f": (THIRD, THIRD),
        "g": (THIRD + SECOND, SECOND), "h": (SECOND + FIRST, FIRST), "out": (FIRST, 1),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    return {n: kernel(k, 3, *s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def encoded(net, x):
    """Features at the image's own size, at half of it and at a quarter."""
    relu = jax.nn.relu
    one = relu(conv(relu(conv(x[..., None], net["a"])), net["b"]))
    two = relu(conv(relu(conv(down(one), net["c"])), net["d"]))
    return one, two, relu(conv(relu(conv(down(two), net["e"])), net["f"]))


def denoised(net, x):
    one, two, three = encoded(net, x)
    two = jax.nn.relu(conv(jnp.concatenate([up(three), two], -1), net["g"]))
    return conv(jax.nn.relu(conv(jnp.concatenate([up(two), one], -1), net["h"])), net["out"])[
        ..., 0
    ]


@partial(jax.jit, static_argnames="steps")
def pretrained(x, key, steps):
    """An encoder, and the denoiser's loss over time."""
    opt = optax.adam(2e-3)

    def update(carry, key):
        net, state = carry
        keys = jax.random.split(key, 3)
        which = jax.random.randint(keys[0], (DENOISED,), 0, len(x))
        corner = jax.random.randint(keys[1], (DENOISED, 2), 0, x.shape[1] - CROP + 1)
        cut = lambda i, at: lax.dynamic_slice(x, (i, *at), (1, CROP, CROP))[0]
        clean = jax.vmap(cut)(which, corner)
        noisy = clean + NOISE * jax.random.normal(keys[2], clean.shape)
        loss, grad = jax.value_and_grad(lambda n: jnp.mean((denoised(n, noisy) - clean) ** 2))(net)
        updates, state = opt.update(grad, state, net)
        return (optax.apply_updates(net, updates), state), loss

    net = fresh_encoder(key)
    (net, _), losses = lax.scan(update, (net, opt.init(net)), jax.random.split(key, steps))
    return net, losses


@jax.jit
def features(net, x):
    """What the decoder is given of each image, at half its size and at a quarter."""

    def of(one):
        first, second, third = encoded(net, one[None])
        return {"fine": jnp.concatenate([down(first), second], -1)[0], "coarse": third[0]}

    return lax.map(of, x)


# ---- the decoder and the prompt


def fresh(key, tokens):
    """Weights, and a prompt (tokens, TOKEN)."""
    keys, fine = jax.random.split(key, 12), FIRST + SECOND
    normal = lambda key, a, b: jax.random.normal(key, (a, b)) * a**-0.5
    weights = {
        "adapt fine": jnp.zeros((fine, fine)), "adapt coarse": jnp.zeros((THIRD, THIRD)),
        "ask coarse": normal(keys[0], THIRD, TOKEN), "give coarse": normal(keys[1], TOKEN, THIRD),
        "ask fine": normal(keys[2], WIDTH, TOKEN), "give fine": normal(keys[3], TOKEN, WIDTH),
        "keys": normal(keys[4], TOKEN, TOKEN), "values": normal(keys[5], TOKEN, TOKEN),
        "mix": kernel(keys[6], 3, fine + THIRD, WIDTH), "end": kernel(keys[7], 3, WIDTH, WIDTH),
        "out": normal(keys[8], TOKEN, WIDTH), "bias": jnp.zeros(3),
    }  # fmt: skip
    return weights, jax.random.normal(keys[9], (tokens, TOKEN))


def attended(x, ask, give, keys, values):
    """Every place looks at the tokens."""
    scores = jnp.einsum("nhwt,kt->nhwk", x @ ask, keys) * TOKEN**-0.5
    return x + (jax.nn.softmax(scores) @ values) @ give


def logits(weights, prompt, part):
    """Of membrane, at half the image's size; as in a mask decoder a token makes the last layer."""
    w, relu = weights, jax.nn.relu
    keys, values = prompt @ w["keys"], prompt @ w["values"]
    coarse = part["coarse"] + part["coarse"] @ w["adapt coarse"]
    coarse = attended(coarse, w["ask coarse"], w["give coarse"], keys, values)
    fine = part["fine"] + part["fine"] @ w["adapt fine"]
    x = relu(conv(jnp.concatenate([fine, up(coarse)], -1), w["mix"]) + w["bias"][0])
    x = attended(x, w["ask fine"], w["give fine"], keys, values)
    x = relu(conv(x, w["end"]) + w["bias"][1])
    return x @ (values[0] @ w["out"]) + w["bias"][2]


def loss(weights, prompt, batch):
    """Cross-entropy and one minus soft Dice, in equal parts."""
    found, y = logits(weights, prompt, batch), batch["y"]
    p = jax.nn.sigmoid(found)
    dice = 2 * jnp.sum(p * y) / (jnp.sum(p) + jnp.sum(y) + 1.0)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(found, y)) + 1 - dice


def overlap(weights, prompt, part):
    """Dice and intersection over union, means over images."""

    def of(one):
        one = jax.tree.map(lambda a: a[None], one)
        said, y = logits(weights, prompt, one) > 0, one["y"] > 0.5
        both, either = jnp.sum(said & y), jnp.sum(said | y)
        return 2 * both / (both + either + 1e-9), both / (either + 1e-9)

    dice, union = lax.map(of, part)
    return jnp.mean(dice), jnp.mean(union)


def watched(weights, prompt, parts):
    train, validation, test = (
        overlap(weights, prompt, parts[n]) for n in ("train", "validation", "test")
    )
    return {"train": train[0], "validation": validation[0], "dice": test[0], "iou": test[1]}


def crops(part, rows, extent, key):
    """A batch of crops of some images, from the part in the middle that is labelled."""
    keys, side = jax.random.split(key), part["y"].shape[1]
    which = rows[jax.random.randint(keys[0], (BATCH,), 0, len(rows))]
    free = jnp.floor(jax.random.uniform(keys[1], (BATCH, 2)) * ((extent - CROP) // 2 + 1))
    corner = 2 * (jnp.int32(free) + (side - extent) // 4)

    def cut(i, at):
        one = jax.tree.map(lambda a: a[i], part)
        take = lambda a, at, n: lax.dynamic_slice(
            a, (*at, *[0] * (a.ndim - 2)), (n, n, *a.shape[2:])
        )
        return {
            "fine": take(one["fine"], at, CROP),
            "coarse": take(one["coarse"], at // 2, CROP // 2),
            "y": take(one["y"], at, CROP),
        }

    return jax.vmap(cut)(which, corner)


# ---- one level and two


OPT, PROMPT_OPT = optax.adam(RATE), optax.adam(PROMPT_RATE)
ALGORITHMS = {
    "implicit": bx.algorithms.double_loop(
        bx.inner.optax(OPT, 1), bx.hypergradient.sama(), PROMPT_OPT
    ),
    "direct": bx.algorithms.double_loop(
        bx.inner.optax(OPT, 1), bx.hypergradient.direct(), PROMPT_OPT
    ),
}


@partial(jax.jit, static_argnames=("steps", "every"))
def one_level(start, parts, rows, moves, extent, key, steps, every):
    """Weights, and the prompt where it moves, on one set of images; what is watched over time."""
    images = parts["images"]
    objective = lambda pair, batch: loss(*pair, batch)

    def update(carry, key):
        pair, (first, second) = carry
        grads = jax.grad(objective)(pair, crops(images, rows, extent, key))
        up_one, first = OPT.update(grads[0], first, pair[0])
        up_two, second = PROMPT_OPT.update(grads[1], second, pair[1])
        pair = optax.apply_updates(pair, (up_one, moves * up_two))
        return (pair, (first, second)), None

    def some(carry, keys):
        carry = lax.scan(update, carry, keys)[0]
        return carry, watched(*carry[0], parts)

    begin = start, (OPT.init(start[0]), PROMPT_OPT.init(start[1]))
    return lax.scan(some, begin, jax.random.split(key, steps).reshape(-1, every))[1]


@partial(jax.jit, static_argnames=("kind", "steps", "every"))
def two_levels(start, parts, below, above, extent, key, kind, steps, every):
    """Weights on the images `below`, the prompt on those `above`; what is watched over time, and
    the prompt where validation was best."""
    images = parts["images"]
    solution = bx.solve_bilevel(
        loss,
        loss,
        *start,
        inner_data=lambda key, step: crops(images, below, extent, key),
        outer_data=lambda key, step: crops(images, above, extent, key),
        algorithm=ALGORITHMS[kind],
        num_steps=steps + 1,  # what is watched is watched after the steps 0, every, ...
        key=key,
        metrics=bx.metrics(watched, parts, every=every, select="validation", mode="max"),
    )
    names = ("train", "validation", "dice", "iou")
    return {n: solution.history[n][every::every] for n in names}, solution.outer_params


# ---- runs


def row_of(history):
    """Where validation is best, and at the end."""
    h = {name: np.asarray(value) for name, value in history.items()}
    at = int(np.argmax(h["validation"]))
    ends = {f"{name} at the end": h[name][-1] for name in ("train", "dice")}
    return {**{n: v[at] for n, v in h.items()}, **ends, "time": at, "curve": h["dice"],
            "curve train": h["train"]}  # fmt: skip


def one_seed(images, case, seed, steps, sizes):
    rng = np.random.default_rng(seed)
    count = len(images["y"])
    order = rng.permutation(count - sizes.test)
    labelled = order[: sizes.labelled]
    held = order[sizes.labelled : sizes.labelled + sizes.validation]
    take = lambda at: jax.tree.map(lambda a: a[jnp.asarray(at)], images)
    side = images["y"].shape[1]
    parts = {
        "images": images, "train": take(labelled), "validation": take(held),
        "test": take(np.arange(count - sizes.test, count)),
    }  # fmt: skip
    if case.extent:
        low, high = (side - case.extent) // 2, (side + case.extent) // 2
        cut = lambda a: a[:, low * a.shape[1] // side : high * a.shape[1] // side,
                          low * a.shape[2] // side : high * a.shape[2] // side]  # fmt: skip
        parts["train"] = jax.tree.map(cut, parts["train"])
    extent, every = case.extent or side, round(steps * case.longer) // sizes.measured
    steps = every * sizes.measured
    keys = jax.random.split(jax.random.key(seed))
    start, half = fresh(keys[0], case.tokens), sizes.labelled // 2
    # all of one length, each image as often: one program serves every row
    common = sizes.labelled * (sizes.labelled + sizes.validation)
    set_of = lambda at: jnp.asarray(np.resize(at, common))

    def single(rows, moves=1.0, start=start):
        return one_level(start, parts, set_of(rows), moves, extent, keys[1], steps, every)

    def double(below, above, kind="implicit"):
        sets = set_of(below), set_of(above)
        return two_levels(start, parts, *sets, extent, keys[1], kind, steps, every)

    both, found = double(labelled[:half], labelled[half:])
    if sizes.few:
        return {JOINT: row_of(single(labelled)), SPLITS: row_of(both)}
    rows = {
        JOINT: single(labelled),
        WEIGHTS: single(labelled, 0.0),
        HALF: single(labelled[:half]),
        SAME: double(labelled, labelled)[0],
        SPLITS: both,
        AGAIN: single(labelled, 0.0, (start[0], found)),
    }
    if case.longer > 1:
        rows[DIRECT] = double(labelled[:half], labelled[half:], "direct")[0]
    rows = {name: row_of(history) for name, history in rows.items()}
    more = single(np.concatenate([labelled, held]))
    at = rows[JOINT]["time"]
    rows[MORE] = {n: float(more[n][at]) for n in ("dice", "iou")}
    return rows


def table_of(found):
    """Rows by name, each column a number a seed."""
    return {
        name: {k: [one[name][k] for one in found] for k in row if not k.startswith("curve")}
        for name, row in found[0].items()
    }


def draw(path, found):
    colors = {SPLITS: report.BLUE, AGAIN: report.SKY, JOINT: report.ORANGE, MORE: report.GREEN}
    with report.figure(path, 2 * len(found), width=4.4, height=4.4) as (_, axes):
        for i, (name, seeds) in enumerate(found.items()):
            left, right = axes[2 * i : 2 * i + 2]
            report.bars(left, table_of(seeds), "dice", colors, "Dice in test")
            for row, color in ((JOINT, report.ORANGE), (SPLITS, report.BLUE)):
                for what, style, where in (
                    ("curve", "-", "test"),
                    ("curve train", ":", "labelled"),
                ):
                    mean = np.mean([one[row][what] for one in seeds], 0)
                    time = np.linspace(0, 1, len(mean) + 1)[1:]
                    right.plot(time, mean, style, color=color, label=f"{row}: {where}")
            left.set_title(name)
            right.set(xlabel="share of the updates", ylabel="Dice")
            right.legend(fontsize=8)


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=5, steps=600), small=dict(seeds=1, steps=2), pieces=True
    )
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument(
        "--cases", nargs="*", choices=CASES, default=list(CASES)[:2], help="which of the cases"
    )
    args = report.parse(parser, argv)
    args.cases = args.cases[1:] if args.small else args.cases
    sizes = Sizes(2, 1, 1, 64, 2, 1, True) if args.small else Sizes()
    begin = time.perf_counter()
    x, y = made_up(4, 128) if args.small else membranes()
    x, y = pooled(x, x.shape[1] // sizes.side), pooled(y, 2 * y.shape[1] // sizes.side) > 0.5
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    net, losses = pretrained(jnp.asarray(x[: -sizes.test]), jax.random.key(0), sizes.pretraining)
    print(f"denoising: {float(losses[-20:].mean()):.3f} of {float(np.square(x).mean()):.3f}")
    images = {**features(net, jnp.asarray(x)), "y": jnp.asarray(y, jnp.float32)}
    settings = {
        **sizes._asdict(), "steps": args.steps, "first": args.first, "crop": CROP, "batch": BATCH,
        "rates": (RATE, PROMPT_RATE), "channels": (FIRST, SECOND, THIRD, WIDTH, TOKEN),
        "noise": NOISE, "denoised": DENOISED,
        "of cases": {name: case._asdict() for name, case in CASES.items()},
    }  # fmt: skip
    pieces, path = report.Pieces(args, settings), args.out / "prompts.json"
    found = {name: [] for name in args.cases}
    for seed in range(args.first, args.first + args.seeds):
        for name in found:
            make = partial(one_seed, images, CASES[name], seed, args.steps, sizes)
            found[name].append(pieces(f"{name}, seed {seed}", make))
        rows = {name: table_of(seeds) for name, seeds in found.items()}
        seconds = time.perf_counter() - begin
        report.save(path, {**vars(args), **settings}, rows, seconds, seeds=found)
        draw(args.out / "prompts.svg", found)
    columns = ("dice", "iou", "dice at the end", "train at the end", "validation")
    for name in found:
        print(f"\n{name}\n")
        print(report.table(rows[name], {c: c for c in columns}, better=(SPLITS, "dice")))
    print(f"\n{seconds:.0f} s in all.")


if __name__ == "__main__":
    report.run(main)
