"""The levels as compiled code is given them: bound to their fixed leaves, with the graph of who
reads whom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import inner as inner_solvers
from bilevax import tree
from bilevax._captured import hoisted
from bilevax._core.jaxpr import reads
from bilevax.base import (
    Bound,
    Ctx,
    Draw,
    Feed,
    Hypergradient,
    InnerSolver,
    Objective,
    PyTree,
    objective,
)
from bilevax.functions import evaluate
from bilevax.hypergradient.one_step import one_step
from bilevax.hypergradient.parts import over
from bilevax.multilevel import statistics
from bilevax.multilevel.graph import Graph, find
from bilevax.multilevel.level import Level
from bilevax.multilevel.starting import read_by, refuse_unread, starts_of
from bilevax.results import RESULTS, mask_of
from bilevax.starts import Start


class System(NamedTuple):
    """The levels as compiled code is given them: a pytree whose functions and integers are static
    and whose numbers are leaves.
    """

    graph: Graph
    objectives: dict[str, Objective]  # (params, None, ctx), on floating-point leaves
    solvers: dict[str, InnerSolver]  # of all levels but the top one
    methods: dict[str, Hypergradient]
    draws: dict[str, Draw]
    optimizer: Any  # of the top level
    look_ahead: dict[str, bool]
    owners: tuple[str, ...]  # levels whose model state others may read
    seen: tuple[str, ...]  # those among them whose statistics are differentiated
    still: PyTree  # the top level's own model state, which no step moves
    starts: dict[str, Start]  # of the levels that begin each solve anew
    warnings: int = 0  # the mask of those that stand at every step

    @property
    def separable(self) -> bool:
        """Whether devices may run it on tasks of their own, without the others."""
        return False

    @property
    def stream_draws(self) -> tuple[Draw | None, ...]:
        """The draw of each level's stream, where it may find out its order beforehand: a level may
        be solved more than once in a step.
        """
        return (None,) * len(self.graph.names)

    def with_objectives(self, change: Callable[[Objective], Objective]) -> System:
        """The same levels with changed objectives."""
        return self._replace(objectives={name: change(fn) for name, fn in self.objectives.items()})

    def feeds(self, streams: tuple[Feed, ...], key: Any, step: Any, done: Any) -> tuple[Feed, ...]:
        """A step's streams as the sweep takes them: one a level."""
        return streams


def as_system(
    levels: Sequence[Level],
    params: dict[Any, Any],
    fixed: dict[Any, Any],
    draws: dict[str, Draw],
    contexts: dict[Any, Any],
    models: dict[Any, Any],
) -> System:
    """The levels bound to their non-float leaves, with the graph of who reads whom found from these
    shapes.
    """
    wrapped = {level.name: objective(level.objective) for level in levels}
    division = statistics.divided(list(wrapped), wrapped, models)
    objectives, given = {}, {}
    for level in levels:
        name, fn = level.name, wrapped[level.name]
        shared = (
            tuple(k for k in division.owners if k != name) if name in division.by_owner else None
        )
        settings = dict(
            fn=fn.fn,
            fixed=fixed,
            shared=shared,
            own=tuple(division.own[name] or ()) if shared is not None else None,
        )
        objectives[name] = dataclasses.replace(
            fn, fn=Bound(fn.name, _two_arguments, **settings, has_aux=fn.has_aux)
        )
        given[name] = contexts[name]._replace(model=division.whole(name))
        evaluate(objectives[name], f"Level {name!r}, objective", params, None, given[name])
    objectives = {
        name: hoisted(value, params, None, given[name]) for name, value in objectives.items()
    }
    frozen = [level.name for level in levels if level.freeze]
    keys = {name: ctx.key for name, ctx in given.items()}
    starts = starts_of(levels, params, fixed, division, keys)
    begun = {n: read_by(start, n, params, keys[n], division) for n, start in starts.items()}
    graph = find(
        objectives,
        params,
        given,
        {level.name: level.reads for level in levels},
        frozen,
        {name: variables | states for name, (variables, states) in begun.items()},
    )
    *lower, top = levels
    solvers = {level.name: as_solver(level) for level in lower}
    methods = {level.name: over(method_of(level), solvers[level.name]) for level in lower}
    refuse_unread(starts, methods, objectives, params, given, frozen, division)
    return System(
        graph,
        objectives,
        solvers,
        {
            name: _first_order(method)
            if any(methods[n].order < 2 for n in graph[name].held)
            else method
            for name, method in methods.items()
        },
        draws,
        top.solver,
        {level.name: level.look_ahead for level in lower},
        division.owners,
        tuple(
            n
            for n in graph.top.nested
            if n in division.owners and methods[n].sees_model and graph[n].live
        ),
        division.own[top.name],
        starts,
        mask_of(RESULTS.statistics_constant)
        * any(
            any(name in states for _, states in begun.values())
            or _read_elsewhere(name, division, objectives, params, given)
            for name in division.owners
            if name in methods and not methods[name].sees_model and name not in frozen
        ),
    )


