"""Inner solvers against closed forms: convergence, warm starts, rounding, non-finite numbers, vmap,
and what costs a trace."""

import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest

import bilevax as bx
from bilevax import base, inner
from bilevax.inner.lbfgs import inverse_hessian_product, remember
from bilevax.results import RESULTS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

DIM = 6
RNG = np.random.default_rng(0)
Q, _ = np.linalg.qr(RNG.normal(size=(DIM, DIM)))
A = Q @ np.diag(np.geomspace(1.0, 30.0, DIM)) @ Q.T
X = RNG.normal(size=(20, DIM))
T = RNG.normal(size=20)
LABELS = np.sign(X @ RNG.normal(size=DIM) + RNG.normal(size=20))


def quadratic(y, x, batch):
    """``½y'Ay − x'y``, on a tree of two leaves: ``y* = A⁻¹x``."""
    v = jnp.concatenate([y["a"], y["b"].reshape(-1)])
    a = jnp.asarray(A, v.dtype)
    return 0.5 * jnp.sum(v * (a @ v)) - jnp.sum(x * v)


def ridge(w, lam, batch):
    features, targets = batch
    return 0.5 * jnp.mean((features @ w - targets) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def logistic(w, lam, batch):
    features, labels = batch
    return jnp.mean(jax.nn.softplus(-labels * (features @ w))) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


def newton(lam, steps=30):
    """The logistic minimiser, by Newton's method in numpy."""
    w = np.zeros(DIM)
    for _ in range(steps):
        s = 1 / (1 + np.exp(LABELS * (X @ w)))
        grad = -X.T @ (LABELS * s) / len(s) + np.exp(lam) * w
        w = w - np.linalg.solve((X.T * (s * (1 - s))) @ X / len(s) + np.diag(np.exp(lam)), grad)
    return w


def split_tree(v, dtype=np.float64):
    return {"a": jnp.asarray(v[:2], dtype), "b": jnp.asarray(np.reshape(v[2:], (2, 2)), dtype)}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def solve(solver, fn, params, outer, batch=None, state=None):
    """One jitted step from `params`, or from a state that an earlier one returned."""
    state = base.InnerState(params, solver.init(params)) if state is None else state
    run = jax.jit(
        lambda state, outer, batch: solver.step(
            base.objective(fn), state, outer, base.Ctx(batch=batch)
        )
    )
    return run(state, outer, batch)


DESCENT = {
    "gradient_descent": lambda **k: inner.gradient_descent(maxiter=5000, **k),
    "gradient_descent_fixed": lambda **k: inner.gradient_descent(1 / 40, maxiter=5000, **k),
    "agd": lambda **k: inner.agd(maxiter=5000, **k),
    "lbfgs": lambda **k: inner.lbfgs(**k),
}
each_descent = pytest.mark.parametrize("name", DESCENT)
each_search = pytest.mark.parametrize(
    "name", [name for name in DESCENT if name != "gradient_descent_fixed"]
)  # whose step has no unit


# ---- closed forms


@each_descent
def test_quadratic_on_a_tree(name):
    x = np.arange(1.0, DIM + 1)
    state, info = solve(
        DESCENT[name](tol=1e-11), quadratic, split_tree(np.zeros(DIM)), jnp.asarray(x)
    )
    np.testing.assert_allclose(flat(state.params), np.linalg.solve(A, x), rtol=0, atol=1e-9)
    assert int(info["code"]) == RESULTS.success
    assert float(info["value"]) == 0.0
    np.testing.assert_allclose(
        flat(state.params),
        np.linalg.solve(A, x),
        rtol=0,
        atol=1e-10 * np.linalg.norm(np.linalg.solve(A, x)),
    )
    assert 0 < int(info["iterations"]) <= int(info["evaluations"])


@each_descent
def test_ridge_and_logistic(name):
    lam = np.linspace(-2.0, 0.0, DIM)
    w0 = jnp.zeros(DIM)
    solver = DESCENT[name](tol=1e-11)
    state, info = solve(solver, ridge, w0, jnp.asarray(lam), (jnp.asarray(X), jnp.asarray(T)))
    exact = np.linalg.solve(X.T @ X / len(T) + np.diag(np.exp(lam)), X.T @ T / len(T))
    np.testing.assert_allclose(state.params, exact, rtol=0, atol=1e-9)
    state, info = solve(
        solver, logistic, w0, jnp.asarray(lam), (jnp.asarray(X), jnp.asarray(LABELS))
    )
    np.testing.assert_allclose(state.params, newton(lam), rtol=0, atol=1e-9)
    assert int(info["code"]) == RESULTS.success


def test_agd_needs_far_fewer_iterations_than_descent_at_condition_1e4():
    scales = jnp.geomspace(1.0, 1e4, 40)

    def fn(y, x, batch):
        return 0.5 * jnp.sum(scales * (y - x) ** 2)

    counts = {}
    for name in ("gradient_descent", "agd", "lbfgs"):
        solver = {
            "gradient_descent": inner.gradient_descent,
            "agd": inner.agd,
            "lbfgs": inner.lbfgs,
        }[name](maxiter=200_000, tol=1e-8)
        state, info = solve(solver, fn, jnp.zeros(40), jnp.ones(40))
        assert int(info["code"]) == RESULTS.success
        np.testing.assert_allclose(state.params, 1.0, rtol=0, atol=1e-3)
        counts[name] = int(info["evaluations"])
    assert counts["agd"] * 10 < counts["gradient_descent"], counts
    assert counts["lbfgs"] < counts["agd"], counts


@each_descent
def test_rosenbrock_like_non_convex(name):
    """A double well: the solver finds a minimum, never the maximum between, from a start with
    negative curvature."""

    def fn(y, x, batch):
        return jnp.sum((y**2 - x) ** 2) / 4

    solver = (
        inner.gradient_descent(0.1, tol=1e-10)
        if name == "gradient_descent_fixed"
        else DESCENT[name](tol=1e-10)
    )
    state, info = solve(solver, fn, jnp.asarray([0.1, -0.2]), jnp.asarray([1.0, 2.0]))
    np.testing.assert_allclose(np.abs(state.params), np.sqrt([1.0, 2.0]), rtol=0, atol=1e-8)
    assert int(info["code"]) == RESULTS.success


# ---- tolerances


@each_descent
def test_warm_start_is_cheaper_and_as_accurate(name):
    solver = DESCENT[name](tol=1e-9)
    x = jnp.arange(1.0, DIM + 1)
    cold, first = solve(solver, quadratic, split_tree(np.zeros(DIM)), x)
    warm, second = solve(solver, quadratic, None, x * (1 + 1e-5), state=cold)
    assert int(second["code"]) == RESULTS.success
    assert int(second["iterations"]) < int(first["iterations"])
    exact = np.linalg.solve(A, x * (1 + 1e-5))
    assert np.linalg.norm(flat(warm.params) - exact) <= 1e-8 * np.linalg.norm(exact)
    # A tolerance relative to the warm start's own gradient would ask for five digits more.
    again, third = solve(solver, quadratic, None, x * (1 + 1e-5), state=warm)
    assert int(third["iterations"]) <= 2 and int(third["code"]) == RESULTS.success
    assert np.linalg.norm(flat(again.params) - exact) <= 1e-8 * np.linalg.norm(exact)


def poisson(y, x, batch):
    return jnp.sum(jnp.exp(y) - jnp.asarray([3.0, 5.0]) * x * y)


@each_search
@pytest.mark.parametrize("start", [0.0, 10.0, 15.0])
def test_a_poor_start_does_not_loosen_the_tolerance(name, start):
    """``y* = log(kx)``, from gradients as large as 3e6: a rule relative to the first one stops far
    off, and says success."""
    state, info = solve(DESCENT[name](), poisson, jnp.full(2, start), 1.0)
    np.testing.assert_allclose(state.params, np.log([3.0, 5.0]), rtol=0, atol=1e-5)
    assert int(info["code"]) == RESULTS.success


ROWS = np.asarray([[1.0, 0.2], [-0.4, 1.0], [0.3, -0.9], [-1.0, -0.5]])
COUNTS = np.asarray([2.0, 1.0, 3.0, 0.5])


def counts(y, x, batch):
    """A Poisson regression: its curvature at a far start is 1e80 times that of the end."""
    scores = jnp.asarray(ROWS, y.dtype) @ y
    return jnp.sum(jnp.exp(scores) - jnp.asarray(COUNTS, y.dtype) * scores)


def counts_solution():
    y = np.zeros(2)
    for _ in range(50):
        rates = np.exp(ROWS @ y)
        y = y - np.linalg.solve((ROWS.T * rates) @ ROWS, ROWS.T @ (rates - COUNTS))
    return y


@each_search
@pytest.mark.parametrize(
    ("dtype", "far", "goal"), [("float32", 12.0, 2e-2), ("float64", 60.0, 1e-5)]
)
def test_far_starts_of_exponentials_are_solved(name, dtype, far, goal):
    """A curvature of long ago once made every gradient count as rounding, so success was said at
    any point; and steps in its scale led nowhere. Where the start overflows, that is said."""
    solver, g = DESCENT[name](), base.objective(counts)

    def solved(y):
        state = base.InnerState(y, solver.init(y))
        end, info = solver.step(g, state, jnp.ones((), dtype), base.Ctx())
        return end.params, info["code"], counts(y, None, None)

    starts = jnp.asarray(far * np.random.default_rng(1).normal(size=(40, 2)), dtype)
    found, codes, values = map(np.asarray, jax.jit(jax.vmap(solved))(starts))
    finite = np.isfinite(values)
    assert np.all(codes[~finite] == RESULTS.inner_nonfinite) and np.sum(finite) > 30
    assert np.max(np.linalg.norm(found - counts_solution(), axis=1)[finite]) <= goal
    assert np.all(codes[finite] == RESULTS.success)


@pytest.mark.parametrize(("maxiter", "code"), [(500, "success"), (40, "inner_not_converged")])
def test_lbfgs_from_far_off_in_raw_units(maxiter, code):
    """Values of 1e100 and more at the start: one step leaves a memory that is decades out of date,
    and with it once a success of five evaluations, anywhere."""
    rng = np.random.default_rng(0)
    rows, starts = 100 * rng.normal(size=(30, DIM)), 0.5 * rng.normal(size=(40, DIM))
    seen = rng.poisson(2.0, size=30) + 0.5

    def fn(y, x, batch):
        scores = jnp.asarray(rows) @ y
        return jnp.mean(jnp.exp(scores) - jnp.asarray(seen) * scores)

    exact = np.zeros(DIM)
    for _ in range(60):
        rates = np.exp(rows @ exact)
        exact = exact - np.linalg.solve((rows.T * rates) @ rows, rows.T @ (rates - seen))
    solver, g = inner.lbfgs(maxiter=maxiter), base.objective(fn)

    def solved(y):
        end, info = solver.step(g, base.InnerState(y, solver.init(y)), jnp.ones(()), base.Ctx())
        return end.params, info["code"]

    found, codes = map(np.asarray, jax.jit(jax.vmap(solved))(jnp.asarray(starts)))
    near = np.linalg.norm(found - exact, axis=1) <= 1e-4 * np.linalg.norm(exact)
    assert np.all(codes == RESULTS[code]) and np.all(near == (code == "success"))


@each_search
def test_a_far_start_that_runs_out_of_iterations_is_said(name):
    limited = inner.gradient_descent if name == "gradient_descent" else getattr(inner, name)
    state, info = solve(limited(maxiter=25), counts, jnp.asarray([200.0, 30.0]), 1.0)
    assert np.linalg.norm(np.asarray(state.params) - counts_solution()) > 1.0
    assert int(info["code"]) == RESULTS.inner_not_converged


@each_descent
def test_an_earlier_solve_from_far_off_does_not_loosen_the_tolerance(name):
    x = jnp.arange(1.0, DIM + 1)
    solver = DESCENT[name](tol=1e-6)
    far, _ = solve(solver, quadratic, split_tree(np.full(DIM, 1e8)), x)
    state, info = solve(
        solver, quadratic, None, 2 * x, state=far._replace(params=split_tree(np.zeros(DIM)))
    )
    exact = np.linalg.solve(A, 2 * x)
    assert np.linalg.norm(flat(state.params) - exact) <= 1e-5 * np.linalg.norm(exact)
    assert int(info["code"]) == RESULTS.success


@pytest.mark.turns
@each_search
@pytest.mark.parametrize(("unit", "scale"), [(1.0, 1e-8), (1.0, 1e8), (1e-5, 1.0), (1e5, 1.0)])
def test_units_and_scales_change_nothing(name, unit, scale):
    """``y* = unit · A⁻¹x``: the parameters in another unit, the objective times a number."""

    def fn(y, x, batch):
        return scale * quadratic(jax.tree.map(lambda leaf: leaf / unit, y), x, batch)

    x = jnp.arange(1.0, DIM + 1)
    state, info = solve(DESCENT[name](tol=1e-7), fn, split_tree(np.zeros(DIM)), x)
    exact = unit * np.linalg.solve(A, x)
    assert np.linalg.norm(flat(state.params) - exact) <= 1e-6 * np.linalg.norm(exact)
    assert int(info["code"]) == RESULTS.success


@each_descent
def test_a_solution_at_zero_is_found(name):
    """A distance relative to a solution of norm zero is asked of nobody."""
    state, info = solve(DESCENT[name](), quadratic, split_tree(np.full(DIM, 3.0)), jnp.zeros(DIM))
    assert np.linalg.norm(flat(state.params)) <= 1e-9
    assert int(info["code"]) == RESULTS.success


def test_float32_says_where_rounding_times_condition_leaves_too_much():
    """Rounding alone leaves ``eps κ`` of the solution: 1e-5 of it at a condition of 100 is success,
    and 1 of it is not."""
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(12, 12)))[0]
    target = np.random.default_rng(5).normal(size=12).astype(np.float32)
    for condition, code, error in (
        (1e2, RESULTS.success, 1e-4),
        (1e4, RESULTS.success, 2e-3),
        (1e8, RESULTS.inner_not_converged, 2.0),
    ):
        spread = np.sqrt(np.geomspace(1.0, condition, 12))
        design = jnp.asarray(
            np.random.default_rng(4).normal(size=(30, 12)) * spread @ turn, jnp.float32
        )
        sought = design @ target

        def fn(y, x, batch, design=design, sought=sought):
            return 0.5 * jnp.mean((design @ y - sought) ** 2)

        state, info = solve(inner.lbfgs(maxiter=5000), fn, jnp.zeros(12, jnp.float32), None)
        assert int(info["code"]) == code, condition
        assert np.linalg.norm(state.params - target) <= error * np.linalg.norm(target)


