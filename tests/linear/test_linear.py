"""The linear solvers against dense numpy solves: one suite for all of them, then what is particular
to each.

A new solver joins by one line in SOLVERS.
"""

from __future__ import annotations

import builtins
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevax import linear
from bilevax.base import Bound, LinearInfo, LinearSolver, join, split
from bilevax.linear import _common, dense
from bilevax.linear.neumann import largest_eigenvalue
from bilevax.results import RESULTS

try:
    import lineax as lx
except ImportError:
    lx = None
needs_lineax = pytest.mark.skipif(
    lx is None, reason="lineax, an optional dependency, is not installed"
)

N = 24
LIKE = {"w": (8, 2), "b": (8,)}  # leaves in the order of the flat vector below: b, then w


class Entry(NamedTuple):
    """A solver that solves, and the code that an indefinite matrix must give."""

    solver: Bound
    indefinite: RESULTS = RESULTS.success
    general: bool = False  # needs no symmetry
    # matvecs from the solution: the one that finds it so; None where x0 is not used
    warm: int | None = None


def _unequal(v):
    """A preconditioner that no solver here has reason to expect: positive, and far from the
    identity."""
    return jax.tree.map(
        lambda u: (
            u * jnp.linspace(1, 4, u.size, dtype=jnp.float32).reshape(u.shape).astype(u.dtype)
        ),
        v,
    )


SOLVERS = {
    "cg": Entry(linear.cg(200, 1e-12), RESULTS.negative_curvature, warm=1),
    "preconditioned cg": Entry(
        linear.cg(200, 1e-12, preconditioner=linear.nystrom_preconditioner(6, 1.0)),
        RESULTS.negative_curvature,
        warm=7,
    ),
    "minres": Entry(linear.minres(200, 1e-12), warm=1),
    "preconditioned minres": Entry(linear.minres(200, 1e-12, preconditioner=_unequal), warm=1),
    "gmres": Entry(linear.gmres(200, 1e-12, restart=24), general=True, warm=1),
    "bicgstab": Entry(linear.bicgstab(200, 1e-12), general=True, warm=1),
    "cholesky": Entry(linear.cholesky(), RESULTS.negative_curvature),
    "lu": Entry(linear.lu(), general=True),
    "neumann": Entry(linear.neumann(700), RESULTS.adjoint_not_converged),
    "nystrom": Entry(linear.nystrom(N, 1e-13), RESULTS.negative_curvature),
}
if lx is not None:
    SOLVERS["lineax cg"] = Entry(linear.lineax(lx.CG(1e-13, 0.0, max_steps=200)))
    SOLVERS["lineax lu"] = Entry(linear.lineax(lx.LU(), symmetric=False), general=True)
every = pytest.mark.parametrize("name", SOLVERS)
DTYPES = {
    "float64": 1e-10,
    "float32": 1e-4,
    "bfloat16": 0.15,
}  # relative error of x at a condition number of 20


def orthogonal(seed=0, n=N):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def symmetric(values, seed=0):
    q = orthogonal(seed, len(values))
    return q @ np.diag(values) @ q.T


RNG = np.random.default_rng(1)
DEFINITE = symmetric(np.geomspace(1, 20, N))
INDEFINITE = symmetric(np.linspace(1, 10, N) * (-1.0) ** np.arange(N))
SINGULAR = symmetric(np.concatenate([np.zeros(2), np.linspace(1, 10, N - 2)]))
GENERAL = np.diag(np.linspace(2, 10, N)) + 0.2 * RNG.normal(size=(N, N))
RHS = RNG.normal(size=N)


def vector(flat, dtype=jnp.float64):
    flat = np.asarray(flat)
    return {
        "b": jnp.asarray(flat[:8]).astype(dtype),
        "w": jnp.asarray(flat[8:].reshape(8, 2)).astype(dtype),
    }


def flat(v):
    return np.concatenate([np.asarray(u, dtype=np.float64).ravel() for u in jax.tree.leaves(v)])


