"""How algorithms are used: half precision, optax on each direction, schedules, sweeps over keys,
steps and problems, undone failures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.algorithms.test_algorithms import (
    EVERY,
    INNER,
    INNER_DATA,
    KEY,
    OUTER,
    OUTER_DATA,
    SIZE,
    SUM,
    X0,
    Y0,
    inner,
    outer,
    run,
)

ALGORITHMS = bx.algorithms


def cast(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def left(x):
    """The true hypergradient's norm, relative to that at the start; values of early steps belong to
    inner points that are not solved yet."""
    return np.linalg.norm(SUM.hypergradient(np.asarray(x, np.float64))) / np.linalg.norm(
        SUM.hypergradient(X0)
    )


@pytest.mark.parametrize(
    "name", [n if n == "saba" else pytest.param(n, marks=pytest.mark.slow) for n in EVERY]
)
def test_bfloat16_stays_bfloat16_and_descends(name):
    """In strict promotion, so nothing on the way turns wider, and with three digits being all there
    is."""
    data = dict(inner_data=cast(INNER, jnp.bfloat16), outer_data=cast(OUTER, jnp.bfloat16))
    start = cast(Y0, jnp.bfloat16), cast(X0, jnp.bfloat16)
    solution = bx.solve_bilevel(
        inner, outer, *start, **data, algorithm=EVERY[name], num_steps=300, key=KEY, keep="last"
    )
    assert solution.inner_params.dtype == solution.outer_params.dtype == jnp.bfloat16
    assert left(solution.outer_params) < 0.7


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: ALGORITHMS.soba(opt(0.05), opt(0.05), adjoint_step=opt(0.05)),
        lambda opt: ALGORITHMS.saba(opt(0.05), opt(0.05), adjoint_step=0.1),
        lambda opt: ALGORITHMS.amigo(opt(0.05), opt(0.05), steps=3, adjoint_step=opt(0.05)),
        pytest.param(
            lambda opt: ALGORITHMS.stocbio(
                opt(0.05), opt(0.05), steps=3, neumann_step=0.3, neumann_steps=5
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda opt: ALGORITHMS.mrbo(opt(0.05), opt(0.05), neumann_step=0.3, neumann_steps=5),
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda opt: ALGORITHMS.f2sa(0.2, opt(0.05), steps=5), marks=pytest.mark.slow),
        pytest.param(lambda opt: ALGORITHMS.bome(0.2, opt(0.05), steps=5), marks=pytest.mark.slow),
    ],
)
def test_any_optimizer_may_sit_on_a_direction(make):
    """With momentum and a scale a coordinate, so a state has to be carried for it."""
    full = dict(
        inner_data=bx.data.partitioned(INNER, len(INNER["a"])),
        outer_data=bx.data.partitioned(OUTER, len(OUTER["h"])),
    )
    solution = run(make(optax.adam), num_steps=300, **full)
    assert left(solution.outer_params) < 0.3


def test_a_schedule_counts_steps():
    schedule = optax.sgd(lambda count: 0.3 / (count + 1.0) ** 0.5)
    scheduled = run(
        ALGORITHMS.soba(
            schedule, optax.sgd(lambda count: 0.1 / (count + 1.0) ** 0.5), adjoint_step=schedule
        )
    )
    np.testing.assert_allclose(
        scheduled.outer_params, run(ALGORITHMS.soba(0.3, 0.1)).outer_params, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(("growth", "steps"), [(0.0, 4), (0.5, 4)])
def test_the_penalty_follows_its_schedule(growth, steps):
    history = run(
        ALGORITHMS.f2sa(0.3, 0.1, penalty=5.0, growth=growth, steps=2), num_steps=steps
    ).history
    np.testing.assert_allclose(
        history["penalty"], 5.0 * np.arange(1, steps + 1.0) ** growth, rtol=1e-12
    )


def test_a_sweep_over_keys_equals_the_loop():
    def solve(key):
        data = dict(inner_data=INNER_DATA, outer_data=OUTER_DATA)
        algorithm = ALGORITHMS.spaba(0.3, 0.1, probability=0.3)
        return bx.solve_bilevel(
            inner, outer, Y0, X0, **data, algorithm=algorithm, num_steps=12, key=key, keep="last"
        ).outer_params

    keys = jax.random.split(jax.random.key(5), 3)
    together = jax.jit(jax.vmap(solve))(keys)
    for key, one in zip(keys, together, strict=True):
        np.testing.assert_allclose(one, solve(key), rtol=0, atol=1e-12)
    assert np.ptp(np.asarray(together), axis=0).max() > 1e-3


def test_a_sweep_over_problems_equals_the_loop():
    shifts = jnp.asarray([-1.0, 0.0, 2.0])

    def solve(shift):
        rows = dict(INNER, a=jnp.asarray(INNER["a"]) + shift)
        return bx.solve_bilevel(
            inner,
            outer,
            Y0,
            X0,
            inner_data=rows,
            outer_data=OUTER,
            algorithm=ALGORITHMS.ma_soba(0.3, 0.1),
            num_steps=12,
            keep="last",
        ).outer_params

    together = jax.jit(jax.vmap(solve))(shifts)
    for shift, one in zip(shifts, together, strict=True):
        np.testing.assert_allclose(one, solve(shift), rtol=0, atol=1e-12)
    assert np.ptp(np.asarray(together), axis=0).max() > 1e-3


@pytest.mark.slow
def test_maid_sweeps_over_problems():
    def solve(shift):
        rows = dict(INNER, a=jnp.asarray(INNER["a"]) + shift)
        return bx.solve_bilevel(
            inner,
            outer,
            Y0,
            X0,
            inner_data=bx.data.full(rows),
            outer_data=bx.data.full(OUTER),
            num_steps=15,
        ).outer_params

    shifts = jnp.asarray([-1.0, 2.0])
    for shift, one in zip(shifts, jax.jit(jax.vmap(solve))(shifts), strict=True):
        np.testing.assert_allclose(one, solve(shift), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["saba", "srba"])
def test_a_failed_step_leaves_the_state_as_it_was(name):
    """Tables included, which SABA undoes itself: the state after the failure is the one after the
    last good step."""
    spoiled = {k: np.array(v) for k, v in INNER.items()}
    spoiled["a"][SIZE] = np.nan  # in batch 1
    data = dict(inner_data=bx.data.partitioned(spoiled, SIZE), outer_data=OUTER_DATA)
    algorithm = {"saba": ALGORITHMS.saba(0.2, 0.1), "srba": ALGORITHMS.srba(0.2, 0.1, period=1000)}[
        name
    ]
    failed = run(algorithm, num_steps=20, throw=False, **data)
    assert failed.result is bx.RESULTS.nonfinite_batch
    good = int(failed.stats["steps"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(failed.state.algorithm))
    if good:
        before = run(algorithm, num_steps=good, throw=False, **data)
        jax.tree.map(np.testing.assert_array_equal, failed.state.algorithm, before.state.algorithm)
