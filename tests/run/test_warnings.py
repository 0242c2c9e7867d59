"""What is rough is a warning and goes on; where no number can come the run ends; nothing of either
is silent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import linear
from bilevax.results import WARNINGS, strictness, warnings_in

RESULTS = bx.RESULTS
STILL = bx.inner.optax(optax.set_to_zero(), 1)


# ---- the mask itself


def test_masks_count_by_kind_and_lane():
    bit = {code: 1 << place for place, code in enumerate(WARNINGS)}
    cut, curved = bit[RESULTS.adjoint_not_converged], bit[RESULTS.negative_curvature]
    assert warnings_in([0, cut, cut | curved]) == {
        RESULTS.adjoint_not_converged: 2,
        RESULTS.negative_curvature: 1,
    }
    lanes = warnings_in([[0, cut], [curved, curved]])
    assert {code: n.tolist() for code, n in lanes.items()} == {
        RESULTS.adjoint_not_converged: [1, 0],
        RESULTS.negative_curvature: [0, 2],
    }
    traced = jax.jit(warnings_in)(jnp.asarray([cut, cut, 0]))
    assert (
        int(traced[RESULTS.adjoint_not_converged]) == 2
        and int(traced[RESULTS.negative_curvature]) == 0
    )


@pytest.mark.parametrize("strict", ["all", 3, {"negative_curvature"}, {RESULTS.inner_nonfinite}])
def test_strict_refuses_what_is_no_warning(strict):
    with pytest.raises((TypeError, ValueError), match="^strict: got"):
        strictness(strict)
    with pytest.raises((TypeError, ValueError), match="^strict: got"):
        bx.solve_bilevel(curved, fit, jnp.zeros(2), jnp.zeros(2), num_steps=1, strict=strict)


# ---- adjoints


def stiff(condition):
    """A diagonal quadratic whose hypergradient is known: ``B' D⁻¹ t``."""
    rng, n = np.random.default_rng(0), 300
    d, mixing = np.logspace(0, -np.log10(condition), n), rng.standard_normal((n, 2))
    t = rng.standard_normal(n) * np.sqrt(d)
    inner = lambda y, x, batch: 0.5 * jnp.sum(d * y**2) - y @ mixing @ x
    return (
        inner,
        lambda y, x, batch: y @ t,
        jnp.asarray(mixing @ np.ones(2) / d),
        mixing.T @ (t / d),
    )


@pytest.mark.turns
@pytest.mark.parametrize("solver", [None, linear.minres()], ids=["cg", "minres"])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_an_adjoint_above_its_tolerance_is_said(solver, condition):
    inner, outer, y, want = stiff(condition)
    fn = bx.value_and_hypergrad(
        inner, outer, solver=STILL, hypergradient=bx.hypergradient.implicit(solver)
    )
    est = jax.jit(fn)(y, jnp.ones(2))
    error = float(jnp.linalg.norm(est.grad - want) / np.linalg.norm(want))
    assert int(est.info["code"]) == 0
    if condition == 1e2:
        assert error < 1e-4 and int(est.info["warnings"]) == 0
    else:
        assert error > 0.3 and RESULTS.adjoint_not_converged in warnings_in(est.info["warnings"])


@pytest.mark.parametrize("c", [0.0, 0.3, 0.49, 0.6])
def test_a_singular_system_with_a_usable_answer_is_said(c):
    inner = lambda y, x, batch: 0.5 * (y[0] + y[1] - x) ** 2
    outer = lambda y, x, batch: y[0] + y[1] + c * (y[0] - y[1])
    fn = bx.value_and_hypergrad(
        inner,
        outer,
        solver=bx.inner.optax(optax.sgd(0.5), 20),
        hypergradient=bx.hypergradient.implicit(),
    )
    est = fn(jnp.zeros(2), jnp.asarray(1.0))
    said = warnings_in(est.info["warnings"])
    assert (abs(float(est.grad) - 1) < 1e-9 and not said) or RESULTS.adjoint_breakdown in said
    assert bool(said) == (c > 0)


