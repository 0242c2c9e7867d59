"""Several outer objectives: directions against small programs solved by hand, block solves against
dense ones, fronts against their closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import linear
from bilevax.algorithms.multi_objective import combine

RNG = np.random.default_rng(0)


# ---- weights


def test_min_norm_of_two_is_its_closed_form():
    for a, b in (
        [[3.0, 0.0], [0.0, 1.0]],
        [[1.0, 0.0], [2.0, 0.1]],
        [[1.0, 0.5], [-1.0, 0.5]],
        [[1.0, 1.0], [-2.0, -2.0]],
    ):
        a, b = np.array(a), np.array(b)
        share = np.clip(b @ (b - a) / ((a - b) @ (a - b)), 0, 1)
        weights, cosine = combine("min_norm", jnp.stack([a, b]), jnp.ones(2), 0.1)
        np.testing.assert_allclose(weights, [share, 1 - share], atol=1e-8)
        np.testing.assert_allclose(
            cosine, a @ b / np.linalg.norm(a) / np.linalg.norm(b), atol=1e-12
        )


@pytest.mark.slow
def test_directions_ascend_no_objective():
    for many in (2, 4):
        grads = RNG.standard_normal((many, 7)) - 0.3
        for rule in ("min_norm", "conflict_free"):
            weights, _ = combine(rule, {"x": jnp.asarray(grads)}, jnp.ones(many), 0.1)
            direction = np.asarray(weights) @ grads
            assert (grads @ direction).min() >= -1e-7 * np.abs(grads @ direction).max()
            assert np.linalg.norm(direction) > 1e-3
    # where nothing conflicts, the projection is none
    weights, _ = combine("conflict_free", jnp.asarray([[1.0, 0.2], [0.2, 1.0]]), jnp.ones(2), 0.1)
    np.testing.assert_allclose(weights, [0.5, 0.5], atol=1e-8)
    # each of two in conflict, without what goes against the other, and the mean
    a, b = np.array([1.0, 0.0]), np.array([-1.0, 2.0])
    without = lambda u, v: u - (u @ v) / (v @ v) * v
    weights, _ = combine("conflict_free", jnp.stack([a, b]), jnp.ones(2), 0.1)
    np.testing.assert_allclose(
        np.asarray(weights) @ np.stack([a, b]), (without(a, b) + without(b, a)) / 2, atol=1e-8
    )


# ---- several right sides


def system(n, decay, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (basis * (1e-3 + np.exp(-decay * np.arange(n)))) @ basis.T, rng.standard_normal((2, n))


def test_a_block_of_right_sides_is_the_dense_answer():
    A, B = system(30, 0.3)
    B = np.concatenate([B, B[:1] - 2 * B[1:], np.zeros((1, 30))])  # dependent ones, and nothing
    solver = linear.cg(maxiter=100, tol=1e-11)
    X, info = jax.jit(lambda B: solver.block(lambda v: A @ v, B, tol=1e-11))(jnp.asarray(B))
    np.testing.assert_allclose(X, np.linalg.solve(A, B.T).T, rtol=1e-6, atol=1e-6)
    assert int(info.code) == 0 and float(jnp.max(info.residual)) <= 1e-11
    _, cut = solver.block(lambda v: -(A @ v), jnp.asarray(B), tol=1e-6)
    assert int(cut.code) == bx.RESULTS.negative_curvature


# ---- through solve_bilevel

A, C = np.diag([1.0, 1.5, 2.0, 2.5]), np.eye(4) + 0.1 * RNG.standard_normal((4, 4))
TARGETS = RNG.standard_normal((2, 4))


def inner(y, x, batch):
    return y @ (A @ y) / 2 - y @ (C @ x)


def both(y, x, batch):
    values = jnp.sum((y[None] - TARGETS) ** 2, axis=1) / 2
    return jnp.sum(values), values


def solve(rule, method=None, preference=None, steps=1500, **kwargs):
    loop = bx.algorithms.multi_objective(
        bx.inner.lbfgs(tol=1e-10),
        method or bx.hypergradient.implicit(linear.cg(tol=1e-10)),
        optax.sgd(0.1),
        rule=rule,
        preference=preference,
        smoothing=0.05,
    )
    start = jnp.asarray(
        np.linalg.solve(C, A @ (TARGETS.sum(axis=0) + np.array([0.0, 2.0, 0.0, 1.0])))
    )
    return bx.solve_bilevel(
        inner,
        bx.objective(both, has_aux=True),
        jnp.zeros(4),
        start,
        algorithm=loop,
        num_steps=steps,
        keep="last",
        **kwargs,
    )


def test_each_hypergradient_is_its_own():
    """One step of the mean is the mean of both closed forms, by the block and one by one."""
    start = np.linalg.solve(C, A @ (TARGETS.sum(axis=0) + np.array([0.0, 2.0, 0.0, 1.0])))
    J = np.linalg.solve(A, C)
    grads = (J @ start - TARGETS) @ J
    for method in (None, bx.hypergradient.implicit(linear.cholesky())):
        out = solve("mean", method, steps=1)
        np.testing.assert_allclose(
            out.state.algorithm.outer, start - 0.1 * grads.mean(axis=0), rtol=1e-7
        )
        np.testing.assert_allclose(
            out.history["cosine"][0],
            grads[0] @ grads[1] / np.linalg.norm(grads[0]) / np.linalg.norm(grads[1]),
            rtol=1e-7,
        )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["min_norm", "conflict_free", "tchebycheff", "mean"])
def test_the_front_is_a_segment(rule):
    """Both objectives are distances of y, which x moves anywhere: the front is the segment between
    the targets."""
    out = solve(rule, preference=jnp.array([1.0, 2.0]))
    y = np.asarray(out.inner_params)
    along = TARGETS[1] - TARGETS[0]
    share = (y - TARGETS[0]) @ along / (along @ along)
    assert 0 <= share <= 1
    np.testing.assert_allclose(y, TARGETS[0] + share * along, atol=1e-2)
    values = out.history["aux"]
    if rule == "min_norm":
        assert (np.diff(values, axis=0) <= 1e-6).all()  # no step ascends any objective
    if (
        rule == "conflict_free"
    ):  # which may be orthogonal to one, so that a step of some length bends upwards
        assert (values[-1] < values[0]).all()
    if rule == "mean":
        np.testing.assert_allclose(share, 2 / 3, atol=1e-2)
    if rule == "tchebycheff":
        np.testing.assert_allclose(values[-1][0], 2 * values[-1][1], rtol=0.1)


@pytest.mark.slow
def test_it_resumes_to_the_bit_and_traces_once():
    whole, half = solve("min_norm", steps=20), solve("min_norm", steps=10)
    rest = solve("min_norm", steps=10, state=half.state)
    np.testing.assert_array_equal(whole.state.algorithm.outer, rest.state.algorithm.outer)
    np.testing.assert_array_equal(whole.history["aux"][10:], rest.history["aux"])


@pytest.mark.slow
def test_other_methods_and_constraints():
    """A method without a block pulls the cotangents back one by one; a constrained level does by
    its own conditions."""
    exact = solve("mean", steps=3).state.algorithm.outer
    solver = bx.inner.optax(optax.sgd(0.25), 200)
    loop = bx.algorithms.multi_objective(
        solver, bx.hypergradient.unrolled(), optax.sgd(0.1), rule="mean"
    )
    start = jnp.asarray(
        np.linalg.solve(C, A @ (TARGETS.sum(axis=0) + np.array([0.0, 2.0, 0.0, 1.0])))
    )
    out = bx.solve_bilevel(
        inner,
        bx.objective(both, has_aux=True),
        jnp.zeros(4),
        start,
        algorithm=loop,
        num_steps=3,
        keep="last",
    )
    np.testing.assert_allclose(out.state.algorithm.outer, exact, rtol=1e-6)
    loop = bx.algorithms.multi_objective(
        bx.inner.qp(inequality=lambda y, x, b: y - 100.0),
        bx.hypergradient.kkt(),
        optax.sgd(0.1),
        rule="mean",
    )
    out = bx.solve_bilevel(
        inner,
        bx.objective(both, has_aux=True),
        jnp.zeros(4),
        start,
        algorithm=loop,
        num_steps=3,
        keep="last",
    )
    np.testing.assert_allclose(out.state.algorithm.outer, exact, rtol=1e-6)


def test_normalized_gradients_have_no_unit():
    """The sum of the unit gradients, by hand, whatever the units."""
    directions = []
    for unit in (1.0, 1e3):

        def scaled(y, x, batch, unit=unit):
            values = jnp.stack([jnp.sum((x - 1.0) ** 2), unit * jnp.sum((x - TARGETS[0]) ** 2)])
            return jnp.sum(values), values

        loop = bx.algorithms.multi_objective(
            bx.inner.optax(optax.sgd(0.1), 1),
            bx.hypergradient.one_step(),
            optax.sgd(1.0),
            preference=[2.0, 2.0],
            normalized=True,
        )
        outer = bx.objective(scaled, has_aux=True)
        out = bx.solve_bilevel(
            lambda y, x, batch: jnp.sum((y - x) ** 2),
            outer,
            jnp.zeros(4),
            jnp.zeros(4),
            algorithm=loop,
            num_steps=1,
            keep="last",
        )
        directions.append(out.state.algorithm.outer)
    unit = lambda a: a / np.linalg.norm(a)
    by_hand = unit(np.ones(4)) + unit(TARGETS[0])
    np.testing.assert_allclose(directions, [by_hand, by_hand], rtol=1e-6)


def test_refusals():
    with pytest.raises(TypeError, match="^normalized: got"):
        bx.algorithms.multi_objective(
            bx.inner.lbfgs(), bx.hypergradient.implicit(), optax.sgd(0.1), normalized="l2"
        )
    with pytest.raises(ValueError, match="^preference: got"):
        solve("mean", preference=[1.0, -1.0])
    with pytest.raises(ValueError, match="^preference: got 3 numbers for 2"):
        solve("mean", preference=[1.0, 1.0, 1.0], steps=1)
    loop = bx.algorithms.multi_objective(
        bx.inner.lbfgs(), bx.hypergradient.implicit(), optax.sgd(0.1)
    )
    with pytest.raises(TypeError, match="^outer_objective: got"):
        bx.solve_bilevel(
            inner,
            lambda y, x, b: jnp.sum(y),
            jnp.zeros(4),
            jnp.zeros(4),
            algorithm=loop,
            num_steps=1,
        )
