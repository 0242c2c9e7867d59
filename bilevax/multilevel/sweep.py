"""The reverse sweep: one gradient of the top level through all levels below it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core.precision import under
from bilevax.base import Feed, InnerState, PyTree, as_cotangent
from bilevax.data.draws import draw_key
from bilevax.hypergradient.parts import forward
from bilevax.multilevel import joint, nested
from bilevax.multilevel.statistics import constant, entered, floats_of
from bilevax.multilevel.system import System
from bilevax.results import RESULTS, as_warning, ladder, unless


class Sweep(NamedTuple):
    """One gradient of the top level and what it leaves behind.

    Attributes:
      value: the top objective at the solved levels.
      grad: its total derivative.
      solved: the states that `value` belongs to, by level name.
      states: the states to go on from: `solved`, but for levels that only looked ahead.
      methods: the methods' states, by level name.
      info: scalars, those of a level as ``"name/entry"``, and ``code``, ``warnings`` and
        ``grad_norm``.
      aux: the top objective's aux.
    """

    value: Any
    grad: PyTree
    solved: dict[str, InnerState]
    states: dict[str, InnerState]
    methods: dict[str, PyTree]
    info: dict[str, Any]
    aux: PyTree


def sweep(
    system: System,
    states: dict[str, InnerState],
    methods: dict[str, PyTree],
    outer: PyTree,
    feeds: dict[str, Feed],
) -> Sweep:
    """Solve the levels, each after those that it reads, and pull the top objective's cotangents
    back, each before those.

    ``w_j = ∂F_top/∂y_j + Σ_k (∂y_k/∂y_j)' w_k`` over the levels k that read j; one pullback a
    level, none where nothing arrives or nothing moves.
    """
    graph, top = system.graph, system.graph.top
    states, methods = dict(states), dict(methods)
    data = {name: feed.data for name, feed in feeds.items()}
    env = {name: state.params for name, state in states.items()} | {top.name: outer}
    env = constant(env, system.owners, states)
    if top.name in system.owners:
        env = entered(env, (top.name,), {top.name: system.still})
    ahead: dict[str, InnerState] = {}
    pullbacks: dict[str, Callable[..., Any]] = {}
    statistics: dict[str, PyTree] = {}  # the floating-point leaves of the solutions' model states
    infos: dict[str, dict[Any, Any]] = {}
    begins: dict[str, Callable[..., Any] | None] = {}
    for name in top.nested:
        node, side = graph[name], nested.lower(system, name)
        given = nested.given_to(system, name, node.live, env, tuple(pullbacks))
        rest = lax.stop_gradient({n: v for n, v in env.items() if n != name and n not in given})
        feed = Feed((data, rest), feeds[name].key, feeds[name].step)
        start, begins[name] = nested.started(
            system, name, states, env, draw_key(feed, 0), system.methods[name].sees_init
        )
        if node.live:
            method = joint.adapted(system, name)
            if (
                name in system.starts and system.starts[name].keyed
            ):  # another one each time: nothing of the last adjoint is of use
                methods[name] = method.init(start.params)
            solution, pullbacks[name] = method.vjp(
                side, start, given, feed, nested.hyper_context(side, feed), methods[name]
            )
            statistics[name] = tree.partition(solution.model)[0]
        else:
            solution, infos[name] = forward(side, start, given, feed)
        if system.look_ahead[name]:
            one, _ = side.run(*lax.stop_gradient((start, given, feed)), 0, 1)
            ahead |= nested.end_states(name, lax.stop_gradient(one))
        env[name] = solution.params
        states |= nested.end_states(name, solution)
        env = constant(env, system.owners, states)

    below = tuple(n for n in top.uses if n in pullbacks)
    moved = nested.given_to(system, top.name, (*below, top.name), env, tuple(pullbacks))
    ctx = system.draws[top.name](feeds[top.name], 0)._replace(model=system.still)

    def value_of(moved):
        return system.objectives[top.name]({**env, **moved}, None, ctx)

    needed = [
        system.methods[n].precision for n in pullbacks if system.methods[n].precision is not None
    ]
    value_and_cotangents = under(
        needed[0] if needed else None, jax.value_and_grad(value_of, has_aux=True)
    )
    (value, (_, aux)), cotangents = value_and_cotangents(moved)
    for name in reversed(top.nested):
        if name not in pullbacks or not {name, floats_of(name)} & set(cotangents):
            continue
        w, model = cotangents.get(name), tree.zeros_like(statistics[name])
        w = tree.zeros_like(env[name]) if w is None else w
        if floats_of(name) in cotangents:
            model = model._replace(mine={**model.mine, name: cotangents[floats_of(name)]})
        method = joint.adapted(system, name)
        found, first_point, methods[name], infos[name] = pullbacks[name](
            as_cotangent(method, w, model)
        )
        begin, moving = begins[name], tuple(n for n in found if n in graph.names)
        if name in system.starts:
            taken = system.starts[name].owners
            moving += tuple(floats_of(n) for n in taken if n in system.seen and n in pullbacks)
        both = (
            [found, begin(moving, (first_point.params, first_point.model.mine))]
            if begin is not None and method.sees_init
            else [found]
        )
        for n, cotangent in (item for part in both for item in part.items()):
            cotangents[n] = tree.add(cotangents[n], cotangent) if n in cotangents else cotangent
    grad = cotangents[top.name]
    return Sweep(
        value, grad, states, {**states, **ahead}, methods, _report(system, infos, value, grad), aux
    )


def _report(
    system: System, infos: dict[str, dict[Any, Any]], value: Any, grad: Any
) -> dict[str, Any]:
    order = [name for name in system.graph.top.nested if name in infos]
    out = {
        f"{name}/{entry}": a
        for name in order
        for entry, a in infos[name].items()
        if entry != "code"
    }
    grad_norm = tree.norm(grad)
    said = [as_warning(infos[name]["code"]) for name in order]
    codes = [
        jnp.where(code == RESULTS.adjoint_nonfinite, jnp.int32(_blame(system, name)), code)
        for name, (code, _) in zip(order, said, strict=True)
    ]
    warnings = jnp.int32(system.warnings)
    for name, (_, warned) in zip(order, said, strict=True):
        warnings |= warned | infos[name].get("warnings", 0)
    norms = {
        name: out[f"{name}/inner_grad_norm"] for name in order if f"{name}/inner_grad_norm" in out
    }
    blamed = [unless(jnp.isfinite(norm), _blame(system, name)) for name, norm in norms.items()]
    solved = jnp.all(jnp.asarray([c != RESULTS.inner_nonfinite for c in codes]))
    code = ladder(
        *codes, *blamed, inner=solved, value=jnp.isfinite(value), grad=jnp.isfinite(grad_norm)
    )
    return {**out, "grad_norm": grad_norm, "code": code, "warnings": warnings}


def _blame(system: System, name: str) -> RESULTS:
    """What a gradient that is not finite at a finite point means: a level inside has no derivative
    there, or the level's own has none.
    """
    return RESULTS.lower_level_failed if system.graph[name].held else RESULTS.adjoint_nonfinite
