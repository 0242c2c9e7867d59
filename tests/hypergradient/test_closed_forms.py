"""Every method on every closed form: the exact ones equal the answer, the biased ones their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import base
from tests import problems
from tests.problems import PROBLEMS, QUADRATICS, TEXTBOOK, flatten
from tests.selection import quick

H, L = bx.hypergradient, bx.linear
STILL = bx.inner.optax(optax.set_to_zero(), 1)  # leaves the point where it is
KINDS = ["adjoint", "differentiated", "quasi_newton"]

# The quick suite has the textbook forms in each kind, but the dearest kind (eleven linear systems)
# on three of them: a plain one, a pytree and one that is no quadratic.
DEAREST = ("ridge", "quadratic_tree", "logistic_penalties")


def seldom(name, kind):
    chosen = name in TEXTBOOK and (kind != "adjoint" or name in DEAREST)
    return () if chosen else pytest.mark.slow


everywhere = [
    pytest.param(name, kind, marks=seldom(name, kind), id=f"{name}-{kind}")
    for name in PROBLEMS
    for kind in KINDS
]
textbook_first = [
    pytest.param(name, marks=() if name in TEXTBOOK else pytest.mark.slow) for name in PROBLEMS
]
quadratics = pytest.mark.parametrize("name", QUADRATICS)


def relative(actual, expected) -> float:
    actual, expected = flatten(actual), flatten(expected)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def prepared(form):
    """Inner parameters at the solution; the rest as it starts."""
    return jax.tree.map(
        jnp.asarray,
        (form.solution(form.outer_params), form.outer_params, form.inner_batch, form.outer_batch),
    )


def heavy_ball(form):
    """Polyak's method with the constants of the Hessian at the solution, for as long as the
    derivative's transient takes to vanish."""
    values = np.linalg.eigvalsh(form.inner_hessian(form.outer_params))
    low, high = np.sqrt(values[0]), np.sqrt(values[-1])
    rate = (high - low) / (high + low)
    steps = int(np.ceil(1.4 * np.log(1e-10) / np.log(max(rate, 0.3))))
    return bx.inner.optax(optax.sgd(4 / (high + low) ** 2, momentum=rate**2), steps)


def adjoint_methods(form):
    """Those that solve a linear system: (objectives, start, solver, method)."""

    def descent(y, x, batch):
        step = 1 / form.smoothness.largest
        return jax.tree.map(lambda a, g: a - step * g, y, jax.grad(form.inner)(y, x, batch))

    plain = (form.inner, form.outer, lambda y: y)
    # The same problem with a copy of the variable, tied to it by a constraint.
    tied = (
        lambda y, x, batch: form.inner(y["copy"], x, batch),
        lambda y, x, batch: form.outer(y["y"], x, batch),
        lambda y: {"y": y, "copy": y},
    )
    equal = H.kkt(lambda y, x, batch: jax.tree.map(jnp.subtract, y["y"], y["copy"]), linear=L.lu())
    solvers = {
        "cg": L.cg(2000, 1e-13),
        "nystrom cg": L.cg(2000, 1e-13, preconditioner=L.nystrom_preconditioner(3, 1e-3)),
        "minres": L.minres(2000, 1e-13),
        "gmres": L.gmres(500, 1e-13),
        "bicgstab": L.bicgstab(2000, 1e-13),
        "cholesky": L.cholesky(),
        "lu": L.lu(),
    }
    return {
        **{name: (*plain, H.implicit(solver)) for name, solver in solvers.items()},
        "low memory": (*plain, H.implicit(L.cg(2000, 1e-13), low_memory=True)),
        "fixed point": (*plain, H.fixed_point(descent, L.lu())),
        "kkt": (*tied, equal),
    }


