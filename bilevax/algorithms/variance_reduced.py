"""Single-loop algorithms for finite sums, whose directions become exact: SABA, SRBA, SPABA."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.algorithms._parts import memory, steps
from bilevax.algorithms._parts.directions import (
    Directions,
    Inner,
    Outer,
    combined,
    counts,
    data_finite,
    drawn_finite,
    inner_pass,
    outer_pass,
    report,
)
from bilevax.algorithms._parts.steps import StepSize
from bilevax.algorithms._parts.triple import SingleLoopState, advance, as_moves, passes, start
from bilevax.base import Algorithm, Bound, Ctx, Draws, Feeds, Problem, PyTree, StepInfo
from bilevax.data.draws import num_batches, whole
from bilevax.results import failed


class Tables(NamedTuple):
    """SAGA memories: of ``(∇_y g, ∇²_yy g·v, ∇²_xy g·v)`` a batch of the inner data, of ``(∇_y f,
    ∇_x f)`` a batch of the outer data.
    """

    inner: memory.Saga
    outer: memory.Saga


def saba(
    inner_step: StepSize, outer_step: StepSize, *, adjoint_step: StepSize | None = None
) -> Algorithm:
    """SABA: SOBA with a SAGA memory of each part of the directions, and constant steps.

    ``y −= a D̂_y``, ``v −= a D̂_v``, ``x −= b D̂_x``; each of the five parts P of the directions
    enters as ``P_i − table_i + mean(table)``.

    Data must have a fixed number of batches: `data.partitioned`, or the whole at once. Memory: (2Y
    + X) for each inner batch and (Y + X) for each outer batch, Y and X being the sizes of the inner
    and outer parameters.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      adjoint_step: step of ``v``; default `inner_step`.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for steps of another kind; later, for data that is no partition.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.saba(0.1, 0.05).draws
      Draws(inner=1, hyper=0, outer=1)

    Source: Dagréou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms" (NeurIPS 2022), section 3.2.
    """
    settings = dict(moves=as_moves(inner_step, outer_step, adjoint_step))
    return Algorithm(
        Bound("saba", _saba_init, **settings),
        Bound("saba", _saba_step, **settings),
        Draws(1, 0, 1),
        undoes=True,
        finite=drawn_finite,
    )


def _saba_init(problem: Problem, inner: PyTree, outer: PyTree, *, moves: Any) -> SingleLoopState:
    y, counts_ = (
        inner.params,
        [num_batches(draw, "saba") for draw in (problem.inner_draw, problem.outer_draw)],
    )
    tables = Tables(
        memory.saga_init((y, y, outer), counts_[0]), memory.saga_init((y, outer), counts_[1])
    )
    return start(problem, inner, outer, moves, "saba", tables)


def _saba_step(
    problem: Problem, state: SingleLoopState, feeds: Feeds, *, moves: Any
) -> tuple[SingleLoopState, StepInfo]:
    inner_ctx, outer_ctx, g, f = passes(problem, state, feeds)
    tables, i, j = state.memory, _index(inner_ctx), _index(outer_ctx)
    inner_parts, outer_parts = (g.grad, g.product, g.cross), (f.y, f.x)
    (grad, product, cross), inner_change = memory.saga(tables.inner, inner_parts, i)
    (f_y, f_x), outer_change = memory.saga(tables.outer, outer_parts, j)
    d = combined(Inner(grad, product, cross), Outer(f.value, f_y, f_x, f.aux))
    info = report(state.inner, state.outer, f, d, counts(1, 2, 1))
    # A failed step is undone here: a driver that kept the tables of both ends of a step would copy
    # them in each.
    kept = ~failed(info.code)
    moved = tree.where(
        kept,
        advance(problem, state, d, moves, g.model)._replace(memory=()),
        state._replace(memory=()),
    )
    inner_table = memory.saga_write(tables.inner, inner_parts, inner_change, i, kept)
    outer_table = memory.saga_write(tables.outer, outer_parts, outer_change, j, kept)
    return moved._replace(memory=Tables(inner_table, outer_table)), info


def _index(ctx: Ctx) -> Any:
    return jnp.int32(0) if ctx.index is None else ctx.index


class Recursive(NamedTuple):
    """SARAH's memory: the last directions, and the point before the last step."""

    directions: Directions
    y: PyTree
    v: PyTree
    x: PyTree


def srba(
    inner_step: StepSize, outer_step: StepSize, *, period: int, adjoint_step: StepSize | None = None
) -> Algorithm:
    """SRBA: SOBA with SARAH's recursive directions, refreshed on the full data every `period`
    steps, and constant steps.

    ``d = D_full(u_t)`` where ``t mod period = 0``, else ``d += D_ij(u_t) − D_ij(u_{t−1})``, for the
    triple ``u = (y, v, x)``; ``u −= (a, a, b) d``. The paper also projects v on a ball whose radius
    the problem's constants give; here, as in its authors' experiments, v is free.

    Data must have a fixed number of batches (`data.partitioned`), or come whole.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      period: steps from one full refresh to the next. The paper's theory takes the number of
        batches of both levels.
      adjoint_step: step of ``v``; default `inner_step`.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, for data that is no partition.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.srba(0.1, 0.05, period=32).draws
      Draws(inner=1, hyper=0, outer=1)

    Source: Dagréou, Moreau, Vaiter and Ablin, "A lower bound and a near-optimal algorithm for
    bilevel empirical risk minimization" (AISTATS 2024), algorithm 1.
    """
    settings = dict(
        moves=as_moves(inner_step, outer_step, adjoint_step), period=numbers.count(period, "period")
    )
    return Algorithm(
        Bound("srba", _recursive_init, name="srba", **settings),
        Bound("srba", _srba_step, **settings),
        Draws(1, 0, 1),
        finite=data_finite,
    )


