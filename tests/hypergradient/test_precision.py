"""Matrix products of an adjoint solve: at the precision that its tolerance asks for."""

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevax as bx
from bilevax._core.precision import asked_by

H, L = bx.hypergradient, bx.linear
ROWS, WIDTH, OUTPUTS = 8, 4, 3


def inner(w, x, batch):
    return jnp.mean(jnp.tanh(batch @ w) ** 2) + jnp.sum(jnp.exp(x) * w * w)


def outer(w, x, batch):
    return jnp.mean((batch @ w - 1) ** 2)


def dots(jaxpr):
    """Products with the data, in the order of the program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and any(
            ROWS in v.aval.shape for v in (*eqn.invars, *eqn.outvars)
        ):
            yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")
        ):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from dots(getattr(value, "jaxpr", value))


def highest(fn, *args):
    """Of a program's products with its data, which are at the highest precision."""
    jaxpr = jax.make_jaxpr(lambda *args: fn(*args))(*args).jaxpr
    return [eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for eqn in dots(jaxpr)]


def estimate(solver, method):
    return highest(bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method), *ARGS)


f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
ARGS = f32(WIDTH, OUTPUTS), f32(WIDTH, OUTPUTS), f32(ROWS, WIDTH), f32(ROWS, WIDTH)


def products(linear, **settings):
    method = H.implicit(linear, max_residual=jnp.inf, **settings)
    return estimate(bx.inner.optax(optax.sgd(0.1), 2), method)


@pytest.mark.parametrize("settings", [{}, {"low_memory": True}])
@pytest.mark.parametrize(
    "linear",
    [L.cg(), L.minres(tol=1e-4), L.gmres(), L.bicgstab(), L.cholesky(), L.lu()],
    ids=lambda a: a.solve.name,
)
def test_a_tight_tolerance_has_the_adjoint_in_full_precision_and_the_training_as_it_was(
    linear, settings
):
    found = products(linear, **settings)
    training = found.index(True)
    assert not any(found[:training]) and training >= 2  # the solve's forward and backward pass
    assert all(
        found[training:]
    )  # the adjoint, the mixed product, and the outer gradient that is their right side


@pytest.mark.parametrize(
    "linear", [L.cg(tol=1e-2), L.neumann(5, 0.1), L.identity(0.1)], ids=lambda a: a.solve.name
)
def test_what_promises_less_keeps_the_devices_own(linear):
    assert not any(products(linear))


def test_the_users_word_stands():
    with jax.default_matmul_precision("default"):
        assert not any(products(L.cg()))
    with jax.default_matmul_precision("highest"):
        assert all(products(L.cg(tol=1e-2)))


def test_a_tolerance_that_is_a_value_in_a_program_counts_as_tight():
    found = []
    jax.make_jaxpr(lambda tol: found.append(asked_by(L.cg(tol=tol))) or tol)(1e-2)
    assert found == ["highest"]


TO_TOLERANCE = {
    "gradient_descent": bx.inner.gradient_descent,
    "agd": bx.inner.agd,
    "lbfgs": bx.inner.lbfgs,
}


@pytest.mark.parametrize("name", TO_TOLERANCE)
def test_inner_solvers_to_a_tolerance_evaluate_at_what_it_asks_for(name):
    rough = H.implicit(L.neumann(3, 0.1), max_residual=jnp.inf)
    tight = estimate(TO_TOLERANCE[name](tol=1e-5), rough)
    assert any(tight) and not any(estimate(TO_TOLERANCE[name](tol=1e-2), rough))
    assert all(estimate(TO_TOLERANCE[name](tol=1e-5), H.implicit()))


@pytest.mark.parametrize(
    "method",
    [
        H.fixed_point(lambda y, x, batch: y - 0.1 * jax.grad(inner)(y, x, batch)),
        H.kkt(lambda y, x, batch: jnp.sum(y) - 1.0),
        H.shine(refine=2),
    ],
    ids=["fixed_point", "kkt", "shine"],
)
def test_every_method_that_solves_says_what_its_right_side_needs(method):
    assert method.precision == "highest"
    solver = bx.inner.lbfgs(tol=1e-5)  # all of the program is solves then
    assert all(estimate(solver, method))


def test_methods_that_solve_nothing_ask_for_nothing():
    for method in (
        H.unrolled(),
        H.sama(),
        H.one_step(),
        H.finite_difference(),
        H.forward(),
        H.shine(refine=0),
        H.implicit(L.neumann(3, 0.1)),
    ):
        assert method.precision is None, method


def test_solutions_that_are_differentiated_as_functions():
    solved = bx.argmin(inner, bx.inner.lbfgs(tol=1e-5))
    value = lambda x, y, batch: jnp.sum(solved(y, x, batch) ** 2)
    assert all(highest(jax.grad(value), ARGS[1], ARGS[0], ARGS[2]))


def test_levels_below_a_solve():
    top = lambda p, batch: jnp.mean((batch @ p["w"] - 1) ** 2)
    levels = [
        bx.Level(
            "w",
            lambda p, batch: inner(p["w"], p["x"], batch),
            solver=bx.inner.lbfgs(tol=1e-5),
            hypergradient=H.implicit(),
        ),
        bx.Level("x", top, solver=optax.sgd(0.1)),
    ]
    fn = bx.value_and_multilevel_grad(levels)
    params = {"w": ARGS[0], "x": ARGS[1]}
    assert all(highest(lambda p, a, b: fn(p, {"w": a, "x": b}), params, *ARGS[2:]))
