"""Eight virtual devices against one: every method and algorithm under data_parallel, the main ones
under fsdp and tasks, and what they communicate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import bilevax as bx
from tests.closed_form import flatten
from tests.test_protocols import ALGORITHMS, FORM, KEY, METHODS

S, H, P = bx.sharding, bx.hypergradient, PartitionSpec
WIDE, FEW, ROWS, K = (
    64,
    16,
    16,
    3,
)  # entries of the inner and the outer vector, rows of a batch, inner steps


def _rows(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, WIDE)) / 8
    return x, x @ np.ones(WIDE) / 4 + 0.1 * rng.standard_normal(ROWS)


TRAIN, VALID = _rows(0), _rows(1)


def inner(y, x, batch):
    residual = batch[0] @ (y["w"] * jnp.repeat(jnp.exp(x["scale"]), WIDE // FEW)) - batch[1]
    return 0.5 * jnp.mean(residual * residual) + 0.05 * jnp.sum(y["w"] ** 2)


def outer(y, x, batch):
    residual = batch[0] @ y["w"] - batch[1]
    return 0.5 * jnp.mean(residual * residual)


START = ({"w": jnp.zeros(WIDE)}, {"scale": jnp.zeros(FEW)})
SGD = bx.inner.optax(bx.tunable(optax.sgd, learning_rate=0.3), K)
OUTER = bx.tunable(optax.adam, learning_rate=0.05)
CG = H.implicit(bx.linear.cg(maxiter=5, tol=1e-13), max_residual=jnp.inf)
MAIN = {
    "implicit": bx.algorithms.double_loop(SGD, CG, OUTER),
    "unrolled": bx.algorithms.double_loop(SGD, H.unrolled(), OUTER),
    "sama": bx.algorithms.double_loop(bx.inner.optax(optax.adam(0.05), K), H.sama(), OUTER),
    "difference": bx.algorithms.double_loop(SGD, H.finite_difference(), OUTER),
    "soba": bx.algorithms.soba(0.1, 0.1),
}


def run(name, driver=bx.solve_bilevel, **keywords):
    arguments = {
        "inner_data": TRAIN,
        "outer_data": VALID,
        "num_steps": 4,
        "keep": "last",
        "key": KEY,
        **keywords,
    }
    if driver is not bx.solve_bilevel:
        sharding = arguments.pop("sharding")
        return driver(
            bx.solve_bilevel,
            inner,
            outer,
            *START,
            algorithm=MAIN[name],
            sharding=sharding,
            **arguments,
        )
    return bx.solve_bilevel(inner, outer, *START, algorithm=MAIN[name], **arguments)


@functools.cache
def alone(name):
    return run(name)


def equal(a, b, tol=1e-10):
    a, b = (
        (s.inner_params, s.outer_params, s.history["value"], s.history["grad_norm"]) for s in (a, b)
    )
    return np.linalg.norm(flatten(a) - flatten(b)) <= tol * np.linalg.norm(flatten(b))


# ---- equal to one device


@pytest.mark.turns
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("double_loop", "soba") else pytest.param(n, marks=pytest.mark.slow)
        for n in ALGORITHMS
    ],
)
def test_data_parallel_equals_one_device(name):
    def solve(**keywords):
        return bx.solve_bilevel(
            FORM.inner, FORM.outer, FORM.inner_params, FORM.outer_params,
            inner_data=FORM.inner_batch, outer_data=FORM.outer_batch,
            algorithm=ALGORITHMS[name], num_steps=10, key=KEY, **keywords,
        )  # fmt: skip

    assert equal(solve(sharding=S.data_parallel()), solve())


@pytest.mark.parametrize("term", ["square of a mean", "variance"])
def test_what_is_a_mean_at_zero_alone_is_not_taken_for_one(term):
    """From the usual start at zero, terms of second order in the parameters and their gradients are
    zero."""
    x, t = np.random.default_rng(0).standard_normal((2, 64, 5))

    def fit(w, lam, b):
        pred = b[0] @ w
        more = jnp.mean(pred) ** 2 if term == "square of a mean" else jnp.var(pred)
        return jnp.mean((pred - b[1]) ** 2) + 5.0 * more + jnp.exp(lam) * jnp.sum(w**2)

    judge = lambda w, lam, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    solve = lambda **k: bx.solve_bilevel(
        fit, judge, jnp.zeros(5), jnp.asarray(-3.0), inner_data=(x, t[:, 0]), outer_data=(x[::-1],
        t[::-1, 0]),
        algorithm=bx.algorithms.soba(0.01, 0.01), num_steps=3, keep="last", **k,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"inner_objective: got fit with mean=True, which is no mean"
    ):
        solve(sharding=S.data_parallel(mean=True))
    assert equal(solve(sharding=S.data_parallel()), solve())


@pytest.mark.turns
@pytest.mark.parametrize(
    "name", [n if n == "sama" else pytest.param(n, marks=pytest.mark.slow) for n in MAIN]
)
def test_means_of_own_rows_equal_one_device(name):
    assert equal(run(name, sharding=S.data_parallel(mean=True)), alone(name))


@pytest.mark.turns
@pytest.mark.parametrize(
    "name",
    [n if n in ("implicit", "soba") else pytest.param(n, marks=pytest.mark.slow) for n in MAIN],
)
def test_fsdp_equals_one_device_and_keeps_its_layout(name):
    """Every large leaf of the state at one part in eight on each device, at the end as at the
    beginning."""
    out = run(name, sharding=S.fsdp(min_size=16))
    assert equal(out, alone(name))
    leaves = [
        leaf for leaf in jax.tree.leaves((out.state.algorithm, out.state.best)) if leaf.size >= 16
    ]
    assert len(leaves) >= (3 if name != "soba" else 2)
    for leaf in leaves:
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    assert (
        out.inner_params["w"].sharding.spec == out.outer_params["scale"].sharding.spec == P("data")
    )


def test_float32_is_equal_to_its_rounding():
    start = jax.tree.map(lambda a: a.astype(jnp.float32), START)
    data = jax.tree.map(lambda a: a.astype(np.float32), (TRAIN, VALID))
    solve = lambda **k: bx.solve_bilevel(
        inner,
        outer,
        *start,
        inner_data=data[0],
        outer_data=data[1],
        algorithm=MAIN["soba"],
        num_steps=20,
        keep="last",
        **k,
    )
    assert equal(solve(sharding=S.data_parallel()), solve(), 1e-5)


SLOW_DATA = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("replace", "partitioned", "generated")
]


@pytest.mark.turns
@pytest.mark.parametrize("data", ["epoch", "stream", *SLOW_DATA])
def test_drawn_batches_are_the_same_ones(data):
    made = {
        "epoch": lambda: bx.data.minibatches(TRAIN, 8),
        "replace": lambda: bx.data.minibatches(TRAIN, 8, replace=True),
        "partitioned": lambda: bx.data.partitioned(TRAIN, 8),
        "generated": lambda: lambda key, step: (jax.random.normal(key, (8, WIDE)), jnp.ones(8)),
        "stream": lambda: iter(
            [jax.tree.map(lambda a, i=i: np.roll(a, i, 0)[:8], TRAIN) for i in range(60)]
        ),
    }[data]
    keep = {"num_steps": 6, "outer_data": VALID}
    assert equal(
        run("soba", inner_data=made(), sharding=S.data_parallel(), **keep),
        run("soba", inner_data=made(), **keep),
    )


def test_two_axes_and_specs_by_path():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    out = run("implicit", sharding=S.by_path(mesh, {r"inner\['w'\]": P("model")}, rows="data"))
    assert equal(out, alone("implicit"))
    state = out.state.algorithm
    assert (
        state.inner.params["w"].sharding.spec
        == state.method.adjoint["w"].sharding.spec
        == P("model")
    )
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves((state.outer, state.outer_opt)))
    both = run("soba", sharding=S.by_path(mesh, {}, rows=("data", "model")))
    assert equal(both, alone("soba"))


def test_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    placed = jax.device_put(TRAIN, jax.NamedSharding(mesh, P("data")))
    assert equal(
        run("implicit", inner_data=placed, sharding=S.data_parallel(mesh)), alone("implicit")
    )


def test_arrays_on_a_mesh_with_explicit_axes_and_no_sharding():
    """As ``jax.make_mesh`` makes one where nothing is said: they are taken as they lie."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    split = lambda a: jax.device_put(a, jax.NamedSharding(mesh, P("data")))
    placed = run("implicit", inner_data=split(TRAIN), outer_data=split(VALID))
    assert equal(placed, alone("implicit"))
    g, f = lambda y, x, b: jnp.sum((y - x) ** 2), lambda y, x, b: jnp.sum((y - 1.0) ** 2)
    solve = lambda x: bx.solve_bilevel(
        g,
        f,
        x,
        x,
        algorithm=bx.algorithms.double_loop(
            bx.inner.optax(optax.sgd(0.1), 2), H.implicit(), optax.sgd(0.1)
        ),
        num_steps=3,
        keep="last",
    )
    whole, parts = solve(jnp.arange(8.0)), solve(split(jnp.arange(8.0)))
    np.testing.assert_allclose(parts.outer_params, whole.outer_params, rtol=1e-12)
    assert parts.outer_params.sharding.spec == P("data")
    assert solve(parts.outer_params).outer_params.sharding == parts.outer_params.sharding


