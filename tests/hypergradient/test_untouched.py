"""Parameters that the inner objective does not touch and the outer one reads: they add nothing, and
it is said."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

H = bx.hypergradient
X, Y = jax.random.normal(jax.random.key(0), (6, 3)), jax.random.normal(jax.random.key(1), (6,))
TABLE = jax.random.normal(jax.random.key(2), (7, 3))


def head(p, x, b):
    return jnp.mean((X @ p["body"] - Y) ** 2) + jnp.exp(x) * jnp.sum(p["body"] ** 2)


def with_bias(p, x, b):
    return jnp.mean((X @ p["body"] + p["bias"] - Y) ** 2)


def words(p, x, b):
    rows = p["table"][jnp.array([0, 1, 2, 1])]
    fit = jnp.mean(
        (rows @ jnp.array([1.0, -0.5, 2.0]) + rows[:, 0] * p["scale"] - jnp.arange(4.0) / 4) ** 2
    )
    return fit + jnp.exp(x) * (jnp.sum(p["table"][:3] ** 2) + p["scale"] ** 2)


def other_words(p, x, b):
    return jnp.mean((jnp.sum(p["table"][jnp.array([0, 2, 5, 6])], 1) - 1) ** 2) + p["scale"]


CASES = {
    "a head that is not trained": (
        head,
        with_bias,
        {"body": jnp.ones(3), "bias": jnp.asarray(1.0)},
    ),
    "rows of an embedding": (words, other_words, {"table": TABLE, "scale": jnp.asarray(0.3)}),
}


@pytest.mark.parametrize("name", CASES)
def test_they_add_nothing_to_the_gradient(name):
    inner, outer, start = CASES[name]
    solver = bx.inner.optax(optax.sgd(0.1), 400)
    grads = {}
    for method in ("unrolled", "implicit"):
        fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=getattr(H, method)())
        out = grads[method] = jax.jit(fn)(start, jnp.asarray(-1.0))
    np.testing.assert_allclose(grads["implicit"].grad, grads["unrolled"].grad, rtol=1e-4)
    assert not bx.RESULTS(int(out.info["code"])).failed
    assert int(out.info["warnings"]) and 0 < float(out.info["adjoint_residual"]) < 1


def test_a_row_of_zeros_costs_conjugate_gradients_nothing_else():
    """The others are solved to the tolerance, from any start; the residual is what is left of b."""
    a = jnp.array(
        [[4.0, 1.0, 0.0, 0.5], [1.0, 3.0, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0], [0.5, 0.2, 0.0, 1.0]]
    )
    b = jnp.array([1.0, 2.0, 0.7, -1.0])
    keep = jnp.array([0, 1, 3])
    right = jnp.zeros(4).at[keep].set(jnp.linalg.solve(a[keep][:, keep], b[keep]))
    for x0 in (jnp.zeros(4), jnp.array([0.3, -1.0, 5.0, 2.0])):
        x, info = bx.linear.cg(tol=1e-10)(lambda v: a @ v, b, x0)
        np.testing.assert_allclose(x[keep], right[keep], rtol=1e-8)
        np.testing.assert_allclose(info.residual, 0.7 / jnp.linalg.norm(b), rtol=1e-8)
        assert int(info.code) == bx.RESULTS.adjoint_breakdown
