"""One step, finite differences and SAMA: each against its own closed form, and the places where an
update has no derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import base
from bilevax.hypergradient import finite_difference, implicit, one_step, sama
from bilevax.hypergradient.sama import adapt
from bilevax.results import RESULTS, warnings_in
from tests import problems
from tests.problems import PROBLEMS, QUADRATICS, flatten, unflatten
from tests.selection import quick

quadratics = pytest.mark.parametrize(
    "form", [PROBLEMS[name] for name in QUADRATICS], ids=QUADRATICS
)


def close(actual, expected, rtol):
    actual, expected = flatten(actual), flatten(expected)
    assert np.linalg.norm(actual - expected) <= rtol * np.linalg.norm(expected)


def estimate(form, solver, method, **kwargs):
    fn = bx.value_and_hypergrad(form.inner, form.outer, solver=solver, hypergradient=method)
    return jax.jit(lambda *args: fn(*args, **kwargs))(
        form.inner_params, form.outer_params, form.inner_batch, form.outer_batch
    )


def dense_cross(form, y, q):
    """``f_x − ∇²_xy g · q`` from dense second derivatives of the objectives."""
    to_y, to_x = ravel_pytree(form.inner_params)[1], ravel_pytree(form.outer_params)[1]
    flat_y, flat_x = flatten(y), flatten(form.outer_params)

    @jax.jit
    def answer(y, x, q, inner_batch, outer_batch):
        inner_gradient = jax.grad(lambda y, x: form.inner(to_y(y), to_x(x), inner_batch))
        mixed = jax.jacfwd(inner_gradient, argnums=1)(y, x)
        return jax.grad(lambda x: form.outer(to_y(y), to_x(x), outer_batch))(x) - mixed.T @ q

    return unflatten(
        form.outer_params, np.asarray(answer(flat_y, flat_x, q, form.inner_batch, form.outer_batch))
    )


def cotangent(form, y):
    return flatten(jax.grad(form.outer)(y, form.outer_params, form.outer_batch))


# ---- closed forms


@quadratics
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_one_step_closed_form(form, scale):
    out = estimate(form, bx.inner.optax(optax.sgd(0.4), 5), one_step(scale))
    close(out.grad, problems.one_step_quadratic(form, scale, out.inner_params), 1e-8)


@quadratics
def test_finite_difference_is_exact_on_quadratics(form):
    out = estimate(form, bx.inner.optax(optax.sgd(0.4), 5), finite_difference(0.3))
    close(out.grad, problems.one_step_quadratic(form, 0.3, out.inner_params), 1e-8)


@pytest.mark.parametrize("name", ["kernel_ridge", "ridge", "logistic"])
def test_one_step_on_other_problems(name):
    form = PROBLEMS.get(name, PROBLEMS["weighted_least_squares"])
    out = estimate(form, bx.inner.optax(optax.sgd(0.1), 3), one_step())
    close(out.grad, dense_cross(form, out.inner_params, cotangent(form, out.inner_params)), 1e-8)


def cubic_in_inner(y, x, batch):
    return jnp.sum(x * jnp.sin(y)) + jnp.sum(y * y)


def test_finite_difference_error_is_of_second_order():
    """The error falls as the square of the radius, at the constant that the third derivative
    gives."""
    outer = lambda y, x, batch: jnp.sum(jnp.asarray([1.0, -2.0, 2.0], y.dtype) * y)
    y, x, w = (
        jnp.asarray([0.3, -0.4, 0.9]),
        jnp.asarray([1.0, 2.0, 3.0]),
        np.asarray([1.0, -2.0, 2.0]),
    )
    frozen = bx.inner.optax(optax.set_to_zero(), 1)
    exact = -np.cos(y) * w
    errors = []
    for radius in (0.2, 0.1, 0.05):
        fn = bx.value_and_hypergrad(
            cubic_in_inner, outer, solver=frozen, hypergradient=finite_difference(radius=radius)
        )
        error = flatten(fn(y, x).grad) - exact
        predicted = np.cos(y) * w**3 * (radius / 3.0) ** 2 / 6  # ε = radius / ‖w‖ = radius / 3
        np.testing.assert_allclose(error, predicted, rtol=0.01)
        errors.append(np.linalg.norm(error))
    np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.01)
    np.testing.assert_allclose(errors[1] / errors[2], 4, rtol=0.01)


# ---- SAMA against the dense Jacobian of the update

LABELS = {"w": "fast", "b": "slow"}
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "nadam": lambda: optax.nadam(0.05),
    "rmsprop": lambda: optax.rmsprop(0.05, momentum=0.5),
    "adagrad": lambda: optax.adagrad(0.05),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=2),
    "lamb": lambda: optax.lamb(0.05),
    "clip_adam_schedule": lambda: optax.chain(
        optax.clip_by_global_norm(0.2), optax.adam(optax.exponential_decay(0.05, 2, 0.7))
    ),
    "adam_clip": lambda: optax.chain(
        optax.scale_by_adam(), optax.clip_by_global_norm(0.2), optax.scale(-0.1)
    ),
    "masked": lambda: optax.chain(
        optax.masked(optax.clip_by_global_norm(0.1), {"w": True, "b": False}), optax.adam(0.05)
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"fast": optax.adam(0.1), "slow": optax.sgd(0.01, momentum=0.9)}, LABELS
    ),
    "polyak": lambda: optax.polyak_sgd(max_learning_rate=1.0, f_min=-1.0),
    "tunable": lambda: bx.tunable(optax.adam, learning_rate=0.05),
}


def model_inner(y, x, batch):
    prediction = jnp.tanh(batch["X"] @ y["w"] + y["b"][None])
    per_row = jnp.sum((prediction - batch["Y"]) ** 2, axis=1)
    return jnp.mean(jax.nn.sigmoid(x["weights"]) * per_row) + 0.5 * jnp.exp(x["decay"]) * jnp.sum(
        y["w"] ** 2
    )


def model_outer(y, x, batch):
    return jnp.mean((jnp.tanh(batch["X"] @ y["w"] + y["b"][None]) - batch["Y"]) ** 2)


def model_problem():
    rng = np.random.default_rng(5)
    y = {"w": 0.5 * rng.standard_normal((3, 2)), "b": 0.1 * rng.standard_normal(2)}
    x = {"weights": rng.standard_normal(6), "decay": np.asarray(-2.0)}
    batches = [
        {"X": rng.standard_normal((6, 3)), "Y": rng.standard_normal((6, 2))} for _ in range(2)
    ]
    return jax.tree.map(jnp.asarray, (y, x, *batches))


@pytest.mark.turns
@pytest.mark.parametrize(
    "name",
    quick(OPTIMIZERS, ["momentum", "adamw", "clip_adam_schedule", "multi_transform", "tunable"]),
)
def test_sama_is_the_dense_jacobian_of_the_update(name):
    y0, x, inner_batch, outer_batch = model_problem()
    opt = OPTIMIZERS[name]()
    solver = bx.inner.optax(opt, 3)
    fn = bx.value_and_hypergrad(model_inner, model_outer, solver=solver, hypergradient=sama())

    @jax.jit
    def both(x):
        out = fn(y0, x, inner_batch, outer_batch)
        y, back = out.inner_params, ravel_pytree(y0)[1]
        value, g = jax.value_and_grad(model_inner)(y, x, inner_batch)

        def update(flat):  # straight from optax, forward mode, dense
            with jax.numpy_dtype_promotion("standard"):
                extra = {"value": value} if name == "polyak" else {}
                return ravel_pytree(opt.update(back(flat), out.state.opt, y, **extra)[0])[0]

        D = -jax.jacfwd(update)(ravel_pytree(g)[0])
        w = jax.grad(model_outer)(y, x, outer_batch)
        q = back(D.T @ ravel_pytree(w)[0])
        inner_gradient = lambda x: jax.grad(model_inner)(y, x, inner_batch)
        expected = jax.tree.map(jnp.negative, jax.vjp(inner_gradient, x)[1](q)[0])
        adapted, _ = adapt(lambda g: back(update(ravel_pytree(g)[0])), g, w)
        return out.grad, expected, adapted, q, out.info

    grad, expected, adapted, q, info = both(x)
    close(adapted, q, 1e-10)
    close(grad, expected, 1e-10)
    assert np.linalg.norm(flatten(q)) > 1e-6
    assert int(info["adaptation_nonsmooth"]) == 0
    assert int(info["code"]) == RESULTS.success


def test_sama_adam_by_hand():
    """Adam's derivative written out: ``∂u/∂g = α[(1−β₁)/c₁/(√v̂+ε) − m̂ (1−β₂) g/c₂ / (√v̂
    (√v̂+ε)²)]`` at the next step."""
    form, lr, b1, b2, eps, steps = PROBLEMS[QUADRATICS[0]], 0.05, 0.9, 0.999, 1e-8, 3
    out = estimate(form, bx.inner.optax(optax.adam(lr, b1, b2, eps), steps), sama())
    (A, _, C, a, *_), x, y = (
        form.coefficients,
        flatten(form.outer_params),
        flatten(form.inner_params),
    )
    m = v = np.zeros_like(y)
    for t in range(1, steps + 2):
        g = A @ y + C.T @ x + a
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat, root = m / (1 - b1**t), np.sqrt(v / (1 - b2**t))
        if t <= steps:
            y = y - lr * m_hat / (root + eps)
    D = lr * (
        (1 - b1) / (1 - b1**t) / (root + eps)
        - m_hat * (1 - b2) * g / (1 - b2**t) / (root * (root + eps) ** 2)
    )
    close(out.inner_params, y, 1e-10)
    close(out.grad, problems.adjoint_quadratic(form, lambda w: D * w, out.inner_params), 1e-8)


@quadratics
def test_sama_through_sgd_is_one_step(form):
    solver = bx.inner.optax(optax.sgd(0.4), 5)
    close(estimate(form, solver, sama()).grad, estimate(form, solver, one_step(0.4)).grad, 1e-12)


def test_sama_difference_error_is_of_second_order():
    y, x, inner_batch, outer_batch = model_problem()
    solver = bx.inner.optax(optax.adam(0.01), 3)

    def grad(method):
        fn = bx.value_and_hypergrad(model_inner, model_outer, solver=solver, hypergradient=method)
        return flatten(jax.jit(fn)(y, x, inner_batch, outer_batch).grad)

    exact = grad(sama())
    far, near = (
        np.linalg.norm(grad(sama(product="difference", radius=radius)) - exact)
        for radius in (0.2, 0.1)
    )
    np.testing.assert_allclose(far / near, 4, rtol=0.05)
    assert near <= 0.01 * np.linalg.norm(exact)
    # Exact to rounding where the mixed derivative is linear in the inner parameters.
    quadratic = PROBLEMS[QUADRATICS[0]]
    close(
        estimate(quadratic, solver, sama(product="difference")).grad,
        estimate(quadratic, solver, sama()).grad,
        1e-10,
    )


def test_nudge_starts_the_next_solve_a_step_further():
    form, radius, step = PROBLEMS[QUADRATICS[0]], 0.05, 0.1
    solver = bx.inner.optax(optax.sgd(step), 1)
    fn = bx.value_and_hypergrad(
        form.inner, form.outer, solver=solver, hypergradient=sama(nudge=True, radius=radius)
    )
    run = jax.jit(
        lambda y, state: fn(y, form.outer_params, form.inner_batch, form.outer_batch, state=state)
    )
    first = run(form.inner_params, fn.init(form.inner_params))
    plain = estimate(form, solver, sama())
    close(first.inner_params, plain.inner_params, 1e-12)
    close(first.grad, plain.grad, 1e-12)
    w = cotangent(form, first.inner_params)
    close(first.state.method, unflatten(form.inner_params, radius * w / np.linalg.norm(w)), 1e-12)
    second = run(first.inner_params, first.state)
    (A, _, C, a, *_) = form.coefficients
    start = flatten(first.inner_params) - radius * w / np.linalg.norm(w)
    close(
        second.inner_params,
        start - step * (A @ start + C.T @ flatten(form.outer_params) + a),
        1e-12,
    )


# ---- no usable derivative


def dead_unit(y, x, batch):
    """The last coordinate is multiplied by a data weight of zero: its gradient is exactly zero, its
    mixed derivative is not."""
    return jnp.sum((y[:3] - x[:3]) ** 2) + x[3] * y[3]


def total(y, x, batch):
    return jnp.sum(y) + 0.5 * jnp.sum(y * y)


@pytest.mark.parametrize("clipped", [False, True])
def test_adam_at_an_exactly_zero_gradient(clipped):
    """NaN by plain differentiation; here the dead coordinate is left out, and the others are as if
    it were not there."""
    opt = (
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)) if clipped else optax.adam(0.1)
    )
    y, x = jnp.asarray([1.0, 2.0, 3.0, 0.5]), jnp.asarray([0.1, 0.2, 0.3, 0.0])
    run = lambda inner, y, x: jax.jit(
        bx.value_and_hypergrad(inner, total, solver=bx.inner.optax(opt, 2), hypergradient=sama())
    )(y, x)
    out = run(dead_unit, y, x)
    alone = run(lambda y, x, batch: jnp.sum((y - x) ** 2), y[:3], x[:3])
    close(out.grad[:3], alone.grad, 1e-12)
    assert float(out.grad[3]) == 0.0
    assert int(out.info["adaptation_nonsmooth"]) == 1
    assert int(out.info["code"]) == RESULTS.success
    assert np.linalg.norm(flatten(alone.grad)) > 1e-8

    # An optimizer that has a derivative there is taken at its word.
    smooth = optax.adam(0.1, eps_root=1e-6)
    fn = bx.value_and_hypergrad(
        dead_unit, total, solver=bx.inner.optax(smooth, 2), hypergradient=sama()
    )
    out = jax.jit(fn)(y, x)
    assert int(out.info["adaptation_nonsmooth"]) == 0
    assert np.isfinite(float(out.grad[3]))
    assert float(out.grad[3]) != 0.0


def test_a_gradient_whose_square_underflows_is_zero_to_adam():
    """Features that are zero but for rounding: their gradients are tiny, their second moments zero,
    and the derivative infinite."""
    opt, y = optax.adam(0.01), jnp.ones(2, jnp.float32)
    state = opt.init(y)
    with jax.numpy_dtype_promotion("standard"):
        (tiny, kinks), (zero, _) = (
            adapt(
                lambda grads: opt.update(grads, state, y)[0],
                jnp.asarray([g, 1.0], jnp.float32),
                jnp.ones(2, jnp.float32),
            )
            for g in (1e-22, 0.0)
        )
    assert int(kinks) == 1
    np.testing.assert_array_equal(tiny, zero)
    assert np.all(np.isfinite(tiny))


def test_rule_spares_coordinates_that_have_a_derivative():
    """A zero gradient under SGD is no kink: only Adam's half of the parameters is touched."""
    opt = optax.multi_transform(
        {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, {"a": "adam", "s": "sgd"}
    )
    inner = lambda y, x, batch: jnp.sum(x * (y["a"] + y["s"]))
    outer = lambda y, x, batch: jnp.sum(y["a"] + y["s"])
    y, x = {"a": jnp.ones(2), "s": jnp.ones(2)}, jnp.asarray([0.0, 1.0])
    out = jax.jit(
        bx.value_and_hypergrad(inner, outer, solver=bx.inner.optax(opt, 2), hypergradient=sama())
    )(y, x)
    assert int(out.info["adaptation_nonsmooth"]) == 1
    np.testing.assert_allclose(out.grad[0], -0.1, rtol=1e-12)  # from SGD's coordinate alone


@pytest.mark.parametrize("opt", [optax.lion(0.01), optax.sign_sgd(0.01)], ids=["lion", "sign_sgd"])
def test_updates_with_zero_derivative_are_a_warning(opt):
    form = PROBLEMS["ridge"]
    out = estimate(form, bx.inner.optax(opt, 3), sama())
    assert set(warnings_in(out.info["warnings"])) == {RESULTS.adaptation_zero}
    assert "one_step" in RESULTS.adaptation_zero.message
    assert (
        int(estimate(form, bx.inner.optax(opt, 3), one_step(0.1)).info["code"]) == RESULTS.success
    )


@pytest.mark.parametrize("done", [2, 3])
def test_the_update_that_accumulation_leads_to_has_a_derivative(done):
    """Whether the next step accumulates or moves: the update is that of the mean gradient."""
    form = PROBLEMS["ridge"]
    solver = bx.inner.optax(optax.MultiSteps(optax.sgd(0.3), 3).gradient_transformation(), done)
    out = estimate(form, solver, sama())
    assert int(out.info["code"]) == RESULTS.success
    close(out.grad, estimate(form, solver, one_step(0.3)).grad, 1e-10)


@pytest.mark.parametrize(
    "method",
    [one_step(), finite_difference(), sama(), sama(product="difference"), sama(nudge=True)],
    ids=repr,
)
def test_zero_cotangent_gives_zero(method):
    y, x = jnp.ones(3), jnp.asarray([0.5, 2.0, -1.0])
    outer = lambda y, x, batch: jnp.sum(x * x) + 0.0 * jnp.sum(y)
    fn = bx.value_and_hypergrad(
        cubic_in_inner, outer, solver=bx.inner.optax(optax.adam(0.1), 2), hypergradient=method
    )
    out = jax.jit(fn)(y, x)
    np.testing.assert_array_equal(out.grad, 2 * x)
    assert int(out.info["code"]) == RESULTS.success
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out.state.method))


