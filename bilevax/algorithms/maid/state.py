"""Where MAID stands, what it becomes after a step, and what of it is reported."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.algorithms.maid import direction as directions
from bilevax.algorithms.maid.direction import Model
from bilevax.algorithms.maid.gradient import ROUGH, Certificate, Gradient, margin
from bilevax.algorithms.maid.search import Trial
from bilevax.base import InnerState, PyTree, StepInfo
from bilevax.results import RESULTS, warning

# factor of both accuracies where the value's error is more than TELLING of the decrease that the
# next step promises
FINER = 0.2
TELLING = 0.1
FAILED = 0.1  # factor of both accuracies after a search that failed
FINEST = 1e-8  # of both
BACK = 0.25  # of a move that was taken back, the next radius
GIVEN_UP = 3  # failed searches in a row at the finest accuracies, after which the point stays


class MaidState(NamedTuple):
    """Where MAID stands.

    Attributes:
      inner: inner parameters with their solver's state, solved at `outer`.
      outer: outer parameters.
      adjoint: the last q.
      z, p: hypergradient and next direction at `outer`.
      value: of the outer objective there.
      error: how far that is off to first order; 0 where the adjoint is too rough to tell.
      told: whether it is not.
      promised: decrease that the next step's first trial predicts.
      model: of the outer problem, from the steps before.
      epsilon, delta: accuracies asked of the inner point (a relative distance) and of the adjoint
        (a relative residual).
      started: whether there has been a step.
      solved: whether the inner solver says that the inner point is.
      stuck: searches in a row that failed.
      lost: whether the last of them failed in spite of a decrease that values could have told.
      certified: constants, probes and margin of the certificate, or ().
    """

    inner: InnerState
    outer: PyTree
    adjoint: PyTree
    z: PyTree
    p: PyTree
    value: Any
    error: Any
    told: Any
    promised: Any
    model: Model
    epsilon: Any
    delta: Any
    started: Any
    solved: Any
    stuck: Any
    lost: Any
    certified: tuple[Any, ...]


def finer(accuracy: Any, factor: Numeric) -> Any:
    """A smaller accuracy, but no smaller than can be told."""
    least = max(FINEST, 16 * numbers.rounding_unit(accuracy))
    return jnp.maximum(factor * accuracy, jnp.minimum(accuracy, least))


def finest(state: MaidState) -> Any:
    """Whether neither accuracy can be tightened any more."""
    return (finer(state.epsilon, FAILED) >= state.epsilon) & (
        finer(state.delta, FAILED) >= state.delta
    )


def advanced(
    state: MaidState,
    trial: Trial,
    g: Gradient,
    made: Certificate | None,
    model: Model,
    p: PyTree,
    promised: Any,
    accuracies: tuple[Any, ...],
    stays: Any,
    failed: Any,
) -> MaidState:
    """The next state: where a step's promise is near the value's own error, the next is more
    accurate.
    """
    dtype, unit = state.value.dtype, numbers.rounding_unit((state.inner.params, state.outer))
    epsilon, delta = accuracies
    rough = (
        (jnp.abs(g.error.astype(dtype)) > TELLING * promised)
        | (trial.count > 2)
        | (g.residual > ROUGH)
    )
    if made is None:
        epsilon, delta = (jnp.where(rough, finer(a, FINER), a) for a in (epsilon, delta))
        extra: tuple[Any, ...] = ()
    else:
        error = margin(made.constants, g.f_y_norm.astype(dtype), made.bound.distance)
        extra = made.constants, made.probes, error.astype(dtype)
    visible = state.promised > 10 * unit * jnp.abs(state.value)
    return MaidState(
        inner=g.inner,
        outer=trial.outer,
        adjoint=g.q,
        z=g.z,
        p=p,
        value=g.value.astype(dtype),
        error=g.error.astype(dtype) if made is None else jnp.zeros_like(state.error),
        told=g.residual <= ROUGH,
        promised=promised,
        model=model,
        epsilon=epsilon,
        delta=delta,
        started=jnp.asarray(True),
        solved=trial.solved,
        stuck=jnp.where(failed, state.stuck + 1, jnp.where(stays, state.stuck, 0)).astype(
            jnp.int32
        ),
        lost=jnp.where(failed, visible, stays & state.lost),
        certified=extra,
    )


def taken_back(state: MaidState, length: Any) -> MaidState:
    """The state before a move to a point whose adjoint system has no usable answer: nothing would
    be known there. A shorter one is next.
    """
    radius = BACK * jnp.minimum(state.model.radius, length)
    model = state.model._replace(radius=radius)
    share = directions.capped(model, state.p) / directions.capped(state.model, state.p)
    return state._replace(
        model=model, promised=share * state.promised, stuck=state.stuck + 1, lost=jnp.asarray(True)
    )


def report(
    new: MaidState,
    state: MaidState,
    trial: Trial,
    g: Gradient,
    made: Certificate | None,
    size: Any,
    length: Any,
    back: Any,
) -> StepInfo:
    """What a step reports: `size` is the hypergradient's norm, `length` that of the move, `back`
    whether it was taken back.
    """
    diagnostics = {
        "accepted": length > 0,
        "step_size": length,
        "trials": trial.count,
        "epsilon": trial.tol,
        "delta": state.delta,
        "inner_grad_norm": g.inner_norm,
        "adjoint_residual": g.residual,
        "lower_steps": trial.evaluations + g.evaluations,
        "adjoint_steps": g.products,
    }
    value = new.value.astype(g.value.dtype)
    if made is not None:
        diagnostics |= {
            "epsilon": made.epsilon,
            "delta": made.delta,
            "adjoint_residual": g.residual * g.f_y_norm,
            "error_bound": made.bound.total,
            "inner_error": made.bound.distance,
            "strong_convexity": made.constants.strong_convexity,
        }
        # Of an inexact point's values, the upper bound falls from step to step, and so may choose
        # the iterate that is kept.
        value = value + new.certified[2].astype(g.value.dtype)
    rough = (
        g.warnings
        | warning(~trial.solved, RESULTS.inner_not_converged)
        | warning(new.lost, RESULTS.no_step_accepted)
    )
    # A value that is off by more than steps change it may not be compared with theirs: the start's,
    # say, which is solved roughly.
    told = jnp.maximum(
        new.promised, 10 * numbers.rounding_unit((new.inner.params, new.outer)) * jnp.abs(new.value)
    )
    fine = (jnp.abs(new.error) <= TELLING * told) | finest(new)
    return StepInfo(
        value,
        size,
        (new.inner, new.outer),
        g.code,
        diagnostics,
        g.aux,
        rough,
        trial.solved & ~back & fine,
    )
