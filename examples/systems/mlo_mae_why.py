"""Why does learned masking not beat uniform masking in mlo_mae.py? An experiment on CIFAR-10 that
takes it apart.

    python examples/systems/mlo_mae_why.py

Everything is compared by a linear probe on the encoder after as much pretraining, seed by seed: the
program with the masking network's rate at 0, which must do as well as uniform masking; the network
learned as in mlo_mae.py, and with the sign of its hypergradient turned; what it ended with held
fixed through a pretraining of its own, for the image that it looked at, or for another one; masks
of one parameter that are not learned, a multiple of a patch's contrast, which decides what is
hidden, or how much a patch counts.

What came out: masks that stay and go by contrast lose, whichever way (4 seeds: test loss +.077 and
+.061 above uniform masking's 1.592, by weights alone +.022 and +.011). On one seed the learned
network loses .062, and its own validation loss is no lower than at rate 0.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mlo_mae as mae
import numpy as np
import optax
from jax import lax

import bilevax as bx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report

FIRST = 10  # seeds, apart from those of mlo_mae.py
AHEAD, RATE, TIMES = mae.SOLVER_STEPS, 3e-3, 2.0
UNIFORM, CONTROL, LEARNED, TURNED = (
    "uniform masking",
    "learned, rate 0",
    "learned",
    "learned, hypergradient's sign turned",
)
SAME, ANOTHER = "learned network, fixed", "learned network of another image, fixed"
FAMILY = {  # logits, in contrasts: of the draw and of the weights
    UNIFORM: (0.0, 0.0),
    "plain patches hidden more": (-TIMES, 0.0),
    "plain patches weigh more": (0.0, -TIMES),
    "textured patches hidden more": (TIMES, 0.0),
    "textured patches weigh more": (0.0, TIMES),
}


def contrast(x):
    """Of each patch, standardised within its image."""
    return mae.norm(jnp.std(x, -1))


def brightness(x):
    """Likewise."""
    return mae.norm(jnp.mean(x, -1))


# ---- pretraining under masks that stay


def by_contrast(times, x):
    return [t * contrast(x) for t in times]


def by_network(net, x):
    return [mae.mask_logits(net, x)] * 2


def by_network_of_another(net, x):
    """As concentrated on some places, but of an image that has nothing to do with it."""
    return [jnp.roll(mae.mask_logits(net, x), 1, 0)] * 2


def reconstruction(autoencoder, hide, weigh, x, key):
    """`mae.reconstruction` with logits of their own for the draw and for the weights."""
    order = jnp.argsort(-hide - jax.random.gumbel(key, hide.shape), -1)
    masked, kept = order[:, : mae.HIDDEN], order[:, mae.HIDDEN :]
    weight = jax.nn.sigmoid(jnp.take_along_axis(weigh, masked, 1))
    return jnp.mean(weight * mae.errors(autoencoder, masked, kept, x)) / jnp.mean(weight)


@partial(jax.jit, static_argnums=(2, 4))
def pretrain(autoencoder, x, steps, key, logits, given):
    """`mae.pretrain_uniformly`, with the logits of draw and weights from ``logits(given, images)``;
    all draw alike."""

    def step(carry, i):
        params, state = carry
        draw, mask = jax.random.split(jax.random.fold_in(key, i))
        some = x[jax.random.randint(draw, (mae.BATCH,), 0, len(x))]
        grads = jax.grad(reconstruction)(params, *logits(given, some), some, mask)
        updates, state = mae.AUTOENCODER.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (autoencoder, mae.AUTOENCODER.init(autoencoder)), jnp.arange(steps))[0][0]


def fixed(splits, steps, seed, logits, given):
    start, x = mae.init(jax.random.key(seed))["autoencoder"], jnp.asarray(splits.pretrain.x)
    given = jax.tree.map(
        lambda a: np.asarray(a, np.float32), given, is_leaf=lambda a: isinstance(a, list)
    )
    return judged(splits, pretrain(start, x, steps, jax.random.key(seed), logits, given), seed)


# ---- the learned mask


def slope(lower, net, x):
    """By how much the network's logits rise with contrast, within an image."""
    return {"slope": jnp.mean(mae.mask_logits(net, x) * contrast(x))}


