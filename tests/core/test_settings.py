"""Configuration as pytrees: what is equal to what, and what can be configuration at all."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax._core.settings import split


@dataclasses.dataclass
class Fit:
    """A dataclass that compares by its fields has no hash, and is a callable all the same."""

    weight: float

    def __call__(self, y, x, batch):
        return self.weight * jnp.sum((y - x) ** 2)


@dataclasses.dataclass
class Clip:
    high: float

    def __call__(self, x):
        return jnp.clip(x, 0.0, self.high)


def test_callables_without_a_hash_are_objectives_and_projections():
    """y = x, so x goes to the nearest point of [0, 2] to 3."""
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(1.0), 1), bx.hypergradient.implicit(), optax.sgd(0.5)
    )
    run = bx.solve_bilevel(
        Fit(0.5),
        lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2),
        jnp.zeros(2),
        jnp.ones(2),
        algorithm=algorithm,
        num_steps=10,
        project=Clip(2.0),
    )
    np.testing.assert_allclose(run.outer_params, [2.0, 2.0], atol=1e-5)


def test_callables_without_a_hash_are_objectives_of_one_s_own_loop():
    """y = x, so the value is (x - 3)² / 2 in each entry, and the gradient x - 3; two objects that
    compare equal are two functions."""
    fn = bx.value_and_hypergrad(
        Fit(0.5),
        lambda y, x, b: 0.5 * jnp.sum((y - 3.0) ** 2),
        solver=bx.inner.lbfgs(),
        hypergradient=bx.hypergradient.implicit(),
    )
    np.testing.assert_allclose(fn(jnp.zeros(2), jnp.ones(2)).grad, [-2.0, -2.0], atol=1e-4)
    one, same = Fit(0.5), Fit(0.5)
    assert one == same
    assert split(one)[0] != split(same)[0]
    assert split(one)[0] == split(one)[0]
    assert hash(split(one)[0]) == hash(split(one)[0])


def test_a_change_between_two_runs_is_seen_by_the_run_of_another_object():
    """One that was changed by copy is another function, and its run has its own program: weight 1/2
    or 2 by one step of size 1/2."""
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.5), 1), bx.hypergradient.implicit(), optax.sgd(0.0)
    )

    def reached(objective):
        return bx.solve_bilevel(
            objective,
            lambda y, x, b: jnp.sum(y**2),
            jnp.zeros(2),
            jnp.ones(2),
            algorithm=algorithm,
            num_steps=1,
        ).inner_params

    half = Fit(0.5)
    np.testing.assert_allclose(reached(half), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(
        reached(dataclasses.replace(half, weight=1.0)), [1.0, 1.0], rtol=1e-6
    )


def test_other_values_without_a_hash_are_refused():
    with pytest.raises(TypeError, match="settings: got an unhashable set"):
        split(({1, 2},))
