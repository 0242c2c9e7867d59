"""Every algorithm against its plain-numpy transcription, variance-reduced ones to convergence,
pytrees, dtypes, traces, vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.algorithms.penalty import difference
from bilevax.base import Feed
from bilevax.run.chunk import run_chunk
from bilevax.tree import normal_like
from tests.algorithms import numpy_algorithms as rules
from tests.problems import PROBLEMS

STEPS, ROWS, SIZE, N, M = 50, 12, 3, 4, 3
KEY = jax.random.key(7)
ALGORITHMS = bx.algorithms


def _spd(rng, n, low, high):
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (basis * np.linspace(low, high, n)) @ basis.T


def _rows():
    """Rows whose means are well conditioned, and which differ in every coefficient."""
    rng = np.random.default_rng(0)

    def noisy(center, scale):
        return center + scale * rng.standard_normal((ROWS, *np.shape(center)))

    def symmetric(center, scale):
        rows = noisy(center, scale)
        return (rows + rows.transpose(0, 2, 1)) / 2

    inner = {"A": symmetric(_spd(rng, N, 0.5, 1.5), 0.1), "B": symmetric(np.eye(M), 0.1)}
    inner |= {
        "C": noisy(0.5 * rng.standard_normal((M, N)), 0.1),
        "a": noisy(rng.standard_normal(N), 0.3),
    }
    outer = {
        "F": symmetric(_spd(rng, N, 0.5, 1.0), 0.1),
        "H": symmetric(_spd(rng, M, 1.0, 2.0), 0.1),
    }
    outer |= {
        "K": noisy(0.1 * rng.standard_normal((M, N)), 0.1),
        "h": noisy(rng.standard_normal(M), 0.3),
        "k": noisy(rng.standard_normal(N), 0.3),
    }
    return inner, outer


INNER, OUTER = _rows()
SUM = rules.Sum(INNER, OUTER, SIZE)
Y0, X0 = np.linspace(-0.5, 0.5, N), np.linspace(1.0, -1.0, M)


def _form(left, matrices, right):
    return jnp.sum(left * (jnp.mean(matrices, axis=0) @ right))


def inner(y, x, b):
    return (
        _form(y, b["A"], y) / 2
        + _form(x, b["B"], x) / 2
        + _form(x, b["C"], y)
        + jnp.sum(jnp.mean(b["a"], axis=0) * y)
    )


def outer(y, x, b):
    linear = jnp.sum(jnp.mean(b["h"], axis=0) * x) + jnp.sum(jnp.mean(b["k"], axis=0) * y)
    return _form(y, b["F"], y) / 2 + _form(x, b["H"], x) / 2 + _form(x, b["K"], y) + linear


INNER_DATA = bx.data.partitioned(INNER, SIZE)
OUTER_DATA = bx.data.partitioned(OUTER, SIZE)


def run(algorithm, num_steps=STEPS, inner_data=INNER_DATA, outer_data=OUTER_DATA, **kwargs):
    data = dict(inner_data=inner_data, outer_data=outer_data)
    return bx.solve_bilevel(
        inner,
        outer,
        Y0,
        X0,
        **data,
        algorithm=algorithm,
        num_steps=num_steps,
        key=KEY,
        keep="last",
        **kwargs,
    )


def numbers(stream, count):
    """The batch numbers of a stream's first draws: 0 inner, 1 hyper, 2 outer."""
    source = OUTER_DATA if stream == 2 else INNER_DATA
    feed = Feed(source.data, jax.random.fold_in(KEY, stream), jnp.int32(0))
    return np.asarray(jax.jit(jax.vmap(lambda i: source.draw(feed, i).index))(jnp.arange(count)))


def step_keys():
    return [jax.random.fold_in(jax.random.fold_in(KEY, 3), t) for t in range(STEPS)]


def truncations(terms):
    return [int(jax.random.randint(key, (), 0, terms, jnp.int32)) for key in step_keys()]


