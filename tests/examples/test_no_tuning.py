"""``algorithm=None`` on three real problems with nothing set by the caller; where it ends is judged
by solves of its own to 1e-10."""

import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    try:
        import no_tuning

        yield no_tuning
    finally:
        sys.path.pop(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["penalty a weight", "weight an example", "total variation"])
def test_the_default_converges_on_real_data(example, name):
    problem = example.problems(np.random.default_rng(1), small=False)[name]
    at = example.judge(problem)
    solution = example.solve(problem)
    assert not solution.result.failed
    (before, first), (after, last) = at(problem[5]), at(solution.outer_params)
    assert last <= 1e-3 * first and after < before
