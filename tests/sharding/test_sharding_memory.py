"""Microbatches, half precision, rematerialisation, donation: the same answers, less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import bilevax as bx
from bilevax import tree
from bilevax.base import Ctx, split
from bilevax.run.chunk import run_chunk
from bilevax.run.state import Plan
from tests.closed_form import flatten
from tests.test_protocols import FORM, KEY, METHODS

S, H = bx.sharding, bx.hypergradient


def gradient(
    name,
    wrap,
    y=FORM.inner_params,
    x=FORM.outer_params,
    batches=(FORM.inner_batch, FORM.outer_batch),
):
    method, solver, _ = METHODS[name]
    fn = bx.value_and_hypergrad(
        wrap(FORM.inner), wrap(FORM.outer), solver=solver, hypergradient=method
    )
    estimate = jax.jit(lambda *args: fn(*args, key=KEY))(y, x, *batches)
    return estimate.value, estimate.grad, estimate.inner_params


@functools.cache
def plain(name):
    return gradient(name, lambda f: f)


def near(a, b, tol=1e-10):
    return np.linalg.norm(flatten(a) - flatten(b)) <= tol * np.linalg.norm(flatten(b))


WRAPS = {
    "accumulate": lambda f: S.accumulate(f, 4),
    "remat": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable),
}


@pytest.mark.turns
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    "name",
    [
        "implicit",
        *[
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("unrolled", "sama", "finite_difference", "forward")
        ],
    ],
)
def test_wrapped_objectives_have_the_same_derivatives(name, wrap):
    assert near(gradient(name, WRAPS[wrap]), plain(name))


@pytest.mark.turns
def test_accumulation_on_eight_devices():
    run = lambda wrap, **keywords: bx.solve_bilevel(
        wrap(FORM.inner), wrap(FORM.outer), FORM.inner_params, FORM.outer_params,
        inner_data=FORM.inner_batch, outer_data=FORM.outer_batch,
        algorithm=bx.algorithms.soba(0.1, 0.1), num_steps=5, keep="last", **keywords,
    )  # fmt: skip
    one = run(lambda f: f)
    twice = lambda f: S.accumulate(f, 2)
    out = run(twice, sharding=S.data_parallel(mean=True))
    assert near((out.inner_params, out.outer_params), (one.inner_params, one.outer_params))


def test_accumulation_of_aux_state_and_keys():
    def fn(y, x, batch, model, *, key):
        return jnp.mean((batch["a"] - y) ** 2) + 0.0 * jax.random.uniform(key), (
            model + jnp.sum(batch["a"]),
            {"first": batch["a"][0], "draw": jax.random.uniform(key)},
        )

    wrapped = S.accumulate(bx.objective(fn, has_aux=True, stateful=True, keyed=True), 3)
    value, (model, aux) = wrapped(
        jnp.asarray(1.0), None, Ctx({"a": jnp.arange(6.0)}, KEY, jnp.asarray(0.5))
    )
    assert np.allclose(value, np.mean((np.arange(6) - 1.0) ** 2)) and float(model) == 15.5
    assert aux["first"].tolist() == [0.0, 1.0, 2.0] and len(set(aux["draw"].tolist())) == 3


def test_accumulation_takes_the_memory_of_a_part():
    """A wide layer on 64 rows: the activations of a gradient and of a Hessian-vector product shrink
    with the microbatches."""

    def fn(y, x, batch):
        return jnp.mean(jnp.tanh(jnp.tanh(batch @ y["a"]) @ y["b"]) ** 2)

    y = {"a": jnp.ones((16, 512)), "b": jnp.ones((512, 512))}
    batch = jnp.ones((2048, 16))

    def peak(objective):
        hvp = lambda y: jax.jvp(jax.grad(lambda y: objective.fn(y, None, batch)), (y,), (y,))[1]
        return jax.jit(hvp).lower(y).compile().memory_analysis().temp_size_in_bytes

    whole, parts = peak(bx.objective(fn)), peak(S.accumulate(fn, 16))
    assert parts < whole / 3, (whole, parts)


def test_accumulation_refuses_what_it_does_not_divide():
    with pytest.raises(ValueError, match=r"batch: got shapes .*16.* for 3 microbatches"):
        gradient("one_step", lambda f: S.accumulate(f, 3))
    with pytest.raises(ValueError, match="microbatches: got 0"):
        S.accumulate(FORM.inner, 0)


# ---- precision


@pytest.mark.parametrize(
    "name",
    [
        "implicit",
        pytest.param("sama", marks=pytest.mark.slow),
        pytest.param("unrolled", marks=pytest.mark.slow),
    ],
)
def test_half_precision_inside_whole_precision_around(name):
    down = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))

    def inner(y, x, batch):
        return jnp.mean((batch["X"] @ y["w"] - batch["t"]) ** 2) + jnp.exp(x["penalty"]) * jnp.sum(
            y["w"] * y["w"]
        )

    def outer(y, x, batch):
        return jnp.mean((batch["X"] @ y["w"] - batch["t"]) ** 2)

    rng = np.random.default_rng(0)
    batches = down(
        [{"X": rng.standard_normal((64, 8)), "t": rng.standard_normal(64)} for _ in range(2)]
    )
    method = {
        "implicit": H.implicit(bx.linear.cg(tol=1e-3)),
        "sama": H.sama(),
        "unrolled": H.unrolled(),
    }[name]

    def estimate(wrap):
        fn = bx.value_and_hypergrad(
            wrap(inner),
            wrap(outer),
            solver=bx.inner.optax(optax.sgd(0.1), 30),
            hypergradient=method,
        )
        return jax.jit(fn)(down({"w": np.zeros(8)}), down({"penalty": -1.0}), *batches)

    half, whole = estimate(S.low_precision), estimate(lambda f: f)
    assert all(
        leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves((half.grad, half.inner_params, half.value, half.state.method))
        if tree.is_float(leaf)
    )
    assert near(half.grad, whole.grad, 0.05) and near(half.inner_params, whole.inner_params, 0.05)
    assert not near(half.grad, whole.grad, 1e-5)  # it did compute in half precision
    text = str(
        jax.make_jaxpr(S.low_precision(inner).fn)(
            down({"w": np.zeros(8)}), down({"penalty": -1.0}), batches[0]
        )
    )
    assert "bf16[64]" in text


def test_half_precision_keeps_the_model_state_s_type():
    fn = bx.objective(
        lambda y, x, b, m: (jnp.mean(b - y), (m + jnp.mean(b), jnp.mean(b))),
        stateful=True,
        has_aux=True,
    )
    value, (model, aux) = S.low_precision(fn)(
        jnp.float32(1.0), None, Ctx(jnp.ones(4, jnp.float32), None, jnp.float32(2.0))
    )
    assert value.dtype == model.dtype == jnp.float32 and float(model) == 3.0
    with pytest.raises(TypeError, match="dtype: got"):
        S.low_precision(fn, jnp.int32)


# ---- donation


def test_the_state_is_donated():
    """A chunk writes its state over the one that it was given: it is held once."""
    size = 4096
    algorithm = bx.algorithms.soba(0.1, 0.1)
    inner, outer = (
        (lambda y, x, b: jnp.sum((y - x) ** 2)),
        (lambda y, x, b: jnp.sum((y - 1.0) ** 2)),
    )
    state = bx.solve_bilevel(
        inner, outer, jnp.zeros(size), jnp.zeros(size), algorithm=algorithm, num_steps=1
    ).state
    problem = bx.check.problem(inner, outer, bx.data.same, bx.data.same, bx.data.same)
    static, dynamic = split(Plan(problem, algorithm, None, None))
    memory = (
        run_chunk.lower(static, 4, state, dynamic, (None, None, None), 4)
        .compile()
        .memory_analysis()
    )
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.size == size)
    assert held >= 5 * 8 * size and memory.alias_size_in_bytes >= held


def test_activations_offloaded_to_the_host():
    """A rematerialisation policy that moves named activations to the host's memory, where the
    backend has such a memory."""
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    if not {"device", "pinned_host"} <= kinds:
        pytest.skip(f"this backend's memories are {sorted(kinds)}")
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["hidden"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def plainly(y, x, batch):
        return jnp.mean((jnp.tanh(checkpoint_name(batch @ y, "hidden")) - x) ** 2)

    def estimate(inner):
        fn = bx.value_and_hypergrad(
            inner, plainly, solver=bx.inner.optax(optax.sgd(0.1), 2), hypergradient=H.one_step()
        )
        return jax.jit(fn)(jnp.ones(3), jnp.asarray(0.5), jnp.ones((8, 3)), jnp.ones((8, 3))).grad

    assert near(estimate(jax.checkpoint(plainly, policy=policy)), estimate(plainly))
