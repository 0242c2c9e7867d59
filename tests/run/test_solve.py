"""solve_bilevel: resuming, keeping, stopping, failing, watching, and the leaves and states that
ride along."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize_scalar

import bilevax as bx
from bilevax import RESULTS, tree

SGD = bx.tunable(optax.sgd, learning_rate=0.5)
LOOP = bx.algorithms.double_loop(
    bx.inner.optax(SGD, 3),
    bx.hypergradient.implicit(bx.linear.cg(tol=1e-10)),
    bx.tunable(optax.adam, learning_rate=0.1),
)


def g(y, x, batch):
    return 0.5 * jnp.mean((batch["x"] @ y - batch["y"]) ** 2) + 0.5 * jnp.exp(x) * y @ y


def f(y, x, batch):
    return 0.5 * jnp.mean((batch["x"] @ y - batch["y"]) ** 2)


def split_data(seed=3, n=24, d=3):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=d)
    parts = []
    for _ in range(2):
        x = rng.normal(size=(n, d))
        parts.append({"x": x, "y": x @ w + rng.normal(size=n)})
    return parts


TRAIN, VALID = split_data()
START = dict(inner_params=jnp.zeros(3), outer_params=jnp.asarray(-1.0))


def run(num_steps=100, **kwargs):
    arguments = {
        **START,
        "inner_data": TRAIN,
        "outer_data": VALID,
        "algorithm": LOOP,
        "num_steps": num_steps,
        **kwargs,
    }
    return bx.solve_bilevel(g, f, **arguments)


def same_bits(a, b):
    return all(
        (np.asarray(u) == np.asarray(v)).all()
        for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def values(state):
    return state._replace(key=None if state.key is None else jax.random.key_data(state.key))


@pytest.mark.turns
@pytest.mark.parametrize(
    "data",
    [TRAIN, bx.data.minibatches(TRAIN, 5), bx.data.minibatches(TRAIN, 5, replace=True)],
    ids=["full", "epoch", "replace"],
)
def test_fifty_and_fifty_equal_a_hundred_to_the_bit(data):
    keywords = dict(inner_data=data, key=jax.random.key(1))
    whole = run(100, **keywords)
    first = run(50, **keywords)
    second = run(50, **keywords, state=first.state)
    assert same_bits(values(whole.state), values(second.state))
    assert same_bits(
        (whole.inner_params, whole.outer_params), (second.inner_params, second.outer_params)
    )
    assert (
        np.concatenate([first.history["value"], second.history["value"]]) == whole.history["value"]
    ).all()
    assert second.stats["total_steps"] == 100 and second.stats["steps"] == 50


def test_the_solution_is_the_problem_s():
    """Against the closed form's own minimum over the penalty, by Brent's method."""
    solution = run(400)

    def value(lam):
        n, d = TRAIN["x"].shape
        w = np.linalg.solve(
            TRAIN["x"].T @ TRAIN["x"] / n + np.exp(lam) * np.eye(d), TRAIN["x"].T @ TRAIN["y"] / n
        )
        return 0.5 * np.mean((VALID["x"] @ w - VALID["y"]) ** 2)

    best = minimize_scalar(value, bounds=(-4, 1), options={"xatol": 1e-9}).fun
    assert abs(float(solution.history["value"][-1]) - best) < 1e-6 * best
    assert solution.result is RESULTS.success


def test_sampled_runs_repeat_and_differ_by_key():
    data = bx.data.minibatches(TRAIN, 5)
    one, same, other = (run(30, inner_data=data, key=jax.random.key(k)) for k in (0, 0, 1))
    assert same_bits(one.outer_params, same.outer_params) and not same_bits(
        one.outer_params, other.outer_params
    )


def test_keep_best_and_last():
    best, last = (
        run(40, keep=k) for k in ("best", "last")
    )  # an inner solve that lags behind passes below the best value on its way
    assert best.stats["best_step"] == int(best.history["value"].argmin()) < 39
    kept = f(best.inner_params, best.outer_params, jax.tree.map(jnp.asarray, VALID))
    assert abs(float(kept) - best.history["value"].min()) < 1e-12
    assert same_bits(last.outer_params, last.state.algorithm.outer) and not same_bits(
        last.outer_params, best.outer_params
    )


def test_tolerance():
    met, missed = run(2000, tol=1e-3), run(5, tol=1e-9)
    assert met.result is RESULTS.converged and met.stats["steps"] < 2000
    assert (
        met.history["grad_norm"][-1]
        <= 1e-3 * met.history["grad_norm"][0]
        < met.history["grad_norm"][-2]
    )
    assert missed.result is RESULTS.tolerance_not_met


# ---- failures


def test_a_diverging_lower_level():
    hot = bx.algorithms.double_loop(
        bx.inner.optax(bx.tunable(optax.sgd, learning_rate=3e120), 3),
        bx.hypergradient.implicit(),
        optax.sgd(0.1),
    )
    with pytest.raises(
        bx.SolveError, match=r"inner_nonfinite at step 0.*smaller inner step"
    ) as caught:
        run(10, algorithm=hot)
    assert caught.value.solution.result is RESULTS.inner_nonfinite
    assert same_bits(caught.value.solution.outer_params, START["outer_params"])


def test_divergence_on_the_way_keeps_the_best_and_the_last_good_state():
    """A constant hypergradient drives the penalty up until the inner step diverges."""
    outer = lambda y, x, b: f(y, x, b) - 10.0 * x
    rising = bx.algorithms.double_loop(
        bx.inner.optax(SGD, 200),
        bx.hypergradient.implicit(),
        bx.tunable(optax.sgd, learning_rate=0.05),
    )
    out = bx.solve_bilevel(
        g,
        outer,
        **START,
        inner_data=TRAIN,
        outer_data=VALID,
        algorithm=rising,
        num_steps=300,
        throw=False,
    )
    assert out.result is RESULTS.inner_nonfinite
    assert 0 < out.stats["steps"] < 300 and len(out.history["code"]) == out.stats["steps"] + 1
    assert np.isfinite(np.asarray(out.inner_params)).all() and tree.all_finite(out.state.algorithm)
    assert out.stats["best_step"] == int(np.nanargmin(out.history["value"]))
    assert float(out.outer_params) < float(out.state.algorithm.outer)


def test_an_adjoint_that_does_not_converge():
    stiff = lambda y, x, batch: 0.5 * jnp.sum(jnp.asarray([1.0, 1e3, 1e6]) * (y - x) ** 2)
    rough = bx.algorithms.double_loop(
        bx.inner.lbfgs(), bx.hypergradient.implicit(bx.linear.cg(maxiter=1)), optax.sgd(0.1)
    )
    out = bx.solve_bilevel(
        stiff,
        lambda y, x, b: jnp.sum(y**2),
        jnp.ones(3),
        jnp.ones(3),
        algorithm=rough,
        num_steps=5,
        throw=False,
    )
    assert out.result is RESULTS.success and out.stats["steps"] == 5
    assert (
        out.history["adjoint_residual"][0] > 0.5 and RESULTS.adjoint_not_converged in out.warnings
    )


def test_a_saddle_is_reported_as_negative_curvature():
    saddle = lambda y, x, batch: 0.5 * (y[0] ** 2 - y[1] ** 2) + y[1] * x
    loop = bx.algorithms.double_loop(
        bx.inner.optax(SGD, 1), bx.hypergradient.implicit(), optax.sgd(0.1)
    )
    out = bx.solve_bilevel(
        saddle,
        lambda y, x, b: y[1] ** 2 + x,
        jnp.zeros(2),
        jnp.asarray(1.0),
        algorithm=loop,
        num_steps=5,
        throw=False,
    )
    assert out.result is RESULTS.success and out.warnings[RESULTS.negative_curvature] == 5


@pytest.mark.parametrize("which", ["inner_data", "outer_data", "hyper_data"])
def test_a_nan_in_a_batch_is_blamed_on_the_batch(which):
    bad = {**VALID, "y": np.where(np.arange(24) == 7, np.nan, VALID["y"])}
    out = run(10, **{which: bad}, throw=False)
    assert out.result is RESULTS.nonfinite_batch
    assert tree.all_finite((out.inner_params, out.outer_params))


def test_a_nan_in_one_sampled_batch_stops_there():
    bad = {**TRAIN, "y": np.where(np.arange(24) == 7, np.nan, TRAIN["y"])}
    out = run(200, inner_data=bx.data.minibatches(bad, 1), key=jax.random.key(0), throw=False)
    assert out.result is RESULTS.nonfinite_batch and np.isfinite(float(out.outer_params))


def test_outer_nonfinite():
    out = bx.solve_bilevel(
        g,
        lambda y, x, b: f(y, x, b) - jnp.log(-x - 0.9),
        **START,
        inner_data=TRAIN,
        outer_data=VALID,
        num_steps=500,
        throw=False,
        algorithm=bx.algorithms.double_loop(
            bx.inner.optax(SGD, 2),
            bx.hypergradient.implicit(),
            bx.tunable(optax.sgd, learning_rate=-1.0),
        ),
    )
    assert out.result is RESULTS.outer_nonfinite


def test_hypergradient_nonfinite():
    out = bx.solve_bilevel(
        g,
        lambda y, x, b: f(y, x, b) + jnp.sqrt(x + 1.0),
        **START,
        inner_data=TRAIN,
        outer_data=VALID,
        num_steps=5,
        throw=False,
        algorithm=LOOP,
    )
    assert out.result is RESULTS.hypergradient_nonfinite


def test_every_code_has_advice():
    for code in RESULTS:
        assert len(code.message) > 15
        if code.failed:
            assert (
                "try" in code.message.lower()
                or "check" in code.message.lower()
                or "cures" in code.message.lower()
            ), code


# ---- watching


def test_callbacks_see_the_run_and_can_stop_it():
    seen = []
    out = run(
        100,
        callbacks=[
            bx.callbacks.every(
                10, lambda e: seen.append((e.step, len(e.history["value"]))) or e.step >= 50
            )
        ],
    )
    assert seen == [(k, k) for k in (10, 20, 30, 40, 50)]
    assert out.result is RESULTS.stopped and out.stats["steps"] == 50


def test_an_error_in_a_callback_loses_nothing():
    def broken(event):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as caught:
        run(100, callbacks=[bx.callbacks.every(20, broken)])
    assert caught.value.solution.stats["steps"] == 20


def test_early_stopping_by_a_held_out_metric():
    metric = bx.metrics(
        lambda y, x, d: {"distance": jnp.abs(x - d)}, np.float64(-1.5), every=2, select="distance"
    )
    steps = bx.algorithms.double_loop(
        bx.inner.optax(SGD, 2),
        bx.hypergradient.implicit(),
        bx.tunable(optax.sgd, learning_rate=0.0),
    )
    moving = run(
        300, metrics=metric, callbacks=[bx.callbacks.early_stopping("distance", patience=20)]
    )
    still = run(
        300,
        metrics=metric,
        algorithm=steps,
        callbacks=[bx.callbacks.early_stopping("distance", patience=20)],
    )
    assert still.result is RESULTS.stopped and still.stats["steps"] == 30
    column = moving.history["distance"]
    assert np.isnan(column[1::2]).all() and np.isfinite(column[::2]).all()
    assert moving.stats["best_step"] == int(np.nanargmin(column))
    assert abs(abs(float(moving.outer_params) + 1.5) - np.nanmin(column)) < 1e-12


def test_progress_bar(capsys):
    run(40, progress=True)
    assert "40/40" in capsys.readouterr().err
    run(40)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_bar_s_rate_leaves_out_what_was_done_before_its_first_look(monkeypatch):
    """Compilation, and the steps of a checkpoint, which took no time at all."""
    made = []

    class Bar:
        def __init__(self, total, initial, unit):
            made.append(self)
            self.n = self.initial = initial

        def update(self, steps):
            self.n += steps

        def set_postfix(self, **values):
            self.shown = values

        def close(self):
            self.closed = True

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    run(40, progress=True)
    (bar,) = made
    assert 0 < bar.initial <= bar.n == 40 and bar.closed and set(bar.shown) == {"value", "grad"}


def test_aux_of_both_objectives_is_a_column():
    """The inner one's is that of the last inner step: at the second of three descents' points."""
    out = bx.solve_bilevel(
        bx.objective(
            lambda y, x, b: (g(y, x, b), {"norm": y @ y, "fit": f(y, x, b)}), has_aux=True
        ),
        bx.objective(lambda y, x, b: (f(y, x, b), {"norm": y @ y}), has_aux=True),
        **START,
        inner_data=TRAIN,
        outer_data=VALID,
        algorithm=LOOP,
        num_steps=7,
    )
    assert out.history["aux"]["norm"].shape == (7,)
    y = START["inner_params"]
    for _ in range(2):
        y = y - 0.5 * jax.grad(g)(y, START["outer_params"], TRAIN)
    np.testing.assert_allclose(out.history["inner_aux"]["norm"][0], y @ y, rtol=1e-12)
    np.testing.assert_allclose(out.history["inner_aux"]["fit"][0], f(y, None, TRAIN), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [bx.hypergradient.unrolled(), bx.hypergradient.forward(), bx.hypergradient.sama()],
    ids=["unrolled", "forward", "sama"],
)
def test_an_inner_aux_changes_no_gradient(method):
    """And is reported by levels, too, under their names."""
    told, solver = (
        bx.objective(lambda y, x, b: (g(y, x, b), y), has_aux=True),
        bx.inner.optax(optax.sgd(0.1), 3),
    )
    one, two = (
        bx.value_and_hypergrad(fn, f, solver=solver, hypergradient=method)(
            jnp.zeros(3), -1.0, TRAIN, VALID
        )
        for fn in (g, told)
    )
    np.testing.assert_allclose(one.grad, two.grad, rtol=1e-12)
    levels = [
        bx.Level(
            "y",
            bx.objective(lambda p, b: (g(p["y"], p["x"], b), p["y"]), has_aux=True),
            solver=solver,
            hypergradient=method,
        ),
        bx.Level("x", lambda p, b: f(p["y"], p["x"], b), solver=optax.sgd(0.1)),
    ]
    out = bx.solve_multilevel(
        levels,
        {"y": jnp.zeros(3), "x": jnp.asarray(-1.0)},
        data={"y": TRAIN, "x": VALID},
        num_steps=2,
    )
    np.testing.assert_allclose(out.history["y/inner_aux"][0], two.info["inner_aux"], rtol=1e-12)


# ---- what rides along


def test_other_leaves_and_projection():
    params = {"w": jnp.zeros(3), "count": jnp.arange(2), "key": jax.random.key(5), "none": None}
    outer = {"lam": -1.0, "on": True}

    def inner_objective(y, x, batch):
        return g(y["w"], jnp.where(x["on"], x["lam"], 0.0), batch) + 0.0 * jnp.sum(
            y["count"]
        ).astype(float)

    out = bx.solve_bilevel(
        inner_objective,
        lambda y, x, b: f(y["w"], x, b),
        params,
        outer,
        inner_data=TRAIN,
        outer_data=VALID,
        algorithm=LOOP,
        num_steps=60,
        project=lambda x: {**x, "lam": jnp.clip(x["lam"], -1.1, 0.0)},
    )
    assert (
        out.inner_params["count"].tolist() == [0, 1]
        and out.inner_params["none"] is None
        and bool(out.outer_params["on"])
    )
    assert jnp.issubdtype(out.inner_params["key"].dtype, jax.dtypes.prng_key)
    plain = run(60, project=lambda x: jnp.clip(x, -1.1, 0.0))
    assert same_bits(out.outer_params["lam"], plain.outer_params)
    assert -1.1 <= float(plain.outer_params) <= 0.0


def test_inner_init_adds_the_derivative_of_the_start():
    """y0 = x and one step of size a on ½y'y + b'y: dy/dx = 1 − a through the start alone."""
    loop = bx.algorithms.double_loop(
        bx.inner.optax(bx.tunable(optax.sgd, learning_rate=0.25), 1),
        bx.hypergradient.unrolled(),
        bx.tunable(optax.sgd, learning_rate=1.0),
    )
    out = bx.solve_bilevel(
        lambda y, x, b: 0.5 * y @ y,
        lambda y, x, b: jnp.sum(y),
        jnp.zeros(2),
        jnp.ones(2),
        inner_init=lambda x: x,
        algorithm=loop,
        num_steps=1,
        keep="last",
    )
    assert out.outer_params.tolist() == [0.25, 0.25]


def test_model_state_moves_on_inner_steps_only():
    """A counter as model state: K a step, whatever the hypergradient evaluates."""

    def counted(y, x, batch, count):
        return g(y, x, batch), count + 1

    out = bx.solve_bilevel(
        bx.objective(counted, stateful=True),
        f,
        **START,
        inner_data=TRAIN,
        outer_data=VALID,
        algorithm=LOOP,
        num_steps=7,
        model_state=jnp.int32(0),
        keep="last",
    )
    assert int(out.model_state) == 21


@pytest.mark.parametrize("steps", [3, 16, 21, 40])
def test_iterables_give_the_same_as_arrays(steps):
    """A loader of the full batch equals the full batch; and the batches of a step do not depend on
    the chunks."""
    whole = run(steps)
    streamed = run(steps, inner_data=(TRAIN for _ in range(10_000)))
    assert np.allclose(whole.history["value"], streamed.history["value"], rtol=1e-12)


def test_an_iterable_that_ends():
    out = run(
        100, inner_data=iter([TRAIN] * 44)
    )  # three batches a step, the last of which serves the products, too
    assert out.result is RESULTS.data_exhausted and out.stats["steps"] == 14


def test_batches_of_an_iterable_arrive_in_order():
    counts = ({"n": np.float64(i)} for i in range(100))
    loop = bx.algorithms.double_loop(
        bx.inner.optax(bx.tunable(optax.sgd, learning_rate=1.0), 3),
        bx.hypergradient.unrolled(),
        optax.sgd(0.0),
    )
    out = bx.solve_bilevel(
        lambda y, x, b: 0.5 * (y - b["n"]) ** 2 + 0.0 * x * y,
        lambda y, x, b: y,
        jnp.asarray(0.0),
        jnp.asarray(0.0),
        inner_data=counts,
        algorithm=loop,
        num_steps=20,
    )
    assert out.history["value"].tolist() == [3.0 * t + 2 for t in range(20)]


# ---- under transformations


def test_vmap_over_step_sizes_equals_a_loop():
    def final(rate):
        loop = bx.algorithms.double_loop(
            bx.inner.optax(SGD, 3),
            bx.hypergradient.implicit(bx.linear.cg(tol=1e-10)),
            bx.tunable(optax.adam, learning_rate=rate),
        )
        return bx.solve_bilevel(
            g, f, **START, inner_data=TRAIN, outer_data=VALID, algorithm=loop, num_steps=20
        ).outer_params

    rates = jnp.array([0.01, 0.1, 0.3])
    assert np.allclose(
        jax.jit(jax.vmap(final))(rates), [final(float(r)) for r in rates], rtol=1e-10
    )


@pytest.mark.turns
def test_vmap_over_keys_and_problems():
    def final(key, shift):
        data = jax.tree.map(jnp.asarray, TRAIN)
        return bx.solve_bilevel(
            g,
            f,
            **START,
            inner_data=bx.data.minibatches({**data, "y": data["y"] + shift}, 6),
            outer_data=VALID,
            algorithm=LOOP,
            num_steps=10,
            key=key,
        ).outer_params

    keys, shifts = jax.random.split(jax.random.key(0), 3), jnp.arange(3.0)
    assert np.allclose(
        jax.jit(jax.vmap(final))(keys, shifts),
        [final(k, s) for k, s in zip(keys, shifts, strict=True)],
        rtol=1e-10,
    )


def test_float32_and_bfloat16_params_keep_their_dtypes():
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = functools.partial(jax.tree.map, lambda a, dtype=dtype: jnp.asarray(a, dtype))
        out = bx.solve_bilevel(
            g,
            f,
            cast(jnp.zeros(3)),
            cast(-1.0),
            inner_data=cast(TRAIN),
            outer_data=cast(VALID),
            algorithm=LOOP,
            num_steps=20,
        )
        assert out.inner_params.dtype == out.outer_params.dtype == dtype
        assert abs(float(out.history["value"].min()) - run(20).history["value"].min()) < (
            1e-3 if dtype == jnp.float32 else 0.05
        )


@pytest.mark.turns
def test_algorithm_none():
    solution = run(200, algorithm=None)
    assert abs(solution.history["value"][-1] - run(400).history["value"][-1]) < 1e-5
    sampled = run(
        50, algorithm=None, inner_data=bx.data.minibatches(TRAIN, 8), key=jax.random.key(0)
    )
    assert sampled.history["value"].min() < sampled.history["value"][0]