def test_a_singular_system_without_any_answer_is_a_failure():
    inner = lambda y, x, batch: 0.5 * (y[0] - x) ** 2 + 0.0 * y[1]
    fn = bx.value_and_hypergrad(
        inner, lambda y, x, batch: y[1], solver=STILL, hypergradient=bx.hypergradient.implicit()
    )
    est = fn(jnp.ones(2), jnp.asarray(1.0))
    assert int(est.info["code"]) == RESULTS.adjoint_breakdown and np.isnan(est.grad)


def test_an_accepted_residual_is_no_warning():
    inner, outer, y, _ = stiff(1e4)
    rough = lambda bound: bx.hypergradient.implicit(linear.cg(maxiter=20), max_residual=bound)
    fn = lambda bound: bx.value_and_hypergrad(
        inner, outer, solver=STILL, hypergradient=rough(bound)
    )(y, jnp.ones(2))
    assert int(fn(1e-3).info["warnings"]) != 0
    assert int(fn(jnp.inf).info["warnings"]) == 0


def test_curvature_that_is_negative_at_once_leaves_the_warm_start():
    """The first direction is negative: the adjoint of the call before, if it is better than none,
    else zero."""
    inner = lambda y, x, batch: 0.5 * x[0] * jnp.sum(y**2) + y @ x[1:]
    fn = bx.value_and_hypergrad(
        inner,
        lambda y, x, batch: jnp.sum(y),
        solver=STILL,
        hypergradient=bx.hypergradient.implicit(),
    )
    y, state = jnp.zeros(2), None
    cold = fn(y, jnp.asarray([-1.0, 0.0, 0.0]))
    assert RESULTS.negative_curvature in warnings_in(cold.info["warnings"])
    np.testing.assert_array_equal(cold.grad, 0.0)
    state = fn(y, jnp.asarray([1.0, 0.0, 0.0])).state
    warm = fn(
        y, jnp.asarray([-1.0, 0.0, 0.0]), state=state
    )  # q = 1 there: twice as far off as zero is
    np.testing.assert_array_equal(warm.grad, 0.0)


# ---- runs


def network(key=0):
    rng = np.random.default_rng(key)
    x, y = (
        rng.standard_normal((64, 4)).astype(np.float32),
        rng.standard_normal((64, 1)).astype(np.float32),
    )
    start = {
        "a": jnp.asarray(rng.standard_normal((4, 16)) / 2, jnp.float32),
        "b": jnp.asarray(rng.standard_normal((16, 1)) / 4, jnp.float32),
    }

    def loss(w, penalty, batch):
        return jnp.mean((jnp.tanh(batch[0] @ w["a"]) @ w["b"] - batch[1]) ** 2)

    def inner(w, penalty, batch):
        return loss(w, penalty, batch) + sum(
            jnp.exp(penalty) * jnp.sum(leaf**2) for leaf in w.values()
        )

    return dict(inner_data=(x[:32], y[:32]), outer_data=(x[32:], y[32:])), inner, loss, start


@pytest.mark.turns
@pytest.mark.parametrize(
    "solver", [linear.cg(maxiter=5), linear.neumann(5)], ids=["cg5", "neumann5"]
)
def test_rough_solvers_train_a_network_to_the_end(solver):
    data, inner, loss, start = network()
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.05), 5), bx.hypergradient.implicit(solver), optax.adam(0.05)
    )
    out = bx.solve_bilevel(
        inner, loss, start, jnp.float32(-4.0), **data, algorithm=algorithm, num_steps=20
    )
    assert out.stats["steps"] == 20 and not out.result.failed
    assert out.warnings and set(out.warnings) <= {
        RESULTS.adjoint_not_converged,
        RESULTS.negative_curvature,
    }
    assert f"warnings: {next(iter(out.warnings)).name} in" in repr(out)
    assert np.array_equal(out.history["warnings"] != 0, out.history["warnings"] > 0)
    with pytest.raises(bx.SolveError, match=f"{next(iter(out.warnings)).name} at step"):
        bx.solve_bilevel(
            inner,
            loss,
            start,
            jnp.float32(-4.0),
            **data,
            algorithm=algorithm,
            num_steps=20,
            strict=True,
        )


