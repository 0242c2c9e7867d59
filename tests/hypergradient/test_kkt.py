"""Equality-constrained lower levels through their KKT systems."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import linear

RNG = np.random.default_rng(4)
A = np.eye(5) * np.linspace(1, 3, 5) + 0.1 * np.ones((5, 5))
C, E, K = RNG.standard_normal((5, 3)), RNG.standard_normal((2, 5)), RNG.standard_normal((2, 3))
W = RNG.standard_normal(5)
STANDING = bx.inner.optax(optax.sgd(0.0), 1)


def quadratic(y, x, batch):
    return jnp.sum(y * (A @ y)) / 2 + jnp.sum(y * (C @ x))


def plane(y, x, batch):
    """Two constraints, as a pytree."""
    value = E @ y - K @ x - 1.0
    return {"first": value[0], "rest": value[1:]}


def linear_outer(y, x, batch):
    return jnp.sum(W * y) + jnp.sum(x**2) / 2


@pytest.mark.parametrize(
    "solver",
    [linear.minres(maxiter=200, tol=1e-13), linear.lu(), linear.gmres(tol=1e-13)],
    ids=["minres", "lu", "gmres"],
)
def test_quadratic_over_a_plane_is_its_closed_form(solver):
    x = np.array([0.3, -0.2, 0.5])
    system = np.block([[A, E.T], [E, np.zeros((2, 2))]])
    solved = np.linalg.solve(system, np.concatenate([-C @ x, K @ x + 1]))
    jacobian = np.linalg.solve(system, np.concatenate([-C, K]))[:5]
    method = bx.hypergradient.kkt(plane, linear=solver)
    fn = jax.jit(
        bx.value_and_hypergrad(quadratic, linear_outer, solver=STANDING, hypergradient=method)
    )
    est = fn(jnp.asarray(solved[:5]), jnp.asarray(x))
    np.testing.assert_allclose(est.grad, x + jacobian.T @ W, rtol=1e-9)
    assert (
        float(est.info["inner_grad_norm"]) <= 1e-11
    )  # of the Lagrangian, whose multiplier was found
    assert float(est.info["constraint_norm"]) <= 1e-12
    assert int(est.info["code"]) == 0
    assert int(est.info["hvps"]) > 0


def test_curved_constraint_against_its_closed_form():
    """The nearest point of the circle of radius ``r`` to ``p``: ``y* = r p/‖p‖``, where the
    constraint's own curvature matters."""

    def nearest(y, x, batch):
        return jnp.sum((y - x["p"]) ** 2) / 2

    def circle(y, x, batch):
        return (jnp.sum(y**2) - x["r"] ** 2) / 2

    x = {"p": jnp.array([1.0, 2.0, -2.0]), "r": jnp.asarray(1.5)}
    answer = lambda x: x["r"] * x["p"] / jnp.sqrt(jnp.sum(x["p"] ** 2))
    outer = lambda y, x, batch: jnp.sum(jnp.array([1.0, -1.0, 0.5]) * y) + jnp.sum(y[0] ** 2)
    fn = bx.value_and_hypergrad(
        nearest,
        outer,
        solver=STANDING,
        hypergradient=bx.hypergradient.kkt(circle, linear=linear.minres(tol=1e-13)),
    )
    est = jax.jit(fn)(answer(x), x)
    exact = jax.grad(lambda x: outer(answer(x), x, None))(x)
    np.testing.assert_allclose(est.grad["p"], exact["p"], rtol=1e-9)
    np.testing.assert_allclose(est.grad["r"], exact["r"], rtol=1e-9)


def test_off_the_constraint_is_reported():
    est = bx.value_and_hypergrad(
        quadratic,
        linear_outer,
        solver=STANDING,
        hypergradient=bx.hypergradient.kkt(plane, linear=linear.lu()),
    )(jnp.zeros(5), jnp.zeros(3))
    np.testing.assert_allclose(est.info["constraint_norm"], np.sqrt(2), rtol=1e-12)