def test_a_state_goes_from_one_device_to_eight():
    half = run("sama", num_steps=2)
    assert equal(
        run("sama", num_steps=2, state=half.state, sharding=S.fsdp(min_size=16)),
        run("sama", num_steps=2, state=half.state),
    )


LEVELS = [
    bx.Level(
        "y",
        lambda p, b: jnp.mean((b @ p["y"] - p["x"][0]) ** 2) + 0.1 * jnp.sum(p["y"] ** 2),
        solver=optax.sgd(0.1),
        hypergradient=H.implicit(),
    ),
    bx.Level("x", lambda p, b: jnp.mean((b @ p["y"] - 1.0) ** 2), solver=optax.sgd(0.1)),
]


@pytest.mark.parametrize(
    "sharding",
    [
        pytest.param(S.data_parallel, id="data_parallel"),
        pytest.param(lambda: S.fsdp(min_size=16), id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_multilevel_equals_one_device(sharding):
    start, data = {"y": jnp.zeros(WIDE), "x": jnp.zeros(FEW)}, {"y": TRAIN[0], "x": VALID[0]}
    solve = lambda **keywords: bx.solve_multilevel(
        LEVELS, start, data=data, num_steps=3, keep="last", **keywords
    )
    out = solve(sharding=sharding())
    assert equal(out, solve())
    spec = P() if sharding is S.data_parallel else P("data")
    assert (
        out.inner_params["y"].sharding.spec
        == out.state.algorithm.method["y"].adjoint.sharding.spec
        == spec
    )


def test_nothing_is_compiled_twice():
    from bilevax.run.chunk import run_chunk

    run("soba", sharding=S.fsdp(min_size=16))
    before = run_chunk._cache_size()
    first = run("soba", sharding=S.fsdp(min_size=16), num_steps=3)
    run("soba", sharding=S.fsdp(min_size=16), num_steps=3, state=first.state)
    assert run_chunk._cache_size() == before
    assert float(START[0]["w"].sum()) == 0.0  # the caller's arrays are not donated


# ---- what is communicated


def traffic(name, sharding):
    """The all-reduces of a step outside loops as a sorted list of (how often, float64 entries),
    those inside, and all other collectives."""
    report = run(name, driver=S.dry_run, sharding=sharding)
    large = [c for c in report.collectives if c.bytes >= 8 * FEW]  # scalars: values, norms, codes
    outside, inside = (
        [
            (c.times, c.bytes // 8 // FEW * FEW)
            for c in large
            if c.kind == "all-reduce" and c.loop is loop
        ]
        for loop in (False, True)
    )
    return (
        sorted(outside, reverse=True),
        sorted(inside),
        [c for c in large if c.kind != "all-reduce"],
    )


def total(pairs):
    return sum(count * size for count, size in pairs)


@pytest.mark.turns
@pytest.mark.parametrize(
    "name, entries, loop, count",
    [
        # beyond the K inner all-reduces; the outer gradient is always one of WIDE
        ("sama", 2 * WIDE + FEW, [], 3),  # and the optimizer's adaptation, and the mixed product
        (
            "difference",
            WIDE + 2 * FEW,
            [],
            2,
        ),  # and the two gradients in the outer parameters, together
        (
            "implicit",
            2 * WIDE + FEW,
            [(1, WIDE)],
            2,
        ),  # and the last product with its mixed part; one of WIDE for each iteration
        (
            "unrolled",
            WIDE + K * (WIDE + FEW),
            [],
            1 + K,
        ),  # and, a step backward, the derivative of its gradients in both
    ],
)
def test_counted_and_weighed_all_reduces(name, entries, loop, count):
    outside, inside, others = traffic(name, S.data_parallel(mean=True))
    assert total(outside) - K * WIDE == entries, outside
    assert sum(n for n, _ in outside) - K == count, outside
    assert inside == loop
    assert others == []  # above all, nothing is gathered


@pytest.mark.parametrize("name", ["sama", pytest.param("implicit", marks=pytest.mark.slow)])
def test_without_the_mean_nothing_is_gathered_either(name):
    outside, inside, others = traffic(name, S.data_parallel())
    assert others == [] and total(inside) in (0, WIDE)


def test_the_dry_run_weighs_the_state():
    report = run("sama", driver=S.dry_run, sharding=S.fsdp(min_size=16))
    large = [piece for piece in report.pieces if piece.total_bytes >= 16 * 8]
    assert len(large) >= 6 and all(8 * piece.device_bytes == piece.total_bytes for piece in large)
    assert (
        report.state_bytes
        == sum(piece.device_bytes for piece in report.pieces)
        < report.total_bytes / 4
    )
    assert report.peak_bytes > report.state_bytes
    text = repr(report)
    assert "inner.params['w']" in text and "all-reduce" in text and "a device" in text
    with pytest.raises(TypeError, match="sharding: got None"):
        S.dry_run(bx.solve_bilevel, inner, outer, *START)


def test_loops_with_a_known_number_of_passes_are_multiplied():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def body(x, _):
        return jnp.tanh(jax.lax.psum(x, "d") / 8), None

    def loops(x):
        x = jax.lax.scan(body, x, length=12)[0]
        return jax.lax.while_loop(
            lambda x: jnp.sum(x) > 0.5, lambda x: jax.lax.psum(x, "d") / 16, x
        )

    fn = jax.jit(jax.shard_map(loops, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=False))
    found = S.collectives(fn.lower(jnp.ones(64)).compile().as_text())
    assert {(c.kind, c.bytes, c.times, c.loop) for c in found} == {
        ("all-reduce", 64, 12, False),
        ("all-reduce", 64, 1, True),
    }


# ---- tasks

TASKS, WAYS = 16, 3


def task_inner(y, x, batch):
    residual = batch[0] @ (y * jnp.exp(x["scale"])) - batch[1]
    return 0.5 * jnp.mean(residual * residual) + 0.1 * jnp.sum((y - x["center"]) ** 2)


def task_outer(y, x, batch):
    residual = batch[0] @ y - batch[1]
    return 0.5 * jnp.mean(residual * residual) + 0.01 * jnp.sum(x["scale"] ** 2)


def task_data(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((TASKS, 5, WAYS)), rng.standard_normal((TASKS, 5))


OVER_TASKS = {
    "implicit": bx.algorithms.double_loop(SGD, H.implicit(bx.linear.cg(tol=1e-13)), OUTER),
    "unrolled": MAIN["unrolled"],
    "sama": MAIN["sama"],
    "soba": MAIN["soba"],
}
EACH, MEAN = bx.tasks(task_inner, "sum"), bx.tasks(task_outer)


def run_tasks(name, driver=None, objectives=(EACH, MEAN), start=None, **keywords):
    start = jnp.zeros((TASKS, WAYS)) if start is None else start
    args = (*objectives, start, {"scale": jnp.zeros(WAYS), "center": jnp.ones(WAYS)})
    keywords = {
        "inner_data": task_data(0),
        "outer_data": task_data(1),
        "num_steps": 4,
        "keep": "last",
        "key": KEY,
        **keywords,
    }
    call = bx.solve_bilevel if driver is None else functools.partial(driver, bx.solve_bilevel)
    return call(*args, algorithm=OVER_TASKS[name], **keywords)


QUICK_TASKS = [
    n if n in ("implicit", "soba") else pytest.param(n, marks=pytest.mark.slow) for n in OVER_TASKS
]


@pytest.mark.turns
@pytest.mark.parametrize("name", QUICK_TASKS)
def test_tasks_equal_one_device_two_on_each(name):
    out, one = run_tasks(name, sharding=S.tasks()), run_tasks(name)
    assert equal(out, one)
    assert np.allclose(out.history["code"], one.history["code"])
    for column in {"inner_value", "inner_grad_norm"} & set(one.history):
        assert np.allclose(out.history[column], one.history[column], rtol=1e-9)
    for leaf in jax.tree.leaves(out.state.algorithm):
        if leaf.shape[:1] == (TASKS,):
            assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, WAYS)}


@pytest.mark.parametrize("name", QUICK_TASKS)
def test_no_collective_in_a_task_s_loops(name):
    """The outer parameters' derivatives and a few scalars, once each; nothing inside a loop,
    nothing of the inner parameters' size."""
    report = run_tasks(name, driver=S.dry_run, sharding=S.tasks())
    assert not any(c.loop for c in report.collectives)
    assert all(
        c.kind == "all-reduce" and c.times <= 2 and c.bytes <= 8 * (6 * WAYS + 6)
        for c in report.collectives
    ), report
    assert (
        sum(c.times for c in report.collectives) <= 4
    )  # sums, largest integers, largest floats (the inner gradient of single loops)


@pytest.mark.turns
def test_initialisations_and_drawn_tasks():
    """MAML on drawn tasks: the starting points come from the outer parameters, the batches from a
    function."""
    fit = lambda y, x, batch: jnp.mean((batch["a"] @ y - batch["b"]) ** 2)
    draw = lambda key, step: {
        "a": jax.random.normal(key, (TASKS, 4, WAYS)),
        "b": jnp.ones((TASKS, 4)),
    }
    algorithm = bx.algorithms.double_loop(SGD, H.unrolled(), OUTER)
    solve = lambda **keywords: bx.solve_bilevel(
        bx.tasks(fit, "sum"), bx.tasks(fit), jnp.zeros((TASKS, WAYS)), jnp.ones(WAYS),
        inner_init=bx.task_copies(TASKS), inner_data=draw,
        outer_data=draw, algorithm=algorithm, num_steps=3, keep="last", key=KEY, **keywords,
    )  # fmt: skip
    assert equal(solve(sharding=S.tasks()), solve())


def test_tasks_with_aux():
    noisy = bx.tasks(bx.objective(lambda y, x, b: (task_outer(y, x, b), jnp.sum(y)), has_aux=True))
    out, one = (
        run_tasks("soba", objectives=(EACH, noisy), **k) for k in ({"sharding": S.tasks()}, {})
    )
    assert out.history["aux"].shape == (4, TASKS) and np.allclose(
        out.history["aux"], one.history["aux"], rtol=1e-10
    )


@pytest.mark.slow
def test_tasks_with_an_inner_aux():
    told = bx.tasks(
        bx.objective(lambda y, x, b: (task_inner(y, x, b), jnp.sum(y)), has_aux=True), "sum"
    )
    out, one = (
        run_tasks("unrolled", objectives=(told, bx.tasks(task_outer)), **k)
        for k in ({"sharding": S.tasks()}, {})
    )
    assert out.history["inner_aux"].shape == (4, TASKS) and np.allclose(
        out.history["inner_aux"], one.history["inner_aux"], rtol=1e-10
    )


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(KEY, id="typed"),
        pytest.param(jax.random.PRNGKey(4), id="plain", marks=pytest.mark.slow),
    ],
)
def test_keyed_tasks_draw_the_keys_of_one_device(key):
    jitter = lambda fn: bx.objective(
        lambda y, x, b, *, key: fn(y + 0.1 * jax.random.normal(key, y.shape), x, b), keyed=True
    )
    objectives = bx.tasks(jitter(task_inner), "sum"), bx.tasks(jitter(task_outer))
    out, one = (
        run_tasks("soba", objectives=objectives, key=key, **k)
        for k in ({"sharding": S.tasks()}, {})
    )
    assert equal(out, one)
    assert not equal(one, run_tasks("soba", objectives=objectives, key=jax.random.key(99)))


@pytest.mark.turns
def test_tasks_of_three_levels():
    """A head and a step size a task, and what all of them share: as on one device, with the tasks'
    state split."""
    rng = np.random.default_rng(7)
    rows = [(rng.standard_normal((TASKS, 4, 3)), rng.standard_normal((TASKS, 4))) for _ in range(2)]
    fit = lambda w, b: jnp.mean((jnp.einsum("tij,tj->ti", b[0], w) - b[1]) ** 2, 1)
    descent = bx.inner.optax(optax.adam(0.1), 2)
    keyed = bx.objective(
        lambda p, b, *, key: jnp.sum(
            fit(p["w"]["v"] + 0.01 * jax.random.normal(key, p["w"]["v"].shape), b)
            + jnp.exp(p["s"]) * jnp.sum(p["w"]["v"] ** 2, 1)
        ),
        keyed=True,
    )
    levels = [
        bx.Level("w", keyed, solver=descent, hypergradient=CG),
        bx.Level(
            "s",
            lambda p, b: jnp.mean(fit(p["w"]["v"], b)) + jnp.sum((p["s"] - p["x"]) ** 2),
            solver=descent,
            hypergradient=CG,
        ),
        bx.Level(
            "x",
            lambda p, b: jnp.mean(fit(p["w"]["v"], b)) + 0.1 * p["x"] ** 2,
            solver=optax.sgd(0.1),
        ),
    ]
    start = {"w": {"v": jnp.zeros((TASKS, 3))}, "s": jnp.full(TASKS, -2.0), "x": jnp.asarray(-2.0)}
    data = {"w": rows[0], "s": rows[1], "x": rows[1]}
    solve = lambda **k: bx.solve_multilevel(
        levels, start, data=data, num_steps=3, keep="last", key=KEY, **k
    )
    out, one = solve(sharding=S.tasks()), solve()
    assert equal(out, one)
    assert (
        out.inner_params["w"]["v"].sharding.spec
        == out.inner_params["s"].sharding.spec
        == P("tasks")
    )
    assert out.outer_params.sharding.is_fully_replicated


# ---- steps inside shard_map and pmap


@pytest.mark.turns
@pytest.mark.parametrize("where", ["check_vma", "no check_vma", "pmap"])
@pytest.mark.parametrize(
    "name", [n if n == "sama" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_axis_mean_inside_shard_map_and_pmap(name, where):
    method, solver, _ = METHODS[name]
    if name == "fixed_point":
        pytest.skip("its map is the user's, and so is its mean over the axis")
    build = lambda wrap: bx.value_and_hypergrad(
        wrap(FORM.inner), wrap(FORM.outer), solver=solver, hypergradient=method
    )
    plain, fn = build(lambda f: f), build(lambda f: S.axis_mean(f, "i"))
    args = (FORM.inner_params, FORM.outer_params)
    step = lambda y, x, a, b: (lambda e: (e.value, e.grad, e.inner_params))(fn(y, x, a, b, key=KEY))
    batches = jax.tree.map(jnp.asarray, (FORM.inner_batch, FORM.outer_batch))
    if where == "pmap":
        split = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), batches)
        got = jax.tree.map(
            lambda a: a[5], jax.pmap(step, "i", in_axes=(None, None, 0, 0))(*args, *split)
        )
    else:
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P(), P("i"), P("i")),
            out_specs=P(),
            check_vma=where == "check_vma",
        )
        got = jax.jit(mapped)(*args, *batches)
    want = jax.jit(lambda *a: (lambda e: (e.value, e.grad, e.inner_params))(plain(*a, key=KEY)))(
        *args, *batches
    )
    assert np.linalg.norm(flatten(got) - flatten(want)) <= 1e-10 * np.linalg.norm(flatten(want))


