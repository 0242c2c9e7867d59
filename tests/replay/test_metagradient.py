"""Metagradients against ``jax.grad`` of the whole training as one scan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.replay._batches import Batches, resolve
from bilevax.run.window import _aligned
from tests.replay import problem as trainings

SCHEDULES = {
    "everything": bx.replay.everything(),
    "segments": bx.replay.segments(),
    "segments of 5": bx.replay.segments(5),
    "tree of 4": bx.replay.tree(4),
    "tree of 1": bx.replay.tree(1),
}


@pytest.fixture(scope="module")
def exact():
    problem = trainings.make()
    return problem, trainings.by_scan(problem)


@pytest.mark.turns
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_scan(exact, name, save):
    problem, (value, (outer, init)) = exact
    if name == "tree of 1":
        problem = trainings.make(12)
        value, (outer, init) = trainings.by_scan(problem)
    fn = bx.replay.value_and_metagrad(
        trainings.inner,
        trainings.quality,
        trainings.adam,
        problem.steps,
        schedule=SCHEDULES[name],
        save_gradients=save,
    )
    found = fn(problem.params, problem.outer, trainings.reader(problem), problem.batch)
    assert abs(found.value - value) < 1e-14
    for leaf in outer:
        assert trainings.distance(found.grad[leaf], outer[leaf]) < 1e-12, leaf
    assert trainings.distance(found.init_grad, init) < 1e-12
    counts = SCHEDULES[name].counts(problem.steps)
    assert found.info["executed"] - found.info["checked"] == counts.executed
    assert found.info["held"] == counts.held
    assert found.info["checked"] == (0 if name == "everything" else 1)
    assert len(found.info["values"]) == len(found.info["cotangent_norm"]) == problem.steps


def whole(
    problem,
    optimizer=trainings.adam,
    quality=trainings.quality,
    objective=trainings.inner,
    **keywords,
):
    return bx.replay.value_and_metagrad(objective, quality, optimizer, problem.steps, **keywords)


def run(problem, *args, **keywords):
    return whole(problem, *args, **keywords)(
        problem.params, problem.outer, trainings.reader(problem), problem.batch
    )


@pytest.mark.turns
def test_float32():
    problem = trainings.make(dtype=jnp.float32)
    _, (outer, init) = trainings.by_scan(problem)
    for name in list(SCHEDULES)[:-1]:  # the last takes 2,016 steps
        found = run(problem, schedule=SCHEDULES[name])
        leaves = jax.tree.leaves((found.grad, found.init_grad))
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
        for leaf in outer:
            assert trainings.distance(found.grad[leaf], outer[leaf]) < 1e-5, leaf
        assert trainings.distance(found.init_grad, init) < 1e-5


@pytest.mark.turns
def test_equals_unrolled():
    """The same numbers as the compiled solve, through its own interface, with leaves that are read
    a part a step."""
    problem = trainings.make()
    outer = {
        name: leaf for name, leaf in problem.outer.items() if name != "rate"
    }  # the rate is fixed here: nothing reads that leaf
    solver = bx.inner.optax(optax.adam(1e-2, eps_root=1e-8), problem.steps)
    plain = lambda params, outer, batch: trainings.loss(
        params, outer, batch, inner_step=batch["step"]
    )
    data = problem.data | {"step": jnp.arange(problem.steps)}
    unrolled = jax.jit(
        bx.value_and_hypergrad(
            plain,
            trainings.quality,
            solver=solver,
            hypergradient=bx.hypergradient.unrolled(),
            inner_draw=bx.data.stacked,
        )
    )(problem.params, outer, data, problem.batch)
    adam = optax.adam(1e-2, eps_root=1e-8)
    reader = bx.replay.reader(lambda step: jax.tree.map(lambda a: a[step], data))
    for schedule in (SCHEDULES["everything"], SCHEDULES["segments"], SCHEDULES["tree of 4"]):
        fn = bx.replay.value_and_metagrad(
            plain, trainings.quality, adam, problem.steps, schedule=schedule
        )
        found = fn(problem.params, outer, reader, problem.batch)
        for leaf in outer:
            assert trainings.distance(found.grad[leaf], unrolled.grad[leaf]) < 1e-12, leaf
        assert trainings.distance(found.inner_params, unrolled.inner_params) < 1e-14


def test_a_reader_may_use_one_buffer():
    """The next step's batch is read while this one's is used."""
    buffer = _aligned((4,), np.dtype(np.float32))  # which JAX on the CPU would take as it lies

    def read(step):
        buffer[:] = step
        return buffer

    batches = Batches(resolve(bx.replay.reader(read)), 4, lambda batch: batch)
    seen = [batches.at(step, step + 1) for step in range(4)]
    batches.close()
    assert [float(batch[0]) for batch in seen] == [0.0, 1.0, 2.0, 3.0]


def test_several_checkpoints():
    problem, at = trainings.make(20), (5, 12, 20)
    value, (outer, init) = trainings.by_scan(problem, at=at)
    found = run(problem, at=at)
    assert abs(found.value - value) < 1e-14
    assert trainings.distance((found.grad, found.init_grad), (outer, init)) < 1e-12


@pytest.mark.turns
def test_queries_share_the_way_back():
    problem = trainings.make(20)
    rows = lambda params, outer, batch: (
        (trainings.predict(params, batch[0]) - batch[1]) ** 2 + 1e-3 * outer["decay"] ** 2
    )
    found = run(problem, quality=rows)
    assert found.value.shape == (8,)
    for row in (0, 5):
        one = lambda params, outer, batch, row=row: rows(params, outer, batch)[row]
        value, (outer, init) = trainings.by_scan(problem, quality=one)
        pick = lambda tree, row=row: jax.tree.map(lambda a: a[row], tree)
        assert abs(found.value[row] - value) < 1e-14
        assert trainings.distance((pick(found.grad), pick(found.init_grad)), (outer, init)) < 1e-12


@pytest.mark.turns
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda outer: optax.inject_hyperparams(optax.adam)(jnp.exp(outer["decay"]), eps_root=1e-8),
        lambda outer: optax.chain(
            optax.clip_by_global_norm(jnp.exp(-outer["decay"] / 3)), optax.sgd(0.05, momentum=0.9)
        ),
        lambda outer: optax.adamw(1e-2, eps_root=1e-8, weight_decay=jnp.exp(outer["decay"])),
    ],
    ids=["settings in the state", "clipping", "decay"],
)
def test_optimizer_settings(optimizer):
    problem = trainings.make(15)
    value, (outer, init) = trainings.by_scan(problem, optimizer)
    found = run(problem, optimizer)
    assert (
        trainings.distance((found.value, found.grad, found.init_grad), (value, outer, init)) < 1e-12
    )


@pytest.mark.turns
def test_an_optimizer_that_reads_the_value():
    """Polyak's rule: the step's length is the value over the gradient's square."""
    problem = trainings.make(6)
    polyak = optax.chain(optax.scale_by_polyak(max_learning_rate=10.0), optax.scale(-0.2))

    def trained(outer, params):
        for step in range(problem.steps):
            batch = jax.tree.map(lambda a: a[step], problem.data)  # noqa: B023
            value, grads = jax.value_and_grad(trainings.loss)(params, outer, batch, inner_step=step)
            square = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
            params = jax.tree.map(lambda p, g: p - 0.2 * value / square * g, params, grads)  # noqa: B023
        return trainings.quality(params, outer, problem.batch)

    outer, init = jax.grad(trained, (0, 1))(problem.outer, problem.params)
    for save in (True, False):
        found = run(problem, polyak, save_gradients=save)
        assert trainings.distance((found.grad, found.init_grad), (outer, init)) < 1e-12


