"""The total objective of a level: its own, with the levels nested in it replaced by their best
responses.

It is an ordinary objective ``(inner, outer, ctx) -> (value, (model, aux))``, so every solver and
every method works on it unchanged. `inner` is the level's variable, `outer` a dict of the variables
that its gradient depends on. The warm states of the levels inside travel as its model state, as
BatchNorm's statistics do: they move on real inner steps and stand still on hypergradient passes.

How a nested best response is differentiated is its own method's affair:

- ``order=2`` without a linear solver (unrolled, forward): through the solve's steps, by ordinary
  differentiation.
- ``order=2`` with one: exactly, any number of times, by `argmin.attach` at the solved point.
- ``order=1``: once, by the method's own pullback. The result is guarded: differentiating it again
  raises, since it would be wrong without a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import linear, tree
from bilevax._core import numbers
from bilevax.argmin import attach
from bilevax.base import (
    Bound,
    Ctx,
    Draw,
    Feed,
    Hypergradient,
    InnerState,
    Lower,
    Objective,
    PyTree,
)
from bilevax.data.draws import draw_key, draw_number
from bilevax.hypergradient.parts import verdict
from bilevax.multilevel.guard import guarded_solve, message
from bilevax.multilevel.starting import begun
from bilevax.multilevel.statistics import constant, entered, floats_of
from bilevax.multilevel.system import System
from bilevax.results import RESULTS, first

# of a linear solve inside a derivative, which no code can come out of: above it the derivative is
# NaN
MAX_RESIDUAL = 1e-2


class LevelBatch(NamedTuple):
    """What the total objective of a level is given: its own batch, and what the levels inside draw
    theirs from.
    """

    own: PyTree
    key: Any
    number: Any  # of this draw: the levels inside count their own draws from it
    inner_step: Any  # of this draw within its solve
    data: dict[str, PyTree]  # of all levels
    rest: dict[str, PyTree]  # variables of the levels that its gradient does not depend on


class LevelModel(NamedTuple):
    """The model state of a total objective: the level's own, and the warm states of the levels
    inside.
    """

    mine: PyTree
    below: dict[str, InnerState]


# ---- one level as others see it


def lower(system: System, name: str) -> Lower:
    """A level as a lower one: its total objective, its solver, its draws."""
    solver = system.solvers[name]
    draw = Bound(
        "level",
        _draw,
        draw=system.draws[name],
        index=system.graph.index(name),
        name=name,
        steps=solver.steps,
    )
    return Lower(total_objective(system, name), solver, draw)


def total_objective(system: System, name: str) -> Objective:
    """The objective of level `name` in which the levels nested in it are replaced by their best
    responses.
    """
    return Objective(
        Bound(system.objectives[name].name, _total, system=system, name=name),
        has_aux=True,
        stateful=True,
        keyed=True,
    )


def started(
    system: System,
    name: str,
    states: dict[str, InnerState],
    env: dict[Any, Any],
    key: Any,
    sees: bool,
) -> tuple[InnerState, Any]:
    """The state that a solve of this level begins with, and the pullback of a start of its own: see
    `starting.begun`.
    """
    own, pull = begun(
        system.starts.get(name),
        name,
        system.graph.names,
        system.solvers[name],
        states[name],
        env,
        key,
        sees,
    )
    return start_state(system, name, {**states, name: own}), pull


def start_state(system: System, name: str, states: dict[str, InnerState]) -> InnerState:
    """The warm state of a level with those of the levels inside it, from one state a level."""
    own = states[name]
    return own._replace(
        model=LevelModel(own.model, {j: states[j] for j in system.graph[name].held})
    )


def end_states(name: str, solution: InnerState) -> dict[str, InnerState]:
    """Undo `start_state`: one state for each level that moved."""
    return {**solution.model.below, name: solution._replace(model=solution.model.mine)}


def hyper_context(side: Lower, feed: Feed) -> Ctx:
    """The context of second-order products: the draw after the solve's own."""
    return side.draw(feed, side.solver.steps)


def level_feed(
    system: System, name: str, env: dict[str, PyTree], data: dict[Any, Any], key: Any, step: Any
) -> Feed:
    """The stream of one level: the data of all levels, and the variables that this one does not
    depend on.
    """
    wanted = {name, *given_to(system, name, system.graph[name].total, env)}
    return Feed(
        (data, lax.stop_gradient({n: v for n, v in env.items() if n not in wanted})), key, step
    )


def given_to(
    system: System,
    name: str,
    levels: Sequence[str],
    env: dict[str, PyTree],
    solved: Sequence[str] | None = None,
) -> dict[str, PyTree]:
    """What a level's solution is differentiated in: the variables of `levels`, and the statistics
    of those `solved` before (default: of `levels`).
    """
    states = (n for n in (levels if solved is None else solved) if n in system.seen and n != name)
    return {n: env[n] for n in levels} | {floats_of(n): env[floats_of(n)] for n in states}


