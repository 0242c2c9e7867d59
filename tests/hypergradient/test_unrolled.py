"""Unrolled and forward mode: closed forms, hand loops, all checkpoint modes alike, model state,
keys, integers, second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.hypergradient import forward, unrolled
from bilevax.hypergradient._mixed_mode import mixed
from bilevax.hypergradient.unrolled import CHECKPOINTS
from tests import problems
from tests.problems import PROBLEMS, QUADRATICS, flatten
from tests.selection import quick

modes = pytest.mark.parametrize("checkpoint", CHECKPOINTS)
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


def unroll_by_hand(inner, outer, opt, steps):
    """The outer value after a Python loop of optax steps: nothing of the library in it."""

    def value(x, y, inner_batch, outer_batch):
        state = opt.init(y)
        for _ in range(steps):
            grads = jax.grad(inner)(y, x, inner_batch)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = opt.update(grads, state, y)
            y = jax.tree.map(lambda a, u: a + u, y, updates)
        return outer(y, x, outer_batch)

    return value


# ---- against closed forms


@pytest.mark.parametrize("name", quick(QUADRATICS, ["quadratic_tree"]))
@modes
def test_unrolled_closed_form(name, checkpoint):
    form = PROBLEMS[name]
    step, T = 0.4, 7
    out = estimate(form, bx.inner.optax(optax.sgd(step), T), unrolled(checkpoint=checkpoint))
    closed = problems.unrolled_quadratic(form, step, T)
    close(out.inner_params, closed.inner_params, 1e-12)
    close(out.grad, closed.hypergradient, 1e-12)
    assert int(out.info["hvps"]) == int(out.info["mixed_products"]) == T


@pytest.mark.parametrize("last", quick([1, 3], [3]))
@modes
def test_truncated_closed_form(checkpoint, last):
    form, step, T = PROBLEMS[QUADRATICS[0]], 0.4, 7
    out = estimate(form, bx.inner.optax(optax.sgd(step), T), unrolled(last, checkpoint=checkpoint))
    close(out.grad, problems.unrolled_quadratic(form, step, T, last).hypergradient, 1e-12)
    assert int(out.info["hvps"]) == last


@quadratics
def test_forward_closed_form(form):
    step, T = 0.4, 7
    out = estimate(form, bx.inner.optax(optax.sgd(step), T), forward())
    close(out.grad, problems.unrolled_quadratic(form, step, T).hypergradient, 1e-12)
    assert int(out.info["hvps"]) == T * flatten(form.outer_params).size


@modes
def test_cotangent_of_the_initial_point(checkpoint):
    """MAML: the outer parameters are the initial point, and the derivative is the closed form's
    initial cotangent."""
    form, step, T = PROBLEMS[QUADRATICS[0]], 0.4, 5
    fixed = jnp.asarray(form.outer_params)
    fn = bx.value_and_hypergrad(
        lambda y, x, batch: form.inner(y, fixed, batch),
        lambda y, x, batch: form.outer(y, fixed, batch),
        solver=bx.inner.optax(optax.sgd(step), T),
        hypergradient=unrolled(checkpoint=checkpoint),
        inner_init=lambda x: x,
    )
    out = jax.jit(fn)(form.inner_params, form.inner_params, form.inner_batch, form.outer_batch)
    close(out.grad, problems.unrolled_quadratic(form, step, T).init_cotangent, 1e-12)


# ---- against hand loops, through optax

OPTIMIZERS = {
    "adam_schedule": lambda: optax.adam(optax.exponential_decay(0.05, 2, 0.8)),
    "nesterov": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "clip_adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(optax.cosine_decay_schedule(0.05, 8), weight_decay=0.1),
    ),
}


@pytest.mark.turns
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_grad_of_a_hand_loop(name):
    form, opt, steps = PROBLEMS["ridge"], OPTIMIZERS[name](), 6
    by_hand = jax.jit(jax.value_and_grad(unroll_by_hand(form.inner, form.outer, opt, steps)))
    value, grad = by_hand(
        jnp.asarray(form.outer_params), form.inner_params, form.inner_batch, form.outer_batch
    )
    for method in [unrolled(checkpoint=checkpoint) for checkpoint in CHECKPOINTS] + [forward()]:
        out = estimate(form, bx.inner.optax(opt, steps), method)
        np.testing.assert_allclose(out.value, value, rtol=1e-12)
        close(out.grad, grad, 1e-12)


@pytest.mark.turns
@pytest.mark.parametrize("name", quick(PROBLEMS, ["quadratic_tree", "logistic_penalties", "cosh"]))
def test_modes_equal_each_other(name):
    form = PROBLEMS[name]
    solver = bx.inner.optax(optax.sgd(0.5 / form.smoothness.largest, momentum=0.5), 5)
    grads = {
        checkpoint: estimate(form, solver, unrolled(checkpoint=checkpoint)).grad
        for checkpoint in CHECKPOINTS
    }
    for grad in grads.values():
        close(grad, grads["none"], 1e-12)
    close(estimate(form, solver, forward()).grad, grads["none"], 1e-12)


@pytest.mark.parametrize(
    "method", [unrolled(), unrolled(checkpoint="none"), forward()], ids=["mixed", "none", "forward"]
)
def test_adam_at_inputs_that_no_data_reaches(method):
    """The second coordinate's gradient is exactly zero at every step, where Adam has no derivative:
    a failure, and ``eps_root`` is the way out."""
    inner, outer = (
        (lambda y, x, batch: jnp.sum((batch * y - x) ** 2)),
        (lambda y, x, batch: jnp.sum((y - 0.3) ** 2)),
    )
    y, x, batch, alive = (
        jnp.asarray([0.1, 0.2, 0.3]),
        jnp.asarray([0.5, 0.0, -0.2]),
        jnp.asarray([2.0, 0.0, 2.0]),
        jnp.asarray([True, False, True]),
    )
    outs = {}
    for eps_root in (0.0, 1e-12):
        solver = bx.inner.optax(optax.adam(0.1, eps_root=eps_root), 4)
        fn = jax.jit(bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method))
        outs[eps_root] = fn(y, x, batch)
    assert int(outs[0.0].info["code"]) == bx.RESULTS.hypergradient_nonfinite
    assert int(outs[1e-12].info["code"]) == bx.RESULTS.success
    close(outs[1e-12].grad[alive], fn(y[alive], x[alive], batch[alive]).grad, 1e-12)
    assert float(outs[1e-12].grad[1]) == 0.0 and np.linalg.norm(outs[1e-12].grad) > 1e-6


@pytest.mark.turns
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_every_number_of_steps(steps):
    """√K segments with and without a remainder, and no loop at all for one step."""
    form = PROBLEMS["weighted_least_squares"]
    solver = bx.inner.optax(optax.sgd(0.1), steps)
    reference = estimate(form, solver, unrolled(checkpoint="none"))
    for checkpoint in ("mixed", "sqrt"):
        out = estimate(form, solver, unrolled(checkpoint=checkpoint))
        close(out.grad, reference.grad, 1e-12)
        np.testing.assert_allclose(
            out.info["inner_value"], reference.info["inner_value"], rtol=1e-12
        )


def test_optimizer_that_reads_the_value():
    """Polyak's step is a function of the objective's value, whose cotangent the rule has to pull as
    well."""
    form, steps = PROBLEMS["ridge"], 4
    solver = bx.inner.optax(optax.polyak_sgd(max_learning_rate=0.05, f_min=0.0), steps)
    grads = [
        estimate(form, solver, method).grad
        for method in (unrolled(checkpoint="none"), unrolled(), forward())
    ]
    close(grads[1], grads[0], 1e-12)
    close(grads[2], grads[0], 1e-12)


# ---- what an objective may be


def running_mean(y, x, batch, model, *, key):
    """Reads its state, moves it, draws noise, and has integers and aux: everything at once."""
    noise = jax.random.normal(key, y.shape, y.dtype)
    center = 0.9 * model["mean"] + 0.1 * (y + jnp.tanh(x))
    rows = batch["rows"][batch["index"]]
    value = jnp.mean((rows @ (y - 0.5 * center) - 1.0) ** 2) + jnp.sum(
        jnp.exp(x) * jnp.tanh(y + 0.1 * noise) ** 2
    )
    return value, ({"mean": center, "count": model["count"] + 1}, {"norm": jnp.sum(y * y)})


@pytest.mark.turns
def test_stateful_keyed_integer_objective_equals_a_hand_loop():
    rng, steps = np.random.default_rng(0), 5
    y0, x0 = jnp.asarray(rng.standard_normal(3)), jnp.asarray(0.1 * rng.standard_normal(3))
    batch = {
        "rows": jnp.asarray(rng.standard_normal((4, 3))),
        "index": jnp.asarray([0, 2, 3], jnp.int32),
    }
    model = {"mean": jnp.ones(3), "count": jnp.int32(0)}
    inner = bx.objective(running_mean, has_aux=True, stateful=True, keyed=True)
    outer = lambda y, x, batch: jnp.sum((y - 0.3) ** 2) + jnp.sum(x * y)
    opt, key = optax.adam(0.1), jax.random.key(3)

    @jax.jit
    def by_hand(x):
        y, state, moved = y0, opt.init(y0), model
        inner_key = jax.random.split(key, 3)[0]
        for i in range(steps):
            step_key = jax.random.fold_in(inner_key, i)
            grads, (moved, _) = jax.grad(running_mean, has_aux=True)(
                y, x, batch, moved, key=step_key
            )
            with jax.numpy_dtype_promotion("standard"):
                updates, state = opt.update(grads, state, y)
            y = y + updates
        return outer(y, x, None), (y, moved)

    (value, (y, moved)), grad = jax.value_and_grad(by_hand, has_aux=True)(x0)
    for method in [unrolled(checkpoint=checkpoint) for checkpoint in CHECKPOINTS] + [forward()]:
        fn = bx.value_and_hypergrad(
            inner, outer, solver=bx.inner.optax(opt, steps), hypergradient=method
        )
        out = jax.jit(
            lambda x, fn=fn: fn(y0, x, batch, None, state=fn.init(y0, model_state=model), key=key)
        )(x0)
        np.testing.assert_allclose(out.value, value, rtol=1e-12)
        close(out.inner_params, y, 1e-12)
        close(out.grad, grad, 1e-12)
        # The state moved on the real steps and on nothing else.
        close(out.state.model["mean"], moved["mean"], 1e-12)
        assert int(out.state.model["count"]) == steps


def test_objective_that_captures_traced_values():
    """What an objective closes over is an operand of the rule: it may be traced, and differentiated
    from outside."""
    form = PROBLEMS["ridge"]

    def value(scale, checkpoint):
        fn = bx.value_and_hypergrad(
            lambda y, x, batch: scale * form.inner(y, x, batch) + jnp.sum(jnp.cos(scale * y)),
            form.outer,
            solver=bx.inner.optax(optax.sgd(0.05), 4),
            hypergradient=unrolled(checkpoint=checkpoint),
        )
        out = fn(form.inner_params, form.outer_params, form.inner_batch, form.outer_batch)
        return out.value, out.grad

    for derivative in (jax.jacrev, jax.jacfwd):
        got = [
            jax.jit(derivative(lambda s, c=c: value(s, c)))(jnp.asarray(1.2))
            for c in ("none", "mixed")
        ]
        close(got[1], got[0], 1e-12)
        assert np.linalg.norm(flatten(got[0])) > 1e-3


def test_mixed_objective_is_the_objective():
    """Value, all first derivatives and aux's own are those of the plain objective, whoever asks."""
    inner = bx.objective(running_mean, has_aux=True, stateful=True, keyed=True)
    rng = np.random.default_rng(1)
    y, x = jnp.asarray(rng.standard_normal(3)), jnp.asarray(rng.standard_normal(3))
    batch = {
        "rows": jnp.asarray(rng.standard_normal((4, 3))),
        "index": jnp.asarray([1, 1, 3], jnp.int32),
    }
    model = {"mean": jnp.ones(3), "count": jnp.int32(0)}

    def combined(objective):
        def total(y, x, mean):
            value, (moved, aux) = objective(
                y, x, bx.base.Ctx(batch, jax.random.key(0), model | {"mean": mean})
            )
            return value + jnp.sum(jnp.sin(moved["mean"])) + aux["norm"] ** 2

        def gradient_norm(y, x, mean):
            ctx = bx.base.Ctx(batch, jax.random.key(0), model | {"mean": mean})
            (value, (moved, aux)), grads = jax.value_and_grad(objective, has_aux=True)(y, x, ctx)
            return jnp.sum(grads**3) + value**2 + jnp.sum(moved["mean"] ** 2) + aux["norm"]

        return jax.jit(
            lambda *args: [jax.grad(fn, (0, 1, 2))(*args) for fn in (total, gradient_norm)]
        )

    args = (y, x, model["mean"])
    close(combined(mixed(inner))(*args), combined(inner)(*args), 1e-12)


