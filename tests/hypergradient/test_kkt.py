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


@pytest.mark.parametrize("solver", [linear.minres(maxiter=200, tol=1e-13), linear.lu(), linear.gmres(tol=1e-13)], ids=["minres", "lu", "gmres"])
def test_quadratic_over_a_plane_is_its_closed_form(solver):
    x = np.array([0.3, -0.2, 0.5])
    system = np.block([[A, E.T], [E, np.zeros((2, 2))]])
    solved = np.linalg.solve(system, np.concatenate([-C @ x, K @ x + 1]))
    jacobian = np.linalg.solve(system, np.concatenate([-C, K]))[:5]
    method = bx.hypergradient.kkt(plane, solver)
    fn = jax.jit(bx.value_and_hypergrad(quadratic, linear_outer, solver=STANDING, hypergradient=method))
    est = fn(jnp.asarray(solved[:5]), jnp.asarray(x))
    np.testing.assert_allclose(est.grad, x + jacobian.T @ W, rtol=1e-9)
    assert float(est.info["inner_grad_norm"]) <= 1e-11  # of the Lagrangian, whose multiplier was found
    assert float(est.info["constraint_norm"]) <= 1e-12
    assert int(est.info["code"]) == 0
    assert int(est.info["hvps"]) > 0


def test_curved_constraint_against_its_closed_form():
    """The nearest point of the circle of radius ``r`` to ``p``: ``y* = r p/‖p‖``, where the constraint's own curvature matters."""

    def nearest(y, x, batch):
        return jnp.sum((y - x["p"]) ** 2) / 2

    def circle(y, x, batch):
        return (jnp.sum(y**2) - x["r"] ** 2) / 2

    x = {"p": jnp.array([1.0, 2.0, -2.0]), "r": jnp.asarray(1.5)}
    answer = lambda x: x["r"] * x["p"] / jnp.sqrt(jnp.sum(x["p"] ** 2))
    outer = lambda y, x, batch: jnp.sum(jnp.array([1.0, -1.0, 0.5]) * y) + jnp.sum(y[0] ** 2)
    fn = bx.value_and_hypergrad(nearest, outer, solver=STANDING, hypergradient=bx.hypergradient.kkt(circle, linear.minres(tol=1e-13)))
    est = jax.jit(fn)(answer(x), x)
    exact = jax.grad(lambda x: outer(answer(x), x, None))(x)
    np.testing.assert_allclose(est.grad["p"], exact["p"], rtol=1e-9)
    np.testing.assert_allclose(est.grad["r"], exact["r"], rtol=1e-9)


def test_off_the_constraint_is_reported():
    est = bx.value_and_hypergrad(quadratic, linear_outer, solver=STANDING, hypergradient=bx.hypergradient.kkt(plane, linear.lu()))(
        jnp.zeros(5), jnp.zeros(3)
    )
    np.testing.assert_allclose(est.info["constraint_norm"], np.sqrt(2), rtol=1e-12)


def test_dependent_constraints_are_a_failure():
    twice = lambda y, x, batch: jnp.stack([y[0] - x[0], y[0] - x[0]])
    est = bx.value_and_hypergrad(quadratic, linear_outer, solver=STANDING, hypergradient=bx.hypergradient.kkt(twice, linear.lu()))(
        jnp.zeros(5), jnp.zeros(3)
    )
    assert int(est.info["code"]) == bx.RESULTS.adjoint_breakdown


def test_refusals():
    with pytest.raises(TypeError, match="^constraint: got int"):
        bx.hypergradient.kkt(3)
    with pytest.raises(TypeError, match="^linear: got 3"):
        bx.hypergradient.kkt(plane, 3)
