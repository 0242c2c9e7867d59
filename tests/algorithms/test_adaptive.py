"""MAID and HOAG against their plain-numpy transcriptions, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.algorithms import numpy_adaptive as rules
from tests.algorithms.test_algorithms import INNER, OUTER, SUM, X0, Y0, inner, outer
from tests.units import ridge_in_units

DATA = dict(inner_data=bx.data.full(INNER), outer_data=bx.data.full(OUTER))
SIZE = 0.5  # of the descent inside


METHOD = bx.algorithms.maid()


def _run(algorithm, steps):
    return bx.solve_bilevel(
        inner, outer, Y0, X0, **DATA, algorithm=algorithm, num_steps=steps, keep="last"
    )


@pytest.mark.turns
@pytest.mark.parametrize("certificate", [False, True])
def test_maid_follows_its_rule(certificate):
    A, C, F, K = (SUM.mean(*place, None) for place in ((0, "A"), (0, "C"), (1, "F"), (1, "K")))
    constants = (
        np.linalg.eigvalsh(A)[0],
        np.linalg.norm(C, 2),
        np.linalg.norm(F, 2),
        np.linalg.norm(K, 2),
    )
    settings = dict(epsilon=0.1, delta=0.1, max_error=0.5, decrease=1e-4)
    known = bx.algorithms.Constants(*constants, 0.0, 0.0) if certificate else None
    algorithm = bx.algorithms.maid(
        bx.inner.gradient_descent(SIZE), memory=0, constants=known, **settings
    )
    for steps in (1, 2, 7, 20):
        y, x = rules.maid(SUM, Y0, X0, steps, SIZE, constants if certificate else None, **settings)
        solution = _run(algorithm, steps)
        np.testing.assert_allclose(solution.outer_params, x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(solution.state.algorithm.inner.params, y, rtol=0, atol=1e-10)


def test_hoag_follows_its_rule():
    algorithm = bx.algorithms.hoag(bx.inner.gradient_descent(SIZE), epsilon=0.1, rate=0.9)
    for steps in (1, 7, 50):
        y, x = rules.hoag(SUM, Y0, X0, steps, SIZE, 0.1, 0.9)
        solution = _run(algorithm, steps)
        np.testing.assert_allclose(solution.outer_params, x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(solution.inner_params, y, rtol=0, atol=1e-10)


def test_an_adjoint_solve_that_rounding_ends_does_not_end_the_run():
    """Penalties of useless features grow without bound, and in float32 the adjoint solve breaks
    down on the way: what there is of it is used."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 30)).astype(np.float32)
    y = (x[:, :5].sum(1) + 0.5 * rng.standard_normal(100)).astype(np.float32)

    def fit(w, penalty, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def ridge(w, penalty, batch):
        return fit(w, penalty, batch) + jnp.sum(jnp.exp(penalty) * w**2)

    def run(top):
        data = dict(inner_data=(x[:50], y[:50]), outer_data=(x[50:], y[50:]))
        start = jnp.zeros(30, jnp.float32), jnp.full(30, -3.0, jnp.float32).at[5:].set(top)
        return bx.solve_bilevel(
            ridge, fit, *start, **data, algorithm=METHOD, num_steps=60, throw=False
        )

    for top, reached in (
        (14.0, 0.42),
        (16.0, 0.4926),
    ):  # condition numbers of 1e6 and 1e7; the value at the start is 0.4927
        solution = run(top)
        assert not solution.result.failed and len(solution.history["value"]) == 60
        assert solution.history["value"].min() < reached


def test_unknowns_in_units_of_their_own_cost_the_adjoint_nothing():
    """In float32 products with a matrix of condition 1e12 tell nothing of its soft directions, and
    those of the scaled one do."""
    p = ridge_in_units(3)
    solution = bx.solve_bilevel(
        p.inner,
        p.outer,
        *p.start,
        inner_data=p.train,
        outer_data=p.held_out,
        algorithm=METHOD,
        num_steps=15,
        keep="last",
    )
    state = solution.state.algorithm
    error = np.asarray(state.z, np.float64) - p.hypergradient(state.outer)
    assert np.linalg.norm(error) <= 1e-3 * np.linalg.norm(p.hypergradient(p.start[1]))
    # before the solver has seen the units, in its first solve
    assert solution.warnings.get(bx.RESULTS.adjoint_not_converged, 0) <= 1
    assert solution.history["adjoint_steps"][5:].max() <= 25


def test_what_is_kept_is_where_the_descent_has_come_to():
    """The first solves do not see the features of small units: the value is then less than the
    minimum, and no value of later steps comes below it."""
    rng = np.random.RandomState(0)
    units, penalties = np.logspace(-3, 3, 6), np.zeros(6)
    a = rng.randn(40, 6)
    t = a @ rng.randn(6) + 0.3 * rng.randn(40)
    c = rng.randn(40, 6)
    d = 0.5 * c @ rng.randn(6)

    def value(penalties):  # at the lower level's solution, which knows no units
        w = np.linalg.solve(a.T @ a / 40 + np.diag(np.exp(penalties)), a.T @ t / 40)
        return np.mean((c @ w - d) ** 2) + 1e-3 * np.sum(np.square(penalties))

    fit = lambda w, x, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    solution = bx.solve_bilevel(
        lambda w, x, b: fit(w, x, b) + jnp.sum(jnp.exp(x) * (units * w) ** 2),
        lambda w, x, b: fit(w, x, b) + 1e-3 * jnp.sum(x**2),
        jnp.zeros(6),
        jnp.asarray(penalties),
        inner_data=(a * units, t),
        outer_data=(c * units, d),
        algorithm=METHOD,
        num_steps=60,
    )
    best = value(np.asarray(solution.state.algorithm.outer))
    assert solution.history["value"].min() < 0.99 * best < 0.5 * value(penalties)
    np.testing.assert_allclose(value(np.asarray(solution.outer_params)), best, rtol=1e-6)


def test_no_step_goes_where_the_lower_level_cannot_be_solved():
    """The solver says that it solves nothing beyond 1, and the minimum is at 3."""
    lbfgs = bx.inner.lbfgs()

    def to_tolerance(tol, maxiter):
        solver = lbfgs.to_tolerance(tol, maxiter)

        def step(objective, state, outer, ctx):
            state, info = solver.step(objective, state, outer, ctx)
            lost = jnp.int32(bx.RESULTS.inner_not_converged)
            return state, info | {"code": jnp.where(outer[0] > 1, lost, info["code"])}

        return solver._replace(step=step)

    def ended(solver):
        return bx.solve_bilevel(
            lambda y, x, b: jnp.sum((y - x) ** 2),
            lambda y, x, b: jnp.sum((y - 3.0) ** 2),
            jnp.zeros(1),
            jnp.zeros(1),
            algorithm=bx.algorithms.maid(solver),
            num_steps=30,
            keep="last",
        )

    held = ended(lbfgs._replace(to_tolerance=to_tolerance))
    assert 0.5 < float(held.outer_params[0]) <= 1
    np.testing.assert_allclose(ended(lbfgs).outer_params, [3.0], atol=1e-6)
