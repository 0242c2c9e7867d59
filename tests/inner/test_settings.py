"""Inner optimizer settings that are learned: exact under methods that differentiate the steps,
refused by name elsewhere."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import hypergradient as H
from bilevax.base import InnerSolver, InnerState

X, Y = jax.random.normal(jax.random.key(1), (8, 4)), jax.random.normal(jax.random.key(2), (8,))
W = 0.1 * jnp.arange(1.0, 5.0)


def loss(w, x, batch):
    return jnp.mean((jnp.tanh(X @ w) - Y + batch) ** 2)


def warm(rate, count):
    return rate * (1 + count) / 3


SETTINGS = {
    "rate": (lambda o: optax.sgd(o["rate"]), {"rate": 0.1}),
    "momentum": (lambda o: optax.sgd(0.2, momentum=o["m"], nesterov=True), {"m": 0.7}),
    "meta_sgd": (
        lambda o: optax.chain(scale_by(o["rates"]), optax.scale(-1.0)),
        {"rates": 0.1 * jnp.arange(1.0, 5.0)},
    ),
    "adam": (
        lambda o: optax.adam(jnp.exp(o["lr"]), b1=o["b1"], eps_root=1e-8),
        {"lr": -2.0, "b1": 0.8},
    ),
    "decay": (lambda o: optax.adamw(0.1, weight_decay=o["decay"], eps_root=1e-8), {"decay": 0.3}),
    "schedule": (
        lambda o: optax.sgd(lambda count: o["rates"][count]),
        {"rates": jnp.array([0.3, 0.2, 0.1, 0.05])},
    ),
    "injected": (
        lambda o: optax.inject_hyperparams(optax.sgd)(learning_rate=o["rate"]),
        {"rate": 0.1},
    ),
    "clip": (
        lambda o: optax.chain(optax.clip_by_global_norm(o["most"]), optax.sgd(0.3)),
        {"most": 0.2},
    ),
}


def scale_by(rates):
    return optax.GradientTransformation(
        lambda p: (), lambda g, s, p=None: (jax.tree.map(lambda a: rates * a, g), s)
    )


def hand(make, outer, steps, w=W):
    opt = make(outer)
    state = opt.init(w)
    for _ in range(steps):
        updates, state = opt.update(jax.grad(loss)(w, outer, 0.0), state, w)
        w = w + updates
    return loss(w, outer, 0.3)


@pytest.mark.turns
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", ["unrolled", "none", "forward"])
def test_learned_settings_equal_the_loop_by_hand(name, method):
    make, outer = SETTINGS[name]
    outer = jax.tree.map(jnp.asarray, outer)
    piece = {
        "unrolled": H.unrolled(),
        "none": H.unrolled(checkpoint="none"),
        "forward": H.forward(),
    }[method]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value, want = jax.value_and_grad(lambda o: hand(make, o, 4))(outer)
        fn = bx.value_and_hypergrad(loss, loss, solver=bx.inner.optax(make, 4), hypergradient=piece)
        out = fn(W, outer, 0.0, 0.3)
    assert np.allclose(out.value, value, rtol=1e-12)
    chex.assert_trees_all_close(out.grad, want, rtol=1e-8, atol=1e-12)


def momentum(outer):
    return optax.sgd(outer["rate"], momentum=0.9)


def test_a_run_carries_the_state_and_reads_the_current_settings():
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(momentum, 2), H.unrolled(), optax.sgd(0.01)
    )
    outer = {"rate": jnp.asarray(0.1)}
    run = bx.solve_bilevel(
        loss, lambda w, x, b: loss(w, x, b), W, outer, inner_data=bx.data.full(jnp.asarray(0.0)),
        outer_data=bx.data.full(jnp.asarray(0.3)), algorithm=algorithm, num_steps=3,
    )  # fmt: skip

    def steps(w, opt_state, rate):
        for _ in range(2):
            updates, opt_state = momentum({"rate": rate}).update(
                jax.grad(loss)(w, None, 0.0), opt_state, w
            )
            w = w + updates
        return loss(w, None, 0.3), (w, opt_state)

    w, rate, want = W, jnp.asarray(0.1), []
    state = momentum({"rate": rate}).init(W)
    for _ in range(3):
        (value, (w, state)), grad = jax.value_and_grad(steps, 2, has_aux=True)(w, state, rate)
        rate = rate - 0.01 * grad
        want.append(value)
    assert np.allclose(run.history["value"], want, rtol=1e-10)


@pytest.mark.parametrize("name", ["implicit", "one_step", "finite_difference", "sama"])
def test_methods_that_cannot_see_settings_refuse_them(name):
    make, outer = SETTINGS["rate"]
    fn = bx.value_and_hypergrad(
        loss, loss, solver=bx.inner.optax(make, 3), hypergradient=getattr(H, name)()
    )
    with pytest.raises(ValueError, match=r"solver: its settings depend on outer_params\['rate'\]"):
        fn(W, jax.tree.map(jnp.asarray, outer), 0.0, 0.3)


def test_a_function_that_reads_nothing_is_as_good_as_its_optimizer():
    penalised = lambda w, x, b: loss(w, x, b) + x * jnp.sum(w**2)
    run = lambda opt: bx.value_and_hypergrad(
        penalised, loss, solver=bx.inner.optax(opt, 3), hypergradient=H.sama()
    )(W, jnp.asarray(0.1), 0.0, 0.3)
    assert run(lambda outer: optax.adam(0.1)).grad == run(optax.adam(0.1)).grad


def test_zeroth_order_sees_settings():
    make, outer = SETTINGS["rate"]
    outer = jax.tree.map(jnp.asarray, outer)
    fn = bx.value_and_hypergrad(
        loss,
        loss,
        solver=bx.inner.optax(make, 3),
        hypergradient=H.zeroth_order(samples=64, scale=1e-4),
    )
    want = jax.grad(lambda o: hand(make, o, 3))(outer)["rate"]
    found = jax.vmap(lambda key: fn(W, outer, 0.0, 0.3, key=key).grad["rate"])(
        jax.random.split(jax.random.key(0), 8)
    )
    assert abs(jnp.mean(found) - want) < 0.3 * abs(want)


def step(objective, state, outer, ctx):
    (value, (model, _)), grads = jax.value_and_grad(objective, has_aux=True)(
        state.params, outer, ctx
    )
    params = jax.tree.map(lambda p, g: p - jnp.exp(outer["lr"]) * g, state.params, grads)
    return InnerState(params, state.opt, model), {"value": value}


def test_a_solver_of_one_s_own_that_reads_settings():
    solver, outer = InnerSolver(lambda params: (), step, 3), {"lr": jnp.asarray(-2.0)}
    out = bx.value_and_hypergrad(loss, loss, solver=solver, hypergradient=H.unrolled())(
        W, outer, 0.0, 0.3
    )
    want = jax.grad(lambda o: hand(lambda o: optax.sgd(jnp.exp(o["lr"])), o, 3))(outer)["lr"]
    assert np.allclose(out.grad["lr"], want, rtol=1e-10)
    with pytest.raises(ValueError, match=r"solver: its settings depend on outer_params\['lr'\]"):
        bx.value_and_hypergrad(loss, loss, solver=solver, hypergradient=H.implicit())(
            W, outer, 0.0, 0.3
        )


def test_refusals():
    with pytest.raises(TypeError, match="opt: got the function adam; expected what it returns"):
        bx.inner.optax(optax.adam, 3)
    with pytest.raises(TypeError, match="opt: the function of the outer parameters returned float"):
        bx.value_and_hypergrad(
            loss, loss, solver=bx.inner.optax(lambda o: 0.1, 3), hypergradient=H.unrolled()
        )(W, W, 0.0, 0.3)
    fn = bx.value_and_hypergrad(
        loss, loss, solver=bx.inner.optax(momentum, 3), hypergradient=H.unrolled()
    )
    with pytest.raises(
        TypeError, match="outer_params: got None with a solver whose settings depend on them"
    ):
        fn.init(W)