def product(matrix, v):
    leaves, treedef = jax.tree.flatten(v)
    out = matrix @ jnp.concatenate([u.ravel() for u in leaves])
    return treedef.unflatten(
        [
            part.reshape(u.shape)
            for part, u in zip(jnp.split(out, [leaves[0].size]), leaves, strict=True)
        ]
    )


@partial(jax.jit, static_argnums=0)
def _run(static, dynamic, matrix, b, x0):
    return join(static, dynamic)(lambda v: product(matrix, v), b, x0)


def run(solver, matrix, b, x0=None, dtype=jnp.float64) -> tuple[Any, LinearInfo]:
    """One compiled program a solver and dtype: matrices, vectors and tolerances are arguments."""
    b = vector(b, dtype) if isinstance(b, np.ndarray) else b
    x0 = jax.tree.map(jnp.zeros_like, b) if x0 is None else x0
    return _run(*split(solver), jnp.asarray(matrix).astype(dtype), b, x0)


def code(info) -> RESULTS:
    return RESULTS(int(info.code))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# ---- the common suite


@pytest.mark.turns
@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_dense_solve(name, dtype):
    rounded = np.asarray(jnp.asarray(DEFINITE).astype(dtype), dtype=np.float64)
    b = vector(RHS, dtype)
    x, info = run(SOLVERS[name].solver, DEFINITE, b, dtype=dtype)
    assert all(
        u.dtype == dtype and u.shape == v.shape
        for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(b), strict=True)
    )
    assert info.iterations.dtype == info.code.dtype == jnp.int32
    if (
        name == "neumann" and dtype == "bfloat16"
    ):  # sums of 700 terms in 8 bits: only its own report is held to account
        assert abs(float(info.residual) - relative(rounded @ flat(x), flat(b))) < 0.02
        return
    assert relative(flat(x), np.linalg.solve(rounded, flat(b))) < DTYPES[dtype]


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_reported_residual_is_the_true_one(name, dtype):
    """To a factor where the residual is itself rounding, to eight digits where it is not."""
    rounded = np.asarray(jnp.asarray(DEFINITE).astype(dtype), dtype=np.float64)
    b = vector(RHS, dtype)
    x, info = run(SOLVERS[name].solver, DEFINITE, b, dtype=dtype)
    true = relative(rounded @ flat(x), flat(b))
    rounding = 20 * float(jnp.finfo(dtype).eps)  # eps ‖A‖‖x‖/‖b‖, at most
    assert abs(float(info.residual) - true) < rounding


@every
def test_solves_or_says_why_not_on_an_indefinite_matrix(name):
    x, info = run(SOLVERS[name].solver, INDEFINITE, RHS)
    if name == "neumann":
        assert code(info) in (RESULTS.adjoint_not_converged, RESULTS.adjoint_nonfinite)
        return
    assert code(info) == SOLVERS[name].indefinite
    if code(info) == RESULTS.success:
        assert relative(flat(x), np.linalg.solve(INDEFINITE, RHS)) < 1e-10
    else:
        assert np.isfinite(flat(x)).all()


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].general])
def test_solves_without_symmetry(name):
    x, info = run(SOLVERS[name].solver, GENERAL, RHS)
    assert code(info) == RESULTS.success
    assert relative(flat(x), np.linalg.solve(GENERAL, RHS)) < 1e-10


@every
def test_singular_is_never_a_success(name):
    """No x solves this system, so that the residual is at least the part of b outside the range."""
    x, info = run(SOLVERS[name].solver, SINGULAR, RHS)
    outside = np.linalg.norm(orthogonal()[:, :2].T @ RHS) / np.linalg.norm(RHS)
    rounding = (
        np.finfo(float).eps * 10 * np.linalg.norm(flat(x)) / np.linalg.norm(RHS)
    )  # eps ‖A‖‖x‖/‖b‖: as stored, A is not quite singular
    assert float(info.residual) >= outside * 0.999 - 10 * rounding
    assert rounding < 0.1 or "lineax" in name  # x has not run away
    if name != "neumann":  # a truncation that halves the residual has done what it promises
        assert code(info).failed
    expected = {"cg", "preconditioned cg", "minres", "gmres", "bicgstab", "cholesky", "lu"}
    if name in expected:
        assert code(info) == RESULTS.adjoint_breakdown
        assert float(info.residual) < 2
    assert np.isfinite(flat(x)).all()