curved = lambda y, x, batch: 0.5 * jnp.sum(jnp.asarray([1.0, 100.0]) * (y - x) ** 2)
fit = lambda y, x, batch: jnp.sum((y - 1.0) ** 2)
ROUGH = bx.algorithms.double_loop(
    bx.inner.lbfgs(), bx.hypergradient.implicit(linear.cg(maxiter=1)), optax.sgd(0.1)
)


@pytest.mark.turns
def test_strict_makes_a_failure_of_what_is_named_and_undoes_the_step():
    go = lambda **kw: bx.solve_bilevel(
        curved, fit, jnp.zeros(2), jnp.zeros(2), algorithm=ROUGH, num_steps=4, throw=False, **kw
    )
    plain, other, strict = (
        go(),
        go(strict={RESULTS.negative_curvature}),
        go(strict={RESULTS.adjoint_not_converged}),
    )
    assert plain.result is other.result is RESULTS.success and plain.warnings == other.warnings == {
        RESULTS.adjoint_not_converged: 4
    }
    assert (
        strict.result is RESULTS.adjoint_not_converged
        and strict.stats["steps"] == 0
        and strict.stats["failed_steps"] == 1
    )
    np.testing.assert_array_equal(strict.state.algorithm.outer, 0.0)
    assert strict.history["code"].tolist() == [RESULTS.adjoint_not_converged]


def test_an_unsolved_lower_level_is_a_warning_and_strict_a_failure():
    """The smallest code numbers are no exception."""
    slow = bx.algorithms.double_loop(
        bx.inner.gradient_descent(maxiter=2, tol=1e-9), bx.hypergradient.implicit(), optax.sgd(0.1)
    )
    go = lambda **kw: bx.solve_bilevel(
        curved, fit, jnp.zeros(2), jnp.zeros(2), algorithm=slow, num_steps=3, throw=False, **kw
    )
    plain = go()
    assert plain.result is RESULTS.success and RESULTS.inner_not_converged in plain.warnings
    strict = go(strict={RESULTS.inner_not_converged})
    assert (
        strict.result is RESULTS.inner_not_converged
        and strict.result.failed
        and strict.stats["failed_steps"] == 1
    )


def test_a_step_with_a_warning_is_never_converged():
    centred = lambda y, x, batch: jnp.sum(y**2) + jnp.sum(x**2)
    go = lambda **kw: bx.solve_bilevel(
        curved, centred, jnp.ones(2), jnp.ones(2), num_steps=300, tol=1e-3, keep="last", **kw
    )
    exact = bx.algorithms.double_loop(
        bx.inner.lbfgs(), bx.hypergradient.implicit(linear.cg()), optax.sgd(0.1)
    )
    assert go(algorithm=exact).result is RESULTS.converged
    crude = bx.algorithms.double_loop(
        bx.inner.lbfgs(), bx.hypergradient.implicit(linear.identity(0.01)), optax.sgd(0.1)
    )
    assert go(algorithm=crude).result is RESULTS.tolerance_not_met


@pytest.mark.turns
def test_lanes_have_their_own_warnings():
    def run(scale):
        inner = lambda y, x, batch: 0.5 * jnp.sum(batch * (y - x) ** 2)
        start = dict(
            inner_params=jnp.zeros(2), outer_params=jnp.zeros(2), inner_data=jnp.stack([1.0, scale])
        )
        return bx.solve_bilevel(inner, fit, **start, algorithm=ROUGH, num_steps=3)

    out = jax.vmap(run)(jnp.asarray([1.0, 50.0, 1.0, 500.0]))
    counts = out.warnings[RESULTS.adjoint_not_converged]
    assert [bool(n) for n in counts] == [False, True, False, True]


