"""The compiled part of a driver: a chunk of steps of an algorithm as one program."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax.base import Algorithm, Draws, Feed, Feeds, PyTree, join
from bilevax.data import ordered
from bilevax.metrics import Metrics
from bilevax.results import RESULTS


class Best(NamedTuple):
    """The kept iterate: its score (smaller is better), the step it belongs to, its parameters and model state."""

    score: Any
    step: Any
    inner: PyTree
    model: PyTree
    outer: PyTree


class RunState(NamedTuple):
    """All that the next step needs; saved, it is a full checkpoint."""

    algorithm: PyTree
    key: Any
    step: Any
    code: Any
    first_norm: Any
    best: Best | None


class Plan(NamedTuple):
    """What a compiled chunk is made of: a pytree whose functions and integers are static and whose numbers are leaves."""

    problem: Any  # what the algorithm takes: a `Problem`, or the levels of a multilevel one
    algorithm: Algorithm
    metrics: Metrics | None
    tol: float | None
    layout: Any = None  # where the state lives on several devices: the `Layout` of a sharding


def feeds(state: RunState, data: tuple, draws: Draws | tuple, orders: tuple | None = None) -> Any:
    """The streams of the next step."""
    orders = (None,) * len(data) if orders is None else orders

    def key(i):
        return None if state.key is None else jax.random.fold_in(state.key, i)

    streams = tuple(Feed(d, key(i), state.step * n, order) for i, (d, n, order) in enumerate(zip(data, draws, orders, strict=True)))
    if not isinstance(draws, Draws):  # a stream a level
        return streams
    inner, hyper, outer = streams
    return Feeds(inner, hyper, outer, None if state.key is None else jax.random.fold_in(key(3), state.step), state.step)


def orders(plan: Plan, state: RunState, data: tuple, steps: int) -> tuple:
    """What the draws of the next `steps` steps can know of before the loop, a stream each."""
    draws, problem = plan.algorithm.draws, plan.problem
    if not isinstance(draws, Draws):
        return (None,) * len(data)
    streams = feeds(state, data, draws)[:3]
    pairs = zip((problem.inner_draw, problem.hyper_draw, problem.outer_draw), streams, draws, strict=True)
    return tuple(ordered(draw, feed, steps * count).order if count else None for draw, feed, count in pairs)


def one_step(plan: Plan, state: RunState, data: tuple, known: tuple | None = None) -> tuple[RunState, dict]:
    """One step of the algorithm and what the driver adds to it: the row of the history, the kept iterate, the stop and the undo."""
    algorithm, info = plan.algorithm.step(plan.problem, state.algorithm, feeds(state, data, plan.algorithm.draws, known))
    inner, outer = info.point
    row = {"value": info.value, "grad_norm": info.grad_norm, "code": info.code, **info.diagnostics}
    score = info.value
    if plan.metrics is not None:
        measured = plan.metrics.row(inner.params, outer, inner.model, state.step)
        row.update(measured)
        if plan.metrics.select is not None:
            score = measured[plan.metrics.select] * (1 if plan.metrics.mode == "min" else -1)
    if info.aux is not None:
        row["aux"] = info.aux

    failed = info.code >= 10
    grad_norm = jnp.asarray(info.grad_norm, state.first_norm.dtype)
    first_norm = jnp.where((state.first_norm == 0) & ~failed, grad_norm, state.first_norm)  # of the first step that did not fail
    converged = ~failed & (grad_norm <= plan.tol * first_norm) if plan.tol is not None else jnp.asarray(False)
    best = state.best
    if best is not None:
        score = jnp.asarray(score, best.score.dtype)
        better = ~failed & (score < best.score)
        best = tree.where(better, Best(score, state.step, inner.params, inner.model, outer), best)
    code = jnp.where(failed, info.code, jnp.where(converged, jnp.int32(RESULTS.converged), jnp.int32(RESULTS.success)))
    step = state.step + jnp.where(failed, 0, 1).astype(state.step.dtype)
    kept = algorithm if plan.algorithm.undoes else tree.where(failed, state.algorithm, algorithm)
    new = RunState(kept, state.key, step, code, first_norm, best)
    return (new, row) if plan.layout is None else (plan.layout.pin(new), plan.layout.everywhere(row))


def _chunk(static, capacity: int, state: RunState, dynamic: tuple, data: tuple, n):
    """At most `n` steps, fewer after a failure or at the tolerance. `n` is a value, so chunks of any length share one program."""
    plan = join(static, dynamic)
    known = orders(plan, state, data, capacity)
    # Traced once, for the shapes and for the loop.
    step = jax.jit(lambda state, dynamic, data, known: one_step(join(static, dynamic), state, data, known))
    shapes = jax.eval_shape(step, state, dynamic, data, known)[1]
    pack, unpack = _packing(shapes)
    rows = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), jax.eval_shape(pack, shapes))

    def unfinished(carry):
        i, state, _ = carry
        return (i < n) & (state.code == 0)

    def body(carry):
        i, state, rows = carry
        state, row = step(state, dynamic, data, known)
        rows = jax.tree.map(lambda buffer, value: lax.dynamic_update_index_in_dim(buffer, value, i, 0), rows, pack(row))
        return i + 1, state, rows

    count, state, rows = lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state, rows))
    rows = jax.vmap(unpack)(rows)
    return (state, rows, count) if plan.layout is None else (plan.layout.pin(state), *plan.layout.everywhere((rows, count)))


def _packing(shapes: dict) -> tuple:
    """Scalars of one dtype as one vector, and back: a write of the history a dtype and not a column, which short steps feel."""
    leaves, treedef = jax.tree.flatten(shapes)
    groups: dict = {}
    for place, leaf in enumerate(leaves):
        if not leaf.shape and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            groups.setdefault(leaf.dtype, []).append(place)
    rest = [place for place, leaf in enumerate(leaves) if not any(place in places for places in groups.values())]

    def pack(row):
        row = jax.tree.leaves(row)
        return [jnp.stack([row[place] for place in places]) for places in groups.values()], [row[place] for place in rest]

    def unpack(packed):
        out: list = [None] * len(leaves)
        for vector, places in zip(packed[0], groups.values(), strict=True):
            for i, place in enumerate(places):
                out[place] = vector[i]
        for value, place in zip(packed[1], rest, strict=True):
            out[place] = value
        return treedef.unflatten(out)

    return pack, unpack


run_chunk = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))(_chunk)
run_traced = _chunk  # the same inside another program
