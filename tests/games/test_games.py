"""Plays against games whose equilibria are known: bilinear, Dirac-GAN, quadratic of several
players; Nash and Stackelberg of one description."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import games
from bilevax.games import mirror

RNG = np.random.default_rng(0)
M = np.diag([1.0, 0.8, 0.6]) + 0.1 * RNG.standard_normal((3, 3))
A, B = RNG.standard_normal(3), RNG.standard_normal(3)
EQUILIBRIUM = {"x": np.linalg.solve(M.T, -B), "y": np.linalg.solve(M, -A)}


def bilinear(p):
    m, a, b = (jnp.asarray(value, p["x"].dtype) for value in (M, A, B))
    return p["x"] @ (m @ p["y"]) + a @ p["x"] + b @ p["y"]


def two(step, opt=optax.sgd):
    return [
        bx.Level("x", lambda p, batch: bilinear(p), solver=bx.tunable(opt, learning_rate=step)),
        bx.Level("y", lambda p, batch: -bilinear(p), solver=bx.tunable(opt, learning_rate=step)),
    ]


START = {"x": np.ones(3), "y": -np.ones(3)}
PLAYS = {
    "extragradient": (games.extragradient(), 0.5),
    "optimistic": (games.optimistic(), 0.3),
    "symplectic": (games.symplectic(1.0), 0.5),
    "consensus": (games.consensus(1.0), 0.5),
}


def distance(found):
    return max(np.abs(np.asarray(found[name]) - EQUILIBRIUM[name]).max() for name in EQUILIBRIUM)


@pytest.mark.parametrize(
    "name", [n if n == "extragradient" else pytest.param(n, marks=pytest.mark.slow) for n in PLAYS]
)
def test_a_bilinear_game(name):
    play, step = PLAYS[name]
    out = games.solve_game(two(step), START, play=play, num_steps=2000)
    assert distance(out.outer_params) < 1e-6
    assert out.history["grad_norm"][-1] < 1e-6
    np.testing.assert_allclose(out.history["x/value"], -out.history["y/value"], rtol=1e-12)


@pytest.mark.slow
def test_simultaneous_descent_leaves_a_bilinear_game():
    out = games.solve_game(two(0.5), START, play=games.simultaneous(), num_steps=60)
    assert distance(out.outer_params) > 100 * distance(START)


def gan(solver):
    """Dirac's GAN: the generator's point at p, the discriminator's slope s, data at 0; ``f(t) =
    −log(1 + exp(−t))``."""
    value = lambda p: -jax.nn.softplus(-p["g"] * p["d"])
    return [
        bx.Level("g", lambda p, batch: value(p), solver=solver),
        bx.Level("d", lambda p, batch: -value(p), solver=solver),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PLAYS))
def test_a_dirac_gan(name):
    play, step = PLAYS[name]
    start = {"g": 1.0, "d": 1.0}
    out = games.solve_game(gan(optax.sgd(2 * step)), start, play=play, num_steps=1500)
    assert max(abs(float(v)) for v in out.outer_params.values()) < 1e-6
    lost = games.solve_game(
        gan(optax.sgd(2 * step)), start, play=games.simultaneous(), num_steps=300
    )
    assert np.hypot(*(float(v) for v in lost.outer_params.values())) > 2.0


def table():
    """Three players on a line, each drawn to a mixture of the others: one linear system."""
    pull, home = (
        np.array([[0.0, 1.5, -1.0], [-1.5, 0.0, 1.0], [1.0, -1.0, 0.0]]),
        np.array([1.0, -2.0, 0.5]),
    )
    objective = lambda i: (
        lambda p, batch: (
            p[i] ** 2 / 2 + p[i] * (sum(pull[int(i), int(j)] * p[j] for j in p) - home[int(i)])
        )
    )
    levels = [bx.Level(i, objective(i), solver=optax.sgd(0.2)) for i in ("0", "1", "2")]
    return levels, np.linalg.solve(np.eye(3) + pull, home)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PLAYS))
def test_three_players(name):
    levels, want = table()
    play = (
        games.symplectic(0.5)
        if name == "symplectic"
        else games.consensus(0.5)
        if name == "consensus"
        else PLAYS[name][0]
    )
    out = games.solve_game(levels, {"0": 0.0, "1": 0.0, "2": 0.0}, play=play, num_steps=400)
    np.testing.assert_allclose([out.outer_params[i] for i in ("0", "1", "2")], want, atol=1e-6)


@pytest.mark.slow
def test_nash_and_stackelberg_of_one_description():
    """Two firms choose quantities: at the same time (Cournot), or one first (Stackelberg)."""
    profit = lambda mine, other: mine * (10.0 - mine - other) - mine
    levels = [
        bx.Level(
            "b",
            lambda p, batch: -profit(p["b"], p["a"]),
            solver=bx.inner.optax(optax.sgd(0.3), 30),
            hypergradient=bx.hypergradient.implicit(),
        ),
        bx.Level("a", lambda p, batch: -profit(p["a"], p["b"]), solver=optax.sgd(0.2)),
    ]
    start = {"a": 1.0, "b": 1.0}
    nash = games.solve_game(levels, start, num_steps=200).outer_params
    np.testing.assert_allclose([nash["a"], nash["b"]], [3.0, 3.0], atol=1e-6)
    first = bx.solve_multilevel(levels, start, num_steps=200, keep="last")
    np.testing.assert_allclose(
        [first.outer_params, first.inner_params["b"]], [4.5, 2.25], atol=1e-4
    )


def test_mirror_descent_is_the_multiplicative_rule():
    weights, grads = (
        jnp.array([[0.2, 0.3, 0.5], [0.0, 0.5, 0.5]]),
        jnp.array([[1.0, 0.0, -1.0], [2.0, 1.0, 1.0]]),
    )
    opt = mirror(0.7)
    moved = weights + opt.update(grads, opt.init(weights), weights)[0]
    want = weights * jnp.exp(-0.7 * grads)
    np.testing.assert_allclose(moved, want / want.sum(axis=1, keepdims=True), rtol=1e-12)


@pytest.mark.slow
def test_mirror_prox_finds_the_mixed_equilibrium_of_a_matrix_game():
    """Rock, paper, scissors with uneven stakes: the equilibrium is in proportion to the stakes of
    the others."""
    payoff = np.array([[0.0, -1.0, 2.0], [1.0, 0.0, -3.0], [-2.0, 3.0, 0.0]])
    rows = [
        bx.Level("p", lambda z, b: z["p"] @ (payoff @ z["q"]), solver=mirror(0.2)),
        bx.Level("q", lambda z, b: -z["p"] @ (payoff @ z["q"]), solver=mirror(0.2)),
    ]
    out = games.solve_game(
        rows, {"p": np.array([0.6, 0.2, 0.2]), "q": np.ones(3) / 3}, num_steps=3000
    )
    for name in ("p", "q"):
        np.testing.assert_allclose(out.outer_params[name], np.array([3.0, 2.0, 1.0]) / 6, atol=1e-6)


@pytest.mark.slow
def test_it_resumes_to_the_bit_saves_and_runs_on_devices(tmp_path):
    rows = RNG.standard_normal((64, 3))
    noisy = [
        bx.Level(
            "x",
            lambda p, batch: bilinear(p) + jnp.mean(batch @ p["x"]),
            solver=optax.adam(0.05, b1=0.0),
        ),
        bx.Level(
            "y", lambda p, batch: -bilinear(p) - jnp.mean(batch @ p["y"]), solver=optax.sgd(0.1)
        ),
    ]
    data = {"x": bx.data.minibatches(rows, 8), "y": bx.data.minibatches(rows, 8)}
    run = lambda steps, **more: games.solve_game(
        noisy,
        START,
        play=games.optimistic(),
        data=data,
        num_steps=steps,
        key=jax.random.key(0),
        **more,
    )
    whole, half = run(20), run(10)
    rest = run(10, state=half.state)
    saving = bx.checkpoint.every(5, str(tmp_path / "runs"))
    run(10, checkpoint=saving)
    again = run(20, checkpoint=saving)
    for other in (rest, again):
        for a, b in zip(
            jax.tree.leaves(whole.outer_params), jax.tree.leaves(other.outer_params), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    spread = run(20, sharding=bx.sharding.data_parallel())
    np.testing.assert_allclose(spread.outer_params["x"], whole.outer_params["x"], rtol=1e-8)


@pytest.mark.slow
def test_projection_single_precision_and_many_at_once():
    inside = lambda z: jnp.clip(z, -0.5, 0.5)
    out = games.solve_game(
        two(0.5),
        jax.tree.map(jnp.float32, START),
        num_steps=300,
        project={"x": inside, "y": inside},
    )
    assert all(
        leaf.dtype == jnp.float32 and np.abs(leaf).max() <= 0.5
        for leaf in out.outer_params.values()
    )
    starts = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), jax.tree.map(jnp.asarray, START))
    many = jax.jit(
        jax.vmap(lambda p: games.solve_game(two(0.5), p, num_steps=600, throw=False).outer_params)
    )(starts)
    for i in range(2):
        assert distance(jax.tree.map(lambda a, i=i: a[i], many)) < 1e-6


def test_everyone_reads_his_own_data():
    """Whatever the order of the names; the value reported is the last player's."""
    own = lambda name: lambda p, batch: jnp.mean((p[name] - batch) ** 2)
    names = ("w", "q", "a")
    players = [bx.Level(name, own(name), solver=optax.sgd(0.5)) for name in names]
    data = {name: jnp.full(4, float(i)) for i, name in enumerate(names)}
    out = games.solve_game(
        players,
        dict.fromkeys(names, jnp.asarray(3.0)),
        play=games.simultaneous(),
        data=data,
        num_steps=1,
    )
    assert {name: float(a) for name, a in out.outer_params.items()} == {"w": 0, "q": 1, "a": 2}
    np.testing.assert_allclose(out.history["value"], [1.0])


