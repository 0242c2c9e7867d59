"""Batches of tasks: MAML against its gradient by hand, iMAML against its closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevax as bx
from bilevax import linear

T, N = 4, 3
RNG = np.random.default_rng(8)


def network(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


def regression(params, outer, batch):
    return jnp.mean((network(params, batch[0]) - batch[1]) ** 2)


START = {
    "first": jnp.asarray(RNG.standard_normal((2, 3))),
    "second": jnp.asarray(RNG.standard_normal(3)),
}
SUPPORT, QUERY = (
    (jnp.asarray(RNG.standard_normal((T, 5, 2))), jnp.asarray(RNG.standard_normal((T, 5))))
    for _ in range(2)
)


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
    chex.assert_trees_all_close(est.grad, want, rtol=1e-10, atol=1e-14)
    assert all(np.linalg.norm(leaf) > 1e-3 for leaf in jax.tree.leaves(want))


def adapted(w, task, rates, heads=False):
    for _ in range(3):
        gradient = jax.grad(regression)(w, None, (SUPPORT[0][task], SUPPORT[1][task]))
        moved = jax.tree.map(lambda p, r, g: p - r * g, w, rates, gradient)
        w = {"first": w["first"], "second": moved["second"]} if heads else moved
    return w


def asked(w, task):
    return regression(w, None, (QUERY[0][task], QUERY[1][task]))


RATES = {"first": jnp.full((2, 3), 0.2), "second": jnp.array([0.1, 0.2, 0.3])}
EQUAL = jax.tree.map(lambda a: jnp.full_like(a, 0.2), START)


def meta_sgd():
    """A learned rate for each parameter."""
    rates = lambda outer: optax.stateless(
        lambda g, w: jax.tree.map(lambda r, a: -r[None] * a, outer["rates"], g)
    )
    arguments = bx.tasks(regression, "sum"), bx.tasks(regression)
    start = lambda outer: bx.task_copies(T)(outer["start"])
    by_hand = lambda outer, task: asked(adapted(outer["start"], task, outer["rates"]), task)
    outer = {"start": START, "rates": RATES}
    return arguments, bx.inner.optax(rates, 3), bx.hypergradient.unrolled(), start, outer, by_hand


def anil():
    """The head alone adapts."""
    whole = lambda w, outer, batch: regression({**outer, **w}, outer, batch)
    start = lambda outer: bx.task_copies(T)({"second": outer["second"]})
    by_hand = lambda outer, task: asked(adapted(outer, task, EQUAL, heads=True), task)
    sgd, exact = bx.inner.optax(optax.sgd(0.2), 3), bx.hypergradient.unrolled()
    return (bx.tasks(whole, "sum"), bx.tasks(whole)), sgd, exact, start, START, by_hand


def first_order():
    """The query's gradient where adaptation has led."""
    stop = jax.lax.stop_gradient
    along = lambda w, outer, batch: regression(
        jax.tree.map(lambda a, b: stop(a - b) + b, w, outer), outer, batch
    )

    def by_hand(outer, task):
        moved = jax.tree.map(lambda a, b: a - b, adapted(outer, task, EQUAL), outer)
        return asked(jax.tree.map(lambda a, b: stop(a) + b, moved, outer), task)

    sgd, none = bx.inner.optax(optax.sgd(0.2), 3), bx.hypergradient.one_step()
    arguments = bx.tasks(regression, "sum"), bx.tasks(along)
    return arguments, sgd, none, bx.task_copies(T), START, by_hand


def reptile():
    """Towards where adaptation has led."""
    square = lambda w, outer: optax.tree.norm(optax.tree.sub(w, outer), squared=True)
    towards = lambda w, outer, batch: 0.5 * square(jax.lax.stop_gradient(w), outer)
    by_hand = lambda outer, task: (
        0.5 * square(jax.lax.stop_gradient(adapted(outer, task, EQUAL)), outer)
    )
    sgd, none = bx.inner.optax(optax.sgd(0.2), 3), bx.hypergradient.one_step()
    arguments = bx.tasks(regression, "sum"), bx.tasks(towards)
    return arguments, sgd, none, bx.task_copies(T), START, by_hand


@pytest.mark.parametrize("form", [meta_sgd, anil, first_order, reptile])
def test_forms_of_maml_are_the_gradient_by_hand(form):
    arguments, solver, method, start, outer, by_hand = form()
    fn = bx.value_and_hypergrad(*arguments, solver=solver, hypergradient=method, inner_init=start)
    est = jax.jit(fn)(start(outer), outer, SUPPORT, QUERY)
    mean = lambda outer: sum(by_hand(outer, task) for task in range(T)) / T
    value, want = jax.jit(jax.value_and_grad(mean))(outer)
    np.testing.assert_allclose(est.value, value, rtol=1e-12)
    chex.assert_trees_all_close(est.grad, want, rtol=1e-10, atol=1e-14)


