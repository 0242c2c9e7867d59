"""The streams of a step, and what is found out about them for many steps at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import results
from bilevax.base import Feed
from bilevax.data.draws import knows_order, ordered
from bilevax.data.episodes import drawn
from bilevax.results import RESULTS
from bilevax.run.state import Plan, RunState


def feeds(
    plan: Plan, state: RunState, data: tuple[Any, ...], orders: tuple[Any, ...] | None = None
) -> Any:
    """The streams of the next step; `orders` has this step's row of what `orders` below found out,
    a stream each.
    """
    draws = plan.algorithm.draws
    orders = (None,) * len(data) if orders is None else orders

    def key(i):
        return None if state.key is None else jax.random.fold_in(state.key, i)

    data = tuple(drawn(d, state.key, state.step) for d in data)
    streams = tuple(
        Feed(d, key(i), state.step * n, order)
        for i, (d, n, order) in enumerate(zip(data, draws, orders, strict=True))
    )
    return plan.problem.feeds(streams, state.key, state.step, state.step - state.skipped)


def orders(plan: Plan, state: RunState, data: tuple[Any, ...], steps: int) -> tuple[Any, ...]:
    """What the draws of the next `steps` steps can know of before the loop, a stream each: None, or
    an array with a row a step.
    """
    if not any(map(knows_order, plan.problem.stream_draws)):
        return (None,) * len(data)
    streams = feeds(plan, state, data)[: len(data)]
    pairs = zip(plan.problem.stream_draws, streams, plan.algorithm.draws, strict=True)
    found = (
        (ordered(draw, feed, steps * count) if count else None, count)
        for draw, feed, count in pairs
    )
    return tuple(None if order is None else order.reshape(steps, count) for order, count in found)


def afterwards(
    plan: Plan, state: RunState, rows: dict[Any, Any], count: Any, data: tuple[Any, ...]
) -> tuple[RunState, dict[Any, Any]]:
    """What short steps would feel if each of them found it out: the first norm, where no tolerance
    asks for it, and what a failure came from.
    """
    failed = results.failed(state.code)  # the last of the steps: a run ends at a failure
    if plan.tol is None:
        fine = jnp.arange(len(rows["code"]), dtype=count.dtype) < count - failed.astype(count.dtype)
        counted = fine & (rows["grad_norm"] != 0)
        found = rows["grad_norm"][jnp.argmax(counted)].astype(state.first_norm.dtype)
        state = state._replace(
            first_norm=jnp.where(
                (state.first_norm == 0) & jnp.any(counted), found, state.first_norm
            )
        )
    look = plan.algorithm.finite
    if look is not None:
        last, draws = jnp.maximum(count - 1, 0), plan.algorithm.draws
        streams = feeds(plan, state, data)
        finite = lax.cond(
            failed, lambda: look(plan.problem, streams, draws), lambda: jnp.asarray(True)
        )
        state = state._replace(
            code=jnp.where(finite, state.code, jnp.int32(RESULTS.nonfinite_batch))
        )
        rows = {
            **rows,
            "code": rows["code"].at[last].set(jnp.where(failed, state.code, rows["code"][last])),
        }
    return state, rows
