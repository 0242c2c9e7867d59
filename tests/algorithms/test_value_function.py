"""Lower levels with several solutions: standard problems of the literature with their known optima,
each also found by a grid."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx


class Standard(NamedTuple):
    """``f(y, x)`` above, ``g(y, x)`` below, x and y on intervals, the optimum of the best lower
    solution."""

    f: object
    g: object
    x: tuple
    y: tuple
    best: float


def sixth(y, x):
    return (
        y**4
        + 2 / 15 * (1 - x) * y**3
        + (-0.02 * x**2 + 0.16 * x - 0.4) * y**2
        + (0.004 * x**3 - 0.036 * x**2 + 0.08 * x) * y
    )


# Mitsos and Barton, "A test set for bilevel programs" (2007), by number of example. Those of its
# examples are left out whose optimum stands beside a jump of the best response (3.20, and the
# problem of Mirrlees) or in one point (3.11, 3.13).
PROBLEMS = {
    "3.10": Standard(
        lambda y, x: y,
        lambda y, x: x * (16 * y**4 + 2 * y**3 - 8 * y**2 - 1.5 * y + 0.5),
        (0.1, 1),
        (-1, 1),
        0.5,
    ),
    "3.15": Standard(
        lambda y, x: x + y, lambda y, x: x * y**2 / 2 - y**3 / 3, (-1, 1), (-1, 1), 0.0
    ),
    "3.16": Standard(
        lambda y, x: 2 * x + y, lambda y, x: -x * y**2 / 2 - y**4 / 4, (-1, 1), (-1, 1), -2.0
    ),
    "3.17": Standard(
        lambda y, x: (x + 0.5) ** 2 + y**2 / 2,
        lambda y, x: x * y**2 / 2 + y**4 / 4,
        (-1, 1),
        (-1, 1),
        0.1875,
    ),
    "3.19": Standard(
        lambda y, x: x * y - y + y**2 / 2,
        lambda y, x: -x * y**2 + y**4 / 2,
        (-1, 1),
        (-1, 1),
        -0.2581,
    ),
    "3.21": Standard(lambda y, x: (x + 0.6) ** 2 + y**2, sixth, (-1, 1), (-1, 1), 0.2095),
}


def solve(problem, view="optimistic", starts=6, steps=250, optimizer=optax.adam):
    """The best end of several starts in x, all in one call; ends that do not solve the lower level
    do not count."""
    (low, high), (left, right) = problem.x, problem.y
    box = bx.inner.sqp(inequality=lambda y, x, batch: jnp.stack([left - y, y - right]), maxiter=30)
    loop = bx.algorithms.value_function(
        box,
        optimizer(optax.cosine_decay_schedule(0.1, steps)),
        view=view,
        penalty=30.0,
        candidates=7,
        spread=float(right - left) / 2,
    )

    def run(x):
        out = bx.solve_bilevel(
            lambda y, x, b: problem.g(y, x), lambda y, x, b: problem.f(y, x),
            jnp.asarray((left + right) / 2.0), x, algorithm=loop, num_steps=steps,
            keep="last", project=lambda x: jnp.clip(x, low, high), throw=False,
        )  # fmt: skip
        return out.history["value"][-1], out.history["gap"][-1], out.outer_params, out.inner_params

    values, gaps, x, y = jax.jit(jax.vmap(run))(jnp.linspace(low + 0.05, high - 0.05, starts))
    ends = np.where(np.abs(gaps) < 1e-3, values, np.inf)
    i = int(np.argmin(ends))
    return float(ends[i]), float(x[i]), float(y[i])


def grid(problem, worst=False):
    """By looking: x and y in small steps, all y within rounding of the least g."""
    xs, ys = np.linspace(*problem.x, 801), np.linspace(*problem.y, 4001)
    g = np.asarray(problem.g(ys[None, :], xs[:, None])) + np.zeros((801, 1))
    f = np.asarray(problem.f(ys[None, :], xs[:, None])) + np.zeros((801, 4001))
    among = g <= g.min(axis=1, keepdims=True) + 1e-6
    return (
        np.where(among, f, -np.inf).max(axis=1) if worst else np.where(among, f, np.inf).min(axis=1)
    ).min()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_standard_problems(name):
    problem = PROBLEMS[name]
    assert abs(grid(problem) - problem.best) < 1e-2  # the optimum is the one that is known
    value, _, _ = solve(problem)
    assert abs(value - problem.best) < 1e-3


@pytest.mark.slow
def test_the_best_and_the_worst_of_several_solutions():
    """y is 1 or −1 whatever x is: the best is met exactly, the worst from the middle. And 3.19,
    whose worst case is least where y is 0."""
    two = Standard(
        lambda y, x: (y - x) ** 2, lambda y, x: (y**2 - 1) ** 2, (-1.5, 1.5), (-2, 2), 0.0
    )
    assert abs(solve(two)[0]) < 1e-3
    value, x, _ = solve(two, "pessimistic")
    assert abs(value - 1.0) < 1e-3 and abs(x) < 1e-3
    assert abs(grid(two, worst=True) - 1.0) < 1e-2
    worst, _, _ = solve(PROBLEMS["3.19"], "pessimistic")
    assert abs(worst) < 1e-3 and abs(grid(PROBLEMS["3.19"], worst=True)) < 1e-2


@pytest.mark.slow
def test_a_constraint_that_depends_on_x():
    """y ≤ x below, and y as large as it may be: the multiplier is part of the derivative. y = x, so
    f = (x − 1)² + x."""
    solver = bx.inner.qp(inequality=lambda y, x, b: y - x)
    loop = bx.algorithms.value_function(solver, optax.sgd(0.1), penalty=10.0)
    out = bx.solve_bilevel(
        lambda y, x, b: (y - 3.0) ** 2,
        lambda y, x, b: (x - 1.0) ** 2 + y,
        jnp.asarray(0.0),
        jnp.asarray(2.0),
        algorithm=loop,
        num_steps=100,
        keep="last",
    )
    np.testing.assert_allclose(out.outer_params, 0.5, atol=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match="^view: got 'best'"):
        bx.algorithms.value_function(bx.inner.lbfgs(), optax.sgd(0.1), view="best")
    with pytest.raises(TypeError, match="^inner_solver: got"):
        bx.algorithms.value_function(optax.sgd(0.1), optax.sgd(0.1))
