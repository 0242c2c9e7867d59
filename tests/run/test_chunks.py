"""How many steps one compiled call takes changes nothing but the time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import check
from bilevax.base import Feed, Feeds, InnerState
from bilevax.run import chunk, rows
from bilevax.run.chunk import MOST_VALUES

WIDE = (
    MOST_VALUES // 300
)  # numbers in a row of the history: more than 256 steps of them are held, fewer than 600


def inner(y, x, batch):
    return 0.5 * jnp.sum((y - x - batch.mean()) ** 2)


def outer(y, x, batch):
    return 0.5 * jnp.sum((y - 1.0) ** 2) + 0.05 * jnp.sum(x**2)


def wide(y, x, batch):
    return outer(y, x, batch), jnp.full(WIDE, y[0])


ROWS = bx.data.partitioned(jnp.linspace(-1.0, 1.0, 10).reshape(5, 2), 1)
ALGORITHM = bx.algorithms.soba(0.3, 0.1)


def run(steps, objective=outer, **keywords):
    keywords = dict(
        inner_data=ROWS, algorithm=ALGORITHM, key=jax.random.key(0), num_steps=steps, **keywords
    )
    return bx.solve_bilevel(inner, objective, jnp.zeros(2), jnp.zeros(2), **keywords)


def same(a, b):
    equal = jax.tree.map(
        np.array_equal,
        (a.outer_params, a.inner_params, a.history),
        (b.outer_params, b.inner_params, b.history),
    )
    assert all(jax.tree.leaves(equal))


def test_long_chunks_are_short_ones(monkeypatch):
    lengths, plain = [], chunk.run_chunk

    def spy(static, capacity, state, dynamic, data, n):
        lengths.append(n)
        return plain(static, capacity, state, dynamic, data, n)

    monkeypatch.setattr(chunk, "run_chunk", spy)
    run(300)  # compiles
    lengths.clear()
    monkeypatch.setattr(chunk, "QUICK", 1e3)
    long = run(3000)
    assert lengths == [1, 1, 16, 256, 2726]
    lengths.clear()
    monkeypatch.setattr(chunk, "QUICK", 0.0)
    short = run(40)
    assert lengths == [1] * 40
    same(run(40), short)
    lengths.clear()
    monkeypatch.setattr(chunk, "QUICK", 1e3)
    seen, own = [], []
    looks = [
        lambda event: seen.append((event.step, len(event.history["value"]))),
        bx.callbacks.every(100, lambda event: own.append(event.step)),
    ]
    watched = run(3000, callbacks=looks)
    assert lengths == [1, 1, 16, 256, 2726]  # nobody asks for a state
    assert seen == [(n, n) for n in [*range(256, 3000, 256), 3000]] and own == list(
        range(100, 3001, 100)
    )
    same(watched, long)


def test_a_call_that_went_past_a_look_is_done_again_for_whoever_stops_there(monkeypatch):
    """A stop, an error and a state are those of the step they belong to, to the bit, wherever the
    calls end."""
    monkeypatch.setattr(chunk, "QUICK", 1e3)
    states, kept = {}, []

    def look(event):
        kept.append(event)
        states[event.step] = np.asarray(event.state.algorithm.outer)

    stop = bx.callbacks.every(70, lambda event: event.step == 140)
    for callbacks in (
        [stop],
        [bx.callbacks.every(35, look), stop],
        [bx.callbacks.every(7, lambda event: event.history["value"] is None), stop],
    ):
        out = run(900, callbacks=callbacks, keep="last")
        assert (
            out.result is bx.RESULTS.stopped and out.stats["steps"] == out.stats["best_step"] == 140
        )
        same(out, run(140, keep="last"))
        same(
            run(200, state=out.state, keep="last")._replace(history=None),
            run(340, keep="last")._replace(history=None),
        )
    assert list(states) == [35, 70, 105, 140] and np.array_equal(states[140], out.outer_params)
    assert np.array_equal(states[35], run(35, keep="last").outer_params)
    with pytest.raises(
        RuntimeError, match="state: got a look at step 35, of which the run has gone on"
    ):
        _ = kept[0].state

    def fail(event):
        if event.step == 180:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run(900, callbacks=[bx.callbacks.every(30, fail)], keep="last")
    same(caught.value.solution, run(180, keep="last"))


def test_a_look_far_inside_a_call_costs_little(monkeypatch):
    """Counted: the compiled calls of a run are those that it makes when nobody looks."""
    calls, plain = [], chunk.run_chunk
    monkeypatch.setattr(chunk, "run_chunk", lambda *args: calls.append(args[-1]) or plain(*args))
    monkeypatch.setattr(chunk, "QUICK", 1e3)
    run(
        4000,
        callbacks=[
            bx.callbacks.every(10, lambda event: None),
            bx.callbacks.early_stopping("value", patience=10**6),
        ],
    )
    assert len(calls) == 5


def test_a_wide_history_takes_shorter_chunks_and_all_steps(monkeypatch):
    monkeypatch.setattr(chunk, "QUICK", 1e3)
    objective = bx.objective(wide, has_aux=True)
    out = run(600, objective)
    assert out.stats["steps"] == 600 and out.history["aux"].shape == (600, WIDE)
    monkeypatch.setattr(chunk, "QUICK", 0.0)
    same(out, run(600, objective))
    traced = jax.jit(
        lambda x: bx.solve_bilevel(
            inner,
            objective,
            jnp.zeros(2),
            x,
            inner_data=ROWS,
            algorithm=ALGORITHM,
            key=jax.random.key(0),
            num_steps=600,
        )
    )
    whole = traced(jnp.zeros(2))
    assert int(whole.stats["steps"]) == 600
    np.testing.assert_allclose(whole.history["aux"][-1, 0], out.history["aux"][-1, 0], rtol=1e-12)


def test_a_tolerance_is_relative_to_the_first_step_of_all_calls():
    first = run(40)
    rest = run(200, state=first.state, tol=0.3)
    whole = run(240, tol=0.3)
    assert rest.result is whole.result is bx.RESULTS.converged
    assert rest.stats["total_steps"] == whole.stats["total_steps"]


def test_a_first_direction_of_zero_is_no_convergence_and_a_solution_is():
    """Where the outer objective has no x of its own, an adjoint that starts at zero makes the first
    direction zero."""
    bare = run(400, lambda y, x, batch: 0.5 * jnp.sum((y - 1.0) ** 2), tol=0.3)
    assert bare.history["grad_norm"][0] == 0 and bare.stats["steps"] > 2
    exact = bx.algorithms.double_loop(
        bx.inner.lbfgs(), bx.hypergradient.implicit(), bx.tunable(optax.sgd, learning_rate=0.1)
    )
    there = bx.solve_bilevel(
        lambda y, x, b: jnp.sum((y - x) ** 2),
        lambda y, x, b: jnp.sum(y**2),
        jnp.zeros(2),
        jnp.zeros(2),
        algorithm=exact,
        tol=0.1,
        num_steps=9,
    )
    assert there.result is bx.RESULTS.converged and there.stats["steps"] == 2


@pytest.mark.parametrize("name", ["srba", "ma_soba"])
def test_a_memory_starts_with_the_first_step_that_did_not_fail(name):
    """A recursion or a mean that began at a step that was passed over would go on from nothing."""
    algorithm = {
        "srba": bx.algorithms.srba(0.3, 0.1, period=4),
        "ma_soba": bx.algorithms.ma_soba(0.3, 0.1),
    }[name]
    problem = check.problem(inner, outer, ROWS.draw, ROWS.draw, ROWS.draw)
    point = InnerState(jnp.ones(2), (), None), jnp.full(2, 0.5)
    feed = Feed(ROWS.data, jax.random.key(0), jnp.int32(3))

    @jax.jit
    def directions(done):
        state = algorithm.init(problem, *point)
        return algorithm.step(
            problem, state, Feeds(feed, feed, feed, jax.random.key(1), jnp.int32(3), done)
        )[1].grad_norm

    exact = 0.1 * np.linalg.norm(
        point[1]
    )  # ∇_x f, as the adjoint is zero: of the fourth step, if none before it counts
    assert np.isclose(directions(jnp.int32(0)), exact, rtol=1e-12)
    assert np.isclose(
        directions(jnp.int32(3)), {"srba": 0.0, "ma_soba": 0.1 * exact}[name], rtol=1e-12
    )


# ---- what a step costs beside the algorithm


def test_columns_of_32_bits_are_one_vector_and_come_back_to_the_bit():
    row = {
        "f": jnp.float32(jnp.nan),
        "g": jnp.float32(1e-42),  # subnormal
        "i": jnp.int32(-7),
        "u": jnp.uint32(2**32 - 1),
        "d": jnp.zeros((), jax.dtypes.canonicalize_dtype(jnp.float64)) + 0.1,
        "v": jnp.arange(3.0, dtype=jnp.float32),
    }
    pack, unpack = rows.packing(jax.eval_shape(lambda: row))
    packed = jax.jit(pack)(row)
    wide = row["d"].dtype != jnp.float32
    assert (
        sorted(vector.shape for vector in packed[0]) == ([(1,), (4,)] if wide else [(5,)])
        and len(packed[1]) == 1
    )
    for name, value in jax.jit(unpack)(packed).items():
        assert value.dtype == row[name].dtype and value.tobytes() == row[name].tobytes(), name


def test_a_double_loop_looks_at_its_batches_once_a_call_and_not_in_the_step():
    """A compiler may turn a branch inside the step into a pass over all data in every step."""
    data = {"X": jnp.ones((64, 3)), "t": jnp.ones(64)}
    inner = lambda w, x, b: jnp.mean((b["X"] @ w - b["t"]) ** 2) + jnp.exp(x) * w @ w
    outer = lambda w, x, b: jnp.mean((b["X"] @ w - b["t"]) ** 2)
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 1), bx.hypergradient.one_step(0.1), optax.sgd(0.1)
    )
    problem = bx.check.problem(inner, outer, bx.data.same, bx.data.same, bx.data.same)
    state = bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(3),
        0.0,
        inner_data=data,
        outer_data=data,
        algorithm=algorithm,
        num_steps=1,
    ).state
    plan = chunk.Plan(problem, algorithm, None, None)
    text = str(
        jax.make_jaxpr(lambda state, data: chunk.one_step(plan, state, data))(
            state, (data, data, data)
        )
    )
    assert "is_finite" in text  # of numbers and parameters
    assert not re.search(r":bool\[64(,3)?\] = is_finite", text)
    bad = {**data, "X": data["X"].at[5, 1].set(jnp.nan)}
    out = bx.solve_bilevel(
        inner,
        outer,
        jnp.zeros(3),
        0.0,
        inner_data=bad,
        outer_data=data,
        algorithm=algorithm,
        num_steps=3,
        throw=False,
    )
    assert (
        out.result is bx.RESULTS.nonfinite_batch
        and out.history["code"][-1] == bx.RESULTS.nonfinite_batch
    )


def test_scalars_of_the_state_travel_together():
    """Each by itself is a kernel a step on a GPU, which short steps feel."""
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.adam(0.1), 2), bx.hypergradient.implicit(), optax.adam(0.1)
    )

    def run(y, x):
        inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
        outer = lambda y, x, batch: 0.5 * jnp.sum((y - 3.0) ** 2)
        return bx.solve_bilevel(inner, outer, y, x, algorithm=algorithm, num_steps=3).outer_params

    jaxpr = jax.make_jaxpr(run)(jnp.zeros(2), jnp.zeros(2))
    (loop,) = [
        eqn
        for eqn in loops(jaxpr.jaxpr)
        if any(v.aval.shape[:1] == (3,) for v in eqn.outvars)  # the history's rows
    ]
    scalars = [
        v.aval
        for v in loop.outvars
        if not v.aval.shape and not jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key)
    ]
    assert [aval.dtype for aval in scalars] == [jnp.int32], scalars  # the counter


def loops(jaxpr):
    """The outermost `while_loop`s of a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            yield eqn
            continue
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda a: hasattr(a, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from loops(inner.jaxpr)
