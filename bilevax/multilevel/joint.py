r"""Three or more nested levels as one symmetric system, in place of linear solves inside linear
solves.

The total objective of a level j, with levels i nested in it, has the Lagrangian

.. math::
    L_j(u_j) = f_j + \sum_i \langle \mu_i, \nabla_{u_i} L_i(u_i) \rangle, \qquad
    u_j = (y_j, (u_i, \mu_i)_i)

whose stationary points in ``u_j`` are the solutions of level j with all the levels below solved,
too. So ``∇L_j(u_j, x) = 0`` defines ``u_j(x)``, its Jacobian is the symmetric (and indefinite)
Hessian of ``L_j``, and MINRES solves with it. Levels stacked one on another have n, 3n, 7n, 15n
unknowns. The inner products are directional derivatives of ``L_i``, so ``L_j`` is one forward sweep
and its gradient one reverse sweep over it.

Source: the construction is this library's; the symmetric system of two levels is the adjoint
method's classical KKT system.
"""

from __future__ import annotations

import jax
from jax import lax

from bilevax import tree
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Lower, Pullback, PyTree
from bilevax.hypergradient.parts import forward, report
from bilevax.multilevel import nested
from bilevax.multilevel.system import System
from bilevax.results import first


def adapted(system: System, name: str) -> Hypergradient:
    """The method of a level that the top level solves: from three nested levels on, implicit
    differentiation takes the one system.
    """
    method = system.methods[name]
    if not is_adapted(system, name):
        return method
    return method._replace(vjp=Bound("lagrangian", _vjp, system=system, name=name))


def is_adapted(system: System, name: str) -> bool:
    """Whether the one system takes the place of this level's own."""
    return system.graph[name].depth > 2 and nested.applies_jointly(system, name)


def products(system: System, name: str) -> int | None:
    """The most products with the joint matrix of a level in one solve."""
    given = system.methods[name].linear
    assert given is not None  # what `applies_jointly` asked for
    return given.products if not system.graph[name].nested or given.indefinite else nested.PRODUCTS


def _vjp(
    lower: Lower,
    inner_state: InnerState,
    outer: PyTree,
    feed: Feed,
    ctx: Ctx,
    state: PyTree,
    *,
    system: System,
    name: str,
) -> tuple[InnerState, Pullback]:
    solution, info = forward(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)

    def pullback(w):
        u, said = lax.stop_gradient(nested.point(system, name, solution.params, outer, ctx))

        def gradients(u):
            return jax.grad(
                lambda u, outer: nested.lagrangian(system, name, u, outer, ctx), (0, 1)
            )(u, outer)

        (stationarity, _), products = jax.linearize(gradients, u)
        right = tree.zeros_like(u)._replace(y=w)
        q, linear_info = nested.joint_solver(system, name, u)(
            lambda v: products(v)[0], right, tree.zeros_like(u)
        )
        mixed = products(q)[1]
        found = report(
            info,
            linear_info,
            system.methods[name].max_residual,
            w,
            inner_grad_norm=tree.norm(stationarity),
            cotangent_norm=tree.norm(w),
        )
        found |= {
            "multiplier_residual": said.residual,
            "code": first(found["code"], said.code),
            "warnings": found["warnings"] | said.warnings,
        }
        return tree.neg(mixed), None, state, found

    return solution, pullback
