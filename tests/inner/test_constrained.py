"""Quadratic and sequential quadratic programs, and derivatives of their solutions, against
conditions of optimality, differences and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import inner, results

RESULTS = bx.RESULTS


def objective(y, x):
    return y @ (x["Q"] @ y) / 2 + x["p"] @ y


def equality(y, x):
    return x["A"] @ y - x["b"]


def inequality(y, x):
    return x["G"] @ y - x["h"]


SOLVE = bx.argmin(objective, inner.qp(equality, inequality))
LEVEL = bx.value_and_hypergrad(
    lambda y, x, w: objective(y, x),
    lambda y, x, w: w @ y,
    solver=inner.qp(lambda y, x, w: equality(y, x), lambda y, x, w: inequality(y, x)),
    hypergradient=bx.hypergradient.kkt(),
)


def programs(many, n, q, m, seed=0):
    """Random programs with a point inside, about half of whose inequalities are active at the
    solution."""
    rng = np.random.default_rng(seed)
    L, G, A = (
        rng.standard_normal((many, n, n)),
        rng.standard_normal((many, m, n)),
        rng.standard_normal((many, q, n)),
    )
    Q, y = L @ L.transpose(0, 2, 1) / n + 0.01 * np.eye(n), rng.standard_normal((many, n))
    h = np.einsum("bij,bj->bi", G, y) + rng.random((many, m)) * (rng.random((many, m)) < 0.7)
    return {
        "Q": Q,
        "p": rng.standard_normal((many, n)),
        "A": A,
        "b": np.einsum("bij,bj->bi", A, y),
        "G": G,
        "h": h,
    }


def multipliers(x, y):
    """By least squares on what is active, in numpy."""
    active = x["G"] @ y - x["h"] > -1e-7
    rows = np.concatenate([x["A"], x["G"][active]])
    found = np.linalg.lstsq(rows.T, -(x["Q"] @ y + x["p"]), rcond=None)[0]
    return rows, found, active, len(x["A"])


def check_conditions(x, y, tol):
    rows, found, active, q = multipliers(x, y)
    assert np.abs(x["Q"] @ y + x["p"] + rows.T @ found).max() <= tol
    assert np.abs(x["A"] @ y - x["b"]).max() <= tol and (x["G"] @ y - x["h"]).max() <= tol
    assert found[q:].min(initial=0.0) >= -tol


def strict(x, y):
    """Whether all active constraints push, and all others are away."""
    _, found, active, q = multipliers(x, y)
    slack = (x["h"] - x["G"] @ y)[~active]
    return found[q:].min(initial=1.0) > 1e-3 and slack.min(initial=1.0) > 1e-3


def held_by(x, y):
    """Which inequalities hold the solutions of many programs."""
    return np.einsum("bij,bj->bi", x["G"], y) - x["h"] > -1e-7


def differences(solve, x, name, direction, step=1e-5):
    """Differences of fourth order of many solutions, and where the same constraints hold all of
    them: beyond a change of them there is another derivative."""
    points = [{**x, name: x[name] + i * step * direction} for i in (-2, -1, 1, 2)]
    found = [solve(point) for point in points]
    held = [held_by(*pair) for pair in zip(points, found, strict=True)]
    same = np.all([(one == held[0]).all(axis=1) for one in held], axis=0)
    return (found[0] - 8 * found[1] + 8 * found[2] - found[3]) / (12 * step), same


@functools.cache
def compiled(n):
    """Solutions and their derivatives along a direction, of many programs at once."""
    solve = jax.vmap(lambda x: SOLVE(jnp.zeros(n), x))
    return jax.jit(lambda x, dx: jax.jvp(solve, (x,), (dx,)))


def solutions(n, x):
    return np.asarray(compiled(n)(x, jax.tree.map(np.zeros_like, x))[0])


def agrees(many, n, q, m):
    x = programs(many, n, q, m)
    solve = lambda x: solutions(n, x)
    y = solve(x)
    rng = np.random.default_rng(1)
    for i in range(many):
        check_conditions({k: v[i] for k, v in x.items()}, y[i], 1e-8)
    firm = np.array([strict({k: v[i] for k, v in x.items()}, y[i]) for i in range(many)])
    assert firm.mean() > 0.5
    for name in x:
        direction = rng.standard_normal(x[name].shape)
        direction = direction + direction.transpose(0, 2, 1) if name == "Q" else direction
        moved = np.asarray(
            compiled(n)(x, {k: direction if k == name else np.zeros_like(v) for k, v in x.items()})[
                1
            ]
        )
        want, same = differences(solve, x, name, direction)
        error = np.abs(moved - want).max(axis=1) / np.maximum(np.abs(want).max(axis=1), 1)
        compared = firm & same
        assert compared.sum() > 0.98 * firm.sum()
        assert error[compared].max() < 1e-6, (name, error[compared].max())


def test_programs_and_their_derivatives():
    agrees(12, 10, 1, 8)


@pytest.mark.slow
def test_a_thousand_programs_in_one_call():
    agrees(1000, 50, 5, 30)


def degenerate(many, n, q, m):
    """Half of them with an inequality that touches the solution without holding it, half with one
    that repeats or combines others."""
    x = programs(many, n, q, m, seed=2)
    y = solutions(n, x)
    rng = np.random.default_rng(3)
    for i in range(many):
        active = np.flatnonzero(x["G"][i] @ y[i] - x["h"][i] > -1e-7)
        free = np.flatnonzero(x["G"][i] @ y[i] - x["h"][i] < -1e-3)
        if i % 2:
            x["h"][i, free[0]] = x["G"][i, free[0]] @ y[i]
        elif i % 4:
            x["G"][i, free[0]], x["h"][i, free[0]] = (
                3.0 * x["G"][i, active[0]],
                3.0 * x["h"][i, active[0]],
            )
        else:
            c = rng.random(len(active) + q)
            x["G"][i, free[0]] = c @ np.concatenate([x["G"][i, active], x["A"][i]])
            x["h"][i, free[0]] = c @ np.concatenate([x["h"][i, active], x["b"][i]])
    return x, y


def all_coded(many, n, q, m):
    x, y = degenerate(many, n, q, m)
    w = np.random.default_rng(5).standard_normal(n)
    at = jax.jit(
        jax.vmap(
            lambda x: (lambda e: (e.inner_params, e.info["warnings"]))(LEVEL(jnp.zeros(n), x, w, w))
        )
    )
    found, warnings = (np.asarray(a) for a in at(x))
    np.testing.assert_allclose(found, y, atol=1e-7)  # the solution is the one that it was
    told = np.array([bool(results.warnings_in(mask)) for mask in warnings])
    assert told.all(), np.flatnonzero(~told)
    kinds = [results.warnings_in(mask) for mask in warnings]
    assert all(RESULTS.weakly_active in kind for kind in kinds[1::2])
    assert all(RESULTS.dependent_constraints in kind for kind in kinds[::2])
    # a bare solution stands, its derivative is none, and `with_info` tells
    bare = jax.jit(
        jax.vmap(
            lambda x: (
                jax.value_and_grad(lambda x: w @ SOLVE(jnp.zeros(n), x))(x),
                SOLVE.with_info(jnp.zeros(n), x)[1].warnings,
            )
        )
    )
    (values, slopes), bare_warnings = bare(x)
    np.testing.assert_allclose(values, y @ w, atol=1e-6)
    assert np.isnan(slopes["p"]).all()
    np.testing.assert_array_equal(bare_warnings, warnings)
    regular = programs(many, n, q, m, seed=2)
    _, quiet = at(regular)
    firm = np.array([strict({k: v[i] for k, v in regular.items()}, y[i]) for i in range(many)])
    assert not np.asarray(quiet)[firm].any()


@pytest.mark.slow
def test_degenerate_programs_are_told():
    all_coded(12, 10, 1, 8)


@pytest.mark.slow
def test_two_hundred_degenerate_programs_are_told():
    all_coded(200, 50, 5, 30)


@pytest.mark.slow
def test_a_derivative_that_is_one_sided_is_nan_where_no_warning_can_be_read():
    simplex = bx.argmin(
        lambda y, x: jnp.sum((y - x) ** 2), inner.qp(lambda y, x: jnp.sum(y) - 1.0, lambda y, x: -y)
    )
    x = jnp.array([0.5, 0.5, 0.0])
    np.testing.assert_allclose(simplex(jnp.zeros(3), x), x, atol=1e-12)
    assert np.isnan(jax.grad(lambda x: simplex(jnp.zeros(3), x)[0])(x)).all()
    _, info = simplex.with_info(jnp.zeros(3), x)
    assert results.warnings_in(info.warnings) == {RESULTS.weakly_active: 1}


@pytest.mark.slow
def test_what_is_no_program_is_told():
    bent = bx.argmin(
        lambda y, x: jnp.sum(jnp.cosh(y - x)), inner.qp(inequality=lambda y, x: y - 1.0)
    )
    assert (
        int(bent.with_info(jnp.zeros(2), jnp.array([3.0, 0.5]))[1].code)
        == RESULTS.inner_not_converged
    )
    nowhere = bx.argmin(
        lambda y, x: y @ y, inner.qp(inequality=lambda y, x: jnp.stack([y[0] + 1.0, x - y[0]]))
    )
    assert int(nowhere.with_info(jnp.zeros(2), 3.0)[1].code) == RESULTS.inner_not_converged


@pytest.mark.slow
def test_equalities_alone_are_one_solve():
    fn = bx.argmin(
        lambda y, x: jnp.sum((y["a"] - x) ** 2) + y["b"] ** 2,
        inner.qp(lambda y, x: {"sum": jnp.sum(y["a"]) + y["b"]}),
    )
    found, info = fn.with_info({"a": jnp.ones(2), "b": jnp.asarray(0.0)}, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(found["a"], [0.0, 1.0], atol=1e-12)
    assert int(info.code) == 0
    free = bx.argmin(lambda y, x: jnp.sum(jnp.cosh(y - x)), inner.sqp())  # Newton's method
    np.testing.assert_allclose(free(jnp.zeros(2), jnp.array([2.0, -1.0])), [2.0, -1.0], atol=1e-8)


# ---- smooth constraints


@pytest.mark.slow
def test_the_nearest_point_of_a_ball_and_its_second_derivative():
    """``r p/‖p‖`` for p outside; r = exp(s), so that second derivatives are no zeros."""
    fn = bx.argmin(
        lambda y, s, p: jnp.sum((y - p) ** 2),
        inner.sqp(inequality=lambda y, s, p: y @ y - jnp.exp(2 * s)),
    )
    p = jnp.array([1.0, 2.0, -2.0])
    near = lambda s, p: (jnp.exp(s) * p / jnp.sqrt(p @ p))[0]
    for order in (lambda f: f, jax.grad, jax.hessian):
        found = order(lambda z: fn(jnp.array([0.3, 0.3, 0.1]), z[0], z[1:])[0])(
            jnp.concatenate([jnp.array([0.1]), p])
        )
        want = order(lambda z: near(z[0], z[1:]))(jnp.concatenate([jnp.array([0.1]), p]))
        np.testing.assert_allclose(found, want, atol=1e-7)
    np.testing.assert_allclose(
        fn(jnp.zeros(3), 2.0, p), p, rtol=1e-9
    )  # inside, where nothing holds it


@pytest.mark.slow
@pytest.mark.parametrize("start", [[0.3, 0.3, 0.1], [-3.0, -2.0, 5.0]], ids=["near", "far"])
def test_curved_equalities(start):
    """The nearest point of a sphere, from the wrong side too; Hock and Schittkowski's problem 71
    has both kinds, and an objective that is not convex."""
    t = jnp.array([1.0, 2.0, 1.0])
    fn = bx.argmin(lambda y, r: jnp.sum((y - t) ** 2), inner.sqp(lambda y, r: y @ y - r**2))
    assert (
        abs(
            float(jax.grad(lambda r: fn(jnp.array(start), r) @ jnp.array([1.0, 0.0, 2.0]))(0.7))
            - 3 / 6**0.5
        )
        < 1e-7
    )


@pytest.mark.slow
def test_a_problem_of_hock_and_schittkowski():
    """Number 71: objective and constraints that are not convex; the solution of the collection, to
    its digits."""

    def limits(y, x):
        return jnp.concatenate([25.0 - jnp.prod(y)[None], y - 5.0, 1.0 - y])

    fn = bx.argmin(
        lambda y, x: y[0] * y[3] * jnp.sum(y[:3]) + y[2], inner.sqp(lambda y, x: y @ y - x, limits)
    )
    y, info = fn.with_info(jnp.array([1.0, 5.0, 5.0, 1.0]), 40.0)
    np.testing.assert_allclose(y, [1.0, 4.7429994, 3.8211503, 1.3794082], atol=1e-6)
    np.testing.assert_allclose(info.value, 17.0140173, atol=1e-6)
    value = jax.grad(
        lambda x: (lambda y: y[0] * y[3] * jnp.sum(y[:3]) + y[2])(
            fn(jnp.array([1.0, 5.0, 5.0, 1.0]), x)
        )
    )(40.0)
    np.testing.assert_allclose(value, -0.1614686, atol=1e-5)  # less the multiplier of the equality


# ---- through the whole library


def learned(algorithm_method, solver, dtype):
    target = jnp.asarray([0.6, 0.4, 0.0], dtype)
    loop = bx.algorithms.double_loop(solver, algorithm_method, optax.sgd(0.5))
    return bx.solve_bilevel(
        lambda y, x, b: jnp.sum((y - x) ** 2), lambda y, x, b: jnp.sum((y - target) ** 2),
        jnp.zeros(3, dtype), jnp.asarray([0.2, 0.5, -1.0], dtype),
        algorithm=loop, num_steps=60,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_solve_bilevel_over_a_program(dtype):
    simplex = inner.qp(lambda y, x, b: jnp.sum(y) - 1.0, lambda y, x, b: -y)
    out = learned(bx.hypergradient.kkt(), simplex, dtype)
    np.testing.assert_allclose(out.inner_params, [0.6, 0.4, 0.0], atol=1e-3)
    assert not out.warnings and out.inner_params.dtype == dtype
    np.testing.assert_allclose(
        out.outer_params,
        learned(bx.hypergradient.implicit(), simplex, dtype).outer_params,
        rtol=1e-5,
    )


@pytest.mark.slow
def test_a_method_that_knows_no_constraints_says_so():
    fn = bx.value_and_hypergrad(
        lambda y, x, b: jnp.sum((y - x) ** 2),
        lambda y, x, b: y[0],
        solver=inner.qp(inequality=lambda y, x, b: -y),
        hypergradient=bx.hypergradient.one_step(),
    )
    found = fn(jnp.zeros(2), jnp.array([1.0, -1.0]))
    assert RESULTS.not_stationary in results.warnings_in(found.info["warnings"])


def test_refusals():
    three = lambda y, x, b: jnp.sum((y - x) ** 2)
    with pytest.raises(TypeError, match="^inequality: got cg"):
        inner.sqp(lambda y, x, b: y, bx.linear.cg())
    with pytest.raises(ValueError, match="^equality: got None, and None"):
        bx.value_and_hypergrad(
            three, three, solver=inner.lbfgs(), hypergradient=bx.hypergradient.kkt()
        )(jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(TypeError, match="^inequality: it returned"):
        bx.argmin(lambda y, x: y @ y, inner.qp(inequality=lambda y, x: y > x))(jnp.zeros(2), 1.0)