@every
def test_zero_matrix_is_a_failure(name):
    _, info = run(SOLVERS[name].solver, np.zeros((N, N)), RHS)
    assert code(info).failed
    assert int(info.iterations) <= 710


@every
def test_zero_right_hand_side(name):
    x, info = run(SOLVERS[name].solver, DEFINITE, np.zeros(N), vector(RHS))
    assert float(info.residual) == 0
    assert code(info) == RESULTS.success
    assert not flat(x).any()


@every
@pytest.mark.parametrize("where", ["b", "matrix"])
def test_nan_is_reported(name, where):
    matrix, b = DEFINITE.copy(), RHS.copy()
    (b if where == "b" else matrix[3])[3] = np.nan
    _, info = run(SOLVERS[name].solver, matrix, b)
    assert code(info) == RESULTS.adjoint_nonfinite


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].warm is not None])
def test_nan_leaves_the_last_good_iterate(name):
    matrix, x0 = DEFINITE.copy(), vector(RHS / 7)
    matrix[3, 3] = np.nan
    x, _ = run(SOLVERS[name].solver, matrix, RHS, x0)
    np.testing.assert_array_equal(flat(x), flat(x0))


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].warm is not None])
def test_warm_start_from_the_solution_costs_the_matvec_that_finds_it_so(name):
    solution = np.linalg.solve(DEFINITE, RHS)
    x, info = run(SOLVERS[name].solver, DEFINITE, RHS, vector(solution))
    assert int(info.iterations) == SOLVERS[name].warm
    np.testing.assert_array_equal(flat(x), solution)
    _, cold = run(SOLVERS[name].solver, DEFINITE, RHS)
    _, near = run(SOLVERS[name].solver, DEFINITE, RHS, vector(solution * (1 + 1e-6)))
    assert SOLVERS[name].warm < int(near.iterations) < int(cold.iterations)


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].warm is not None])
def test_a_start_worse_than_zero_is_dropped(name):
    x, info = run(SOLVERS[name].solver, DEFINITE, RHS, vector(1e8 * RHS))
    _, cold = run(SOLVERS[name].solver, DEFINITE, RHS)
    assert relative(flat(x), np.linalg.solve(DEFINITE, RHS)) < 1e-10
    assert int(info.iterations) == int(cold.iterations) + 1


@pytest.mark.turns
@every
def test_vmap_equals_loop(name):
    static, dynamic = split(SOLVERS[name].solver)
    matrices = jnp.asarray(np.stack([DEFINITE, symmetric(np.geomspace(1, 3, N), 2), np.eye(N)]))
    rhs = jax.tree.map(lambda *u: jnp.stack(u), *[vector(RHS * s) for s in (1.0, -2.0, 0.0)])
    zero = jax.tree.map(jnp.zeros_like, rhs)
    xs, infos = jax.jit(jax.vmap(partial(_run, static, dynamic)))(matrices, rhs, zero)
    for i in range(3):
        x, info = _run(
            static,
            dynamic,
            matrices[i],
            *[jax.tree.map(lambda u, i=i: u[i], v) for v in (rhs, zero)],
        )
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda u, i=i: u[i], xs)), flat(x), rtol=1e-9, atol=1e-12
        )
        assert code(jax.tree.map(lambda u, i=i: u[i], infos)) == code(info) == RESULTS.success
        assert (
            abs(int(infos.iterations[i]) - int(info.iterations)) <= 2
        )  # sums in another order may end a step apart


def mesh(kind):
    return jax.make_mesh((8,), ("d",), axis_types=(kind,))


