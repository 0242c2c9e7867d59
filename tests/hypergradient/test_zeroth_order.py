"""Methods that need solves only: unbiased where they claim to be, and black boxes by their
interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.base import Ctx, Feed, Feeds, InnerState, Lower, Problem
from bilevax.data import same
from tests.problems import PROBLEMS, unrolled_quadratic

FORM = PROBLEMS["quadratic"]
STEPS, STEP = 4, 0.3
SOLVER = bx.inner.optax(optax.sgd(STEP), STEPS)
DRAWS = 4096


def pulled(method, w):
    """The pullback's outer cotangent as a function of the key."""
    y, x, batch = jax.tree.map(
        jnp.asarray, (FORM.inner_params, FORM.outer_params, FORM.inner_batch)
    )
    objective = bx.objective(FORM.inner)

    def run(key):
        lower = Lower(objective, SOLVER, same)
        _, pullback = method.vjp(
            lower, InnerState(y, SOLVER.init(y)), x, Feed(batch), Ctx(batch, key), method.init(y)
        )
        cotangent, _, _, info = pullback(w)
        return cotangent, info

    return run


@pytest.mark.parametrize("antithetic", [True, False])
def test_unbiased_over_draws(antithetic):
    """On a quadratic the K-step map is affine, so smoothing has no bias, and the answer is ``J_K'
    w``."""
    w = np.linspace(-1, 1, 6)
    exact = unrolled_quadratic(FORM, STEP, STEPS).jacobian.T @ w
    run = pulled(
        bx.hypergradient.zeroth_order(samples=1, scale=0.1, antithetic=antithetic), jnp.asarray(w)
    )
    draws = np.asarray(
        jax.jit(lambda keys: jax.lax.map(lambda key: run(key)[0], keys, batch_size=256))(
            jax.random.split(jax.random.key(0), DRAWS)
        )
    )
    error = draws.mean(axis=0) - exact
    standard = draws.std(axis=0, ddof=1) / np.sqrt(DRAWS)
    assert np.all(standard > 0)
    assert np.all(np.abs(error) <= 3 * standard), (error / standard, exact)
    assert np.linalg.norm(error) < 0.2 * np.linalg.norm(exact)


def test_samples_chunks_and_spread():
    w, key = jnp.linspace(-1.0, 1.0, 6), jax.random.key(3)
    whole, info = jax.jit(pulled(bx.hypergradient.zeroth_order(samples=64, scale=0.1), w))(key)
    chunked, _ = jax.jit(pulled(bx.hypergradient.zeroth_order(samples=64, scale=0.1, chunk=10), w))(
        key
    )
    np.testing.assert_allclose(whole, chunked, rtol=1e-12)
    assert int(info["gradients"]) == 2 * 64 * STEPS
    assert int(info["hvps"]) == int(info["mixed_products"]) == 0
    exact = unrolled_quadratic(FORM, STEP, STEPS).jacobian.T @ np.asarray(w)
    error = np.linalg.norm(np.asarray(whole) - exact)
    assert 0.3 * float(info["spread"]) < error < 3 * float(info["spread"])


def test_chunks_need_less_memory():
    w = jnp.linspace(-1.0, 1.0, 6)

    def temporaries(chunk):
        run = pulled(bx.hypergradient.zeroth_order(samples=2048, scale=0.1, chunk=chunk), w)
        return jax.jit(run).lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32) < temporaries(None)


def test_needs_a_key():
    fn = bx.value_and_hypergrad(
        FORM.inner, FORM.outer, solver=SOLVER, hypergradient=bx.hypergradient.zeroth_order()
    )
    with pytest.raises(
        ValueError, match="^key: got None although hypergradient.zeroth_order draws"
    ):
        fn(FORM.inner_params, FORM.outer_params, FORM.inner_batch, FORM.outer_batch)


def test_through_a_solver_that_loops_to_a_tolerance():
    """The solution map of L-BFGS: no step of it is differentiable."""
    method = bx.hypergradient.zeroth_order(samples=3000, scale=1e-3, chunk=500)
    fn = bx.value_and_hypergrad(
        lambda y, x, b: jnp.sum(jnp.cosh(y - x)),
        lambda y, x, b: jnp.sum(y),
        solver=bx.inner.lbfgs(maxiter=20, tol=1e-8),
        hypergradient=method,
    )
    est = jax.jit(fn)(jnp.zeros(2), jnp.asarray([0.5, -0.5]), key=jax.random.key(0))
    np.testing.assert_allclose(est.grad, np.ones(2), atol=3 * float(est.info["spread"]))
    assert float(est.info["spread"]) < 0.1


# ---- persistent evolution strategies


