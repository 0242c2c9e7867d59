"""Step sizes: a number, which may decay with the step's number, or any optax transformation."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from bilevax import check, tree
from bilevax._core import numbers, optimizer
from bilevax._core.types import Numeric, Transformation
from bilevax.base import Feeds, Problem, PyTree
from bilevax.inner.tunable import tunable

StepSize: TypeAlias = "Numeric | Transformation"


def _descent(step_size: Any) -> optax.GradientTransformation:
    def init(params):
        return ()

    def update(grads, state, params=None, *, decayed=1.0):
        return tree.scale(-step_size * decayed, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def transformation(step: StepSize, argument: str) -> optax.GradientTransformation:
    """`step` as a transformation: a number `a` becomes ``−a t^{−decay} d`` with a leaf for a, a
    transformation stays what it is.

    Args:
      step: a positive number, or an optax transformation (which takes no decay from here: put a
        schedule into it).
      argument: the argument's name, for messages.

    Returns:
      A ``GradientTransformation``.

    Raises:
      TypeError, ValueError: for anything else.

    Examples:
      >>> import jax.numpy as jnp
      >>> sgd = transformation(0.5, "step")
      >>> sgd.update(jnp.ones(2), sgd.init(jnp.ones(2)), decayed=decayed(3, 0.5))[0].tolist()
      [-0.25, -0.25]
    """
    if isinstance(step, tuple) or hasattr(step, "init"):
        check.transformation(step, argument)
        return step
    if callable(step):
        raise TypeError(
            f"{argument}: got {check.describe(step)}; expected a positive number, or an optax "
            "transformation. Try 0.1."
        )
    return tunable(_descent, step_size=numbers.positive(step, argument))


def exponent(decay: Numeric, argument: str = "decay") -> float | None:
    """An exponent of the decay of steps; None for 0, which then costs nothing."""
    value = numbers.positive(decay, argument, zero=True)
    return None if isinstance(value, float) and value == 0 else value


def decayed(done: Any, decay: Numeric | None) -> Any:
    """``t^{−decay}`` for the step after `done` others, t = done + 1."""
    return (
        1.0
        if decay is None
        else jnp.power(jnp.asarray(done + 1).astype(jnp.result_type(float)), -decay)
    )


def move(
    opt: optax.GradientTransformation,
    direction: PyTree,
    state: PyTree,
    params: PyTree,
    decayed: Any = 1.0,
    project: Any = None,
) -> tuple[Any, ...]:
    """Parameters after one step of `opt` along `direction`, and its state; a step given as a number
    is taken `decayed` times.
    """
    return optimizer.moved(opt, direction, state, params, project, decayed=decayed)


def warm_only(problem: Problem, name: str) -> None:
    """Refuse a start of each solve, and an objective of its steps: these algorithms keep their
    inner point from step to step.
    """
    if problem.outer.trajectory:
        raise ValueError(
            f"outer_objective: got {problem.outer!r} with {name}, which has no solve to follow; "
            "expected an objective of "
            "the inner point. Try algorithms.double_loop with hypergradient.unrolled()."
        )
    if problem.inner_init is not None:
        raise ValueError(
            f"inner_init: got a function of the outer parameters, with {name}, which goes on from "
            "its last inner point and gives the initial one no "
            "derivative; expected None. Try algorithms.double_loop with hypergradient.unrolled()."
        )


def projected(problem: Problem, outer: PyTree) -> PyTree:
    """`outer` in the problem's feasible set."""
    return outer if problem.project is None else problem.project(outer)


def random_key(feeds: Feeds, name: str) -> jax.Array:
    """The step's own key, for algorithms that draw."""
    if feeds.key is None:
        raise ValueError(
            f"key: got None although {name} draws random numbers; expected a PRNG key. Try "
            "jax.random.key(0)."
        )
    return feeds.key
