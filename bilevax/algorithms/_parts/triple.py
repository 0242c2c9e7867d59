"""The triple of single-loop algorithms: inner parameters, adjoint and outer parameters, that move
together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bilevax import tree
from bilevax._core import optimizer
from bilevax.algorithms._parts import steps
from bilevax.algorithms._parts.directions import Directions, Inner, Outer, inner_pass, outer_pass
from bilevax.algorithms._parts.steps import StepSize
from bilevax.base import Ctx, Feeds, InnerState, Problem, PyTree


class SingleLoopState(NamedTuple):
    """Where a single-loop algorithm stands.

    Attributes:
      inner: inner parameters, the state of their step, the model's state.
      outer: outer parameters.
      adjoint: ``v ≈ −(∇²_yy g)⁻¹ ∇_y f``.
      opt: states of the steps on the adjoint and on the outer parameters.
      memory: of earlier directions.
    """

    inner: InnerState
    outer: PyTree
    adjoint: PyTree
    opt: tuple[Any, ...]
    memory: PyTree = ()


class Moves(NamedTuple):
    """The steps on the three variables."""

    y: Any
    v: Any
    x: Any


def as_moves(inner_step: StepSize, outer_step: StepSize, adjoint_step: StepSize | None) -> Moves:
    """Transformations of the three step arguments; the adjoint's step is the inner one's by
    default.
    """
    adjoint = inner_step if adjoint_step is None else adjoint_step
    arguments = ((inner_step, "inner_step"), (adjoint, "adjoint_step"), (outer_step, "outer_step"))
    return Moves(*(steps.transformation(step, name) for step, name in arguments))


def start(
    problem: Problem,
    inner: InnerState,
    outer: PyTree,
    moves: Moves,
    name: str,
    first_memory: PyTree = (),
) -> SingleLoopState:
    """The first state, with the adjoint at zero."""
    steps.warm_only(problem, name)
    adjoint = tree.zeros_like(inner.params)
    opt = (optimizer.init(moves.v, adjoint), optimizer.init(moves.x, outer))
    return SingleLoopState(
        inner._replace(opt=optimizer.init(moves.y, inner.params)), outer, adjoint, opt, first_memory
    )


def advance(
    problem: Problem,
    state: SingleLoopState,
    d: Directions,
    moves: Moves,
    model: PyTree,
    new_memory: PyTree = (),
    decayed: Any = 1.0,
) -> SingleLoopState:
    """All three variables moved along their directions."""
    y, y_opt = steps.move(moves.y, d.y, state.inner.opt, state.inner.params, decayed)
    v, v_opt = steps.move(moves.v, d.v, state.opt[0], state.adjoint, decayed)
    x, x_opt = steps.move(moves.x, d.x, state.opt[1], state.outer, decayed, problem.project)
    return SingleLoopState(InnerState(y, y_opt, model), x, v, (v_opt, x_opt), new_memory)


def passes(problem: Problem, state: SingleLoopState, feeds: Feeds) -> tuple[Ctx, Ctx, Inner, Outer]:
    """One batch of each level and a pass through each objective there: what a single-loop step
    starts with.
    """
    inner_ctx = problem.inner_draw(feeds.inner, 0)._replace(model=state.inner.model)
    outer_ctx = problem.outer_draw(feeds.outer, 0)._replace(model=state.inner.model)
    g = inner_pass(problem, state.inner.params, state.outer, state.adjoint, inner_ctx)
    return inner_ctx, outer_ctx, g, outer_pass(problem, state.inner.params, state.outer, outer_ctx)
