"""One owner: a network's statistics belong to the level that trains it, and every reader sees the
current ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevax as bx
from bilevax import RESULTS, results
from bilevax import hypergradient as H
from tests.selection import quick


def owned(fn):
    return bx.objective(fn, stateful=True)


def fit(p, batch, state):
    """The lowest level moves its own average of what it is taught."""
    return 0.5 * (p["w"] - p["x"]) ** 2, {"w": 0.5 * state["w"] + 0.5 * p["x"] * p["w"]}


def middle(p, batch, state):
    return 0.5 * (p["s"] - p["w"] * state["w"]) ** 2, state


def top(p, batch, state):
    return p["s"] * state["w"] + p["x"] ** 2, state


def levels(method, steps, depth):
    solver = bx.inner.optax(optax.sgd(0.5), steps)
    lowest = bx.Level("w", owned(fit), solver=solver, hypergradient=method)
    if depth == 2:
        last = owned(lambda p, batch, state: (p["w"] * state["w"] + p["x"] ** 2, state))
        return [lowest, bx.Level("x", last, solver=optax.sgd(0.1))]
    return [
        lowest,
        bx.Level("s", owned(middle), solver=solver, hypergradient=method),
        bx.Level("x", owned(top), solver=optax.sgd(0.1)),
    ]


def by_hand(x, steps, depth):
    w, mean, s = 0.3, 0.2, 0.1
    for _ in range(steps):
        w, mean = w - 0.5 * (w - x), 0.5 * mean + 0.5 * x * w
    if depth == 2:
        return w * mean + x**2
    for _ in range(steps):
        s = s - 0.5 * (s - w * mean)
    return s * mean + x**2


START = {"w": jnp.asarray(0.3), "s": jnp.asarray(0.1), "x": jnp.asarray(1.2)}


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("steps", quick([1, 5], [5]))
@pytest.mark.parametrize("name", ["unrolled", "forward"])
def test_statistics_are_part_of_the_gradient_through_levels(name, steps, depth):
    fn = bx.value_and_multilevel_grad(levels(getattr(H, name)(), steps, depth))
    start = {n: v for n, v in START.items() if depth == 3 or n != "s"}
    out = fn(start, state=fn.init(start, model_state={"w": {"w": jnp.asarray(0.2)}}))
    value, grad = jax.value_and_grad(by_hand)(1.2, steps, depth)
    assert np.allclose([out.value, out.grad], [value, grad], rtol=1e-10)
    assert not out.info["warnings"]


def test_a_method_that_sees_none_takes_them_as_constants():
    fn = bx.value_and_multilevel_grad(levels(H.one_step(0.5), 3, 2))
    start = {"w": START["w"], "x": START["x"]}
    out = fn(start, state=fn.init(start, model_state={"w": {"w": jnp.asarray(0.2)}}))
    w, mean, x = 0.3, 0.2, 1.2
    for _ in range(3):
        w, mean = w - 0.5 * (w - x), 0.5 * mean + 0.5 * x * w
    assert np.allclose(out.grad, 2 * x + 0.5 * mean, rtol=1e-10)
    assert RESULTS.statistics_constant in results.warnings_in(out.info["warnings"])


def test_a_nested_level_s_reader_sees_its_statistics():
    """z is solved inside y's objective, which reads z's average as it is after that solve."""
    lowest = lambda p, batch, state: (
        0.5 * (p["z"] - p["y"]) ** 2 + 0.0 * p["x"],
        {"z": 0.5 * state["z"] + 0.5 * p["y"]},
    )
    upper = lambda p, batch, state: (0.5 * (p["y"] - p["x"]) ** 2 + p["z"] * state["z"], state)
    solver = lambda steps: bx.inner.optax(optax.sgd(0.5), steps)
    nested = [
        bx.Level("z", owned(lowest), solver=solver(2), hypergradient=H.unrolled()),
        bx.Level("y", owned(upper), solver=solver(1), hypergradient=H.unrolled()),
        bx.Level("x", lambda p, batch: (p["y"] - 1) ** 2, solver=optax.sgd(0.1)),
    ]
    start = {"z": jnp.asarray(0.4), "y": jnp.asarray(0.7), "x": jnp.asarray(1.1)}
    fn = bx.value_and_multilevel_grad(nested)
    out = fn(start, state=fn.init(start, model_state={"z": {"z": jnp.asarray(0.2)}}))

    def response(y):
        z, mean = 0.4, 0.2
        for _ in range(2):
            z, mean = z - 0.5 * (z - y), 0.5 * mean + 0.5 * y
        return z * mean

    y = 0.7 - 0.5 * ((0.7 - 1.1) + jax.grad(response)(0.7))
    assert np.allclose(out.inner_params["y"], y, rtol=1e-10)
    z, mean = 0.4, 0.2
    for _ in range(2):
        z, mean = z - 0.5 * (z - 0.7), 0.5 * mean + 0.5 * 0.7
    assert np.allclose([out.inner_params["z"], out.state.model["z"]["z"]], [z, mean], rtol=1e-10)


def test_a_private_state_stays_private():
    """A state that is no dict by level names is the level's alone, as it has been."""
    count = lambda p, batch, n: (0.5 * (p["w"] - p["x"]) ** 2, n + 1)
    pair = [
        bx.Level(
            "w", owned(count), solver=bx.inner.optax(optax.sgd(0.5), 3), hypergradient=H.implicit()
        ),
        bx.Level("x", lambda p, batch: p["w"] ** 2, solver=optax.sgd(0.1)),
    ]
    out = bx.solve_multilevel(
        pair, {"w": 0.0, "x": 1.0}, num_steps=4, model_state={"w": jnp.int32(0)}, keep="last"
    )
    assert int(out.model_state["w"]) == 12


