"""The solution map: against closed forms, finite differences and loops, at one to five levels."""

import equinox.internal
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from bilevax import base, inner, linear
from bilevax.argmin import argmin, attach
from bilevax.results import RESULTS, SolveError


def _newton_step(objective, state, outer, ctx, *, maxiter, tol):
    start, unravel = ravel_pytree(state.params)
    value_and_grad = jax.value_and_grad(lambda v: objective(unravel(v), outer, ctx)[0])

    def body(carry):
        v, _, _, k = carry
        (value, g), lin = jax.linearize(value_and_grad, v)
        hessian = jax.vmap(lambda e: lin(e)[1])(jnp.eye(v.size, dtype=v.dtype))
        return v - jnp.linalg.solve(hessian, g), value, jnp.linalg.norm(g), k + 1

    nowhere = (start, jnp.zeros((), start.dtype), jnp.full((), jnp.inf, start.dtype), 0)
    v, value, norm, _ = jax.lax.while_loop(lambda c: (c[2] > tol) & (c[3] < maxiter), body, nowhere)
    code = jnp.where(norm <= tol, RESULTS.success, RESULTS.inner_not_converged)
    return base.InnerState(unravel(v), state.opt, state.model), {
        "value": value,
        "grad_norm": norm,
        "code": code,
    }


def newton(maxiter=30, tol=1e-10):
    step = base.Bound("newton", _newton_step, maxiter=maxiter, tol=tol)
    return base.InnerSolver(init=lambda params: (), step=step, reversible=False)


def _exact_step(objective, state, outer, ctx):
    """One Newton step on a scalar: the solution of a quadratic, without a loop."""
    (value, g), lin = jax.linearize(
        jax.value_and_grad(lambda y: objective(y, outer, ctx)[0]), state.params
    )
    return state._replace(params=state.params - g / lin(jnp.ones_like(g))[1]), {"value": value}


EXACT = base.InnerSolver(init=lambda params: (), step=_exact_step, reversible=False)


def divide(matvec, b, x0):
    """A scalar system."""
    x = b / matvec(jnp.ones_like(b))
    return x, base.LinearInfo(
        1, jnp.abs(matvec(x) - b) / jnp.where(b == 0, jnp.ones_like(b), jnp.abs(b)), 0
    )


def close(a, b, rtol=1e-8, atol=1e-12):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=atol), a, b)


def finite_difference(f, x, e=1e-5):
    """Central differences along the rows of the identity."""
    f = jax.jit(f)
    return jnp.stack(
        [(f(x + step) - f(x - step)) / (2 * e) for step in e * jnp.eye(x.size)], axis=-1
    )


K = jax.random.split(jax.random.key(3), 6)
ROOT = jax.random.normal(K[0], (3, 3))
A = ROOT @ ROOT.T + jnp.eye(3)
C = jax.random.normal(K[1], (2, 3))
LINEAR = jnp.array([0.5, -1.0, 2.0])
X = jnp.array([0.7, -0.4])


def quadratic(y, x):
    """``y* = -A^-1 (a + C'x)``."""
    return 0.5 * y @ (A @ y) + x @ (C @ y) + LINEAR @ y


def test_quadratic_closed_form():
    fn = argmin(quadratic, newton())

    @jax.jit
    def derivatives(x):
        y = lambda x: fn(jnp.zeros(3), x)
        return y(x), jax.jacfwd(y)(x), jax.jacrev(y)(x), jax.jvp(y, (x,), (jnp.ones(2),))[1]

    y, forward, backward, along = derivatives(X)
    jacobian = -jnp.linalg.solve(A, C.T)
    close(y, -jnp.linalg.solve(A, LINEAR + C.T @ X))
    close(forward, jacobian)
    close(backward, jacobian)
    close(along, jacobian.sum(1))


def test_hessian_closed_form():
    """``y* = -A(s)^-1 a`` with ``A(s) = diag(e^s)``: all derivatives of ``y* = -a e^-s`` are its
    own, with signs."""
    fn = argmin(lambda y, s: 0.5 * jnp.sum(jnp.exp(s) * y**2) + LINEAR @ y, newton())
    f = lambda s: jnp.sum(fn(jnp.zeros(3), s) ** 2)
    s = jnp.array([0.1, -0.3, 0.2])
    close(jax.jit(jax.hessian(f))(s), jnp.diag(4 * LINEAR**2 * jnp.exp(-2 * s)))


