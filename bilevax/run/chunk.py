"""The compiled part of a driver: a chunk of steps of an algorithm as one program."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import results, tree
from bilevax._core.showing import screenful
from bilevax.base import Algorithm, Draws, Feed, Feeds, PyTree, join
from bilevax.data.draws import ordered
from bilevax.data.episodes import drawn
from bilevax.results import RESULTS, as_warning, first, strictly, warning
from bilevax.run.judging import Watch, diverging, improves, lost, settled, undone, watched
from bilevax.run.metrics import Metrics

CHUNK = 256  # steps of a run's first compiled call, and between two looks at the host for whoever asks for nothing else
MOST_VALUES = 2**18  # a call takes more steps only where their history is that small


class Best(NamedTuple):
    """The kept iterate: its score (smaller is better), the step it belongs to, its parameters and model state."""

    score: Any
    step: Any
    inner: PyTree
    model: PyTree
    outer: PyTree


class RunState(NamedTuple):
    """All that the next step needs; saved, it is a full checkpoint. `skipped` of the `step` steps so far left no trace: passed over or taken back."""

    algorithm: PyTree
    key: Any
    step: Any
    skipped: Any
    code: Any
    first_norm: Any
    best: Best | None
    watch: Watch

    def __repr__(self) -> str:
        return screenful(self)


class Plan(NamedTuple):
    """What a compiled chunk is made of: a pytree whose functions and integers are static and whose numbers are leaves."""

    problem: Any  # what the algorithm takes: a `Problem`, or the levels of a multilevel one
    algorithm: Algorithm
    metrics: Metrics | None
    tol: float | None
    layout: Any = None  # where the state lives on several devices: the `Layout` of a sharding
    strict: int = 0  # the mask of the warnings that end the run


def feeds(state: RunState, data: tuple, draws: Draws | tuple, orders: tuple | None = None) -> Any:
    """The streams of the next step; `orders` has this step's row of what `orders` below found out, a stream each."""
    orders = (None,) * len(data) if orders is None else orders

    def key(i):
        return None if state.key is None else jax.random.fold_in(state.key, i)

    data = tuple(drawn(d, state.key, state.step) for d in data)
    streams = tuple(Feed(d, key(i), state.step * n, order) for i, (d, n, order) in enumerate(zip(data, draws, orders, strict=True)))
    if not isinstance(draws, Draws):  # a stream a level
        return streams
    inner, hyper, outer = streams
    own = None if state.key is None else jax.random.fold_in(key(3), state.step)
    return Feeds(inner, hyper, outer, own, state.step, state.step - state.skipped)


def orders(plan: Plan, state: RunState, data: tuple, steps: int) -> tuple:
    """What the draws of the next `steps` steps can know of before the loop, a stream each: None, or an array with a row a step."""
    draws, problem = plan.algorithm.draws, plan.problem
    if not isinstance(draws, Draws):
        return (None,) * len(data)
    streams = feeds(state, data, draws)[:3]
    pairs = zip((problem.inner_draw, problem.hyper_draw, problem.outer_draw), streams, draws, strict=True)
    found = ((ordered(draw, feed, steps * count) if count else None, count) for draw, feed, count in pairs)
    return tuple(None if order is None else order.reshape(steps, count) for order, count in found)