def test_refusals():
    with pytest.raises(TypeError, match="^levels: got"):
        games.solve_game([1, 2], {})
    with pytest.raises(ValueError, match="^levels: got 1"):
        games.solve_game(two(0.1)[:1], START)
    with pytest.raises(TypeError, match="^play: got"):
        games.solve_game(two(0.1), START, play="extragradient")
    with pytest.raises(ValueError, match="^params: got"):
        games.solve_game(two(0.1), {"x": np.ones(3)})
    with pytest.raises(TypeError, match=r"^project\['x'\]: got"):
        games.solve_game(two(0.1), START, project={"x": 3})
    rows = iter([np.ones(2)] * 100)  # one iterator cannot feed two players
    with pytest.raises(ValueError, match=r"data\['y'\]"):
        games.solve_game(two(0.1), START, data={"x": rows, "y": rows})
    with pytest.raises(ValueError, match="^Level 'x': got every=2"):
        games.solve_game(
            [bx.Level("x", lambda p, b: bilinear(p), solver=optax.sgd(0.1), every=2), two(0.1)[1]],
            START,
        )
    with pytest.raises(TypeError, match="^Level 'x', solver: got"):
        games.solve_game(
            [bx.Level("x", lambda p, b: bilinear(p), solver=bx.inner.lbfgs()), two(0.1)[1]], START
        )