def test_fourth_derivative():
    fn = argmin(lambda y, s: 0.5 * jnp.exp(s) * y**2 - y, EXACT, linear_solver=divide)
    fourth = jax.grad(jax.grad(jax.grad(jax.grad(lambda s: fn(jnp.zeros(()), s)))))
    close(jax.jit(fourth)(0.3), jnp.exp(-0.3))


def _scalar_levels(b, c, e, t, solver):
    """Three scalar levels, each below the next, all of them solved."""
    z = argmin(lambda z, y: 0.5 * (z - y) ** 2 + 0.5 * c * z**2, solver)
    y = argmin(lambda y, x: 0.5 * (y - x) ** 2 + 0.5 * b * z(y, y) ** 2, solver)
    x = argmin(lambda x: 0.5 * (z(x, y(x, x)) - t) ** 2 + 0.5 * e * x**2, solver)
    zero = jnp.zeros_like(t)
    return x(zero)


@pytest.mark.slow  # five levels and captured arrays are quick tests of their own
def test_three_scalar_levels_and_their_hyperparameters():
    """Every coefficient is captured, not passed: the objectives close over traced arrays."""

    def closed(p):
        b, c, e, t = p
        k = 1 / ((1 + c) * (1 + b / (1 + c) ** 2))
        return k * t / (k**2 + e)

    p = jnp.array([0.4, 0.3, 0.7, 1.5])
    solved = jax.jit(jax.value_and_grad(lambda p: _scalar_levels(*p, EXACT)))(p)
    close(solved, jax.value_and_grad(closed)(p))


def _nest(depth, solver, linear_solver=None):
    """``depth`` levels of scalar quadratics under a function of the top; returns it and its closed
    form."""
    weights = [0.3, 0.5, 0.2, 0.4, 0.6]

    def build(d):
        if d == 0:
            return None
        below = build(d - 1)

        def objective(y, x):
            value = 0.5 * (y - x) ** 2 + 0.5 * weights[d - 1] * (y - 1.0) ** 2
            return value if below is None else value + 0.25 * below(y, y) ** 2

        return argmin(objective, solver, linear_solver=linear_solver)

    top = build(depth)

    def closed(x):  # y_d = slope x + offset solves a quadratic whose lower response is affine
        slope, offset, affine = 1.0, 0.0, []
        for d in range(depth):
            w = weights[d]
            extra, constant = (
                (0.5 * affine[-1][0] ** 2, 0.5 * affine[-1][0] * affine[-1][1])
                if affine
                else (0.0, 0.0)
            )
            curvature = 1 + w + extra
            slope, offset = 1 / curvature, (w - constant) / curvature
            affine.append((slope, offset))
        return jnp.sin(slope * x + offset)

    return lambda x: jnp.sin(top(x, x)), closed


def test_five_levels():
    f, closed = _nest(5, EXACT, divide)
    x = jnp.asarray(0.8)
    close(jax.jit(jax.value_and_grad(f))(x), jax.value_and_grad(closed)(x))


def test_two_levels_with_loops_to_second_order():
    """The solver's and the linear solver's while_loops inside one another."""
    f, closed = _nest(2, newton())
    x = jnp.asarray(0.8)
    close(jax.jit(jax.grad(jax.grad(f)))(x), jax.grad(jax.grad(closed))(x))


def _nonquadratic():
    A1, B1, C1 = (
        jax.random.normal(k, s) for k, s in zip(K[2:5], [(5, 4), (4, 3), (3, 3)], strict=True)
    )
    solver = newton()

    def first(x, y, z):
        return (
            0.5 * jnp.sum((A1 @ x - 1.0) ** 2)
            + 0.1 * jnp.sum(jnp.cosh(x))
            + 0.1 * jnp.exp(0.1 * z[0]) * jnp.sum(x**2)
            + x @ (B1 @ y)
        )

    xs = argmin(first, solver)

    def second(y, z):
        return (
            jnp.sum((xs(jnp.zeros(4), y, z) - 0.3) ** 2)
            + 0.5 * jnp.sum((y - C1 @ z) ** 2)
            + 0.1 * jnp.sum(jnp.cosh(y))
        )

    ys = argmin(second, solver)

    def top(z):
        y = ys(jnp.zeros(3), z)
        return jnp.sum((y - 1.0) ** 2) + jnp.sum(xs(jnp.zeros(4), y, z) ** 2) + 0.1 * jnp.sum(z**2)

    return top


