"""What a solver solves and what a method assumes of it agree, or one of them says that they do
not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.results import warnings_in

H, RESULTS = bx.hypergradient, bx.RESULTS
near = lambda y, x, batch: jnp.sum((y - x) ** 2)
squares = lambda y, x, batch: jnp.sum(y**2)


def bounded(jaxopt):
    lower, upper = jnp.zeros(2), jnp.ones(2)
    box = lambda v, bounds: jnp.clip(v, *bounds)
    return {
        "LBFGSB": bx.inner.jaxopt(jaxopt.LBFGSB, bounds=(lower, upper)),
        "ProjectedGradient": bx.inner.jaxopt(
            jaxopt.ProjectedGradient, projection=box, hyperparams_proj=(lower, upper), tol=1e-8
        ),
        "ProximalGradient": bx.inner.jaxopt(
            jaxopt.ProximalGradient,
            prox=lambda v, bounds, s=1.0: jnp.clip(v, *bounds),
            hyperparams_prox=(lower, upper),
            tol=1e-8,
        ),
        "fixed_point": bx.inner.fixed_point(
            bx.inner.proximal_map(near, lambda v, x, s: jnp.clip(v, 0.0, 1.0), 0.25), tol=1e-12
        ),
    }


@pytest.mark.turns
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["LBFGSB", "ProjectedGradient", "ProximalGradient", "fixed_point"])
def test_implicit_over_a_bounded_solver_holds_what_is_held(name):
    """``y* = clip(x, 0, 1)``, and the second coordinate stands at its bound."""
    jaxopt = pytest.importorskip("jaxopt")
    solver = bounded(jaxopt)[name]
    fn = bx.value_and_hypergrad(near, squares, solver=solver, hypergradient=H.implicit())
    est = fn(jnp.full(2, 0.5), jnp.asarray([0.5, 3.0]))
    np.testing.assert_allclose(est.inner_params, [0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(est.grad, [1.0, 0.0], atol=1e-5)
    with pytest.raises(
        ValueError, match="right once only"
    ):  # the second derivative would be that of the unconstrained problem
        jax.jacrev(lambda x: fn(jnp.full(2, 0.5), x).grad)(jnp.asarray([0.5, 3.0]))


def test_argmin_refuses_what_is_not_stationary():
    solver = bx.inner.fixed_point(
        bx.inner.proximal_map(near, lambda v, x, s: jnp.clip(v, 0.0, 1.0), 0.25)
    )
    with pytest.raises(TypeError, match="^solver: got fixed_point.*stationary"):
        bx.argmin(lambda y, x: near(y, x, None), solver)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.05)], ids=["sgd", "adam"])
def test_an_optimizer_that_holds_parameters_at_a_bound_is_said(optimizer):
    solver = bx.inner.optax(optax.chain(optimizer, optax.keep_params_nonnegative()), 300)
    fn = jax.jit(bx.value_and_hypergrad(near, squares, solver=solver, hypergradient=H.implicit()))
    said = [
        set(warnings_in(fn(jnp.full(2, 0.5), x).info["warnings"]))
        for x in (jnp.asarray([0.5, -1.0]), jnp.asarray([0.5, 1.0]))
    ]
    assert said == [{RESULTS.not_stationary}, set()]


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.set_to_zero(),
        optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation(),
        optax.lbfgs(),
    ],
    ids=["set_to_zero", "MultiSteps", "lbfgs"],
)
def test_an_optimizer_that_holds_nothing_back_is_not_blamed(optimizer):
    fn = bx.value_and_hypergrad(
        near, squares, solver=bx.inner.optax(optimizer, 4), hypergradient=H.implicit()
    )
    assert not warnings_in(fn(jnp.full(2, 0.5), jnp.ones(2)).info["warnings"])


def test_kkt_off_its_constraint_is_said():
    target = jnp.asarray([1.0, 2.0, 1.0])
    g = lambda y, x, b: jnp.sum((y - target) ** 2)
    sphere = lambda y, x, b: y @ y - x**2
    f = lambda y, x, b: y[0] + 2 * y[2]
    fn = bx.value_and_hypergrad(g, f, solver=bx.inner.lbfgs(), hypergradient=H.kkt(sphere))
    off = fn(jnp.asarray([0.3, 0.3, 0.1]), jnp.asarray(0.7))
    assert RESULTS.off_constraint in warnings_in(off.info["warnings"])
    on_sphere = bx.inner.fixed_point(
        lambda y, x, b: x * (y - 0.1 * (y - target)) / jnp.linalg.norm(y - 0.1 * (y - target)),
        tol=1e-12,
    )
    on = bx.value_and_hypergrad(g, f, solver=on_sphere, hypergradient=H.kkt(sphere))(
        jnp.asarray([0.3, 0.3, 0.1]), jnp.asarray(0.7)
    )
    assert not warnings_in(on.info["warnings"])
    np.testing.assert_allclose(on.grad, 3 / np.sqrt(6), rtol=1e-5)
