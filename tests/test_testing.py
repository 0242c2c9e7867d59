"""The checks that a user's own method is given: what passes, and what each of them catches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import tree
from bilevax.base import Bound, Hypergradient


def test_the_closed_form_is_the_derivative():
    problem = bx.testing.quadratic(jax.random.key(3), inner_size=5, outer_size=3, condition=7.0)
    total = lambda x: problem.outer_objective(problem.solution(x), x, None)
    np.testing.assert_allclose(
        problem.hypergradient(problem.outer_params),
        jax.grad(total)(problem.outer_params),
        rtol=1e-10,
    )
    slope = jax.grad(problem.inner_objective)(
        problem.solution(problem.outer_params), problem.outer_params, None
    )
    assert float(tree.norm(slope)) < 1e-10


@pytest.mark.parametrize("arguments", [{"inner_size": 1}, {"condition": 0.5}, {"outer_size": 0}])
def test_refusals(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        bx.testing.quadratic(jax.random.key(0), **arguments)
    with pytest.raises(TypeError, match="method: got function"):
        bx.testing.check_method(lambda: None)


@pytest.mark.turns
def test_ours_pass():
    bx.testing.check_method(bx.hypergradient.implicit(), rtol=1e-5)
    bx.testing.check_method(bx.hypergradient.one_step(), exact=False)


def method(pull, finish=lambda grad: grad, info=None):
    """A method that is right but for what is put in."""
    inherited = bx.hypergradient.implicit()

    def vjp(lower, inner_state, outer, feed, ctx, state):
        solution, pullback = inherited.vjp(lower, inner_state, outer, feed, ctx, state)

        def changed(w):
            grad, init, new, found = pullback(pull(w))
            return finish(grad), init, new, found if info is None else info(found)

        return solution, changed

    return Hypergradient(inherited.init, Bound("changed", vjp))


@pytest.mark.turns
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (method(lambda w: tree.scale(1.01, w)), "wrong by"),
        (method(lambda w: w, lambda g: g * jnp.nan), "hypergradient_nonfinite"),
        (method(lambda w: w, lambda g: g + 1.0), "not its own"),
        (method(lambda w: w, info=lambda found: {**found, "vector": jnp.zeros(3)}), "no scalar"),
        (
            method(
                lambda w: w,
                info=lambda found: {**found, "code": jnp.int32(bx.RESULTS.adjoint_breakdown)},
            ),
            "adjoint_breakdown",
        ),
    ],
    ids=["wrong", "nan", "not_linear", "vector_info", "code"],
)
def test_each_fault_is_caught(broken, message):
    with pytest.raises(AssertionError, match=message):
        bx.testing.check_method(broken)
