"""An algorithm on batches of tasks, each device on tasks of its own, with no communication inside
its loops.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from bilevax.base import (
    Algorithm,
    Bound,
    Ctx,
    Feed,
    InnerState,
    Lower,
    Objective,
    Problem,
    Pullback,
    PyTree,
    StepInfo,
    join,
    split,
)
from bilevax.data.loaders import Stream
from bilevax.results import WARNINGS
from bilevax.sharding.axis import enter, leave
from bilevax.sharding.placement import by_path
from bilevax.starts import Start, takes_key

SUMMED = ("inner_value",)  # diagnostics that add up over tasks
NORMS = ("inner_grad_norm", "cotangent_norm")  # and those whose squares do


def distribute(
    sharding: Any, plan: Any, sources: tuple[Any, ...], start: Any, outer: PyTree
) -> tuple[Any, PyTree]:
    """`plan` with the algorithm's step inside ``shard_map`` over the task axis, and both objectives
    on a device's own tasks.

    Besides, the specs of the algorithm's state.
    """
    problem, algorithm = plan.problem, plan.algorithm
    devices = sharding.mesh.shape[sharding.axis]
    lengths = {
        int(leaf.shape[0]) if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(start.params)
    }
    if len(lengths) != 1 or 0 in lengths or (count := lengths.pop()) % devices:
        shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(start.params)]
        raise ValueError(
            f"inner_params: got shapes {shapes} for tasks on {devices} devices; expected a common "
            "leading task axis whose length is a multiple "
            f"of {devices}."
        )
    for name, objective, expected in (
        ("inner_objective", problem.inner, ("sum",)),
        ("outer_objective", problem.outer, ("mean", "sum")),
    ):
        if objective.tasks not in expected:
            raise ValueError(
                f"{name}: got {objective!r} with sharding.tasks(); expected bilevax.tasks(fn, "
                f"{expected[0]!r}), "
                "whose tasks depend on none but themselves."
            )
    local = problem._replace(
        inner=_localised(problem.inner, sharding.axis, count, "own"),
        outer=_localised(problem.outer, sharding.axis, count, problem.outer.tasks),
    )
    if problem.inner_init is not None:
        own = Bound("inner_init", _own_start, fn=problem.inner_init, axis=sharding.axis)
        local = local._replace(inner_init=Start(own, takes_key(problem.inner_init)))
    algorithm = _summing_once(algorithm, sharding.axis)
    streams = tuple(isinstance(source, Stream) for source in sources)
    spec = _state_spec(plan, sharding.axis, start, outer)
    settings = dict(
        step=algorithm.step, sharding=sharding, count=count, streams=streams, state_spec=spec
    )
    return plan._replace(
        problem=local,
        algorithm=algorithm._replace(step=Bound(repr(algorithm.step), _step, **settings)),
    ), spec


def of_levels(sharding: Any, params: dict[str, PyTree]) -> Any:
    """Tasks of more than two levels: the levels that have one copy a task lie split over the tasks,
    and the compiler finds the rest.

    The lowest level has the tasks in front; the others are split that have as many.
    """
    devices = sharding.mesh.shape[sharding.axis]
    lengths = {
        name: {int(leaf.shape[0]) if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(value)}
        for name, value in params.items()
    }
    lowest, tasks = next(iter(lengths.items()))
    if len(tasks) != 1 or 0 in tasks or max(tasks) % devices:
        raise ValueError(
            f"params[{lowest!r}]: got leading axes {sorted(tasks)} for tasks on {devices} devices; "
            "expected a common one, of the tasks, whose "
            f"length is a multiple of {devices}."
        )
    rules = {
        rf"^inner\['{re.escape(name)}'\]": PartitionSpec(sharding.axis)
        for name, found in lengths.items()
        if found == tasks
    }
    return dataclasses.replace(by_path(sharding.mesh, rules, rows=sharding.axis), dry=sharding.dry)


def _localised(objective: Objective, axis: str, count: int, reduce: str) -> Objective:
    settings = dict(
        fn=objective.fn,
        pair=objective.has_aux or objective.stateful,
        axis=axis,
        count=count,
        reduce=reduce,
        summed=True,
    )
    return dataclasses.replace(objective, fn=Bound(objective.name, _own_tasks, **settings))


def _own(value: PyTree, axis: str, count: int) -> PyTree:
    """This device's entries of what was made for all tasks."""
    size = count // lax.axis_size(axis)
    return jax.tree.map(
        lambda a: lax.dynamic_slice_in_dim(a, lax.axis_index(axis) * size, size), value
    )


def _own_tasks(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    *model: Any,
    fn: Callable[..., Any],
    pair: Any,
    axis: Any,
    count: Any,
    reduce: Any,
    summed: Any,
    **keyed: Any,
) -> Any:
    here = count // lax.axis_size(axis)
    if any(
        leaf.shape[0] != here for leaf in jax.tree.leaves(batch)
    ):  # drawn in the step, for all tasks
        batch = _own(batch, axis, count)
    if "key" in keyed:
        keyed = {
            **keyed,
            "key": _own(jax.random.split(keyed["key"], count), axis, count),
        }  # those that one device would give them
    out = fn(inner, enter(outer, axis) if summed else outer, batch, *model, **keyed)
    value, rest = out if pair else (out, None)
    if reduce != "own":
        value = leave(value / lax.axis_size(axis) if reduce == "mean" else value, axis)
    return (value, rest) if pair else value


def _summing_once(algorithm: Algorithm, axis: str) -> Algorithm:
    """`algorithm` with its hypergradient's outer cotangent summed over the devices once, at the
    end, where it is made of many in a loop.
    """
    if algorithm.around is None:
        return algorithm
    return algorithm.around(
        lambda method: method._replace(vjp=Bound(repr(method.vjp), _vjp, vjp=method.vjp, axis=axis))
    )


