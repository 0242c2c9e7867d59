"""A learning rate for each step, learned by the metagradient through the whole training, against
cosine schedules on a grid.

    python examples/learned_schedule.py

A character transformer is trained for 160 steps by Adam. The logarithms of all its learning rates
are outer parameters; the derivative of its loss on held-out text in all of them comes from one way
back (`bx.replay`), and Adam moves them, starting from the best constant rate of the grid. Against
it: the best constant rate, and the best of cosine schedules with warm-up over a grid of peaks,
chosen on the same held-out text. Test text chooses nothing.

What came out (one seed, ten rounds): test loss 2.620 with the learned rates, 2.652 with the best
cosine, 2.682 with the best constant; held-out loss 2.491, 2.561 and 2.574. The rates are of these
batches in this order: no smooth curve, and half of what they gain on held-out text is gone on test
text.
"""

from __future__ import annotations

import time

import characters
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from jax import lax

import bilevax as bx

LEARNED, COSINE, CONSTANT = "learned", "cosine, best of the grid", "constant, best of the grid"
NAMES = (LEARNED, COSINE, CONSTANT)
COLORS = {LEARNED: report.BLUE, COSINE: report.ORANGE, CONSTANT: report.GREY}
BATCH, GRID, META_RATE = 16, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), 0.1


def optimizer(log_rates):
    return optax.chain(
        optax.scale_by_adam(eps_root=1e-6),
        optax.scale_by_schedule(lambda count: -jnp.exp(log_rates[count])),
    )


def inner(params, log_rates, tokens):
    return jnp.mean(characters.losses(params, tokens))


@jax.jit
def train(params, log_rates, batches):
    """The same training as one compiled scan, for the grid."""
    opt = optimizer(log_rates)

    def step(carry, tokens):
        params, state = carry
        updates, state = opt.update(jax.grad(inner)(params, log_rates, tokens), state, params)
        return (optax.apply_updates(params, updates), state), None

    return lax.scan(step, (params, opt.init(params)), batches)[0][0]


def best(schedules, params, batches, held):
    return min(
        schedules, key=lambda rates: float(inner(train(params, rates, batches), rates, held))
    )


def main(argv=None):
    full, small = dict(seeds=1, steps=160, rounds=10), dict(seeds=1, steps=8, rounds=2)
    parser = report.parser(__doc__, full=full, small=small)
    parser.add_argument(
        "--rounds", type=int, help="trainings with a way back (default 10, with --small 2)"
    )
    args = report.parse(parser, argv)
    begin = time.perf_counter()
    rows, curves = {name: {"test loss": [], "held-out loss": []} for name in NAMES}, []
    fn = bx.replay.value_and_metagrad(inner, inner, optimizer, args.steps)
    for seed in range(args.seeds):
        symbols, pieces = characters.pieces("plays", 512 + 256, seed)
        _, test = characters.pieces("plays", 512, seed, skip=400_000)
        rng, held = np.random.default_rng(seed), pieces[512:]
        batches = pieces[rng.integers(0, 512, (args.steps, BATCH))]
        params = characters.transformer(jax.random.key(seed), len(symbols))
        grid = GRID[:2] if args.small else GRID
        cosine = lambda peak: optax.warmup_cosine_decay_schedule(
            peak / 100, peak, args.steps // 10 + 1, args.steps, peak / 100
        )
        constant = best(
            [jnp.full(args.steps, jnp.log(rate)) for rate in grid], params, batches, held
        )
        found = {
            CONSTANT: constant,
            COSINE: best(
                [jnp.log(cosine(peak)(jnp.arange(args.steps))) for peak in grid],
                params,
                batches,
                held,
            ),
        }
        meta, rates, values, lowest = optax.adam(META_RATE), constant, [], np.inf
        state = meta.init(rates)
        for _ in range(args.rounds):
            metagradient = fn(params, rates, bx.replay.reader(lambda step: batches[step]), held)  # noqa: B023
            values.append(float(metagradient.value))
            if values[-1] < lowest:
                lowest, found[LEARNED] = values[-1], rates
            updates, state = meta.update(metagradient.grad, state)
            rates = optax.apply_updates(rates, updates)
        curves.append(values)
        for name in NAMES:
            trained = train(params, found[name], batches)
            rows[name]["test loss"].append(float(inner(trained, None, test)))
            rows[name]["held-out loss"].append(float(inner(trained, None, held)))
    seconds = time.perf_counter() - begin
    print(report.table(rows, {"test loss": "test loss", "held-out loss": "held-out loss"}) + "\n")
    with report.figure(args.out / "learned_schedule.svg", 2) as (_, (left, right)):
        for name in NAMES:
            left.semilogy(np.exp(np.asarray(found[name])), color=COLORS[name], label=name)
        left.set(xlabel="step", ylabel="learning rate")
        left.legend()
        for values in curves:
            right.plot(values, "o-", color=report.BLUE)
        right.axhline(
            rows[COSINE]["held-out loss"][-1], color=report.ORANGE, linestyle="--", label=COSINE
        )
        right.set(xlabel="round", ylabel="held-out loss after training")
        right.legend()
    report.save(
        args.out / "learned_schedule.json",
        dict(vars(args), grid=GRID, meta_rate=META_RATE),
        rows,
        seconds,
        curves=curves,
    )
    return rows


if __name__ == "__main__":
    report.run(main)