def refreshes(probability):
    return [
        t == 0 or bool(jax.random.bernoulli(key, probability)) for t, key in enumerate(step_keys())
    ]


def noise(samples):
    out = []
    for key in step_keys():
        keys = jax.random.split(key, samples)
        out.append([np.asarray(normal_like(k, jnp.asarray(X0))) for k in keys])
    return out


def _inner(count=STEPS):
    return numbers(0, count)


def _outer(count=STEPS):
    return numbers(2, count)


def _hyper(count):
    return numbers(1, count)


START = (SUM, Y0, X0, STEPS)
CASES = {
    "soba": lambda: (
        ALGORITHMS.soba(0.3, 0.1),
        rules.soba(*START, _inner(), _outer(), 0.3, 0.1, 0.5),
    ),
    "ma_soba": lambda: (
        ALGORITHMS.ma_soba(0.3, 0.1, momentum=0.2),
        rules.ma_soba(*START, _inner(), _outer(), 0.3, 0.1, 0.2),
    ),
    "saba": lambda: (ALGORITHMS.saba(0.2, 0.1), rules.saba(*START, _inner(), _outer(), 0.2, 0.1)),
    "srba": lambda: (
        ALGORITHMS.srba(0.3, 0.1, period=6),
        rules.sarah(*START, _inner(), _outer(), 0.3, 0.1, [t % 6 == 0 for t in range(STEPS)]),
    ),
    "spaba": lambda: (
        ALGORITHMS.spaba(0.3, 0.1, probability=0.2),
        rules.sarah(*START, _inner(), _outer(), 0.3, 0.1, refreshes(0.2)),
    ),
    "fsla": lambda: (
        ALGORITHMS.fsla(0.3, 0.1, momentum=0.6),
        rules.fsla(*START, _inner(), _hyper(2 * STEPS), _outer(2 * STEPS), 0.3, 0.1, 0.6, 0.5),
    ),
    "amigo": lambda: (
        ALGORITHMS.amigo(0.3, 0.1, steps=3, adjoint_step=0.2, adjoint_steps=4),
        rules.amigo(*START, _inner(3 * STEPS), _hyper(5 * STEPS), _outer(), 0.3, 0.1, 3, 4, 0.2),
    ),
    "stocbio": lambda: (
        ALGORITHMS.stocbio(0.3, 0.1, steps=3, neumann_step=0.4, neumann_steps=5),
        rules.stocbio(*START, _inner(3 * STEPS), _hyper(6 * STEPS), _outer(), 0.3, 0.1, 3, 5, 0.4),
    ),
    "bsa": lambda: (
        ALGORITHMS.bsa(0.3, 0.1, steps=3, neumann_step=0.4, neumann_steps=5),
        rules.bsa(
            *START,
            _inner(3 * STEPS),
            _hyper(5 * STEPS),
            _outer(),
            0.3,
            0.1,
            3,
            5,
            0.4,
            truncations(5),
            0.5,
            0.5,
        ),
    ),
    "ttsa": lambda: (
        ALGORITHMS.ttsa(0.3, 0.1, neumann_steps=5),
        rules.bsa(
            *START,
            _inner(),
            _hyper(5 * STEPS),
            _outer(),
            0.3,
            0.1,
            1,
            5,
            0.3,
            truncations(5),
            0.4,
            0.6,
        ),
    ),
    "mrbo": lambda: (
        ALGORITHMS.mrbo(0.3, 0.1, neumann_steps=5),
        rules.storm(*START, _inner(), _hyper(6 * STEPS), _outer(), 0.3, 0.1, 0.5, 1 / 3, 5, 0.3),
    ),
    "sustain": lambda: (
        ALGORITHMS.sustain(0.3, 0.1, neumann_steps=5),
        rules.storm(
            *START,
            _inner(),
            _hyper(6 * STEPS),
            _outer(),
            0.3,
            0.1,
            0.5,
            1 / 3,
            5,
            0.3,
            truncations(5),
        ),
    ),
    "vrbo": lambda: (
        ALGORITHMS.vrbo(0.2, 0.05, period=4, steps=3, neumann_steps=5),
        rules.vrbo(
            *START,
            _inner(3 * STEPS),
            _hyper(18 * STEPS),
            _outer(3 * STEPS),
            0.2,
            0.05,
            4,
            3,
            5,
            0.2,
        ),
    ),
    "bome": lambda: (
        ALGORITHMS.bome(0.3, 0.1, steps=4),
        rules.bome(*START, _inner(5 * STEPS), _outer(), 0.3, 0.1, 4, 0.5),
    ),
    "pzobo": lambda: (
        ALGORITHMS.pzobo(0.3, 0.1, steps=3, samples=2),
        rules.pzobo(*START, _inner(3 * STEPS), _outer(), 0.3, 0.1, 3, 1e-2, noise(2)),
    ),
}