def _vjp(
    lower: Lower,
    inner_state: InnerState,
    outer: PyTree,
    feed: Feed,
    ctx: Ctx,
    state: PyTree,
    *,
    vjp: Any,
    axis: Any,
) -> tuple[InnerState, Pullback]:
    own: Any = lower.objective.fn  # as `_localised` has made it
    fn = own.rebound(summed=False)
    solution, pullback = vjp(
        lower._replace(objective=dataclasses.replace(lower.objective, fn=fn)),
        inner_state,
        outer,
        feed,
        ctx,
        state,
    )

    def summed(cotangent):
        own, start, state, info = pullback(cotangent)
        return lax.psum(own, axis), start, state, info

    return solution, summed


def _own_start(outer: PyTree, key: Any = None, *, fn: Callable[..., Any], axis: Any) -> Any:
    made, model = fn(enter(outer, axis), key)
    return _own(made, axis, jax.tree.leaves(made)[0].shape[0]), model


def _step(
    problem: Problem,
    state: PyTree,
    feeds: Any,
    *,
    step: Any,
    sharding: Any,
    count: Any,
    streams: Any,
    state_spec: Any,
) -> Any:
    axis, everywhere, split_first = sharding.axis, PartitionSpec(), PartitionSpec(sharding.axis)
    static, dynamic = split((problem, step))

    def feed_spec(feed, stream):
        def leaf(a):
            place = 1 if stream else 0
            return (
                PartitionSpec(*[None] * place, axis)
                if jnp.ndim(a) > place and a.shape[place] == count
                else everywhere
            )

        return feed._replace(
            data=jax.tree.map(leaf, feed.data), key=everywhere, step=everywhere, order=everywhere
        )

    specs = [
        feed_spec(feed, stream)
        for feed, stream in zip((feeds.inner, feeds.hyper, feeds.outer), streams, strict=True)
    ]
    feeds_spec = feeds._replace(
        inner=specs[0],
        hyper=specs[1],
        outer=specs[2],
        key=everywhere,
        step=everywhere,
        done=everywhere,
    )
    point = (state_spec.inner, state_spec.outer)
    info_spec: Any = StepInfo(
        everywhere,
        everywhere,
        point,
        everywhere,
        # a specification in place of each number of a StepInfo
        everywhere,  # type: ignore[arg-type]
        split_first,
        everywhere,
        everywhere,
        everywhere,
    )

    def local(dynamic, state, feeds):
        problem, step = join(static, dynamic)
        state, info = step(problem, state, feeds)
        diagnostics = {
            name: _reduced(name, value, axis) for name, value in info.diagnostics.items()
        }
        return state, info._replace(
            code=lax.pmax(info.code, axis),
            diagnostics=diagnostics,
            warnings=_any_of(info.warnings, axis),
            scored=lax.pmin(jnp.asarray(info.scored, jnp.int32), axis) > 0,
            lag=None if info.lag is None else lax.pmax(info.lag, axis),
        )

    # Without check_vma: the step's loops carry values that differ by device beside constants that
    # do not, which it would refuse to mix.
    run = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(everywhere, state_spec, feeds_spec),
        out_specs=(state_spec, info_spec),
        check_vma=False,
    )
    return run(dynamic, state, feeds)


def _any_of(mask: Any, axis: str) -> Any:
    """The bits that are set on any device."""
    places = jnp.arange(len(WARNINGS), dtype=jnp.int32)
    bits = (jnp.asarray(mask, jnp.int32) >> places) & 1
    return jnp.sum(lax.pmax(bits, axis) << places, dtype=jnp.int32)


def _reduced(name: str, value: Any, axis: str) -> Any:
    if name == "inner_aux":
        return jax.tree.map(lambda a: lax.all_gather(a, axis, tiled=True), value)
    value = jnp.asarray(value)
    if name in SUMMED:
        return lax.psum(value, axis)
    if name in NORMS:
        return jnp.sqrt(lax.psum(value * value, axis))
    return lax.pmax(value, axis)


def _state_spec(plan: Any, axis: str, start: Any, outer: PyTree) -> PyTree:
    """Which axis of each leaf of the algorithm's state counts tasks: the one that is twice as long
    for twice as many.
    """

    def shapes(times: int) -> PyTree:
        wider = lambda a: jax.ShapeDtypeStruct((times * a.shape[0], *a.shape[1:]), a.dtype)
        params, model = jax.tree.map(wider, (start.params, start.model))

        def init(params, model, outer):
            problem = plan.problem
            if problem.inner_init is not None:
                problem = problem._replace(inner_init=lambda outer, key=None: (params, None))
            return plan.algorithm.init(problem, start._replace(params=params, model=model), outer)

        return jax.eval_shape(init, params, model, outer)

    def spec(one, two):
        grown = [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
        return PartitionSpec(*[None] * grown[0], axis) if grown else PartitionSpec()

    return jax.tree.map(spec, shapes(1), shapes(2))


def run_specs(spec: PyTree, shapes: Any) -> tuple[PartitionSpec, ...]:
    """The specs of a whole run state's leaves, from those of its algorithm's."""
    full = jax.tree.map(lambda _: PartitionSpec(), shapes)._replace(algorithm=spec)
    if full.best is not None:
        full = full._replace(
            best=full.best._replace(inner=spec.inner.params, model=spec.inner.model)
        )
    return tuple(jax.tree.leaves(full, is_leaf=lambda a: isinstance(a, PartitionSpec)))