def test_a_difference_that_rounds_away_is_reported():
    y, x = jnp.full(3, 300.0, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)
    inner, outer = (lambda y, x, batch: jnp.sum(x * y * y)), (lambda y, x, batch: jnp.sum(y))
    frozen = bx.inner.optax(optax.set_to_zero(), 1)
    lost = jax.jit(
        bx.value_and_hypergrad(inner, outer, solver=frozen, hypergradient=finite_difference())
    )(y, x)
    assert set(warnings_in(lost.info["warnings"])) == {RESULTS.difference_lost}
    kept = jax.jit(
        bx.value_and_hypergrad(
            inner, outer, solver=frozen, hypergradient=finite_difference(radius=32.0)
        )
    )(y, x)
    assert int(kept.info["warnings"]) == 0
    np.testing.assert_allclose(np.asarray(kept.grad, np.float32), -600.0, rtol=0.1)


def test_a_difference_of_gradients_that_is_their_rounding_is_reported():
    """Two gradients of size 1e4 that differ by 2e-4, in float32: what is left is noise."""
    inner = lambda y, x, b: jnp.sum((y - x) ** 2) / 2 + 1e4 * jnp.sum(x)
    outer = lambda y, x, b: jnp.sum(y)
    at = jnp.ones(2, jnp.float32)
    for radius, said in ((1e-4, {RESULTS.difference_lost}), (1e3, set())):
        fn = bx.value_and_hypergrad(
            inner,
            outer,
            solver=bx.inner.optax(optax.sgd(0.5), 1),
            hypergradient=finite_difference(radius=radius),
        )
        assert set(warnings_in(fn(at, at).info["warnings"])) == said


