"""What runs when no algorithm is named: which, and whether it improves what people bring."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from flax import nnx

import bilevax as bx
from bilevax.algorithms.default import default_algorithm, looks_convex
from bilevax.base import Feed, InnerState
from bilevax.check import problem
from bilevax.data import same

logistic = lambda w, b: jnp.mean(jnp.logaddexp(0, b[0] @ w) - b[1] * (b[0] @ w))
penalised = lambda w, t, b: logistic(w, b) + 0.5 * jnp.exp(t) * w @ w


def rises(history):
    """How much the value rose along moves, at most, relative to its size."""
    value, moved = np.asarray(history["value"], np.float64), np.asarray(history["accepted"])
    return max([0.0, *((value[1:] - value[:-1])[moved[1:]] / np.abs(value[:-1])[moved[1:]])])


# ---- convex problems on whole arrays


def cancer():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    order = np.random.RandomState(0).permutation(len(y))
    x, y = jnp.asarray(x[order]), jnp.asarray(y[order], jnp.float32)
    return (x[:380], y[:380]), (x[380:], y[380:])


@pytest.mark.slow  # the quick one of its kind: penalties of Poisson regression, below
def test_a_penalty_of_logistic_regression_falls_and_never_blows_up():
    train, held_out = cancer()
    start = jnp.zeros(30, jnp.float32), jnp.float32(-5.0)
    run = lambda **k: bx.solve_bilevel(
        penalised,
        lambda w, t, b: logistic(w, b),
        *start,
        inner_data=train,
        outer_data=held_out,
        num_steps=30,
        **k,
    )
    solution = run()
    assert solution.stats["algorithm"] == "maid" and "of maid" in repr(solution)
    value = solution.history["value"]
    assert (
        rises(solution.history) == 0
        and value[0] > 0.5
        and value.max() == value[0]
        and value[-1] < 0.2
    )
    assert run(tol=1e-12).result != bx.RESULTS.converged


def test_penalties_of_poisson_regression_from_a_poor_start_never_rise():
    """A second kind: counts, a penalty a feature, inner and outer start far off."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 8))
    y = rng.poisson(np.exp(x[:, :3].sum(1) / 3))
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    poisson = lambda w, b: jnp.mean(jnp.exp(b[0] @ w) - b[1] * (b[0] @ w))
    inner = lambda w, t, b: poisson(w, b) + jnp.sum(jnp.exp(t) * w * w)
    solution = bx.solve_bilevel(
        inner, lambda w, t, b: poisson(w, b), jnp.full(8, 3.0, jnp.float32), jnp.full(8, 4.0,
        jnp.float32),
        inner_data=(x[:40], y[:40]), outer_data=(x[40:], y[40:]), num_steps=40,
    )  # fmt: skip
    value = solution.history["value"]
    assert rises(solution.history) == 0 and value[-1] < value[0] - 0.1


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e5])
def test_the_first_move_finds_its_scale(scale):
    inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
    outer = lambda y, x, b: 0.5 * jnp.sum((y - b[0]) ** 2)
    target = scale * jnp.asarray([1.0, 2.0])
    solution = bx.solve_bilevel(
        inner, outer, jnp.zeros(2), jnp.zeros(2), outer_data=target[None], num_steps=60
    )
    np.testing.assert_allclose(solution.outer_params, target, rtol=1e-4)


@pytest.mark.turns
@pytest.mark.parametrize("outer_scale", [1.0, 1e-6, 1e6])
def test_the_outer_objective_may_have_any_scale(outer_scale):
    """The same steps, whatever the outer objective is multiplied by."""
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.standard_normal((60, 6))), jnp.asarray(rng.standard_normal(60))
    fit = lambda w, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    inner = lambda w, t, b: fit(w, b) + jnp.sum(jnp.exp(t) * w * w)
    solution = bx.solve_bilevel(
        inner,
        lambda w, t, b: outer_scale * fit(w, b),
        jnp.zeros(6),
        jnp.zeros(6),
        inner_data=(x[:30], y[:30]),
        outer_data=(x[30:], y[30:]),
        num_steps=40,
    )
    value = solution.history["value"] / outer_scale
    assert rises(solution.history) == 0
    train, held_out = (
        (np.asarray(x[:30]), np.asarray(y[:30])),
        (np.asarray(x[30:]), np.asarray(y[30:])),
    )

    def closed_form(t):
        w = np.linalg.solve(
            train[0].T @ train[0] / 30 + np.diag(np.exp(t)), train[0].T @ train[1] / 30
        )
        return np.mean((held_out[0] @ w - held_out[1]) ** 2)

    best = scipy.optimize.minimize(closed_form, np.zeros(6), bounds=[(-20, 20)] * 6)
    np.testing.assert_allclose(value.min(), best.fun, rtol=1e-3)