def inside(
    system: System, name: str, env: dict[str, PyTree], batch: LevelBatch
) -> tuple[Lower, Feed]:
    """A level inside another one's objective, and its stream there."""
    side = lower(system, name)
    key = None if batch.key is None else jax.random.fold_in(batch.key, system.graph.index(name))
    return side, level_feed(
        system, name, env, batch.data, key, batch.number * (side.solver.steps + 1)
    )


def _draw(feed: Feed, i: Any, *, draw: Draw, index: int, name: str, steps: int) -> Ctx:
    data, rest = feed.data
    ctx = draw(feed._replace(data=data.get(name)), i)
    number = draw_number(feed, i)
    key = (
        None
        if feed.key is None
        else jax.random.fold_in(jax.random.fold_in(feed.key, number), index)
    )
    return ctx._replace(
        batch=LevelBatch(ctx.batch, key, number, jnp.minimum(jnp.int32(i), steps - 1), data, rest)
    )


# ---- the total objective


def _total(
    inner: PyTree,
    outer: PyTree,
    batch: LevelBatch,
    model: LevelModel,
    *,
    key: Any,
    system: System,
    name: str,
) -> Any:
    env, below = {**batch.rest, **outer, name: inner}, model.below
    if name in system.owners:
        env = entered(env, (name,), lax.stop_gradient({name: model.mine}))
    env = constant(env, system.owners, below)
    for j in system.graph[name].nested:
        solution, below = _respond(system, name, j, env, batch, below)
        env[j] = solution.params
        env = constant(env, system.owners, below)
        if j in system.owners:
            env = entered(env, (j,), {j: solution.model.mine})
    value, (mine, aux) = system.objectives[name](
        env, None, Ctx(batch.own, key, model.mine, inner_step=batch.inner_step)
    )
    return value, (LevelModel(mine, below), aux)


def _respond(
    system: System,
    reader: str,
    name: str,
    env: dict[Any, Any],
    batch: LevelBatch,
    below: dict[Any, Any],
) -> tuple[InnerState, dict[Any, Any]]:
    """The best response of level `name`, differentiable in `env`, and the warm states after its
    solve.
    """
    method, (side, feed) = system.methods[name], inside(system, name, env, batch)
    sees = method.sees_init and method.order > 1
    start, _ = started(system, name, lax.stop_gradient(below), env, draw_key(feed, 0), sees)
    given = given_to(system, name, system.graph[name].total, env)
    ctx = hyper_context(side, feed)
    if method.order < 2:
        solution = guarded_solve(
            side, method, message(system, reader, name), start, given, feed, ctx
        )
    elif method.linear is None:
        solution, _ = method.vjp(side, start, given, feed, ctx, method.init(start.params))
    else:
        solution, _ = lax.stop_gradient(side.run(start, lax.stop_gradient(given), feed))
        y = attached(system, name, side, solution, given, ctx._replace(model=solution.model))
        solution = solution._replace(params=y)
    return solution, {**below, **lax.stop_gradient(end_states(name, solution))}


def attached(
    system: System, name: str, side: Lower, solution: InnerState, given: dict[Any, Any], ctx: Ctx
) -> PyTree:
    """The solved variable of a level with its exact derivative in `given`."""
    if applies_jointly(system, name):
        return attached_jointly(system, name, solution, given, ctx)
    method = system.methods[name]

    def value(y, given, ctx):
        return side.objective(y, given, ctx)[0]

    return attach(value, method.linear, max_residual=accepted(method))(solution.params, given, ctx)


def accepted(method: Hypergradient) -> Any:
    """The residual above which a derivative by this method is NaN."""
    return MAX_RESIDUAL if method.max_residual is None else method.max_residual


def applies_jointly(system: System, name: str) -> bool:
    """Whether this level, with others inside it, is differentiated as one system: all of them
    exactly, none by its steps.
    """
    inside = system.graph[name].held
    return bool(inside) and all(
        system.methods[n].order > 1 and system.methods[n].linear is not None
        for n in (name, *inside)
    )


# ---- several nested levels as one system: see joint.py


# most products in one solve, where a level's own solver is not for indefinite systems
PRODUCTS = 1000


class Unknowns(NamedTuple):
    """A level's variable, and for each level inside it that level's own unknowns and their
    multipliers.
    """

    y: PyTree
    below: dict[str, tuple[Any, Any]]


class Multipliers(NamedTuple):
    """What the linear solvers say of a point's multipliers: the largest relative residual, whether
    one is above what is accepted, `RESULTS`.
    """

    residual: Any
    rough: Any
    code: Any
    warnings: Any


def attached_jointly(
    system: System, name: str, solution: InnerState, given: dict[Any, Any], ctx: Ctx
) -> PyTree:
    """The solved variable of a level with its exact derivative in `given`; NaN, as after any linear
    solve, where a multiplier is too rough.
    """
    u, said = lax.stop_gradient(point(system, name, solution.params, given, ctx))
    u = u._replace(below=tree.nan_where(said.rough, u.below))

    def value(u, given, ctx):
        return lagrangian(system, name, u, given, ctx)

    return attach(
        value, joint_solver(system, name, u), max_residual=accepted(system.methods[name])
    )(u, given, ctx).y


