"""MAID and HOAG against their plain-numpy transcriptions, step by step."""

import numpy as np
import pytest

import bilevax as bx
from tests import numpy_adaptive as rules
from tests.test_algorithms import INNER, OUTER, SUM, X0, Y0, inner, outer

DATA = dict(inner_data=bx.data.full(INNER), outer_data=bx.data.full(OUTER))
SIZE = 0.5  # of the descent inside


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
