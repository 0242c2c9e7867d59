"""MAID and HOAG against their plain-numpy transcriptions, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.algorithms import numpy_adaptive as rules
from tests.algorithms.test_algorithms import INNER, OUTER, SUM, X0, Y0, inner, outer

DATA = dict(inner_data=bx.data.full(INNER), outer_data=bx.data.full(OUTER))
SIZE = 0.5  # of the descent inside


METHOD = bx.algorithms.maid()


def _run(algorithm, steps):
    return bx.solve_bilevel(inner, outer, Y0, X0, **DATA, algorithm=algorithm, num_steps=steps, keep="last")


@pytest.mark.parametrize(
    ("step", "runs"), [(0.002, (1, 7, 50)), (2.0, (1, 7, 20))]
)  # one that grows; one that has to shrink, and is at the answer soon
def test_maid_follows_its_rule(step, runs):
    A, C, F, K = (SUM.mean(*place, None) for place in ((0, "A"), (0, "C"), (1, "F"), (1, "K")))
    constants = (np.linalg.eigvalsh(A)[0], np.linalg.norm(C, 2), np.linalg.norm(F, 2), np.linalg.norm(K, 2))
    settings = dict(epsilon=0.1, delta=0.1, max_error=0.5, decrease=1e-4, shrink=0.5, tighten=0.5, loosen=1.05)
    known = bx.algorithms.Constants(*constants, 0.0, 0.0)
    algorithm = bx.algorithms.maid(bx.inner.gradient_descent(SIZE), memory=0, constants=known, step_size=step, **settings)
    for steps in runs:
        y, x = rules.maid(SUM, Y0, X0, steps, SIZE, constants, step=step, **settings)
        solution = _run(algorithm, steps)
        np.testing.assert_allclose(solution.outer_params, x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(solution.state.algorithm.inner.params, y, rtol=0, atol=1e-10)


def test_hoag_follows_its_rule():
    algorithm = bx.algorithms.hoag(bx.inner.gradient_descent(SIZE), epsilon=0.1, rate=0.9)
    for steps in (1, 7, 50):
        y, x = rules.hoag(SUM, Y0, X0, steps, SIZE, 0.1, 0.9)
        solution = _run(algorithm, steps)
        np.testing.assert_allclose(solution.outer_params, x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(solution.inner_params, y, rtol=0, atol=1e-10)


def test_an_adjoint_solve_that_rounding_ends_ends_the_run_only_where_it_is_far_off():
    """Penalties of useless features grow without bound, and in float32 the adjoint solve breaks down on the way: near the solution it is used."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 30)).astype(np.float32)
    y = (x[:, :5].sum(1) + 0.5 * rng.standard_normal(100)).astype(np.float32)

    def fit(w, penalty, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    def ridge(w, penalty, batch):
        return fit(w, penalty, batch) + jnp.sum(jnp.exp(penalty) * w**2)

    def run(top):
        data = dict(inner_data=(x[:50], y[:50]), outer_data=(x[50:], y[50:]))
        start = jnp.zeros(30, jnp.float32), jnp.full(30, -3.0, jnp.float32).at[5:].set(top)
        return bx.solve_bilevel(ridge, fit, *start, **data, algorithm=METHOD, num_steps=60, throw=False)

    solution = run(14.0)  # a condition number of 1e6: some solves break down, all of them close
    assert not solution.result.failed and len(solution.history["value"]) == 60
    assert np.all(np.isfinite(solution.history["error_bound"])) and solution.history["value"].min() < 0.42
    assert run(16.0).result == bx.RESULTS.adjoint_breakdown  # 1e7: beyond float32