def test_solvers_without_an_update_are_refused():
    form = PROBLEMS["ridge"]
    with pytest.raises(ValueError, match=r"no update to differentiate.*inner\.optax"):
        estimate(form, bx.inner.lbfgs(), sama())
    with pytest.raises(ValueError, match="searches in a loop"):
        estimate(form, bx.inner.optax(optax.lbfgs(), 2), sama())


def test_a_plain_update_gets_no_extra_arguments():
    form, plain = PROBLEMS["ridge"], bx.inner.optax(optax.sgd(0.1), 2)
    solver = plain._replace(update=lambda grads, opt, params: plain.update(grads, opt, params))
    close(estimate(form, solver, sama()).grad, estimate(form, plain, sama()).grad, 1e-12)


# ---- keys, model state, bounds of use


def dropout(y, x, batch, *, key):
    mask = jax.random.bernoulli(key, 0.5, y.shape).astype(y.dtype)
    return jnp.sum(jnp.exp(x) * (2 * mask * y - batch) ** 2) + 0.5 * jnp.sum(y * y)


@pytest.mark.turns
@pytest.mark.parametrize(
    "method",
    [finite_difference(), sama(), sama(product="difference")],
    ids=["finite_difference", "sama", "sama_difference"],
)
def test_dropout_noise_is_no_larger_than_the_exact_methods(method):
    """Both evaluations of a difference see one mask; two masks would give a spread of the order of
    1 / radius."""
    inner = bx.objective(dropout, keyed=True)
    outer = lambda y, x, batch: 0.5 * jnp.sum((y - 1) ** 2)
    y, x, batch = jnp.linspace(0.2, 1.0, 8), jnp.linspace(-0.5, 0.5, 8), jnp.linspace(1.0, 2.0, 8)
    solver = bx.inner.optax(optax.sgd(0.1), 2)

    def spread(method):
        fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)
        run = jax.jit(jax.vmap(lambda key: fn(y, x, batch, None, key=key).grad))
        return np.std(run(jax.random.split(jax.random.key(0), 512)), axis=0)

    scale = 0.1 if "finite" in repr(method) else 1.0  # SAMA carries the step size of 0.1 already
    assert np.all(
        scale * spread(method) <= 1.001 * 0.1 * spread(one_step())
    )  # the exact product with the same adjoint
    assert np.linalg.norm(scale * spread(method)) <= np.linalg.norm(
        spread(implicit(bx.linear.cg(maxiter=20)))
    )