def _entered(system: System, name: str, env: dict[Any, Any], ctx: Ctx) -> dict[Any, Any]:
    """`env` with the statistics of this level and of those inside it, as constants."""
    if name in system.owners:
        env = entered(env, (name,), lax.stop_gradient({name: ctx.model.mine}))
    return constant(env, system.owners, ctx.model.below)


def lagrangian(system: System, name: str, u: Unknowns, given: dict[Any, Any], ctx: Ctx) -> Any:
    """``L_j`` at the unknowns `u` of level `name`."""
    env = _entered(
        system,
        name,
        {**ctx.batch.rest, **given, name: u.y} | {i: u_i.y for i, (u_i, _) in u.below.items()},
        ctx,
    )
    value = system.objectives[name](
        env, None, Ctx(ctx.batch.own, ctx.key, ctx.model.mine, inner_step=ctx.batch.inner_step)
    )[0]
    linear = system.methods[name].linear
    if linear is not None and linear.damping is not None:
        # Zero here, as is its gradient; its Hessian is the damping, of this level's own variable
        # and of no multiplier.
        away = tree.sub(u.y, lax.stop_gradient(u.y))
        value += (linear.damping * tree.dot(away, away) / 2).astype(value.dtype)
    for i, (u_i, multipliers) in u.below.items():
        known, ctx_i = _inside(system, i, env, ctx)
        own = partial(lagrangian, system, i, given=known, ctx=ctx_i)
        value += jax.jvp(own, (u_i,), (multipliers,))[1]
    return value


def _inside(system: System, name: str, env: dict[Any, Any], ctx: Ctx) -> tuple[dict[Any, Any], Ctx]:
    """What a level inside another is given at `env`."""
    side, feed = inside(system, name, env, ctx.batch)
    model = start_state(system, name, ctx.model.below).model
    return given_to(system, name, system.graph[name].total, env), hyper_context(
        side, feed
    )._replace(model=model)


def point(
    system: System, name: str, y: PyTree, given: dict[Any, Any], ctx: Ctx
) -> tuple[Unknowns, Multipliers]:
    """The unknowns at a solved `y`: the levels inside solved there, then the multipliers, each
    after those of the levels that read it.
    """
    env = _entered(system, name, {**ctx.batch.rest, **given, name: y}, ctx)
    below: dict[str, tuple[Any, ...]] = {}
    told = [
        Multipliers(jnp.zeros(()), jnp.asarray(False), jnp.int32(RESULTS.success), jnp.int32(0))
    ]
    for i in system.graph[name].nested:
        side, feed = inside(system, i, env, ctx.batch)
        known, ctx_i = _inside(system, i, env, ctx)
        solution, _ = side.run(
            started(system, i, ctx.model.below, env, draw_key(feed, 0), False)[0], known, feed
        )
        env[i] = solution.params
        u_i, said = point(system, i, solution.params, known, ctx_i._replace(model=solution.model))
        below[i] = (u_i, tree.zeros_like(u_i))
        told.append(said)
    for i in reversed(system.graph[name].nested):
        u_i, zero = below[i]

        def value(u_i):
            return lagrangian(system, name, Unknowns(y, {**below, i: (u_i, zero)}), given, ctx)  # noqa: B023 (called at once)

        known, ctx_i = _inside(system, i, env, ctx)
        _, hvp = jax.linearize(
            jax.grad(partial(lagrangian, system, i, given=known, ctx=ctx_i)), u_i
        )
        right = tree.neg(jax.grad(value)(u_i))
        multipliers, info = joint_solver(system, i, u_i)(hvp, right, zero)
        below[i] = (u_i, multipliers)
        method = system.methods[i]
        told.append(
            Multipliers(
                info.residual,
                ~(info.residual <= accepted(method)),
                *verdict(info, method.max_residual, right),
            )
        )
    return Unknowns(y, below), _together(told)


def _together(told: Sequence[Multipliers]) -> Multipliers:
    residual, rough, warnings = told[0].residual, told[0].rough, told[0].warnings
    for said in told[1:]:
        residual = jnp.maximum(residual, said.residual.astype(residual.dtype))
        rough, warnings = rough | said.rough, warnings | said.warnings
    return Multipliers(residual, rough, first(*(said.code for said in told)), warnings)


def joint_solver(system: System, name: str, u: Unknowns) -> Any:
    """MINRES to the tolerance of the level's own method; a level with none inside keeps that
    method's solver.
    """
    given = system.methods[name].linear
    assert given is not None  # what `applies_jointly` asked for
    if given.damping is not None:
        given = given.undamped  # the Lagrangian has it
    if not u.below or given.indefinite:
        return given
    return linear.minres(
        PRODUCTS, 100 * numbers.rounding_unit(u) if given.tol is None else given.tol
    )
