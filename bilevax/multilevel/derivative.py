"""The derivative of a multilevel estimate: of its value its own gradient, of that the exact one or
a refusal.

As in two levels (`bilevax._derivative`), in the top level's variable. In batches and in what
objectives capture a derivative is refused, and where a level that sees its start meets one that
does not, in the starts.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import tree
from bilevax._core.pullback import known_backwards
from bilevax._core.settings import name_of
from bilevax.base import Feed, InnerState, PyTree, join, split
from bilevax.data.draws import draw_number
from bilevax.multilevel import nested
from bilevax.multilevel.sweep import Sweep, sweep
from bilevax.multilevel.system import System


class _Given(NamedTuple):
    states: dict[str, InnerState]
    methods: dict[str, PyTree]


class _Data(NamedTuple):
    system: tuple[Any, ...]  # numbers, and what the objectives capture
    feeds: dict[str, Feed]


def differentiable(
    system: System,
    states: dict[str, InnerState],
    methods: dict[str, PyTree],
    outer: PyTree,
    feeds: dict[str, Feed],
) -> Sweep:
    """`sweep`, with the derivatives above."""
    inside = [system.methods[name] for name in system.graph.top.nested]
    if all(method.order > 1 and method.linear is None for method in inside):
        return sweep(system, states, methods, outer, feeds)
    static, dynamic = split(system)
    return _swept(static, _Given(states, methods), _Data(dynamic, feeds), outer)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _swept(static: Any, given: _Given, data: _Data, outer: PyTree) -> Sweep:
    return sweep(join(static, data.system), given.states, given.methods, outer, data.feeds)


def _swept_jvp(static: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    given, data, outer = primals
    system = join(static, data.system)
    out = _swept(static, given, data, outer)
    still = jax.tree.map(_still, out)
    moves = jax.tree.leaves(tangents[2], is_leaf=_is_zero)
    inside = {name: system.methods[name] for name in system.graph.top.nested}
    if _moves(tangents[1]):
        raise ValueError(
            "value_and_multilevel_grad: got a derivative in a batch or in an array that an "
            "objective captures; expected one in params. "
            "Try making that array part of the top level's variable."
        )
    seeing = [name for name, method in inside.items() if method.sees_init]
    if seeing and _moves(tangents[0].states):
        raise ValueError(
            "value_and_multilevel_grad: got a derivative in the levels' starting points, which "
            f"level {seeing[0]!r} sees and others do not; "
            "expected one in the top level's variable, or hypergradient.unrolled() for all levels."
        )
    if not _moves(tangents[2]):
        return out, still
    direction = [t for t in moves if not _is_zero(t)]
    flags = [not _is_zero(t) for t in moves]
    leaves, structure = jax.tree.flatten(outer)
    grads = [g for g, flag in zip(jax.tree.leaves(out.grad), flags, strict=True) if flag]
    value = tree.dot(grads, direction).astype(out.value.dtype)

    def gradient(moved):
        values = iter(moved)
        here = structure.unflatten(
            [next(values) if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)]
        )
        return jax.grad(_total(system, out, data.feeds))(here)

    once = [name for name, method in inside.items() if method.order < 2]
    if once:
        grad = known_backwards(
            partial(_refuse, once[0], name_of(inside[once[0]].vjp)), out.grad, (), direction
        )
    else:
        grad = jax.jvp(
            gradient,
            ([leaf for leaf, flag in zip(leaves, flags, strict=True) if flag],),
            (direction,),
        )[1]
    solved = known_backwards(
        _solutions, (_floats(out.solved), _floats(out.states), _floats(out.aux)), (), direction
    )
    parts = [
        tree.combine(moved, tree.partition(zero)[1])
        for moved, zero in zip(solved, (still.solved, still.states, still.aux), strict=True)
    ]
    return out, still._replace(
        value=value, grad=grad, solved=parts[0], states=parts[1], aux=parts[2]
    )


_swept.defjvp(_swept_jvp, symbolic_zeros=True)


def _total(system: System, out: Sweep, feeds: dict[str, Feed]) -> Any:
    """The top objective as a function of its variable, with exact best responses, from the solved
    states on.
    """
    top = system.graph.top
    states = lax.stop_gradient(out.states)
    feed = feeds[top.name]
    ctx = system.draws[top.name](feed, 0)
    rest = {name: state.params for name, state in states.items()}
    data = {name: feed.data for name, feed in feeds.items()}
    batch = nested.LevelBatch(ctx.batch, ctx.key, draw_number(feed, 0), jnp.int32(0), data, rest)
    model = nested.LevelModel(system.still, {name: states[name] for name in top.held})
    total = nested.total_objective(system, top.name)
    return lambda outer: total(outer, {}, ctx._replace(batch=batch, model=model))[0]


def _floats(value: PyTree) -> PyTree:
    return tree.partition(value)[0]


def _refuse(level: str, method: str, residuals: Any, cotangent: PyTree) -> None:
    raise ValueError(
        f"hypergradient of level {level!r}: got {method}, whose derivative is right once only, and "
        "a derivative of Estimate.grad was asked for; "
        "expected methods of order 2 in all levels, such as hypergradient.implicit(linear.cg()). "
        "Estimate.value may be differentiated as it is."
    )


def _solutions(residuals: Any, cotangent: PyTree) -> None:
    raise ValueError(
        "value_and_multilevel_grad: got a derivative of Estimate.inner_params, state or aux; "
        "expected one of value or grad. Try argmin within the "
        "objectives, whose solutions are differentiable functions."
    )


def _moves(tangents: PyTree) -> bool:
    return any(not _is_zero(t) for t in jax.tree.leaves(tangents, is_leaf=_is_zero))


def _is_zero(tangent: PyTree) -> bool:
    return (
        isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        or getattr(tangent, "dtype", None) == jax.dtypes.float0
    )


def _still(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    return (
        jnp.zeros_like(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        else np.zeros(leaf.shape, jax.dtypes.float0)
    )