def value_and_grads(form, kind):
    """The hypergradients of all methods of a kind, in one program."""
    y, x, inner_batch, outer_batch = prepared(form)
    if kind == "adjoint":
        entries = {
            name: (inner, outer, start, STILL, method)
            for name, (inner, outer, start, method) in adjoint_methods(form).items()
        }
    elif kind == "differentiated":
        modes = {
            f"unrolled {mode}": H.unrolled(checkpoint=mode)
            for mode in ("mixed", "none", "step", "sqrt")
        }
        entries = {
            name: (form.inner, form.outer, lambda y: y, heavy_ball(form), m)
            for name, m in {**modes, "forward": H.forward()}.items()
        }
    else:
        y = jax.tree.map(jnp.asarray, form.inner_params)
        entries = {
            "shine": (
                form.inner,
                form.outer,
                lambda y: y,
                bx.inner.lbfgs(maxiter=500, tol=1e-13),
                H.shine(refine=500, tol=1e-13),
            )
        }

    @jax.jit
    def run(y, x, inner_batch, outer_batch):
        out = {}
        for name, (inner, outer, start, solver, method) in entries.items():
            fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)
            est = fn(start(y), x, inner_batch, outer_batch)
            out[name] = est.value, est.grad, est.info["code"]
        return out

    return run(y, x, inner_batch, outer_batch)


@pytest.mark.turns
@pytest.mark.parametrize(("name", "kind"), everywhere)
def test_exact_methods(name, kind):
    form = PROBLEMS[name]
    want = form.hypergradient(form.outer_params)
    for method, (value, grad, code) in value_and_grads(form, kind).items():
        assert not bx.RESULTS(int(code)).failed, method
        assert relative(grad, want) <= 1e-8, (method, relative(grad, want))
        assert abs(float(value) - form.value(form.outer_params)) <= 1e-8 * max(
            1, abs(float(value))
        ), method


# ---- biased methods against their own answers


@quadratics
def test_truncated(name):
    form, T = PROBLEMS[name], 6
    step = 0.7 / form.smoothness.largest
    y, x, *batches = jax.tree.map(
        jnp.asarray, (form.inner_params, form.outer_params, form.inner_batch, form.outer_batch)
    )
    solver = bx.inner.optax(optax.sgd(step), T)
    run = {
        last: bx.value_and_hypergrad(
            form.inner, form.outer, solver=solver, hypergradient=H.unrolled(last)
        )
        for last in (1, 3, T, None)
    }
    grads = jax.jit(
        lambda y, x, *batches: {last or 0: fn(y, x, *batches).grad for last, fn in run.items()}
    )(y, x, *batches)
    for last in run:
        assert (
            relative(
                grads[last or 0], problems.unrolled_quadratic(form, step, T, last).hypergradient
            )
            <= 1e-8
        ), last


@pytest.mark.turns
@quadratics
def test_neumann_damping_and_identity(name):
    form, rho, y = PROBLEMS[name], 0.3, prepared(PROBLEMS[name])[0]
    A, step = form.coefficients.A, 0.9 / form.smoothness.largest
    methods = {
        "neumann 1": (
            H.implicit(L.neumann(1, step), max_residual=jnp.inf),
            problems.neumann_quadratic(form, step, 1),
        ),
        "neumann 9": (
            H.implicit(L.neumann(9, step), max_residual=jnp.inf),
            problems.neumann_quadratic(form, step, 9),
        ),
        "identity": (
            H.implicit(L.identity(0.2), max_residual=jnp.inf),
            problems.one_step_quadratic(form, 0.2),
        ),
        "one step": (H.one_step(0.2), problems.one_step_quadratic(form, 0.2)),
        "difference": (H.finite_difference(0.2), problems.one_step_quadratic(form, 0.2)),
        "damping": (
            H.implicit(L.cg(1000, 1e-13), damping=rho, max_residual=jnp.inf),
            problems.adjoint_quadratic(
                form, lambda w: np.linalg.solve(A + rho * np.eye(len(A)), w)
            ),
        ),
    }
    fns = {
        key: bx.value_and_hypergrad(form.inner, form.outer, solver=STILL, hypergradient=method)
        for key, (method, _) in methods.items()
    }
    _, x, *batches = prepared(form)
    grads = jax.jit(
        lambda y, x, *batches: {key: fn(y, x, *batches).grad for key, fn in fns.items()}
    )(y, x, *batches)
    for key, (_, want) in methods.items():
        assert relative(grads[key], want) <= 1e-8, key


