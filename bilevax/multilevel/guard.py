"""First-order methods inside other levels: differentiated once, and refused the second time."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax

from bilevax import tree
from bilevax._core.jaxpr import evaluate
from bilevax.base import Ctx, Feed, InnerState, PyTree, as_cotangent, join, split
from bilevax.multilevel.system import System


def message(system: System, reader: str, name: str) -> str:
    """Why a second derivative through this level's solution is refused."""
    method = system.methods[name]
    upper = f"level {reader!r}" + (
        f" is differentiated by {system.methods[reader]!r}, which needs"
        if reader in system.methods
        else " asks for"
    )
    return (
        f"hypergradient of level {name!r}: got {method!r}, whose derivative is right once only, "
        f"but {upper} a second derivative through it; expected "
        "a method of order 2 below, such as hypergradient.implicit(), or one above that takes "
        "first derivatives only, such as hypergradient.finite_difference(), zeroth_order() or "
        "sama(product='difference')."
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def refused(why: str, value: PyTree, given: PyTree) -> PyTree:
    """`value`, which depends on `given` in a way that must not be differentiated: doing so
    raises.
    """
    return value


@refused.defjvp
def _refuse(why: str, primals: Any, tangents: Any) -> NoReturn:
    raise ValueError(why)


@jax.tree_util.register_static
class _Code(NamedTuple):
    """A pullback with nothing captured; rides along with the residuals without becoming an
    array.
    """

    jaxpr: Any
    structure: Any


def guarded_solve(
    side: Any, method: Any, why: Any, start: Any, given: Any, feed: Feed, ctx: Ctx
) -> InnerState:
    """A level's solution by a method of order 1: its pullback is right once; a derivative of that,
    or a forward one, raises `why`.
    """
    static, dynamic = split((side, method, why))
    return _guarded(static, given, (dynamic, start, feed, ctx))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(static: Any, given: Any, rest: Any) -> Any:
    return _guarded_fwd(static, given, rest)[0]


def _guarded_fwd(static: Any, given: Any, rest: Any) -> Any:
    dynamic, start, feed, ctx = rest
    side, method, why = join(static, dynamic)
    solution, pullback = method.vjp(side, start, given, feed, ctx, method.init(start.params))
    still = tree.zeros_like(tree.partition(solution.model)[0])
    closed, shape = jax.make_jaxpr(
        lambda w: pullback(as_cotangent(method, w, still))[0], return_shape=True
    )(solution.params)
    residuals = (closed.consts, _Code(closed.jaxpr, jax.tree.structure(shape)), given, rest)
    return refused(why, solution, given), residuals


def _guarded_bwd(static: Any, residuals: Any, cotangent: PyTree) -> Any:
    captured, code, given, rest = residuals
    _, _, why = join(static, rest[0])
    out = evaluate(code.jaxpr, captured, jax.tree.leaves(cotangent.params))
    return refused(why, jax.tree.unflatten(code.structure, out), (given, cotangent.params)), None


_guarded.defvjp(_guarded_fwd, _guarded_bwd)