# ---- second derivatives


@pytest.mark.turns
@modes
def test_second_derivatives(checkpoint):
    form = PROBLEMS["logistic"] if "logistic" in PROBLEMS else PROBLEMS["ridge"]
    opt, steps = optax.adam(0.05), 4
    x = jnp.asarray(form.outer_params)
    by_hand = unroll_by_hand(form.inner, form.outer, opt, steps)
    expected = jax.jit(
        jax.hessian(lambda x: by_hand(x, form.inner_params, form.inner_batch, form.outer_batch))
    )(x)
    method = unrolled(checkpoint=checkpoint)
    assert method.order == 2
    fn = bx.value_and_hypergrad(
        form.inner, form.outer, solver=bx.inner.optax(opt, steps), hypergradient=method
    )

    def estimate(x):
        return fn(form.inner_params, x, form.inner_batch, form.outer_batch)

    for derivative in (jax.jacfwd, jax.jacrev):
        close(jax.jit(derivative(lambda x: estimate(x).grad))(x), expected, 1e-10)
    close(
        jax.jit(jax.hessian(lambda x: estimate(x).value))(x), expected, 1e-10
    )  # through the solution, not through the pullback


def test_forward_mode_of_the_rule_itself_raises():
    objective = mixed(bx.objective(lambda y, x, batch: jnp.sum(jnp.cosh(y) * x)))
    gradient = lambda x: jax.grad(objective, has_aux=True)(jnp.ones(2), x, bx.base.Ctx())[0]
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(gradient, (jnp.ones(2),), (jnp.ones(2),))