@pytest.mark.turns
@every
def test_sharded_equals_single(name):
    b, on = vector(RHS), NamedSharding(mesh(AxisType.Auto), P("d"))
    x, info = run(SOLVERS[name].solver, DEFINITE, b)
    sharded, sharded_info = run(SOLVERS[name].solver, DEFINITE, jax.device_put(b, on))
    np.testing.assert_allclose(flat(sharded), flat(x), rtol=1e-9, atol=1e-12)
    assert code(sharded_info) == code(info) == RESULTS.success


@pytest.mark.turns
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "name", [name for name in SOLVERS if name not in ("cholesky", "lu") and "lineax" not in name]
)
def test_vectors_keep_their_sharding(name, kind):
    """Nothing is ravelled and no inner product reshapes: a matvec that keeps the sharding gives an
    x that has it, on explicit axes too."""
    static, dynamic = split(SOLVERS[name].solver)
    on = NamedSharding(mesh(kind), P("d"))
    diagonal = vector(np.geomspace(1, 20, N))
    b, diagonal_on = jax.device_put(vector(RHS), on), jax.device_put(diagonal, on)

    @jax.jit
    def solve(diagonal, b):
        return join(static, dynamic)(
            lambda v: jax.tree.map(jnp.multiply, diagonal, v), b, jax.tree.map(jnp.zeros_like, b)
        )

    with jax.set_mesh(on.mesh):
        x, info = solve(diagonal_on, b)
    assert all(u.sharding.is_equivalent_to(on, u.ndim) for u in jax.tree.leaves(x))
    np.testing.assert_allclose(flat(x), RHS / flat(diagonal), rtol=1e-8)
    assert code(info) == RESULTS.success


@pytest.mark.turns
@every
def test_no_retrace_when_a_number_changes(name):
    count = []

    @partial(jax.jit, static_argnums=0)
    def solve(static, dynamic, b):
        count.append(1)
        return join(static, dynamic)(lambda v: 2.0 * v, b, jnp.zeros_like(b))[1].code

    for scale in (1.0, 1.01):
        static, dynamic = split(SOLVERS[name].solver)
        solve(
            static,
            jax.tree.map(lambda u, s=scale: u * s if isinstance(u, float) else u, dynamic),
            jnp.ones(3),
        )
    assert len(count) == 1
    assert isinstance(SOLVERS[name].solver, LinearSolver)


def test_the_solver_itself_may_be_an_argument_of_jit():
    for solver in (
        linear.gmres(restart=5),
        linear.neumann(50),
        linear.nystrom(3, 1e-9),
        linear.cg(),
    ):
        x, _ = jax.jit(lambda solver, b: solver(lambda v: 2.0 * v, b, jnp.zeros_like(b)))(
            solver, jnp.ones(3)
        )
        np.testing.assert_allclose(x, 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["cg", "minres", "gmres", "bicgstab", "nystrom", "cholesky", "neumann"]
)
def test_leaves_of_two_precisions(name):
    b = {"b": jnp.asarray(RHS[:8], jnp.float32), "w": jnp.asarray(RHS[8:]).reshape(8, 2)}
    diagonal = np.geomspace(1, 20, N)
    scale = jax.tree.map(lambda u, d: d.astype(u.dtype), b, vector(diagonal))
    x, info = jax.jit(
        lambda b: SOLVERS[name].solver(lambda v: jax.tree.map(jnp.multiply, scale, v), b, None)
    )(b)
    assert [u.dtype for u in jax.tree.leaves(x)] == [jnp.float32, jnp.float64]
    assert relative(flat(x), RHS / diagonal) < 1e-5
    assert float(info.residual) < 1e-5


# ---- conjugate gradients


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
def test_cg_takes_as_many_iterations_as_there_are_distinct_eigenvalues(distinct):
    values = np.linspace(1, 4, distinct)[np.arange(N) % distinct]
    x, info = run(linear.cg(200, 1e-9), symmetric(values), RHS)
    assert int(info.iterations) == distinct
    assert code(info) == RESULTS.success
    assert relative(flat(x), np.linalg.solve(symmetric(values), RHS)) < 1e-9