def test_every_step_of_every_task_is_seen():
    """MAML++ with the objective of one task: its own steps, and its own batch."""
    weights = jnp.array([0.2, 0.3, 0.5])

    def each_step(path, outer, batch):
        return jnp.sum(weights * jax.vmap(lambda w: regression(w, outer, batch))(path))

    def by_hand(start):
        total = 0.0
        for t in range(T):
            params = start
            for weight in weights:
                gradient = jax.grad(regression)(params, None, (SUPPORT[0][t], SUPPORT[1][t]))
                params = jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient)
                total += weight * regression(params, None, (QUERY[0][t], QUERY[1][t]))
        return total / T

    fn = bx.value_and_hypergrad(
        bx.tasks(regression, "sum"),
        bx.tasks(bx.objective(each_step, trajectory=True)),
        solver=bx.inner.optax(optax.sgd(0.2), 3),
        hypergradient=bx.hypergradient.unrolled(),
        inner_init=bx.task_copies(T),
    )
    est = jax.jit(fn)(bx.task_copies(T)(START), START, SUPPORT, QUERY)
    value, want = jax.jit(jax.value_and_grad(by_hand))(START)
    np.testing.assert_allclose(est.value, value, rtol=1e-12)
    chex.assert_trees_all_close(est.grad, want, rtol=1e-10, atol=1e-14)


def test_vmapped_estimates_average_to_it():
    one = bx.value_and_hypergrad(
        regression,
        regression,
        solver=bx.inner.optax(optax.sgd(0.2), 3),
        hypergradient=bx.hypergradient.unrolled(),
        inner_init=lambda x: x,
    )
    each = jax.jit(jax.vmap(lambda support, query: one(START, START, support, query)))(
        SUPPORT, QUERY
    )
    together = jax.jit(maml())(bx.task_copies(T)(START), START, SUPPORT, QUERY)
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), each.grad)
    chex.assert_trees_all_close(mean, together.grad, rtol=1e-11, atol=1e-14)
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
    settings = dict(
        solver=bx.inner.optax(optax.sgd(0.4), 200),
        hypergradient=bx.hypergradient.implicit(linear.cg(tol=1e-13)),
    )
    if stacked:
        fn = bx.value_and_hypergrad(bx.tasks(proximal, "sum"), bx.tasks(target), **settings)
        grad = jax.jit(fn)(jnp.zeros((T, N)), jnp.asarray(x), train, held_out).grad
    else:
        fn = bx.value_and_hypergrad(proximal, target, **settings)
        grad = jax.jit(jax.vmap(lambda b, c: fn(jnp.zeros(N), jnp.asarray(x), b, c)))(
            train, held_out
        ).grad.mean(axis=0)
    np.testing.assert_allclose(grad, imaml_answer(x), rtol=1e-9)


def test_training_an_initialisation():
    """A step further, the learned initialisation is better than the first one."""
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.2), 3), bx.hypergradient.unrolled(), optax.adam(0.05)
    )
    solution = bx.solve_bilevel(
        bx.tasks(regression, "sum"), bx.tasks(regression), bx.task_copies(T)(START), START,
        inner_data=SUPPORT, outer_data=QUERY, algorithm=algorithm, inner_init=bx.task_copies(T),
        num_steps=15,
    )  # fmt: skip
    values = solution.history["value"]
    assert values[-1] < 0.8 * values[0]


def test_zero_gradient_trap_is_an_error_with_the_way_out():
    fn = maml(method=bx.hypergradient.implicit())
    with pytest.raises(
        ValueError,
        match=r"^inner_init: the start depends on outer_params.*Try hypergradient.unrolled\(\), or put a proximal term",
    ):
        fn(bx.task_copies(T)(START), START, SUPPORT, QUERY)


def test_keys_and_aux_are_each_tasks_own():
    noisy = bx.objective(
        lambda y, x, batch, *, key: (jax.random.normal(key) + 0 * jnp.sum(y), {"y": jnp.sum(y)}),
        has_aux=True,
        keyed=True,
    )
    many = bx.tasks(noisy, "sum")
    from bilevax.base import Ctx

    value, (_, aux) = many(jnp.arange(4.0), jnp.zeros(()), Ctx(None, jax.random.key(0)))
    assert aux["y"].shape == (4,)
    np.testing.assert_allclose(
        value, sum(jax.random.normal(k) for k in jax.random.split(jax.random.key(0), 4)), rtol=1e-12
    )