def test_a_start_that_is_learned():
    problem = trainings.make(15)
    outer = problem.outer | {"start": problem.params}
    fn = whole(problem, inner_init=lambda outer: jax.tree.map(lambda a: 2.0 * a, outer["start"]))
    found = fn(problem.params, outer, trainings.reader(problem), problem.batch)
    doubled = problem._replace(params=jax.tree.map(lambda a: 2.0 * a, problem.params))
    _, (_, init) = trainings.by_scan(doubled)
    assert found.init_grad is None
    assert trainings.distance(found.grad["start"], jax.tree.map(lambda a: 2.0 * a, init)) < 1e-12
    jax.block_until_ready(jax.tree.map(jnp.copy, outer))  # the caller's arrays are still there


def test_microbatches():
    problem = trainings.make(15)
    plain = lambda params, outer, batch: trainings.loss(
        params, outer | {"shift": jnp.zeros(1)}, batch, inner_step=0
    )
    args = problem.params, problem.outer, trainings.reader(problem), problem.batch
    one, three = (whole(problem, objective=plain, microbatches=n)(*args) for n in (1, 3))
    assert (
        trainings.distance(
            (three.value, three.grad, three.init_grad), (one.value, one.grad, one.init_grad)
        )
        < 1e-12
    )


@pytest.mark.turns
def test_a_gradient_of_ones_own():
    """Clipped a row each, which has no objective: against reverse mode by hand."""
    problem = trainings.make(6)
    row = lambda params, outer, x, y, i: (
        outer["weight"][i] * (trainings.predict(params, x[None])[0] - y) ** 2
    )

    def clipped(params, outer, batch):
        def one(x, y, i):
            g = jax.grad(row)(params, outer, x, y, i)
            size = jnp.sqrt(sum(jnp.sum(a**2) for a in jax.tree.leaves(g)))
            return jax.tree.map(lambda a: a / jnp.maximum(1.0, size), g)

        return jax.tree.map(
            lambda a: jnp.mean(a, 0), jax.vmap(one)(batch["x"], batch["y"], batch["index"])
        )

    def trained(outer, params):
        for step in range(problem.steps):
            grads = clipped(params, outer, jax.tree.map(lambda a: a[step], problem.data))  # noqa: B023
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return trainings.quality(params, outer, problem.batch)

    outer, init = jax.grad(trained, (0, 1))(problem.outer, problem.params)
    found = run(problem, optax.sgd(0.1), objective=bx.replay.gradients(clipped))
    assert trainings.distance((found.grad, found.init_grad), (outer, init)) < 1e-12


