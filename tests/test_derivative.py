"""An estimate as a function: its derivatives are those of a closed form, or are refused by name."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import bilevax as bx
from bilevax import linear
from tests.selection import quick

H = bx.hypergradient
A = jnp.asarray([1.0, 3.0])
START = jnp.zeros(2)
X = jnp.asarray([1.0, 2.0])
LINEAR = linear.cg(tol=1e-14)
SOLVER = bx.inner.lbfgs(tol=1e-13)
DESCENT = bx.inner.optax(optax.sgd(0.15), 150)
INNER = {"scale": jnp.asarray(1.3), "shift": jnp.asarray([0.2, -0.1])}
OUTER = jnp.asarray([0.5, 1.5])
CAPTURED = jnp.asarray(0.7)
STEP = lambda y, x, b: y - 0.15 * jax.grad(inner)(y, x, b)


def inner(y, x, batch):
    """``y* = s x² + shift``."""
    return jnp.sum(A * (y - batch["scale"] * x**2 - batch["shift"]) ** 2)


def outer(y, x, batch):
    return jnp.sum(batch * y**3) + 0.1 * jnp.sum(x**4)


def closed(x, inner_batch, outer_batch, c=1.0):
    return outer(c * (inner_batch["scale"] * x**2 + inner_batch["shift"]), x, outer_batch)


METHODS = {
    "implicit": (SOLVER, H.implicit(LINEAR)),
    "implicit, low memory": (SOLVER, H.implicit(linear.minres(tol=1e-14), low_memory=True)),
    "unrolled": (DESCENT, H.unrolled(checkpoint="none")),
    "mixed": (DESCENT, H.unrolled()),
    "forward": (DESCENT, H.forward()),
    "fixed point": (SOLVER, H.fixed_point(STEP, linear.gmres(tol=1e-14))),
    "shine": (SOLVER, H.shine(refine=5, tol=1e-14)),
    "neumann": (SOLVER, H.implicit(linear.neumann(800, step=0.15))),
}
ONCE = ("fixed point", "shine", "neumann")  # the pullback is exact and may not be differentiated


def make(name, **options):
    solver, method = METHODS[name]
    return bx.value_and_hypergrad(inner, outer, solver=solver, hypergradient=method, **options)


def close(found, exact, tol=1e-8):
    chex.assert_trees_all_close(found, exact, rtol=tol, atol=tol)


@pytest.mark.turns
@pytest.mark.parametrize("name", quick(METHODS, ["implicit", "unrolled", "fixed point"]))
def test_the_value_in_everything_that_it_reads(name):
    fn = make(name)
    found = jax.jit(jax.grad(lambda x, a, b: fn(START, x, a, b).value, (0, 1, 2)))(X, INNER, OUTER)
    close(found, jax.grad(closed, (0, 1, 2))(X, INNER, OUTER))
    close(fn(START, X, INNER, OUTER).grad, found[0], 1e-12)


@pytest.mark.turns
@pytest.mark.parametrize(
    "name",
    quick(
        [name for name in METHODS if name not in ("unrolled", "mixed", "forward")],
        ["implicit", "fixed point"],
    ),
)
def test_the_value_forwards_and_over_lanes(name):
    fn = make(name)
    value = lambda x, a: fn(START, x, a, OUTER).value
    direction = (
        jnp.asarray([0.3, -1.0]),
        {"scale": jnp.asarray(2.0), "shift": jnp.asarray([1.0, 0.5])},
    )
    _, found = jax.jvp(value, (X, INNER), direction)
    close(found, jax.jvp(lambda x, a: closed(x, a, OUTER), (X, INNER), direction)[1])
    xs = jnp.stack([X, 0.5 * X, X + 0.3])
    close(
        jax.vmap(jax.grad(value), (0, None))(xs, INNER),
        jax.vmap(jax.grad(lambda x: closed(x, INNER, OUTER)))(xs),
    )


@pytest.mark.turns
@pytest.mark.parametrize("name", quick(METHODS, ["implicit", "unrolled", "fixed point", "neumann"]))
def test_the_gradient_again_or_refused(name):
    fn = make(name)
    grad = lambda x, a: fn(START, x, a, OUTER).grad
    exact = jax.jacrev(jax.grad(lambda x, a: closed(x, a, OUTER)), (0, 1))(X, INNER)
    if name in ONCE:
        with pytest.raises(
            ValueError,
            match=(
                f"^hypergradient: got {name.split()[0].replace('neumann', 'implicit')}.*right once "
                "only.*Estimate.grad"
            ),
        ):
            jax.jit(jax.jacrev(grad, (0, 1)))(X, INNER)
        with pytest.raises(ValueError, match="right once only"):
            jax.grad(lambda x: jnp.sum(jax.grad(lambda x: fn(START, x, INNER, OUTER).value)(x)))(X)
        assert np.isnan(jax.jacfwd(grad)(X, INNER)).all()
        return
    close(jax.jit(jax.jacrev(grad, (0, 1)))(X, INNER), exact, 1e-7)
    if name != "mixed":
        close(jax.jacfwd(grad)(X, INNER), exact[0], 1e-7)
        close(jax.hessian(lambda x: fn(START, x, INNER, OUTER).value)(X), exact[0], 1e-7)


def test_products_from_both_sides_agree_where_the_hessian_is_indefinite():
    fn = make("implicit")
    down = -OUTER
    grad = lambda x: fn(START, x, INNER, down).grad
    exact = jax.hessian(lambda x: closed(x, INNER, down) + jnp.sum(x**4))(X) - jax.hessian(
        lambda x: jnp.sum(x**4)
    )(X)
    assert np.linalg.eigvalsh(exact).min() < 0
    t, v = jnp.asarray([0.3, -2.0]), jnp.asarray([1.0, 0.7])
    close(jax.jvp(grad, (X,), (t,))[1], exact @ t)
    close(jax.vjp(grad, X)[1](v)[0], v @ exact)


@pytest.mark.turns
@pytest.mark.parametrize("name", ["implicit", "fixed point", "mixed"])
def test_a_captured_array_is_an_argument_like_any_other(name):
    solver, method = METHODS[name]

    def value(c, b, x):
        kernel = lambda y, x, batch: inner(y / c, x, batch) * c**2

        def judge(y, x, batch):
            return outer(y, x, b * batch)

        return bx.value_and_hypergrad(kernel, judge, solver=solver, hypergradient=method)(
            START, x, INNER, OUTER
        ).value

    if name == "fixed point":
        method = None

        def value(c, b, x):
            judge = lambda y, x, batch: outer(c * y, x, b * batch)
            return bx.value_and_hypergrad(
                inner, judge, solver=solver, hypergradient=METHODS[name][1]
            )(START, x, INNER, OUTER).value

    exact = jax.grad(lambda c, b, x: closed(x, INNER, b * OUTER, c), (0, 1, 2))(CAPTURED, 1.1, X)
    close(jax.grad(value, (0, 1, 2))(CAPTURED, 1.1, X), exact)
    close(jax.jit(jax.grad(value, (0, 1, 2)))(CAPTURED, 1.1, X), exact)


@pytest.mark.turns
@pytest.mark.parametrize("name", ["implicit", "fixed point", "neumann"])
def test_in_the_carry_and_the_outputs_of_a_scan(name):
    fn = make(name)

    def run(x):
        def body(carry, _):
            x, last, state = carry
            est = fn(START, x, INNER, OUTER, state=state)
            return (1.1 * x, est, est.state), (est, last.value)

        first = fn(START, x, INNER, OUTER)
        _, (ests, lasts) = lax.scan(body, (x, first, fn.init(START)), None, length=3)
        return jnp.sum(ests.value) + lasts[-1]

    def plain(x):
        values = [closed(1.1**i * x, INNER, OUTER) for i in range(3)]
        return sum(values) + values[1]

    close(jax.grad(run)(X), jax.grad(plain)(X))
    close(
        jax.jit(jax.value_and_grad(lambda x: (run(x), fn(START, x, INNER, OUTER)), has_aux=True))(
            X
        )[1],
        jax.grad(plain)(X),
    )


@pytest.mark.turns
@pytest.mark.parametrize(
    "name",
    quick(
        [name for name in METHODS if name not in ("mixed",)],
        ["implicit", "unrolled", "fixed point"],
    ),
)
def test_the_solution_and_the_aux_carry_the_best_response(name):
    solver, method = METHODS[name]
    judge = bx.objective(
        lambda y, x, batch: (outer(y, x, batch), {"size": jnp.sum(y**2), "count": 3}), has_aux=True
    )
    fn = bx.value_and_hypergrad(inner, judge, solver=solver, hypergradient=method)
    response = lambda x, a: a["scale"] * x**2 + a["shift"]
    found = jax.jacrev(lambda x, a: fn(START, x, a, OUTER).inner_params, (0, 1))(X, INNER)
    close(found, jax.jacrev(response, (0, 1))(X, INNER))
    found = jax.grad(lambda x: fn(START, x, INNER, OUTER).aux["size"])(X)
    close(found, jax.grad(lambda x: jnp.sum(response(x, INNER) ** 2))(X))
    if name in ONCE:
        with pytest.raises(ValueError, match="right once only"):
            jax.grad(
                lambda x: jnp.sum(
                    jax.grad(lambda x: jnp.sum(fn(START, x, INNER, OUTER).inner_params ** 2))(x)
                )
            )(X)


def test_an_unrolled_estimate_keeps_the_derivative_in_its_start():
    fn = bx.value_and_hypergrad(
        inner,
        outer,
        solver=bx.inner.optax(optax.sgd(0.1, momentum=0.5), 3),
        hypergradient=H.unrolled(checkpoint="none"),
    )

    def two(x, y):
        est = fn(y, x, INNER, OUTER)
        return fn(est.inner_params, 1.2 * x, INNER, OUTER, state=est.state).value

    def by_hand(x, y):
        m = jnp.zeros(2)
        for z in (x, 1.2 * x):
            for _ in range(3):
                m = 0.5 * m + jax.grad(inner)(y, z, INNER)
                y = y - 0.1 * m
        return outer(y, 1.2 * x, OUTER)

    close(jax.grad(two, (0, 1))(X, START + 0.3), jax.grad(by_hand, (0, 1))(X, START + 0.3), 1e-12)


def test_a_truncated_unroll_counts_once():
    fn = bx.value_and_hypergrad(inner, outer, solver=DESCENT, hypergradient=H.unrolled(last=100))
    value, grad = (
        (lambda x: fn(START, x, INNER, OUTER).value),
        (lambda x: fn(START, x, INNER, OUTER).grad),
    )
    close(jax.grad(value)(X), grad(X), 1e-12)
    with pytest.raises(ValueError, match="^hypergradient: got unrolled.*right once only"):
        jax.jacrev(grad)(X)


def test_methods_without_a_rule_for_batches_refuse_by_name():
    fn = bx.value_and_hypergrad(
        inner, outer, solver=DESCENT, hypergradient=H.zeroth_order(samples=2)
    )
    value = lambda x, a: fn(START, x, a, OUTER, key=jax.random.key(0)).value
    close(jax.grad(value)(X, INNER), fn(START, X, INNER, OUTER, key=jax.random.key(0)).grad, 1e-12)
    with pytest.raises(ValueError, match="^hypergradient: got zeroth_order.*batch"):
        jax.grad(value, 1)(X, INNER)


@pytest.mark.turns
def test_a_cut_solve_is_nan_in_the_second_derivative():
    wide = lambda y, x, b: (
        0.5 * jnp.sum(jnp.logspace(0, 4, 30) * (y - jnp.sum(x)) ** 2) + 0.1 * jnp.sum(y**4)
    )
    cut = H.implicit(linear.cg(maxiter=3), max_residual=jnp.inf)
    fn = bx.value_and_hypergrad(
        wide, lambda y, x, b: jnp.sum(jnp.arange(30.0) * y**2), solver=SOLVER, hypergradient=cut
    )
    assert np.isfinite(fn(jnp.ones(30), X).grad).all()
    assert np.isnan(jax.jacfwd(lambda x: fn(jnp.ones(30), x).grad)(X)).all()


# ---- more levels


@pytest.mark.turns
@pytest.mark.parametrize(
    "again",
    [jax.jacfwd, pytest.param(lambda f: jax.jit(jax.jacrev(f)), marks=pytest.mark.slow)],
    ids=["forwards", "backwards, compiled"],
)
def test_levels_alike(again):
    """z follows y, y follows x: y = x / (1 + 1/4), F = Σ y³."""

    def build(lower):
        return bx.value_and_multilevel_grad(
            [
                bx.Level(
                    "z",
                    lambda p, b: jnp.sum((p["z"] - 0.5 * p["y"]) ** 2),
                    solver=SOLVER,
                    hypergradient=lower,
                ),
                bx.Level(
                    "y",
                    lambda p, b: jnp.sum((p["y"] - p["x"]) ** 2 + p["z"] ** 2),
                    solver=SOLVER,
                    hypergradient=H.implicit(LINEAR),
                ),
                bx.Level("x", lambda p, b: jnp.sum(p["y"] ** 3), solver=optax.sgd(0.1)),
            ]
        )

    fn = build(H.implicit(LINEAR))
    params = lambda x: {"z": START, "y": START, "x": x}
    exact = lambda x: jnp.sum((x / 1.25) ** 3)
    close(jax.grad(lambda x: fn(params(x)).value)(X), jax.grad(exact)(X))
    close(again(lambda x: fn(params(x)).grad)(X), jax.hessian(exact)(X))
    with pytest.raises(ValueError, match="inner_params"):
        jax.grad(lambda x: jnp.sum(fn(params(x)).inner_params["y"]))(X)
    two = bx.value_and_multilevel_grad(
        [
            bx.Level(
                "y",
                lambda p, b: jnp.sum((p["y"] - p["x"]) ** 2),
                solver=DESCENT,
                hypergradient=H.one_step(0.5),
            ),
            bx.Level("x", lambda p, b: jnp.sum(p["y"] ** 3), solver=optax.sgd(0.1)),
        ]
    )
    params = lambda x: {"y": START, "x": x}
    close(jax.grad(lambda x: two(params(x)).value)(X), two(params(X)).grad)
    with pytest.raises(ValueError, match="^hypergradient of level 'y': got one_step"):
        jax.jacrev(lambda x: two(params(x)).grad)(X)
    with pytest.raises(ValueError, match="^value_and_multilevel_grad: .*batch"):
        jax.grad(lambda b: two(params(X), {"x": b}).value)(1.0)


# ---- what is captured changes between calls


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_function_that_was_traced_with_another_value_is_asked_again(level):
    """A mutable thing that is captured, a module's attribute say: a number in the first call, and
    traced in the next. The lower level gives ``y* = c x``, the upper ``c`` times its sum.
    """
    held = {"c": jnp.asarray(2.0)}
    of = lambda name: held["c"] if name == level else 1.0
    g = lambda y, x, b: 0.5 * jnp.sum((y - of("inner") * x) ** 2)
    f = lambda y, x, b: of("outer") * jnp.sum(y)
    descent = bx.inner.optax(optax.sgd(1.0), 1)
    estimate = bx.value_and_hypergrad(g, f, solver=descent, hypergradient=H.implicit())
    loop = bx.algorithms.double_loop(descent, H.implicit(), optax.sgd(0.5))

    def value(c):
        held["c"] = c
        return estimate(START, X).value

    def run(c):
        held["c"] = c
        return jnp.sum(bx.solve_bilevel(g, f, START, X, algorithm=loop, num_steps=1).outer_params)

    close(value(jnp.asarray(2.0)), 6.0)
    close(jnp.stack(jax.value_and_grad(value)(3.0)), jnp.asarray([9.0, 3.0]))
    assert jnp.isfinite(run(jnp.asarray(2.0)))
    for derive in (jax.grad(run), lambda c: jax.jvp(run, (c,), (1.0,))):
        with pytest.raises(ValueError, match="^solve_bilevel: got a derivative through a whole"):
            derive(3.0)


# ---- a whole run


@pytest.mark.turns
def test_a_run_is_refused_by_name():
    loop = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.5), 5), H.implicit(), optax.sgd(0.5)
    )

    def run(t, captured=1.0):
        g = lambda y, x, b: 0.5 * jnp.sum((y - captured * x) ** 2)
        f = lambda y, x, b: 0.5 * jnp.sum((y - b) ** 2)
        return jnp.sum(
            bx.solve_bilevel(
                g, f, START, START, outer_data=t * jnp.ones(2), algorithm=loop, num_steps=3
            ).outer_params
        )

    for derive in (
        jax.grad(run),
        jax.grad(lambda c: run(1.0, c)),
        lambda t: jax.jvp(run, (t,), (1.0,)),
        jax.jit(jax.grad(run)),
    ):
        with pytest.raises(ValueError, match=r"^solve_bilevel: .*argmin.*value_and_hypergrad"):
            derive(3.0)
    close(jax.vmap(run)(jnp.asarray([1.0, 2.0])), jnp.stack([run(1.0), run(2.0)]), 1e-6)
    close(
        jax.vmap(lambda c: run(1.0, c))(jnp.asarray([1.0, 2.0])),
        jnp.stack([run(1.0, 1.0), run(1.0, 2.0)]),
        1e-6,
    )
    levels = [
        bx.Level(
            "y",
            lambda p, b: jnp.sum((p["y"] - p["x"]) ** 2),
            solver=bx.inner.optax(optax.sgd(0.5), 1),
            hypergradient=H.implicit(),
        ),
        bx.Level("x", lambda p, b: jnp.sum((p["y"] - 1.0) ** 2), solver=optax.sgd(0.5)),
    ]
    with pytest.raises(ValueError, match=r"^solve_multilevel: "):
        jax.grad(
            lambda x: jnp.sum(
                bx.solve_multilevel(levels, {"y": START, "x": x}, num_steps=2).outer_params
            )
        )(X)
