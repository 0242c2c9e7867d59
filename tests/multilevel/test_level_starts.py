"""Levels whose solves begin anew: at another level's solution, at the level above, at a draw."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import results

H, K, RATE = bx.hypergradient, 3, 0.2
X, Y = jax.random.normal(jax.random.key(0), (8, 3)), jax.random.normal(jax.random.key(1), (8,))
SGD = bx.inner.optax(optax.sgd(RATE), K)


def first(p, batch):
    """Pretraining on weighted examples."""
    return jnp.mean(jax.nn.sigmoid(p["s"]) * (jnp.tanh(X @ p["a"]) - Y) ** 2)


def second(p, batch):
    return jnp.mean((jnp.tanh(X @ p["b"]) - Y + 0.4) ** 2) + 0.1 * jnp.sum(p["b"] ** 4)


def last(p, batch):
    return jnp.sum((p["b"] - 0.3) ** 2) + 0.1 * jnp.sum(p["s"] ** 2)


def descend(objective, name, params, steps=K):
    for _ in range(steps):
        params = {
            **params,
            name: params[name]
            - RATE * jax.grad(lambda v, p=params: objective({**p, name: v}, None))(params[name]),
        }
    return params


def finetuned(method):
    return [
        bx.Level("a", first, solver=SGD, hypergradient=H.unrolled()),
        bx.Level("b", second, solver=SGD, hypergradient=method, start=lambda p: jnp.cos(p["a"])),
        bx.Level("s", last, solver=optax.sgd(0.5)),
    ]


POINT = {"a": 0.1 * jnp.ones(3), "b": jnp.full(3, 7.0), "s": jnp.linspace(-1, 1, 8)}


def hand(s):
    p = descend(first, "a", {**POINT, "s": s})
    return last(descend(second, "b", {**p, "b": jnp.cos(p["a"])}), None)


def test_fine_tuning_starts_from_the_pretrained_level():
    """Value and gradient against the loops by hand; what `params` says of the level counts for
    nothing."""
    fn = bx.value_and_multilevel_grad(finetuned(H.unrolled()))
    found = jax.jit(fn)(POINT)
    np.testing.assert_allclose(found.value, hand(POINT["s"]), rtol=1e-12)
    np.testing.assert_allclose(found.grad, jax.grad(hand)(POINT["s"]), rtol=1e-10)
    assert "db/da by unrolled" in repr(bx.explain(finetuned(H.unrolled()), POINT))


@pytest.mark.slow
def test_the_second_derivative_passes_through_the_start():
    direction, fn = jnp.sin(jnp.arange(8.0)), bx.value_and_multilevel_grad(finetuned(H.unrolled()))
    twice = jax.grad(lambda s: fn({**POINT, "s": s}).grad @ direction)(POINT["s"])
    np.testing.assert_allclose(
        twice, jax.grad(lambda s: jax.grad(hand)(s) @ direction)(POINT["s"]), rtol=1e-8
    )


@pytest.mark.slow
def test_every_step_of_a_run_starts_there():
    out = bx.solve_multilevel(finetuned(H.unrolled()), POINT, num_steps=3, keep="last")
    fn, params, values = jax.jit(bx.value_and_multilevel_grad(finetuned(H.unrolled()))), POINT, []
    for _ in range(3):
        est = fn(params)
        values.append(float(est.value))
        params = {
            **params,
            **est.inner_params,
            "b": jnp.zeros(3),
            "s": params["s"] - 0.5 * est.grad,
        }
    np.testing.assert_allclose(out.history["value"], values, rtol=1e-12)


def adapt(p, batch):
    return jnp.mean((jnp.tanh(X @ p["w"]) - Y) ** 2) + 0.05 * jnp.sum(p["w"] ** 2 * p["x"])


def meta(p, batch):
    return jnp.mean((jnp.tanh(X @ p["w"]) - Y + 0.2) ** 2) + 0.5 * jnp.sum((p["m"] - p["x"]) ** 2)


@pytest.mark.slow
def test_a_level_inside_another_starts_at_it():
    """MAML as the middle of three levels: the adapted weights start at the middle one, which the
    top one steers."""
    levels = [
        bx.Level("w", adapt, solver=SGD, hypergradient=H.unrolled(), start=lambda p: p["m"]),
        bx.Level("m", meta, solver=SGD, hypergradient=H.unrolled()),
        bx.Level("x", lambda p, b: jnp.sum(p["m"] ** 2) + p["x"] @ p["w"], solver=optax.sgd(0.1)),
    ]
    point = {"w": jnp.zeros(3), "m": 0.2 * jnp.ones(3), "x": jnp.array([0.5, 1.0, -0.5])}

    def adapted(m, x):
        return descend(adapt, "w", {"w": m, "x": x})["w"]

    def hand(x):
        m = point["m"]
        for _ in range(K):
            m = m - RATE * jax.grad(lambda m: meta({"w": adapted(m, x), "m": m, "x": x}, None))(m)
        return jnp.sum(m**2) + x @ adapted(m, x)

    found = jax.jit(bx.value_and_multilevel_grad(levels))(point)
    np.testing.assert_allclose(found.value, hand(point["x"]), rtol=1e-10)
    np.testing.assert_allclose(found.grad, jax.grad(hand)(point["x"]), rtol=1e-8)


def test_two_levels_are_those_of_solve_bilevel():
    """iMAML, whose start has no derivative, and the gradient comes through the proximal term; a
    start that draws, resumed to the bit."""
    near = lambda w, m, b: jnp.sum((jnp.cos(w) - 0.3) ** 2) + 0.5 * jnp.sum((w - m) ** 2)
    query = lambda w, m, b: jnp.sum((jnp.cos(w) - 0.3) ** 2) + 0.1 * jnp.sum(m**2)
    solver, method, m = bx.inner.optax(optax.sgd(0.2), 20), H.implicit(), jnp.full(2, 0.5)
    level = lambda start: [
        bx.Level(
            "w",
            lambda p, b: near(p["w"], p["m"], b),
            solver=solver,
            hypergradient=method,
            start=start,
        ),
        bx.Level("m", lambda p, b: query(p["w"], p["m"], b), solver=optax.sgd(0.1)),
    ]
    keywords = dict(keep="last", key=jax.random.key(3))
    params = {"w": jnp.zeros(2), "m": m}
    out = bx.solve_multilevel(level(lambda p: p["m"]), params, num_steps=3, **keywords)
    algorithm = bx.algorithms.double_loop(solver, method, optax.sgd(0.1))
    two = bx.solve_bilevel(
        near,
        query,
        jnp.zeros(2),
        m,
        algorithm=algorithm,
        inner_init=lambda m: m,
        num_steps=3,
        **keywords,
    )
    np.testing.assert_allclose(out.history["value"], two.history["value"], rtol=1e-9)

    draws = level(lambda p, key: p["m"] + jax.random.normal(key, (2,)))
    whole = bx.solve_multilevel(draws, params, num_steps=4, **keywords)
    assert len(set(whole.history["w/inner_value"].tolist())) == 4
    part = bx.solve_multilevel(draws, params, num_steps=2, **keywords)
    rest = bx.solve_multilevel(draws, params, num_steps=2, state=part.state, keep="last")
    np.testing.assert_array_equal(whole.history["value"][2:], rest.history["value"])
    with pytest.raises(
        ValueError, match="key: got None although the start of level 'w' takes a key"
    ):
        bx.solve_multilevel(draws, params, num_steps=1)


@pytest.mark.parametrize("method", [H.unrolled(), H.one_step()], ids=["unrolled", "one_step"])
def test_a_start_may_take_another_level_s_statistics(method):
    """A fine-tuned network goes on from the pretrained one's running mean, which is differentiated
    where the method sees it, and is said to be constant where it does not."""
    pretrain = bx.objective(
        lambda p, batch, state: (
            0.5 * (p["w"] - p["x"]) ** 2,
            {"w": 0.5 * state["w"] + 0.5 * p["w"] * p["x"]},
        ),
        stateful=True,
    )
    tune = bx.objective(
        lambda p, batch, state: (
            0.5 * (p["v"] - 1.0) ** 2,
            {"v": 0.5 * state["v"] + 0.5 * p["v"]},
        ),
        stateful=True,
    )
    judge = bx.objective(lambda p, batch, state: (p["v"] * state["v"], state), stateful=True)
    levels = [
        bx.Level("w", pretrain, solver=SGD, hypergradient=method),
        bx.Level(
            "v",
            tune,
            solver=SGD,
            hypergradient=H.unrolled(),
            start=lambda p, model_state: (p["w"], {"v": model_state["w"]}),
        ),
        bx.Level("x", judge, solver=optax.sgd(0.1)),
    ]
    point = {"w": jnp.asarray(0.3), "v": jnp.asarray(9.0), "x": jnp.asarray(1.2)}
    states = {"w": {"w": jnp.asarray(0.2)}, "v": {"v": jnp.asarray(7.0)}}

    def hand(x, w, mean):
        for _ in range(K):
            w, mean = w - RATE * (w - x), 0.5 * mean + 0.5 * w * x
        v, own = w, mean
        for _ in range(K):
            v, own = v - RATE * (v - 1.0), 0.5 * own + 0.5 * v
        return v * own, (w, mean)

    fn = bx.value_and_multilevel_grad(levels)
    out = fn(point, state=fn.init(point, model_state=states))
    np.testing.assert_allclose(out.value, hand(1.2, 0.3, 0.2)[0], rtol=1e-12)
    said = results.warnings_in(out.info["warnings"])
    assert (bx.RESULTS.statistics_constant in said) == (not method.sees_model)
    if method.sees_model:
        run = bx.solve_multilevel(levels, point, model_state=states, num_steps=3, keep="last")
        x, warm, values = 1.2, (0.3, 0.2), []
        for _ in range(3):
            (value, warm), grad = jax.value_and_grad(hand, has_aux=True)(x, *warm)
            x, values = x - 0.1 * grad, [*values, (value, abs(grad))]
        found = np.stack([run.history["value"], run.history["grad_norm"]], 1)
        np.testing.assert_allclose(found, values, rtol=1e-10)


@pytest.mark.slow
def test_a_start_may_bring_a_model_state():
    """A running mean that begins at the top level's variable: it is differentiated where the method
    sees statistics."""

    def kept(p, batch, state):
        mean = 0.5 * state["w"] + 0.5 * p["w"]
        return 0.5 * (p["w"] - p["x"]) ** 2, {"w": mean}

    levels = [
        bx.Level(
            "w",
            bx.objective(kept, stateful=True),
            solver=SGD,
            hypergradient=H.unrolled(),
            start=lambda p: (2.0 * p["x"], {"w": p["x"] ** 2}),
        ),
        bx.Level(
            "x",
            bx.objective(lambda p, b, state: (p["w"] * state["w"], state), stateful=True),
            solver=optax.sgd(0.1),
        ),
    ]

    def hand(x):
        w, mean = 2.0 * x, x**2
        for _ in range(K):
            w, mean = w - RATE * (w - x), 0.5 * mean + 0.5 * w
        return w * mean

    fn, point = bx.value_and_multilevel_grad(levels), {"w": jnp.asarray(0.0), "x": jnp.asarray(1.3)}
    found = fn(point, state=fn.init(point, model_state={"w": {"w": jnp.asarray(0.0)}}))
    np.testing.assert_allclose((found.value, found.grad), jax.value_and_grad(hand)(1.3), rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(start=3), "start: got int 3; expected a function"),
        (dict(start=lambda p: p["x"], every=2), "start: got one with every=2"),
        (dict(start=lambda p: jnp.zeros(2)), r"start: got float64\[2\]; expected float64\[\]"),
        (dict(), r"params\['x'\]\['start'\]: no level's objective reads it, and no start"),
        (
            dict(start=lambda p: p["x"]["start"]),
            r"start: it depends on params\['x'\]\['start'\], which no objective reads, with "
            r"implicit",
        ),
    ],
    ids=["no function", "every", "shape", "unread", "unseen"],
)
def test_starts_that_cannot_be(changes, words):
    def make():
        return [
            bx.Level(
                "w",
                lambda p, b: (p["w"] - p["x"]["t"]) ** 2,
                solver=SGD,
                hypergradient=H.implicit(),
                **changes,
            ),
            bx.Level("x", lambda p, b: p["w"] ** 2, solver=optax.sgd(0.1)),
        ]

    with pytest.raises((TypeError, ValueError), match=words):
        bx.solve_multilevel(
            make(),
            {"w": jnp.asarray(0.0), "x": {"t": jnp.asarray(1.0), "start": jnp.asarray(1.0)}},
            num_steps=1,
        )