# ---- forward mode of its own


def test_forward_mode_through_a_while_loop():
    """A solve to a tolerance has no reverse mode; forwards it converges to the exact
    hypergradient."""
    form = PROBLEMS["ridge"]
    out = estimate(form, bx.inner.gradient_descent(tol=1e-13, maxiter=20_000), forward())
    close(out.grad, form.hypergradient(form.outer_params), 1e-7)


def test_forward_refuses_many_outer_parameters():
    fn = bx.value_and_hypergrad(
        lambda y, x, batch: jnp.sum((y - jnp.sum(x)) ** 2),
        lambda y, x, batch: jnp.sum(y),
        solver=bx.inner.optax(optax.sgd(0.1), 2),
        hypergradient=forward(),
    )
    with pytest.raises(ValueError, match="1100 numbers.*unrolled"):
        fn(jnp.zeros(2), jnp.zeros(1100))


# ---- shapes, dtypes, tracing


@modes
def test_float32_outer_tree_and_vmap(checkpoint):
    form = PROBLEMS["distillation"]
    single = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32),
        (form.inner_params, form.outer_params, form.inner_batch, form.outer_batch),
    )
    fn = bx.value_and_hypergrad(
        form.inner,
        form.outer,
        solver=bx.inner.optax(optax.sgd(0.1), 4),
        hypergradient=unrolled(checkpoint=checkpoint),
    )
    tasks = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), single[1])
    out = jax.jit(jax.vmap(lambda x: fn(single[0], x, *single[2:])))(tasks)
    assert {leaf.dtype for leaf in jax.tree.leaves(out.grad)} == {jnp.dtype(jnp.float32)}
    alone = jax.jit(fn)(single[0], jax.tree.map(lambda a: a[1], tasks), *single[2:])
    close(jax.tree.map(lambda a: a[1], out.grad), alone.grad, 1e-5)


def test_settings_are_refused():
    for last in (0, -1, 2.0, True):
        with pytest.raises((TypeError, ValueError), match="last: got"):
            unrolled(last)
    with pytest.raises(
        ValueError, match="checkpoint: got 'all'; expected 'mixed', 'none', 'step' or 'sqrt'"
    ):
        unrolled(checkpoint="all")
    form = PROBLEMS["ridge"]
    with pytest.raises(ValueError, match="has no reverse mode"):
        estimate(form, bx.inner.lbfgs(), unrolled())
    with pytest.raises(ValueError, match="at most the solver's 3 steps"):
        estimate(form, bx.inner.optax(optax.sgd(0.1), 3), unrolled(4))