def test_refusals():
    with pytest.raises(ValueError, match="^reduce: got 'max'"):
        bx.tasks(regression, "max")
    with pytest.raises(ValueError, match="^num_tasks: got 0"):
        bx.task_copies(0)
    with pytest.raises(ValueError, match="expected one common task axis in front"):
        maml()(bx.task_copies(T)(START), START, jax.tree.map(lambda a: a[:2], SUPPORT), QUERY)


# ---- networks with statistics


@pytest.fixture
def lenient():
    """Flax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Net(nnx.Module):
    def __init__(self, rngs, running):
        self.a = nnx.Linear(4, 5, rngs=rngs, param_dtype=jnp.float64)
        self.n = nnx.BatchNorm(
            5, momentum=0.5, use_running_average=running, rngs=rngs, param_dtype=jnp.float64
        )
        self.h = nnx.Linear(5, 1, rngs=rngs, param_dtype=jnp.float64)
        self.unit = nnx.Variable(jnp.full(1, 0.5))  # a buffer that nothing moves

    def __call__(self, x):
        return self.unit[...] * self.h(nnx.relu(self.n(self.a(x))))


XT, YT = (
    jax.random.normal(jax.random.key(0), (3, 6, 4)),
    jax.random.normal(jax.random.key(1), (3, 6, 1)),
)


def fit(model, meta, batch):
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


@pytest.mark.turns
@pytest.mark.parametrize("transductive", [True, False])
def test_networks_with_batchnorm_as_tasks(transductive, lenient):
    """Batch statistics at both levels, or running ones of each task's own in the outer loss:
    against an unroll by hand."""
    model = Net(nnx.Rngs(0), False)
    model.n.mean, model.n.var = (
        nnx.BatchStat(v[...].astype(jnp.float64)) for v in (model.n.mean, model.n.var)
    )
    net = bx.nn.from_nnx(model)
    graphdef, start, rest = nnx.split(model, nnx.Param, ...)

    def by_hand(meta):
        def task(x, y):
            params, state = meta, rest

            def loss(params, state):
                model = nnx.merge(graphdef, params, state, copy=True)
                value = fit(model, None, (x, y))
                mean, var = jnp.mean(model.a(x), 0), jnp.var(model.a(x), 0)
                moved = jax.tree.map(
                    lambda old, new: 0.5 * old + 0.5 * new,
                    (state["n"]["mean"][...], state["n"]["var"][...]),
                    (mean, var),
                )
                return value, moved

            for _ in range(5):
                grads, (mean, var) = jax.grad(loss, has_aux=True)(params, state)
                params = jax.tree.map(lambda a, g: a - 0.1 * g, params, grads)
                state = jax.tree.map(lambda a: a, state)
                state["n"]["mean"][...], state["n"]["var"][...] = mean, var
            model = nnx.merge(graphdef, params, state, copy=True)
            if not transductive:
                model.eval()
            return fit(model, None, (x, y + 1))

        return jnp.mean(jnp.stack([task(XT[i], YT[i]) for i in range(3)]))

    inner = bx.tasks(bx.nn.objective(fit, inner=net), "sum")
    outer = bx.tasks(bx.nn.objective(fit, inner=net, train=transductive))
    fn = bx.value_and_hypergrad(
        inner, outer, solver=bx.inner.optax(optax.sgd(0.1), 5),
        hypergradient=bx.hypergradient.unrolled(),
        inner_init=bx.task_copies(3, {"inner": net.state}),
    )  # fmt: skip
    copies = bx.task_copies(3)
    state = fn.init(copies(net.params), model_state=copies({"inner": net.state}))
    out = jax.jit(fn)(copies(net.params), net.params, (XT, YT), (XT, YT + 1), state=state)
    value, grad = jax.jit(jax.value_and_grad(by_hand))(start)
    np.testing.assert_allclose(out.value, value, rtol=1e-10)
    chex.assert_trees_all_close(out.grad, grad, rtol=1e-8, atol=1e-12)


def test_a_model_state_without_a_task_axis_is_named(lenient):
    net = bx.nn.from_nnx(Net(nnx.Rngs(0), False))
    objective = bx.tasks(bx.nn.objective(fit, inner=net))
    from bilevax.base import Ctx

    with pytest.raises(ValueError, match="a model state of .*bx.task_copies"):
        objective(bx.task_copies(3)(net.params), None, Ctx((XT, YT), None, {"inner": net.state}))
