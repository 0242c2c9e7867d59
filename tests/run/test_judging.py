"""What a step's numbers are worth: kept iterates, convergence, divergence, steps that leave the
finite numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

A = bx.algorithms
inner = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2)
one_step = A.double_loop(
    bx.inner.optax(optax.sgd(0.02), 1), bx.hypergradient.implicit(), optax.sgd(0.02)
)
solved = A.double_loop(
    bx.inner.optax(optax.sgd(0.5), 20), bx.hypergradient.implicit(), optax.sgd(0.3)
)
SINGLE = {
    "soba": A.soba(0.3, 0.1, decay=0.0),
    "ma_soba": A.ma_soba(0.3, 0.1),
    "saba": A.saba(0.3, 0.1),
    "s_tfbo": A.s_tfbo(),
}
each_single = pytest.mark.parametrize("name", SINGLE)


# ---- what is kept


@pytest.mark.turns
@pytest.mark.parametrize("name", [*SINGLE, "one inner step"])
def test_an_unsolved_inner_point_is_not_the_best(name):
    """``y* = x`` and ``f = ½‖y‖²``: at the start y = 0 has the least f of all, and says nothing of
    x = 1."""
    outer = lambda y, x, b: 0.5 * jnp.sum(y**2) + 1e-3
    kept, last = (
        bx.solve_bilevel(
            inner,
            outer,
            jnp.zeros(2),
            jnp.ones(2),
            algorithm=SINGLE.get(name, one_step),
            num_steps=300,
            keep=keep,
        )
        for keep in ("best", "last")
    )
    assert np.abs(kept.outer_params).max() <= 0.02 and kept.stats["best_step"] > 150
    assert np.abs(last.outer_params).max() <= 0.02


@pytest.mark.turns
def test_a_start_that_fits_the_held_out_data_by_chance_is_not_the_best():
    """A second kind: ridge regression by SOBA, from inner parameters that were fitted to the
    validation data themselves."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((80, 5))), jnp.asarray(rng.standard_normal(80))
    fit = lambda w, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    ridge = lambda w, t, b: fit(w, b) + jnp.sum(jnp.exp(t) * w * w)
    start = jnp.linalg.lstsq(x[40:], y[40:])[0]
    data = dict(inner_data=(x[:40], y[:40]), outer_data=(x[40:], y[40:]))
    solution = bx.solve_bilevel(
        ridge,
        lambda w, t, b: fit(w, b),
        start,
        jnp.zeros(5),
        **data,
        algorithm=A.soba(0.2, 0.5, decay=0.0),
        num_steps=600,
    )
    reference = bx.solve_bilevel(
        ridge,
        lambda w, t, b: fit(w, b),
        start,
        jnp.zeros(5),
        **data,
        algorithm=A.maid(),
        num_steps=1,
    )
    held_out = lambda w: float(fit(w, (x[40:], y[40:])))
    assert held_out(start) < held_out(solution.inner_params) < float(reference.history["value"][0])
    gradient = jax.grad(ridge)(solution.inner_params, solution.outer_params, (x[:40], y[:40]))
    assert jnp.linalg.norm(gradient) < 1e-2


def test_a_solver_that_was_not_done_is_not_scored():
    """At the first step the solver's iterations run out far from the solution, where f happens to
    be small."""
    algorithm = A.double_loop(
        bx.inner.gradient_descent(0.05, maxiter=3), bx.hypergradient.implicit(), optax.sgd(0.1)
    )
    solution = bx.solve_bilevel(
        inner,
        lambda y, x, b: 0.5 * jnp.sum(y**2),
        jnp.zeros(2),
        jnp.ones(2),
        algorithm=algorithm,
        num_steps=5,
    )
    assert solution.warnings[bx.RESULTS.inner_not_converged] == 5
    assert solution.stats["best_step"] == -1
    np.testing.assert_array_equal(solution.outer_params, solution.state.algorithm.outer)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_metric_that_is_never_finite_keeps_the_last_and_says_so(bad):
    metric = bx.metrics(lambda y, x, d: {"accuracy": jnp.sum(y) * 0 + bad}, select="accuracy")
    outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
    solution = bx.solve_bilevel(
        inner, outer, jnp.zeros(2), jnp.ones(2), algorithm=solved, num_steps=50, metrics=metric
    )
    np.testing.assert_allclose(solution.outer_params, 3.0, atol=1e-3)
    assert solution.warnings == {bx.RESULTS.metric_nonfinite: 50}