@each_descent
def test_start_at_the_minimum(name):
    """No scale to be relative to: the solve ends at the rounding level, and says success."""
    x = np.arange(1.0, DIM + 1)
    params = split_tree(np.linalg.solve(A, x))
    state, info = solve(DESCENT[name](tol=1e-9), quadratic, params, jnp.asarray(x))
    assert int(info["code"]) == RESULTS.success
    assert int(info["evaluations"]) < 200
    np.testing.assert_allclose(flat(state.params), flat(params), rtol=0, atol=1e-13)


@each_descent
def test_float32_stalls_at_the_rounding_level(name):
    x = jnp.arange(1.0, DIM + 1, dtype=jnp.float32)
    state, info = solve(
        DESCENT[name](tol=1e-14), quadratic, split_tree(np.zeros(DIM), np.float32), x
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert int(info["code"]) == RESULTS.success
    assert int(info["evaluations"]) < 2000
    np.testing.assert_allclose(
        flat(state.params), np.linalg.solve(A, np.arange(1.0, DIM + 1)), rtol=0, atol=2e-5
    )


@each_descent
def test_out_of_iterations_is_said(name):
    solver = {
        "gradient_descent": inner.gradient_descent(maxiter=2),
        "gradient_descent_fixed": inner.gradient_descent(1 / 40, maxiter=2),
        "agd": inner.agd(maxiter=2),
        "lbfgs": inner.lbfgs(maxiter=2),
    }[name]
    _, info = solve(solver, quadratic, split_tree(np.zeros(DIM)), jnp.arange(1.0, DIM + 1))
    assert int(info["code"]) == RESULTS.inner_not_converged
    assert int(info["iterations"]) == 2


@each_descent
def test_nonfinite_objective_ends_at_once(name):
    params = split_tree(np.ones(DIM))
    state, info = solve(
        DESCENT[name](), lambda y, x, batch: quadratic(y, x, batch) * jnp.nan, params, jnp.ones(DIM)
    )
    assert int(info["code"]) == RESULTS.inner_nonfinite
    assert int(info["evaluations"]) == 1
    np.testing.assert_array_equal(flat(state.params), 1.0)


def test_a_wall_of_nan_is_stepped_back_from():
    """``y − log y`` from far off: a full step leaves the domain, a shorter one does not."""

    def fn(y, x, batch):
        return jnp.sum(x * y - jnp.log(y))

    for solver in (inner.gradient_descent(tol=1e-9), inner.agd(tol=1e-9), inner.lbfgs(tol=1e-9)):
        state, info = solve(solver, fn, jnp.full(3, 0.05), jnp.asarray([0.5, 1.0, 2.0]))
        np.testing.assert_allclose(state.params, [2.0, 1.0, 0.5], rtol=0, atol=1e-6)
        assert int(info["code"]) == RESULTS.success


def test_a_fixed_step_that_diverges_is_nonfinite_and_keeps_the_last_finite_point():
    state, info = solve(
        inner.gradient_descent(10.0, maxiter=100_000),
        lambda y, x, batch: jnp.sum(jnp.cosh(y - x)),
        jnp.zeros(2),
        jnp.full(2, 3.0),
    )
    assert int(info["code"]) == RESULTS.inner_nonfinite
    assert bool(jnp.all(jnp.isfinite(state.params)))


@pytest.mark.turns
@each_descent
def test_vmap_is_a_loop(name):
    solver = DESCENT[name](tol=1e-10)
    xs = jnp.asarray(RNG.normal(size=(3, DIM)))
    params = split_tree(np.zeros(DIM))

    def one(x):
        state, info = solver.step(
            base.objective(quadratic), base.InnerState(params, solver.init(params)), x, base.Ctx()
        )
        return state.params, info["iterations"]

    batched, counts = jax.jit(jax.vmap(one))(xs)
    single = jax.jit(one)
    for i, x in enumerate(xs):
        params_i, count = single(x)
        assert abs(int(count) - int(counts[i])) <= 0.1 * int(
            count
        )  # sums in another order tip a line search's choices now and then
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=i: a[i], batched), params_i, rtol=0, atol=1e-9
        )


