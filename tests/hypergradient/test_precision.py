"""Matrix products of an adjoint solve: at the precision that its tolerance asks for."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevax as bx

H, L = bx.hypergradient, bx.linear
ROWS, WIDTH, OUTPUTS = 8, 4, 3


def inner(w, x, batch):
    return jnp.mean(jnp.tanh(batch @ w) ** 2) + jnp.sum(jnp.exp(x) * w * w)


def outer(w, x, batch):
    return jnp.mean((batch @ w - 1) ** 2)


def products(linear, **settings):
    """Of the whole estimate's matrix products, which are at the highest precision; in the order of the program."""
    method = H.implicit(linear, max_residual=jnp.inf, **settings)
    fn = bx.value_and_hypergrad(inner, outer, solver=bx.inner.optax(optax.sgd(0.1), 2), hypergradient=method)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    args = f32(WIDTH, OUTPUTS), f32(WIDTH, OUTPUTS), f32(ROWS, WIDTH), f32(ROWS, WIDTH)
    text = jax.jit(lambda *args: fn(*args)).lower(*args).as_text()
    return ["HIGHEST" in line for line in text.splitlines() if re.search(r"\bdot_general\b", line)]


@pytest.mark.parametrize("settings", [{}, {"low_memory": True}])
@pytest.mark.parametrize("linear", [L.cg(), L.minres(tol=1e-4), L.gmres(), L.bicgstab(), L.cholesky(), L.lu()], ids=lambda a: a.name)
def test_a_tight_tolerance_has_the_adjoint_in_full_precision_and_the_training_as_it_was(linear, settings):
    found = products(linear, **settings)
    assert any(found) and not all(found)
    training = found.index(True)
    assert not any(found[:training]) and training >= 2  # the solve's forward and backward pass
    assert not any(found[-2:])  # the outer gradient


@pytest.mark.parametrize("linear", [L.cg(tol=1e-2), L.neumann(5, 0.1), L.identity(0.1)], ids=lambda a: a.name)
def test_what_promises_less_keeps_the_devices_own(linear):
    assert not any(products(linear))


def test_the_users_word_stands():
    with jax.default_matmul_precision("default"):
        assert not any(products(L.cg()))
    with jax.default_matmul_precision("highest"):
        assert all(products(L.cg(tol=1e-2)))


def test_a_tolerance_that_is_a_value_in_a_program_counts_as_tight():
    found = []
    jax.make_jaxpr(lambda tol: found.append(H._precision.asked_by(L.cg(tol=tol))) or tol)(1e-2)
    assert found == ["highest"]