def test_a_constraint_twice_is_told_and_is_that_constraint():
    once = lambda y, x, batch: y[0] - x[0]
    twice = lambda y, x, batch: jnp.stack([y[0] - x[0], y[0] - x[0]])
    found, want = (
        bx.value_and_hypergrad(
            quadratic,
            linear_outer,
            solver=STANDING,
            hypergradient=bx.hypergradient.kkt(constraint, linear=linear.lu()),
        )(jnp.zeros(5), jnp.zeros(3))
        for constraint in (twice, once)
    )
    np.testing.assert_allclose(found.grad, want.grad, rtol=1e-9)
    told = [set(bx.results.warnings_in(est.info["warnings"])) for est in (found, want)]
    assert told == [{bx.RESULTS.dependent_constraints}, set()]


def test_refusals():
    with pytest.raises(TypeError, match="^equality: got int"):
        bx.hypergradient.kkt(3)
    with pytest.raises(TypeError, match="^linear: got 3"):
        bx.hypergradient.kkt(plane, linear=3)


# ---- inequalities, over solvers that keep no multipliers


def simplex(y, x, batch):
    return jnp.sum(y) - 1.0


def positive(y, x, batch):
    return {"lower": -y}


def nearest(y, x, batch):
    return jnp.sum((y - x) ** 2) / 2


def on_simplex(v, x, s):
    """The nearest point, from the sorted coordinates."""
    ordered = jnp.sort(v)[::-1]
    shifts = (jnp.cumsum(ordered) - 1.0) / jnp.arange(1.0, len(v) + 1.0)
    return jnp.maximum(v - shifts[jnp.sum(ordered > shifts) - 1], 0.0)


def by_constraints(solver):
    """The derivative of ``2 y_0 + y_1``."""
    outer = lambda y, x, batch: 2.0 * y[0] + y[1]
    return jax.jit(
        bx.value_and_hypergrad(
            nearest, outer, solver=solver, hypergradient=bx.hypergradient.kkt(simplex, positive)
        )
    )


STANDS = by_constraints(STANDING)


def warned(est):
    return set(bx.results.warnings_in(est.info["warnings"]))


def test_inequalities_over_a_projection():
    fn = by_constraints(bx.inner.fixed_point(bx.inner.proximal_map(nearest, on_simplex, 1.0)))
    est = fn(jnp.zeros(3), jnp.array([0.9, 0.5, -1.0]))
    np.testing.assert_allclose(est.grad, [0.5, -0.5, 0.0], atol=1e-9)
    assert not warned(est)


@pytest.mark.parametrize(
    "x, y, told",
    [
        ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], bx.RESULTS.weakly_active),
        (
            [0.9, 0.5, -1.0],
            [0.4, 0.6, 0.0],
            bx.RESULTS.not_stationary,
        ),  # on the constraints, and no minimum on them
        (
            [0.9, 0.5, 1.0],
            [0.7, 0.3, 0.0],
            bx.RESULTS.not_stationary,
        ),  # a minimum of the equality, held by a multiplier of the wrong sign
        ([0.9, 0.5, -1.0], [0.9, 0.5, 0.0], bx.RESULTS.off_constraint),
        ([0.9, 0.5, -1.0], [0.7, 0.4, -0.1], bx.RESULTS.off_constraint),
    ],
    ids=["weak", "slope", "sign", "plane", "outside"],
)
def test_what_does_not_hold_is_told(x, y, told):
    assert told in warned(STANDS(jnp.asarray(y), jnp.asarray(x)))


def test_off_stationarity_on_an_equality_is_told():
    """On the plane, and not where the objective is least on it."""
    plane_only = bx.hypergradient.kkt(lambda y, x, batch: jnp.sum(y) - 1.0)
    fn = bx.value_and_hypergrad(
        nearest, lambda y, x, batch: y[0], solver=STANDING, hypergradient=plane_only
    )
    told = lambda y: warned(fn(jnp.asarray(y), jnp.array([1.0, 3.0])))
    assert told([0.5, 0.5]) == {bx.RESULTS.not_stationary}
    assert not told([-0.5, 1.5])