@pytest.mark.turns
def test_levels_say_what_is_rough_of_each():
    levels = [
        bx.Level(
            "y",
            lambda p, b: curved(p["y"], p["x"], b),
            solver=bx.inner.lbfgs(),
            hypergradient=bx.hypergradient.implicit(linear.cg(maxiter=1)),
        ),
        bx.Level("x", lambda p, b: fit(p["y"], p["x"], b), solver=optax.sgd(0.1)),
    ]
    params = {"y": jnp.zeros(2), "x": jnp.zeros(2)}
    out = bx.solve_multilevel(levels, params, num_steps=3)
    assert (
        out.warnings == {RESULTS.adjoint_not_converged: 3}
        and (out.history["y/warnings"] == out.history["warnings"]).all()
    )
    strict = bx.solve_multilevel(levels, params, num_steps=3, strict=True, throw=False)
    assert strict.result is RESULTS.adjoint_not_converged
    est = bx.value_and_multilevel_grad(levels, strict=True)(params)
    assert np.isnan(est.grad).all() and int(est.info["code"]) == RESULTS.adjoint_not_converged


# ---- a loop that reads no codes cannot go on unknowing


def test_a_failure_is_nan_in_the_gradient_and_leaves_the_state():
    blows = lambda y, x, batch: jnp.sum(x * y**4)
    fn = bx.value_and_hypergrad(
        blows,
        fit,
        solver=bx.inner.optax(optax.sgd(10.0), 8),
        hypergradient=bx.hypergradient.implicit(),
    )

    def step(start):
        y, state = jnp.full(2, start), fn.init(jnp.ones(2))
        state = state._replace(method=state.method._replace(adjoint=jnp.asarray([3.0, 4.0])))
        return fn(y, jnp.ones(2), state=state)

    out = jax.vmap(step)(jnp.asarray([0.2, 0.1, 10.0, 0.05]))
    assert (out.info["code"] >= 10).tolist() == [False, False, True, False]
    assert np.isnan(out.grad[2]).all() and np.isfinite(out.grad[np.asarray([0, 1, 3])]).all()
    np.testing.assert_array_equal(out.state.method.adjoint[2], [3.0, 4.0])
    assert out.state.step.tolist() == [1, 1, 0, 1]


@pytest.mark.turns
def test_statistics_that_matter_and_are_held_constant_are_said():
    inner = bx.objective(
        lambda y, x, batch, model: (jnp.sum((y - x) ** 2), {"mean": 0.9 * model["mean"] + 0.1 * y}),
        stateful=True,
    )
    reads = bx.objective(
        lambda y, x, batch, model: (jnp.sum((y - model["mean"]) ** 2), model), stateful=True
    )
    for outer, said in ((reads, True), (fit, False)):
        fn = bx.value_and_hypergrad(
            inner,
            outer,
            solver=bx.inner.optax(optax.sgd(0.1), 2),
            hypergradient=bx.hypergradient.implicit(),
        )
        est = fn(
            jnp.zeros(2),
            jnp.ones(2),
            state=fn.init(jnp.zeros(2), model_state={"mean": jnp.zeros(2)}),
        )
        assert (RESULTS.statistics_constant in warnings_in(est.info["warnings"])) is said


def test_argmin_takes_an_unsolved_point_only_where_asked():
    value = lambda y, x: jnp.sum(jnp.asarray([1.0, 100.0]) * (y - x) ** 2)
    short = bx.inner.gradient_descent(maxiter=2, tol=1e-9)
    assert np.isnan(bx.argmin(value, short)(jnp.zeros(2), jnp.ones(2))).all()
    y, info = bx.argmin(value, short, strict=False).with_info(jnp.zeros(2), jnp.ones(2))
    assert int(info.code) == 0 and warnings_in(info.warnings) == {RESULTS.inner_not_converged: 1}
    np.testing.assert_array_equal(
        bx.argmin(value, short, strict=False)(jnp.zeros(2), jnp.ones(2)), y
    )
    np.testing.assert_array_equal(
        bx.argmin(value, short, strict={RESULTS.no_step_accepted})(jnp.zeros(2), jnp.ones(2)), y
    )