@pytest.mark.slow
def test_three_nested_levels_against_finite_differences():
    top = _nonquadratic()
    z = jnp.array([0.1, 0.2, 0.3])
    gradient = jax.jit(jax.grad(top))
    hessian, along = jax.jit(
        lambda z: (jax.jacfwd(jax.grad(top))(z), jax.jvp(top, (z,), (jnp.ones(3),))[1])
    )(z)
    close(gradient(z), finite_difference(top, z), rtol=1e-7)
    close(along, jnp.sum(gradient(z)), rtol=1e-9)
    close(hessian, finite_difference(gradient, z), rtol=1e-6)
    close(hessian, hessian.T, rtol=1e-8)


def test_vmap_equals_a_loop():
    fn = argmin(lambda y, x: jnp.sum(jnp.cosh(y - x)) + 0.5 * jnp.sum(y**2 * jnp.exp(x)), newton())
    f = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(fn(jnp.zeros(3), x)))))
    xs = jax.random.normal(K[5], (8, 3))
    together = jax.jit(jax.vmap(f))(xs)
    close(together, jax.tree.map(lambda *rows: jnp.stack(rows), *[f(x) for x in xs]), rtol=1e-12)


def test_float32_stays_float32():
    small = lambda t: jax.tree.map(lambda a: a.astype(jnp.float32), t)
    a, c, linear_term = small((A, C, LINEAR))
    fn = argmin(lambda y, x: 0.5 * y @ (a @ y) + x @ (c @ y) + linear_term @ y, newton(tol=1e-3))
    y, jacobian = jax.jit(
        lambda x: (
            fn(jnp.zeros(3, jnp.float32), x),
            jax.jacrev(lambda x: fn(jnp.zeros(3, jnp.float32), x))(x),
        )
    )(small(X))
    assert y.dtype == jacobian.dtype == jnp.float32
    close(jacobian, -jnp.linalg.solve(A, C.T), rtol=2e-4, atol=1e-5)


def test_pytrees_and_leaves_that_are_not_numbers_to_learn():
    """Integers, booleans, keys and None ride along in the inner point and in the arguments."""

    def objective(y, data, settings):
        picked = data["x"][settings["index"]]
        noise = jax.random.normal(settings["key"], ())
        shift = jnp.where(settings["flag"], 1.0, 0.0) * y["count"].astype(jnp.float64)
        return jnp.sum((y["w"] - picked) ** 2) + (y["b"] - data["scale"] * noise - shift) ** 2

    start = {"w": jnp.zeros(2), "b": 0.0, "count": jnp.array(3), "nothing": None}
    settings = {"index": jnp.array([2, 0]), "key": jax.random.key(7), "flag": True, "nothing": None}
    fn = argmin(objective, newton())

    @jax.jit
    def f(data):
        y = fn(start, data, settings)
        return jnp.sum(y["w"] ** 2) + y["b"], y

    data = {"x": jnp.arange(3.0), "scale": 2.0}
    (_, y), grad = jax.value_and_grad(f, has_aux=True)(data)
    noise = jax.random.normal(jax.random.key(7), ())
    assert jax.tree.structure(y) == jax.tree.structure(start)
    assert y["count"] == 3
    assert jnp.issubdtype(y["count"].dtype, jnp.integer)
    close(y["w"], jnp.array([2.0, 0.0]), atol=1e-9)
    close(y["b"], 2.0 * noise + 3.0)
    close(grad, {"x": jnp.array([0.0, 0.0, 4.0]), "scale": noise})