def counting(y, x, batch, model):
    return jnp.sum(x * (y - model["mean"]) ** 2), {
        "mean": 0.9 * model["mean"] + 0.1 * y,
        "count": model["count"] + 1,
    }


@pytest.mark.parametrize(
    "method", [one_step(), finite_difference(), sama(), sama(product="difference")], ids=repr
)
def test_model_state_moves_on_real_steps_only(method):
    inner, model = (
        bx.objective(counting, stateful=True),
        {"mean": jnp.zeros(2), "count": jnp.int32(0)},
    )
    fn = bx.value_and_hypergrad(
        inner,
        lambda y, x, batch: jnp.sum(y),
        solver=bx.inner.optax(optax.sgd(0.1), 3),
        hypergradient=method,
    )
    y, x = jnp.ones(2), jnp.asarray([0.5, 1.0])
    out = jax.jit(lambda x: fn(y, x, state=fn.init(y, model_state=model)))(x)
    mean = np.zeros(2)
    for _ in range(3):
        mean, y = 0.9 * mean + 0.1 * y, y - 0.2 * x * (y - mean)
    np.testing.assert_allclose(out.state.model["mean"], mean, rtol=1e-12)
    assert int(out.state.model["count"]) == 3
    # Products are taken with the state that the solve left.
    scale = 0.1 if "sama" in repr(method) else 1.0
    np.testing.assert_allclose(out.grad, -2 * scale * (np.asarray(y) - mean), rtol=1e-9)