def test_a_metric_that_is_finite_once_keeps_that():
    metric = bx.metrics(
        lambda y, x, d: {"loss": jnp.where((y[0] > 1.5) & (y[0] < 2.0), y[0], jnp.nan)},
        select="loss",
    )
    outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
    solution = bx.solve_bilevel(
        inner, outer, jnp.zeros(2), jnp.ones(2), algorithm=solved, num_steps=50, metrics=metric
    )
    assert solution.outer_params[0] < 2.0 and solution.warnings[bx.RESULTS.metric_nonfinite] < 50


def test_what_is_kept_is_inside():
    outer = lambda y, x, b: jnp.sum((y - 5.0) ** 2)
    run = lambda x, n: bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(2),
        x,
        algorithm=solved,
        num_steps=n,
        project=lambda x: jnp.clip(x, 0.0, 1.0),
    )
    for start in (5.0, -3.0):
        for steps in (1, 20):
            x = run(jnp.full(2, start), steps).outer_params
            assert bool(jnp.all((x >= 0) & (x <= 1)))
    np.testing.assert_allclose(run(jnp.full(2, 5.0), 20).outer_params, 1.0)


# ---- when a run is done, and when it is lost


@each_single
def test_an_adjoint_that_has_not_moved_is_no_convergence(name):
    """y₀ minimises f, so that the first two directions are zero, at the start as anywhere."""
    outer = lambda y, x, b: 0.5 * jnp.sum(y**2)
    solution = bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(2),
        jnp.ones(2),
        algorithm=SINGLE[name],
        num_steps=300,
        tol=1e-3,
        keep="last",
    )
    assert solution.stats["steps"] > 20
    if solution.result == bx.RESULTS.converged:
        assert np.abs(solution.outer_params).max() < 0.05


def test_a_run_that_left_its_senses_says_so():
    outer = lambda y, x, b: 0.5 * jnp.sum((y - 1.0) ** 2)
    wild = A.soba(0.3, 40.0, decay=0.0)
    start = jnp.zeros(2), jnp.zeros(2)
    solution = bx.solve_bilevel(
        inner, outer, *start, algorithm=wild, num_steps=60, keep="last", throw=False
    )
    assert solution.history["value"][-1] > 1e12
    assert solution.warnings[bx.RESULTS.diverged] > 0 and "diverged" in repr(solution)
    tame = bx.solve_bilevel(
        inner, outer, *start, algorithm=SINGLE["soba"], num_steps=60, keep="last"
    )
    assert bx.RESULTS.diverged not in tame.warnings


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_step_that_makes_nan_is_the_failed_one(policy, keep):
    project = lambda x: jnp.where(x > 2.0, jnp.sqrt(2.0 - x), x)  # NaN beyond 2
    outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
    solution = bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(2),
        jnp.ones(2),
        algorithm=solved,
        num_steps=40,
        project=project,
        keep=keep,
        on_failure=policy,
        throw=False,
    )
    assert solution.result == bx.RESULTS.hypergradient_nonfinite
    np.testing.assert_allclose(solution.state.algorithm.outer, 1.6, rtol=1e-5)
    assert bool(jnp.all(jnp.isfinite(solution.outer_params)))


def test_an_optimizer_that_overflows_is_found_in_its_step():
    """A second kind, and an algorithm that undoes its own failures: the table of SABA."""
    outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
    overflow = optax.chain(optax.scale_by_schedule(lambda t: jnp.where(t == 4, jnp.inf, -0.1)))
    algorithm = A.saba(0.3, overflow)
    solution = bx.solve_bilevel(
        inner, outer, jnp.zeros(2), jnp.ones(2), algorithm=algorithm, num_steps=20, throw=False
    )
    assert solution.result == bx.RESULTS.hypergradient_nonfinite and solution.stats["steps"] == 4
    assert bool(jnp.all(jnp.isfinite(solution.state.algorithm.outer)))