@pytest.mark.turns
def test_a_rater_of_the_batch():
    """A network whose softmax over a batch weighs its losses: the derivative in its parameters, by
    ``jax.grad`` of the training written out."""
    problem = trainings.make(8)
    keys = jax.random.split(jax.random.key(7), 2)
    rater = {"in": jax.random.normal(keys[0], (3, 4)), "out": jax.random.normal(keys[1], (4,))}

    def rated(params, rater, batch):
        weights = jax.nn.softmax(jnp.tanh(batch["x"] @ rater["in"]) @ rater["out"])
        return weights @ (trainings.predict(params, batch["x"]) - batch["y"]) ** 2

    judge = lambda params, rater, batch: jnp.mean(
        (trainings.predict(params, batch[0]) - batch[1]) ** 2
    )

    def trained(rater, params):
        for step in range(problem.steps):
            batch = jax.tree.map(lambda a: a[step], problem.data)  # noqa: B023
            grads = jax.grad(rated)(params, rater, batch)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return judge(params, rater, problem.batch)

    exact, init = jax.jit(jax.grad(trained, (0, 1)))(rater, problem.params)
    fn = bx.replay.value_and_metagrad(rated, judge, optax.sgd(0.1), problem.steps)
    found = fn(problem.params, rater, trainings.reader(problem), problem.batch)
    assert trainings.distance((found.grad, found.init_grad), (exact, init)) < 1e-12


# ---- model state, keys, sources


