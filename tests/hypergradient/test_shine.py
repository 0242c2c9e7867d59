"""The inner L-BFGS inverse as adjoint, and as start and preconditioner of one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import linear
from bilevax.inner.lbfgs import inverse_hessian_product
from bilevax.results import warning, warnings_in
from tests.problems import PROBLEMS, flatten
from tests.units import ridge_in_units

FORM = PROBLEMS["logistic_penalties"]
SOLVER = bx.inner.lbfgs(maxiter=500, tol=1e-13)


def prepared():
    return jax.tree.map(
        jnp.asarray, (FORM.inner_params, FORM.outer_params, FORM.inner_batch, FORM.outer_batch)
    )


def run(method):
    return jax.jit(
        bx.value_and_hypergrad(FORM.inner, FORM.outer, solver=SOLVER, hypergradient=method)
    )(*prepared())


def test_unrefined_is_the_inverse_estimate():
    est = run(bx.hypergradient.shine())
    y, x, inner_batch, outer_batch = prepared()
    w, direct = jax.grad(FORM.outer, (0, 1))(est.inner_params, x, outer_batch)
    q = inverse_hessian_product(est.state.opt, w)
    mixed = jax.grad(lambda x: jnp.sum(jax.grad(FORM.inner)(est.inner_params, x, inner_batch) * q))(
        x
    )
    np.testing.assert_allclose(est.grad, direct - mixed, rtol=1e-9)
    H = FORM.inner_hessian(FORM.outer_params)
    np.testing.assert_allclose(
        est.info["adjoint_residual"], np.linalg.norm(H @ q - w) / np.linalg.norm(w), rtol=1e-6
    )
    assert int(est.info["hvps"]) == 1  # the residual's
    assert float(est.info["adjoint_residual"]) < 0.5  # informative, though not exact


def test_refined_is_exact_and_needs_fewer_products_than_a_cold_start():
    est = run(bx.hypergradient.shine(refine=50, tol=1e-11))
    want = flatten(FORM.hypergradient(FORM.outer_params))
    assert np.linalg.norm(flatten(est.grad) - want) <= 1e-8 * np.linalg.norm(want)
    cold = run(bx.hypergradient.implicit(linear.cg(tol=1e-3)))
    warm = run(bx.hypergradient.shine(refine=50, tol=1e-3))
    assert float(warm.info["adjoint_residual"]) <= 1e-3
    assert int(warm.info["adjoint_iterations"]) <= int(cold.info["adjoint_iterations"])


def test_unknowns_in_units_of_their_own_are_no_obstacle():
    """Where plain CG, in float32, is off by the hypergradient's own size and warns of it."""
    p = ridge_in_units(3)
    want = p.hypergradient(p.start[1])

    def error(method):
        fn = bx.value_and_hypergrad(
            p.inner,
            p.outer,
            solver=bx.inner.lbfgs(maxiter=2000, tol=1e-6),
            hypergradient=method,
        )
        est = fn(*p.start, p.train, p.held_out)
        off = np.linalg.norm(np.asarray(est.grad, np.float64) - want) / np.linalg.norm(want)
        return off, est.info

    off, info = error(bx.hypergradient.shine(refine=30))
    assert off <= 1e-4 and int(info["adjoint_iterations"]) <= 25 and int(info["warnings"]) == 0
    off, info = error(bx.hypergradient.implicit())
    assert off > 0.1 and int(info["warnings"]) != 0


