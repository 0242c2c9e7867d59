"""Model state is part of the map: unrolled and forward differentiate BatchNorm's statistics, others
say that they do not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import bilevax as bx
from bilevax import RESULTS, results
from bilevax import hypergradient as H
from tests.selection import quick


def inner(
    w, x, batch, mean
):  # x: a learned image; mean: its running average, as BatchNorm keeps it
    return 0.5 * (w - x) ** 2, 0.5 * mean + 0.5 * x


def outer(w, x, batch, mean):  # evaluation mode: reads the running average
    return w * mean, mean


def by_hand(x, steps):
    w, mean = 0.0, 0.0
    for _ in range(steps):
        w, mean = w - 0.5 * (w - x), 0.5 * mean + 0.5 * x
    return w * mean


SEEING = {
    "mixed": H.unrolled(),
    "none": H.unrolled(checkpoint="none"),
    "step": H.unrolled(checkpoint="step"),
    "sqrt": H.unrolled(checkpoint="sqrt"),
    "forward": H.forward(),
}


def estimate(method, steps, x, mean=0.0):
    g, f = bx.objective(inner, stateful=True), bx.objective(outer, stateful=True)
    fn = bx.value_and_hypergrad(
        g, f, solver=bx.inner.optax(optax.sgd(0.5), steps), hypergradient=method
    )
    return fn(jnp.zeros(()), x, state=fn.init(jnp.zeros(()), model_state=jnp.asarray(mean)))


@pytest.mark.parametrize("steps", quick([1, 5], [5]))
@pytest.mark.parametrize("name", SEEING)
def test_statistics_are_differentiated(name, steps):
    x = jnp.asarray(1.3)
    out = estimate(SEEING[name], steps, x)
    value, grad = jax.value_and_grad(by_hand)(x, steps)
    assert np.allclose([out.value, out.grad], [value, grad], rtol=1e-12)
    assert not out.info["warnings"]


def test_a_method_that_takes_them_as_constants_says_so():
    out = estimate(H.one_step(scale=0.5), 3, jnp.asarray(1.0))
    assert RESULTS.statistics_constant in results.warnings_in(out.info["warnings"])
    report = bx.check_hypergradient(
        bx.objective(inner, stateful=True), bx.objective(outer, stateful=True), jnp.zeros(()),
        jnp.ones(()),
        solver=bx.inner.optax(optax.sgd(0.5), 3), hypergradient=H.implicit(),
        model_state=jnp.zeros(()), reference="solver",
    )  # fmt: skip
    assert not report.ok and "statistics" in str(report)


@pytest.mark.parametrize("name", [n for n in H.__all__ if n not in ("unrolled", "forward")])
def test_the_docs_of_a_method_say_what_it_does_with_them(name):
    assert "statistics (its model state) are taken as constants" in getattr(H, name).__doc__


@pytest.mark.parametrize("reads", [True, False])
def test_algorithms_without_a_method_say_so_too(reads):
    """Where the outer objective reads them, and not where it does not."""
    judged = outer if reads else (lambda w, x, batch, mean: (w * x, mean))
    out = bx.solve_bilevel(
        bx.objective(inner, stateful=True), bx.objective(judged, stateful=True), jnp.zeros(()),
        jnp.ones(()),
        algorithm=bx.algorithms.soba(0.1, 0.1), num_steps=2, model_state=jnp.zeros(()),
    )  # fmt: skip
    assert out.warnings.get(RESULTS.statistics_constant, 0) == (2 if reads else 0)


def test_check_hypergradient_knows_the_right_one():
    report = bx.check_hypergradient(
        bx.objective(inner, stateful=True), bx.objective(outer, stateful=True), jnp.zeros(()),
        jnp.ones(()),
        solver=bx.inner.optax(optax.sgd(0.5), 3), hypergradient=H.unrolled(),
        model_state=jnp.zeros(()), reference="solver",
    )  # fmt: skip
    assert report.ok and np.allclose(report.reference, jax.grad(by_hand)(1.0, 3), rtol=1e-6)


def test_the_last_steps_of_a_truncated_one():
    """The last two of five: the derivative of two steps from where three led."""

    def last(x, w, mean):
        for _ in range(2):
            w, mean = w - 0.5 * (w - x), 0.5 * mean + 0.5 * x
        return w * mean

    out = estimate(H.unrolled(2), 5, jnp.asarray(1.0))
    assert np.allclose(out.grad, jax.grad(last)(1.0, 0.875, 0.875), rtol=1e-12)


def count(w, x, batch, state):
    """A state with an integer beside the statistics."""
    steps, mean = state
    return 0.5 * (w - x * mean) ** 2, (steps + 1, 0.5 * mean + 0.5 * x)


def test_integers_in_the_state_ride_along():
    def hand(x):
        w, mean = 0.0, 1.0
        for _ in range(3):
            w, mean = w - 0.5 * (w - x * mean), 0.5 * mean + 0.5 * x
        return w * mean

    f = bx.objective(lambda w, x, batch, state: (w * state[1], state), stateful=True)
    for method in (H.unrolled(), H.forward()):
        fn = bx.value_and_hypergrad(
            bx.objective(count, stateful=True),
            f,
            solver=bx.inner.optax(optax.sgd(0.5), 3),
            hypergradient=method,
        )
        start = fn.init(jnp.zeros(()), model_state=(jnp.int32(0), jnp.ones(())))
        out = fn(jnp.zeros(()), jnp.asarray(0.7), state=start)
        assert (
            np.allclose(out.grad, jax.grad(hand)(0.7), rtol=1e-12) and int(out.state.model[0]) == 3
        )


# ---- networks


@pytest.fixture(autouse=True)
def lenient():
    """Flax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs, param_dtype=jnp.float64)
        self.head = nnx.Linear(3, 1, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(x)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5, param_dtype=jnp.float64)(x)
        return linen.Dense(1, param_dtype=jnp.float64)(jnp.tanh(x))