@pytest.mark.parametrize("method", [one_step(), finite_difference(), sama()], ids=repr)
def test_first_order_solutions_are_pulled_back_and_not_pushed_forward(method):
    assert method.order == 1
    assert not method.sees_init
    form = PROBLEMS["ridge"]
    solver = bx.inner.optax(optax.sgd(0.1), 2)
    x = jnp.asarray(form.outer_params)

    def solution(x, objective=form.outer):
        fn = bx.value_and_hypergrad(form.inner, objective, solver=solver, hypergradient=method)
        return fn(form.inner_params, x, form.inner_batch, form.outer_batch)

    rows = jax.jit(jax.jacrev(lambda x: solution(x).inner_params))(x)
    for i in range(2):
        row = solution(x, lambda y, x, batch, i=i: y[i]).grad
        np.testing.assert_allclose(rows[i], row, rtol=1e-9, atol=1e-12)
    assert np.any(rows)
    assert np.all(np.isnan(jax.jit(jax.jacfwd(lambda x: solution(x).inner_params))(x)))


@pytest.mark.parametrize(
    "method",
    [one_step(), finite_difference(), sama(), sama(product="difference", nudge=True)],
    ids=repr,
)
def test_counters_and_no_retrace(method):
    traces = []

    def inner(y, x, batch):
        traces.append(None)
        return jnp.sum((y - x) ** 2)

    outer = lambda y, x, batch: jnp.sum(y * y)
    objective = bx.objective(inner)
    fn = bx.value_and_hypergrad(
        objective, outer, solver=bx.inner.optax(optax.sgd(0.1), 2), hypergradient=method
    )
    run = jax.jit(lambda y, x, state: fn(y, x, state=state))
    out = run(jnp.ones(2), jnp.zeros(2), fn.init(jnp.ones(2)))
    count = len(traces)
    out = run(out.inner_params, jnp.ones(2), out.state)
    assert len(traces) == count
    assert {"gradients", "hvps", "mixed_products"} <= set(out.info)