@pytest.mark.turns
def test_a_flat_direction_stops_nothing():
    """Multinomial regression with intercepts: the inner Hessian is nearly singular along their
    common shift."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_wine(return_X_y=True)
    order = np.random.RandomState(1).permutation(len(y))
    x, y = ((x - x.mean(0)) / x.std(0)).astype("float32")[order], y[order].astype("int32")
    loss = lambda w, b: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(b[0] @ w["w"] + w["b"][None], b[1])
    )
    inner, outer = (
        lambda w, t, b: loss(w, b) + 0.5 * jnp.sum(jnp.exp(t) * w["w"] ** 2),
        lambda w, t, b: loss(w, b),
    )
    start = (
        {"w": jnp.zeros((13, 3), jnp.float32), "b": jnp.zeros(3, jnp.float32)},
        jnp.zeros((13, 3), jnp.float32),
    )
    solution = bx.solve_bilevel(
        inner,
        outer,
        *start,
        inner_data=(x[:60], y[:60]),
        outer_data=(x[60:110], y[60:110]),
        num_steps=40,
    )
    assert (
        rises(solution.history) == 0
        and float(outer(solution.inner_params, 0, (x[60:110], y[60:110]))) < 0.01
    )


BOX_Q = np.array([[1.0, 0.9, 0.0], [0.9, 1.5, 0.5], [0.0, 0.5, 1.0]])
BOX_C = np.array([-1.0, 2.0, 0.5])


@pytest.mark.turns
@pytest.mark.parametrize("memory", [0, 10])
def test_a_projected_run_ends_at_the_solution(memory):
    """The minimiser over ``x >= 0`` by enumeration of active sets; a projected quasi-Newton step
    stops elsewhere."""
    inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
    outer = lambda y, x, b: 0.5 * (y - BOX_C) @ jnp.asarray(BOX_Q) @ (y - BOX_C)
    solution = bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(3),
        jnp.ones(3),
        num_steps=100,
        project=lambda x: jnp.maximum(x, 0.0),
        algorithm=bx.algorithms.maid(memory=memory),
    )
    np.testing.assert_allclose(solution.outer_params, [0.0, 1.28, 0.86], atol=1e-5)
    assert (
        solution.history["grad_norm"][-1] < 1e-4
    )  # of the projected gradient: at the solution it is zero


def test_weights_on_a_simplex_end_at_the_solution():
    """A second set: a start outside of it, and the projection's own fixed point at the end."""

    def simplex(x):
        u = jnp.sort(x)[::-1]
        total = jnp.cumsum(u) - 1
        rho = jnp.sum(u * jnp.arange(1, x.size + 1, dtype=x.dtype) > total)
        return jnp.maximum(x - total[rho - 1] / rho.astype(x.dtype), 0.0)

    rng = np.random.default_rng(2)
    root = rng.standard_normal((5, 5))
    q, c = jnp.asarray(root @ root.T + 0.1 * np.eye(5)), jnp.asarray(rng.standard_normal(5))
    inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
    solution = bx.solve_bilevel(
        inner,
        lambda y, x, b: 0.5 * (y - c) @ q @ (y - c),
        jnp.zeros(5),
        jnp.full(5, 3.0),
        num_steps=200,
        project=simplex,
    )
    x = solution.outer_params
    np.testing.assert_allclose(jnp.sum(x), 1.0, rtol=1e-6)
    np.testing.assert_allclose(x, simplex(x - 0.1 * q @ (x - c)), atol=1e-5)


def test_where_no_step_is_accepted_it_is_said():
    """An outer objective whose derivative has the wrong sign: no step decreases it."""

    @jax.custom_jvp
    def turned(y):
        return 0.5 * jnp.sum((y - 3.0) ** 2)

    turned.defjvp(lambda p, t: (turned(*p), -jnp.sum((p[0] - 3.0) * t[0])))
    inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
    solution = bx.solve_bilevel(
        inner,
        lambda y, x, b: turned(y),
        jnp.zeros(2),
        jnp.ones(2),
        num_steps=20,
        tol=1e-3,
        algorithm=bx.algorithms.maid(),
    )
    assert solution.result == bx.RESULTS.tolerance_not_met
    assert solution.warnings[bx.RESULTS.no_step_accepted] == 19
    np.testing.assert_array_equal(solution.outer_params, 1.0)


def test_a_solution_to_rounding_is_no_warning():
    inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
    solution = bx.solve_bilevel(
        inner,
        lambda y, x, b: 1.0 + 0.5 * jnp.sum((y - 3.0) ** 2),
        jnp.zeros(2),
        jnp.ones(2),
        num_steps=40,
    )
    assert not solution.warnings
    np.testing.assert_allclose(solution.outer_params, 3.0, atol=1e-6)


