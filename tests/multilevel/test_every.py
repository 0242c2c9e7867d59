"""Levels that stand still in some steps, and what a level inside that has no derivative is
called."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

H = bx.hypergradient


HALF = optax.sgd(0.5)


def levels(method, opt=HALF, steps=1):
    return [
        bx.Level(
            "w",
            lambda p, b: 0.5 * (p["w"] - p["x"]) ** 2,
            solver=bx.inner.optax(opt, steps),
            hypergradient=method,
            every=2,
        ),
        bx.Level("x", lambda p, b: 0.5 * (p["w"] - 1.0) ** 2, solver=optax.sgd(0.1)),
    ]


def test_a_level_stands_still_in_ones_own_loop():
    fn, params, state, seen = (
        bx.value_and_multilevel_grad(levels(H.implicit())),
        {"w": jnp.asarray(0.0), "x": jnp.asarray(2.0)},
        None,
        [],
    )
    for _ in range(3):
        est = fn(params, state=state)
        params, state = {**params, **est.inner_params}, est.state
        seen.append(float(params["w"]))
    assert seen == [1.0, 1.0, 1.5]


def test_standing_still_has_the_derivative_of_the_step():
    """``dw/dx = .5`` in every step, and what is reported of the level is its own gradient."""
    out = bx.solve_multilevel(
        levels(H.unrolled()),
        {"w": jnp.asarray(0.0), "x": jnp.asarray(6.0)},
        num_steps=200,
        tol=1e-3,
        keep="last",
    )
    np.testing.assert_allclose(
        out.history["grad_norm"][:2], [0.5 * 2.0, 0.5 * 2.0]
    )  # w = 3 after the first solve, and still after it
    np.testing.assert_allclose(out.history["w/inner_grad_norm"][1], abs(3.0 - 5.9), rtol=1e-6)
    assert abs(float(out.outer_params) - 1) < 5e-3


@pytest.mark.parametrize(
    "method, rate",
    [(H.unrolled(), 0.698), (H.unrolled(last=2), 0.46), (H.forward(), 0.698)],
    ids=["whole", "truncated", "forward"],
)
def test_standing_still_has_the_derivative_of_all_its_steps(method, rate):
    """Three steps of momentum on a quadratic: the response is the same whether they were taken or
    not."""
    fn, params, state = (
        jax.jit(bx.value_and_multilevel_grad(levels(method, optax.sgd(0.2, momentum=0.5), 3))),
        {"w": jnp.asarray(0.0), "x": jnp.asarray(2.0)},
        None,
    )
    for _ in range(3):
        est = fn(params, state=state)
        params, state = {**params, **est.inner_params}, est.state
        np.testing.assert_allclose(est.grad, rate * (params["w"] - 1), rtol=1e-12)


def test_a_level_inside_whose_system_has_no_answer_is_named():
    d = jnp.asarray([1.0, 3.0, 10.0, 30.0])
    tight, exact, cut = (
        bx.inner.lbfgs(tol=1e-13),
        H.implicit(bx.linear.cg(tol=1e-13)),
        H.implicit(bx.linear.cg(maxiter=2)),
    )
    three = [
        bx.Level(
            "z",
            lambda p, b: 0.5 * jnp.sum(d * p["z"] ** 2) - jnp.sum(p["z"]) * p["y"],
            solver=tight,
            hypergradient=cut,
        ),
        bx.Level(
            "y",
            lambda p, b: 0.5 * (p["y"] - p["x"]) ** 2 + 0.5 * jnp.sum(p["z"] ** 2),
            solver=bx.inner.optax(optax.sgd(0.0), 1),
            hypergradient=exact,
        ),
        bx.Level("x", lambda p, b: 0.5 * p["y"] ** 2, solver=optax.sgd(0.1)),
    ]
    est = jax.jit(bx.value_and_multilevel_grad(three))(
        {"z": jnp.zeros(4), "y": jnp.asarray(0.5), "x": jnp.asarray(2.0)}
    )
    assert np.isnan(est.grad) and int(est.info["code"]) in (
        bx.RESULTS.lower_level_failed,
        bx.RESULTS.inner_nonfinite,
    )