def _read_elsewhere(
    owner: str,
    division: statistics.Division,
    objectives: dict[str, Objective],
    params: dict[Any, Any],
    contexts: dict[Any, Any],
) -> bool:
    """Whether another level's objective depends on the statistics that `owner` moves."""

    def read_by(name):
        ctx = contexts[name]
        floats, rest = tree.partition(ctx.model[owner])

        def value(given):
            floats, rest, params, ctx = given
            model = {**ctx.model, owner: tree.combine(floats, rest)}
            return objectives[name](params, None, ctx._replace(model=model))[0]

        read = reads(value, (floats, rest, params, ctx))
        return any(read[: len(jax.tree.leaves(floats))])

    return any(read_by(name) for name in division.by_owner if name != owner)


def method_of(level: Level) -> Hypergradient:
    """The method of a level below the top; only a frozen one may do without."""
    return _NONE if level.hypergradient is None else level.hypergradient


_NONE = one_step()  # never called: nothing waits for a frozen level


def _first_order(method: Hypergradient) -> Hypergradient:
    """A method over a level that can be differentiated once only."""
    return method if method.first_order_form is None else method.first_order_form


def _two_arguments(
    params: PyTree,
    _: Any,
    batch: PyTree,
    *model: Any,
    fn: Callable[..., Any],
    fixed: Any,
    shared: Any,
    own: Any,
    has_aux: bool,
    **keyed: Any,
) -> Any:
    variables = {name: tree.combine(params[name], fixed[name]) for name in fixed}
    if shared is None:
        return fn(variables, batch, *model, **keyed)
    value, rest = fn(variables, batch, statistics.read(params, model[0], shared), **keyed)
    moved, aux = rest if has_aux else (rest, None)
    moved = {name: moved[name] for name in own}  # of the others' states only they make new ones
    return value, ((moved, aux) if has_aux else moved)


def as_solver(level: Level) -> InnerSolver:
    """What solves a level below the top."""
    solver = (
        level.solver
        if isinstance(level.solver, InnerSolver)
        else inner_solvers.optax(level.solver, 1)
    )
    if level.every == 1:
        return solver
    method = level.hypergradient
    seen = (
        method is not None
        and method.linear is None
        and (method.sees_init or method.order > 1 or method.batches == 0)
    )
    step = Bound(
        "every", _every_nth, step=solver.step, solves=solver.steps + 1, every=level.every, seen=seen
    )
    return solver._replace(step=step)


def _held(old: Any, new: Any) -> Any:
    """The value of the one with the tangent of the other."""
    return lax.stop_gradient(old) + (new - lax.stop_gradient(new)) if tree.is_float(old) else old


def _every_nth(
    objective: Objective,
    state: Any,
    outer: PyTree,
    ctx: Ctx,
    *,
    step: Any,
    solves: Any,
    every: Any,
    seen: Any,
) -> Any:
    """The solver's step in every n-th solve; in the others the level stands still.

    Where the method differentiates the steps (`seen`), standing still has the derivative of the
    steps that would have been taken, all at the point
    where the level stands: parameters, optimizer and model state keep their values and move in
    their tangents alone.
    """

    def move():
        return step(objective, state, outer, ctx)

    shapes = jax.eval_shape(move)[1]

    def stand():
        if seen:
            moved, info = move()
            return jax.tree.map(_held, state, moved), info
        return state, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return lax.cond((ctx.batch.number // solves) % every == 0, move, stand)