def learned(splits, steps, seed, rate):
    levels = *mae.LEVELS[:2], bx.Level("mask", mae.classify, solver=optax.adam(rate))
    watched = bx.metrics(slope, splits.test.x[:200], every=5)
    solution = mae.learn(splits, steps, seed, levels=levels, metrics=watched)
    net, history = solution.outer_params, solution.history
    logits = np.asarray(mae.mask_logits(net, splits.test.x))
    return {
        **judged(splits, solution.inner_params["autoencoder"], seed),
        "net": net,
        "slope": history["slope"][~np.isnan(history["slope"])],
        "spread": logits.std(1).mean(),
        "of places": logits.mean(0).var() / max(logits.var(), 1e-12),  # of the logits' variance
        "third level": history["value"][-steps // 5 :].mean(),
    }


def alike(net, x):
    """Correlations of the network's logits with what is known of a patch, within images."""
    net = {name: jnp.asarray(leaf) for name, leaf in net.items()}
    logits = mae.mask_logits(net, x)
    of = lambda z: float(jnp.mean(logits * z) / (jnp.sqrt(jnp.mean(logits**2)) + 1e-12))
    return {"with brightness": of(brightness(x)), "with contrast": of(contrast(x))}


# ---- judging


def errors_by_contrast(autoencoder, x, seed, parts=6):
    """Errors of patches that a uniform draw hides, by contrast within the image, lowest first."""
    order = np.argsort(np.random.default_rng(seed).random((len(x), mae.PATCHES)), -1)
    masked, kept = order[:, : mae.HIDDEN], order[:, mae.HIDDEN :]
    error = np.asarray(jax.jit(mae.errors)(autoencoder, masked, kept, x))
    rank = np.argsort(np.argsort(np.asarray(contrast(x)), -1), -1)
    part = np.take_along_axis(rank, masked, 1) * parts // mae.PATCHES
    return [error[part == i].mean() for i in range(parts)]


def judged(splits, autoencoder, seed):
    accuracy, loss = mae.probe(splits, partial(mae.all_features, autoencoder["encoder"]))
    errors = errors_by_contrast(autoencoder, splits.test.x, seed)
    return {"test": accuracy, "loss": loss, "errors": errors}


# ---- runs


def draw(path, rows, runs):
    colors = {UNIFORM: report.ORANGE, LEARNED: report.BLUE}
    with report.figure(path, 3, width=5.4) as (_, (left, middle, right)):
        report.bars(left, rows, "loss", colors, "test loss of a linear probe")
        for name, color in ((LEARNED, report.BLUE), (TURNED, report.RED)):
            for i, run in enumerate(runs.get(name, ())):
                steps = 5 * np.arange(len(run["slope"]))
                label = None if i else name
                middle.plot(steps, run["slope"], color=color, alpha=0.7, label=label)
        middle.axhline(0.0, color=report.GREY, linestyle=":")
        middle.set(
            xlabel="step of the masking network",
            ylabel="slope of its logits on contrast",
            title="Below 0, plain patches are hidden more",
        )
        middle.legend()
        for name, color in ((UNIFORM, report.ORANGE), (LEARNED, report.BLUE)):
            errors = np.mean([run["errors"] for run in runs[name]], 0)
            right.plot(range(1, len(errors) + 1), errors, "o-", color=color, label=name)
        right.set(
            xlabel="patches by contrast, plainest sixth first",
            ylabel="error",
            title="Reconstruction of test images",
        )
        right.legend()


def kept_rows(pieces, args, splits, seed):
    """Rows of a seed without learning."""
    run = lambda times: fixed(splits, args.steps * AHEAD, seed, by_contrast, times)
    return {n: pieces(f"{n}, seed {seed}", partial(run, times)) for n, times in FAMILY.items()}


def learned_rows(pieces, args, splits, seed):
    """And those with a network that is learned."""
    run = lambda rate: learned(splits, args.steps, seed, rate)
    # a rate compiles anew
    rates = {LEARNED: RATE} if args.small else {LEARNED: RATE, TURNED: -RATE, CONTROL: 0.0}
    rows = {n: pieces(f"{n}, seed {seed}", partial(run, rate)) for n, rate in rates.items()}
    hold = lambda how: fixed(splits, args.steps * AHEAD, seed, how, rows[LEARNED]["net"])
    for name, how in ((SAME, by_network), (ANOTHER, by_network_of_another)):
        rows[name] = pieces(f"{name}, seed {seed}", partial(hold, how))
    return rows


def main(argv=None):
    flags = report.parser(
        __doc__, full=dict(seeds=1, steps=150), small=dict(seeds=1, steps=2), pieces=True
    )
    flags.add_argument(
        "--fixed-seeds", type=int, default=1, help="seeds of the rows without learning (default 1)"
    )
    args = report.parse(flags, argv)
    if args.small:
        args.fixed_seeds = 1
    sizes, data = (mae.SMALL, mae.planted) if args.small else (mae.FULL, mae.cifar)
    settings = {"steps": args.steps, **sizes._asdict(), "rate": RATE, "times": TIMES}
    settings |= {"first": FIRST}
    begin, pieces = time.perf_counter(), report.Pieces(args, settings)

    first = data(FIRST, sizes)
    kept = [
        kept_rows(pieces, args, data(s, sizes), s) for s in range(FIRST, FIRST + args.fixed_seeds)
    ]
    moved = [
        learned_rows(pieces, args, data(s, sizes), s) for s in range(FIRST, FIRST + args.seeds)
    ]
    seconds = time.perf_counter() - begin

    runs = {name: [run[name] for run in rs] for rs in (kept, moved) for name in rs[0]}
    order = (UNIFORM, CONTROL, LEARNED, TURNED, SAME, ANOTHER, *FAMILY)
    runs = {name: runs[name] for name in order if name in runs}
    rows = {name: {k: [r[k] for r in rs] for k in ("test", "loss")} for name, rs in runs.items()}
    for run in (run for rs in moved for run in rs.values() if "net" in run):
        run |= alike(run["net"], first.test.x)  # all seeds have the same test images
    for row in rows.values():  # seed by seed
        row["more"] = [a - b for a, b in zip(row["loss"], rows[UNIFORM]["loss"], strict=False)]
    print("\nLinear probe on test images, mean ± standard error over seeds\n")
    columns = {"test": "accuracy", "loss": "loss", "more": "loss above uniform masking's"}
    shown = {f"{name} ({len(row['test'])} seed(s))": row for name, row in rows.items()}
    print(report.table(shown, columns))
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "mlo_mae_why.svg", rows, runs)
    seen = (
        "slope",
        "spread",
        "of places",
        "third level",
        "errors",
        "with brightness",
        "with contrast",
    )
    more = {name: [{k: r[k] for k in seen if k in r} for r in rs] for name, rs in runs.items()}
    report.save(
        args.out / "mlo_mae_why.json",
        {**vars(args), **settings},
        rows,
        seconds,
        runs=more,
    )
    return rows


if __name__ == "__main__":
    report.run(main)