@pytest.mark.turns
def test_an_argument_that_reaches_one_leaf_only():
    """JAX's transposition of a linear solve wants every leaf of the right side to move, or none."""

    def g(y, x):
        return jnp.sum((y["a"] - x) ** 2) + jnp.sum(jnp.cosh(y["b"] - 0.3))

    fn = argmin(g, inner.optax(optax.sgd(0.4), 100))

    def h(x):
        y = fn({"a": jnp.zeros(2), "b": jnp.zeros(2)}, x)
        return jnp.sum(y["a"] ** 3) + jnp.sum(y["b"] * y["a"])

    x = jnp.array([0.3, 0.5])
    assert np.allclose(jax.grad(h)(x), 3 * x**2 + 0.3, rtol=1e-8)
    assert np.allclose(jax.jit(jax.hessian(h))(x), np.diag(6 * x), rtol=1e-8)
    assert np.allclose(jax.jit(jax.jacrev(jax.grad(h)))(x), np.diag(6 * x), rtol=1e-8)


def test_captured_traced_values_are_differentiated():
    """Under jit outside of grad, where a captured tracer would leak, an integer one included."""

    def f(lam, shift):
        return argmin(lambda y: jnp.sum((y - lam[shift]) ** 2) + jnp.sum(y**2) * lam[0], newton())(
            jnp.zeros(())
        )

    lam, shift = jnp.array([0.5, 3.0]), jnp.array(1)
    close(jax.grad(jax.jit(f))(lam, shift), jnp.array([-3.0 / 1.5**2, 1 / 1.5]))
    close(
        jax.jit(jax.hessian(f))(lam, shift),
        jnp.array([[6.0 / 1.5**3, -1 / 1.5**2], [-1 / 1.5**2, 0.0]]),
    )
    close(
        jax.vmap(jax.grad(f), (0, None))(jnp.stack([lam, lam]), shift)[1],
        jnp.array([-3.0 / 1.5**2, 1 / 1.5]),
    )


def test_one_objective_captures_the_trace_of_the_moment():
    """A function object that lives on while what it captures changes from trace to trace."""
    box = {}
    fn = argmin(lambda y: (y - box["lam"] ** 2) ** 2, EXACT)

    def f(lam):
        box["lam"] = lam
        return fn(jnp.zeros(()))

    for lam in (2.0, 3.0):
        close(jax.jit(jax.grad(f))(lam), 2 * lam)
        close(jax.grad(jax.jit(f))(lam + 0.5), 2 * lam + 1)


def test_settings_of_a_configured_objective_are_differentiated():
    def penalised(y, x, *, weight):
        return jnp.sum((y - x) ** 2) + weight * jnp.sum(y**2)

    f = lambda weight: jnp.sum(
        argmin(base.Bound("penalised", penalised, weight=weight), newton())(
            jnp.zeros(2), jnp.ones(2)
        )
    )
    close(jax.jit(jax.grad(f))(jnp.array(0.5)), -2 / 1.5**2)


def test_the_initial_point_and_the_solver_get_no_derivative():
    f = lambda start, rate: jnp.sum(
        argmin(quadratic, inner.optax(optax.sgd(rate), steps=3))(start, X)
    )
    close(jax.jit(jax.grad(f, (0, 1)))(jnp.ones(3), 0.1), (jnp.zeros(3), 0.0))


def test_no_new_trace_when_called_again():
    traces = []

    def objective(y, x):
        traces.append(1)
        return jnp.sum((y - x) ** 2)

    fn = argmin(objective, newton())
    gradient = jax.grad(lambda x: jnp.sum(fn(jnp.zeros(2), x) ** 2))
    gradient(jnp.ones(2))
    count = len(traces)
    close(gradient(3 * jnp.ones(2)), 6 * jnp.ones(2))
    assert len(traces) == count


def test_attach_is_the_identity_with_the_derivative_of_the_solution():
    fn = attach(lambda y, x: 0.5 * jnp.sum(jnp.exp(x) * y**2) + LINEAR @ y)
    x = jnp.array([0.1, -0.3, 0.2])
    y = lambda x: fn(-LINEAR * jnp.exp(-x), x)
    value, jacobian = jax.jit(lambda x: (y(x), jax.jacfwd(y)(x)))(x)
    close(value, -LINEAR * jnp.exp(-x), rtol=0)
    close(jacobian, jnp.diag(LINEAR * jnp.exp(-x)))


