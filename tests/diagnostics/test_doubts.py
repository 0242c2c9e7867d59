"""What two wrongs agree on is not ok: kinks, maxima, saddles; and statistics that the solver's own
steps move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

H, linear = bx.hypergradient, bx.linear
judge = lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2)
lasso = lambda y, x, b: 0.5 * jnp.sum((y - x) ** 2) + 3 * jnp.sum(jnp.abs(y))
peak = lambda y, x, b: -0.5 * jnp.sum((y - x) ** 2)
well = lambda y, x, b: jnp.sum((y**2 - 1) ** 2 / 4) + 0.5 * jnp.sum(x * y**2)
EXACT, INDEFINITE = H.implicit(linear.cg(tol=1e-12)), H.implicit(linear.minres())
TIGHT, STILL = bx.inner.lbfgs(tol=1e-12), bx.inner.optax(optax.sgd(1e-9), 1)
X = jnp.asarray([1.0, 2.0])


@pytest.mark.turns
@pytest.mark.parametrize(
    ("inner", "start", "x", "method", "solver", "cause"),
    [
        (lasso, jnp.full(2, 0.5), X, EXACT, TIGHT, "kink"),
        (peak, X, X, INDEFINITE, STILL, "negative curvature"),
        (well, jnp.zeros(2), jnp.full(2, 0.1), INDEFINITE, TIGHT, "negative curvature"),
    ],
    ids=["kink", "maximum", "saddle"],
)
def test_agreement_where_there_is_no_hypergradient_is_not_ok(
    inner, start, x, method, solver, cause
):
    report = bx.check_hypergradient(inner, judge, start, x, solver=solver, hypergradient=method)
    assert not report.ok and cause in report.advice


def test_a_minimum_is_ok():
    report = bx.check_hypergradient(
        lambda y, x, b: jnp.sum((y - x) ** 2),
        judge,
        jnp.zeros(2),
        X,
        solver=TIGHT,
        hypergradient=EXACT,
    )
    assert report.ok and report.advice == "Agrees with the reference."


def test_the_solvers_own_steps_move_the_models_state():
    """``m = .5 m + .5 y`` after the step, and the outer objective reads it: dF/dx is through
    both."""
    inner = bx.objective(
        lambda y, x, b, m: (0.5 * jnp.sum((y - x) ** 2), 0.5 * m + 0.5 * y), stateful=True
    )
    outer = bx.objective(lambda y, x, b, m: (jnp.sum(y * m), m), stateful=True)
    report = bx.check_hypergradient(
        inner,
        outer,
        jnp.ones(2),
        X,
        solver=bx.inner.optax(optax.sgd(0.5), 2),
        hypergradient=H.unrolled(),
        model_state=jnp.zeros(2),
        reference="solver",
    )
    y1 = 0.5 + 0.5 * X
    y2, m2 = 0.5 * y1 + 0.5 * X, 0.25 + 0.5 * y1  # the state after two steps has seen y0 and y1
    np.testing.assert_allclose(report.reference, 0.75 * m2 + y2 * 0.25, rtol=1e-6)


@pytest.mark.parametrize("dtype, precision", [(None, "float32"), (jnp.float32, "float64")])
def test_a_reference_draws_what_the_solver_drew(dtype, precision):
    """Of one key comes another mask in double precision, unless the objective says in which it
    draws."""

    def inner(y, x, batch, *, key):
        kept = jax.random.uniform(key, y.shape, *([] if dtype is None else [dtype])) < 0.5
        return 0.5 * jnp.sum(jnp.where(kept, (y - x) ** 2, y**2))

    with jax.enable_x64(False):
        report = bx.check_hypergradient(
            bx.objective(inner, keyed=True),
            lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2),
            jnp.zeros(8),
            jnp.linspace(1.0, 2.0, 8),
            solver=bx.inner.optax(optax.sgd(0.5), 2),
            hypergradient=H.unrolled(),
            reference="solver",
            key=jax.random.key(3),
        )
    assert report.ok and report.precision == precision