@each_descent
def test_model_state_moves_with_the_solve(name):
    """The state that comes back is the one that the objective returned at the returned point."""

    def fn(y, x, batch, model):
        return 0.5 * jnp.sum((y - x) ** 2), {"mean": jnp.mean(y)}

    solver = DESCENT[name](tol=1e-9)
    y = jnp.zeros(3)
    model = {"mean": jnp.asarray(7.0)}
    state, _ = solver.step(
        base.objective(fn, stateful=True),
        base.InnerState(y, solver.init(y), model),
        jnp.ones(3),
        base.Ctx(model=model),
    )
    np.testing.assert_allclose(state.model["mean"], jnp.mean(state.params), rtol=0, atol=1e-15)


# ---- the L-BFGS matrix


def test_inverse_hessian_product_is_the_bfgs_matrix():
    """Against the dense BFGS recursion on the stored pairs, oldest first."""
    solver = inner.lbfgs(tol=1e-3, memory=4)
    state, info = solve(solver, quadratic, split_tree(np.zeros(DIM)), jnp.arange(1.0, DIM + 1))
    assert int(info["iterations"]) > 4  # the ring has wrapped
    opt = state.opt
    order = (int(opt.head) + np.arange(4)) % 4
    rows = lambda a: np.concatenate([np.reshape(x, (4, -1)) for x in jax.tree.leaves(a)], axis=1)
    h = float(opt.gamma) * np.diag(flat(opt.scale))
    for i in order:
        s, u = rows(opt.steps)[i], rows(opt.changes)[i]
        left = np.eye(DIM) - np.outer(s, u) / (s @ u)
        h = left @ h @ left.T + np.outer(s, s) / (s @ u)
    for v in np.eye(DIM):
        np.testing.assert_allclose(
            flat(inverse_hessian_product(opt, split_tree(v))),
            h @ v,
            rtol=0,
            atol=1e-10 * np.abs(h).max(),
        )


