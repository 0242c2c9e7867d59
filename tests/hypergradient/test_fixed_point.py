"""Constrained and non-smooth lower levels: hypergradients against finite differences of tight
solves, with the active set right."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import linear
from bilevax.results import warnings_in

RNG = np.random.default_rng(3)
X, V = RNG.standard_normal((2, 24, 6))
TRUE = np.array([2.0, -1.5, 0.0, 0.0, 1.0, 0.05])
TRAIN = (X, X @ TRUE + 0.3 * RNG.standard_normal(24))
HELD_OUT = (V, V @ TRUE)
STEP = 1 / (np.linalg.norm(X, 2) ** 2 / 24 + 1)
PROJECT = optax.projections


def squared(w, x, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2


def soft(v, t):
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - t, 0)


def shifted(w, x, batch):
    """Least squares pulled towards the outer parameters."""
    return squared(w, x, batch) + jnp.sum((w - x) ** 2) / 2


def simplex(v, x, s):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers in
        return PROJECT.projection_simplex(v)


class Case(NamedTuple):
    smooth: Any
    prox: Any
    outer_params: Any
    active: Any  # the coordinates that are held: (w, outer) -> bool array


CASES = {
    "lasso": Case(
        squared, lambda v, x, s: soft(v, s * jnp.exp(x)), np.array(-1.5), lambda w, x: w == 0
    ),
    "elastic_net": Case(
        lambda w, x, batch: squared(w, x, batch) + jnp.exp(x[1]) * jnp.sum(w**2) / 2,
        lambda v, x, s: soft(v, s * jnp.exp(x[0])),
        np.array([-1.5, -2.0]),
        lambda w, x: w == 0,
    ),
    "box": Case(
        shifted,
        lambda v, x, s: PROJECT.projection_box(v, -0.5, 1.0),
        np.linspace(-1, 1, 6),
        lambda w, x: (w == -0.5) | (w == 1.0),
    ),
    "non_negative": Case(
        shifted,
        lambda v, x, s: PROJECT.projection_non_negative(v),
        np.linspace(1, -1, 6),
        lambda w, x: w == 0,
    ),
    "simplex": Case(shifted, simplex, np.linspace(0.5, -0.2, 6), lambda w, x: w == 0),
}


@pytest.mark.turns
@pytest.mark.parametrize("name", CASES)
def test_against_finite_differences(name):
    case = CASES[name]
    mapping = bx.inner.proximal_map(case.smooth, case.prox, STEP)
    solver = bx.inner.fixed_point(mapping, maxiter=20_000, tol=1e-15)
    method = bx.hypergradient.fixed_point(mapping, linear.gmres(tol=1e-13))
    fn = bx.value_and_hypergrad(case.smooth, squared, solver=solver, hypergradient=method)
    x0, t = jnp.asarray(case.outer_params), 1e-5

    @jax.jit
    def everything(train, held_out):
        est = fn(jnp.full(6, 0.1), x0, train, held_out)
        moves = t * jnp.eye(x0.size).reshape(x0.size, *x0.shape)
        solved = jax.lax.map(
            lambda x: fn(est.inner_params, x, train, held_out),
            jnp.concatenate([x0[None] + moves, x0[None] - moves]),
        )
        up, down = jnp.split(solved.value, 2)
        return est, ((up - down) / (2 * t)).reshape(x0.shape), solved.inner_params

    est, differences, nearby = jax.device_get(everything(TRAIN, HELD_OUT))
    held = case.active(est.inner_params, x0)
    assert 0 < held.sum() < 6, "the point says nothing unless some constraints hold and some do not"
    for w in nearby:
        np.testing.assert_array_equal(
            case.active(w, x0), held
        )  # no kink between the points of the differences
    np.testing.assert_allclose(est.grad, differences, rtol=1e-7, atol=1e-9)
    assert int(est.info["code"]) == 0
    assert float(est.info["adjoint_residual"]) <= 1e-12
    assert float(est.info["inner_grad_norm"]) <= 1e-12


def test_lasso_is_its_closed_form_on_the_support():
    mapping = bx.inner.proximal_map(CASES["lasso"].smooth, CASES["lasso"].prox, STEP)
    solver, x = bx.inner.fixed_point(mapping, maxiter=20_000, tol=1e-15), jnp.asarray(-1.5)
    method = bx.hypergradient.fixed_point(mapping, linear.lu())
    est = jax.jit(bx.value_and_hypergrad(squared, squared, solver=solver, hypergradient=method))(
        jnp.zeros(6), x, TRAIN, HELD_OUT
    )
    w, penalty = np.asarray(est.inner_params), np.exp(-1.5)
    (A, b), (C, d) = TRAIN, HELD_OUT
    correlation = A.T @ (b - A @ w) / 24
    on = w != 0
    np.testing.assert_allclose(
        correlation[on], penalty * np.sign(w[on]), rtol=1e-10
    )  # the optimality conditions of the lasso
    assert np.all(np.abs(correlation[~on]) < penalty)
    moved = np.linalg.solve(A[:, on].T @ A[:, on] / 24, penalty * np.sign(w[on]))
    np.testing.assert_allclose(est.grad, -(C.T @ (C @ w - d) / 24)[on] @ moved, rtol=1e-8)


def test_step_size_cancels_and_smooth_levels_agree_with_implicit():
    w = np.linalg.solve(X.T @ X / 24 + np.eye(6), X.T @ TRAIN[1] / 24 + np.ones(6))
    grads = []
    for step in (0.3 * STEP, STEP):
        mapping = bx.inner.proximal_map(shifted, lambda v, x, s: v, step)
        method = bx.hypergradient.fixed_point(mapping, linear.gmres(tol=1e-13))
        fn = bx.value_and_hypergrad(
            shifted, squared, solver=bx.inner.fixed_point(mapping, maxiter=1), hypergradient=method
        )
        grads.append(jax.jit(fn)(jnp.asarray(w), jnp.ones(6), TRAIN, HELD_OUT).grad)
    exact = np.linalg.solve(X.T @ X / 24 + np.eye(6), V.T @ (V @ w - HELD_OUT[1]) / 24)
    np.testing.assert_allclose(grads[0], exact, rtol=1e-9)
    np.testing.assert_allclose(grads[1], exact, rtol=1e-9)


def test_equilibrium_with_pytrees_integers_and_float32():
    """``y = tanh(W y + x)``, the integer leaf saying how W is scaled."""

    def mapping(y, x, batch):
        return {
            "y": jnp.tanh(batch @ y["y"] / y["scale"].astype(batch.dtype) + x),
            "scale": y["scale"],
        }

    def residual(y, x, batch):
        return jnp.sum((mapping(y, x, batch)["y"] - y["y"]) ** 2)

    W = jnp.asarray(RNG.standard_normal((3, 3)), jnp.float32)
    fn = bx.value_and_hypergrad(
        residual,
        lambda y, x, batch: jnp.sum(y["y"] ** 2),
        solver=bx.inner.fixed_point(mapping),
        hypergradient=bx.hypergradient.fixed_point(mapping),
    )
    y0 = {"y": jnp.zeros(3, jnp.float32), "scale": jnp.int32(4)}
    est = jax.jit(fn)(y0, jnp.asarray([0.1, 0.2, -0.3], jnp.float32), W)
    y = np.asarray(est.inner_params["y"], np.float64)
    D = np.diag(1 - y**2)
    exact = D @ np.linalg.solve(np.eye(3) - (D @ (np.asarray(W, np.float64) / 4)).T, 2 * y)
    assert est.grad.dtype == jnp.float32
    np.testing.assert_allclose(est.grad, exact, rtol=1e-4)


def test_one_that_does_not_contract_says_so():
    solver = bx.inner.fixed_point(lambda y, x, batch: 2 * y + x, maxiter=5)
    method = bx.hypergradient.fixed_point(lambda y, x, batch: 2 * y + x)
    est = bx.value_and_hypergrad(
        lambda y, x, b: jnp.sum(y * x),
        lambda y, x, b: jnp.sum(y),
        solver=solver,
        hypergradient=method,
    )(jnp.ones(2), jnp.ones(2))
    assert int(est.info["code"]) == 0 and bx.RESULTS.inner_not_converged in warnings_in(
        est.info["warnings"]
    )


def test_check_against_the_solver_itself():
    """Newton on the smooth part knows nothing of the penalty: the check differentiates the tight
    solves instead."""
    case = CASES["lasso"]
    mapping = bx.inner.proximal_map(case.smooth, case.prox, STEP)
    report = bx.check_hypergradient(
        case.smooth,
        squared,
        jnp.zeros(6),
        jnp.asarray(-1.5),
        solver=bx.inner.fixed_point(mapping, maxiter=20_000, tol=1e-15),
        hypergradient=bx.hypergradient.fixed_point(mapping, linear.gmres(tol=1e-12)),
        inner_batch=TRAIN,
        outer_batch=HELD_OUT,
        reference="solver",
        tol=1e-6,
    )
    assert report.ok, report


def test_refusals():
    with pytest.raises(TypeError, match="^mapping: got int"):
        bx.hypergradient.fixed_point(3)
    with pytest.raises(TypeError, match="^mapping: got int"):
        bx.inner.fixed_point(3)
    with pytest.raises(ValueError, match="^maxiter: got 0"):
        bx.inner.fixed_point(lambda y, x, b: y, maxiter=0)
    with pytest.raises(ValueError, match="^step: got -1"):
        bx.inner.proximal_map(squared, lambda v, x, s: v, -1.0)
    with pytest.raises(TypeError, match="^prox: got NoneType"):
        bx.inner.proximal_map(squared, None, 1.0)
    with pytest.raises(ValueError, match="^max_residual: got 0"):
        bx.hypergradient.fixed_point(lambda y, x, b: y, max_residual=0)