def one_step(plan: Plan, state: RunState, data: tuple, known: tuple | None = None) -> tuple[RunState, dict]:
    """One step of the algorithm and what the driver adds to it: the row of the history, the kept iterate, the stop and the undo."""
    algorithm, info = plan.algorithm.step(plan.problem, state.algorithm, feeds(state, data, plan.algorithm.draws, known))
    inner, outer = info.point
    code, warned = as_warning(info.code)
    warnings = warned | info.warnings | diverging(state.watch, info, state.step)
    code = first(strictly(code, warnings, plan.strict), lost(algorithm))
    row = {"value": info.value, "grad_norm": info.grad_norm, "code": code, "warnings": warnings, **info.diagnostics}
    score = info.value
    if plan.metrics is not None:
        measured = plan.metrics.row(inner.params, outer, inner.model, state.step)
        if taken := sorted(set(measured) & set(row)):
            raise ValueError(f"metrics: got the names {taken}, which are columns of the history already; expected others than {sorted(row)}.")
        row.update(plan.metrics.written(measured, state.step))
        if plan.metrics.select is not None:
            score = measured[plan.metrics.select] * (1 if plan.metrics.mode == "min" else -1)
            unusable = warning(~jnp.isfinite(score) & (state.step % plan.metrics.every == 0), RESULTS.metric_nonfinite)
            warnings, row["warnings"] = warnings | unusable, warnings | unusable
    if info.aux is not None:
        row["aux"] = info.aux

    failed = results.failed(code)
    grad_norm = jnp.asarray(info.grad_norm, state.first_norm.dtype)
    watch = watched(state.watch, info, state.step)
    if plan.tol is None:
        first_norm, converged = state.first_norm, jnp.asarray(False)  # `_chunk` finds it out afterwards
    else:
        first_norm = jnp.where((state.first_norm == 0) & ~failed, grad_norm, state.first_norm)  # of the first step that did not fail
        # An adjoint that starts at zero can make the first direction zero anywhere: twice in a row, and it is a solution.
        converged = ~failed & (warnings == 0) & (grad_norm <= plan.tol * first_norm) & ((first_norm > 0) | (state.step > 0))
        converged &= settled(watch, info, plan.tol)
    best = state.best
    if best is not None:
        score = jnp.asarray(score, best.score.dtype)
        chosen = plan.metrics is not None and plan.metrics.select is not None
        better, watch = improves(watch, info, best, score, chosen)
        better &= ~failed
        watch = tree.where(better, watch, watch._replace(kept=state.watch.kept))
        best = tree.where(better, Best(score, state.step, inner.params, inner.model, outer), best)
    code = jnp.where(failed, code, jnp.where(converged, jnp.int32(RESULTS.converged), jnp.int32(RESULTS.success)))
    step = state.step + jnp.where(failed, 0, 1).astype(state.step.dtype)
    new = RunState(undone(plan, failed, state.algorithm, algorithm), state.key, step, state.skipped, code, first_norm, best, watch)
    return (new, row) if plan.layout is None else (plan.layout.pin(new), plan.layout.everywhere(row))


def _chunk(static, capacity: int, state: RunState, dynamic: tuple, data: tuple, n, most_values: int | None = None):
    """At most `n` steps, fewer after a failure or at the tolerance. `n` is a value, so chunks of any length share one program.

    `capacity` is the most that `n` may be; where the history of so many steps had more than `most_values` numbers, fewer steps are done.
    """
    plan = join(static, dynamic)
    same: dict[str, Any] = {}  # columns of Python numbers, which no step changes

    def moving(state, dynamic, data, known):
        state, row = one_step(join(static, dynamic), state, data, known)
        for name in ("code", "warnings"):  # exact, and one more entry of a vector that is written anyway
            row[name] = row[name].astype(state.first_norm.dtype)
        same.update({name: value for name, value in row.items() if isinstance(value, int)})
        return state, {name: value for name, value in row.items() if name not in same}

    step = jax.jit(moving)  # traced once, for the shapes and for the loop
    shapes = jax.eval_shape(lambda: step(state, dynamic, data, _row_of(orders(plan, state, data, 1), 0)))[1]
    if most_values is not None:
        capacity = min(capacity, max(CHUNK, most_values // sum(leaf.size for leaf in jax.tree.leaves(shapes))))
    known, first = orders(plan, state, data, capacity), state.step
    pack, unpack = _packing(shapes)
    rows = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), jax.eval_shape(pack, shapes))

    def unfinished(carry):
        i, state, _ = carry
        return (i < jnp.minimum(n, capacity)) & (state.code == 0)

    def body(carry):
        i, state, rows = carry
        state, row = step(state._replace(step=first + i), dynamic, data, _row_of(known, i))
        rows = jax.tree.map(lambda buffer, value: _write(buffer, value, i), rows, pack(row))
        return i + 1, state._replace(step=None), rows  # one counter is enough

    count, state, rows = lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state._replace(step=None), rows))
    state = state._replace(step=first + count - results.failed(state.code).astype(first.dtype))
    rows = jax.vmap(unpack)(rows)
    rows |= {name: rows[name].astype(jnp.int32) for name in ("code", "warnings")}
    rows |= {name: jnp.full((capacity,), value, jnp.int32) for name, value in same.items()}
    state, rows = _afterwards(plan, state, rows, count, data)
    return (state, rows, count) if plan.layout is None else (plan.layout.pin(state), *plan.layout.everywhere((rows, count)))