@pytest.mark.turns
@pytest.mark.parametrize("name", textbook_first)
def test_first_order_methods(name):
    """One step, finite differences to their truncation order, and SAMA through Adam, against dense
    second derivatives and a dense Jacobian."""
    form, adam = PROBLEMS[name], optax.adam(0.02)
    _, x, *batches = prepared(form)
    y = jax.tree.map(jnp.asarray, form.inner_params)
    solver = bx.inner.optax(adam, 2)
    to_y, to_x = ravel_pytree(y)[1], ravel_pytree(x)[1]
    methods = {
        "one step": H.one_step(),
        "sama": H.sama(),
        "far": H.finite_difference(radius=2e-2),
        "near": H.finite_difference(radius=1e-2),
    }
    fns = {
        key: bx.value_and_hypergrad(form.inner, form.outer, solver=solver, hypergradient=method)
        for key, method in methods.items()
    }

    @jax.jit
    def run(y, x, inner_batch, outer_batch):
        outs = {key: fn(y, x, inner_batch, outer_batch) for key, fn in fns.items()}
        y, opt = outs["sama"].inner_params, outs["sama"].state.opt
        gradient = jax.grad(lambda y, x: form.inner(to_y(y), to_x(x), inner_batch))
        flat_y, flat_x = ravel_pytree(y)[0], ravel_pytree(x)[0]
        cross = jax.jacfwd(gradient, 1)(flat_y, flat_x)
        w, direct = jax.grad(form.outer, (0, 1))(y, x, outer_batch)
        D = -jax.jacfwd(lambda g: ravel_pytree(adam.update(to_y(g), opt, y)[0])[0])(
            gradient(flat_y, flat_x)
        )
        w, direct = ravel_pytree(w)[0], ravel_pytree(direct)[0]
        grads = {key: ravel_pytree(out.grad)[0] for key, out in outs.items()}
        return (
            grads,
            direct - cross.T @ w,
            direct - cross.T @ (D.T @ w),
            outs["sama"].info["inner_grad_norm"],
        )

    with jax.numpy_dtype_promotion("standard"):  # optax's update, called bare
        grads, one_step, sama, norm = jax.device_get(run(y, x, *batches))
    assert relative(grads["one step"], one_step) <= 1e-8
    assert relative(grads["sama"], sama) <= 1e-8
    assert norm > 0
    far, near = (np.linalg.norm(grads[key] - one_step) for key in ("far", "near"))
    rounding = 1e-10 * np.linalg.norm(one_step)
    if form.linear_in_inner:
        assert far <= rounding and near <= rounding
    else:
        assert abs(far / near - 4) < 0.2 or far <= rounding
    assert near <= 1e-2 * np.linalg.norm(one_step)


# ---- stochastic methods


@pytest.mark.turns
@quadratics
@pytest.mark.parametrize("antithetic", [True, False])
def test_smoothing_is_unbiased(name, antithetic):
    """The K-step map of a quadratic is affine, so that smoothing has no bias: 4,096 draws against
    ``J_K' f_y + f_x``."""
    form, draws = PROBLEMS[name], 4096
    step, K = 0.7 / form.smoothness.largest, 3
    y, x, *batches = jax.tree.map(
        jnp.asarray, (form.inner_params, form.outer_params, form.inner_batch, form.outer_batch)
    )
    method = H.zeroth_order(samples=1, scale=0.3, antithetic=antithetic)
    fn = bx.value_and_hypergrad(
        form.inner, form.outer, solver=bx.inner.optax(optax.sgd(step), K), hypergradient=method
    )
    one = lambda key: ravel_pytree(fn(y, x, *batches, key=key).grad)[0]
    samples = np.asarray(
        jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=512))(
            jax.random.split(jax.random.key(0), draws)
        )
    )
    error, standard = (
        samples.mean(0) - flatten(problems.unrolled_quadratic(form, step, K).hypergradient),
        samples.std(0, ddof=1) / np.sqrt(draws),
    )
    assert np.all(standard > 0)
    assert np.all(np.abs(error) <= 3 * standard), error / standard