KEYS = jax.random.split(jax.random.key(0), 5)
IMAGES, LABELS = 1.0 + jax.random.normal(KEYS[0], (8, 3)), jax.random.normal(KEYS[1], (8, 1))
XV, YV = jax.random.normal(KEYS[2], (16, 3)), jax.random.normal(KEYS[3], (16, 1))
DIRECTION = jax.random.normal(KEYS[4], (8, 3))


def network(style):
    if style == "nnx":
        net = bx.nn.from_nnx(NnxNet(nnx.Rngs(0)))
        return net._replace(state=jax.tree.map(lambda a: a.astype(jnp.float64), net.state))
    module = LinenNet()
    variables = module.init(jax.random.key(0), IMAGES, train=True)
    variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)
    return bx.nn.from_linen(module, variables, train={"train": True}, evaluate={"train": False})


def fit(model, images, batch):
    return jnp.mean((model(images) - LABELS) ** 2)


def held_out(model, images, batch):
    return jnp.mean((model(XV) - YV) ** 2)


@pytest.mark.turns
@pytest.mark.parametrize("style", ["nnx", "linen"])
@pytest.mark.parametrize("steps", [1, 5])
def test_distilled_images_see_batchnorm(style, steps):
    problem = bx.nn.bilevel(fit, held_out, network(style), IMAGES)

    def at(images, method):
        solver = bx.inner.optax(optax.sgd(0.1), steps)
        fn = bx.value_and_hypergrad(
            problem.inner_objective, problem.outer_objective, solver=solver, hypergradient=method
        )
        return fn(
            problem.inner_params,
            images,
            state=fn.init(problem.inner_params, model_state=problem.model_state),
        )

    unrolled = jax.jit(lambda images: at(images, H.unrolled()))
    slope = (
        unrolled(IMAGES + 1e-5 * DIRECTION).value - unrolled(IMAGES - 1e-5 * DIRECTION).value
    ) / 2e-5
    found = unrolled(IMAGES).grad
    assert abs(jnp.sum(found * DIRECTION) - slope) < 1e-6 * abs(slope)
    if steps == 1:
        assert np.allclose(
            jax.jit(lambda images: at(images, H.forward()))(IMAGES).grad,
            found,
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("style", ["nnx", "linen"])
@pytest.mark.parametrize("name", ["unrolled", "forward"])
def test_levels_differentiate_a_network_s_statistics(name, style, steps, depth):
    """A distilled network, a scale of its scores in evaluation mode, and the images above both: a
    difference of the estimate's own value."""
    net, method = network(style), getattr(H, name)()
    solver = lambda rate: bx.inner.optax(optax.sgd(rate), steps)
    scores = lambda p: (p["s"] if depth == 3 else 1.0) * p["w"](XV)
    judged = bx.nn.objective(
        lambda p, batch: jnp.mean((scores(p) - YV) ** 2), levels={"w": net}, train=False
    )
    learned = bx.nn.objective(
        lambda p, batch: jnp.mean((p["w"](p["x"]) - LABELS) ** 2), levels={"w": net}
    )
    levels = [bx.Level("w", learned, solver=solver(0.1), hypergradient=method)]
    if depth == 3:
        levels += [bx.Level("s", judged, solver=solver(0.2), hypergradient=method)]
    fn = bx.value_and_multilevel_grad([*levels, bx.Level("x", judged, solver=optax.sgd(0.1))])
    start = {"w": net.params, "s": jnp.asarray(0.5), "x": IMAGES}
    start = {n: v for n, v in start.items() if n != "s" or depth == 3}
    state = fn.init(start, model_state={"w": {"w": net.state}})
    at = jax.jit(lambda images: fn({**start, "x": images}, state=state))
    ends = [at(IMAGES + sign * 1e-5 * DIRECTION).value for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-5
    assert abs(jnp.sum(at(IMAGES).grad * DIRECTION) - slope) < 1e-6 * abs(slope)


def test_flax_s_values_are_kept():
    """Only the derivative of the running averages is ours: values are flax's to the bit, masks
    included."""
    images = IMAGES.astype(jnp.float32)
    mask = jnp.asarray(np.random.default_rng(0).random((8, 1)) > 0.4)

    class Masked(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(x, mask=mask)

    plain = Masked(nnx.Rngs(0))
    plain(images)
    net = bx.nn.from_nnx(Masked(nnx.Rngs(0)))

    def moved(x):
        objective = bx.nn.objective(lambda model, _, batch: jnp.mean(model(x)), inner=net)
        state = objective(net.params, None, bx.base.Ctx(None, None, {"inner": net.state}))[1][0][
            "inner"
        ]["norm"]
        return state["mean"][...], state["var"][...]

    assert np.array_equal(moved(images)[0], plain.norm.mean[...])
    assert np.array_equal(moved(images)[1], plain.norm.var[...])

    def by_hand(x):
        mean = jnp.mean(x, 0, where=mask)
        return 0.5 * mean, 0.5 * (jnp.mean(x * x, 0, where=mask) - mean**2)

    total = lambda fn: lambda x: sum(jnp.sum(a) for a in fn(x))
    assert np.allclose(
        jax.grad(total(moved))(images), jax.grad(total(by_hand))(images), rtol=1e-5, atol=1e-6
    )


# ---- what the user froze


class Frozen(nnx.Module):
    def __init__(self, rngs, frozen):
        self.norm = nnx.BatchNorm(3, use_running_average=frozen, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=frozen, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(x)))


@pytest.mark.parametrize("train", [True, False])
def test_frozen_modules_stay_frozen(train):
    model = Frozen(nnx.Rngs(0), True)
    net = bx.nn.from_nnx(model)
    x = 5 + IMAGES.astype(jnp.float32)
    objective = bx.nn.objective(lambda m, _, batch: jnp.mean(m(x) ** 2), inner=net, train=train)
    value, (state, _) = objective(
        net.params, None, bx.base.Ctx(None, jax.random.key(0), {"inner": net.state})
    )
    assert value == jnp.mean(model(x) ** 2)
    chex.assert_trees_all_equal(state["inner"], net.state)


def test_open_modules_are_switched():
    net = bx.nn.from_nnx(Frozen(nnx.Rngs(0), False))
    x = 5 + IMAGES.astype(jnp.float32)
    values = []
    for train in (True, False):
        objective = bx.nn.objective(lambda m, _, batch: jnp.mean(m(x) ** 2), inner=net, train=train)
        values.append(
            float(
                objective(
                    net.params, None, bx.base.Ctx(None, jax.random.key(0), {"inner": net.state})
                )[0]
            )
        )
    assert values[0] < values[1]  # batch statistics take the mean of 5 away
