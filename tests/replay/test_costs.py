"""What a step back costs, in training steps: operations and bytes as the compiler counts them, not
times."""

import functools

import jax
import jax.numpy as jnp
import pytest

import bilevax as bx
from bilevax import tree
from bilevax.base import InnerState
from bilevax.data import same
from bilevax.replay import _steps
from tests.replay import costs


def pieces(loss, params, weights, batch, save=True):
    training = _steps.Training(bx.objective(loss), lambda outer: costs.OPTIMIZER, same, save=save)
    given = _steps.Given(weights, None, jax.tree.map(lambda a: None, params), batch)
    state = InnerState(params, costs.OPTIMIZER.init(params))
    return training, given, state


@pytest.mark.turns
@pytest.mark.parametrize(
    "problem, bound",
    [(costs.transformer, 2.8), (costs.perceptron, 2.5)],
    ids=["transformer", "perceptron"],
)
def test_a_step_back(problem, bound):
    loss, params, weights, batch = problem()
    training, given, state = pieces(loss, params, weights, batch)
    step, temporaries = costs.count(costs.training_step(loss), params, state.opt, weights, batch)
    forth, _ = costs.count(functools.partial(_steps.advance, training), state, given, jnp.int32(0))
    assert forth < 1.01 * step
    cotangent, saved = tree.partition(state)[0], _steps.Saved(jnp.float32(0), params)
    arguments = state, saved, given, jnp.int32(0), cotangent, weights
    back, bytes_back = costs.count(functools.partial(_steps.retreat, training), *arguments)
    assert back <= bound * step
    steps = 1024
    for schedule, whole in ((bx.replay.everything(), 3.8), (bx.replay.segments(), 4.8)):
        assert schedule.counts(steps).executed * forth + steps * back <= whole * steps * step
    if problem is costs.transformer:
        assert bytes_back <= 2.2 * temporaries
        again, _ = costs.count(
            functools.partial(_steps.retreat, training),
            state,
            saved._replace(grads=None),
            *arguments[2:],
        )
        assert (
            again <= 3.45 * step
            # what saving the gradient saves: the compiler does not merge it with the one inside the
            # product
        )


@pytest.mark.turns
@pytest.mark.parametrize(
    "problem, bound",
    [(costs.transformer, 2.8), (costs.perceptron, 2.5)],
    ids=["transformer", "perceptron"],
)
def test_unrolled(problem, bound):
    """The backward body of the compiled solve costs the same; with sqrt, one training step more."""
    loss, params, weights, batch = problem()
    step, _ = costs.count(
        costs.training_step(loss), params, costs.OPTIMIZER.init(params), weights, batch
    )
    outer = lambda params, weights, batch: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
    solver = bx.inner.optax(costs.OPTIMIZER, 9)
    for checkpoint, extra in (("mixed", 0), ("sqrt", 1)):
        method = bx.hypergradient.unrolled(checkpoint=checkpoint)
        fn = bx.value_and_hypergrad(loss, outer, solver=solver, hypergradient=method)
        whole, _ = costs.count(lambda *args, fn=fn: fn(*args).grad, params, weights, batch)
        assert whole <= (1 + bound + extra) * step