def test_axis_mean_of_aux_state_and_keys():
    def stateful(y, x, batch, model, *, key):
        noise = jax.random.normal(key, batch.shape)
        return jnp.mean((y - x * batch) ** 2), (
            {"mean": 0.5 * model["mean"] + jnp.mean(batch), "n": model["n"] + 1},
            {"noise": jnp.mean(noise)},
        )

    wrapped = S.axis_mean(bx.objective(stateful, has_aux=True, stateful=True, keyed=True), "i")
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    model, batch = {"mean": jnp.asarray(2.0), "n": jnp.int32(3)}, jnp.arange(16.0)
    for check in (True, False):
        fn = jax.shard_map(
            lambda b: wrapped(jnp.asarray(1.0), jnp.asarray(2.0), bx.base.Ctx(b, KEY, model)),
            mesh=mesh,
            in_specs=P("i"),
            out_specs=P(),
            check_vma=check,
        )
        value, (new, aux) = jax.jit(fn)(batch)
        assert (
            np.allclose(value, np.mean((1 - 2 * np.arange(16.0)) ** 2))
            and float(new["mean"]) == 8.5
            and int(new["n"]) == 4
        )
        draws = [np.mean(jax.random.normal(jax.random.fold_in(KEY, i), (2,))) for i in range(8)]
        assert np.allclose(aux["noise"], np.mean(draws))