def test_cg_minimises_the_energy_norm_over_the_krylov_space():
    solution = np.linalg.solve(DEFINITE, RHS)
    krylov = np.linalg.qr(
        np.stack([np.linalg.matrix_power(DEFINITE, i) @ RHS for i in range(5)], axis=1)
    )[0]
    best = krylov @ np.linalg.solve(krylov.T @ DEFINITE @ krylov, krylov.T @ RHS)
    x, info = run(linear.cg(5, 1e-12), DEFINITE, RHS)
    np.testing.assert_allclose(flat(x), best, atol=1e-11)
    assert (int(info.iterations), code(info)) == (5, RESULTS.adjoint_not_converged)
    assert np.linalg.norm(best - solution) > 1e-3


def test_cg_multiplies_once_an_iteration_and_traces_the_product_once():
    calls, traces = [], []

    def matvec(v):
        traces.append(1)
        jax.debug.callback(lambda: calls.append(1))
        return product(jnp.asarray(DEFINITE), v)

    for x0, extra in ((None, 0), (vector(RHS / 9), 1)):
        calls.clear()
        traces.clear()
        _, info = jax.jit(lambda b, x0: linear.cg(7, 1e-12)(matvec, b, x0))(vector(RHS), x0)
        jax.effects_barrier()
        assert len(calls) == int(info.iterations) == 7 + extra
        assert (
            len(traces) <= 2
        )  # the loop's body, once for its shapes and once for its weak types at most


def test_cg_stops_at_rounding_in_float32():
    """A tolerance that float32 cannot reach costs a few passes, not all the iterations, and the
    residual is the true one."""
    x, info = run(
        linear.cg(10_000, 1e-12), symmetric(np.geomspace(1, 1000, N)), RHS, dtype=jnp.float32
    )
    rounded = np.asarray(symmetric(np.geomspace(1, 1000, N)), np.float32).astype(np.float64)
    true = relative(rounded @ flat(x), RHS.astype(np.float32).astype(np.float64))
    assert int(info.iterations) < 400
    assert code(info) == RESULTS.adjoint_not_converged
    assert true / 5 < float(info.residual) < true * 5
    assert true < 1e-4


def test_cg_residual_is_measured_where_the_recurrence_drifts():
    """At a condition number of 1e4 the float32 recurrence goes on falling long after the residual
    itself has stopped."""
    matrix = symmetric(np.geomspace(1, 1e4, N))
    x, info = run(linear.cg(2000, 1e-6), matrix, RHS, dtype=jnp.float32)
    rounded = matrix.astype(np.float32).astype(np.float64)
    true = relative(rounded @ flat(x), RHS.astype(np.float32).astype(np.float64))
    assert true / 5 < float(info.residual) < true * 5


def test_cg_negative_curvature_keeps_the_iterate_before_it():
    values = np.linspace(1, 2, N)
    values[0] = -1.0
    x, info = run(linear.cg(200, 1e-10), np.diag(values), np.eye(N)[0] + 1e-3, vector(np.zeros(N)))
    assert code(info) == RESULTS.negative_curvature
    assert np.isfinite(flat(x)).all()
    _, at_once = run(linear.cg(200, 1e-10), -np.eye(N), RHS)
    assert (int(at_once.iterations), float(at_once.residual), code(at_once)) == (
        1,
        1.0,
        RESULTS.negative_curvature,
    )


def test_preconditioned_neumann_series():
    """With the inverse as preconditioner one term is the answer; with half of it, the rest halves
    with each term."""
    inverse = lambda v: product(jnp.asarray(np.linalg.inv(DEFINITE)), v)
    for terms, share, left in ((1, 1.0, 0.0), (5, 0.5, 0.5**5)):
        solver = linear.neumann(terms, step=share, preconditioner=inverse)
        x, info = solver(lambda v: product(jnp.asarray(DEFINITE), v), vector(RHS), None)
        np.testing.assert_allclose(flat(x), (1 - left) * np.linalg.solve(DEFINITE, RHS), rtol=1e-9)
        assert abs(float(info.residual) - left) < 1e-9 and int(info.iterations) == terms