def test_one_inner_solve_stands_in_the_program():
    """Loops: the search, the inner solve in it, the adjoint."""
    algorithm = bx.algorithms.maid()
    at = problem(penalised, lambda w, t, b: logistic(w, b), same, same, same)
    train, held_out = (jnp.ones((4, 3)), jnp.ones(4)), (jnp.ones((4, 3)), jnp.ones(4))
    state = algorithm.init(at, InnerState(jnp.zeros(3)), jnp.zeros(()))
    from bilevax.base import Feeds

    feeds = Feeds(
        inner=Feed(train, None, 0), hyper=Feed(train, None, 0), outer=Feed(held_out, None, 0)
    )
    text = str(jax.make_jaxpr(lambda state: algorithm.step(at, state, feeds))(state))
    assert text.count("while[") == 3


# ---- which one


def network(width):
    def net(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    key = jax.random.key(0)
    params = {
        "a": 0.5 * jax.random.normal(key, (4, width)),
        "b": 0.5 * jax.random.normal(key, (width,)),
    }
    return (
        lambda p, t, b: (
            jnp.mean((net(p, b[0]) - b[1]) ** 2)
            + jnp.exp(t) * sum(jnp.sum(a**2) for a in jax.tree.leaves(p))
        ),
        params,
    )


def looks(inner, start, outer):
    key = jax.random.key(1)
    batch = jax.random.normal(key, (30, 4)), jnp.sign(jax.random.normal(key, (30,)))
    return looks_convex(
        problem(inner, inner, same, same, same), Feed(batch, None, 0), InnerState(start), outer
    )


@pytest.mark.turns
def test_the_probe_tells_convex_from_other_lower_levels():
    square = lambda w, t, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    assert looks(square, jnp.zeros(4), 0.0)
    assert looks(lambda w, t, b: square(w, t, b) + jnp.exp(t) * w @ w, jnp.full(4, 30.0), -20.0)
    assert looks(
        lambda w, t, b: jnp.mean(jax.nn.softplus(-b[1] * (b[0] @ w))), jnp.zeros(4), 0.0
    )  # not strongly
    assert looks(lambda w, t, b: 1e-8 * square(w, t, b), jnp.zeros(4), 0.0)
    for width in (2, 32):
        assert not looks(*network(width), -9.0)
    assert not looks(lambda w, t, b: jnp.sum((w**2 - 1) ** 2), jnp.full(4, 0.1), 0.0)
    assert not looks(lambda w, t, b: square(w, t, b) * jnp.nan, jnp.zeros(4), 0.0)


@pytest.mark.turns
@pytest.mark.parametrize("act", [nnx.relu, nnx.tanh])
def test_minibatched_networks_run_and_improve(act):
    keys = jax.random.split(jax.random.key(0), 2)
    x, held_out = (
        jax.random.normal(keys[0], (200, 4), jnp.float32),
        jax.random.normal(keys[1], (100, 4), jnp.float32),
    )
    label = lambda x: (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c = (
                nnx.Linear(4, 32, rngs=rngs),
                nnx.Linear(32, 32, rngs=rngs),
                nnx.Linear(32, 2, rngs=rngs),
            )

        def __call__(self, x):
            return self.c(act(self.b(act(self.a(x)))))

    loss = lambda m, b: optax.softmax_cross_entropy_with_integer_labels(m(b["x"]), b["y"])
    train = lambda m, w, b: jnp.mean(jax.nn.sigmoid(w[b["i"]]) * loss(m, b))
    p = bx.nn.bilevel(
        train, lambda m, w, b: jnp.mean(loss(m, b)), Net(nnx.Rngs(0)), jnp.zeros(200, jnp.float32)
    )
    data = {"x": x, "y": label(x), "i": jnp.arange(200)}
    outer = {"x": held_out, "y": label(held_out), "i": jnp.zeros(100, jnp.int32)}
    solution = bx.solve_bilevel(
        **p.arguments,
        inner_data=bx.data.minibatches(data, 32),
        outer_data=bx.data.minibatches(outer, 32),
        num_steps=60,
        key=jax.random.key(0),
    )
    assert (
        solution.result == bx.RESULTS.success
        and solution.stats["steps"] == 60
        and solution.stats["algorithm"] == "double_loop"
    )
    assert solution.history["value"][-10:].mean() < 0.7 * solution.history["value"][:10].mean()


def test_a_state_keeps_its_algorithm_and_traced_data_is_refused():
    inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
    outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
    run = lambda y, x, **k: bx.solve_bilevel(inner, outer, y, x, num_steps=5, **k)
    first = run(jnp.zeros(2), jnp.zeros(2))
    assert run(jnp.zeros(2), jnp.zeros(2), state=first.state).stats["algorithm"] == "maid"
    with pytest.raises(ValueError, match=r"algorithm: got None with traced.*maid\(\).*double_loop"):
        jax.jit(lambda x: run(jnp.zeros(2), x).outer_params)(jnp.zeros(2))
    sources = [type("Source", (), {"draw": None, "data": None})()] * 3
    chosen = default_algorithm(
        problem(inner, outer, same, same, same), sources, InnerState(jnp.zeros(2)), jnp.zeros(2)
    )
    assert chosen.step.name == "double_loop"