def test_the_initial_matrix_is_the_diagonal_of_bfgs_updates_of_a_diagonal():
    """Against the update of Gilbert and Lemaréchal, dense, pair after pair."""
    state, h = inner.lbfgs().init(jnp.zeros(DIM)), np.eye(DIM)
    for _ in range(12):  # the ring wraps: the diagonal remembers what it drops
        s = RNG.normal(size=DIM)
        u = A @ s
        state = remember(state, jnp.asarray(s), jnp.asarray(u), jnp.asarray(s @ u), True)
        h = h * (s @ u) / (u @ h @ u)
        b = np.linalg.inv(h)
        b = b + np.outer(u, u) / (s @ u) - np.outer(b @ s, b @ s) / (s @ b @ s)
        h = np.diag(1 / np.diag(b))
        np.testing.assert_allclose(state.gamma * state.scale, np.diag(h), rtol=1e-10)


def test_the_initial_matrix_stays_in_range_however_many_pairs_come():
    """No update makes the product of its entries smaller: warm starts of a long run drove them to
    infinity, in float32 with few unknowns after 5,000 pairs."""
    hessian = jnp.asarray(A[:3, :3], jnp.float32)

    def learn(state, s):
        u = hessian @ s
        return remember(state, s, u, s @ u, jnp.asarray(True)), None

    moves = jnp.asarray(np.random.default_rng(7).normal(size=(20_000, 3)), jnp.float32)
    state, _ = jax.jit(lambda moves: jax.lax.scan(learn, inner.lbfgs().init(moves[0]), moves))(
        moves
    )
    assert 0.5 <= float(jnp.max(state.scale)) < 2 and float(jnp.min(state.scale)) > 1e-3
    back = inverse_hessian_product(state, hessian @ moves[-1])
    np.testing.assert_allclose(back, moves[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_features_in_mixed_units_cost_what_others_do(dtype):
    """Logistic problems whose features differ in scale by 1e6, as units do, from a fifth of the
    iterations that a multiple of the identity needs (500 and more); to the solution by Newton. Of
    ten one or two are not called solved: these stand closer to it than the others, at rounding.
    """
    units, rng = np.geomspace(1e-3, 1e3, 12), np.random.default_rng(5)

    def g(w, lam, batch):
        margin = jnp.logaddexp(0.0, -batch[1] * (batch[0] @ w))
        return jnp.mean(margin) + 0.5 * lam * jnp.sum((w * jnp.asarray(units, w.dtype)) ** 2)

    solver, y = inner.lbfgs(tol=1e-6), jnp.zeros(12, dtype)
    start = base.InnerState(y, solver.init(y))
    lam, solve = jnp.asarray(0.1, dtype), base.objective(g)
    step = jax.jit(lambda batch: solver.step(solve, start, lam, base.Ctx(batch)))
    solved, errors = 0, []
    for _ in range(20):
        x = rng.normal(size=(80, 12)) * units
        t = np.sign(x @ (rng.normal(size=12) / units) + 0.3 * rng.normal(size=80))
        w = np.zeros(12)
        for _ in range(50):
            p = 1 / (1 + np.exp(t * (x @ w)))
            hessian = (x.T * p * (1 - p)) @ x / 80 + 0.1 * np.diag(units**2)
            w = w - np.linalg.solve(hessian, -x.T @ (t * p) / 80 + 0.1 * units**2 * w)
        state, info = step((jnp.asarray(x, dtype), jnp.asarray(t, dtype)))
        assert int(info["code"]) in (0, RESULTS.inner_not_converged), info
        assert int(info["iterations"]) <= 120, info
        errors.append(np.max(np.abs(np.asarray(state.params, np.float64) - w) * units))
        done = int(info["code"]) == 0
        assert done or errors[-1] <= 1e-6
        solved += done
    assert solved >= 16 and np.median(errors) <= 1e-6 and max(errors) <= 1e-2, (solved, errors)


def test_memory_of_full_size_inverts_a_quadratic():
    solver = inner.lbfgs(tol=1e-12, memory=30)  # of all pairs
    state, _ = solve(solver, quadratic, split_tree(np.zeros(DIM)), jnp.arange(1.0, DIM + 1))
    v = RNG.normal(size=DIM)
    np.testing.assert_allclose(
        flat(inverse_hessian_product(state.opt, split_tree(v))),
        np.linalg.solve(A, v),
        rtol=0.05,
        atol=0.01,
    )


# ---- optax


def clipped(lr, clip):
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(lr))


TUNABLE = {
    "sgd": (optax.sgd, {"learning_rate": 0.1}, {"learning_rate": 0.2}),
    "momentum": (
        optax.sgd,
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.1, "momentum": 0.8},
    ),
    "adam": (optax.adam, {"learning_rate": 0.1}, {"learning_rate": 0.01}),
    "adamw": (
        optax.adamw,
        {"learning_rate": 0.1, "weight_decay": 1e-3},
        {"learning_rate": 0.1, "weight_decay": 1e-2},
    ),
    "chain": (clipped, {"lr": 0.1, "clip": 1.0}, {"lr": 0.2, "clip": 2.0}),
}