@pytest.mark.turns
@pytest.mark.parametrize("name", CASES)
def test_iterates_follow_the_papers_rule(name):
    algorithm, (y, x) = CASES[name]()
    solution = run(algorithm)
    assert solution.stats["steps"] == STEPS
    np.testing.assert_allclose(solution.outer_params, x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(solution.inner_params, y, rtol=0, atol=1e-10)


@pytest.mark.turns
@pytest.mark.parametrize(
    "order",
    [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_f2sa_follows_the_papers_rule(order):
    places, coefficients = difference(order)
    settings = dict(penalty=5.0, growth=1 / 7)
    algorithm = ALGORITHMS.f2sa(0.3, 0.1, steps=3, order=order, **settings)
    counts = (_inner(4 * STEPS), _outer(4 * STEPS))
    points, x = rules.f2sa(
        *START, *counts, 0.3, 0.1, 3, 5.0, 1 / 7, 4 / 7, 5 / 7, places, coefficients
    )
    solution = run(algorithm)
    np.testing.assert_allclose(solution.outer_params, x, rtol=0, atol=1e-10)
    y = points[0] if order % 2 else (points[places.index(1)] + points[places.index(-1)]) / 2
    np.testing.assert_allclose(solution.inner_params, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("order", "exact"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_differences_are_exact_on_polynomials_of_their_order(order, exact):
    places, coefficients = difference(order)
    for power in range(exact + 1):
        found = sum(c * float(j) ** power for j, c in zip(places, coefficients, strict=True))
        assert abs(found - (power == 1)) < 1e-12
    missed = sum(c * float(j) ** (exact + 1) for j, c in zip(places, coefficients, strict=True))
    assert abs(missed) > 1e-3


@pytest.mark.parametrize("name", ["s_tfbo", "d_tfbo"])
def test_adaptive_iterates_follow_the_papers_rule(name):
    full = dict(inner_data=bx.data.full(INNER), outer_data=bx.data.full(OUTER))
    algorithm = (
        ALGORITHMS.s_tfbo(0.5)
        if name == "s_tfbo"
        else ALGORITHMS.d_tfbo(0.5, inner_tol=1e-2, adjoint_tol=1e-2)
    )
    y, x = (
        rules.s_tfbo(SUM, Y0, X0, STEPS, 0.5)
        if name == "s_tfbo"
        else rules.d_tfbo(SUM, Y0, X0, STEPS, 0.5, 1e-2)
    )
    solution = run(algorithm, **full)
    np.testing.assert_allclose(solution.outer_params, x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(solution.inner_params, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["saba", "srba", "spaba"])
def test_variance_reduced_ones_converge_exactly_on_batches(name):
    algorithm = {
        "saba": ALGORITHMS.saba(0.3, 0.1),
        "srba": ALGORITHMS.srba(0.3, 0.1, period=8),
        "spaba": ALGORITHMS.spaba(0.3, 0.1, probability=0.2),
    }[name]
    solution = run(algorithm, num_steps=1500)
    assert np.sum(SUM.hypergradient(np.asarray(solution.outer_params)) ** 2) < 1e-10
    noisy = run(
        ALGORITHMS.soba(0.3, 0.1, decay=0.0), num_steps=1500
    )  # so it is the memory that does it
    assert np.sum(SUM.hypergradient(np.asarray(noisy.outer_params)) ** 2) > 1e-6


EVERY = {
    "soba": ALGORITHMS.soba(0.4, 0.02, decay=0.0),
    "ma_soba": ALGORITHMS.ma_soba(0.4, 0.02, momentum=0.5),
    "saba": ALGORITHMS.saba(0.4, 0.02),
    "srba": ALGORITHMS.srba(0.4, 0.02, period=5),
    "spaba": ALGORITHMS.spaba(0.4, 0.02, probability=0.2),
    "fsla": ALGORITHMS.fsla(0.4, 0.02, decay=0.0),
    "amigo": ALGORITHMS.amigo(0.4, 0.02, steps=5),
    "stocbio": ALGORITHMS.stocbio(0.4, 0.02, steps=5, neumann_steps=40),
    "bsa": ALGORITHMS.bsa(0.4, 0.01, steps=5, neumann_steps=20, inner_decay=0.0, outer_decay=0.0),
    "ttsa": ALGORITHMS.ttsa(0.4, 0.01, neumann_steps=20, inner_decay=0.0, outer_decay=0.0),
    "mrbo": ALGORITHMS.mrbo(0.4, 0.02, neumann_steps=40, decay=0.0),
    "sustain": ALGORITHMS.sustain(0.4, 0.01, neumann_steps=20, decay=0.0),
    "vrbo": ALGORITHMS.vrbo(0.4, 0.02, period=5, steps=5, neumann_steps=40),
    "f2sa": ALGORITHMS.f2sa(
        0.3, 0.02, penalty=200.0, growth=0.0, inner_decay=0.0, outer_decay=0.0, steps=40
    ),
    "f2sa_2": ALGORITHMS.f2sa(
        0.3, 0.02, penalty=20.0, growth=0.0, inner_decay=0.0, outer_decay=0.0, steps=40, order=2
    ),
    "bome": ALGORITHMS.bome(0.4, 0.01, steps=20),
    "pzobo": ALGORITHMS.pzobo(0.4, 0.005, steps=5, samples=4),
    "s_tfbo": ALGORITHMS.s_tfbo(),
    "d_tfbo": ALGORITHMS.d_tfbo(),
}
# Relative hypergradient after 600 full-batch float32 steps; what random truncation, zeroth order
# and penalties leave is their own error.
LEFT = {
    "bsa": 0.2,
    "ttsa": 0.2,
    "sustain": 0.2,
    "pzobo": 0.3,
    "bome": 0.2,
    "f2sa": 0.02,
    "f2sa_2": 0.02,
    "s_tfbo": 0.1,
}


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("soba", "saba", "f2sa") else pytest.param(n, marks=pytest.mark.slow)
        for n in EVERY
    ],
)
def test_pytrees_in_float32_converge_with_one_trace(name):
    form = PROBLEMS["quadratic_tree"]
    y, x, inner_batch, outer_batch = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32),
        (form.inner_params, form.outer_params, form.inner_batch, form.outer_batch),
    )
    before = run_chunk._cache_size()
    solve = lambda n: bx.solve_bilevel(
        form.inner,
        form.outer,
        y,
        x,
        inner_data=inner_batch,
        outer_data=outer_batch,
        algorithm=EVERY[name],
        num_steps=n,
        key=KEY,
        keep="last",
    )
    solve(3)
    solution = solve(600)
    assert run_chunk._cache_size() == before + 1
    assert jax.tree.structure(solution.outer_params) == jax.tree.structure(x)
    assert all(
        leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves((solution.inner_params, solution.outer_params))
    )

    def size(x):
        grad = form.hypergradient(jax.tree.map(np.asarray, x))
        return np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grad)))

    assert size(solution.outer_params) < LEFT.get(name, 1e-3) * size(x)