def test_attach_takes_a_wrapped_objective_with_its_context():
    """The library's own form, ``(inner, outer, ctx) -> (value, (model, aux))``: data in the context
    is differentiated, too."""
    wrapped = base.objective(
        lambda y, x, batch: (jnp.sum((y - x * batch) ** 2), "aux"), has_aux=True
    )
    fn = attach(base.Bound("value", lambda y, x, ctx, *, of: of(y, x, ctx)[0], of=wrapped))
    f = lambda x, batch: fn(x * batch, x, base.Ctx(batch=batch, key=jax.random.key(0)))
    close(jax.jit(jax.grad(f, (0, 1)))(3.0, 5.0), (5.0, 3.0))


def test_indefinite_hessian():
    """A saddle: conjugate gradients say so with NaN instead of a number, MINRES solves it."""
    saddle = lambda y, x: 0.5 * (2 * y[0] ** 2 - 3 * y[1] ** 2) - jnp.sum(x * y)
    of = lambda solver: jax.jit(
        jax.jacrev(lambda x: argmin(saddle, newton(), linear_solver=solver)(jnp.zeros(2), x))
    )
    x = jnp.array([1.0, 2.0])
    close(
        of(linear.minres(maxiter=10, tol=1e-12))(x), jnp.diag(jnp.array([1 / 2, -1 / 3])), atol=1e-9
    )
    assert not jnp.all(jnp.isfinite(of(linear.cg())(x)))


# ---- solves that fail


def _short(**settings):
    return argmin(lambda y, x: jnp.sum(jnp.cosh(y - x)), newton(maxiter=1), **settings)


def test_info_says_how_the_solve_ended():
    done, info = jax.jit(argmin(quadratic, newton()).with_info)(jnp.zeros(3), X)
    assert int(info.code) == RESULTS.success
    assert info.grad_norm < 1e-9
    close(info.value, quadratic(done, X))
    y, info = jax.jit(_short().with_info)(jnp.zeros(2), jnp.ones(2))
    assert int(info.code) == RESULTS.inner_not_converged
    assert jnp.all(jnp.isfinite(y))
    close(info.grad_norm, jnp.linalg.norm(jnp.sinh(y - 1.0)))
    _, info = argmin(lambda y: jnp.exp(y), inner.optax(optax.sgd(-1e3), steps=20)).with_info(1.0)
    assert int(info.code) == RESULTS.inner_nonfinite


def test_a_missed_tolerance_is_nan_in_its_own_lane():
    xs = jnp.array([[0.0, 0.0], [1.0, 1.0]])  # the first starts at its solution
    f = lambda x: jnp.sum(_short()(jnp.zeros(2), x))
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(f)))(xs)
    assert jnp.isfinite(values[0])
    close(grads[0], jnp.ones(2))
    assert jnp.isnan(values[1])
    assert jnp.all(jnp.isnan(grads[1]))


def test_tol_overrides_the_solver():
    assert jnp.all(jnp.isfinite(_short(tol=jnp.inf)(jnp.zeros(2), jnp.ones(2))))
    sgd = inner.optax(optax.sgd(0.01), steps=3)  # has no word of its own
    assert jnp.all(jnp.isfinite(argmin(quadratic, sgd)(jnp.zeros(3), X)))
    assert jnp.all(jnp.isnan(argmin(quadratic, sgd, tol=1e-3)(jnp.zeros(3), X)))


def test_throw_raises_with_and_without_jit():
    fn = _short(throw=True)
    with pytest.raises(SolveError, match="inner_not_converged"):
        fn(jnp.zeros(2), jnp.ones(2))
    with pytest.raises(jax.errors.JaxRuntimeError, match="inner_not_converged"):
        jax.block_until_ready(jax.jit(fn)(jnp.zeros(2), jnp.ones(2)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="inner_not_converged"):
        jax.block_until_ready(
            jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(fn(jnp.zeros(2), x)))))(jnp.ones((2, 2)))
        )
    good = argmin(quadratic, newton(), throw=True)
    close(jax.jit(jax.vmap(good))(jnp.zeros((2, 3)), jnp.stack([X, X]))[1], good(jnp.zeros(3), X))