@pytest.mark.parametrize("name", TUNABLE)
def test_tunable_numbers_are_leaves(name):
    """Other numbers: the same static part, no new trace, and the same steps as optax's own to the
    bit."""
    factory, one, other = TUNABLE[name]
    traces = []

    def fn(y, x, batch):
        traces.append(None)
        return 0.5 * jnp.sum((y - x) ** 2)

    objective = base.objective(fn)

    @jax.jit
    def dynamic_run(dynamic, state):
        return inner_of(dynamic).run(state, jnp.ones(3), base.Feed())

    def inner_of(dynamic):
        return base.Lower(objective, base.join(static, dynamic), lambda feed, i: base.Ctx())

    results = []
    for settings in (one, other):
        solver = inner.optax(inner.tunable(factory, **settings), steps=4)
        static, dynamic = base.split(solver)
        y = jnp.zeros(3)
        results.append(dynamic_run(dynamic, base.InnerState(y, solver.init(y)))[0].params)
        if settings is one:
            first_static, count = static, len(traces)
    assert static == first_static and hash(static) == hash(first_static)
    assert len(traces) == count
    assert not np.allclose(results[0], results[1])
    for settings, found in zip((one, other), results, strict=True):
        opt = factory(**settings)
        y = jnp.zeros(3)
        opt_state = opt.init(y)
        for _ in range(4):
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = opt.update(y - 1, opt_state, y)
            y = y + updates
        np.testing.assert_allclose(found, y, rtol=1e-13)