def test_another_step_size_costs_no_trace():
    run(ALGORITHMS.soba(0.3, 0.1), num_steps=3)
    before = run_chunk._cache_size()
    run(ALGORITHMS.soba(0.2, 0.05, decay=0.3), num_steps=3)
    run(ALGORITHMS.soba(jnp.float32(0.2), 0.05, adjoint_step=0.1), num_steps=3)
    assert run_chunk._cache_size() == before


def test_sgd_of_optax_is_the_number():
    plain = run(ALGORITHMS.soba(0.3, 0.1, decay=0.0))
    wrapped = run(ALGORITHMS.soba(optax.sgd(0.3), bx.tunable(optax.sgd, learning_rate=0.1)))
    np.testing.assert_allclose(wrapped.outer_params, plain.outer_params, rtol=0, atol=1e-12)


def test_vmap_over_step_sizes_equals_the_loop():
    def solve(step):
        return run(ALGORITHMS.saba(step, 0.1), num_steps=20).outer_params

    sizes = jnp.asarray([0.1, 0.2, 0.3])
    together = jax.jit(jax.vmap(solve))(sizes)
    for size, one in zip(sizes, together, strict=True):
        np.testing.assert_allclose(one, solve(float(size)), rtol=0, atol=1e-12)


def test_partitions_visit_every_batch_once_an_epoch():
    seen = numbers(0, 5 * 4).reshape(5, 4)
    assert all(sorted(epoch.tolist()) == [0, 1, 2, 3] for epoch in seen)
    assert len({tuple(epoch.tolist()) for epoch in seen}) > 1
    ctx = INNER_DATA.draw(Feed(INNER_DATA.data, KEY, jnp.int32(0)), 2)
    np.testing.assert_array_equal(
        ctx.batch["a"], INNER["a"][int(ctx.index) * SIZE : (int(ctx.index) + 1) * SIZE]
    )


