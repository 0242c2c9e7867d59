"""Passes over large parameters stand in branches of their own, and give the same numbers there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import bilevax as bx
from bilevax._core import apart as module
from bilevax._core.apart import apart

HG = bx.hypergradient
METHODS = {  # the passes that stand apart: the outer gradient, and the method's own
    "sama": (HG.sama(), 3),
    "sama, difference": (HG.sama(product="difference"), 4),
    "finite_difference": (HG.finite_difference(), 3),
    "one_step": (HG.one_step(), 2),
    "implicit": (HG.implicit(bx.linear.cg(5, 1e-6)), 1),
    "unrolled": (HG.unrolled(), 1),
}


def deep(y, x, batch):
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch, y["layers"])[0]
    return jnp.mean(x[:, None] * (h @ y["top"]) ** 2) + 1e-2 * sum(
        jnp.sum(leaf**2) for leaf in jax.tree.leaves(y)
    )


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    y = {
        "layers": 0.3 * jax.random.normal(keys[0], (3, 4, 4)),
        "top": jax.random.normal(keys[1], (4, 1)),
    }
    return y, jnp.linspace(0.5, 1.5, 6), jax.random.normal(keys[2], (6, 4))


def function(method):
    solver = bx.inner.optax(optax.adam(1e-2, eps_root=1e-12), steps=2)
    return bx.value_and_hypergrad(deep, deep, solver=solver, hypergradient=method)


def walk(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")
        ):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from walk(getattr(value, "jaxpr", value))


def branches(jaxpr) -> int:
    """Predicates that are hidden from the compiler."""
    return sum(
        eqn.primitive.name == "optimization_barrier" and eqn.outvars[0].aval.dtype == bool
        for eqn in walk(jaxpr)
    )


@pytest.mark.turns
@pytest.mark.parametrize("name", METHODS)
def test_same_numbers_in_a_branch_and_outside(name, monkeypatch):
    method, count = METHODS[name]
    y, x, batch = problem()
    plain = jax.jit(function(method))(y, x, batch, 2 * batch)
    assert branches(jax.make_jaxpr(function(method))(y, x, batch, 2 * batch).jaxpr) == 0
    monkeypatch.setattr(module, "LARGE", 1)
    assert branches(jax.make_jaxpr(function(method))(y, x, batch, 2 * batch).jaxpr) == count
    moved = jax.jit(function(method))(y, x, batch, 2 * batch)
    np.testing.assert_allclose(moved.grad, plain.grad, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(moved.value, plain.value, rtol=1e-6)


def test_vmap_and_derivatives_of_a_pass_apart(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)
    fn = lambda y: apart(lambda y: jnp.sum(jnp.sin(y) ** 3), y)
    y = jnp.linspace(0.1, 1.0, 4)
    exact = 3 * jnp.sin(y) ** 2 * jnp.cos(y)
    np.testing.assert_allclose(jax.grad(fn)(y), exact, rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(fn)(y), exact, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(fn)(y[:, None]), jnp.sin(y) ** 3, rtol=1e-6)


def test_keys_and_meshes_whose_axes_types_know_stay_outside(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)
    y = jnp.ones(8)
    keyed = jax.make_jaxpr(lambda y: apart(lambda y: (y, jax.random.key(0)), y))(y)
    assert branches(keyed.jaxpr) == 0
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        there = jax.device_put(y, NamedSharding(mesh, PartitionSpec("data")))
        assert branches(jax.make_jaxpr(lambda y: apart(jnp.sin, y))(there).jaxpr) == 0
    auto = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(
        lambda y: apart(jnp.sin, y),
        mesh=auto,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    assert branches(jax.make_jaxpr(inside)(y).jaxpr) == 0
    np.testing.assert_allclose(jax.jit(inside)(y), jnp.sin(y), rtol=1e-6)


def test_sharded_parameters_in_a_branch(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    y, x, batch = problem()
    y = {
        "layers": jax.device_put(y["layers"], NamedSharding(mesh, PartitionSpec(None, "fsdp"))),
        "top": jax.device_put(y["top"], rows),
    }
    found = jax.jit(function(HG.sama()))(y, x, batch, 2 * batch)
    np.testing.assert_allclose(
        found.grad, jax.jit(function(HG.sama()))(*problem(), 2 * batch).grad, rtol=2e-5, atol=1e-7
    )
    assert found.inner_params["layers"].sharding.spec == PartitionSpec(None, "fsdp")


def test_small_and_large():
    assert not module.large({"a": jnp.zeros(4)})
    assert module.large(
        {
            "a": jax.ShapeDtypeStruct((module.LARGE // 4,), jnp.float32),
            "b": jax.ShapeDtypeStruct((), jnp.float32),
        }
    )