def test_cg_with_a_function_as_preconditioner():
    matrix = np.diag(np.geomspace(1, 1e6, N)) + 0.1 * np.eye(N)
    jacobi = linear.cg(200, 1e-10, preconditioner=_jacobi)
    _, plain = run(linear.cg(200, 1e-10), matrix, RHS)
    x, info = run(jacobi, matrix, RHS)
    assert int(info.iterations) <= 2 < int(plain.iterations)
    assert relative(flat(x), np.linalg.solve(matrix, RHS)) < 1e-10


def _jacobi(r):
    return jax.tree.map(jnp.divide, r, vector(np.geomspace(1, 1e6, N) + 0.1))


# ---- the others


def test_minres_residual_is_least_over_the_krylov_space():
    krylov = np.linalg.qr(
        np.stack([np.linalg.matrix_power(INDEFINITE, i) @ RHS for i in range(6)], axis=1)
    )[0]
    best = krylov @ np.linalg.lstsq(INDEFINITE @ krylov, RHS, rcond=None)[0]
    for solver in (linear.minres(6, 1e-12), linear.gmres(6, 1e-12, restart=6)):
        x, info = run(solver, INDEFINITE, RHS)
        np.testing.assert_allclose(flat(x), best, atol=1e-10)
        assert int(info.iterations) == 7
        assert code(info) == RESULTS.adjoint_not_converged


def test_minres_on_a_consistent_singular_system():
    b = SINGULAR @ RHS
    x, info = run(linear.minres(200, 1e-10), SINGULAR, b)
    assert code(info) == RESULTS.success
    np.testing.assert_allclose(SINGULAR @ flat(x), b, atol=1e-8)


def test_gmres_restarts():
    x, info = run(linear.gmres(400, 1e-11, restart=4), GENERAL, RHS)
    assert code(info) == RESULTS.success
    assert int(info.iterations) > 2 * N / 3
    assert relative(flat(x), np.linalg.solve(GENERAL, RHS)) < 1e-10


def test_bicgstab_breaks_down_on_a_skew_matrix():
    skew = RNG.normal(size=(N, N))
    x, info = run(linear.bicgstab(200, 1e-10), skew - skew.T, RHS)
    assert (code(info), float(info.residual)) == (RESULTS.adjoint_breakdown, 1.0)
    assert not flat(x).any()


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_its_truncated_series(terms):
    step, power, total = 0.05, RHS, np.zeros(N)
    for _ in range(terms):
        total, power = total + step * power, power - step * DEFINITE @ power
    x, info = run(linear.neumann(terms, step), DEFINITE, RHS, vector(RHS))
    np.testing.assert_allclose(flat(x), total, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        info.residual, np.linalg.norm(power) / np.linalg.norm(RHS), rtol=1e-12
    )
    assert int(info.iterations) == terms


def test_neumann_finds_its_step_and_reports_divergence():
    _, info = run(linear.neumann(100), DEFINITE * 1e3, RHS)
    assert code(info) == RESULTS.success
    assert float(info.residual) < 0.01
    _, diverged = run(linear.neumann(100, 0.2), DEFINITE, RHS)
    assert code(diverged) == RESULTS.adjoint_not_converged
    assert float(diverged.residual) > 1e3


@pytest.mark.parametrize("spread", [1.0, 1e-3, 0.5])
def test_power_iteration_is_within_a_factor_of_two(spread):
    values = np.full(N, spread)
    values[-1] = 1.0
    estimate = power_iteration(symmetric(values))
    assert 0.5 < estimate <= 1 + 1e-12


def power_iteration(matrix):
    return float(largest_eigenvalue(lambda v: product(jnp.asarray(matrix), v), vector(RHS)))


def test_identity():
    x, info = run(linear.identity(0.1), DEFINITE, RHS)
    np.testing.assert_allclose(flat(x), 0.1 * RHS, rtol=1e-15)
    np.testing.assert_allclose(info.residual, relative(0.1 * DEFINITE @ RHS, RHS), rtol=1e-12)
    assert code(info) == RESULTS.success
    assert code(run(linear.identity(), DEFINITE, RHS * np.nan)[1]) == RESULTS.adjoint_nonfinite