@pytest.mark.parametrize(
    "name", quick([name for name in TEXTBOOK if PROBLEMS[name].sampled], ["quadratic_tree"])
)
@pytest.mark.parametrize("method", ["one_step", "finite_difference", "sama", "fixed adjoint"])
def test_minibatches_of_products_are_unbiased(name, method):
    """Batches for second-order products, drawn apart from the solve's: their mean is the full
    batch's product, since it is linear in the batch."""
    form, draws = PROBLEMS[name], 4096
    y, x, inner_batch, outer_batch = prepared(form)
    scale = 0.5
    factory = {
        "one_step": H.one_step(scale),
        "finite_difference": H.finite_difference(scale),
        "sama": H.sama(),
        "fixed adjoint": H.implicit(L.identity(scale), max_residual=jnp.inf),
    }[method]
    fn = bx.value_and_hypergrad(
        form.inner, form.outer, solver=bx.inner.optax(optax.sgd(scale), 1), hypergradient=factory
    )

    @jax.jit
    def run(keys):
        def one(key):
            rows = jax.random.choice(key, problems.ROWS, (4,), replace=False)
            part = jax.tree.map(lambda a: a[rows], inner_batch)
            return ravel_pytree(fn(y, x, inner_batch, outer_batch, hyper_batch=part).grad)[0]

        return jax.lax.map(one, keys, batch_size=512), ravel_pytree(
            fn(y, x, inner_batch, outer_batch).grad
        )[0]

    samples, want = jax.device_get(run(jax.random.split(jax.random.key(1), draws)))
    error, standard = samples.mean(0) - want, samples.std(0, ddof=1) / np.sqrt(draws)
    assert (
        np.any(standard > 0) or form.name == "ridge"
    )  # a penalty alone has no batch in its product
    assert np.all(np.abs(error) <= 3 * standard + 1e-12), error / standard


# ---- what every estimate says of itself


@pytest.mark.turns
@pytest.mark.parametrize(
    ("method", "solver"),
    [
        (H.implicit(), STILL),
        (H.unrolled(), STILL),
        (H.unrolled(1), STILL),
        (H.forward(), STILL),
        (H.one_step(), STILL),
        (H.finite_difference(), STILL),
        (H.sama(), bx.inner.optax(optax.sgd(0.1), 1)),
        (H.zeroth_order(4), STILL),
        (H.shine(), bx.inner.lbfgs(maxiter=3)),
        (H.fixed_point(lambda y, x, batch: 0.5 * (y + x)), STILL),
        (H.kkt(lambda y, x, batch: jnp.sum(y) - 1.0), STILL),
    ],
    ids=lambda value: (
        repr(value).partition("(")[0] if isinstance(value, base.Hypergradient) else ""
    ),
)
def test_every_estimate_carries_its_diagnosis(method, solver):
    inner, outer = (lambda y, x, batch: jnp.sum((y - x) ** 2)), (lambda y, x, batch: jnp.sum(y * y))
    fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)
    info = jax.jit(fn)(jnp.array([2.0, 0.0]), jnp.ones(2), key=jax.random.key(0)).info
    assert {
        "code",
        "grad_norm",
        "inner_value",
        "inner_grad_norm",
        "gradients",
        "hvps",
        "mixed_products",
    } <= set(info)
    solves = {"implicit", "shine", "fixed_point", "kkt"}
    assert ({"adjoint_residual", "adjoint_iterations"} <= set(info)) == (
        repr(method).partition("(")[0] in solves
    )
    assert all(np.isfinite(v) for v in info.values())
