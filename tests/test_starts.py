"""Where solves start: a function of the outer parameters, a draw, another state; and objectives of
all inner steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import hypergradient as H

TASK = jnp.full(2, 0.3)


def proximal(w, meta, task):
    return jnp.sum((jnp.cos(w) - task) ** 2) + 0.5 * jnp.sum((w - meta) ** 2)


def query(w, meta, task):
    return jnp.sum((jnp.cos(w) - task) ** 2)


STARTS = {
    "meta": lambda meta: meta,
    "stopped": lambda meta: jax.lax.stop_gradient(meta),
    "constant": lambda meta: jnp.zeros(2),
}


@pytest.mark.turns
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize(
    "method", [H.implicit(), H.one_step(0.1), H.sama()], ids=["implicit", "one_step", "sama"]
)
def test_methods_that_see_no_start_may_have_one(name, method):
    """iMAML: each solve starts at the meta-parameters and the proximal term carries the gradient.
    Against a loop of one's own."""
    start, solver = STARTS[name], bx.inner.optax(optax.sgd(0.2), 20)
    fn = jax.jit(bx.value_and_hypergrad(proximal, query, solver=solver, hypergradient=method))
    x, want = jnp.full(2, 0.5), []
    for _ in range(3):
        out = fn(start(x), x, TASK, TASK)
        want.append(float(out.value))
        x = x - 0.1 * out.grad
    algorithm = bx.algorithms.double_loop(solver, method, optax.sgd(0.1))
    run = bx.solve_bilevel(
        proximal, query, jnp.zeros(2), jnp.full(2, 0.5), inner_data=bx.data.full(TASK), outer_data=bx.data.full(TASK),
        inner_init=start, algorithm=algorithm, num_steps=3,
    )  # fmt: skip
    # A warm adjoint is another way to the same solution.
    assert np.allclose(run.history["value"], want, rtol=1e-6 if method is not None else 0)


def loss(w, meta, task):
    return jnp.sum((w["a"] - task) ** 2)


def test_a_start_that_alone_reads_a_leaf_needs_a_method_that_sees_it():
    start = lambda meta: {"a": meta["init"]}
    inner = lambda w, meta, task: (
        loss(w, meta, task) + jnp.exp(meta["decay"]) * jnp.sum(w["a"] ** 2)
    )
    meta = {"init": jnp.ones(2), "decay": jnp.zeros(())}
    make = lambda method: bx.value_and_hypergrad(
        inner,
        loss,
        solver=bx.inner.optax(optax.sgd(0.1), 3),
        hypergradient=method,
        inner_init=start,
    )
    with pytest.raises(
        ValueError,
        match=r"inner_init: the start depends on outer_params\['init'\], which no objective reads",
    ):
        make(H.implicit())({"a": jnp.zeros(2)}, meta, TASK, TASK)
    out = make(H.unrolled())({"a": jnp.zeros(2)}, meta, TASK, TASK)

    def hand(meta):
        w = start(meta)
        for _ in range(3):
            w = jax.tree.map(lambda a, g: a - 0.1 * g, w, jax.grad(inner)(w, meta, TASK))
        return loss(w, meta, TASK)

    want = jax.grad(hand)(meta)
    assert all(np.allclose(out.grad[name], want[name], rtol=1e-12) for name in want)


# ---- starts that draw


def distilled(w, images, batch):
    return jnp.mean((images @ w - 1.0) ** 2)


X, Y = jax.random.normal(jax.random.key(0), (8, 3)), jax.random.normal(jax.random.key(1), (8,))
OUT = bx.objective(lambda w, images, batch: (jnp.mean((X @ w - Y) ** 2), w), has_aux=True)
STILL = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(0.0), 1), H.unrolled(), optax.sgd(0.1))


def fresh(images, key):
    return jax.random.normal(key, (3,))


def drawn(steps, **keywords):
    return bx.solve_bilevel(
        distilled, OUT, jnp.ones(3), jnp.ones((2, 3)), inner_init=fresh, algorithm=STILL, num_steps=steps,
        **{"key": jax.random.key(0), **keywords},
    )  # fmt: skip


def test_each_step_draws_another_start():
    starts = drawn(4).history["aux"]
    assert len({tuple(row) for row in starts.tolist()}) == 4
    assert np.array_equal(drawn(4).history["aux"], starts)
    first = drawn(2)
    assert np.array_equal(drawn(2, state=first.state).history["aux"], starts[2:])


def test_a_start_that_draws_needs_a_key():
    with pytest.raises(ValueError, match="key: got None although inner_init takes a key"):
        drawn(2, key=None)