@pytest.mark.parametrize(
    "opt",
    [optax.polyak_sgd(), optax.lbfgs(), inner.tunable(optax.lbfgs, memory_size=4)],
    ids=["polyak", "lbfgs", "tunable"],
)
def test_optax_transformations_that_ask_for_the_value(opt):
    solver = inner.optax(opt, steps=30)
    y = split_tree(np.zeros(DIM))

    def fn(y, x, batch):  # least value 0, which the Polyak step assumes
        return 0.5 * sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(y))

    lower = base.Lower(base.objective(fn), solver, lambda feed, i: base.Ctx())
    state, info = jax.jit(lambda s: lower.run(s, 0.0, base.Feed()))(
        base.InnerState(y, solver.init(y))
    )
    np.testing.assert_allclose(flat(state.params), 1.0, rtol=0, atol=1e-6)
    assert info["value"].shape == info["grad_norm"].shape == (30,)
    np.testing.assert_allclose(info["value"][0], DIM / 2)
    np.testing.assert_allclose(info["grad_norm"][0], np.sqrt(DIM))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_optax_keeps_dtypes(dtype):
    solver = inner.optax(inner.tunable(optax.adamw, learning_rate=0.1), steps=3)
    y = jnp.zeros(2, dtype)
    lower = base.Lower(
        base.objective(lambda y, x, batch: jnp.sum((y - x) ** 2)),
        solver,
        lambda feed, i: base.Ctx(),
    )
    state, _ = lower.run(base.InnerState(y, solver.init(y)), jnp.ones(2, dtype), base.Feed())
    assert state.params.dtype == dtype
    before, after = (
        jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (solver.init(y), state.opt)
    )
    assert before == after


def test_optax_update_is_the_transformation():
    solver = inner.optax(optax.sgd(0.5), steps=1)
    y = jnp.ones(3)
    updates, _ = solver.update(y, solver.init(y), y)
    np.testing.assert_array_equal(updates, -0.5)


# ---- adapters


def soft_threshold(y, amount, scaling=1.0):
    return jnp.sign(y) * jnp.maximum(jnp.abs(y) - amount * scaling, 0.0)


@pytest.mark.turns
@pytest.mark.parametrize("solver", ["LBFGS", "BFGS", "NonlinearCG", "GradientDescent"])
def test_jaxopt_solvers(solver):
    x = np.arange(1.0, DIM + 1)
    made = inner.jaxopt(getattr(jaxopt, solver), maxiter=2000, tol=1e-7)
    state, info = solve(made, quadratic, split_tree(np.zeros(DIM)), jnp.asarray(x))
    np.testing.assert_allclose(flat(state.params), np.linalg.solve(A, x), rtol=0, atol=1e-6)
    assert int(info["code"]) == RESULTS.success and int(info["iterations"]) > 0
    assert float(info["value"]) == 0.0 and float(info["grad_norm"]) < 1e-6


def test_jaxopt_prox_and_projection():
    """Lasso with an identity design is soft thresholding; the nearest point of the non-negative
    orthant is ``max(x, 0)``."""

    def fn(y, x, batch):
        return 0.5 * jnp.sum((y - x) ** 2)

    x = jnp.asarray([2.0, -0.3, 0.7])
    lasso = inner.jaxopt(
        jaxopt.ProximalGradient, prox=soft_threshold, hyperparams_prox=0.5, tol=1e-8
    )
    state, info = solve(lasso, fn, jnp.zeros(3), x)
    np.testing.assert_allclose(state.params, [1.5, 0.0, 0.2], rtol=0, atol=1e-7)
    assert int(info["code"]) == RESULTS.success and float(info["grad_norm"]) < 1e-7
    box = inner.jaxopt(
        jaxopt.ProjectedGradient, projection=lambda y, _: jnp.maximum(y, 0.0), tol=1e-8
    )
    state, info = solve(box, fn, jnp.ones(3), x)
    np.testing.assert_allclose(state.params, [2.0, 0.0, 0.7], rtol=0, atol=1e-7)


def test_jaxopt_says_how_it_ended():
    short = inner.jaxopt(jaxopt.GradientDescent, maxiter=2, tol=1e-9)
    _, info = solve(short, quadratic, split_tree(np.zeros(DIM)), jnp.arange(1.0, DIM + 1))
    assert int(info["code"]) == RESULTS.inner_not_converged
    state, info = solve(
        short, lambda y, x, b: quadratic(y, x, b) * jnp.nan, split_tree(np.ones(DIM)), jnp.ones(DIM)
    )
    assert int(info["code"]) == RESULTS.inner_nonfinite
    np.testing.assert_array_equal(flat(state.params), 1.0)


