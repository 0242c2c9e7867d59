"""Implicit differentiation is exact on every closed form, and each of its forms computes what it
says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import base, linear
from bilevax.base import Ctx, Feed, InnerState, Lower
from bilevax.data import same
from bilevax.results import warnings_in
from tests.problems import PROBLEMS, adjoint_quadratic, flatten, neumann_quadratic
from tests.selection import quick

SOLVED = bx.inner.lbfgs(maxiter=500, tol=1e-13)
STANDING = bx.inner.optax(optax.sgd(0.0), 1)  # leaves the point where it is


def relative(a, b):
    a, b = flatten(a), flatten(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def prepared(form):
    return jax.tree.map(
        jnp.asarray, (form.inner_params, form.outer_params, form.inner_batch, form.outer_batch)
    )


def at_solution(form, method, state=None, batch=None, calls=1):
    """Estimates at the exact solution, so that only the adjoint is under test."""
    _, x, inner_batch, outer_batch = prepared(form)
    y = jax.tree.map(jnp.asarray, form.solution(form.outer_params))
    fn = jax.jit(
        bx.value_and_hypergrad(form.inner, form.outer, solver=STANDING, hypergradient=method)
    )
    out = []
    for _ in range(calls):
        out.append(fn(y, x, inner_batch if batch is None else batch, outer_batch, state=state))
        state = out[-1].state
    return out


@pytest.mark.parametrize(
    "name", quick(PROBLEMS, ["quadratic_ill", "logistic_data_weights", "poisson", "cosh"])
)
def test_closed_forms(name):
    form = PROBLEMS[name]
    (est,) = at_solution(form, bx.hypergradient.implicit(linear.cg(maxiter=1000, tol=1e-13)))
    assert relative(est.grad, form.hypergradient(form.outer_params)) <= 1e-8
    assert abs(float(est.value) - form.value(form.outer_params)) <= 1e-9 * max(
        1, abs(form.value(form.outer_params))
    )
    assert int(est.info["gradients"]) == 1
    assert int(est.info["mixed_products"]) == 1
    assert int(est.info["hvps"]) == int(est.info["adjoint_iterations"]) > 0


def test_from_a_start_by_a_solver():
    form = PROBLEMS["logistic_penalties"]
    method = bx.hypergradient.implicit(linear.cg(maxiter=1000, tol=1e-13))
    est = jax.jit(
        bx.value_and_hypergrad(form.inner, form.outer, solver=SOLVED, hypergradient=method)
    )(*prepared(form))
    assert relative(est.grad, form.hypergradient(form.outer_params)) <= 1e-8
    assert float(est.info["inner_grad_norm"]) <= 1e-10


SOLVERS = {
    "minres": linear.minres(maxiter=500, tol=1e-12),
    "gmres": linear.gmres(maxiter=500, tol=1e-12),
    "bicgstab": linear.bicgstab(maxiter=500, tol=1e-12),
    "cholesky": linear.cholesky(),
    "lu": linear.lu(),
    "preconditioned": linear.cg(
        maxiter=100, tol=1e-13, preconditioner=linear.nystrom_preconditioner(rank=3, rho=1e-3)
    ),
}


@pytest.mark.turns
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_linear_solver(solver):
    form = PROBLEMS["logistic_penalties"]
    (est,) = at_solution(form, bx.hypergradient.implicit(SOLVERS[solver]))
    assert relative(est.grad, form.hypergradient(form.outer_params)) <= 1e-8


def test_low_memory_is_the_same_number():
    form = PROBLEMS["logistic_penalties"]
    cg = linear.cg(maxiter=100, tol=1e-13)
    (low,) = at_solution(form, bx.hypergradient.implicit(cg, low_memory=True))
    (once,) = at_solution(form, bx.hypergradient.implicit(cg))
    assert relative(low.grad, once.grad) <= 1e-13
    np.testing.assert_allclose(
        low.info["inner_grad_norm"], once.info["inner_grad_norm"], rtol=1e-12, atol=1e-15
    )


def test_low_memory_keeps_no_linearisation():
    """Through a deep model, what the loop keeps is the difference between the two forms."""

    def inner(weights, x, batch):
        out = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch, weights)[0]
        return jnp.mean(out**2) + jnp.exp(x) * jnp.sum(weights**2)

    def outer(weights, x, batch):
        return jnp.sum(weights**2)

    def temporaries(low_memory):
        method = bx.hypergradient.implicit(
            linear.cg(maxiter=5), low_memory=low_memory, max_residual=jnp.inf
        )
        fn = jax.jit(bx.value_and_hypergrad(inner, outer, solver=STANDING, hypergradient=method))
        shapes = (
            jax.ShapeDtypeStruct((24, 8, 8), jnp.float64),
            jax.ShapeDtypeStruct((), jnp.float64),
            jax.ShapeDtypeStruct((256, 8), jnp.float64),
        )
        return fn.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(True) < 0.8 * temporaries(False)


def test_neumann_is_its_own_closed_form():
    form = PROBLEMS["quadratic"]
    step = 1 / form.smoothness.largest
    method = bx.hypergradient.implicit(
        linear.neumann(terms=7, step=step), max_residual=jnp.inf, warm_start=False
    )
    (est,) = at_solution(form, method)
    assert relative(est.grad, neumann_quadratic(form, step, 7)) <= 1e-8


def test_identity_is_one_step():
    form = PROBLEMS["quadratic"]
    (est,) = at_solution(
        form, bx.hypergradient.implicit(linear.identity(0.3), max_residual=jnp.inf)
    )
    assert relative(est.grad, adjoint_quadratic(form, lambda w: 0.3 * w)) <= 1e-8


def test_damping_and_the_true_residual():
    form, rho = PROBLEMS["quadratic"], 0.4
    A = form.coefficients.A
    (est,) = at_solution(form, bx.hypergradient.implicit(linear.cg(tol=1e-14), damping=rho))
    assert (
        relative(
            est.grad,
            adjoint_quadratic(form, lambda w: np.linalg.solve(A + rho * np.eye(len(A)), w)),
        )
        <= 1e-8
    )
    y = form.solution(form.outer_params)
    w = jax.grad(form.outer)(jax.tree.map(jnp.asarray, y), *prepared(form)[1::2])
    q = np.linalg.solve(A + rho * np.eye(len(A)), w)
    np.testing.assert_allclose(
        est.info["adjoint_residual"], np.linalg.norm(A @ q - w) / np.linalg.norm(w), rtol=1e-8
    )


def test_truncated_cg_reports_its_residual():
    form = PROBLEMS["logistic_penalties"]
    (est,) = at_solution(
        form, bx.hypergradient.implicit(linear.cg(maxiter=2, tol=1e-12), max_residual=jnp.inf)
    )
    y, x, _, outer_batch = prepared(form)
    y = jnp.asarray(form.solution(form.outer_params))
    w, q = jax.grad(form.outer)(y, x, outer_batch), est.state.method.adjoint
    H = form.inner_hessian(form.outer_params)
    np.testing.assert_allclose(
        est.info["adjoint_residual"], np.linalg.norm(H @ q - w) / np.linalg.norm(w), rtol=1e-8
    )
    assert int(est.info["hvps"]) in (2, 3)  # one more where the residual had to be measured


def test_a_tolerance_below_the_coarsest_leafs_rounding_is_no_warning():
    """A float32 leaf beside a float64 one holds its part of the adjoint to 6e-8: an answer as good
    as that is not rough, and one that was cut short still is."""
    scales = jnp.array([1.0, 2.0, 5.0])

    def inner(y, x, b):
        v = jnp.concatenate([y["wide"], y["single"].astype(jnp.float64)])
        return jnp.sum(scales * v**2) / 2 - x @ v + 0.1 * jnp.sum(v) ** 2

    outer = lambda y, x, b: jnp.sum(y["wide"] ** 2) + jnp.sum(y["single"].astype(jnp.float64))
    y, x = {"wide": jnp.ones(2), "single": jnp.ones(1, jnp.float32)}, jnp.array([1.0, 2.0, 3.0])
    for maxiter, said in ((50, set()), (1, {bx.RESULTS.adjoint_not_converged})):
        method = bx.hypergradient.implicit(linear.cg(maxiter=maxiter, tol=1e-12))
        est = bx.value_and_hypergrad(inner, outer, solver=STANDING, hypergradient=method)(y, x)
        assert set(warnings_in(est.info["warnings"])) == said
        if not said:
            damped = bx.hypergradient.implicit(linear.cg(maxiter=50, tol=1e-12), damping=1e-3)
            est_d = bx.value_and_hypergrad(inner, outer, solver=STANDING, hypergradient=damped)(
                y, x
            )
            assert not warnings_in(est_d.info["warnings"])
            hessian = jnp.diag(scales) + 0.2
            w = jnp.array([2.0, 2.0, 1.0])
            np.testing.assert_allclose(est.grad, jnp.linalg.solve(hessian, w), rtol=1e-6)


def test_warm_adjoint():
    form = PROBLEMS["logistic_penalties"]
    warm = at_solution(form, bx.hypergradient.implicit(linear.cg(tol=1e-8)), calls=2)
    cold = at_solution(
        form, bx.hypergradient.implicit(linear.cg(tol=1e-8), warm_start=False), calls=2
    )
    assert int(warm[1].info["hvps"]) == 1  # the measurement of the old adjoint's residual
    assert int(cold[1].info["hvps"]) == int(cold[0].info["hvps"]) > 2
    assert relative(warm[1].grad, cold[1].grad) <= 1e-7


def test_sketch_is_kept_and_refreshed():
    form = PROBLEMS["quadratic_ill"]
    method = bx.hypergradient.implicit(
        linear.cg(
            maxiter=200, tol=1e-10, preconditioner=linear.nystrom_preconditioner(rank=3, rho=1e-6)
        ),
        refresh=2,
        warm_start=False,
    )
    ests = at_solution(form, method, calls=3)
    spent = [int(e.info["hvps"]) - int(e.info["adjoint_iterations"]) for e in ests]
    assert spent == [3, 0, 3]
    assert [int(e.state.method.calls) for e in ests] == [1, 2, 3]
    sketches = [e.state.method.preconditioner.values for e in ests]
    np.testing.assert_array_equal(sketches[0], sketches[1])
    assert not np.array_equal(sketches[1], sketches[2])  # a new test matrix
    plain = at_solution(form, bx.hypergradient.implicit(linear.cg(maxiter=200, tol=1e-10)))[0]
    assert int(ests[1].info["hvps"]) < int(plain.info["hvps"])


def test_accuracy_follows_the_inner_residual():
    form = PROBLEMS["logistic_penalties"]
    y, x, inner_batch, outer_batch = prepared(form)
    method = bx.hypergradient.implicit(linear.cg(tol=1e-10), follow=0.1, warm_start=False)
    spent = []
    for steps in (5, 60, 2000):
        solver = bx.inner.optax(
            bx.inner.tunable(optax.sgd, learning_rate=1 / form.smoothness.largest), steps
        )
        est = jax.jit(
            bx.value_and_hypergrad(form.inner, form.outer, solver=solver, hypergradient=method)
        )(y, x, inner_batch, outer_batch)
        w_norm = jnp.linalg.norm(jax.grad(form.outer)(est.inner_params, x, outer_batch))
        tol = np.clip(0.1 * est.info["inner_grad_norm"] / w_norm, 1e-10, 0.1)
        assert float(est.info["adjoint_residual"]) <= tol
        spent.append(int(est.info["hvps"]))
    assert spent[0] < spent[1] <= spent[2]


def test_hyper_batch_is_what_second_order_products_see():
    form = PROBLEMS["ridge"]
    y, x, inner_batch, outer_batch = prepared(form)
    half = jax.tree.map(lambda a: a[:8], inner_batch)
    fn = bx.value_and_hypergrad(
        form.inner,
        form.outer,
        solver=STANDING,
        hypergradient=bx.hypergradient.implicit(linear.cg(tol=1e-14)),
    )
    est = jax.jit(lambda: fn(y, x, inner_batch, outer_batch, hyper_batch=half))()
    H, w = jax.hessian(form.inner)(y, x, half), jax.grad(form.outer)(y, x, outer_batch)
    mixed = jax.grad(lambda x: jnp.sum(jax.grad(form.inner)(y, x, half) * jnp.linalg.solve(H, w)))(
        x
    )
    np.testing.assert_allclose(
        est.grad, jax.grad(form.outer, 1)(y, x, outer_batch) - mixed, rtol=1e-9
    )


def test_negative_curvature_is_a_warning_and_minres_meets_none():
    saddle = bx.objective(lambda y, x, batch: (y[0] ** 2 - y[1] ** 2) / 2 + x * jnp.sum(y))
    outer = lambda y, x, batch: jnp.sum(jnp.array([1.0, 2.0]) * y)
    out = {}
    for name, solver in {"cg": linear.cg(), "minres": linear.minres()}.items():
        fn = bx.value_and_hypergrad(
            saddle, outer, solver=STANDING, hypergradient=bx.hypergradient.implicit(solver)
        )
        out[name] = fn(jnp.zeros(2), jnp.asarray(0.0))
    assert bx.RESULTS.negative_curvature in warnings_in(out["cg"].info["warnings"])
    assert (
        int(out["minres"].info["code"]) == bx.RESULTS.success
        and int(out["minres"].info["warnings"]) == 0
    )
    np.testing.assert_allclose(out["minres"].grad, -(1 * 1 + 2 * -1), rtol=1e-10)


def test_numbers_change_without_a_trace():
    form = PROBLEMS["quadratic"]
    traces = []

    def inner(y, x, batch):
        traces.append(1)
        return form.inner(y, x, batch)

    y, x, inner_batch, outer_batch = prepared(form)
    objectives = bx.objective(inner), bx.objective(form.outer)

    @partial(jax.jit, static_argnums=0)
    def pulled(static, numbers, y, x):
        method, lower = base.join(static, numbers), Lower(objectives[0], STANDING, same)
        _, pullback = method.vjp(
            lower,
            InnerState(y, STANDING.init(y)),
            x,
            Feed(inner_batch),
            Ctx(inner_batch),
            method.init(y),
        )
        return pullback(jnp.ones_like(y))[0]

    def run(tol, damping):
        return pulled(
            *base.split(bx.hypergradient.implicit(linear.cg(tol=tol), damping=damping)), y, x
        )

    grads = [run(1e-3, 0.1), run(1e-4, 0.2)]
    count = len(traces)
    run(1e-5, 0.3)
    assert len(traces) == count
    assert not np.array_equal(*grads)


@pytest.mark.parametrize(
    ("settings", "error", "name"),
    [
        ({"damping": -1.0}, ValueError, "damping"),
        ({"max_residual": 0.0}, ValueError, "max_residual"),
        ({"follow": 0.0}, ValueError, "follow"),
        ({"follow": 1.0, "linear": linear.cholesky()}, TypeError, "follow"),
        ({"refresh": 0}, ValueError, "refresh"),
        ({"refresh": 3}, ValueError, "refresh"),
        ({"linear": 3}, TypeError, "linear"),
    ],
)
def test_refusals(settings, error, name):
    with pytest.raises(error, match=f"^{name}: got"):
        bx.hypergradient.implicit(**settings)
