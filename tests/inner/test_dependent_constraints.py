"""Active constraints whose gradients are linearly dependent: where the solution has a derivative all
the same it is the right one, with the code; where it has none, nothing is silent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import inner, results
from tests.inner.test_constrained import programs

DEPENDENT, WEAK = bx.RESULTS.dependent_constraints, bx.RESULTS.weakly_active
W = jnp.array([1.0, 2.0])


def norm(y, x):
    return jnp.sum(y**2) / 2


def repeated(y, x):
    return jnp.concatenate([x - y, x - y])


def combined(y, x):
    h = x - y
    return {"one": h[0], "rest": jnp.stack([3.0 * h[0], h[1], h[0] + 2.0 * h[1]])}


def total(y, x):
    return jnp.sum(y) - jnp.sum(x)


# equality, inequality, and the solution of ½‖y‖² under them
EXIST = {
    "an inequality twice": (None, repeated, lambda x: x),
    "multiples and sums": (None, combined, lambda x: x),
    "an equality twice": (
        lambda y, x: jnp.stack([total(y, x), -2.0 * total(y, x)]),
        None,
        lambda x: jnp.full(2, jnp.sum(x) / 2),
    ),
    "an equality and its half": (total, lambda y, x: -total(y, x), lambda x: x.sum() * W / W / 2),
    "more than unknowns": (total, repeated, lambda x: x),
}


def told(warnings):
    return set(results.warnings_in(warnings))


def through_both(equality, inequality, x):
    """Value and derivative of ``W'y`` by `argmin` and by `value_and_hypergrad`, with what is
    said."""
    solver = inner.qp(equality, inequality)
    level = lambda fn: None if fn is None else (lambda y, x, batch: fn(y, x))
    fn = bx.argmin(norm, solver)
    estimate = bx.value_and_hypergrad(
        lambda y, x, batch: norm(y, x),
        lambda y, x, batch: W @ y,
        solver=inner.qp(level(equality), level(inequality)),
        hypergradient=bx.hypergradient.kkt(),
    )

    def both(x):
        measure = lambda x: W @ fn(jnp.zeros(2), x)
        info = fn.with_info(jnp.zeros(2), x)[1]
        made = estimate(jnp.zeros(2), x)
        return (*jax.value_and_grad(measure)(x), info.warnings), (
            made.value,
            made.grad,
            made.info["warnings"],
        )

    return jax.jit(both)(x)


@pytest.mark.parametrize(
    "case",
    [c if c == "multiples and sums" else pytest.param(c, marks=pytest.mark.slow) for c in EXIST],
)
def test_a_derivative_that_exists_is_right_and_the_code_stands(case):
    equality, inequality, closed = EXIST[case]
    x = jnp.array([1.0, 2.0])
    value, gradient = jax.value_and_grad(lambda x: W @ closed(x))(x)
    for found, slope, warnings in through_both(equality, inequality, x):
        np.testing.assert_allclose(found, value, rtol=1e-9)
        np.testing.assert_allclose(slope, gradient, rtol=1e-9)
        assert DEPENDENT in told(warnings)


@pytest.mark.slow
@pytest.mark.parametrize("x", [[1.0, 1.0], [2.0, 2.0]])
def test_a_derivative_that_does_not_exist_is_not_silent(x):
    """The larger of two bounds, where both are the same: one-sided derivatives are between those of
    the two. `argmin` says NaN; what carries a warning gives their mean and says so."""
    larger = lambda y, x: jnp.stack([x[0] - y[0], x[1] - y[0]])
    by_argmin, by_level = through_both(None, larger, jnp.array(x))
    assert np.isnan(by_argmin[1]).all() and DEPENDENT in told(by_argmin[2])
    np.testing.assert_allclose(by_level[1], [0.5, 0.5], atol=1e-9)
    assert DEPENDENT in told(by_level[2])
    rough = bx.argmin(norm, inner.qp(inequality=larger), strict=False)
    found = jax.grad(lambda x: rough(jnp.zeros(2), x)[0])(jnp.array(x))
    np.testing.assert_allclose(found, [0.5, 0.5], atol=1e-9)


CAPACITY = jnp.array([1.0, 2.0])
DISPATCH = bx.argmin(
    lambda y, cost, demand: cost @ y + y @ y / 2,
    inner.qp(
        lambda y, cost, demand: jnp.sum(y) - demand,
        lambda y, cost, demand: jnp.concatenate([y - CAPACITY, -y]),
    ),
)


@pytest.mark.slow
def test_demand_that_takes_all_plants():
    """Costs change nothing, and that is a derivative; more demand has no solution."""
    measure = lambda cost, demand: W @ DISPATCH(jnp.zeros(2), cost, demand)
    cost, all_of_it = jnp.array([1.0, 2.0]), float(jnp.sum(CAPACITY))
    np.testing.assert_allclose(measure(cost, all_of_it), W @ CAPACITY, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(measure)(cost, all_of_it), np.zeros(2), atol=1e-9)
    np.testing.assert_allclose(jax.hessian(measure)(cost, all_of_it), np.zeros((2, 2)), atol=1e-9)
    assert np.isnan(jax.grad(measure, 1)(cost, all_of_it))
    info = DISPATCH.with_info(jnp.zeros(2), cost, all_of_it)[1]
    assert DEPENDENT in told(info.warnings)
    np.testing.assert_allclose(jax.grad(measure, 1)(cost, 2.4), 2.0, rtol=1e-9)  # one is left


@pytest.mark.slow
def test_constraints_that_touch_and_bend_apart():
    """``y₀ >= x₀`` and ``y₀ >= x₀ + y₁²`` have one gradient at ``y₁ = 0``. Which of them holds decides
    how y₁ moves; y₀ alone does not ask."""
    bent = lambda y, x: jnp.stack([x[0] - y[0], x[0] - y[0] + y[1] ** 2])
    fn = bx.argmin(lambda y, x: y[0] ** 2 + (y[1] - x[1]) ** 2, inner.sqp(inequality=bent))
    slope = jax.grad(lambda x: fn(jnp.zeros(2), x)[1])(jnp.array([1.0, 0.0]))
    assert np.isnan(slope).all()


@pytest.mark.slow
def test_second_derivatives_under_a_circle_twice():
    """The nearest point of the unit circle to ``(3r, r²)``."""
    twice = lambda y, r: jnp.stack([y @ y - 1.0, 2.0 * (y @ y - 1.0)])
    point = lambda r: jnp.stack([3.0 * r, r**2])
    fn = bx.argmin(lambda y, r: jnp.sum((y - point(r)) ** 2), inner.sqp(inequality=twice))
    want = lambda r: point(r)[0] / jnp.sqrt(point(r) @ point(r))
    for order in (lambda f: f, jax.grad, jax.jacfwd, jax.hessian):
        found = order(lambda r: fn(jnp.ones(2), r)[0])(2.0)
        np.testing.assert_allclose(found, order(want)(2.0), rtol=1e-6)


def test_a_run_over_dependent_constraints():
    """Bounds written twice are learned as if they were written once; the code stands in the
    history."""
    target = jnp.array([2.0, 0.5])
    solver = inner.qp(inequality=lambda y, x, batch: jnp.concatenate([x - y, 2.0 * (x - y)]))
    loop = bx.algorithms.double_loop(solver, bx.hypergradient.kkt(), optax.sgd(0.5))
    out = bx.solve_bilevel(
        lambda y, x, batch: norm(y, x),
        lambda y, x, batch: jnp.sum((y - target) ** 2) / 2,
        jnp.zeros(2),
        jnp.ones(2),
        algorithm=loop,
        num_steps=40,
    )
    np.testing.assert_allclose(out.outer_params, target, atol=1e-6)
    assert set(out.warnings) == {DEPENDENT}


@pytest.mark.slow
def test_two_hundred_programs_with_constraints_that_others_imply():
    """Each inequality once more by 2, and ten sums of inequalities and equalities: derivatives are
    those of the program without them, to 1e-6, and each is coded."""
    many, n, q, m = 200, 20, 2, 10
    x = programs(many, n, q, m, seed=5)
    sums = jnp.asarray(np.random.default_rng(6).random((10, m)))
    equality = lambda y, x: x["A"] @ y - x["b"]
    bare = lambda y, x: x["G"] @ y - x["h"]
    implied = lambda y, x: jnp.concatenate([bare(y, x), 2.0 * bare(y, x), sums @ bare(y, x)])
    objective = lambda y, x: y @ (x["Q"] @ y) / 2 + x["p"] @ y
    w = jnp.asarray(np.random.default_rng(7).standard_normal(n))

    def slopes(inequality):
        fn = bx.argmin(objective, inner.qp(equality, inequality))
        one = lambda x: jax.value_and_grad(lambda x: w @ fn(jnp.zeros(n), x))(x)
        said = lambda x: fn.with_info(jnp.zeros(n), x)[1].warnings
        return jax.jit(jax.vmap(lambda x: (one(x), said(x))))(x)

    (values, found), masks = slopes(implied)
    (plain, want), alone = slopes(bare)
    firm = np.asarray(alone) == 0
    np.testing.assert_allclose(values, plain, atol=1e-7)
    met = np.array([DEPENDENT in told(mask) for mask in np.asarray(masks)])
    active = np.array([np.any(np.abs(np.asarray(g)) > 0) for g in want["h"]])
    assert firm.mean() > 0.5 and met[active].all()
    for name in want:
        size = np.maximum(np.abs(want[name]).reshape(many, -1).max(axis=1), 1)
        error = np.abs(found[name] - want[name]).reshape(many, -1).max(axis=1) / size
        print(name, np.nanmax(error[firm]), int(np.isnan(error[firm]).sum()))
        assert error[firm].max() < 1e-6