def test_optimistix_minimiser():
    x = np.arange(1.0, DIM + 1)
    made = inner.optimistix(optimistix.BFGS(rtol=1e-9, atol=1e-9))
    state, info = solve(made, quadratic, split_tree(np.zeros(DIM)), jnp.asarray(x))
    np.testing.assert_allclose(flat(state.params), np.linalg.solve(A, x), rtol=0, atol=1e-7)
    assert int(info["code"]) == RESULTS.success and int(info["iterations"]) > 0


def _curved(y, x, batch):
    """As many residuals as unknowns, with a root: ``y³/10 + y = x`` in both halves."""
    return {
        "both": jnp.concatenate([y["a"], y["b"]]) ** 3 / 10
        + jnp.concatenate([y["a"], y["b"]])
        - x * batch
    }


BY_RESIDUALS = {
    "jaxopt.GaussNewton": lambda r: inner.jaxopt(
        jaxopt.GaussNewton, residual=r, maxiter=50, tol=1e-9
    ),
    "jaxopt.LevenbergMarquardt": lambda r: inner.jaxopt(
        jaxopt.LevenbergMarquardt, residual=r, maxiter=50, tol=1e-9, gtol=1e-10, xtol=1e-10
    ),
    "jaxopt.Broyden": lambda r: inner.jaxopt(jaxopt.Broyden, residual=r, maxiter=100, tol=1e-9),
    "optimistix.LevenbergMarquardt": lambda r: inner.optimistix(
        optimistix.LevenbergMarquardt(1e-10, 1e-10), residual=r
    ),
    "optimistix.GaussNewton": lambda r: inner.optimistix(
        optimistix.GaussNewton(1e-10, 1e-10), residual=r
    ),
    "optimistix.Newton": lambda r: inner.optimistix(optimistix.Newton(1e-10, 1e-10), residual=r),
    "optimistix.Chord": lambda r: inner.optimistix(optimistix.Chord(1e-10, 1e-10), residual=r),
}
QUICK = ("jaxopt.LevenbergMarquardt", "optimistix.Newton")


@pytest.mark.turns
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BY_RESIDUALS]
)
def test_solvers_of_residuals(name):
    """The root of ``y³/10 + y = 1.1``, which is 1, and its derivative ``1/1.3``; a sum of other
    squares is another problem, and said to be."""
    solver, start = BY_RESIDUALS[name](_curved), {"a": jnp.full(2, 0.7), "b": jnp.full(1, 0.4)}
    squares = lambda y, x, batch: 3 * jnp.sum(_curved(y, x, batch)["both"] ** 2)
    outer = lambda y, x, batch: jnp.sum(y["a"]) + 2 * jnp.sum(y["b"])

    def both(x):
        fn = bx.value_and_hypergrad(
            squares, outer, solver=solver, hypergradient=bx.hypergradient.implicit()
        )
        other = bx.value_and_hypergrad(
            lambda y, x, b: squares(y, x, b) + 0.1 * jnp.sum(y["a"]),
            outer,
            solver=solver,
            hypergradient=bx.hypergradient.implicit(),
        )
        return fn(start, x, jnp.ones(())), other(start, x, jnp.ones(()))

    right, wrong = jax.jit(both)(jnp.full(3, 1.1))
    np.testing.assert_allclose(
        np.concatenate([right.inner_params["a"], right.inner_params["b"]]), 1.0, rtol=1e-7
    )
    np.testing.assert_allclose(right.grad, np.array([1.0, 1.0, 2.0]) / 1.3, rtol=1e-6)
    assert int(right.info["code"]) == RESULTS.success
    assert int(wrong.info["code"]) == RESULTS.not_stationary and np.all(np.isnan(wrong.grad))