def _recursive_init(
    problem: Problem, inner: PyTree, outer: PyTree, *, name: str, moves: Any, **_: Any
) -> SingleLoopState:
    for draw in (problem.inner_draw, problem.outer_draw):
        num_batches(draw, name)
    y = inner.params
    zero = tree.zeros_like(y)
    return start(
        problem,
        inner,
        outer,
        moves,
        name,
        Recursive(Directions(zero, zero, tree.zeros_like(outer)), y, zero, outer),
    )


def _srba_step(
    problem: Problem, state: SingleLoopState, feeds: Feeds, *, moves: Any, period: Any
) -> tuple[SingleLoopState, StepInfo]:
    return _recursive_step(problem, state, feeds, moves, feeds.done % period == 0, "srba")


def spaba(
    inner_step: StepSize,
    outer_step: StepSize,
    *,
    probability: Numeric,
    adjoint_step: StepSize | None = None,
) -> Algorithm:
    """SPABA: SOBA with PAGE's directions: refreshed on the full data with a probability, recursive
    otherwise.

    ``d = D_full(u_t)`` with probability p and at the first step, else ``d += D_ij(u_t) −
    D_ij(u_{t−1})``, for ``u = (y, v, x)``; ``u −= (a, a, b) d``.

    Data must have a fixed number of batches (`data.partitioned`), or come whole; the run needs a
    key.

    Args:
      inner_step: ``a``, a positive number or an optax transformation.
      outer_step: ``b``, likewise.
      probability: p in (0, 1]. The paper's theory takes ``1 / (1 + number of batches)``.
      adjoint_step: step of ``v``; default `inner_step`.

    Returns:
      An `Algorithm`.

    Raises:
      TypeError, ValueError: for arguments of another kind; later, for data that is no partition, or
        without a key.

    Examples:
      >>> import bilevax as bx
      >>> bx.algorithms.spaba(0.1, 0.05, probability=0.1).draws
      Draws(inner=1, hyper=0, outer=1)

    Source: Chu, Xu, Yao and Zhang, "SPABA: a single-loop and probabilistic stochastic bilevel
    algorithm achieving optimal sample complexity" (ICML 2024), algorithm 1.
    """
    settings = dict(
        moves=as_moves(inner_step, outer_step, adjoint_step),
        probability=numbers.positive(probability, "probability", upper=1),
    )
    return Algorithm(
        Bound("spaba", _recursive_init, name="spaba", **settings),
        Bound("spaba", _spaba_step, **settings),
        Draws(1, 0, 1),
        finite=data_finite,
    )


def _spaba_step(
    problem: Problem, state: SingleLoopState, feeds: Feeds, *, moves: Any, probability: Any
) -> tuple[SingleLoopState, StepInfo]:
    key = steps.random_key(feeds, "spaba")
    return _recursive_step(
        problem,
        state,
        feeds,
        moves,
        (feeds.done == 0) | jax.random.bernoulli(key, probability),
        "spaba",
    )


def _recursive_step(
    problem: Problem, state: SingleLoopState, feeds: Feeds, moves: Any, refresh: Any, name: str
) -> tuple[SingleLoopState, StepInfo]:
    old, model = state.memory, state.inner.model

    def evaluate(y, v, x, at):
        g = inner_pass(problem, y, x, v, at[0])
        f = outer_pass(problem, y, x, at[1])
        return combined(g, f), g.model, f

    def contexts(inner_draw, outer_draw):
        return tuple(
            draw(feed, 0)._replace(model=model)
            for draw, feed in ((inner_draw, feeds.inner), (outer_draw, feeds.outer))
        )

    here = (state.inner.params, state.adjoint, state.outer)
    inner_count, outer_count = (
        num_batches(draw, name) for draw in (problem.inner_draw, problem.outer_draw)
    )

    def full():
        d, new_model, f = evaluate(
            *here, contexts(whole(problem.inner_draw, name), whole(problem.outer_draw, name))
        )
        return d, new_model, f, jnp.asarray([inner_count, 2 * inner_count, outer_count], jnp.int32)

    def recursive():
        at = contexts(problem.inner_draw, problem.outer_draw)
        new, new_model, f = evaluate(*here, at)
        past, _, _ = evaluate(old.y, old.v, old.x, at)
        return (
            memory.sarah(old.directions, new, past),
            new_model,
            f,
            jnp.asarray([2, 4, 2], jnp.int32),
        )

    d, new_model, f, calls = jax.lax.cond(refresh, full, recursive)
    info = report(state.inner, state.outer, f, d, counts(*calls))
    return advance(problem, state, d, moves, new_model, Recursive(d, *here)), info


__all__ = ["saba", "spaba", "srba"]