def test_axis_mean_refuses_parameters_that_differ_by_device():
    wrapped = S.axis_mean(lambda y, x, b: jnp.sum(y * x * b), "i")
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    fn = jax.shard_map(
        lambda y: jax.grad(wrapped, has_aux=True)(y, y, bx.base.Ctx(y))[0],
        mesh=mesh,
        in_specs=P("i"),
        out_specs=P("i"),
    )
    with pytest.raises(ValueError, match="inner_params: got values that differ along 'i'"):
        fn(jnp.ones(8))


# ---- refusals


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: run("soba", sharding=S.data_parallel), TypeError, r"sharding: got function.*Call the factory"),
        (lambda: S.data_parallel(axis=3), TypeError, "axis: got 3"),
        (lambda: S.data_parallel([]), TypeError, "devices: got list"),
        (lambda: S.data_parallel(mean=1), TypeError, "mean: got 1"),
        (lambda: S.fsdp(min_size=0), ValueError, "min_size: got 0"),
        (lambda: S.fsdp(jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))), ValueError, (
            "axis: got 'data'; expected one of the mesh's"
        )),
        (lambda: S.by_path(3, {}), TypeError, "mesh: got int 3"),
        (lambda: S.by_path(S.fsdp().mesh, {"w": "data"}), TypeError, r"rules\['w'\]: got str"),
        (lambda: S.by_path(S.fsdp().mesh, {"w": P("model")}), ValueError, "got the axis str 'model'"),
        (lambda: run("soba", sharding=S.by_path(S.fsdp().mesh, {"w": P(None, "data")})), ValueError, r"rules: got .* for inner\['w'\]"),
        (lambda: run("soba", sharding=S.by_path(S.fsdp().mesh, {"no_such": P("data")})), ValueError, "rules: got 'no_such', which matches no"),
        (lambda: run("soba", inner_data=jax.tree.map(lambda a: a[:15], TRAIN), sharding=S.data_parallel()), ValueError, r"batch of inner: got \[15\] rows on 8"),
        (lambda: run_tasks("soba", objectives=(bx.tasks(task_inner), MEAN), sharding=S.tasks()), ValueError, r"inner_objective.*expected bilevax\.tasks\(fn, 'sum'\)"),
        (lambda: run("soba", sharding=S.tasks()), ValueError, "inner_objective.*bilevax.tasks"),
        (lambda: run_tasks("soba", sharding=S.tasks(jax.devices()[:5])), ValueError, (
            "inner_params: got shapes .* for tasks on 5 devices"
        )),
        (lambda: bx.solve_multilevel(LEVELS, {"y": jnp.zeros(6), "x": jnp.zeros(6)}, data={"y": jnp.ones((8, 6)), "x": jnp.ones((8, 6))}, sharding=S.tasks()), ValueError, r"params\['y'\]: got leading axes \[6\] for tasks on 8 devices"),
        (lambda: S.axis_mean(inner, 3), TypeError, "axis_name: got int 3"),
        (lambda: jax.jit(lambda x: bx.solve_bilevel(inner, outer, START[0], x, inner_data=TRAIN, outer_data=VALID, algorithm=MAIN["soba"], num_steps=2, on_failure="skip").outer_params)(START[1]), ValueError, "on_failure.*under a JAX transformation"),
    ],
)  # fmt: skip
def test_refusals(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_sum_is_not_taken_for_a_mean():
    def summed(y, x, batch):
        return jnp.sum((batch[0] @ y["w"] * jnp.exp(jnp.mean(x["scale"])) - batch[1]) ** 2)

    solve = lambda **k: bx.solve_bilevel(
        summed,
        outer,
        *START,
        inner_data=TRAIN,
        outer_data=VALID,
        algorithm=bx.algorithms.soba(0.01, 0.01),
        num_steps=3,
        keep="last",
        **k,
    )
    with pytest.raises(
        ValueError, match=r"inner_objective: got summed with mean=True, which is no mean"
    ):
        solve(sharding=S.data_parallel(mean=True))
    assert equal(solve(sharding=S.data_parallel()), solve())