def test_a_warm_adjoint_is_dropped_with_the_start():
    """With one CG iteration the adjoint's own start would be seen: each step's is that of an
    estimate that knows nothing."""
    method = H.implicit(bx.linear.cg(maxiter=1, tol=0.5), max_residual=jnp.inf)
    ridge = lambda w, x, batch: jnp.mean((X @ w - Y) ** 2) + jnp.exp(x) * jnp.sum(w**2)
    algorithm = bx.algorithms.double_loop(bx.inner.optax(optax.sgd(0.1), 2), method, optax.sgd(0.0))
    run = bx.solve_bilevel(
        ridge, lambda w, x, batch: jnp.sum(w**2), jnp.zeros(3), jnp.zeros(()), inner_init=fresh, algorithm=algorithm,
        num_steps=3, key=jax.random.key(0),
    )  # fmt: skip
    assert (run.history["adjoint_iterations"] == 1).all()


def test_a_start_may_bring_a_model_state():
    """The statistics begin anew with the parameters, and their derivative goes into the start's."""

    def inner(w, x, batch, mean):
        return 0.5 * (w - mean) ** 2, 0.5 * mean + 0.5 * w

    outer = bx.objective(lambda w, x, batch, mean: (w * mean, mean), stateful=True)
    start = lambda x: (2.0 * x, x**2)

    def hand(x):
        w, mean = start(x)
        for _ in range(3):
            w, mean = w - 0.5 * (w - mean), 0.5 * mean + 0.5 * w
        return w * mean

    inner = bx.objective(inner, stateful=True)
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.5), 3), H.unrolled(), optax.sgd(0.01)
    )
    x, want = jnp.asarray(0.7), []
    for _ in range(3):
        value, grad = jax.value_and_grad(hand)(x)
        want.append((value, abs(grad)))
        x = x - 0.01 * grad
    run = bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(()),
        jnp.asarray(0.7),
        inner_init=start,
        model_state=jnp.zeros(()),
        algorithm=algorithm,
        num_steps=3,
    )
    assert np.allclose(
        np.stack([run.history["value"], run.history["grad_norm"]], 1), want, rtol=1e-10
    )


def test_single_loop_algorithms_refuse_a_start():
    with pytest.raises(
        ValueError, match="inner_init: got a function of the outer parameters, with soba"
    ):
        bx.solve_bilevel(
            distilled,
            OUT,
            jnp.ones(3),
            jnp.ones((2, 3)),
            inner_init=lambda x: x[0],
            algorithm=bx.algorithms.soba(0.1, 0.1),
            num_steps=1,
        )


# ---- objectives of the steps


def multi_step(steps, meta, task):
    """MAML++: the query loss after each inner step, weighted."""
    weights = jnp.array([0.2, 0.3, 0.5])
    return jnp.sum(weights * jax.vmap(lambda w: query(w, meta, task))(steps))


def multi_step_by_hand(meta):
    w, total = meta, 0.0
    for weight in (0.2, 0.3, 0.5):
        w = w - 0.1 * jax.grad(proximal)(w, meta, TASK)
        total = total + weight * query(w, meta, TASK)
    return total


@pytest.mark.turns
@pytest.mark.parametrize(
    "method",
    [H.unrolled(), H.unrolled(checkpoint="sqrt"), H.unrolled(checkpoint="none"), H.forward()],
)
def test_an_objective_of_every_inner_step(method):
    if method.sees_init:
        start, by_hand = {"inner_init": lambda meta: meta}, multi_step_by_hand
    else:
        start, by_hand = {"inner_init": jax.lax.stop_gradient}, None
    fn = bx.value_and_hypergrad(
        proximal,
        bx.objective(multi_step, trajectory=True),
        solver=bx.inner.optax(optax.sgd(0.1), 3),
        hypergradient=method,
        **start,
    )
    out = jax.jit(fn)(jnp.zeros(2), jnp.full(2, 0.5), TASK, TASK)
    assert np.allclose(out.value, multi_step_by_hand(jnp.full(2, 0.5)), rtol=1e-12)
    assert out.inner_params.shape == (2,)
    if by_hand is not None:
        assert np.allclose(out.grad, jax.grad(by_hand)(jnp.full(2, 0.5)), rtol=1e-10)
    else:
        fixed = lambda meta: jnp.full(2, 0.5)

        def hand(meta):
            w, total = fixed(meta), 0.0
            for weight in (0.2, 0.3, 0.5):
                w = w - 0.1 * jax.grad(proximal)(w, meta, TASK)
                total = total + weight * query(w, meta, TASK)
            return total

        assert np.allclose(out.grad, jax.grad(hand)(jnp.full(2, 0.5)), rtol=1e-10)


