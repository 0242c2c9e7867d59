"""The closed forms themselves: against finite differences, and against dense implicit
differentiation by jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tests import problems
from tests.problems import MULTILEVEL, PROBLEMS, QUADRATICS, flatten, unflatten

forms = pytest.mark.parametrize("form", PROBLEMS.values(), ids=PROBLEMS)
quadratics = pytest.mark.parametrize(
    "form", [PROBLEMS[name] for name in QUADRATICS], ids=QUADRATICS
)
levels = pytest.mark.parametrize("form", MULTILEVEL.values(), ids=MULTILEVEL)


def close(actual, expected, rtol):
    actual, expected = flatten(actual), flatten(expected)
    assert np.linalg.norm(actual - expected) <= rtol * np.linalg.norm(expected)


def moved(form):
    """Outer parameters away from the start: an answer right at one point only is no formula."""
    flat = flatten(form.outer_params)
    return unflatten(
        form.outer_params, flat + 0.2 * np.random.default_rng(99).standard_normal(flat.size)
    )


@pytest.mark.turns
@forms
def test_matches_dense_implicit_differentiation(form):
    to_y, to_x = ravel_pytree(form.inner_params)[1], ravel_pytree(form.outer_params)[1]

    @jax.jit
    def dense(y, x, inner_batch, outer_batch):
        def inner_gradient(y, x):
            return jax.grad(lambda y: form.inner(to_y(y), to_x(x), inner_batch))(y)

        value, (f_y, f_x) = jax.value_and_grad(
            lambda y, x: form.outer(to_y(y), to_x(x), outer_batch), argnums=(0, 1)
        )(y, x)
        H, M = jax.jacfwd(inner_gradient, argnums=(0, 1))(y, x)
        return value, f_x - M.T @ jnp.linalg.solve(H, f_y), H, inner_gradient(y, x)

    batches = (form.inner_batch, form.outer_batch)
    for outer in (form.outer_params, moved(form)):
        value, grad, H, inner_gradient = dense(
            flatten(form.solution(outer)), flatten(outer), *batches
        )
        assert np.linalg.norm(inner_gradient) <= 1e-11
        np.testing.assert_allclose(form.value(outer), value, rtol=1e-12)
        assert jax.tree.structure(form.hypergradient(outer)) == jax.tree.structure(
            form.outer_params
        )
        close(form.hypergradient(outer), grad, 1e-10)
        close(form.inner_hessian(outer), H, 1e-10)

    H = dense(flatten(form.inner_params), flatten(form.outer_params), *batches)[2]
    eigenvalues = np.linalg.eigvalsh(H)
    np.testing.assert_allclose(form.smoothness, (eigenvalues[-1], eigenvalues[0]), rtol=1e-9)
    assert form.smoothness.smallest > 0
    assert form.linear_in_inner == np.allclose(
        H, form.inner_hessian(form.outer_params), rtol=1e-10, atol=0
    )


@forms
def test_matches_finite_differences(form):
    outer, eps = moved(form), 1e-4

    def value(flat):
        return form.value(unflatten(outer, flat))

    flat, grad = flatten(outer), []
    for direction in eps * np.eye(
        flat.size
    ):  # fourth order, so that rounding and truncation both stay below 1e-8
        near, far = (value(flat + k * direction) - value(flat - k * direction) for k in (1, 2))
        grad.append((8 * near - far) / (12 * eps))
    close(form.hypergradient(outer), grad, 1e-6)
    assert np.linalg.norm(grad) > 1e-3  # a stationary point would hide errors


@pytest.mark.turns
@forms
def test_objectives_keep_single_precision_and_average_over_rows(form):
    single = jax.tree.map(
        lambda a: np.asarray(a, np.float32) if np.asarray(a).dtype == np.float64 else a, form
    )._asdict()
    inner, outer = jax.jit(form.inner), jax.jit(form.outer)
    for fn, level in ((inner, "inner_batch"), (outer, "outer_batch")):
        full = fn(form.inner_params, form.outer_params, getattr(form, level))
        narrow = fn(single["inner_params"], single["outer_params"], single[level])
        assert (full.shape, full.dtype, narrow.dtype) == ((), jnp.float64, jnp.float32)
        np.testing.assert_allclose(narrow, full, rtol=1e-4)
        assert all(leaf.shape[0] == problems.ROWS for leaf in jax.tree.leaves(getattr(form, level)))
        if form.sampled:
            halves = [
                jax.tree.map(lambda a, rows=rows: a[rows], getattr(form, level))
                for rows in (slice(0, 8), slice(8, 16))
            ]
            np.testing.assert_allclose(
                sum(fn(form.inner_params, form.outer_params, half) for half in halves) / 2,
                full,
                rtol=1e-12,
            )


@quadratics
def test_quadratics_have_the_promised_spectrum(form):
    low, high = {"quadratic_ill": (1e-4, 1.0)}.get(form.name, (0.5, 2.0))
    np.testing.assert_allclose(form.smoothness, (high, low), rtol=1e-10)
    leaves = [np.ndim(leaf) for leaf in jax.tree.leaves((form.inner_params, form.outer_params))]
    assert leaves == ([0, 2, 1, 0, 2] if form.name == "quadratic_tree" else [1, 1])


@quadratics
@pytest.mark.parametrize("last", [None, 2])
def test_unrolled_closed_form(form, last):
    step, T = 0.4, 6

    @jax.jit
    def run(inner_params, outer_params, inner_batch, outer_batch):
        def descend(y, x, steps):
            def body(y, _):
                return jax.tree.map(
                    lambda a, g: a - step * g, y, jax.grad(form.inner)(y, x, inner_batch)
                ), None

            return jax.lax.scan(body, y, length=steps)[0]

        kept = T if last is None else last
        begin = descend(inner_params, outer_params, T - kept)
        tail = lambda y, x: form.outer(descend(y, x, kept), x, outer_batch)
        y = descend(begin, outer_params, kept)
        return (
            y,
            jax.grad(tail, argnums=(0, 1))(begin, outer_params),
            jax.jacfwd(lambda x: ravel_pytree(descend(begin, x, kept))[0])(outer_params),
        )

    outer = moved(form)
    y, (init_cotangent, grad), jacobian = run(
        form.inner_params, outer, form.inner_batch, form.outer_batch
    )
    closed = problems.unrolled_quadratic(form, step, T, last, outer_params=outer)
    close(closed.inner_params, y, 1e-12)
    close(closed.hypergradient, grad, 1e-12)
    close(closed.init_cotangent, init_cotangent, 1e-12)
    columns = [np.asarray(leaf).reshape(flatten(y).size, -1) for leaf in jax.tree.leaves(jacobian)]
    close(closed.jacobian, np.concatenate(columns, axis=1), 1e-12)


@quadratics
def test_approximate_adjoints(form):
    step, terms = 0.4, 5
    y0, outer = form.inner_params, moved(form)

    @jax.jit
    def run(inner_params, outer_params, inner_batch, outer_batch):
        gradient = lambda y, x: jax.grad(form.inner)(y, x, inner_batch)
        f_y, f_x = jax.grad(form.outer, argnums=(0, 1))(inner_params, outer_params, outer_batch)
        q, term = jax.tree.map(jnp.zeros_like, f_y), f_y
        for _ in range(terms):
            q = jax.tree.map(lambda a, b: a + step * b, q, term)
            curved = jax.jvp(lambda y: gradient(y, outer_params), (inner_params,), (term,))[1]
            term = jax.tree.map(lambda a, b: a - step * b, term, curved)
        pull = jax.vjp(lambda x: gradient(inner_params, x), outer_params)[1]
        return [jax.tree.map(jnp.subtract, f_x, pull(adjoint)[0]) for adjoint in (q, f_y)]

    for inner in (y0, form.solution(outer)):
        neumann, one_step = run(inner, outer, form.inner_batch, form.outer_batch)
        close(problems.neumann_quadratic(form, step, terms, inner, outer), neumann, 1e-12)
        close(problems.one_step_quadratic(form, 1.0, inner, outer), one_step, 1e-12)
    close(problems.one_step_quadratic(form, 1.0, None, outer), one_step, 1e-12)
    close(
        problems.neumann_quadratic(form, step, 1, y0, outer),
        problems.one_step_quadratic(form, step, y0, outer),
        1e-12,
    )
    A = form.coefficients.A
    close(
        problems.adjoint_quadratic(form, lambda w: np.linalg.solve(A, w), None, outer),
        form.hypergradient(outer),
        1e-10,
    )


def test_approximate_answers_refuse_other_problems():
    with pytest.raises(ValueError, match="no quadratic"):
        problems.one_step_quadratic(PROBLEMS["ridge"])


def test_registry_is_large_enough_and_leaves_no_matrix_out():
    assert len(PROBLEMS) >= 10
    assert set(problems.TEXTBOOK) <= set(PROBLEMS)
    assert all(
        form.name == name for registry in (PROBLEMS, MULTILEVEL) for name, form in registry.items()
    )


@levels
def test_multilevel_answers(form):
    """Against Newton steps that jax differentiates: each lower level is replaced by its best
    response in the one above."""
    z_of, y_of, x_of = form.objectives.values()
    assert tuple(form.objectives) == ("z", "y", "x") == tuple(form.params)

    def newton(objective, start, steps):
        # From the solution, n steps are right in all derivatives below the 2^n-th: z's response is
        # differentiated three times, y's once.
        for _ in range(steps):
            start = start - jax.grad(objective)(start) / jax.grad(jax.grad(objective))(start)
        return start

    @jax.jit
    def top(x, start):
        def best_z(y, x):
            return newton(lambda z: z_of({"z": z, "y": y, "x": x}, None), start["z"], 2)

        def best_y(x):
            return newton(lambda y: y_of({"z": best_z(y, x), "y": y, "x": x}, None), start["y"], 1)

        def total(x):
            y = best_y(x)
            solution = {"z": best_z(y, x), "y": y, "x": x}
            return x_of(solution, None), solution

        return jax.value_and_grad(total, has_aux=True)(x)

    for x in (form.params["x"], np.asarray(-0.4)):
        (value, solution), grad = top(x, form.solution(x))
        np.testing.assert_allclose(form.value(x), value, rtol=1e-12)
        np.testing.assert_allclose(form.gradient(x), grad, rtol=1e-10)
        close([form.solution(x)[name] for name in "zyx"], [solution[name] for name in "zyx"], 1e-10)
        eps = 1e-4
        np.testing.assert_allclose(
            (form.value(x + eps) - form.value(x - eps)) / (2 * eps), form.gradient(x), rtol=1e-6
        )
