"""Four rooms: a shaping potential that is learned through the policy-gradient updates of agents
who start from nothing, and a critic beside it. Two levels each.

    python examples/systems/reinforcement.py

After Zheng, Oh and Singh, "On learning intrinsic rewards for policy gradient methods" (NeurIPS
2018, arXiv 1804.06459), with a potential in place of any reward: ``r + gamma phi(s') - phi(s)``
changes no optimal policy (Ng, Harada and Russell, ICML 1999). Lower level: tabular policies, each
with a goal of its own, by policy gradient on episodes that they sample themselves. Upper level: the
potential, a small network of position and goal, judged by the true return of the policies after ten
updates, by a score-function gradient.

Rows: no shaping; a critic learned beside the policy (two levels, too); a hand-made potential (the
distance to the goal, its scale tuned), alone and where the critic begins; the learned potential,
likewise, by three meta-seeds; and the optimal values, their scale tuned. Every row's rates are the
best of a grid on the training goals. Judged on goals that no potential has seen, and on a map with
other doors: how many updates a fresh agent takes until it reaches the goal in 40 moves with a
probability of .7, computed exactly.

What came out (10 agents a goal, 3 meta-seeds): 20.6 updates with the learned potential and 35.9
without; a critic alone takes 15.5, and one that begins at the learned potential 12.1.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report

import bilevax as bx

ROOMS = """
#############
#.....#.....#
#.....#.....#
#...........#
#.....#.....#
#.....#.....#
##.####.....#
#.....###.###
#.....#.....#
#.....#.....#
#...........#
#.....#.....#
#############
"""
OTHER = """
#############
#.....#.....#
#...........#
#.....#.....#
#.....#.....#
#.....#.....#
####.##.....#
#.....####.##
#.....#.....#
#.....#.....#
#.....#.....#
#...........#
#############
"""
SIDE, ACTIONS, GAMMA, SLIP = 13, 4, 0.97, 0.1
MOVES, EPISODES, JUDGED = 40, 8, 64  # of an episode; of an update; of the upper level's judgement
GOALS, UPDATES, HIDDEN, THRESHOLD = 16, 10, 32, 0.7
TRAINING, UNSEEN = 60, 16  # goals
# What is tried: actors' rates beside a critic that stands still and beside one that moves, the
# critics' own, scales of a potential, and the upper level's rates.
RATES, FAST, CRITICS = (
    (3.5, 5.0, 7.0, 10.0, 14.0, 20.0),
    (10.0, 14.0, 20.0, 28.0, 40.0),
    (0.2, 0.4, 0.8, 1.6),
)
SCALES, META_RATES = (0.03, 0.1, 0.3, 1.0), (1e-3, 2e-3, 4e-3)
UNSHAPED, CRITIC, HAND, HAND_CRITIC = "unshaped", "critic", "hand-made", "hand-made, critic"
LEARNED, BOTH, OPTIMAL = "learned", "learned, critic", "optimal values"


class Sizes(NamedTuple):
    """Of a run: agents for each goal where rates are tuned, how many goals those are, how many
    meta-seeds, updates of an agent's life, and how many settings of each grid are tried."""

    agents: int = 4
    goals: int = 12
    meta: int = 3
    life: int = 120
    grid: int | None = None


# ---- the world


