"""A pole on a cart, from gymnax: a shaping potential learned through the policy-gradient updates of
networks that start from nothing, beside a critic. The second world of `systems/reinforcement.py`.

    pip install gymnax
    python examples/cart_pole.py

Lower level: sixteen policy networks, each from an initialisation of its own, by policy gradient on
four episodes an update that they sample themselves. Upper level: the potential, a network of the
pole's state, judged by the true return after ten updates. A pole that is up earns 1 a step, 200
steps at most; judged by how many updates a fresh policy takes until it keeps the pole up for 180
steps in the mean of five updates, also with a pole half as long. Every row's rates, the scale of
the hand-made potential (one less the squared angle, in units of the angle at which the pole counts
as fallen) and the meta-rate are the best of a grid on other policies.

What came out (10 policies, 3 meta-seeds): 33.9 updates without shaping and 33.4 with the learned
potential, which is a null; 11.6 with the hand-made one and 14.0 with a critic.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from typing import NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import bilevax as bx

STEPS, GAMMA, EPISODES, JUDGED, TRIED, MEAN = 200, 0.97, 4, 32, 32, 5
AGENTS, UPDATES, WIDTH, HIDDEN, THRESHOLD = 16, 10, 16, 32, 0.9
UNITS = np.array([2.4, 2.0, 0.2095, 2.0], np.float32)  # of place, speed, angle, angular speed
RATES, FAST, CRITICS = (0.025, 0.05, 0.1, 0.2, 0.4), (0.1, 0.2, 0.4, 0.8), (0.1, 0.3, 1.0)
SCALES, META_RATES = (0.3, 1.0, 3.0), (1e-3, 3e-3, 1e-2)
UNSHAPED, CRITIC, HAND, HAND_CRITIC = "unshaped", "critic", "hand-made", "hand-made, critic"
LEARNED, BOTH = "learned", "learned, critic"


class Sizes(NamedTuple):
    """Policies that tune, meta-seeds, updates of a life, settings of each grid that are tried."""

    agents: int = 8
    meta: int = 3
    life: int = 60
    grid: int | None = None


# ---- the world


def world(length=0.5):
    """gymnax's cart and pole, of this half length; who has no gymnax is told."""
    try:
        import gymnax
    except ImportError as error:
        raise data.Unavailable(f"needs gymnax ({error}): pip install gymnax") from error
    env, params = gymnax.make("CartPole-v1")
    return env, params.replace(length=length, polemass_length=params.masspole * length)


def rollout(policy, key, *, place, episodes=EPISODES):
    """Episodes of a policy: states (STEPS + 1, episodes, 4), moves, and whether the pole is up
    (STEPS + 1, episodes)."""
    env, params = place
    first, noise = jax.random.split(key)
    noise = jax.random.gumbel(noise, (STEPS, episodes, 2))
    seen, state = jax.vmap(env.reset_env, (0, None))(jax.random.split(first, episodes), params)
    step = jax.vmap(partial(env.step_env, first, params=params))

    def move(carry, noise):
        seen, state, up = carry
        action = jnp.argmax(actions(policy, seen) + noise, -1)
        then, state, _, fallen, _ = step(state=state, action=action)
        return (then, state, up & ~fallen), (seen, action, up)

    carry = seen, jax.tree.map(jnp.asarray, state), jnp.ones(episodes, bool)
    (last, _, up), (seen, moves, ups) = jax.lax.scan(move, carry, noise)
    return jnp.concatenate([seen, last[None]]), moves, jnp.concatenate([ups, up[None]])


def returns(up, values):
    """What followed each move, discounted: (1 - GAMMA) a step, and the potential gained, which is
    zero where the pole is down."""
    values = jnp.where(up, values, 0.0)
    reward = up[:-1] * (1 - GAMMA + GAMMA * values[1:] - values[:-1])

    def back(after, reward):
        now = reward + GAMMA * after
        return now, now

    return jax.lax.scan(back, jnp.zeros(up.shape[1]), reward, reverse=True)[1]


# ---- the networks


