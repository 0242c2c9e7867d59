"""The mixed-mode rule: an objective whose gradient is differentiated forward over reverse, whoever
asks for that gradient.

Reverse mode through a gradient keeps what the gradient's own forward and backward pass computed and
walks it a second time. The cotangent `u` of ``∇_y g`` needs only ``(∇²_yy g·u, ∇²_xy g·u)``, a
directional derivative of ``∇_(y,x) g``: one forward sweep beside the gradient, which keeps nothing.

The gradient that a step takes is named, so that whoever runs the step again can keep it. It is then
an operand of the optimizer's update on the way back and not taken a second time: the compiler does
not merge it with the one inside the directional derivative.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bilevax import tree
from bilevax._core.jaxpr import evaluate
from bilevax.base import Bound, Ctx, Objective, PyTree

GRADIENT = "bilevax_inner_gradient"  # what a rematerialisation policy may save


def mixed(objective: Objective) -> Objective:
    """`objective` with the rule attached: its value and its first derivatives are the same numbers.

    ``jax.grad`` and ``jax.value_and_grad`` of it with respect to the inner parameters are picked
    up. Any further derivative of that is exact; forward mode of it (``jax.jvp`` through the solve)
    is refused by JAX, a custom reverse rule having none.
    """
    # All flags on, so that batch, model state and key reach the rule as arguments, whatever of them
    # the user's function reads.
    return Objective(
        Bound(objective.name, _evaluate, objective=objective), True, True, True, indexed=True
    )


def _evaluate(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    model: PyTree,
    *,
    key: Any,
    inner_step: Any,
    objective: Objective,
) -> Any:
    ctx = Ctx(batch, key, model, inner_step=inner_step)
    # A fresh function each time: JAX remembers traces by function, and a remembered one may have
    # captured tracers of a trace that has ended.
    closed, shape = jax.make_jaxpr(
        lambda inner, outer, ctx: objective(inner, outer, ctx), return_shape=True
    )(inner, outer, ctx)
    rule = _Static(closed.jaxpr, jax.tree.structure(shape))
    # What the user's function captured (closed-over arrays, bound settings) are operands here, so
    # it may be traced and differentiated.
    return _objective(rule, inner, (outer, ctx, list(closed.consts)))


class _Static(NamedTuple):
    """An objective with nothing captured, hashed by the identity of its jaxpr."""

    jaxpr: Any
    structure: Any

    def __call__(self, inner: PyTree, rest: Any) -> Any:
        outer, ctx, captured = rest
        out = evaluate(self.jaxpr, captured, jax.tree.leaves((inner, outer, ctx)))
        return jax.tree.unflatten(self.structure, out)


@jax.tree_util.register_static
class _Flags(tuple[Any, ...]):
    """Which leaves are being differentiated; rides along with the residuals without becoming an
    array.
    """


def _is_zero(a: Any) -> bool:
    return isinstance(a, jax.custom_derivatives.SymbolicZero)


def _unwrap(primals: Any) -> tuple[PyTree, _Flags]:
    """Values and flags of what a forward rule is given under ``symbolic_zeros``."""
    is_primal = lambda a: isinstance(
        a, jax.custom_derivatives.CustomVJPPrimal
    )  # by type: an nnx.Variable answers hasattr for its value
    wrapped = jax.tree.leaves(primals, is_leaf=is_primal)
    return jax.tree.map(lambda a: a.value, primals, is_leaf=is_primal), _Flags(
        a.perturbed for a in wrapped
    )


def _choose(flags: Any, a: PyTree) -> list[Any]:
    return [leaf for leaf, flag in zip(jax.tree.leaves(a), flags, strict=True) if flag]


def _place(flags: Any, like: PyTree, chosen: list[Any]) -> PyTree:
    """`chosen` at the flagged leaves of `like`, None (a zero cotangent) at the others."""
    values = iter(chosen)
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        [next(values) if flag else None for flag, _ in zip(flags, leaves, strict=True)]
    )


def _moving(rule: _Static, operands: PyTree, flags: Any) -> Any:
    """The objective as a function of its flagged leaves only; and those leaves."""
    leaves, treedef = jax.tree.flatten(operands)

    def fn(moved: list[Any]):
        values = iter(moved)
        return rule(
            *treedef.unflatten(
                [next(values) if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)]
            )
        )

    return fn, _choose(flags, operands)


# ---- the gradient: (inner, rest) -> ((value, (model, aux)), ∇_inner value)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(rule: Any, inner: PyTree, rest: Any) -> Any:
    return jax.value_and_grad(rule, has_aux=True)(inner, rest)


def _gradient_fwd(rule: Any, inner: PyTree, rest: Any) -> Any:
    (inner, rest), flags = _unwrap((inner, rest))
    out, gradient = jax.value_and_grad(rule, has_aux=True)(inner, rest)
    return (out, checkpoint_name(gradient, GRADIENT)), (inner, rest, flags)


def _gradient_bwd(rule: Any, residuals: Any, cotangents: Any) -> Any:
    inner, rest, flags = residuals
    (value_cotangent, extras_cotangent), u = cotangents
    count = len(jax.tree.leaves(inner))

    direction = jax.tree.leaves(u, is_leaf=_is_zero)
    extras = not all(map(_is_zero, jax.tree.leaves(extras_cotangent, is_leaf=_is_zero)))
    assert len(direction) == count
    if all(map(_is_zero, direction)):
        fn, moved = _moving(rule, (inner, rest), flags)
        total, first = (
            None,
            (None if _is_zero(value_cotangent) else jax.grad(fn, has_aux=True)(moved)[0]),
        )
    else:
        u = jax.tree.map(_instantiate, u, is_leaf=_is_zero)
        first, total = _directional(rule, inner, rest, flags, u, extras_cotangent)
        extras = False  # pulled along
    if not _is_zero(
        value_cotangent
    ):  # the gradient itself comes free with its directional derivative
        scaled = tree.scale(value_cotangent, first)
        total = scaled if total is None else tree.add(total, scaled)
    if extras:
        extra = _pull_extras(rule, inner, rest, flags, extras_cotangent)
        total = extra if total is None else tree.add(total, extra)
    if total is None:
        return None, None
    return _place(flags, (inner, rest), total)


_gradient.defvjp(_gradient_fwd, _gradient_bwd, symbolic_zeros=True)


def _directional(
    rule: Any, inner: PyTree, rest: Any, flags: Any, u: Any, extras_cotangent: Any
) -> Any:
    """``∇ g`` with respect to all that moves, the inner parameters included, and its derivative
    along `u`.

    The pullback of model state and aux is added to the latter: they are weighed into the value by
    an amount that grows from zero, so that one forward sweep gives both.
    """
    keep, cotangent = _moved_extras(extras_cotangent)

    def gradients(inner, amount):
        fn, moved = _moving(rule, (inner, rest), flags)

        def weighed(moved):
            value, extras = fn(moved)
            return (
                value + amount * tree.dot(_choose(keep, extras), cotangent).astype(value.dtype)
                if cotangent
                else value
            )

        return jax.grad(weighed)(moved)

    amount = jnp.zeros((), rule.jaxpr.outvars[0].aval.dtype)
    return jax.jvp(gradients, (inner, amount), (u, jnp.ones_like(amount)))


def _moved_extras(cotangent: PyTree) -> Any:
    """Which leaves of model state and aux have a cotangent, and those cotangents."""
    leaves = jax.tree.leaves(cotangent, is_leaf=_is_zero)
    keep = [not _is_zero(c) and c.dtype != jax.dtypes.float0 for c in leaves]
    return keep, [c for c, k in zip(leaves, keep, strict=True) if k]


def _instantiate(a: Any) -> Any:
    if not _is_zero(a):
        return a
    return jnp.zeros(a.shape, a.dtype)


def _pull_extras(rule: Any, inner: PyTree, rest: Any, flags: Any, cotangent: PyTree) -> Any:
    """Reverse mode through model state and aux: what a stateful objective hands to its next
    step.
    """
    fn, moved = _moving(rule, (inner, rest), flags)
    keep, chosen = _moved_extras(cotangent)
    _, pull = jax.vjp(lambda moved: _choose(keep, fn(moved)[1]), moved)
    return pull(chosen)[0]


# ---- the objective, whose own reverse rule calls `_gradient`


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _objective(rule: Any, inner: PyTree, rest: Any) -> Any:
    return rule(inner, rest)


def _objective_fwd(rule: Any, inner: PyTree, rest: Any) -> Any:
    (inner, rest), flags = _unwrap((inner, rest))
    out, gradient = _gradient(rule, inner, rest)
    return out, (gradient, inner, rest, flags)


def _objective_bwd(rule: Any, residuals: Any, cotangents: Any) -> Any:
    gradient, inner, rest, flags = residuals
    value_cotangent, extras_cotangent = cotangents
    count = len(jax.tree.leaves(inner))
    extras = not all(map(_is_zero, jax.tree.leaves(extras_cotangent, is_leaf=_is_zero)))
    if not extras and not any(
        flags[count:]
    ):  # what solvers ask for: the value, with respect to the inner parameters
        if _is_zero(value_cotangent):
            return None, None
        return tree.scale(value_cotangent, gradient), None
    fn, moved = _moving(rule, (inner, rest), flags)  # anything else: ordinary reverse mode
    total = [jnp.zeros_like(leaf) for leaf in moved]
    if not _is_zero(value_cotangent):
        total = tree.add(total, tree.scale(value_cotangent, jax.grad(fn, has_aux=True)(moved)[0]))
    if extras:
        total = tree.add(total, _pull_extras(rule, inner, rest, flags, extras_cotangent))
    return _place(flags, (inner, rest), total)


_objective.defvjp(_objective_fwd, _objective_bwd, symbolic_zeros=True)