def test_statistics_that_turn_nan_fail_their_step_and_nan_from_the_start_is_refused():
    def stateful(y, x, b, model):
        return 0.5 * jnp.sum((y - x) ** 2), jnp.where(
            b[0, 0] > 0.9, jnp.nan, 0.9 * model + 0.1 * b[0, 0]
        )

    outer = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
    data = bx.data.minibatches(jax.random.uniform(jax.random.key(1), (64, 1)), 1)
    run = lambda model: bx.solve_bilevel(
        bx.objective(stateful, stateful=True), outer, jnp.zeros(2), jnp.ones(2), inner_data=data,
        key=jax.random.key(0), model_state=model,
        algorithm=solved, num_steps=100, throw=False,
    )  # fmt: skip
    solution = run(jnp.zeros(2))
    assert solution.result == bx.RESULTS.inner_nonfinite
    assert bool(jnp.all(jnp.isfinite(solution.model_state))) and bool(
        jnp.all(jnp.isfinite(solution.state.algorithm.inner.model))
    )
    with pytest.raises(ValueError, match="model_state"):
        run(jnp.full(2, jnp.nan))


three = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)


def _sometimes(problem):
    """A run of seven steps with a metric at steps 0, 3 and 6, of one level below or of `Level`s."""
    metric = bx.metrics(
        lambda y, x, d: {"away": jnp.abs(jnp.sum(jax.tree.leaves(x)[0]) - 6.0)},
        every=3,
        select="away",
    )
    if problem == "bilevel":
        return bx.solve_bilevel(
            inner, three, jnp.zeros(2), jnp.ones(2), algorithm=solved, num_steps=7, metrics=metric
        )
    solver = bx.inner.optax(optax.sgd(0.5), 20)
    levels = [
        bx.Level(
            "y",
            lambda p, b: inner(p["y"], p["x"], b),
            solver=solver,
            hypergradient=bx.hypergradient.implicit(),
        ),
        bx.Level("x", lambda p, b: three(p["y"], p["x"], b), solver=optax.sgd(0.3)),
    ]
    return bx.solve_multilevel(
        levels, {"y": jnp.zeros(2), "x": jnp.ones(2)}, num_steps=7, metrics=metric
    )


@pytest.mark.parametrize("problem", ["bilevel", "multilevel"])
def test_rows_between_measurements_are_no_fault(problem):
    """NaN between the n-th steps is put in by the host: a search for NaNs finds none in compiled
    code, and no row is warned of."""
    with jax.debug_nans(True):
        solution = _sometimes(problem)
    measured = np.isfinite(solution.history["away"])
    assert measured.tolist() == [True, False, False, True, False, False, True]
    assert not solution.history["warnings"].any()
    assert solution.stats["best_step"] == 6


@pytest.mark.turns
def test_rows_between_measurements_go_on_where_a_run_was_left():
    """Two runs of four and three steps measure at steps 0, 3 and 6, as one of seven does; so does a
    run inside another program."""
    metric = bx.metrics(lambda y, x, d: {"away": jnp.sum(x)}, every=3)

    def go(steps, x=None, **more):
        start = jnp.ones(2) if x is None else x
        return bx.solve_bilevel(
            inner,
            three,
            jnp.zeros(2),
            start,
            algorithm=solved,
            num_steps=steps,
            metrics=metric,
            **more,
        )

    whole, first = go(7).history["away"], go(4)
    np.testing.assert_array_equal(
        np.concatenate([first.history["away"], go(3, state=first.state).history["away"]]), whole
    )
    traced = jax.vmap(lambda x: go(7, x).history["away"])(jnp.ones((2, 2)))
    np.testing.assert_allclose(traced, np.stack([whole, whole]), rtol=1e-5)