def read(text):
    """Where each move leads, (cells, 4), and the free cells."""
    free = np.array([[c == "." for c in line] for line in text.split()])
    to = np.zeros((SIDE * SIDE, ACTIONS), np.int32)
    for cell in range(SIDE * SIDE):
        for a, (di, dj) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            i, j = cell // SIDE + di, cell % SIDE + dj
            inside = 0 <= i < SIDE and 0 <= j < SIDE and free[cell // SIDE, cell % SIDE]
            to[cell, a] = i * SIDE + j if inside and free[i, j] else cell
    return jnp.asarray(to), jnp.asarray(np.flatnonzero(free), jnp.int32)


def rollout(policy, goal, world, key, episodes=EPISODES):
    """Episodes of a policy: cells (MOVES + 1, episodes), moves, and who was still on the way."""
    to, free = world
    # one draw for all: each would be compiled for itself
    drawn = jax.random.uniform(key, (MOVES, episodes, ACTIONS + 3), minval=1e-6)
    noise, (slips, anywhere, begin) = (
        -jnp.log(-jnp.log(drawn[..., :ACTIONS])),
        drawn[..., ACTIONS:].T,
    )
    slips, anywhere = slips.T < SLIP, jnp.int32(ACTIONS * anywhere.T)
    start = free[jnp.int32(len(free) * begin[:, 0])]

    def move(cell, drawn):
        noise, slip, other = drawn
        action = jnp.argmax(policy[cell] + noise, -1)
        after = to[cell, jnp.where(slip, other, action)]
        return jnp.where(cell == goal, cell, after), (cell, action)

    last, (cells, moves) = jax.lax.scan(move, start, (noise, slips, anywhere))
    return jnp.concatenate([cells, last[None]]), moves, cells != goal


def returns(cells, going, goal, potential):
    """What followed each move, discounted: arrivals, and the potential gained."""
    arrived = going & (cells[1:] == goal)
    value = jnp.where(cells == goal, 0.0, potential[cells])
    reward = arrived + going * (GAMMA * value[1:] - value[:-1])

    def back(after, reward):
        now = reward + GAMMA * after
        return now, now

    return jax.lax.scan(back, jnp.zeros(cells.shape[1]), reward, reverse=True)[1]


def score(policy, cells, moves, going, gains):
    """Its gradient is the policy gradient for these gains."""
    taken = jax.nn.one_hot(moves, ACTIONS)
    chosen = jnp.sum(jax.nn.log_softmax(policy)[cells[:-1]] * taken, -1)
    return jnp.mean(jnp.sum(going * chosen * gains, 0))


def success(policy, goal, world):
    """The probability to arrive in time, from a free cell taken at random. Exact."""
    to, free = world
    moves = (1 - SLIP) * jax.nn.softmax(policy) + SLIP / ACTIONS

    def back(value, _):
        value = jnp.sum(moves * value[to], -1)
        return jnp.where(jnp.arange(SIDE * SIDE) == goal, 1.0, value), None

    begin = (jnp.arange(SIDE * SIDE) == goal).astype(jnp.float32)
    return jnp.mean(jax.lax.scan(back, begin, None, MOVES)[0][free])


def optimal(goal, world):
    """The values of the best policy, which a potential may at best be."""

    def back(value, _):
        mean = jnp.mean(value[world[0]], -1, keepdims=True)
        best = GAMMA * jnp.max((1 - SLIP) * value[world[0]] + SLIP * mean, -1)
        return jnp.where(jnp.arange(SIDE * SIDE) == goal, 1.0, best), None

    return jax.lax.scan(back, jnp.zeros(SIDE * SIDE), None, 100)[0]


def distance(goal, world):
    """Moves to the goal if there were no walls, negative and in units of the side."""
    cells = jnp.arange(SIDE * SIDE)
    away = jnp.abs(cells // SIDE - goal // SIDE) + jnp.abs(cells % SIDE - goal % SIDE)
    return -away / SIDE


def nothing(goal, world):
    return jnp.zeros(SIDE * SIDE)


# ---- the two levels


def potential(goal, world, net):
    """Of all cells, for this goal: the network knows positions and no walls."""
    cells = jnp.arange(SIDE * SIDE)
    places = [f(c) for c in (cells, jnp.full_like(cells, goal)) for f in (_row, _column)]
    apart = [f(cells) - f(goal) for f in (lambda c: c // SIDE, lambda c: c % SIDE)]
    x = jnp.concatenate([*places, jnp.stack([jnp.abs(a) / SIDE for a in apart], -1)], -1)
    return (jnp.tanh(x @ net["in"] + net["bias"]) @ net["out"])[:, 0]


def _row(cells):
    return jax.nn.one_hot(cells // SIDE, SIDE)


def _column(cells):
    return jax.nn.one_hot(cells % SIDE, SIDE)


def network(key):
    """A potential that is small to begin with."""
    width = 4 * SIDE + 2
    return {
        "in": jax.random.normal(key, (width, HIDDEN)) / 3,
        "bias": jnp.zeros(HIDDEN),
        "out": jnp.zeros((HIDDEN, 1)),
    }


def agent(policy, net, goal, key, *, world):
    """The lower level of one goal: the policy gradient of the shaped reward."""
    cells, moves, going = rollout(jax.lax.stop_gradient(policy), goal, world, key)
    return -score(
        policy, cells, moves, going, returns(cells, going, goal, potential(goal, world, net))
    )


def judge(policy, net, goal, key, *, world):
    """The upper level of one goal: minus the true return, with its score-function gradient."""
    cells, moves, going = rollout(jax.lax.stop_gradient(policy), goal, world, key, JUDGED)
    gains = returns(cells, going, goal, jnp.zeros(SIDE * SIDE))
    # the others' mean, a baseline free of the episode itself
    others = (jnp.sum(gains[0]) - gains[0]) / (JUDGED - 1)
    surrogate = score(policy, cells, moves, going, gains - others)
    return -(jnp.mean(gains[0]) + surrogate - jax.lax.stop_gradient(surrogate))


def learn(world, goals, rate, meta_rate, steps, key):
    """The potential by gradient through UPDATES updates of agents who know nothing, and what these
    reached at each step."""
    start = jnp.zeros((GOALS, SIDE * SIDE, ACTIONS))
    tasks = bx.data.episodes(lambda key, step: jax.random.choice(key, goals, (GOALS,), False))
    level = lambda fn: bx.objective(partial(fn, world=world), keyed=True)
    solution = bx.solve_bilevel(
        bx.tasks(level(agent), "sum"),
        bx.tasks(level(judge)),
        start,
        network(jax.random.fold_in(key, 1)),
        inner_data=tasks,
        outer_data=tasks,
        inner_init=lambda net: start,
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


# ---- every row: fresh agents, with a critic that may stand still


def critic(values, policy, batch):
    """The lower level of actor-critic: values that fit the returns of the policy's episodes, the
    last cell's own value standing for what comes after."""
    goal, world, drawn = batch
    cells, _, going = drawn
    gains = returns(cells, going, goal, jax.lax.stop_gradient(values))
    now = values[cells[:-1]]
    fit = jax.lax.stop_gradient(gains + now) - now
    return 0.5 * jnp.mean(jnp.sum(going * fit**2, 0))


def actor(values, policy, batch):
    """Its upper level: the policy gradient with the critic as the baseline."""
    goal, world, drawn = batch
    cells, moves, going = drawn
    gains = jax.lax.stop_gradient(returns(cells, going, goal, values))
    return -score(policy, cells, moves, going, gains)


def life(values, rates, goal, world, keys):
    """An agent's success after each update. The critic begins at `values` and takes a step before
    each of the actor's; with a rate of zero it stands still, and is a potential: returns of the
    reward so shaped are those of the true one less the potential where they begin."""
    step = bx.value_and_hypergrad(
        critic,
        actor,
        solver=bx.inner.optax(optax.sgd(rates[1]), 1),
        hypergradient=bx.hypergradient.one_step(),
    )

    def update(carry, key):
        values, policy = carry
        batch = (goal, world, rollout(policy, goal, world, key))
        found = step(values, policy, batch, batch)
        policy = policy - rates[0] * found.grad
        return (found.inner_params, policy), success(policy, goal, world)

    begin = values, jnp.zeros((SIDE * SIDE, ACTIONS))
    return jax.lax.scan(update, begin, keys)[1]


@jax.jit
def lives(values, rates, goals, world, keys):
    """Success of agents, (goals, agents, updates); each agent's keys are the same for all goals,
    rates and potentials."""
    one = jax.vmap(life, (None, None, None, None, 0))
    return jax.vmap(one, (0, None, 0, None, None))(values, rates, goals, world, keys)


def patience(curves):
    """Updates until success reaches the threshold, all of the life where it did not."""
    reached = np.asarray(curves) >= THRESHOLD
    return np.where(reached.any(-1), 1 + np.argmax(reached, -1), reached.shape[-1]).astype(float)


def keys_of(seed, agents, updates):
    return jax.random.split(jax.random.key(seed), (agents, updates))


def tried(potentials, setting, goals, world, keys):
    """Curves of a row at a setting, by potential."""
    scale, *rates = map(jnp.float32, setting)
    values = [jax.vmap(lambda goal, f=f: f(goal, world))(goals) for f in potentials]
    return [lives(scale * v, jnp.stack(rates), goals, world, keys) for v in values]


def tuned(potentials, grid, goals, world, keys):
    """Patience at each setting (scale of the potential, rate of the actor, of the critic)."""
    return [
        np.mean([patience(c).mean() for c in tried(potentials, s, goals, world, keys)])
        for s in grid
    ]


def at_edge(best, grid):
    """Which of a setting's numbers are the first or last of theirs in the grid."""
    names = ("scale", "rate", "critic's rate")
    axes = [sorted(set(values)) for values in zip(*grid, strict=True)]
    return [
        name
        for name, value, axis in zip(names, best, axes, strict=True)
        if len(axis) > 1 and value in (axis[0], axis[-1])
    ]


# ---- runs


@partial(jax.jit, static_argnames="steps")
def networks(world, goals, rate, meta_rates, keys, steps):
    """A potential for each meta-rate and key, side by side."""
    one = lambda meta_rate, key: learn(world, goals, rate, meta_rate, steps, key)
    return jax.vmap(one)(meta_rates, keys)


def split(world):
    """Goals to learn and tune on, and goals that only judge, the latter free on both maps."""
    order = np.random.default_rng(0).permutation(np.asarray(world[1]))
    there = np.isin(order, np.asarray(read(OTHER)[1]))
    return order[:TRAINING], order[TRAINING:][there[TRAINING:]][:UNSEEN]


def grids(count):
    """Settings that are tried, by row: (scale of the potential, actor's rate, critic's rate)."""
    rates, fast, critics, scales = (axis[:count] for axis in (RATES, FAST, CRITICS, SCALES))
    full = {
        UNSHAPED: ((1.0,), rates, (0.0,)),
        CRITIC: ((1.0,), fast, critics),
        HAND: (scales, rates, (0.0,)),
        HAND_CRITIC: (scales, fast, critics),
        LEARNED: ((1.0,), rates, (0.0,)),
        BOTH: ((1.0,), fast, critics),
        OPTIMAL: (scales, rates, (0.0,)),
    }
    return {name: list(product(*axes)) for name, axes in full.items()}


def judged(potentials, setting, goals, agents, life):
    """Patience by map, potential and agent (mean over goals), and mean curves."""
    out = {}
    for name, text in (("unseen", ROOMS), ("doors", OTHER)):
        curves = tried(potentials, setting, goals, read(text), keys_of(1, agents, life))
        out[name] = [patience(c).mean(0) for c in curves]
        out[f"{name} curve"] = np.mean([np.asarray(c).mean((0, 1)) for c in curves], 0)
    return out


def meta_learned(goals, rate, meta_rates, seeds, steps):
    """Networks, and the return that they were judged by at each step."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    rates = jnp.asarray(meta_rates, jnp.float32)
    nets, values = networks(read(ROOMS), goals, jnp.float32(rate), rates, keys, steps)
    return {"nets": nets, "values": values}


def of_networks(found):
    """Potentials of what was learned."""
    nets = {name: jnp.asarray(value, jnp.float32) for name, value in found["nets"].items()}
    of = lambda i: partial(potential, net=jax.tree.map(lambda a: a[i], nets))
    return [of(i) for i in range(len(nets["bias"]))]


def study(pieces, sizes, agents, steps):
    """All rows: what each setting gave on training goals, and what the best gave on others."""
    goals, unseen = split(read(ROOMS))
    few, keys = goals[: sizes.goals], keys_of(0, sizes.agents, sizes.life)
    grid, means = grids(sizes.grid), {}

    def tune(name, row, potentials):
        make = lambda: tuned(potentials, grid[row], few, read(ROOMS), keys)
        means[name] = pieces(f"{name}, tuned", make)
        return grid[row][int(np.argmin(means[name]))]

    chosen = {UNSHAPED: tune(UNSHAPED, UNSHAPED, [nothing])}
    rate = chosen[UNSHAPED][1]
    make = lambda: meta_learned(goals, rate, META_RATES, [0] * len(META_RATES), steps)
    first = pieces("learned by three meta-rates", make)
    for meta_rate, one in zip(META_RATES, of_networks(first), strict=True):
        tune(f"meta-rate {meta_rate}", LEARNED, [one])
    meta_rate = min(META_RATES, key=lambda r: min(means[f"meta-rate {r}"]))
    seeds = range(1, 1 + sizes.meta)
    make = lambda: meta_learned(goals, rate, [meta_rate] * sizes.meta, seeds, steps)
    learned = pieces("learned by three meta-seeds", make)
    potentials = {UNSHAPED: [nothing], CRITIC: [nothing], HAND: [distance], HAND_CRITIC: [distance]}
    potentials |= {LEARNED: of_networks(learned), BOTH: of_networks(learned), OPTIMAL: [optimal]}
    found = {}
    for row, of in potentials.items():
        setting = chosen.get(row) or tune(row, row, of)
        make = partial(judged, of, setting, unseen, agents, sizes.life)
        cost = len(grid[row]) * len(few) * sizes.agents * sizes.life
        ends = at_edge(setting, grid[row])
        found[row] = {**pieces(row, make), "setting": setting, "tuning": cost, "at edge": ends}
    return {"found": found, "means": means, "meta-rate": meta_rate, "learned": learned}


def table_of(found, steps):
    """Updates until the threshold by agent seed, mean over goals and potentials, and what was spent
    before: by the upper level, and in tuning."""
    learning = steps * GOALS * (UPDATES + JUDGED // EPISODES)
    return {
        name: {
            "unseen": np.mean(row["unseen"], 0),
            "doors": np.mean(row["doors"], 0),
            "learning": [learning / 1000 if name in (LEARNED, BOTH) else 0.0],
            "tuning": [row["tuning"] / 1000],
        }
        for name, row in found.items()
    }


def draw(path, rows, made):
    colors = {LEARNED: report.BLUE, BOTH: report.SKY, CRITIC: report.ORANGE, HAND: report.GREEN}
    colors |= {HAND_CRITIC: report.BROWN, OPTIMAL: report.PURPLE}
    with report.figure(path, 4, width=4.6, height=4.4) as (fig, axes):
        report.bars(
            axes[0], rows, "unseen", colors, "updates to the threshold, unseen goals", digits=1
        )
        for name, row in made["found"].items():
            curve = row["unseen curve"]
            axes[1].plot(
                1 + np.arange(len(curve)), curve, label=name, color=colors.get(name, report.GREY)
            )
        axes[1].axhline(THRESHOLD, color=report.GREY, linewidth=1, linestyle=":")
        axes[1].set(xlabel="updates", ylabel="probability to arrive in time", xlim=(0, 80))
        axes[1].legend(fontsize=9)
        world = read(ROOMS)
        goal = split(world)[1][0]
        shown = {
            "learned potential, an unseen goal": of_networks(made["learned"])[0],
            "optimal values": optimal,
        }
        free = np.isin(np.arange(SIDE * SIDE), world[1])
        for ax, (title, fn) in zip(axes[2:], shown.items(), strict=True):
            values = np.where(free, fn(goal, world), np.nan).reshape(SIDE, SIDE)
            fig.colorbar(ax.imshow(values, cmap="viridis"), ax=ax)
            ax.plot(goal % SIDE, goal // SIDE, "*", color=report.RED, markersize=14)
            ax.set(title=title, xticks=[], yticks=[])


def main(argv=None):
    parser = report.parser(
        __doc__, full=dict(seeds=10, steps=300), small=dict(seeds=2, steps=2), pieces=True
    )
    args = report.parse(parser, argv)
    sizes = Sizes(agents=1, goals=2, life=3, grid=1) if args.small else Sizes()
    begin = time.perf_counter()
    settings = {
        **sizes._asdict(), "steps": args.steps, "agents judged": args.seeds, "rates": RATES,
        "fast": FAST, "critics": CRITICS, "scales": SCALES, "meta-rates": META_RATES,
        "moves": MOVES, "episodes": EPISODES, "judged": JUDGED, "goals at once": GOALS,
        "updates": UPDATES, "hidden": HIDDEN, "threshold": THRESHOLD, "slip": SLIP,
        "discount": GAMMA,
    }  # fmt: skip
    made = study(report.Pieces(args, settings), sizes, args.seeds, args.steps)
    rows = table_of(made["found"], args.steps)
    columns = {
        "unseen": "updates, unseen goals",
        "doors": "updates, other doors",
        "learning": "thousand updates to learn it",
        "tuning": "to tune it",
    }
    print(f"\nUpdates until success is {THRESHOLD}, mean ± standard error of {args.seeds} agents\n")
    print(report.table(rows, columns, better=(LEARNED, "unseen"), digits=1))
    for name, row in made["found"].items():
        edge = f"; at the grid's edge: {', '.join(row['at edge'])}" if row["at edge"] else ""
        print(f"{name}: scale, rate, critic's rate {row['setting']}{edge}")
    print(f"meta-rate {made['meta-rate']}")
    plain = {part: np.mean(made["found"][UNSHAPED][part], 0) for part in ("unseen", "doors")}
    for name in (LEARNED, BOTH):
        for part, without in plain.items():
            each = [report.mean_se(1 - np.divide(p, without)) for p in made["found"][name][part]]
            print(f"{name}, {part}: fewer updates than unshaped, by meta-seed: {', '.join(each)}")
    seconds = time.perf_counter() - begin
    print(f"\n{seconds:.0f} s in all.")
    draw(args.out / "reinforcement.svg", rows, made)
    made["learned"] = made["learned"]["values"]  # the networks are no figures
    report.save(args.out / "reinforcement.json", {**vars(args), **settings}, rows, seconds, **made)


if __name__ == "__main__":
    report.run(main)