def test_a_run_with_an_objective_of_the_steps():
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 3), H.unrolled(), optax.sgd(0.1)
    )
    x, want = jnp.full(2, 0.5), []
    for _ in range(3):
        value, grad = jax.value_and_grad(multi_step_by_hand)(x)
        want.append(value)
        x = x - 0.1 * grad
    run = bx.solve_bilevel(
        proximal, bx.objective(multi_step, trajectory=True), jnp.zeros(2), jnp.full(2, 0.5), inner_init=lambda meta: meta,
        inner_data=bx.data.full(TASK), outer_data=bx.data.full(TASK), algorithm=algorithm, num_steps=3,
    )  # fmt: skip
    assert np.allclose(run.history["value"], want, rtol=1e-10) and run.inner_params.shape == (2,)


def test_methods_of_the_last_point_refuse_the_steps():
    steps = bx.objective(multi_step, trajectory=True)
    for method in (H.implicit(), H.unrolled(2), H.sama()):
        with pytest.raises(
            ValueError,
            match=r"outer_objective: got objective\(multi_step, trajectory=True\), which reads every inner step",
        ):
            bx.value_and_hypergrad(
                proximal, steps, solver=bx.inner.optax(optax.sgd(0.1), 3), hypergradient=method
            )
    with pytest.raises(ValueError, match="trajectory=True.* with soba"):
        bx.solve_bilevel(
            proximal, steps, jnp.zeros(2), jnp.zeros(2), inner_data=bx.data.full(TASK), outer_data=bx.data.full(TASK),
            algorithm=bx.algorithms.soba(0.1, 0.1), num_steps=1,
        )  # fmt: skip


def test_only_an_outer_objective_reads_the_steps():
    steps = bx.objective(multi_step, trajectory=True)
    solver = bx.inner.optax(optax.sgd(0.1), 3)
    with pytest.raises(TypeError, match="inner_objective: got objective.*at the outer level only"):
        bx.value_and_hypergrad(steps, query, solver=solver, hypergradient=H.unrolled())
    with pytest.raises(TypeError, match="Level 'w', objective: got objective.*trajectory=True"):
        bx.Level("w", steps, solver=solver, hypergradient=H.unrolled())


# ---- what cannot be learned


def test_a_leaf_that_nothing_reads_is_named():
    inner, outer = (lambda w, x, b: jnp.sum((w - x["a"]) ** 2)), (lambda w, x, b: jnp.sum(w**2))
    x = {"a": jnp.ones(2), "rate": jnp.asarray(0.1)}
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 2), H.unrolled(), optax.adam(0.1)
    )
    with pytest.raises(ValueError, match=r"outer_params\['rate'\]: neither objective reads it"):
        bx.solve_bilevel(inner, outer, jnp.zeros(2), x, algorithm=algorithm, num_steps=2)


@pytest.mark.parametrize(
    "outer",
    [lambda y, x, b: 1.0, lambda y, x, b: jnp.sum(b**2)],
    ids=["a constant", "of the batch alone"],
)
def test_an_outer_objective_of_nothing_is_refused(outer):
    solver, method = bx.inner.optax(optax.sgd(0.5), 2), bx.hypergradient.implicit()
    inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
    algorithm = bx.algorithms.double_loop(solver, method, optax.sgd(0.3))
    with pytest.raises(
        ValueError, match="outer_objective: it depends neither on inner_params nor on outer_params"
    ):
        bx.solve_bilevel(
            inner,
            outer,
            jnp.zeros(2),
            jnp.ones(2),
            outer_data=jnp.ones(2),
            algorithm=algorithm,
            num_steps=2,
        )
    fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)
    with pytest.raises(
        ValueError, match="outer_objective: it depends neither on inner_params nor on outer_params"
    ):
        fn(jnp.zeros(2), jnp.ones(2), None, jnp.ones(2))


STOPPED = {
    "outer": (
        lambda y, x, b: jnp.sum((y - x["a"]) ** 2),
        lambda y, x, b: jnp.sum(jax.lax.stop_gradient(y) ** 2),
        "outer_objective: it reads",
    ),
    "inner": (
        lambda y, x, b: jnp.sum((y - jax.lax.stop_gradient(x["a"])) ** 2),
        lambda y, x, b: jnp.sum(y**2),
        "inner_objective: it reads",
    ),
    "in a scan": (
        lambda y, x, b: jax.lax.scan(
            lambda c, t: (c + jnp.sum((y - jax.lax.stop_gradient(x["a"])) ** 2), None),
            0.0,
            jnp.zeros(2),
        )[0],
        lambda y, x, b: jnp.sum(y**2),
        "inner_objective: it reads",
    ),
    "apart": (
        lambda y, x, b: jnp.sum((y - 1.0) ** 2) + jnp.sum(x["a"] ** 2),
        lambda y, x, b: jnp.sum(y**2),
        "inner_objective: it reads",
    ),
}
LEARNERS = {
    "implicit": bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 2), H.implicit(), optax.adam(0.1)
    ),
    "unrolled": bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 2), H.unrolled(), optax.adam(0.1)
    ),
    "soba": bx.algorithms.soba(0.1, 0.1),
    "f2sa": bx.algorithms.f2sa(0.1, 0.1, steps=2),
    "hoag": bx.algorithms.hoag(),
    "default": None,
}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("name", STOPPED)
def test_a_hypergradient_that_is_zero_by_structure_is_named(name, learner):
    inner, outer, words = STOPPED[name]
    with pytest.raises(
        ValueError, match=rf"{words}.* outer_params\['a'\], through stop_gradient or not at all"
    ):
        bx.solve_bilevel(
            inner,
            outer,
            jnp.zeros(2),
            {"a": jnp.ones(2)},
            algorithm=LEARNERS[learner],
            num_steps=2,
        )


