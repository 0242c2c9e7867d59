"""What every hypergradient method and every algorithm must do, whatever else it does. A new one
joins by one line of a registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import bilevax as bx
from bilevax import base, tree
from tests.problems import PROBLEMS, flatten

FORM = PROBLEMS["quadratic_tree"]
STEP = 1.0 / FORM.smoothness.largest
SGD = bx.inner.optax(bx.tunable(optax.sgd, learning_rate=STEP), 8)
LONG = bx.inner.optax(bx.tunable(optax.sgd, learning_rate=STEP), 200)
KEY = jax.random.key(0)


def descent_map(y, x, batch):
    return jax.tree.map(lambda p, g: p - STEP * g, y, jax.grad(FORM.inner)(y, x, batch))


H, L = bx.hypergradient, bx.linear

# name -> method, solver, and whether it is exact at a solved lower level
METHODS = {
    "implicit": (H.implicit(L.cg(tol=1e-12)), LONG, True),
    "implicit_low_memory": (H.implicit(L.cg(tol=1e-12), low_memory=True), LONG, True),
    "implicit_minres": (H.implicit(L.minres(tol=1e-12)), LONG, True),
    "implicit_gmres": (H.implicit(L.gmres(tol=1e-12)), LONG, True),
    "implicit_bicgstab": (H.implicit(L.bicgstab(tol=1e-12)), LONG, True),
    "implicit_cholesky": (H.implicit(L.cholesky()), LONG, True),
    "implicit_neumann": (H.implicit(L.neumann(200, step=STEP)), LONG, True),
    "implicit_nystrom_cg": (
        H.implicit(L.cg(tol=1e-12, preconditioner=L.nystrom_preconditioner(3))),
        LONG,
        True,
    ),
    "fixed_point": (H.fixed_point(descent_map, L.gmres(tol=1e-12)), LONG, True),
    "unrolled": (H.unrolled(), LONG, True),
    "truncated": (H.unrolled(last=3), SGD, False),
    "forward": (H.forward(), LONG, True),
    "one_step": (H.one_step(), SGD, False),
    "finite_difference": (H.finite_difference(), SGD, False),
    "sama": (H.sama(), SGD, False),
    "zeroth_order": (H.zeroth_order(samples=4), SGD, False),
    "kkt": (H.kkt(), bx.inner.qp(), True),
    "shine": (H.shine(refine=30, tol=1e-12), bx.inner.lbfgs(tol=1e-12), True),
}


def function(name):
    method, solver, _ = METHODS[name]
    return bx.value_and_hypergrad(FORM.inner, FORM.outer, solver=solver, hypergradient=method)


def call(fn, y=FORM.inner_params, x=FORM.outer_params, **kwargs):
    return fn(y, x, FORM.inner_batch, FORM.outer_batch, key=KEY, **kwargs)


@functools.cache
def compiled(name):
    fn = function(name)
    return jax.jit(lambda y, x, state, batches: fn(y, x, *batches, key=KEY, state=state)), fn.init(
        FORM.inner_params
    )


def evaluate(
    name,
    y=FORM.inner_params,
    x=FORM.outer_params,
    state=None,
    batches=(FORM.inner_batch, FORM.outer_batch),
):
    jitted, first = compiled(name)
    return jitted(*jax.tree.map(jnp.asarray, (y, x, first if state is None else state, batches)))


def close(a, b, tol=1e-10):
    a, b = flatten(a), flatten(b)
    return np.linalg.norm(a - b) <= tol * (np.linalg.norm(b) + 1e-300)


every = pytest.mark.parametrize("name", METHODS)
# What compiles anew: a method of each kind in the quick suite, the others in the slow one.
KINDS = ("implicit", "implicit_cholesky", "fixed_point", "unrolled", "one_step", "sama")
some = pytest.mark.parametrize(
    "name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)


@pytest.mark.turns
@every
def test_shapes_info_and_state(name):
    estimate = evaluate(name)
    assert jax.tree.structure(estimate.grad) == jax.tree.structure(FORM.outer_params)
    assert all(jnp.ndim(v) == 0 for v in estimate.info.values())
    assert {"code", "grad_norm", "inner_value"} <= set(estimate.info)
    assert int(estimate.info["code"]) < 10
    assert bool(tree.all_finite((estimate.grad, estimate.state)))
    assert abs(float(estimate.info["grad_norm"]) - np.linalg.norm(flatten(estimate.grad))) < 1e-10


@pytest.mark.turns
@every
def test_exact_where_it_says_so(name):
    if METHODS[name][2]:
        assert close(evaluate(name).grad, FORM.hypergradient(FORM.outer_params), 1e-8)
    # biased or noisy, but no nonsense: it points down the true slope on this well-conditioned
    # problem
    else:
        cosine = flatten(evaluate(name).grad) @ flatten(FORM.hypergradient(FORM.outer_params))
        assert cosine > 0


@pytest.mark.turns
@every
def test_a_state_goes_around_without_a_second_trace(name):
    estimate = evaluate(name)
    again = evaluate(name, y=estimate.inner_params, state=estimate.state)
    assert jax.tree.structure(again.state) == jax.tree.structure(estimate.state)
    assert compiled(name)[0]._cache_size() == 1
    assert int(again.info["code"]) < 10


@pytest.mark.turns
@some
def test_vmap_equals_a_loop(name):
    fn = function(name)
    xs = jax.tree.map(lambda a: jnp.stack([a, 1.1 * a, a - 0.1]), FORM.outer_params)
    batched = jax.jit(jax.vmap(lambda x: call(fn, x=x).grad))(xs)
    for i in range(3):
        assert close(
            jax.tree.map(lambda a, i=i: a[i], batched),
            evaluate(name, x=jax.tree.map(lambda a, i=i: a[i], xs)).grad,
            1e-7,
        )


@pytest.mark.turns
@some
def test_a_zero_cotangent_gives_zero(name):
    """The outer objective ignores the inner parameters: no method may divide by the norm of
    nothing."""
    method, solver, _ = METHODS[name]
    fn = bx.value_and_hypergrad(
        FORM.inner, lambda y, x, batch: 0.5 * tree.dot(x, x), solver=solver, hypergradient=method
    )
    estimate = jax.jit(lambda: call(fn))()
    assert close(estimate.grad, FORM.outer_params, 1e-12) and int(estimate.info["code"]) < 10


@pytest.mark.turns
@some
def test_float32_stays_float32(name):
    down = functools.partial(
        jax.tree.map, lambda a: jnp.asarray(a, jnp.float32) if tree.is_float(a) else jnp.asarray(a)
    )
    fn = function(name)
    y, x, batches = (
        down(FORM.inner_params),
        down(FORM.outer_params),
        (down(FORM.inner_batch), down(FORM.outer_batch)),
    )
    estimate = jax.jit(lambda y, x, batches: fn(y, x, *batches, key=KEY))(y, x, batches)
    assert all(
        a.dtype == jnp.float32 for a in jax.tree.leaves((estimate.grad, estimate.inner_params))
    )
    if METHODS[name][2]:
        assert close(estimate.grad, FORM.hypergradient(FORM.outer_params), 2e-3)


@pytest.mark.turns
@some
def test_sharded_data_equals_one_device(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    batches = jax.device_put((FORM.inner_batch, FORM.outer_batch), rows)
    y, x = jax.device_put((FORM.inner_params, FORM.outer_params), everywhere)
    fn = function(name)
    sharded = jax.jit(lambda y, x, batches: fn(y, x, *batches, key=KEY).grad)(y, x, batches)
    assert close(sharded, evaluate(name).grad, 1e-8 if name == "zeroth_order" else 1e-10)


@every
def test_repr_shows_the_settings(name):
    text = repr(METHODS[name][0])
    assert "(" in text and "0x" not in text.replace("function", ""), text


@every
def test_equal_settings_are_equal(name):
    static = base.split(METHODS[name][0])[0]
    assert hash(static) == hash(base.split(METHODS[name][0])[0])


# ---- algorithms

A = bx.algorithms
SMALL = STEP / 4
FRONT = A.multi_objective(
    SGD, H.implicit(), bx.tunable(optax.sgd, learning_rate=0.1), rule="mean", preference=[1.0, 1.0]
)
ALGORITHMS = {
    "multi_objective": FRONT,
    "value_function": A.value_function(
        bx.inner.lbfgs(), bx.tunable(optax.sgd, learning_rate=0.1), penalty=100.0
    ),
    "double_loop": A.double_loop(SGD, H.implicit(), bx.tunable(optax.sgd, learning_rate=0.1)),
    "soba": A.soba(SMALL, SMALL),
    "ma_soba": A.ma_soba(SMALL, SMALL),
    "fsla": A.fsla(SMALL, SMALL),
    "amigo": A.amigo(SMALL, SMALL),
    "stocbio": A.stocbio(SMALL, SMALL),
    "s_tfbo": A.s_tfbo(),
    "f2sa": A.f2sa(SMALL, SMALL),
    "bome": A.bome(SMALL, SMALL),
    "maid": A.maid(),
}
each = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "value_function" else n for n in ALGORITHMS],
)


def twice(y, x, batch):
    value = FORM.outer(y, x, batch)
    return value, jnp.stack([value, value])


def solve(name, num_steps=20, **kwargs):
    outer = bx.objective(twice, has_aux=True) if name == "multi_objective" else FORM.outer
    return bx.solve_bilevel(
        FORM.inner, outer, FORM.inner_params, FORM.outer_params, inner_data=FORM.inner_batch,
        outer_data=FORM.outer_batch,
        algorithm=ALGORITHMS[name], num_steps=num_steps, key=KEY, **kwargs,
    )  # fmt: skip


@pytest.mark.turns
@each
def test_an_algorithm_runs_resumes_and_descends(name):
    whole = solve(name, 40)
    half = solve(name, 20)
    rest = solve(name, 20, state=half.state)
    assert not whole.result.failed
    assert all(
        (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(
            *(jax.tree.leaves(s.state._replace(key=None)) for s in (whole, rest)), strict=True
        )
    )
    assert whole.history["value"].shape == (40,) and np.isfinite(whole.history["value"]).all()
    assert FORM.value(whole.outer_params) < FORM.value(FORM.outer_params)
