"""The diagnosis is right: the error bound holds, checks find what is wrong, comparisons measure
what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import certificate, linear
from bilevax.diagnostics import Constants, estimate_constants
from tests.problems import PROBLEMS, flatten

# ---- the error bound

PROBLEM_COUNT, N, M = 1000, 6, 3
CURVED = 4 / (3 * np.sqrt(3))  # the largest third derivative of log cosh


def bumpy(y, x, p):
    """``½y'Ay + x'Cy`` and ``s (1 + v'x) Σ log cosh y_i``: convex for ``|v'x| ≤ 1``, with known
    Lipschitz constants."""
    log_cosh = jnp.sum(jnp.logaddexp(y, -y)) - y.size * jnp.log(2.0)
    return (
        jnp.sum(y * (p["A"] @ y)) / 2
        + jnp.sum(x * (p["C"] @ y))
        + p["s"] * (1 + jnp.sum(p["v"] * x)) * log_cosh
    )


def coupled(y, x, p):
    return jnp.sum((y - p["t"]) * (p["F"] @ (y - p["t"]))) / 2 + jnp.sum(x * (p["K"] @ y))


def random_problem(key):
    k = iter(jax.random.split(key, 16))
    condition = 10 ** jax.random.uniform(next(k), (), minval=0.0, maxval=4.0)

    def orthogonal():
        return jnp.linalg.qr(jax.random.normal(next(k), (N, N)))[0]

    exponents = jnp.sort(jax.random.uniform(next(k), (N,))).at[0].set(0.0).at[-1].set(1.0)
    Q, R = orthogonal(), orthogonal()
    A = (Q * (condition**exponents / condition)[None, :]) @ Q.T
    spread = jax.random.uniform(next(k), (N,), minval=0.5, maxval=1.0)
    v = jax.random.normal(next(k), (M,))
    x = jax.random.normal(next(k), (M,))
    p = {
        "A": A,
        "C": jax.random.normal(next(k), (M, N)),
        "s": 0.1 * jax.random.uniform(next(k), ()) / condition,
        "v": 0.5 * v / (jnp.linalg.norm(v) * jnp.linalg.norm(x)),
        "t": jax.random.normal(next(k), (N,)),
        "F": (R * spread[None, :]) @ R.T,
        "K": 0.1 * jax.random.normal(next(k), (M, N)),
    }
    return p, x, 1 / condition, next(k)


SOLVER = bx.inner.optax(optax.sgd(0.0), 1)  # leaves the point where it is


def one(key, residuals):
    """A hypergradient of random inexactness on a random problem: true error and guaranteed bound.

    `residuals`: both solves are off by random vectors in what a tolerance controls, the gradient
    and the adjoint's residual; otherwise in the solutions themselves, where stiff directions hide
    behind the bound's worst case.
    """
    p, x, mu, key = random_problem(key)
    keys = jax.random.split(key, 5)
    gradient = jax.grad(bumpy)

    def newton(_, y):
        return y - jnp.linalg.solve(jax.jacfwd(gradient)(y, x, p), gradient(y, x, p))

    def exact(x):
        y = jax.lax.fori_loop(0, 8, newton, jnp.linalg.solve(p["A"], -p["C"].T @ x))
        H, w = jax.jacfwd(gradient)(y, x, p), jax.grad(coupled)(y, x, p)
        return y, jax.grad(coupled, 1)(y, x, p) - jax.jacfwd(jax.grad(bumpy, 1))(
            y, x, p
        ) @ jnp.linalg.solve(H, w)

    def spoiled(key, H, size):
        direction = jax.random.normal(key, (N,))
        return size * jnp.where(residuals, jnp.linalg.solve(H, mu * direction), direction)

    y_star, want = exact(x)
    sizes = 10 ** jax.random.uniform(keys[0], (2,), minval=-5.0, maxval=0.0) * jnp.stack(
        [1.0, jnp.linalg.norm(y_star) / mu]
    )
    start = y_star + spoiled(keys[1], jax.jacfwd(gradient)(y_star, x, p), sizes[0])
    H = jax.jacfwd(gradient)(start, x, p)
    near = jnp.linalg.solve(H, jax.grad(coupled)(start, x, p)) + spoiled(keys[2], H, sizes[1])
    method = bx.hypergradient.implicit(
        linear.cg(tol=1e9), max_residual=jnp.inf
    )  # measures the residual of the warm start and keeps it
    fn = bx.value_and_hypergrad(bumpy, coupled, solver=SOLVER, hypergradient=method)
    state = fn.init(start)
    est = fn(start, x, p, p, state=state._replace(method=state.method._replace(adjoint=near)))
    B = jax.jacfwd(jax.grad(bumpy, 1))(est.inner_params, x, p)
    constants = Constants(
        strong_convexity=mu,
        cross=jnp.linalg.norm(B, 2),
        outer_smoothness=jnp.linalg.norm(p["F"], 2),
        outer_cross=jnp.linalg.norm(p["K"], 2),
        hessian_lipschitz=p["s"] * (1 + jnp.sum(p["v"] * x)) * CURVED,
        cross_lipschitz=p["s"] * jnp.linalg.norm(p["v"]),
        smoothness=jnp.linalg.norm(p["A"], 2) + p["s"] * (1 + jnp.sum(p["v"] * x)),
    )
    bound = bx.error_bound(est.info, constants, est.inner_params)
    return (
        jnp.linalg.norm(est.grad - want),
        bound.total,
        bound.distance,
        jnp.linalg.norm(est.inner_params - y_star),
        jnp.linalg.norm(want),
    )


@pytest.fixture(scope="module")
def bounded():
    """Both kinds of inexactness, in one program."""
    keys = jax.random.split(jax.random.key(0), PROBLEM_COUNT)
    return jax.device_get(
        jax.jit(
            lambda flags: jax.lax.map(
                lambda flag: jax.vmap(one, in_axes=(0, None))(keys, flag), flags
            )
        )(jnp.array([True, False]))
    )


@pytest.mark.turns
@pytest.mark.parametrize("kind", [0, 1], ids=["residuals", "solutions"])
def test_error_bound_holds(bounded, kind):
    error, bound, distance, distance_true, size = (column[kind] for column in bounded)
    rounding = 1e-10 * (1 + size)
    assert np.all(np.isfinite(bound))
    assert np.all(distance_true <= distance * (1 + 1e-9) + 1e-12)
    assert np.all(error <= bound + rounding), np.max(error / bound)
    assert np.log10(error.max() / np.median(error)) > 1  # inexactness of many sizes
    assert np.mean(error > rounding) > 0.95


def test_error_bound_is_tight(bounded):
    """Within 10 times the true error at the median, where errors are random in what tolerances
    control."""
    error, bound, *_ = (column[0] for column in bounded)
    ratio = bound / error
    assert np.median(ratio) <= 10, np.quantile(ratio, [0.1, 0.5, 0.9])
    assert np.min(ratio) >= 1 - 1e-6


def test_estimated_constants_are_the_known_ones_and_say_so():
    p, x, mu, _ = jax.jit(random_problem)(jax.random.key(4))
    p, x = p | {"A": p["A"] + 0.5 * jnp.eye(N), "s": jnp.asarray(0.0)}, x
    found = estimate_constants(bumpy, coupled, jnp.ones(N), x, p, p, iterations=400)
    np.testing.assert_allclose(found.strong_convexity, np.linalg.eigvalsh(p["A"])[0], rtol=1e-2)
    np.testing.assert_allclose(found.cross, np.linalg.norm(p["C"], 2), rtol=1e-3)
    np.testing.assert_allclose(found.outer_smoothness, np.linalg.norm(p["F"], 2), rtol=1e-3)
    np.testing.assert_allclose(found.outer_cross, np.linalg.norm(p["K"], 2), rtol=1e-3)
    assert abs(float(found.hessian_lipschitz)) < 1e-9  # a quadratic
    assert abs(float(found.cross_lipschitz)) < 1e-9
    info = {"inner_grad_norm": 1e-3, "adjoint_residual": 1e-2, "cotangent_norm": 2.0}
    assert not bx.error_bound(info, found).guaranteed
    assert bx.error_bound(info, found).label == "estimated"
    vouched = found._replace(guaranteed=True)
    assert (
        bx.error_bound(info, vouched).label == "estimated"
    )  # nothing says what rounding is relative to
    whole, y = info | {"grad_norm": 1.0}, jnp.ones(N)
    assert bx.error_bound(whole, vouched, y).label == "guaranteed"
    assert bx.error_bound(whole, vouched._replace(smoothness=None), y).label == "estimated"
    assert (
        bx.error_bound(whole, vouched, y).rounding
        < bx.error_bound(whole, vouched, y.astype(jnp.float32)).rounding
    )


def test_error_bound_refusals():
    with pytest.raises(ValueError, match="^info: got entries .* without cotangent_norm"):
        bx.error_bound(
            {"inner_grad_norm": 1.0, "adjoint_residual": 0.0},
            Constants(1.0, 1.0, 1.0, 0.0, 0.0, 0.0),
        )
    info = {"inner_grad_norm": 1.0, "adjoint_residual": 0.0, "cotangent_norm": 1.0}
    with pytest.raises(TypeError, match="^constants: got tuple"):
        bx.error_bound(info, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"^constants.strong_convexity: got 0.0"):
        bx.error_bound(info, Constants(0.0, 1.0, 1.0, 0.0, 0.0, 0.0))
    with pytest.raises(
        ValueError, match=r"^constants.hessian_lipschitz: got None; expected a number"
    ):
        bx.error_bound(info, Constants(1.0, 1.0, 1.0, 0.0))


@pytest.mark.turns
def test_there_is_one_set_of_constants():
    """What is measured or known serves the bound and the algorithm alike, and both bounds are one
    formula."""
    assert bx.algorithms.Constants is Constants
    form = PROBLEMS["ridge"]
    found = estimate_constants(
        form.inner,
        form.outer,
        form.inner_params,
        form.outer_params,
        form.inner_batch,
        form.outer_batch,
    )
    data = dict(inner_data=form.inner_batch, outer_data=form.outer_batch)
    algorithm = bx.algorithms.maid(constants=found)
    solution = bx.solve_bilevel(
        form.inner,
        form.outer,
        form.inner_params,
        form.outer_params,
        algorithm=algorithm,
        num_steps=2,
        **data,
    )
    np.testing.assert_allclose(
        solution.history["strong_convexity"], float(found.strong_convexity), rtol=1e-6
    )
    known = Constants(2.0, 3.0, 1.5, 0.5, 0.7, 0.3)
    grad_norm, residual, w = 1e-2, 1e-3, 4.0
    public = bx.error_bound(
        {"inner_grad_norm": grad_norm, "adjoint_residual": residual / w, "cotangent_norm": w}, known
    )
    by_hand = (
        3.0 / 2 * residual
        + (0.5 + 0.3 * w / 2 + 3 * (1.5 + 0.7 * w / 2) / 2) * 5e-3
        + 0.3 * 1.5 / 2 * 5e-3**2
    )
    np.testing.assert_allclose(float(public.total), by_hand, rtol=1e-12)
    q = 1.8
    s = q + residual / 2
    by_hand = (
        3.0 / 2 * residual
        + (0.5 + 0.3 * s + 3 * (1.5 + 0.7 * s) / 2) * 5e-3
        + 0.3 * (1.5 + 0.7 * s) / 2 * 5e-3**2
    )
    np.testing.assert_allclose(
        float(certificate.bound(known, grad_norm, residual, adjoint_norm=q).total),
        by_hand,
        rtol=1e-12,
    )


# ---- check_hypergradient

FORM = PROBLEMS["logistic_penalties"]


def checked(hypergradient, solver=None, **settings):
    solver = bx.inner.optax(optax.sgd(1.5), 400) if solver is None else solver
    data = dict(inner_batch=FORM.inner_batch, outer_batch=FORM.outer_batch)
    return bx.check_hypergradient(
        FORM.inner,
        FORM.outer,
        FORM.inner_params,
        FORM.outer_params,
        solver=solver,
        hypergradient=hypergradient,
        **data,
        **settings,
    )


@pytest.mark.turns
@pytest.mark.parametrize("reference", ["dense", "finite_difference"])
def test_right_is_found_right(reference):
    report = checked(bx.hypergradient.implicit(linear.cg(tol=1e-12)), reference=reference, tol=1e-6)
    want = FORM.hypergradient(FORM.outer_params)
    np.testing.assert_allclose(
        report.reference, want, rtol=1e-12 if reference == "dense" else 1e-8, atol=1e-12
    )
    assert report.ok
    assert report.cosine > 1 - 1e-10
    assert report.precision == "float64"
    assert "relative error" in repr(report)
    assert repr(report).startswith("hypergradient ok")


def test_directions_span_a_projection():
    report = checked(
        bx.hypergradient.implicit(linear.cg(tol=1e-12)),
        reference="finite_difference",
        directions=2,
        tol=1e-6,
    )
    want = FORM.hypergradient(FORM.outer_params)
    got = np.asarray(report.reference)
    assert report.ok
    np.testing.assert_allclose(
        got @ (want - got), 0, atol=1e-9 * (want @ want)
    )  # what is left is orthogonal to the span
    assert np.linalg.norm(got) < 0.999 * np.linalg.norm(want)


def test_unsolved_inner_problem_is_named():
    report = checked(
        bx.hypergradient.implicit(linear.cg(tol=1e-12)), bx.inner.optax(optax.sgd(0.5), 3)
    )
    assert not report.ok
    assert "The inner problem is not solved" in report.advice
    assert report.method_error < 1e-8 < report.solve_error
    want = FORM.hypergradient(FORM.outer_params)
    np.testing.assert_allclose(
        report.relative_error, np.linalg.norm(report.grad - want) / np.linalg.norm(want), rtol=1e-8
    )


def test_unconverged_adjoint_is_named():
    report = checked(bx.hypergradient.implicit(linear.cg(maxiter=1), max_residual=jnp.inf))
    assert not report.ok
    assert "The adjoint is not converged" in report.advice
    assert "inner problem is not solved" not in report.advice
    assert report.adjoint_residual > 1e-3
    np.testing.assert_allclose(report.method_error, report.relative_error, rtol=1e-3)


def test_biased_method_is_named():
    report = checked(bx.hypergradient.one_step())
    assert not report.ok
    assert "one_step" in report.advice
    assert np.isnan(report.adjoint_residual) or report.adjoint_residual > 0


def test_unrolled_is_checked_for_what_it_is():
    few = bx.inner.optax(optax.sgd(0.5), 5)
    biased = checked(bx.hypergradient.unrolled(), few)
    assert not biased.ok
    assert "differentiates the solver's steps" in biased.advice
    assert "from the inner solve" in repr(biased)
    exact = checked(bx.hypergradient.unrolled(), few, reference="solver", tol=1e-7)
    # five steps are not far from what was asked for: they are it
    assert exact.ok and "from" not in repr(exact)


def test_wrong_pullback_is_found():
    """A method with a wrong sign, which no residual could show."""
    right = bx.hypergradient.implicit(linear.cg(tol=1e-12))

    def vjp(*args):
        solution, pullback = right.vjp(*args)

        def wrong(w):
            cotangent, *rest = pullback(w)
            return (jax.tree.map(jnp.negative, cotangent), *rest)

        return solution, wrong

    report = checked(right._replace(vjp=vjp))
    assert not report.ok
    assert "although its adjoint residual is small" in report.advice


def test_kink_is_named():
    """``y* = max(x, 0)`` at ``x = 0``: the one-sided derivatives are 0 and 1."""
    inner = lambda y, x, batch: jnp.sum((y - jnp.maximum(x, 0.0)) ** 2)
    outer = lambda y, x, batch: jnp.sum(y)
    solver = bx.inner.optax(optax.sgd(0.5), 1)
    report = bx.check_hypergradient(
        inner,
        outer,
        jnp.zeros(1),
        jnp.zeros(1),
        solver=solver,
        hypergradient=bx.hypergradient.one_step(),
        reference="dense",
    )
    assert not report.ok
    assert "not smooth" in report.advice


def test_float32_users_get_a_float64_reference():
    narrow = jax.tree.map(
        lambda a: np.asarray(a, np.float32),
        (FORM.inner_params, FORM.outer_params, FORM.inner_batch, FORM.outer_batch),
    )
    report = bx.check_hypergradient(
        FORM.inner, FORM.outer, narrow[0], narrow[1], solver=bx.inner.optax(optax.sgd(1.5), 400),
        hypergradient=bx.hypergradient.implicit(), inner_batch=narrow[2], outer_batch=narrow[3],
    )  # fmt: skip
    assert report.ok
    assert report.precision == "float64"
    assert report.grad.dtype == jnp.float32
    np.testing.assert_allclose(report.reference, FORM.hypergradient(FORM.outer_params), rtol=1e-5)


def test_objectives_that_fix_their_dtype_are_said_to():
    half = lambda y, x, batch: jnp.sum((y.astype(jnp.float32) - x.astype(jnp.float32)) ** 2)
    report = bx.check_hypergradient(
        half, lambda y, x, batch: jnp.sum(y.astype(jnp.float32) ** 2), jnp.zeros(2, jnp.float32),
        jnp.ones(2, jnp.float32),
        solver=bx.inner.optax(optax.sgd(0.5), 1), hypergradient=bx.hypergradient.implicit(),
        tol=1e-2,
    )  # fmt: skip
    assert report.precision == "float32"
    assert report.ok


def test_check_refusals():
    with pytest.raises(ValueError, match="^reference: got 'exact'"):
        checked(bx.hypergradient.implicit(), reference="exact")
    with pytest.raises(ValueError, match="^directions: got 0"):
        checked(bx.hypergradient.implicit(), directions=0)
    with pytest.raises(ValueError, match="^tol: got 0"):
        checked(bx.hypergradient.implicit(), tol=0.0)
    with pytest.raises(ValueError, match="^reference: got 'auto' with inner_init"):
        checked(bx.hypergradient.unrolled(), inner_init=lambda x: x)


# ---- compare_hypergradients


def _breaks_down(*args):
    solution, pullback = bx.hypergradient.one_step().vjp(*args)

    def broken(w):
        *found, info = pullback(w)
        return *found, {**info, "code": jnp.int32(bx.RESULTS.adjoint_breakdown)}

    return solution, broken


def test_comparison():
    solver = bx.inner.optax(optax.sgd(1.5), 100)
    methods = {
        "exact": bx.hypergradient.implicit(linear.cg(tol=1e-12)),
        "crude": bx.hypergradient.one_step(),
        "broken": bx.hypergradient.one_step()._replace(vjp=_breaks_down),
        "unrolled": (bx.inner.optax(optax.sgd(1.5), 80), bx.hypergradient.unrolled()),
    }
    data = dict(inner_batch=FORM.inner_batch, outer_batch=FORM.outer_batch)
    table = bx.compare_hypergradients(
        FORM.inner,
        FORM.outer,
        FORM.inner_params,
        FORM.outer_params,
        solver=solver,
        methods=methods,
        repeats=2,
        **data,
    )
    assert [row.name for row in table.rows] == list(methods)
    np.testing.assert_allclose(
        table.reference, flatten(FORM.hypergradient(FORM.outer_params)), rtol=1e-11
    )
    exact, crude = table.row("exact"), table.row("crude")
    assert exact.relative_error < 1e-6 < crude.relative_error
    assert exact.cosine > 0.9999 > crude.cosine
    assert exact.gradients == exact.mixed_products == 1
    assert exact.hvps > 1
    assert abs(exact.norm_ratio - 1) < 1e-6
    assert all(row.milliseconds > 0 and row.memory > 0 for row in table.rows)
    assert table.row("broken").result.failed
    assert "Failed: broken" in table.recommendation
    assert "'exact'" in table.recommendation or "'unrolled'" in table.recommendation
    assert len(table.to_markdown().splitlines()) == 2 + len(methods)


def test_comparison_plot_and_defaults(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    row = bx.diagnostics.ComparisonRow(
        "one", 1.0, 1.0, 1e-3, 1, 2, 3, 0.5, float("nan"), bx.RESULTS.success
    )
    table = bx.diagnostics.HypergradientComparison(
        (row, row._replace(name="two", relative_error=0.0, hvps=None)),
        "dense",
        "float64",
        np.ones(2),
        1e-4,
        "Take it.",
    )
    ax = table.plot()
    ax.figure.savefig(tmp_path / "plot.png")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "one",
        "two",
        "error of the solve alone",
    ]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    matplotlib.pyplot.close(ax.figure)
    assert (
        table.to_markdown().splitlines()[2] == "| one | 1.0000 | 1 | 1.0e-03 | 1 | 2 | 3 | 0.5 |  |"
    )
    assert repr(table).splitlines()[-1] == "Take it."
    default = bx.diagnostics.compare.default_methods
    assert {"SAMA", "unrolled"} <= set(default(bx.inner.optax(optax.sgd(0.1), 4)))
    assert "SHINE" in default(bx.inner.lbfgs())
    assert "unrolled" not in default(bx.inner.lbfgs())
    assert "zeroth order, 16" in default(bx.inner.lbfgs(), jax.random.key(0))


def test_comparison_refusals():
    args = (FORM.inner, FORM.outer, FORM.inner_params, FORM.outer_params)
    with pytest.raises(TypeError, match="^methods: got"):
        bx.compare_hypergradients(*args, solver=SOLVER, methods=[bx.hypergradient.implicit()])
    with pytest.raises(TypeError, match=r"^methods\['a'\]: got"):
        bx.compare_hypergradients(*args, solver=SOLVER, methods={"a": 3})
    with pytest.raises(ValueError, match="^repeats: got 0"):
        bx.compare_hypergradients(*args, solver=SOLVER, repeats=0)
    with pytest.raises(ValueError, match="^reference: got 'solver'"):
        bx.compare_hypergradients(*args, solver=SOLVER, reference="solver")


def test_a_reference_that_is_not_finite_decides_nothing():
    """At the solution y = x the outer objective is the root of a negative number; after a small
    step from zero it is none."""
    report = bx.check_hypergradient(
        lambda y, x, b: jnp.sum((y - x) ** 2) / 2,
        lambda y, x, b: jnp.sum(jnp.sqrt(3.0 - y)),
        jnp.zeros(2),
        jnp.array([1.0, 4.0]),
        solver=bx.inner.optax(optax.sgd(0.1), 1),
        hypergradient=bx.hypergradient.unrolled(),
    )
    want = -0.05 / np.sqrt(3.0 - 0.1 * np.array([1.0, 4.0]))
    np.testing.assert_allclose(report.grad, want, rtol=1e-6)
    assert not report.ok and not np.isfinite(report.relative_error)
    assert repr(report).startswith("hypergradient NOT DECIDED") and "'solver'" in report.advice