def test_a_leaf_that_nothing_reads_is_named_by_single_loops():
    inner, outer = (lambda w, x, b: jnp.sum((w - x["a"]) ** 2)), (lambda w, x, b: jnp.sum(w**2))
    x = {"a": jnp.ones(2), "rate": jnp.asarray(0.1)}
    for algorithm in (bx.algorithms.soba(0.1, 0.1), None):
        with pytest.raises(ValueError, match=r"outer_params\['rate'\]: neither objective reads it"):
            bx.solve_bilevel(inner, outer, jnp.zeros(2), x, algorithm=algorithm, num_steps=2)


def test_what_takes_differences_feels_what_is_stopped():
    """``y* = x`` though the inner objective stops x: differences of solutions see it."""
    inner = lambda y, x, b: 0.5 * jnp.sum((y - jax.lax.stop_gradient(x)) ** 2)
    outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
    out = bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(2),
        jnp.zeros(2),
        algorithm=bx.algorithms.pzobo(1.0, optax.sgd(0.2), steps=1, samples=8),
        num_steps=100,
        key=jax.random.key(0),
    )
    np.testing.assert_allclose(out.outer_params, 3.0, atol=0.05)


def test_what_passes_beside_a_stopped_gradient_is_none():
    """A straight-through value, a rule of its own, and a direct term beside a stopped one all have
    derivatives."""

    @jax.custom_jvp
    def rounded(a):
        return jax.lax.stop_gradient(jnp.round(a))

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))
    through = lambda a: a + jax.lax.stop_gradient(jnp.round(a) - a)
    for value in (rounded, through):
        fn = bx.value_and_hypergrad(
            lambda y, x, b, value=value: 0.5 * jnp.sum((y - value(x)) ** 2), lambda y, x, b: jnp.sum(y), solver=bx.inner.optax(optax.sgd(1.0), 1),
            hypergradient=H.implicit(),
        )  # fmt: skip
        np.testing.assert_allclose(fn(jnp.zeros(2), jnp.full(2, 0.7)).grad, 1.0, rtol=1e-6)


ROOT6 = np.sqrt(6.0)


def _sphere(y, x, b):
    """Its nearest point of the sphere ``|y| = x`` to t = (1, 2, 1) is ``x t / |t|``."""
    return x * jnp.array([1.0, 2.0, 1.0]) / ROOT6


@pytest.mark.parametrize(
    ("mapping", "method", "right"),
    [
        (lambda y, x, b: 0.5 * y + x, lambda T: H.fixed_point(T), [2.0, 4.0, 2.0]),  # y = 2 x
        (_sphere, lambda T: H.kkt(lambda y, x, b: y @ y - x**2), 6.0 / ROOT6),
    ],
    ids=["a fixed point", "a constraint"],
)
def test_what_only_a_mapping_reads_of_the_outer_parameters_is_read(mapping, method, right):
    """The inner objective does not read x: the fixed-point map does, or the constraint. The outer
    one is ``t · y``, t = (1, 2, 1)."""
    t = jnp.array([1.0, 2.0, 1.0])
    inner, outer = lambda y, x, b: jnp.sum((y - t) ** 2), lambda y, x, b: t @ y
    x = jnp.ones(3) if np.ndim(right) else jnp.asarray(0.7)
    solver, method = bx.inner.fixed_point(mapping), method(mapping)
    fn = bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method)
    np.testing.assert_allclose(fn(jnp.full(3, 0.3), x).grad, right, rtol=1e-4)
    algorithm = bx.algorithms.double_loop(solver, method, optax.sgd(0.1))
    run = bx.solve_bilevel(
        inner, outer, jnp.full(3, 0.3), x, algorithm=algorithm, num_steps=1, keep="last"
    )
    np.testing.assert_allclose(run.state.algorithm.outer, x - 0.1 * np.asarray(right), rtol=1e-4)