@pytest.mark.parametrize("span, right", [(1, True), (2, False), (3, False)])
def test_a_residual_that_says_nothing_is_not_believed(span, right):
    """A residual of 1e-3 is reached, with a hypergradient that is off by two thirds of its size
    where units differ by 1e4: the solver's own estimate of the inverse says so."""
    p = ridge_in_units(span)
    want = p.hypergradient(p.start[1])
    solver = bx.inner.lbfgs(maxiter=2000, tol=1e-6)
    for max_residual in (None, 1e-2):
        method = bx.hypergradient.implicit(
            linear.cg(maxiter=200, tol=1e-3), max_residual=max_residual
        )
        fn = bx.value_and_hypergrad(p.inner, p.outer, solver=solver, hypergradient=method)
        est = fn(*p.start, p.train, p.held_out)
        off = np.linalg.norm(np.asarray(est.grad, np.float64) - want) / np.linalg.norm(want)
        assert float(est.info["adjoint_residual"]) <= 1e-3 and (off < 0.05) == right
        said = int(est.info["warnings"]) & int(warning(True, bx.RESULTS.adjoint_not_converged))
        assert (said == 0) == (right or max_residual is not None)


def quadratic(eigenvalues, dtype, method):
    """An estimate whose inner problem is solved at its start, so that B is still the identity."""
    basis, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))
    hessian = jnp.asarray(basis * eigenvalues @ basis.T, dtype)
    fn = bx.value_and_hypergrad(
        lambda y, x, b: (y - x) @ hessian @ (y - x) / 2,
        lambda y, x, b: jnp.sum((y - 1.0) ** 2),
        solver=bx.inner.lbfgs(),
        hypergradient=method,
    )
    x = jnp.arange(5, dtype=dtype) / 4
    return fn(x, x), 2 * (x - 1)


def test_the_unit_of_the_objective_is_no_cause_for_doubt():
    est, want = quadratic(1e14 * np.arange(1.0, 6), jnp.float32, bx.hypergradient.implicit())
    np.testing.assert_allclose(est.grad, want, atol=1e-5)
    assert int(est.info["warnings"]) == 0


@pytest.mark.parametrize("last, failed", [(-0.1, False), (0.0, True)])
def test_refining_tells_of_a_matrix_that_is_not_positive_definite(last, failed):
    eigenvalues = np.array([1.0, 2.0, 3.0, 4.0, last])
    for method in (bx.hypergradient.shine(refine=20), bx.hypergradient.implicit()):
        est, _ = quadratic(eigenvalues, jnp.float64, method)
        found = warnings_in(int(est.info["warnings"]))
        assert (bx.RESULTS.adjoint_breakdown if failed else bx.RESULTS.negative_curvature) in found
        assert bx.RESULTS(int(est.info["code"])).failed == failed


def test_several_right_sides_are_not_believed_either():
    """Two outer objectives by one block solve: the first is as above, the second its half."""
    p = ridge_in_units(2)
    both = lambda w, x, b: p.outer(w, x, b) * jnp.asarray([1.0, 0.5], jnp.float32)

    def solve(max_residual):
        return bx.solve_bilevel(
            p.inner,
            bx.objective(lambda w, x, b: (jnp.sum(both(w, x, b)), both(w, x, b)), has_aux=True),
            *p.start,
            inner_data=p.train,
            outer_data=p.held_out,
            algorithm=bx.algorithms.multi_objective(
                bx.inner.lbfgs(maxiter=2000, tol=1e-6),
                bx.hypergradient.implicit(
                    linear.cg(maxiter=200, tol=1e-3), max_residual=max_residual
                ),
                optax.sgd(0.0),
            ),
            num_steps=1,
        )

    assert bx.RESULTS.adjoint_not_converged in solve(None).warnings
    assert bx.RESULTS.adjoint_not_converged not in solve(1e-2).warnings


def test_needs_a_solver_that_keeps_a_matrix():
    fn = bx.value_and_hypergrad(
        FORM.inner,
        FORM.outer,
        solver=bx.inner.optax(optax.sgd(0.1), 3),
        hypergradient=bx.hypergradient.shine(),
    )
    with pytest.raises(TypeError, match="^solver: got optax"):
        fn(*prepared())


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"refine": -1}, "refine"), ({"tol": 0.0}, "tol"), ({"max_residual": 0.0}, "max_residual")],
)
def test_refusals(settings, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        bx.hypergradient.shine(**settings)