def network(key, width, outputs):
    """Of a state; zero to begin with."""
    return {
        "in": jax.random.normal(key, (len(UNITS), width)),
        "bias": jnp.zeros(width),
        "out": jnp.zeros((width, outputs)),
        "last": jnp.zeros(outputs),
    }


def of(net, seen):
    return jnp.tanh(seen / UNITS @ net["in"] + net["bias"]) @ net["out"] + net["last"]


def actions(policy, seen):
    return of(policy, seen)


def score(policy, seen, moves, up, gains):
    """Its gradient is the policy gradient for these gains."""
    logp = jax.nn.log_softmax(actions(policy, seen[:-1]))
    chosen = jnp.sum(logp * jax.nn.one_hot(moves, 2), -1)
    return jnp.mean(jnp.sum(up[:-1] * chosen * gains, 0))


def hand_made(seen):
    return 1 - (seen[..., 2] / UNITS[2]) ** 2


# ---- the two levels


def moved(start, by):
    return jax.tree.map(jnp.add, start, by)


def agent(by, net, start, key, *, place):
    """The lower level: the policy gradient of the shaped reward, from `start` moved `by`."""
    policy = moved(start, by)
    seen, moves, up = rollout(jax.lax.stop_gradient(policy), key, place=place)
    return -score(policy, seen, moves, up, returns(up, of(net, seen)[..., 0]))


def judge(by, net, start, key, *, place):
    """The upper level: minus the true return, with its score-function gradient."""
    policy = moved(start, by)
    drawn = rollout(jax.lax.stop_gradient(policy), key, place=place, episodes=JUDGED)
    gains = returns(drawn[2], jnp.zeros(drawn[2].shape))
    others = (jnp.sum(gains, 1, keepdims=True) - gains) / (JUDGED - 1)
    surrogate = score(policy, *drawn, gains - others)
    return -(jnp.mean(gains[0]) + surrogate - jax.lax.stop_gradient(surrogate))


def learn(place, rate, meta_rate, steps, key):
    """The potential by gradient through UPDATES updates of fresh policies."""
    fresh = lambda key, step: jax.vmap(lambda k: network(k, WIDTH, 2))(
        jax.random.split(key, AGENTS)
    )
    tasks, level = (
        bx.data.episodes(fresh),
        lambda fn: bx.objective(partial(fn, place=place), keyed=True),
    )
    still = jax.tree.map(jnp.zeros_like, fresh(key, 0))
    solution = bx.solve_bilevel(
        bx.tasks(level(agent), "sum"),
        bx.tasks(level(judge)),
        still,
        network(jax.random.fold_in(key, 1), HIDDEN, 1),
        inner_data=tasks,
        outer_data=tasks,
        inner_init=lambda net: still,
        algorithm=bx.algorithms.double_loop(
            bx.inner.optax(bx.tunable(optax.sgd, learning_rate=rate), UPDATES),
            bx.hypergradient.unrolled(),
            bx.tunable(clipped_adam, rate=meta_rate),
        ),
        num_steps=steps,
        key=key,
        keep="last",
    )
    return solution.outer_params, -solution.history["value"]