def normed(params, outer, batch, stats):
    """A network with a running mean and square, and a count that is no floating-point number."""
    hidden = batch["x"] @ params["hidden"] + params["bias"][None]
    mean, square = jnp.mean(hidden, 0), jnp.mean(hidden**2, 0)
    new = {
        "mean": 0.7 * stats["mean"] + 0.3 * mean,
        "square": 0.7 * stats["square"] + 0.3 * square,
        "count": stats["count"] + 1,
    }
    error = (
        jnp.tanh((hidden - new["mean"][None]) / jnp.sqrt(new["square"] + 1.0)[None]) @ params["out"]
        - batch["y"]
    )
    return jnp.mean(outer["weight"][batch["index"]] * error**2), new


def judged(params, outer, batch, stats):
    hidden = (batch[0] @ params["hidden"] - stats["mean"][None]) / jnp.sqrt(stats["square"] + 1.0)[
        None
    ]
    return jnp.mean((jnp.tanh(hidden) @ params["out"] - batch[1]) ** 2), stats


@pytest.mark.turns
def test_statistics_are_differentiated():
    problem = trainings.make(10)
    stats = {"mean": jnp.zeros(5), "square": jnp.ones(5), "count": jnp.int32(0)}

    def trained(outer, params):
        now = stats
        for step in range(problem.steps):
            batch = jax.tree.map(lambda a: a[step], problem.data)  # noqa: B023
            grads, now = jax.grad(normed, has_aux=True)(params, outer, batch, now)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return judged(params, outer, problem.batch, now)[0]

    outer, init = jax.grad(trained, (0, 1))(problem.outer, problem.params)
    stateful = lambda fn: bx.objective(fn, stateful=True)
    fn = whole(problem, optax.sgd(0.1), stateful(judged), stateful(normed))
    found = fn(
        problem.params, problem.outer, trainings.reader(problem), problem.batch, model_state=stats
    )
    assert trainings.distance((found.grad, found.init_grad), (outer, init)) < 1e-12
    assert int(found.model_state["count"]) == 10


def test_dropout_and_drawn_batches():
    """Keys and batches of a source on the device are the same on the way back as on the way there:
    against finite differences."""
    problem = trainings.make(12)

    def dropped(params, outer, batch, *, key):
        keep = jax.random.bernoulli(key, 0.8, (5,)).astype(params["out"].dtype)
        hidden = jnp.tanh(batch["x"] @ params["hidden"] + params["bias"][None]) * keep[None]
        return jnp.mean(
            outer["weight"][batch["index"]] * (hidden @ params["out"] - batch["y"]) ** 2
        )

    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:24], problem.data)
    source = bx.data.minibatches(rows | {"index": jnp.arange(24)}, 6)
    fn = whole(problem, optax.sgd(0.1), objective=bx.objective(dropped, keyed=True))
    call = lambda outer: fn(problem.params, outer, source, problem.batch, key=jax.random.key(3))
    found = call(problem.outer)
    direction = jax.random.normal(jax.random.key(4), (24,))
    moved = [
        call(problem.outer | {"weight": problem.outer["weight"] + h * direction}).value
        for h in (1e-5, -1e-5)
    ]
    assert abs((moved[0] - moved[1]) / 2e-5 - found.grad["weight"] @ direction) < 1e-8


def test_pure_functions_as_data():
    problem = trainings.make(8)
    data = problem.data
    found = whole(problem)(
        problem.params,
        problem.outer,
        lambda key, step: jax.tree.map(lambda a: a[step], data),
        problem.batch,
        key=jax.random.key(0),
    )
    assert trainings.distance(found.grad, run(problem).grad) < 1e-14


def test_leaves_that_do_not_move():
    problem = trainings.make(8)
    params, outer = (
        problem.params | {"layers": jnp.int32(2)},
        problem.outer | {"classes": jnp.arange(3)},
    )
    found = whole(problem)(params, outer, trainings.reader(problem), problem.batch)
    assert found.grad["classes"] is None and int(found.inner_params["layers"]) == 2
    assert (
        trainings.distance(found.grad | {"classes": 0.0}, run(problem).grad | {"classes": 0.0})
        < 1e-14
    )