def _afterwards(plan: Plan, state: RunState, rows: dict, count, data: tuple) -> tuple[RunState, dict]:
    """What short steps would feel if each of them found it out: the first norm, where no tolerance asks for it, and what a failure came from."""
    if plan.tol is None:
        counted = (jnp.arange(len(rows["code"]), dtype=count.dtype) < count) & ~results.failed(rows["code"]) & (rows["grad_norm"] != 0)
        found = rows["grad_norm"][jnp.argmax(counted)].astype(state.first_norm.dtype)
        state = state._replace(first_norm=jnp.where((state.first_norm == 0) & jnp.any(counted), found, state.first_norm))
    look = plan.algorithm.finite
    if look is not None:
        failed, last, draws = results.failed(state.code), jnp.maximum(count - 1, 0), plan.algorithm.draws
        streams = feeds(state, data, draws)
        finite = lax.cond(failed, lambda: look(plan.problem, streams, draws), lambda: jnp.asarray(True))
        state = state._replace(code=jnp.where(finite, state.code, jnp.int32(RESULTS.nonfinite_batch)))
        rows = {**rows, "code": rows["code"].at[last].set(jnp.where(failed, state.code, rows["code"][last]))}
    return state, rows


# Slices at a counter that is never negative, which a plain index would ask about.


def _row_of(known: tuple, i) -> tuple:
    at = jnp.asarray(i, jnp.int32)
    return jax.tree.map(lambda a: lax.dynamic_slice(a, (at, jnp.zeros_like(at)), (1, a.shape[1]), allow_negative_indices=False)[0], known)


def _write(buffer, value, i):
    return lax.dynamic_update_slice(buffer, value[None], (i, *[jnp.zeros_like(i)] * value.ndim), allow_negative_indices=False)


_WORDS = tuple(map(jnp.dtype, (jnp.float32, jnp.int32, jnp.uint32)))  # travel as integers


def _as(value, dtype):
    return value if value.dtype == dtype else lax.bitcast_convert_type(value, dtype)


def _packing(shapes: dict) -> tuple:
    """Scalars of one size as one vector, and back: one write of the history, not one a column, which short steps feel."""
    leaves, treedef = jax.tree.flatten(shapes)
    groups: dict = {}
    for place, leaf in enumerate(leaves):
        if not leaf.shape and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            groups.setdefault(jnp.dtype(jnp.int32) if leaf.dtype in _WORDS else leaf.dtype, []).append(place)
    rest = [place for place, leaf in enumerate(leaves) if not any(place in places for places in groups.values())]

    def pack(row):
        row = jax.tree.leaves(row)
        return [jnp.stack([_as(row[place], dtype) for place in places]) for dtype, places in groups.items()], [row[place] for place in rest]

    def unpack(packed):
        out: list = [None] * len(leaves)
        for vector, places in zip(packed[0], groups.values(), strict=True):
            for i, place in enumerate(places):
                out[place] = _as(vector[i], leaves[place].dtype)
        for value, place in zip(packed[1], rest, strict=True):
            out[place] = value
        return treedef.unflatten(out)

    return pack, unpack


run_chunk = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))(functools.partial(_chunk, most_values=MOST_VALUES))
run_traced = _chunk  # the same inside another program