@pytest.mark.parametrize("name", ["saba", "srba", "spaba", "vrbo"])
def test_finite_sum_methods_refuse_streams_without_numbers(name):
    with pytest.raises(ValueError, match=r"data\.partitioned"):
        run(EVERY[name], num_steps=2, inner_data=bx.data.minibatches(INNER, SIZE))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ALGORITHMS.soba(0.0, 0.1), "inner_step"),
        (lambda: ALGORITHMS.soba(0.1, optax.sgd), "outer_step"),
        (lambda: ALGORITHMS.ma_soba(0.1, 0.1, momentum=1.5), "momentum"),
        (lambda: ALGORITHMS.srba(0.1, 0.1, period=0), "period"),
        (lambda: ALGORITHMS.spaba(0.1, 0.1, probability=0), "probability"),
        (lambda: ALGORITHMS.stocbio(optax.sgd(0.1), 0.1), "neumann_step"),
        (lambda: ALGORITHMS.amigo(0.1, 0.1, steps=0), "steps"),
        (lambda: ALGORITHMS.f2sa(0.1, 0.1, order=0), "order"),
        (lambda: ALGORITHMS.pzobo(0.1, 0.1, samples=0), "samples"),
        (lambda: ALGORITHMS.s_tfbo(-1.0), "initial"),
        (lambda: ALGORITHMS.bome("a", 0.1), "inner_step"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def test_a_batch_with_nan_is_blamed():
    spoiled = {k: v.copy() for k, v in INNER.items()}
    spoiled["a"][4] = np.nan
    solution = run(
        ALGORITHMS.soba(0.3, 0.1), inner_data=bx.data.partitioned(spoiled, SIZE), throw=False
    )
    assert solution.result is bx.RESULTS.nonfinite_batch
    assert np.all(np.isfinite(solution.outer_params))


def test_starting_points_that_depend_on_the_outer_parameters_are_refused():
    with pytest.raises(ValueError, match="inner_init"):
        run(ALGORITHMS.soba(0.3, 0.1), num_steps=2, inner_init=lambda x: jnp.zeros(N))


def test_projection_is_applied_after_each_step():
    solution = run(ALGORITHMS.soba(0.3, 0.1), project=lambda x: jnp.maximum(x, 0.25))
    assert float(jnp.min(solution.outer_params)) == 0.25


# ---- adaptive accuracy


def _norm(grad):
    return np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(grad)))