def clipped_adam(rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


# ---- every row: fresh policies, with a critic that may stand still


def critic(net, policy, batch):
    """The lower level of actor-critic: values that fit the returns of the policy's episodes."""
    (seen, _, up), scale = batch
    now = of(net, seen)[..., 0]
    values = jax.lax.stop_gradient(now) + scale * hand_made(seen)
    fit = jax.lax.stop_gradient(returns(up, values) + now[:-1]) - now[:-1]
    return 0.5 * jnp.mean(jnp.sum(up[:-1] * fit**2, 0)) / STEPS


def actor(net, policy, batch):
    """Its upper level: the policy gradient with the critic as the baseline."""
    drawn, scale = batch
    values = jax.lax.stop_gradient(of(net, drawn[0])[..., 0] + scale * hand_made(drawn[0]))
    return -score(policy, *drawn, returns(drawn[2], values))


def life(net, setting, key, place, updates):
    """The share of the steps for which a fresh policy keeps the pole up, after each update. The
    critic begins at `net` and takes a step before each of the actor's; with a rate of zero it
    stands still, and is a potential."""
    scale, rate, critic_rate = setting
    step = bx.value_and_hypergrad(
        critic,
        actor,
        solver=bx.inner.optax(optax.sgd(critic_rate), 1),
        hypergradient=bx.hypergradient.one_step(),
    )

    def update(carry, key):
        net, policy = carry
        batch = rollout(policy, key, place=place), scale
        found = step(net, policy, batch, batch)
        policy = jax.tree.map(lambda p, g: p - rate * g, policy, found.grad)
        tried = rollout(policy, jax.random.fold_in(key, 1), place=place, episodes=TRIED)
        return (found.inner_params, policy), jnp.mean(tried[2][1:])

    begin = net, network(key, WIDTH, 2)
    return jax.lax.scan(update, begin, jax.random.split(key, updates))[1]


@partial(jax.jit, static_argnames="updates")
def lives(nets, setting, keys, length, updates):
    """(potentials, policies, updates); a policy's keys are the same in all rows."""
    place = world(length)
    one = lambda net, key: life(net, setting, key, place, updates)
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(nets, keys)


def patience(curves):
    """Updates until the pole is up for the THRESHOLD of the steps in the mean of the last MEAN
    updates, by potential and policy: one lucky update is not enough."""
    total = np.cumsum(np.pad(curves, [(0, 0)] * (np.ndim(curves) - 1) + [(1, 0)]), -1)
    mean = (total[..., MEAN:] - total[..., :-MEAN]) / MEAN
    reached = np.concatenate([np.zeros((*mean.shape[:-1], MEAN - 1), bool), mean >= THRESHOLD], -1)
    return np.where(reached.any(-1), 1 + np.argmax(reached, -1), reached.shape[-1]).astype(float)


# ---- runs


@partial(jax.jit, static_argnames="steps")
def networks(rate, meta_rates, keys, steps):
    place = world()
    return jax.vmap(lambda meta, key: learn(place, rate, meta, steps, key))(meta_rates, keys)


def grids(count):
    """Settings by row: (scale of the hand-made potential, actor's rate, critic's rate)."""
    rates, fast, critics, scales = (axis[:count] for axis in (RATES, FAST, CRITICS, SCALES))
    full = {
        UNSHAPED: ((0.0,), rates, (0.0,)),
        CRITIC: ((0.0,), fast, critics),
        HAND: (scales, rates, (0.0,)),
        HAND_CRITIC: (scales, fast, critics),
        LEARNED: ((0.0,), rates, (0.0,)),
        BOTH: ((0.0,), fast, critics),
    }
    return {name: list(product(*axes)) for name, axes in full.items()}


def study(pieces, sizes, agents, steps):
    """All rows, tuned on some policies and judged on others."""
    keys = lambda seed, many: jax.random.split(jax.random.key(seed), many)
    none = jax.tree.map(lambda a: a[None], network(jax.random.key(0), HIDDEN, 1))
    grid, means = grids(sizes.grid), {}

    def run(nets, setting, many, seed, length=0.5):
        setting, length = jnp.array(setting, jnp.float32), jnp.float32(length)
        return lives(nets, setting, keys(seed, many), length, sizes.life)

    def tune(name, row, nets):
        make = lambda: [patience(run(nets, s, sizes.agents, 0)).mean() for s in grid[row]]
        means[name] = pieces(f"{name}, tuned", make)
        return grid[row][int(np.argmin(means[name]))]

    def learned(name, rate, rates, seeds):
        seeds = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        make = lambda: networks(jnp.float32(rate), jnp.asarray(rates), seeds, steps)
        nets, values = pieces(name, make)
        return {part: jnp.asarray(a, jnp.float32) for part, a in nets.items()}, values

    chosen = {UNSHAPED: tune(UNSHAPED, UNSHAPED, none)}
    rate = chosen[UNSHAPED][1]
    rates = META_RATES[: sizes.grid]
    nets, _ = learned("learned by meta-rates", rate, rates, [0] * len(rates))
    for i, meta_rate in enumerate(rates):
        tune(f"meta-rate {meta_rate}", LEARNED, jax.tree.map(lambda a, i=i: a[i : i + 1], nets))
    meta_rate = min(rates, key=lambda r: min(means[f"meta-rate {r}"]))
    nets, values = learned(
        "learned by meta-seeds", rate, [meta_rate] * sizes.meta, range(1, 1 + sizes.meta)
    )
    found = {}
    for row in grid:
        of_row = nets if row in (LEARNED, BOTH) else none
        setting = chosen.get(row) or tune(row, row, of_row)

        def make(of_row=of_row, setting=setting):
            curves = run(of_row, setting, agents, 1), run(of_row, setting, agents, 1, 0.25)
            return {"same": patience(curves[0]), "half": patience(curves[1])} | {
                "curve": np.mean(curves[0], (0, 1))
            }

        tuning = len(grid[row]) * sizes.agents * sizes.life
        found[row] = {**pieces(row, make), "setting": setting, "tuning": tuning}
    return {"found": found, "means": means, "meta-rate": meta_rate, "values": values}


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=10, steps=150), small=dict(seeds=2, steps=2), pieces=True
    )
    args = report.parse(parser, argv)
    sizes = Sizes(agents=2, meta=1, life=MEAN, grid=1) if args.small else Sizes()
    begin = time.perf_counter()
    world()
    settings = {
        **sizes._asdict(), "steps": args.steps, "agents judged": args.seeds, "rates": RATES,
        "fast": FAST, "critics": CRITICS, "scales": SCALES, "meta-rates": META_RATES,
        "length": STEPS, "episodes": EPISODES, "judged": JUDGED, "policies at once": AGENTS,
        "updates": UPDATES, "width": WIDTH, "hidden": HIDDEN, "threshold": THRESHOLD,
        "discount": GAMMA,
    }  # fmt: skip
    made = study(report.Pieces(args, settings), sizes, args.seeds, args.steps)
    learning = args.steps * AGENTS * (UPDATES + JUDGED // EPISODES) / 1000
    rows = {
        name: {
            "same": np.mean(row["same"], 0),
            "half": np.mean(row["half"], 0),
            "learning": [learning if name in (LEARNED, BOTH) else 0.0],
            "tuning": [row["tuning"] / 1000],
        }
        for name, row in made["found"].items()
    }
    columns = {
        "same": "updates, fresh policies",
        "half": "updates, half the pole",
        "learning": "thousand updates to learn it",
        "tuning": "to tune it",
    }
    print(f"\nUpdates until the pole is up for {THRESHOLD:.0%} of {STEPS} steps\n")
    print(report.table(rows, columns, better=(LEARNED, "same"), digits=1))
    for name, row in made["found"].items():
        print(f"{name}: scale, rate, critic's rate {row['setting']}")
    print(f"meta-rate {made['meta-rate']}")
    for name in (LEARNED, BOTH):
        each = [
            report.mean_se(1 - np.divide(p, rows[UNSHAPED]["same"]))
            for p in made["found"][name]["same"]
        ]
        print(f"{name}: fewer updates than unshaped, by meta-seed: {', '.join(each)}")
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    colors = {LEARNED: report.BLUE, BOTH: report.SKY, CRITIC: report.ORANGE, HAND: report.GREEN}
    with report.figure(args.out / "cart_pole.svg", 2, width=6.0) as (_, (left, right)):
        report.bars(left, rows, "same", colors, "updates to the threshold", digits=1)
        for name, row in made["found"].items():
            color = colors.get(name, report.BROWN if name == HAND_CRITIC else report.GREY)
            right.plot(1 + np.arange(len(row["curve"])), row["curve"], label=name, color=color)
        right.axhline(THRESHOLD, color=report.GREY, linewidth=1, linestyle=":")
        right.set(xlabel="updates", ylabel="share of the steps with the pole up")
        right.legend(fontsize=9)
    report.save(args.out / "cart_pole.json", {**vars(args), **settings}, rows, seconds, **made)


if __name__ == "__main__":
    report.run(main)
