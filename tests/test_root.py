"""Equations and fixed points as functions: against dense derivatives, alone, stacked, in lanes and
on devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bilevax as bx

N = 5
KEYS = jax.random.split(jax.random.key(0), 4)
W = 0.4 * jax.random.normal(KEYS[0], (N, N))
X = jax.random.normal(KEYS[1], (N,))


def mapping(z, w, x):
    """On a pytree with a leaf that nobody solves for."""
    new = jnp.tanh(w @ jnp.concatenate([z["a"], z["b"]]) + x)
    return {"a": new[:2], "b": new[2:], "steps": z["steps"]}


def equations(z, w, x):
    return jax.tree.map(lambda new, old: new - old, mapping(z, w, x), z)


START = {"a": jnp.zeros(2), "b": jnp.zeros(3), "steps": jnp.int32(7)}
PLAIN = lambda z, w, x: jnp.tanh(w @ z + x)
SOLVED = {
    "root": bx.root(equations),
    "fixed_point": bx.fixed_point(mapping, tol=1e-15),
    "gmres": bx.root(equations, linear_solver=bx.linear.gmres(tol=1e-14)),
}
each = pytest.mark.parametrize(
    "name", ["root", "fixed_point", pytest.param("gmres", marks=pytest.mark.slow)]
)


def flat(z):
    return jnp.concatenate([z["a"], z["b"]])


def solution(name, w, x):
    return flat(SOLVED[name](START, w, x))


def unrolled(w, x):
    """The reference: an iteration long enough, differentiated as it stands."""
    return jax.lax.scan(lambda z, _: (PLAIN(z, w, x), None), jnp.zeros(N), length=150)[0]


@functools.cache
def reference():
    measure = lambda x: jnp.sum(unrolled(W, x) ** 3)
    return jax.jit(lambda: (unrolled(W, X), jax.jacfwd(unrolled)(W, X), jax.hessian(measure)(X)))()


@pytest.mark.turns
@each
def test_values_and_derivatives_are_the_dense_ones(name):
    z, jacobian, hessian = reference()

    @jax.jit
    def found(w, x):
        measure = lambda x: jnp.sum(solution(name, w, x) ** 3)
        along = jax.jvp(lambda w: solution(name, w, x), (w,), (jnp.ones_like(w),))[1]
        return (
            solution(name, w, x),
            jax.jacrev(lambda w: solution(name, w, x))(w),
            along,
            jax.hessian(measure)(x),
        )

    value, backward, along, second = found(W, X)
    np.testing.assert_allclose(value, z, atol=1e-12)
    np.testing.assert_allclose(backward, jacobian, atol=1e-10)
    np.testing.assert_allclose(along, jacobian.sum((1, 2)), atol=1e-10)
    np.testing.assert_allclose(second, hessian, atol=1e-10)
    assert int(SOLVED[name](START, W, X)["steps"]) == 7


@pytest.mark.parametrize("name", ["root", pytest.param("fixed_point", marks=pytest.mark.slow)])
def test_lanes_and_devices_are_the_single_call(name):
    xs = jnp.stack([X * s for s in np.linspace(0.5, 2.0, 8)])
    grads = jax.vmap(jax.grad(lambda x: jnp.sum(solution(name, W, x) ** 2)))
    together = jax.jit(grads)(xs)
    alone = jnp.stack([jax.grad(lambda x: jnp.sum(unrolled(W, x) ** 2))(x) for x in xs[:2]])
    np.testing.assert_allclose(together[:2], alone, atol=1e-10)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(xs, NamedSharding(mesh, P("rows")))
    np.testing.assert_allclose(jax.jit(grads)(sharded), together, atol=1e-12)


@pytest.mark.turns
def test_what_is_captured_is_differentiated_and_solutions_nest():
    """y = 2 z with z = sqrt(a), inside an equation for u = y + a: du/da = 1 / sqrt(a) + 1, d2u/da2
    = -a^(-3/2) / 2."""

    def u(a):
        z = bx.root(lambda z: z**2 - a)
        y = bx.fixed_point(lambda y: 0.5 * y + z(1.0))
        return bx.root(lambda u: u - y(0.0) - a)(0.0)

    value, first, second = jax.jit(lambda a: (u(a), jax.grad(u)(a), jax.grad(jax.grad(u))(a)))(4.0)
    np.testing.assert_allclose([value, first, second], [8.0, 1.5, -1.0 / 16], atol=1e-10)


STARTS = {
    "far": (lambda y: jnp.exp(y) - 3.0, 20.0, np.log(3.0)),
    "raw units": (lambda y: 1e8 * (y**3 - 1e12), 1.0, 1e4),
    "small units": (lambda y: 1e-12 * (y**3 - 1e-9), 1.0, 1e-3),
    "a root at zero": (lambda y: jnp.sinh(y) + y**2, 0.7, 0.0),
    "a double root": (lambda y: (y - 1.0) ** 2, 3.0, 1.0),
    "arctan, where whole steps diverge": (jnp.arctan, 5.0, 0.0),
}


@pytest.mark.parametrize("case", STARTS)
def test_newton_ends_where_the_solution_is(case):
    equation, start, want = STARTS[case]
    found, info = bx.root(equation).with_info(start)
    assert int(info.code) == 0
    assert (
        abs(float(found) - want) <= 1e-6 * max(abs(want), 1e-6)
        if "double" in case
        else abs(float(found) - want) <= 1e-12 * max(1.0, abs(want))
    )


@pytest.mark.turns
def test_no_solution_is_said():
    fn = lambda y: y**2 + 1.0
    assert np.isnan(bx.root(fn)(3.0))
    point, info = bx.root(fn).with_info(3.0)
    assert np.isfinite(point) and bx.RESULTS(int(info.code)) == bx.RESULTS.inner_not_converged
    assert np.isfinite(bx.root(fn, strict=False)(3.0))
    divergent = bx.fixed_point(lambda y: 2.0 * y + 1.0, memory=0, maxiter=30)
    assert np.isnan(divergent(0.0)) and int(divergent.with_info(0.0)[1].code) != 0
    lanes = jax.vmap(lambda a: bx.root(lambda y, a: y**2 - a)(1.0, a))(jnp.array([4.0, -1.0]))
    np.testing.assert_allclose(lanes, [2.0, np.nan], atol=1e-12)
    twice = bx.root(lambda y, a: jnp.full(2, y[0] + y[1] - a))  # one equation, written two times
    assert np.isnan(twice(jnp.zeros(2), 1.0)).all()
    assert (twice(jnp.full(2, 0.5), 1.0) == 0.5).all() and np.isnan(
        jax.jacobian(twice, 1)(jnp.full(2, 0.5), 1.0)
    ).all()


def test_acceleration_needs_fewer_steps_and_solves_what_iteration_does_not():
    slow = lambda y: jnp.array([0.99, 0.9, 0.5]) * y + 1.0
    want = 1.0 / (1.0 - np.array([0.99, 0.9, 0.5]))
    counts = {}
    for memory in (0, 5):
        y, info = bx.fixed_point(slow, memory=memory, maxiter=5000, tol=1e-12).with_info(
            jnp.zeros(3)
        )
        counts[memory] = int(info.iterations)
        np.testing.assert_allclose(y, want, rtol=1e-9)
    assert counts[5] < 10 < 1000 < counts[0]
    np.testing.assert_allclose(
        bx.fixed_point(lambda y: -1.5 * y + 5.0)(jnp.zeros(2)), 2.0, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
    x, w = X.astype(dtype), W.astype(dtype)
    for fn in (bx.root(lambda z, w, x: z - PLAIN(z, w, x)), bx.fixed_point(PLAIN)):
        value, grad = jax.jit(
            jax.value_and_grad(lambda x, fn=fn: jnp.sum(fn(jnp.zeros(N, dtype), w, x)))
        )(x)
        assert value.dtype == grad.dtype == dtype
        exact = jax.grad(lambda x: jnp.sum(unrolled(W, x)))(X)
        np.testing.assert_allclose(
            np.asarray(grad, np.float64), exact, atol=1e-4 if dtype == jnp.float32 else 0.3
        )


def test_one_trace_serves_all_numbers():
    fn = bx.root(lambda y, a: y**2 - a)
    jitted = jax.jit(lambda a: fn(jnp.ones(()), a))
    jitted(2.0), jitted(jnp.asarray(3.0))
    assert jitted._cache_size() <= 2
    assert repr(fn) == "root(<lambda>)" and repr(bx.fixed_point(mapping)) == "fixed_point(mapping)"


REFUSED = {
    "equation": (lambda: bx.root(3), "equation: got 3"),
    "mapping": (lambda: bx.fixed_point(None), "mapping: got"),
    "memory": (lambda: bx.fixed_point(mapping, memory=-1), "memory: got -1"),
    "shape": (lambda: bx.root(lambda y: jnp.sum(y))(jnp.ones(2)), "equation: <lambda> returned"),
    "complex": (lambda: bx.root(lambda y: y)(1j), "inner_init: got dtype complex"),
    "nothing": (lambda: bx.root(lambda y: y)(jnp.int32(1)), "inner_init: got"),
    "solver": (lambda: bx.root(mapping, linear_solver=1), "linear_solver: got 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    call, text = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=text.replace("<", "\\<")):
        call()


def layer(z, p, x):
    return jnp.tanh(z @ p["w"] + x @ p["u"] + p["b"])


EQUILIBRIUM = bx.fixed_point(layer, tol=1e-4, maxiter=60)


def network(params, x):
    """Two equilibrium layers, the second reading the first, and a linear one."""
    for p in params["layers"]:
        x = EQUILIBRIUM(jnp.zeros((x.shape[0], p["b"].shape[0]), x.dtype), p, x)
    return x @ params["last"]


@pytest.mark.slow
def test_stacked_equilibrium_layers_train_on_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = jnp.asarray(images[:640] / 16.0, jnp.float32), jnp.asarray(labels[:640], jnp.int32)
    keys, width = jax.random.split(jax.random.key(1), 5), 16

    def make(key, inputs):
        k = jax.random.split(key)
        small = lambda key, rows: (
            jax.random.normal(key, (rows, width), jnp.float32) / np.float32(2 * np.sqrt(rows))
        )
        return {
            "w": small(k[0], width),
            "u": small(k[1], inputs),
            "b": jnp.zeros(width, jnp.float32),
        }

    params = {
        "layers": [make(keys[0], 64), make(keys[1], width)],
        "last": 0.1 * jax.random.normal(keys[2], (width, 10), jnp.float32),
    }
    optimizer = optax.adam(2e-2)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()

    @jax.jit
    def train(params):
        def body(carry, i):
            params, state = carry
            rows = (
                jax.lax.dynamic_slice_in_dim(x, (i % 5) * 64, 64),
                jax.lax.dynamic_slice_in_dim(y, (i % 5) * 64, 64),
            )
            value, grads = jax.value_and_grad(loss)(params, *rows)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(
            body, (params, optimizer.init(params)), jnp.arange(60, dtype=jnp.int32)
        )
        right = jnp.mean((jnp.argmax(network(params, x[320:]), -1) == y[320:]).astype(jnp.float32))
        return values, right

    values, right = train(params)
    assert np.isfinite(values).all() and values[0] > 2.0 > 0.5 > values[-1]
    assert right > 0.8  # chance is 0.1
