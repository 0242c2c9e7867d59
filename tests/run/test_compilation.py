"""One trace a shape: counted on the compiled chunk and on the objective itself."""

import time

import jax
import jax.numpy as jnp
import optax

import bilevax as bx
from bilevax import base
from bilevax.run import waiting
from bilevax.run.chunk import run_chunk


def problem():
    """Fresh functions, so that no other test's cache is met, and a count of how often the inner one
    is traced."""
    traces = []

    def inner(y, x, batch):
        traces.append(1)
        return 0.5 * jnp.sum((y - x) ** 2)

    return inner, lambda y, x, batch: 0.5 * jnp.sum((y - 3.0) ** 2), traces


SGD = bx.tunable(optax.sgd, learning_rate=1.0)


def algorithm(learning_rate=0.1, damping=1e-2):
    return bx.algorithms.double_loop(
        bx.inner.optax(SGD, 2),
        bx.hypergradient.implicit(damping=damping),
        bx.tunable(optax.sgd, learning_rate=learning_rate),
    )


def test_a_thousand_steps_cost_one_trace_and_later_calls_none():
    inner, outer, traces = problem()
    built = algorithm()
    before = run_chunk._cache_size()
    y, x = jnp.zeros(2), jnp.zeros(2)
    bx.solve_bilevel(inner, outer, y, x, algorithm=built, num_steps=1000)
    assert run_chunk._cache_size() == before + 1
    bx.solve_bilevel(inner, outer, y, x, algorithm=built, num_steps=1000)
    assert run_chunk._cache_size() == before + 1
    bx.solve_bilevel(
        inner, outer, y + 1.0, x - 2.0, algorithm=built, num_steps=77
    )  # other values, another number of steps
    assert run_chunk._cache_size() == before + 1
    assert float(y.sum() + x.sum()) == 0.0  # the caller's arrays are not donated


def test_the_step_is_traced_once_within_a_compilation():
    inner, outer, traces = problem()
    bx.solve_bilevel(inner, outer, jnp.zeros(2), jnp.zeros(2), algorithm=algorithm(), num_steps=3)
    # two abstract checks, of shapes and of what is read; one inner step and one linearisation in
    # the step, whose jaxpr serves both the row's shapes and the loop
    assert len(traces) <= 5, len(traces)


def test_a_line_of_log_while_the_compiler_works(monkeypatch, caplog):
    with waiting.compiling("maid"):
        pass
    assert not caplog.text
    monkeypatch.setattr(waiting, "LONG", 0.01)
    with waiting.compiling("maid"):
        time.sleep(0.2)
    assert "maid: tracing and compiling the first steps has taken 0 s so far" in caplog.text


def test_python_floats_and_numbers_of_other_algorithms_cost_no_trace():
    inner, outer, _ = problem()
    before = run_chunk._cache_size()
    bx.solve_bilevel(inner, outer, 0.0, 1.0, algorithm=algorithm(), num_steps=3)
    first = run_chunk._cache_size()
    assert first == before + 1
    bx.solve_bilevel(inner, outer, 0.5, 2.0, algorithm=algorithm(), num_steps=3)
    bx.solve_bilevel(
        inner, outer, jnp.asarray(0.5), jnp.asarray(2.0), algorithm=algorithm(0.3), num_steps=3
    )
    bx.solve_bilevel(
        inner, outer, 0.5, 2.0, algorithm=algorithm(jnp.float32(0.2), 1e-3), num_steps=3
    )
    assert run_chunk._cache_size() == first


def test_numbers_take_effect_although_the_program_is_the_same():
    inner, outer, _ = problem()
    slow, fast = (
        bx.solve_bilevel(
            inner, outer, 0.0, 0.0, algorithm=algorithm(lr), num_steps=5, keep="last"
        ).outer_params
        for lr in (0.01, 0.5)
    )
    assert float(fast) > 2 * float(slow) > 0


def test_optimizer_numbers_in_the_state_cost_no_trace():
    """The other documented way: optax.inject_hyperparams keeps the number in the optimizer's
    state."""
    inner, outer, _ = problem()
    opt = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    built = bx.algorithms.double_loop(bx.inner.optax(SGD, 2), bx.hypergradient.implicit(), opt)
    solution = bx.solve_bilevel(inner, outer, 0.0, 0.0, algorithm=built, num_steps=3, keep="last")
    before = run_chunk._cache_size()
    algorithm_state = solution.state.algorithm
    injected = algorithm_state.outer_opt._replace(
        hyperparams={
            "learning_rate": jnp.asarray(
                0.0, algorithm_state.outer_opt.hyperparams["learning_rate"].dtype
            )
        }
    )
    state = solution.state._replace(algorithm=algorithm_state._replace(outer_opt=injected))
    still = bx.solve_bilevel(
        inner, outer, 0.0, 0.0, algorithm=built, num_steps=3, state=state, keep="last"
    )
    assert run_chunk._cache_size() == before
    assert float(still.outer_params) == float(solution.outer_params)


def test_split_makes_numbers_leaves_and_functions_static():
    one, two = base.split(algorithm(0.1)), base.split(algorithm(0.2, 1e-2))
    assert one[0] == two[0] and hash(one[0]) == hash(two[0])
    assert one[1] != two[1]
    joined = base.join(*one)
    assert repr(joined) == repr(algorithm(0.1))
    assert (
        base.split(bx.hypergradient.implicit(bx.linear.cg(maxiter=5)))[0]
        != base.split(bx.hypergradient.implicit(bx.linear.cg(maxiter=6)))[0]
    )


def test_a_single_loop_looks_at_its_objectives_once():
    inner, outer, traces = problem()
    built = bx.algorithms.soba(0.1, 0.1)
    seen = []
    for _ in range(2):
        bx.solve_bilevel(inner, outer, jnp.zeros(2), jnp.ones(2), algorithm=built, num_steps=2)
        seen.append(len(traces))
    assert seen[1] - seen[0] <= 1  # what an objective captures is looked for in each call


def test_value_and_hypergrad_is_traced_once_when_a_state_is_given():
    inner, outer, traces = problem()
    fn = bx.value_and_hypergrad(
        inner, outer, solver=bx.inner.optax(SGD, 2), hypergradient=bx.hypergradient.implicit()
    )
    step = jax.jit(lambda y, x, state: fn(y, x, state=state))
    y, x = jnp.zeros(2), jnp.ones(2)
    state = fn.init(y)
    for _ in range(3):
        estimate = step(y, x, state)
        y, state = estimate.inner_params, estimate.state
    assert step._cache_size() == 1
