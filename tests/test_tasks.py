"""Batches of tasks: MAML against its gradient by hand, iMAML against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import linear

T, N = 4, 3
RNG = np.random.default_rng(8)


def network(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


def regression(params, outer, batch):
    return jnp.mean((network(params, batch[0]) - batch[1]) ** 2)


START = {"first": jnp.asarray(RNG.standard_normal((2, 3))), "second": jnp.asarray(RNG.standard_normal(3))}
SUPPORT, QUERY = ((jnp.asarray(RNG.standard_normal((T, 5, 2))), jnp.asarray(RNG.standard_normal((T, 5)))) for _ in range(2))


def maml(steps=3, rate=0.2, method=None):
    return bx.value_and_hypergrad(
        bx.tasks(regression, "sum"),
        bx.tasks(regression),
        solver=bx.inner.optax(optax.sgd(rate), steps),
        hypergradient=bx.hypergradient.unrolled() if method is None else method,
        inner_init=bx.task_copies(T),
    )


def test_maml_is_the_gradient_by_hand():
    def by_hand(start):
        losses = []
        for t in range(T):
            params = start
            for _ in range(3):
                gradient = jax.grad(regression)(params, None, (SUPPORT[0][t], SUPPORT[1][t]))
                params = jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient)
            losses.append(regression(params, None, (QUERY[0][t], QUERY[1][t])))
        return sum(losses) / T

    value, want = jax.jit(jax.value_and_grad(by_hand))(START)
    est = jax.jit(maml())(bx.task_copies(T)(START), START, SUPPORT, QUERY)
    np.testing.assert_allclose(est.value, value, rtol=1e-12)
    for leaf, answer in zip(jax.tree.leaves(est.grad), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(leaf, answer, rtol=1e-10, atol=1e-14)
        assert np.linalg.norm(answer) > 1e-3


def test_vmapped_estimates_average_to_it():
    one = bx.value_and_hypergrad(
        regression, regression, solver=bx.inner.optax(optax.sgd(0.2), 3), hypergradient=bx.hypergradient.unrolled(), inner_init=lambda x: x
    )
    each = jax.jit(jax.vmap(lambda support, query: one(START, START, support, query)))(SUPPORT, QUERY)
    together = jax.jit(maml())(bx.task_copies(T)(START), START, SUPPORT, QUERY)
    for leaf, whole in zip(jax.tree.leaves(each.grad), jax.tree.leaves(together.grad), strict=True):
        np.testing.assert_allclose(leaf.mean(axis=0), whole, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(each.value.mean(), together.value, rtol=1e-12)


A = np.stack([np.diag(RNG.uniform(0.5, 2, N)) + 0.1 for _ in range(T)])
B, C = RNG.standard_normal((2, T, N))
PULL = 0.7


def proximal(y, x, batch):
    difference = y - batch["b"]
    return jnp.sum(difference * (batch["A"] @ difference)) / 2 + PULL * jnp.sum((y - x) ** 2) / 2


def target(y, x, batch):
    return jnp.sum((y - batch["c"]) ** 2) / 2


def imaml_answer(x):
    grads = []
    for t in range(T):
        H = A[t] + PULL * np.eye(N)
        y = np.linalg.solve(H, A[t] @ B[t] + PULL * x)
        grads.append(PULL * np.linalg.solve(H, y - C[t]))
    return np.mean(grads, axis=0)


@pytest.mark.parametrize("stacked", [True, False], ids=["tasks", "vmap"])
def test_imaml_is_its_closed_form(stacked):
    x = np.array([0.2, -0.4, 1.0])
    train, held_out = {"A": jnp.asarray(A), "b": jnp.asarray(B)}, {"c": jnp.asarray(C)}
    settings = dict(solver=bx.inner.optax(optax.sgd(0.4), 200), hypergradient=bx.hypergradient.implicit(linear.cg(tol=1e-13)))
    if stacked:
        fn = bx.value_and_hypergrad(bx.tasks(proximal, "sum"), bx.tasks(target), **settings)
        grad = jax.jit(fn)(jnp.zeros((T, N)), jnp.asarray(x), train, held_out).grad
    else:
        fn = bx.value_and_hypergrad(proximal, target, **settings)
        grad = jax.jit(jax.vmap(lambda b, c: fn(jnp.zeros(N), jnp.asarray(x), b, c)))(train, held_out).grad.mean(axis=0)
    np.testing.assert_allclose(grad, imaml_answer(x), rtol=1e-9)


def test_training_an_initialisation():
    """A step further, the learned initialisation is better than the first one."""
    algorithm = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(0.2), 3), bx.hypergradient.unrolled(), optax.adam(0.05))
    solution = bx.solve_bilevel(
        bx.tasks(regression, "sum"), bx.tasks(regression), bx.task_copies(T)(START), START,
        inner_data=SUPPORT, outer_data=QUERY, algorithm=algorithm, inner_init=bx.task_copies(T), num_steps=15,
    )  # fmt: skip
    values = solution.history["value"]
    assert values[-1] < 0.8 * values[0]


def test_zero_gradient_trap_is_an_error_with_the_way_out():
    with pytest.raises(ValueError, match=r"^inner_init: got .*Try hypergradient.unrolled\(\), or put a proximal term"):
        maml(method=bx.hypergradient.implicit())


def test_keys_and_aux_are_each_tasks_own():
    noisy = bx.objective(lambda y, x, batch, *, key: (jax.random.normal(key) + 0 * jnp.sum(y), {"y": jnp.sum(y)}), has_aux=True, keyed=True)
    many = bx.tasks(noisy, "sum")
    from bilevax.base import Ctx

    value, (_, aux) = many(jnp.arange(4.0), jnp.zeros(()), Ctx(None, jax.random.key(0)))
    assert aux["y"].shape == (4,)
    np.testing.assert_allclose(value, sum(jax.random.normal(k) for k in jax.random.split(jax.random.key(0), 4)), rtol=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="^reduce: got 'max'"):
        bx.tasks(regression, "max")
    with pytest.raises(TypeError, match="^fn: got objective"):
        bx.tasks(bx.objective(regression, stateful=True))
    with pytest.raises(ValueError, match="^num_tasks: got 0"):
        bx.task_copies(0)
    with pytest.raises(ValueError, match="expected one common task axis in front"):
        maml()(bx.task_copies(T)(START), START, jax.tree.map(lambda a: a[:2], SUPPORT), QUERY)