def _checkpointed_power(v, n):
    """``v (1 + v)^n`` by a loop that keeps checkpoints, and can be differentiated backwards
    once."""
    body = lambda c: (c[0] + 1, c[1] * (1 + v))
    return equinox.internal.while_loop(
        lambda c: c[0] < n, body, (0, v), max_steps=8, kind="checkpointed"
    )[1]


def _counted(v, n):
    """``(1 + v)^n`` by a loop whose end is not known before it runs."""
    return jax.lax.while_loop(
        lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] * (1 + v)), (0, jnp.ones_like(v))
    )[1]


@jax.custom_vjp
def _counted_power(v, n):
    """The same with a reverse-mode rule of its own."""
    return v * _counted(v, n)


_counted_power.defvjp(
    lambda v, n: (v * _counted(v, n), (v, n)),
    lambda kept, w: (w * _counted(kept[0], kept[1] - 1) * (1 + kept[0] + kept[1] * kept[0]), None),
)


@pytest.mark.turns
@pytest.mark.parametrize(
    "power, inside",
    [
        pytest.param(_checkpointed_power, False, id="checkpointed loop"),
        pytest.param(_counted_power, True, id="rule of its own", marks=pytest.mark.slow),
    ],
)
def test_an_objective_that_is_differentiated_backwards_once_only(power, inside):
    """First and second derivatives in both modes, against the same objective without a loop."""

    def objective(power):
        def value(y, x):
            entering = y["a"] * jnp.exp(x["s"]) if inside else y["a"]
            return (
                jnp.sum((power(entering, 3) - x["t"]) ** 2) / 9
                + jnp.sum((y["b"] - x["s"] * y["a"]) ** 2)
                + jnp.sum(y["a"] ** 2)
            )

        return value

    start, x = (
        {"a": jnp.full(2, 0.4), "b": jnp.zeros(2)},
        {"s": jnp.asarray(0.3), "t": jnp.array([1.5, 1.8])},
    )
    found, want = (argmin(objective(p), newton()) for p in (power, lambda v, n: v * (1 + v) ** n))

    def derivatives(fn):
        scalar = lambda x: jnp.sum(fn(start, x)["a"] ** 3) + jnp.sum(fn(start, x)["b"])
        lanes = jax.vmap(jax.grad(scalar))(jax.tree.map(lambda a: jnp.stack([a, 1.1 * a]), x))
        return jax.jit(
            lambda: (fn(start, x), jax.grad(scalar)(x), jax.jacfwd(jax.grad(scalar))(x), lanes)
        )()

    close(derivatives(found), derivatives(want), rtol=1e-7)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: argmin(3, EXACT), TypeError, "objective: got int"),
        (lambda: argmin(quadratic, 3), TypeError, "solver: got 3"),
        (lambda: argmin(quadratic, EXACT, linear_solver=3), TypeError, "linear_solver: got 3"),
        (lambda: argmin(quadratic, EXACT, tol=0.0), ValueError, "tol: got 0.0"),
        (lambda: argmin(quadratic, EXACT, tol="a"), TypeError, "tol: got 'a'"),
        (lambda: argmin(quadratic, EXACT, max_residual=-1.0), ValueError, "max_residual: got -1.0"),
        (lambda: argmin(quadratic, EXACT, throw=1), TypeError, "throw: got 1"),
        (
            lambda: argmin(base.objective(quadratic, has_aux=True), EXACT),
            TypeError,
            "plain function",
        ),
        (lambda: argmin(lambda y: y, EXACT)(jnp.zeros(3)), ValueError, "expected one real scalar"),
        (
            lambda: argmin(lambda y: (jnp.sum(y), y), EXACT)(jnp.zeros(3)),
            ValueError,
            "expected one real scalar",
        ),
        (lambda: argmin(jnp.sum, EXACT)(jnp.arange(3)), ValueError, "no floating-point leaf"),
        (lambda: argmin(jnp.sum, EXACT)(jnp.zeros(3, complex)), TypeError, "complex"),
        (
            lambda: argmin(lambda y, s: jnp.sum(y), EXACT)(jnp.zeros(3), {"mode": "train"}),
            TypeError,
            r"args\[0\]\['mode'\]: got 'train'",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, text):
    with pytest.raises(error, match=text):
        call()
