"""The search along a direction: each trial is an inner solve, and the only one in the program."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax.algorithms._parts import steps
from bilevax.algorithms._parts.directions import inner_grad, outer_pass
from bilevax.algorithms._parts.solving import solve_to
from bilevax.algorithms.maid.gradient import margin
from bilevax.base import Ctx, InnerSolver, InnerState, Problem, PyTree
from bilevax.certificate import Constants

SEARCH = 8  # trials; where none passes, the point stays, solved more accurately
FINER = 0.1  # by so much
SHORTEST, LONGEST, BLIND = (
    0.1,
    0.5,
    0.2,
)  # factors of the next trial: limits of the quadratic's minimum, and where it has none


class Point(NamedTuple):
    """Where a search starts.

    Attributes:
      outer, inner: the point.
      q: its adjoint; 0 where that is too rough to correct values with.
      value: of the outer objective.
      error: ``⟨q, ∇_y g⟩``: `value` less this is that at the solution, up to second order in y's
        error.
      z: hypergradient.
      margin: how far `value` may be off, by a certificate.
      solved: whether the inner solver says that it is solved there.
    """

    outer: PyTree
    inner: InnerState
    q: PyTree
    value: Any
    error: Any
    z: PyTree
    margin: Any
    solved: Any


class Trial(NamedTuple):
    """The last trial of a search: the point, the value there, the step length, and what all trials
    have cost.
    """

    outer: PyTree
    inner: InnerState
    value: Any
    length: Any
    tol: Any
    count: Any
    evaluations: Any
    solved: Any
    done: Any


def search(
    problem: Problem,
    solver: InnerSolver,
    point: Point,
    p: PyTree,
    length: Any,
    tols: tuple[Any, Any],
    stays: Any,
    decrease: Any,
    constants: Constants | None,
    contexts: tuple[Ctx, Ctx],
) -> Trial:
    """Trials ``x − αp`` until the value, solved anew, has decreased enough; where none will do, the
    point itself with a finer solve.

    Args:
      problem: what is solved.
      solver: how its lower level is.
      point: where the search starts.
      p: the direction.
      length: α of the first trial.
      tols: of the trials' solves, and of the finer one.
      stays: no trial: the point itself is solved, to the trials' tolerance.
      decrease: share of the predicted decrease that is asked for.
      constants: for a decrease that holds in spite of inner errors; None takes values as they are.
      contexts: of both objectives.
    """
    inner_ctx, outer_ctx = contexts
    dtype = point.value.dtype
    unit = numbers.rounding_unit((point.inner.params, point.outer))

    def try_next(t: Trial) -> Trial:
        last = stays | (t.count >= SEARCH)
        x = tree.where(
            last, point.outer, steps.projected(problem, tree.axpy(-t.length, p, point.outer))
        )
        tol = jnp.where(t.count >= SEARCH, tols[1], tols[0])
        solved = solve_to(problem, solver, point.inner, x, inner_ctx, tol)
        there = outer_ctx._replace(model=solved.inner.model)
        slack = point.margin
        if constants is None:
            value = problem.outer(solved.inner.params, x, there)[0].astype(dtype)
            rest = inner_grad(
                problem, solved.inner.params, x, inner_ctx._replace(model=solved.inner.model)
            )[0]
            error = tree.dot(point.q, rest).astype(dtype) - point.error
        else:
            f = outer_pass(problem, solved.inner.params, x, there)
            value, error = f.value.astype(dtype), jnp.zeros_like(point.error)
            slack = slack + margin(
                constants,
                tree.norm(f.y).astype(dtype),
                solved.grad_norm.astype(dtype) / constants.strong_convexity,
            )
        predicted = tree.dot(point.z, tree.sub(point.outer, x)).astype(dtype)
        change = value - point.value
        change = jnp.maximum(
            change, change - error
        )  # as it is, and with inner errors corrected: neither may rise
        # Below what rounding lets the values tell, no increase is all that can be asked for.
        hidden = (predicted > 0) & (predicted <= 10 * unit * jnp.abs(point.value)) & (change <= 0)
        # where rounding leaves nothing to solve with, no further step can be told
        finite = jnp.isfinite(value) & tree.all_finite((solved.inner.params, x))
        finite &= solved.ok | ~point.solved
        good = finite & ((change + slack <= -decrease * predicted) & (predicted > 0) | hidden)
        bend = 2 * (change + predicted)
        known = finite & (bend > 0)
        cut = jnp.where(
            known,
            jnp.clip(predicted / jnp.where(known, bend, jnp.ones_like(bend)), SHORTEST, LONGEST),
            BLIND,
        )
        done = last | good
        return Trial(
            tree.where(done, x, point.outer),
            tree.where(done, solved.inner, point.inner),
            value,
            jnp.where(last, jnp.zeros_like(t.length), jnp.where(good, t.length, cut * t.length)),
            tol,
            t.count + 1,
            t.evaluations + solved.evaluations,
            solved.ok,
            done,
        )

    shapes = jax.eval_shape(
        try_next,
        Trial(
            point.outer,
            point.inner,
            point.value,
            length,
            tols[0],
            jnp.int32(0),
            jnp.int32(0),
            stays,
            stays,
        ),
    )
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    start = blank._replace(outer=point.outer, inner=point.inner, length=length)
    return lax.while_loop(lambda t: ~t.done, try_next, start)