def test_dense_refuses_what_is_too_large():
    big = jnp.zeros(dense.LIMIT + 1)
    for solver, name in ((linear.cholesky(), "cholesky"), (linear.lu(), "lu")):
        with pytest.raises(
            ValueError,
            match=f"b: got {dense.LIMIT + 1} unknowns; linear.{name} .* at most {dense.LIMIT}",
        ):
            solver(lambda v: v, big, big)


def test_cholesky_notices_a_matrix_without_symmetry():
    _, info = run(linear.cholesky(), GENERAL, RHS)
    assert code(info) == RESULTS.adjoint_not_converged


# ---- Nyström


def test_nystrom_is_its_closed_form():
    """Against the same formula in numpy with a test matrix of its own: at the rank of the matrix
    every test matrix gives the matrix."""
    q = orthogonal(3)[:, :5]
    matrix, rho = q @ np.diag([1.0, 2.0, 3.0, 4.0, 5.0]) @ q.T, 0.1
    for rank in (5, 8):
        x, info = run(linear.nystrom(rank, rho), matrix, RHS)
        np.testing.assert_allclose(
            flat(x), np.linalg.solve(matrix + rho * np.eye(N), RHS), rtol=1e-9, atol=1e-11
        )
        assert int(info.iterations) == rank + 1
        np.testing.assert_allclose(info.residual, relative(matrix @ flat(x), RHS), rtol=1e-8)


def test_nystrom_sketch_is_below_the_matrix_and_orthonormal():
    preconditioner = linear.nystrom_preconditioner(6, 1e-3)
    b = vector(RHS)
    sketch = jax.jit(
        lambda b: preconditioner.refresh(
            lambda v: product(jnp.asarray(DEFINITE), v), preconditioner.init(b)
        )
    )(b)
    u = np.stack(
        [flat(jax.tree.map(lambda r, i=i: r[i], sketch.vectors)) for i in range(6)], axis=1
    )
    np.testing.assert_allclose(u.T @ u, np.eye(6), atol=1e-12)
    difference = np.linalg.eigvalsh(DEFINITE - u @ np.diag(sketch.values) @ u.T)
    assert difference.min() > -1e-11  # a Nyström approximation never exceeds its matrix
    assert code(sketch) == RESULTS.success


def test_nystrom_too_small_a_rho_is_reported():
    _, info = run(linear.nystrom(4, 1e-3), DEFINITE, RHS)
    assert code(info) == RESULTS.adjoint_not_converged
    assert float(info.residual) > 10


def test_nystrom_preconditioner_is_its_formula_and_symmetric():
    rho = 0.3
    preconditioner = linear.nystrom_preconditioner(5, rho)
    q = orthogonal(3)[:, :5]
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    matrix = q @ np.diag(values) @ q.T
    b = vector(RHS)
    sketch = preconditioner.refresh(
        lambda v: product(jnp.asarray(matrix), v), preconditioner.init(b)
    )
    expected = q @ ((1.0 + rho) / (values + rho) * (q.T @ RHS)) + RHS - q @ (q.T @ RHS)
    np.testing.assert_allclose(
        flat(preconditioner.apply(sketch, b)), expected, rtol=1e-9, atol=1e-11
    )
    np.testing.assert_array_equal(flat(preconditioner.apply(preconditioner.init(b), b)), RHS)


