"""Half precision, complex data, sizes at the ends of a dtype, and JAX's own switches for finding
errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import tree

H = bx.hypergradient


@pytest.mark.turns
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_argmin_in_half_precision(dtype):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((10, 10)))
    a = jnp.asarray((u * np.linspace(1, 4, 10)) @ u.T, dtype)
    x = jnp.asarray(rng.standard_normal(10), dtype)
    solve = bx.argmin(lambda y, x: (y - x) @ (a @ (y - x)) / 2, bx.inner.lbfgs(tol=1e-2))
    found = jax.grad(lambda x: jnp.sum(solve(jnp.zeros(10, dtype), x).astype(jnp.float32) ** 2))(
        x
    ).astype(jnp.float32)
    want = 2 * x.astype(jnp.float32)
    assert float(jnp.linalg.norm(found - want) / jnp.linalg.norm(want)) < 0.02


@pytest.mark.turns
def test_complex_arguments_of_argmin_and_complex_batches():
    """Real unknowns, complex measurements: both carry derivatives, as a dense solve has them."""
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.standard_normal((6, 3)) + 1j * rng.standard_normal((6, 3)))
    d = a @ jnp.asarray([1.0 + 0j, 2.0, 3.0]) + 0.1j
    g = lambda y, x, a, d: (
        jnp.sum(jnp.abs(a @ y.astype(a.dtype) - d) ** 2) + jnp.exp(x) * jnp.sum(y**2)
    )
    f = lambda y: jnp.sum((y - 1) ** 2)
    exact = lambda x, d: f(
        jnp.linalg.solve((a.conj().T @ a).real + jnp.exp(x) * jnp.eye(3), (a.conj().T @ d).real)
    )
    solve = bx.argmin(g, bx.inner.lbfgs(tol=1e-13))
    at = jnp.asarray(0.5), d
    close = lambda found, want: chex.assert_trees_all_close(found, want, rtol=1e-8)
    close(
        jax.grad(lambda x, d: f(solve(jnp.zeros(3), x, a, d)), (0, 1))(*at),
        jax.grad(exact, (0, 1))(*at),
    )
    fn = bx.value_and_hypergrad(
        lambda y, x, batch: g(y, x, a, batch),
        lambda y, x, batch: f(y),
        solver=bx.inner.lbfgs(tol=1e-13),
        hypergradient=H.implicit(bx.linear.cg(tol=1e-13)),
    )
    close(
        jax.grad(lambda x, d: fn(jnp.zeros(3), x, d).value, (0, 1))(*at),
        jax.grad(exact, (0, 1))(*at),
    )


@pytest.mark.parametrize("size", [1e-20, 3e-30, 1.0, 1e20, 1e30])
def test_norms_neither_underflow_nor_overflow(size):
    v = {
        "a": jnp.asarray([3.0, 0.0], jnp.float32) * size,
        "b": jnp.asarray([[-4.0]], jnp.float32) * size,
    }
    np.testing.assert_allclose(float(tree.norm(v)) / size, 5.0, rtol=1e-6)
    assert float(tree.norm(tree.zeros_like(v))) == 0.0
    np.testing.assert_allclose(jax.grad(lambda v: tree.norm(v))(v)["a"], [0.6, 0.0], rtol=1e-6)


def test_a_norm_of_what_is_not_finite_is_not():
    assert np.isnan(tree.norm(jnp.asarray([1.0, np.nan]))) and np.isinf(
        tree.norm(jnp.asarray([1.0, np.inf]))
    )


# ---- JAX's switches


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x) ** 2) + 0.1 * jnp.sum(y**4)


def outer(y, x, batch):
    return 0.5 * jnp.sum((y - 2.0) ** 2)


def calls():
    start = jnp.zeros(2), jnp.ones(2)
    loop = bx.algorithms.double_loop(bx.inner.lbfgs(), H.implicit(), optax.adam(0.1))
    levels = [
        bx.Level(
            "y",
            lambda p, b: inner(p["y"], p["x"], b),
            solver=bx.inner.optax(optax.sgd(0.3), 2),
            hypergradient=H.implicit(),
        ),
        bx.Level("x", lambda p, b: outer(p["y"], p["x"], b), solver=optax.sgd(0.1)),
    ]
    solve = bx.argmin(lambda y, x: inner(y, x, None), bx.inner.lbfgs())
    fn = bx.value_and_hypergrad(inner, outer, solver=bx.inner.lbfgs(), hypergradient=H.implicit())
    return {
        "solve_bilevel": lambda: (
            bx.solve_bilevel(inner, outer, *start, algorithm=loop, num_steps=2).outer_params
        ),
        "solve_multilevel": lambda: (
            bx.solve_multilevel(levels, {"y": start[0], "x": start[1]}, num_steps=2).outer_params
        ),
        "value_and_hypergrad": lambda: fn(*start).grad,
        "argmin": lambda: solve(*start),
    }


SWITCHES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
}


@pytest.mark.turns
@pytest.mark.parametrize(
    "name", ["solve_bilevel", "solve_multilevel", "value_and_hypergrad", "argmin"]
)
def test_every_driver_runs_under_each_switch(name):
    call = calls()[name]
    plain = call()
    for switch in SWITCHES.values():
        with switch():
            found = call()
        np.testing.assert_allclose(found, plain, rtol=1e-6)