@pytest.mark.parametrize("persistent", [True, False])
def test_persistent_es_is_unbiased_over_truncations_and_plain_es_is_not(persistent):
    """Three unrolls of two steps each: the sum of the estimates against the gradient of the sum of
    the three losses."""
    linear_outer = lambda y, x, batch: jnp.sum(jnp.linspace(-1.0, 1.0, 6) * y) + jnp.sum(x)
    algorithm = bx.algorithms.persistent_es(
        bx.inner.optax(optax.sgd(STEP), 2),
        optax.sgd(1.0),
        samples=1,
        scale=0.1,
        unrolls=3,
        persistent=persistent,
    )
    problem = Problem(bx.objective(FORM.inner), bx.objective(linear_outer), same, same, same)
    y, x, batch = jax.tree.map(
        jnp.asarray, (FORM.inner_params, FORM.outer_params, FORM.inner_batch)
    )

    def one(key):
        state, total = algorithm.init(problem, InnerState(y), x), 0.0
        for k in jax.random.split(key, 3):
            new, _ = algorithm.step(problem, state, Feeds(inner=Feed(batch), key=k))
            total += state.outer - new.outer  # sgd(1.0) shows the gradient
            state = new._replace(outer=x)
        return total

    draws = np.asarray(
        jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=512))(
            jax.random.split(jax.random.key(1), DRAWS)
        )
    )
    w = np.linspace(-1, 1, 6)
    exact = sum(1 + unrolled_quadratic(FORM, STEP, steps).jacobian.T @ w for steps in (2, 4, 6))
    truncated = 3 * (
        1 + unrolled_quadratic(FORM, STEP, 2).jacobian.T @ w
    )  # what earlier unrolls did is forgotten
    mean, standard = draws.mean(axis=0), draws.std(axis=0, ddof=1) / np.sqrt(DRAWS)
    expected, other = (exact, truncated) if persistent else (truncated, exact)
    assert np.all(np.abs(mean - expected) <= 3 * standard), (mean - expected) / standard
    assert np.max(np.abs(mean - other) / standard) > 4


def test_persistent_es_solves_starts_over_and_needs_a_key():
    algorithm = bx.algorithms.persistent_es(
        SOLVER, optax.adam(0.1), samples=8, scale=0.05, unrolls=4, chunk=3
    )
    args = (FORM.inner, FORM.outer, FORM.inner_params, FORM.outer_params)
    data = dict(
        inner_data=FORM.inner_batch, outer_data=FORM.outer_batch, algorithm=algorithm, num_steps=30
    )
    solution = bx.solve_bilevel(*args, key=jax.random.key(0), **data)
    assert solution.history["unrolls"][:6].tolist() == [1, 2, 3, 4, 1, 2]
    assert (
        solution.history["value"][27] < solution.history["value"][3]
    )  # both at the end of a trajectory
    with pytest.raises(ValueError, match="^key: got None although algorithms.persistent_es draws"):
        bx.solve_bilevel(*args, **data)


# ---- black boxes


def ranks(c):
    """Ascending ranks as the minimizer of ``<-c, ranks>``: what is a ranking for its costs."""
    order = np.argsort(c, kind="stable")
    out = np.empty(len(c))
    out[order[::-1]] = np.arange(len(c))
    return out


def inner(y, x, batch):
    return jnp.sum((batch @ x) * y)


def outer(y, x, batch):
    return jnp.sum((y - jnp.asarray([0.0, 1.0, 2.0, 3.0])) ** 2) / 2


@pytest.mark.parametrize("jit", [False, True])
def test_black_box_is_its_formula(jit):
    batch, x, lam = (
        np.array([[1.0, 0.5], [-0.3, 1.0], [0.2, -1.0], [0.0, 0.4]]),
        np.array([0.7, -0.2]),
        0.5,
    )
    fn = bx.value_and_hypergrad(
        inner,
        outer,
        solver=bx.inner.black_box(ranks, host=True),
        hypergradient=bx.hypergradient.black_box(ranks, lam, host=True),
    )
    est = (jax.jit(fn) if jit else fn)(jnp.zeros(4), jnp.asarray(x), jnp.asarray(batch))
    y = ranks(batch @ x)
    w = y - np.arange(4)
    change = (ranks(batch @ x + lam * w) - y) / lam
    assert np.any(change != 0)
    np.testing.assert_array_equal(est.inner_params, y)
    np.testing.assert_allclose(est.grad, batch.T @ change, rtol=1e-12)
    np.testing.assert_allclose(est.info["changed"], np.linalg.norm(change * lam), rtol=1e-12)


def test_black_box_learns_a_ranking():
    batch = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    fn = jax.jit(
        bx.value_and_hypergrad(
            inner,
            outer,
            solver=bx.inner.black_box(ranks, host=True),
            hypergradient=bx.hypergradient.black_box(ranks, 2.0, host=True),
        )
    )
    x, values = jnp.asarray([0.1, 0.2, -0.1]), []
    for _ in range(40):
        est = fn(jnp.zeros(4), x, batch)
        values.append(float(est.value))
        x = x - 0.05 * est.grad
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: bx.hypergradient.zeroth_order(samples=0), ValueError, "^samples: got 0"),
        (lambda: bx.hypergradient.zeroth_order(chunk=0), ValueError, "^chunk: got 0"),
        (lambda: bx.hypergradient.zeroth_order(scale=0.0), ValueError, "^scale: got 0"),
        (lambda: bx.hypergradient.zeroth_order(antithetic=1), TypeError, "^antithetic: got 1"),
        (lambda: bx.hypergradient.black_box(3), TypeError, "^minimizer: got int"),
        (lambda: bx.hypergradient.black_box(ranks, -1.0), ValueError, "^interpolation: got -1"),
        (lambda: bx.inner.black_box(3), TypeError, "^minimizer: got int"),
    ],
)
def test_refusals(make, error, match):
    with pytest.raises(error, match=match):
        make()