def test_nystrom_preconditioner_cuts_iterations_and_its_sketch_is_kept():
    """Above a ridge, as regularised training problems have it, the sketch takes away what is
    large."""
    n, rank = 100, 30
    matrix, b = (
        jnp.asarray(symmetric(1.0 + 1e4 * 0.7 ** np.arange(n))),
        jnp.asarray(np.random.default_rng(4).normal(size=n)),
    )
    preconditioner = linear.nystrom_preconditioner(rank, 1.0)
    plain, solver = linear.cg(300, 1e-9), linear.cg(300, 1e-9, preconditioner=preconditioner)

    @jax.jit
    def solves(matrix, b):
        sketch = preconditioner.refresh(lambda v: matrix @ v, preconditioner.init(b))
        kept = linear.precondition(solver, sketch)
        moved = matrix + 0.05 * jnp.eye(n)  # an outer step later
        again = preconditioner.refresh(lambda v: matrix @ v, sketch)
        same = [each(lambda v: matrix @ v, b) for each in (plain, kept, solver)]
        return *same, kept(lambda v: moved @ v, b), sketch, again

    (_, cold), (x, kept), (_, fresh), (_, later), sketch, again = solves(matrix, b)
    assert int(kept.iterations) <= int(cold.iterations) / 3
    assert int(later.iterations) <= int(cold.iterations) / 3
    assert int(fresh.iterations) == int(kept.iterations) + rank
    assert relative(np.asarray(x), np.linalg.solve(matrix, b)) < 1e-8
    assert not np.array_equal(jax.random.key_data(again.key), jax.random.key_data(sketch.key))


def test_nystrom_key_decides_the_sketch():
    matrix = symmetric(1.0 + 1e2 * 0.5 ** np.arange(N))
    first, same, other = (
        flat(run(linear.nystrom(4, 1.0, key=jax.random.key(k)), matrix, RHS)[0]) for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-6


# ---- lineax, and arguments


@needs_lineax
def test_lineax_equals_ours():
    ours, _ = run(linear.cg(200, 1e-12), DEFINITE, RHS)
    for solver in (
        lx.CG(1e-12, 0.0),
        lx.GMRES(1e-12, 0.0),
        lx.Cholesky(),
        lx.AutoLinearSolver(well_posed=True),
    ):
        theirs, info = run(linear.lineax(solver), DEFINITE, RHS)
        np.testing.assert_allclose(flat(theirs), flat(ours), atol=1e-10)
        assert code(info) == RESULTS.success


def test_lineax_that_is_not_there_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "lineax":
            raise ModuleNotFoundError("No module named 'lineax'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ImportError, match=r"linear.lineax: the lineax package is not installed. Try pip install"
    ):
        linear.lineax(None)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: linear.cg(0), ValueError, "maxiter: got 0; expected an integer of at least 1"),
        (lambda: linear.cg(2.5), TypeError, "maxiter: got 2.5; expected an integer"),
        (lambda: linear.cg(True), TypeError, "maxiter: got True; expected an integer"),
        (
            lambda: linear.cg(tol=0.0),
            ValueError,
            "tol: got 0.0; expected a positive, finite number",
        ),
        (lambda: linear.cg(tol="x"), TypeError, "tol: got 'x'; expected a positive"),
        (lambda: linear.cg(preconditioner=3), TypeError, "preconditioner: got 3"),
        (
            lambda: linear.minres(preconditioner=linear.cg()),
            TypeError,
            "preconditioner: got Linear",
        ),
        (lambda: linear.minres(-1), ValueError, "maxiter: got -1"),
        (lambda: linear.bicgstab(tol=float("nan")), ValueError, "tol: got nan"),
        (lambda: linear.gmres(restart=0), ValueError, "restart: got 0"),
        (lambda: linear.neumann(0), ValueError, "terms: got 0"),
        (lambda: linear.neumann(3, -0.1), ValueError, "step: got -0.1"),
        (lambda: linear.identity(0.0), ValueError, "scale: got 0.0"),
        (lambda: linear.nystrom(0), ValueError, "rank: got 0"),
        (lambda: linear.nystrom(rho=0.0), ValueError, "rho: got 0.0"),
        (lambda: linear.nystrom(key=3), TypeError, "key: got 3; expected a PRNG key"),
        (lambda: linear.nystrom_preconditioner(key="k"), TypeError, "key: got 'k'"),
        pytest.param(
            lambda: linear.lineax("cg"),
            TypeError,
            "solver: got str; expected a lineax solver",
            marks=needs_lineax,
        ),
        (lambda: linear.precondition(linear.cg(), None), TypeError, "solver: got Linear cg"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_relative_residual_of_nothing_is_zero():
    assert float(_common.relative(jnp.zeros(()), jnp.zeros(()))) == 0
