r"""Three or more nested levels as one symmetric system, in place of linear solves inside linear solves.

The total objective of a level j, with levels i nested in it, has the Lagrangian

.. math::
    L_j(u_j) = f_j + \sum_i \langle \mu_i, \nabla_{u_i} L_i(u_i) \rangle, \qquad u_j = (y_j, (u_i, \mu_i)_i)

whose stationary points in ``u_j`` are the solutions of level j with all the levels below solved, too. So ``∇L_j(u_j, x) = 0`` defines ``u_j(x)``, its
Jacobian is the symmetric (and indefinite) Hessian of ``L_j``, and MINRES solves with it. Levels stacked one on another have n, 3n, 7n, 15n unknowns.
The inner products are directional derivatives of ``L_i``, so ``L_j`` is one forward sweep and its gradient one reverse sweep over it.

Source: the construction is this library's; the symmetric system of two levels is the adjoint method's classical KKT system.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax

from bilevax import linear, tree
from bilevax._core import numbers
from bilevax.argmin import attach
from bilevax.base import Bound, Ctx, Hypergradient, InnerState, PyTree
from bilevax.hypergradient.parts import forward, report
from bilevax.multilevel import nested
from bilevax.multilevel.system import System

PRODUCTS = 1000  # most products in one solve, where a level's own solver is not for indefinite systems


class Unknowns(NamedTuple):
    """A level's variable, and for each level inside it that level's own unknowns and their multipliers."""

    y: PyTree
    below: dict[str, tuple[Any, Any]]


def adapted(system: System, name: str) -> Hypergradient:
    """The method of a level that the top level solves: from three nested levels on, implicit differentiation takes the one system."""
    method = system.methods[name]
    if not is_adapted(system, name):
        return method
    return method._replace(vjp=Bound("lagrangian", _vjp, system=system, name=name))


def is_adapted(system: System, name: str) -> bool:
    """Whether the one system takes the place of this level's own."""
    return system.graph[name].depth > 2 and nested.applies_jointly(system, name)


def attached(system: System, name: str, solution: InnerState, given: dict, ctx: Ctx) -> PyTree:
    """The solved variable of a level with its exact derivative in `given`."""
    u = lax.stop_gradient(point(system, name, solution.params, given, ctx))

    def value(u, given, ctx):
        return lagrangian(system, name, u, given, ctx)

    return attach(value, _solver(system, name, u), max_residual=nested.accepted(system.methods[name]))(u, given, ctx).y


def lagrangian(system: System, name: str, u: Unknowns, given: dict, ctx: Ctx):
    """``L_j`` at the unknowns `u` of level `name`."""
    env = {**ctx.batch.rest, **given, name: u.y} | {i: u_i.y for i, (u_i, _) in u.below.items()}
    value = system.objectives[name](env, None, Ctx(ctx.batch.own, ctx.key, ctx.model.mine, inner_step=ctx.batch.inner_step))[0]
    for i, (u_i, multipliers) in u.below.items():
        known, ctx_i = _inside(system, i, env, ctx)
        value += jax.jvp(lambda u_i: lagrangian(system, i, u_i, known, ctx_i), (u_i,), (multipliers,))[1]  # noqa: B023 (called at once)
    return value


def _inside(system: System, name: str, env: dict, ctx: Ctx) -> tuple[dict, Ctx]:
    """What a level inside another is given at `env`."""
    side, feed = nested.inside(system, name, env, ctx.batch)
    model = nested.start_state(system, name, ctx.model.below).model
    return {n: env[n] for n in system.graph[name].total}, nested.hyper_context(side, feed)._replace(model=model)


def point(system: System, name: str, y: PyTree, given: dict, ctx: Ctx) -> Unknowns:
    """The unknowns at a solved `y`: the levels inside solved there, then the multipliers, each after those of the levels that read it."""
    env = {**ctx.batch.rest, **given, name: y}
    below: dict[str, tuple] = {}
    for i in system.graph[name].nested:
        side, feed = nested.inside(system, i, env, ctx.batch)
        known, ctx_i = _inside(system, i, env, ctx)
        solution, _ = side.run(nested.start_state(system, i, ctx.model.below), known, feed)
        env[i] = solution.params
        u_i = point(system, i, solution.params, known, ctx_i._replace(model=solution.model))
        below[i] = (u_i, tree.zeros_like(u_i))
    for i in reversed(system.graph[name].nested):
        u_i, zero = below[i]

        def value(u_i):
            return lagrangian(system, name, Unknowns(y, {**below, i: (u_i, zero)}), given, ctx)  # noqa: B023 (called at once)

        known, ctx_i = _inside(system, i, env, ctx)
        _, hvp = jax.linearize(jax.grad(lambda u: lagrangian(system, i, u, known, ctx_i)), u_i)  # noqa: B023
        right = tree.neg(jax.grad(value)(u_i))
        below[i] = (u_i, _solver(system, i, u_i)(hvp, right, zero)[0])
    return Unknowns(y, below)


def _solver(system: System, name: str, u: Unknowns):
    """MINRES to the tolerance of the level's own method; a level with none inside keeps that method's solver."""
    given = system.methods[name].linear
    assert given is not None  # what `applies_jointly` asked for
    if not u.below or given.indefinite:
        return given
    return linear.minres(PRODUCTS, 100 * numbers.rounding_unit(u) if given.tol is None else given.tol)


def products(system: System, name: str) -> int | None:
    """The most products with the joint matrix of a level in one solve."""
    given = system.methods[name].linear
    assert given is not None  # what `applies_jointly` asked for
    return given.products if not system.graph[name].nested or given.indefinite else PRODUCTS


def _vjp(lower, inner_state, outer, feed, ctx, state, *, system: System, name: str):
    solution, info = forward(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)

    def pullback(w):
        u = lax.stop_gradient(point(system, name, solution.params, outer, ctx))

        def gradients(u):
            return jax.grad(lambda u, outer: lagrangian(system, name, u, outer, ctx), (0, 1))(u, outer)

        (stationarity, _), products = jax.linearize(gradients, u)
        right = tree.zeros_like(u)._replace(y=w)
        q, linear_info = _solver(system, name, u)(lambda v: products(v)[0], right, tree.zeros_like(u))
        mixed = products(q)[1]
        found = report(info, linear_info, system.methods[name].max_residual, inner_grad_norm=tree.norm(stationarity), cotangent_norm=tree.norm(w))
        return tree.neg(mixed), None, state, found

    return solution, pullback