SOME = ("quadratic_tree",)  # the others take their compile time, a few seconds each


@pytest.mark.turns
@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in PROBLEMS]
)
def test_the_default_converges_on_every_problem_without_an_argument(name):
    form = PROBLEMS[name]
    data = dict(inner_data=form.inner_batch, outer_data=form.outer_batch)
    solution = bx.solve_bilevel(
        form.inner, form.outer, form.inner_params, form.outer_params, **data
    )
    best = jax.tree.map(np.asarray, solution.outer_params)
    assert _norm(form.hypergradient(best)) <= 1e-3 * _norm(form.hypergradient(form.outer_params))


def _least_squares(seed):
    rng = np.random.default_rng(seed)
    A1, A2, A3 = (rng.random((1000, 10)) for _ in range(3))
    b1 = A1 @ rng.random(10) + 0.01 * rng.standard_normal(1000)
    b2 = A2 @ rng.random(10) + A3 @ rng.random(10) + 0.01 * rng.standard_normal(1000)
    return A1, A2, A3, b1, b2


def _lower_residual(y, x, b):
    r = b["A2"] @ y + b["A3"] @ x - b["b2"]
    return jnp.sum(r * r) / 2


def _upper_residual(y, x, b):
    r = b["A1"] @ y - b["b1"]
    return jnp.sum(r * r) / 2


@pytest.mark.turns
@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_maid_on_random_least_squares(known):
    """The gap is relative to the one at the start; steps are inner gradients and products with
    second derivatives together."""
    A1, A2, A3, b1, b2 = _least_squares(0)
    inverse = np.linalg.pinv(A2)
    jacobian = -inverse @ A3
    residual = lambda x: A1 @ (inverse @ (b2 - A3 @ x)) - b1
    value = lambda x: np.sum(residual(x) ** 2) / 2
    best = np.linalg.lstsq(A1 @ jacobian, b1 - A1 @ inverse @ b2, rcond=None)[0]
    moduli = np.linalg.eigvalsh(A2.T @ A2)
    constants = bx.algorithms.Constants(
        strong_convexity=moduli[0],
        cross=np.linalg.norm(A3.T @ A2, 2),
        outer_smoothness=np.linalg.eigvalsh(A1.T @ A1)[-1],
        outer_cross=0.0,
        hessian_lipschitz=0.0,
        cross_lipschitz=0.0,
    )
    data = dict(
        inner_data=bx.data.full({"A2": A2, "A3": A3, "b2": b2}),
        outer_data=bx.data.full({"A1": A1, "b1": b1}),
    )
    iterate = lambda y, x, _: {f"x{i}": x[i] for i in range(10)}
    algorithm = bx.algorithms.maid(certificate=True, constants=constants if known else None)
    solution = bx.solve_bilevel(
        _lower_residual,
        _upper_residual,
        np.zeros(10),
        np.ones(10),
        **data,
        algorithm=algorithm,
        num_steps=60,
        metrics=iterate,
        keep="last",
    )
    history = solution.history
    xs = np.stack([history[f"x{i}"] for i in range(10)], axis=1)
    gap = np.array([(value(x) - value(best)) / (value(np.ones(10)) - value(best)) for x in xs])
    spent = np.cumsum(history["lower_steps"] + history["adjoint_steps"])
    reached = np.argmax(gap <= 1.5e-2)
    assert gap[reached] <= 1.5e-2
    assert spent[reached] <= 53_000
    assert np.all(gap[-10:] <= 1e-4)
    norms = np.array([np.linalg.norm(jacobian.T @ A1.T @ residual(x)) for x in xs])
    assert np.all(np.abs(norms - history["grad_norm"]) <= history["error_bound"])
    assert np.all(history["error_bound"] <= 0.5 * history["grad_norm"])
    np.testing.assert_allclose(history["strong_convexity"][-1], moduli[0], rtol=1e-6)