# ---- compilation, refusals


def test_trainings_that_differ_in_numbers_are_compiled_once():
    """Another call, another outer point, another length and another schedule: no new trace."""
    traces = []

    def counted(params, outer, batch):
        traces.append(1)
        return trainings.loss(params, outer | {"shift": jnp.zeros(1)}, batch, inner_step=0)

    problem, optimizer = trainings.make(20), optax.sgd(0.1)
    make = lambda steps, **keywords: bx.replay.value_and_metagrad(
        counted, trainings.quality, optimizer, steps, **keywords
    )
    args = trainings.reader(problem), problem.batch
    first = make(20)(problem.params, problem.outer, *args)
    before = len(traces)
    assert before <= 6
    make(20)(problem.params, jax.tree.map(lambda a: 0.9 * a, problem.outer), *args)
    make(12, schedule=bx.replay.tree(3))(problem.params, problem.outer, *args)
    again = make(20, schedule=bx.replay.everything())(problem.params, problem.outer, *args)
    assert len(traces) == before
    assert trainings.distance(again.grad, first.grad) == 0


def test_a_step_that_differs_when_done_again_is_refused():
    problem, reads = trainings.make(20), []
    rows = jax.tree.map(lambda a: a, problem.data)

    def forgetful(step):
        reads.append(step)
        batch = jax.tree.map(lambda a: a[step], rows)
        return batch | {"y": batch["y"] + 1e-12 * len(reads)}

    fn = whole(problem)
    with pytest.raises(RuntimeError, match="gave other bits than the first time"):
        fn(problem.params, problem.outer, bx.replay.reader(forgetful), problem.batch)
    whole(problem, verify=False)(
        problem.params, problem.outer, bx.replay.reader(forgetful), problem.batch
    )


def test_what_is_not_finite_is_named():
    problem = trainings.make(20)
    bad = problem._replace(outer=problem.outer | {"rate": problem.outer["rate"].at[7].set(jnp.inf)})
    with pytest.raises(bx.SolveError, match="inner_nonfinite at training step 8"):
        run(bad)
    assert run(bad, throw=False).info["code"] == bx.RESULTS.inner_nonfinite
    still = problem._replace(params=problem.params | {"dead": jnp.zeros(2)})
    with pytest.raises(
        bx.SolveError, match="hypergradient_nonfinite on the way back over training step 19"
    ):
        run(still, optax.adam(1e-2))  # a gradient of exactly zero under a square root
    assert run(still, optax.adam(1e-2, eps_root=1e-12)).info["code"] == bx.RESULTS.success


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(num_steps=0), "num_steps: got 0"),
        (dict(schedule=bx.replay.segments), "Call the factory"),
        (dict(at=(65,)), "at: got"),
        (dict(microbatches=0), "microbatches: got 0"),
        (dict(optimizer=3), "optimizer: got"),
        (dict(inner_objective=3), "inner_objective: got int"),
    ],
)
def test_refusals(change, match):
    arguments = dict(
        inner_objective=trainings.inner,
        outer_objective=trainings.quality,
        optimizer=optax.sgd(0.1),
        num_steps=64,
    )
    with pytest.raises((TypeError, ValueError), match=match):
        bx.replay.value_and_metagrad(**arguments | change)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_transformations_are_refused(transform):
    problem = trainings.make(5)
    fn = whole(problem)
    call = lambda decay: (
        fn(
            problem.params,
            problem.outer | {"decay": decay},
            trainings.reader(problem),
            problem.batch,
        ).value
    )
    point = problem.outer["decay"][None] if transform is jax.vmap else problem.outer["decay"]
    with pytest.raises(TypeError, match="outer_params: got a traced value"):
        transform(call)(point)


def test_an_iterable_is_refused():
    problem = trainings.make(5)
    with pytest.raises(TypeError, match="replay.reader"):
        whole(problem)(problem.params, problem.outer, iter([1, 2]), problem.batch)