def test_a_stateful_level_without_any_state_is_named():
    with pytest.raises(
        ValueError, match="model_state: got none for level 'w', whose objective is stateful"
    ):
        bx.solve_multilevel(levels(H.unrolled(), 1, 2), {"w": 0.0, "x": 1.0}, num_steps=1)


# ---- networks


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


KEYS = jax.random.split(jax.random.key(0), 2)
X, Y = (
    (5 + jax.random.normal(KEYS[0], (8, 3))).astype(jnp.float32),
    jax.random.normal(KEYS[1], (8, 1)).astype(jnp.float32),
)


def weighted(p, batch):
    return jnp.mean(jax.nn.sigmoid(p["s"])[:, None] * (p["w"](X) - Y) ** 2)


def plain(p, batch):
    return jnp.mean((p["w"](X) - Y) ** 2)


@pytest.mark.turns
@pytest.mark.parametrize("given", ["owner", "both"])
def test_the_top_level_evaluates_a_network_with_its_current_statistics(given):
    """The same as the two-level driver's, to rounding."""
    net = bx.nn.from_nnx(Net(nnx.Rngs(0)))
    low, high = (
        bx.nn.objective(weighted, levels={"w": net}),
        bx.nn.objective(plain, levels={"w": net}, train=False),
    )
    solver, scores = bx.inner.optax(optax.sgd(0.1), 5), jnp.zeros(8, jnp.float32)
    pair = [
        bx.Level("w", low, solver=solver, hypergradient=H.unrolled()),
        bx.Level("s", high, solver=optax.sgd(0.1)),
    ]
    state = {"w": {"w": net.state}} | ({"s": {"w": net.state}} if given == "both" else {})
    out = bx.solve_multilevel(pair, {"w": net.params, "s": scores}, num_steps=3, model_state=state)

    problem = bx.nn.bilevel(
        lambda model, s, batch: jnp.mean(jax.nn.sigmoid(s)[:, None] * (model(X) - Y) ** 2),
        lambda model, s, batch: jnp.mean((model(X) - Y) ** 2), net, scores,
    )  # fmt: skip
    loop = bx.algorithms.double_loop(solver, H.unrolled(), optax.sgd(0.1))
    two = bx.solve_bilevel(**problem.arguments, algorithm=loop, num_steps=3)
    assert np.allclose(out.history["value"], two.history["value"], rtol=1e-5)
    again = bx.solve_multilevel(
        pair, {"w": net.params, "s": scores}, num_steps=2, model_state=state, state=out.state
    )
    assert again.stats["total_steps"] == 5


def test_a_reader_between_sees_the_current_statistics():
    net = bx.nn.from_nnx(Net(nnx.Rngs(0)))
    low = bx.nn.objective(weighted, levels={"w": net})
    mid = bx.nn.objective(
        lambda p, b: plain(p, b) + 0 * jnp.sum(p["s"] ** 2), levels={"w": net}, train=False
    )
    three = [
        bx.Level("w", low, solver=bx.inner.optax(optax.sgd(0.1), 20), hypergradient=H.one_step()),
        bx.Level("s", mid, solver=optax.sgd(0.0), hypergradient=H.one_step()),
        bx.Level(
            "t", lambda p, b: p["t"] ** 2 + jnp.sum(p["s"] ** 2) * p["t"], solver=optax.sgd(0.0)
        ),
    ]
    params = {"w": net.params, "s": jnp.zeros(8, jnp.float32), "t": jnp.zeros((), jnp.float32)}
    fn = bx.value_and_multilevel_grad(three)
    out = jax.jit(fn)(params, None, state=fn.init(params, model_state={"w": {"w": net.state}}))
    right = net.merge(out.inner_params["w"], out.state.model["w"]["w"])
    right.eval()
    assert np.allclose(out.info["s/inner_value"], jnp.mean((right(X) - Y) ** 2), rtol=1e-5)
    assert jax.tree.structure(out.state) == jax.tree.structure(
        fn.init(params, model_state={"w": {"w": net.state}})
    )