@pytest.mark.turns
def test_the_certificate_bounds_the_error_of_each_hypergradient():
    """At the point that a step reports, with the constants known: the error itself, not only that
    of the norm."""
    form = PROBLEMS["quadratic"]
    c = form.coefficients
    constants = bx.algorithms.Constants(
        form.smoothness.smallest,
        np.linalg.norm(c.C, 2),
        np.linalg.norm(c.F, 2),
        np.linalg.norm(c.K, 2),
        0.0,
        0.0,
    )
    algorithm = bx.algorithms.maid(constants=constants, memory=0, epsilon=0.5, delta=0.5)
    data = dict(inner_data=form.inner_batch, outer_data=form.outer_batch)
    state, errors = None, []
    for _ in range(12):
        out = bx.solve_bilevel(
            form.inner,
            form.outer,
            form.inner_params,
            form.outer_params,
            **data,
            algorithm=algorithm,
            num_steps=1,
            state=state,
        )
        state = out.state
        z, here = np.asarray(state.algorithm.z), np.asarray(state.algorithm.outer)
        errors.append((np.linalg.norm(z - form.hypergradient(here)), out.history["error_bound"][0]))
    assert all(error <= bound for error, bound in errors), errors
    assert max(error for error, _ in errors) > 1e-6  # inexact indeed


@pytest.mark.parametrize(
    "solver", ["agd", pytest.param("gradient_descent", marks=pytest.mark.slow)]
)
def test_maid_and_hoag_take_any_solver_to_a_tolerance(solver):
    form = PROBLEMS["quadratic"]
    data = dict(inner_data=form.inner_batch, outer_data=form.outer_batch)
    inner_solver = getattr(bx.inner, solver)()
    start = _norm(form.hypergradient(form.outer_params))
    for algorithm in (bx.algorithms.maid(inner_solver), bx.algorithms.hoag(inner_solver)):
        solution = bx.solve_bilevel(
            form.inner,
            form.outer,
            form.inner_params,
            form.outer_params,
            **data,
            algorithm=algorithm,
            num_steps=80,
            keep="last",
        )
        assert _norm(form.hypergradient(np.asarray(solution.outer_params))) < 1e-3 * start


@pytest.mark.turns
def test_maid_in_float32_on_a_pytree():
    form = PROBLEMS["quadratic_tree"]
    y, x, inner_batch, outer_batch = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32),
        (form.inner_params, form.outer_params, form.inner_batch, form.outer_batch),
    )
    solution = bx.solve_bilevel(
        form.inner, form.outer, y, x, inner_data=inner_batch, outer_data=outer_batch, num_steps=40
    )
    found = jax.tree.map(np.asarray, solution.outer_params)
    assert _norm(form.hypergradient(found)) < 1e-3 * _norm(form.hypergradient(form.outer_params))


@pytest.mark.parametrize("make", [lambda: bx.algorithms.maid(), lambda: bx.algorithms.hoag()])
def test_adaptive_accuracy_refuses_sampled_data(make):
    with pytest.raises(ValueError, match="same data at every step"):
        run(make(), num_steps=2)


def test_maid_refuses_a_solver_without_tolerance():
    with pytest.raises(TypeError, match="inner_solver"):
        bx.algorithms.maid(bx.inner.optax(optax.sgd(0.1), 5))