def test_numbers_are_leaves():
    for factory in (one_step, finite_difference, lambda radius: sama(radius=radius)):
        assert base.split(factory(0.1))[0] == base.split(factory(0.2))[0]


def test_settings_are_refused():
    with pytest.raises(ValueError, match="scale: got 0"):
        one_step(0)
    with pytest.raises(ValueError, match="radius: got -1"):
        finite_difference(radius=-1)
    with pytest.raises(TypeError, match="scale: got 'big'"):
        finite_difference("big")
    with pytest.raises(ValueError, match="product: got 'hvp'; expected 'exact' or 'difference'"):
        sama(product="hvp")
    with pytest.raises(TypeError, match="nudge: got 0.1"):
        sama(nudge=0.1)


def test_the_direct_term_alone():
    """The outer objective's own gradient at what the solver reached, statistics and all; what it
    does not read itself is refused, and so is a level."""
    solver = bx.inner.optax(optax.sgd(0.1), 3)

    def inner(y, x, batch, model_state):
        return jnp.mean((batch * y - x["a"]) ** 2), {"mean": jnp.mean(batch * y)}

    def outer(y, x, batch, model_state):
        value = jnp.sum(x["a"] * y**2) + model_state["mean"] * jnp.sum(jnp.exp(x["b"]))
        return value, model_state

    inner, outer = (bx.objective(fn, stateful=True) for fn in (inner, outer))
    y, x = jnp.ones(2), {"a": jnp.array([1.0, 3.0]), "b": jnp.array([0.5, 0.2])}
    batch, model = jnp.array([1.0, 2.0]), {"mean": jnp.zeros(())}
    fn = bx.value_and_hypergrad(
        inner, outer, solver=solver, hypergradient=bx.hypergradient.direct()
    )
    found = fn(y, x, batch, batch, state=fn.init(y, model_state=model))
    want = jax.grad(
        lambda x: (
            jnp.sum(x["a"] * found.inner_params**2)
            + found.state.model["mean"] * jnp.sum(jnp.exp(x["b"]))
        )
    )(x)
    close(found.grad, want, 1e-14)
    assert not warnings_in(int(found.info["warnings"])) and int(found.info["mixed_products"]) == 0
    plain = lambda y, x, batch: jnp.mean((batch * y - x["a"]) ** 2)
    above = lambda y, x, batch: jnp.sum(x["a"] * y**2)
    with pytest.raises(ValueError, match=r"hypergradient: got direct\(\).*outer_params\['b'\]"):
        bx.solve_bilevel(
            lambda y, x, batch: plain(y, x, batch) + jnp.sum(jnp.exp(x["b"]) * y**2),
            above, y, x, inner_data=batch, outer_data=batch, num_steps=2,
            algorithm=bx.algorithms.double_loop(
                solver, bx.hypergradient.direct(), optax.sgd(0.1)
            ),
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"Level 'y', hypergradient: got direct\(\).*stop_gradient"
    ):
        bx.Level("y", lambda p, b: 0.0, solver=solver, hypergradient=bx.hypergradient.direct())
    bounded = bx.value_and_hypergrad(
        lambda y, x, batch: jnp.sum((y - x) ** 2),
        lambda y, x, batch: jnp.sum(x * y),
        solver=bx.inner.qp(inequality=lambda y, x, batch: y - 1.0),
        hypergradient=bx.hypergradient.direct(),
    )
    found = bounded(jnp.zeros(1), jnp.full(1, 3.0))
    np.testing.assert_allclose(found.grad, [1.0], atol=1e-8)  # y at its bound
    assert not warnings_in(int(found.info["warnings"]))
    for reference, said in (("solver", "leaves out how the solver's steps"), ("dense", "constant")):
        report = bx.check_hypergradient(
            plain, above, y, {"a": x["a"]}, inner_batch=batch, outer_batch=batch,
            solver=solver, hypergradient=bx.hypergradient.direct(), reference=reference,
        )  # fmt: skip
        assert not report.ok and said in report.advice