def test_a_solver_of_residuals_calls_them_as_the_objective():
    """y = sin(x) by Gauss and Newton's method: cos(x), −sin(x)."""
    residual = lambda y, x: y["a"] - jnp.sin(x)
    square = lambda y, x: jnp.sum(residual(y, x) ** 2)
    solver = inner.jaxopt(jaxopt.GaussNewton, residual=residual, maxiter=20, tol=1e-12)
    fn = lambda x: bx.argmin(square, solver)({"a": jnp.zeros(2)}, x)["a"]
    x = jnp.array([0.3, 0.7])
    value, jacobian, second = jax.jit(lambda x: (fn(x), jax.jacfwd(fn)(x), jax.hessian(fn)(x)))(x)
    np.testing.assert_allclose(value, np.sin(x), rtol=1e-10)
    np.testing.assert_allclose(jacobian, np.diag(np.cos(x)), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(np.einsum("iii->i", second), -np.sin(x), rtol=1e-8)


def test_mirror_descent_ends_at_a_fixed_point_of_its_step():
    """On the simplex, ``y = x / Σx`` minimises ``Σ y log(y / x)``; its derivative by the rule of
    that step."""
    step = jaxopt.MirrorDescent.make_projection_grad(lambda v, _: jax.nn.softmax(v), jnp.log)
    solver = inner.jaxopt(
        jaxopt.MirrorDescent, projection_grad=step, stepsize=0.5, maxiter=200, tol=1e-9
    )
    g = lambda y, x, b: jnp.sum(y * jnp.log(y / x))
    fn = bx.value_and_hypergrad(
        g, lambda y, x, b: y[0], solver=solver, hypergradient=bx.hypergradient.implicit()
    )
    est = jax.jit(fn)(jnp.full(3, 1 / 3), jnp.array([1.0, 2.0, 5.0]))
    np.testing.assert_allclose(est.inner_params, np.array([1.0, 2.0, 5.0]) / 8, rtol=1e-7)
    np.testing.assert_allclose(est.grad, [7 / 64, -1 / 64, -1 / 64], atol=1e-8)


def test_numbers_of_every_solver_are_leaves():
    for make in (
        lambda v: inner.gradient_descent(v),
        lambda v: inner.agd(tol=v),
        lambda v: inner.lbfgs(tol=v),
        lambda v: inner.jaxopt(jaxopt.LBFGS, tol=v),
        lambda v: inner.optimistix(optimistix.BFGS(rtol=v, atol=v)),
    ):
        # both below the tolerance at which products are taken in full precision: that is another
        # program
        assert base.split(make(1e-4))[0] == base.split(make(1e-5))[0]


def test_import_brings_no_heavy_package():
    code = (
        "import sys, bilevax.inner; sys.exit(any(m in sys.modules for m in ('jaxopt', "
        "'optimistix', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: inner.optax(optax.sgd, 3), TypeError, "opt:"),
        (lambda: inner.optax(optax.sgd(0.1), 0), ValueError, "steps:"),
        (lambda: inner.optax(optax.sgd(0.1), 2.5), TypeError, "steps:"),
        (lambda: inner.tunable(optax.sgd(0.1)), TypeError, "factory:"),
        (lambda: inner.tunable(lambda lr: lr, lr=0.1), TypeError, "factory:"),
        (lambda: inner.gradient_descent(-1.0), ValueError, "step_size:"),
        (lambda: inner.gradient_descent("auto"), TypeError, "step_size:"),
        (lambda: inner.gradient_descent(maxiter=0), ValueError, "maxiter:"),
        (lambda: inner.agd(tol=0.0), ValueError, "tol:"),
        (lambda: inner.agd(maxiter=1.5), TypeError, "maxiter:"),
        (lambda: inner.lbfgs(memory=0), ValueError, "memory:"),
        (lambda: inner.lbfgs(tol=float("nan")), ValueError, "tol:"),
        (lambda: inner.jaxopt(object()), TypeError, "solver:"),
        (lambda: inner.jaxopt(jaxopt.LBFGS, fun=quadratic), TypeError, "fun:"),
        (lambda: inner.jaxopt(jaxopt.LBFGS, max_iter=3), TypeError, "max_iter:"),
        (lambda: inner.jaxopt(jaxopt.Bisection), TypeError, "solver:"),
        (
            lambda: inner.jaxopt(jaxopt.BoxOSQP),
            TypeError,
            "solver: got jaxopt.BoxOSQP, which solves quadratic programs.*Try",
        ),
        (
            lambda: inner.jaxopt(jaxopt.OSQP),
            TypeError,
            "solver: got jaxopt.OSQP, which solves quadratic programs.*Try",
        ),
        (
            lambda: inner.jaxopt(jaxopt.LevenbergMarquardt),
            TypeError,
            "residual: got None with jaxopt.LevenbergMarquardt.*Try",
        ),
        (
            lambda: inner.jaxopt(jaxopt.Broyden),
            TypeError,
            "residual: got None with jaxopt.Broyden.*Try",
        ),
        (
            lambda: inner.jaxopt(jaxopt.LBFGS, residual=quadratic),
            TypeError,
            "residual: got .* with jaxopt.LBFGS, which minimises",
        ),
        (
            lambda: inner.jaxopt(jaxopt.BlockCoordinateDescent),
            TypeError,
            "solver: got jaxopt.BlockCoordinateDescent, which takes an objective.*Try",
        ),
        (
            lambda: inner.jaxopt(jaxopt.ScipyMinimize),
            TypeError,
            "solver: got jaxopt.ScipyMinimize, which runs SciPy on the host.*Try",
        ),
        (
            lambda: inner.jaxopt(jaxopt.FixedPointIteration),
            TypeError,
            "solver: got jaxopt.FixedPointIteration, which solves equations.*Try",
        ),
        (
            lambda: inner.optimistix(optimistix.LevenbergMarquardt(1e-6, 1e-6)),
            TypeError,
            "residual: got None with optimistix.LevenbergMarquardt.*expected residual=.*Try",
        ),
        (
            lambda: inner.optimistix(optimistix.Newton(1e-6, 1e-6)),
            TypeError,
            "residual: got None with optimistix.Newton.*Try",
        ),
        (
            lambda: inner.optimistix(optimistix.FixedPointIteration(1e-6, 1e-6)),
            TypeError,
            "solver: got FixedPointIteration.*Try.*inner.fixed_point",
        ),
        (lambda: inner.optimistix(object()), TypeError, "solver:"),
        (
            lambda: inner.optimistix(optimistix.BFGS(rtol=1e-3, atol=1e-3), maxiter=0),
            ValueError,
            "maxiter:",
        ),
    ],
)
def test_bad_settings_are_refused_at_once(call, error, word):
    with pytest.raises(error, match=word):
        call()
