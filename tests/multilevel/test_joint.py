"""Four levels, differentiated as one system: what each level's own method asks of it is kept
there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

H, L = bx.hypergradient, bx.linear
D = jnp.asarray([1.0, 3.0, 10.0, 30.0])
START = {"z": jnp.zeros(4), "y": jnp.asarray(0.0), "w": jnp.asarray(0.0), "x": jnp.asarray(2.0)}


def estimate(**methods):
    objectives = {
        "z": lambda p, b: 0.5 * jnp.sum(D * p["z"] ** 2) - jnp.sum(p["z"]) * p["y"],
        "y": lambda p, b: 0.5 * (p["y"] - p["w"]) ** 2 + 0.5 * jnp.sum(p["z"] ** 2),
        "w": lambda p, b: 0.5 * (p["w"] - p["x"]) ** 2 + 0.5 * (p["y"] - 1) ** 2,
        "x": lambda p, b: 0.5 * (p["y"] + p["w"]) ** 2,
    }
    newton = bx.inner.optax(
        optax.GradientTransformation(lambda p: (), lambda g, s, p: (-g / D, s)), 1
    )  # exact in one step
    solvers = {
        "z": newton,
        "y": bx.inner.optax(optax.sgd(0.5), 40),
        "w": bx.inner.optax(optax.sgd(0.5), 40),
        "x": optax.sgd(0.1),
    }
    levels = [
        bx.Level(n, g, solver=solvers[n], hypergradient=methods.get(n))
        for n, g in objectives.items()
    ]
    return jax.jit(bx.value_and_multilevel_grad(levels))(START)


@pytest.mark.slow
@pytest.mark.parametrize("linear", [L.cg, L.minres], ids=["cg", "minres"])
def test_damping_is_that_of_its_own_level(linear):
    """Each level's response is ``1/(H + ρ)`` times the mixed derivative, H with the damped
    responses inside: by hand."""
    z, y, w = 0.3, 0.2, 0.1  # the dampings
    est = estimate(
        **{
            n: H.implicit(linear(tol=1e-13), damping=rho)
            for n, rho in (("z", z), ("y", y), ("w", w))
        }
    )
    by_y = 1 / (D + z)
    by_w = 1 / (1 + jnp.sum(by_y**2) + y)
    by_x = 1 / (1 + by_w**2 + w)
    a = 1 / (1 + jnp.sum(by_y / D))  # y = a w, since z = y / D
    at_w = (2.0 + by_w) / (1 + a * by_w)
    np.testing.assert_allclose(est.inner_params["w"], at_w, rtol=1e-9)
    np.testing.assert_allclose(est.grad, (1 + a) * at_w * (1 + by_w) * by_x, rtol=1e-9)


@pytest.mark.turns
@pytest.mark.parametrize(
    "accepted",
    [np.inf, pytest.param(None, marks=pytest.mark.slow)],
    ids=["accepted", "not accepted"],
)
def test_a_rough_multiplier_is_said(accepted):
    """The lowest level's system cut short: its residual stands beside the others, and unless it is
    accepted no number comes."""
    exact, cut = H.implicit(L.cg(tol=1e-13)), H.implicit(L.cg(maxiter=2), max_residual=accepted)
    est = estimate(z=cut, y=exact, w=exact)
    if accepted is None:
        assert np.isnan(est.grad) and bx.RESULTS(int(est.info["code"])).failed
    else:
        assert float(est.info["w/multiplier_residual"]) > 0.1
        assert float(est.info["w/adjoint_residual"]) < 1e-10


@pytest.mark.slow
def test_multipliers_of_exact_solves_are_exact():
    exact = H.implicit(L.cg(tol=1e-13))
    est = estimate(z=exact, y=exact, w=exact)
    a = 1 / (1 + jnp.sum(1 / D**2))
    np.testing.assert_allclose(est.grad, (a + 1) ** 2 * (2.0 + a) / (1 + a * a) ** 2, rtol=1e-9)
    assert float(est.info["w/multiplier_residual"]) < 1e-10 and int(est.info["code"]) == 0
