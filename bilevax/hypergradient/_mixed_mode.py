"""The mixed-mode rule: an objective whose gradient is differentiated forward over reverse, whoever asks for that gradient.

Reverse mode through a gradient keeps what the gradient's own forward and backward pass computed and walks it a second time. The cotangent `u` of
``∇_y g`` needs only ``(∇²_yy g·u, ∇²_xy g·u)``, a directional derivative of ``∇_(y,x) g``: one forward sweep beside the gradient,
which keeps nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core.jaxpr import evaluate
from bilevax.base import Bound, Ctx, Objective, PyTree


def mixed(objective: Objective) -> Objective:
    """`objective` with the rule attached: its value and its first derivatives are the same numbers.

    ``jax.grad`` and ``jax.value_and_grad`` of it with respect to the inner parameters are picked up. Any further derivative of that is exact;
    forward mode of it (``jax.jvp`` through the solve) is refused by JAX, a custom reverse rule having none.
    """
    # All flags on, so that batch, model state and key reach the rule as arguments, whatever of them the user's function reads.
    return Objective(Bound(objective.name, _evaluate, objective=objective), True, True, True, indexed=True)


def _evaluate(inner, outer, batch, model, *, key, inner_step, objective):
    ctx = Ctx(batch, key, model, inner_step=inner_step)
    # A fresh function each time: JAX remembers traces by function, and a remembered one may have captured tracers of a trace that has ended.
    closed, shape = jax.make_jaxpr(lambda inner, outer, ctx: objective(inner, outer, ctx), return_shape=True)(inner, outer, ctx)
    rule = _Static(closed.jaxpr, jax.tree.structure(shape))
    # What the user's function captured (closed-over arrays, bound settings) are operands here, so it may be traced and differentiated.
    return _objective(rule, inner, (outer, ctx, list(closed.consts)))


class _Static(NamedTuple):
    """An objective with nothing captured, hashed by the identity of its jaxpr."""

    jaxpr: Any
    structure: Any

    def __call__(self, inner, rest):
        outer, ctx, captured = rest
        out = evaluate(self.jaxpr, captured, jax.tree.leaves((inner, outer, ctx)))
        return jax.tree.unflatten(self.structure, out)


@jax.tree_util.register_static
class _Flags(tuple):
    """Which leaves are being differentiated; rides along with the residuals without becoming an array."""


def _is_zero(a) -> bool:
    return isinstance(a, jax.custom_derivatives.SymbolicZero)


def _unwrap(primals) -> tuple[PyTree, _Flags]:
    """Values and flags of what a forward rule is given under ``symbolic_zeros``."""
    is_primal = lambda a: isinstance(a, jax.custom_derivatives.CustomVJPPrimal)  # by type: an nnx.Variable answers hasattr for its value
    wrapped = jax.tree.leaves(primals, is_leaf=is_primal)
    return jax.tree.map(lambda a: a.value, primals, is_leaf=is_primal), _Flags(a.perturbed for a in wrapped)


def _choose(flags, a: PyTree) -> list:
    return [leaf for leaf, flag in zip(jax.tree.leaves(a), flags, strict=True) if flag]


def _place(flags, like: PyTree, chosen: list) -> PyTree:
    """`chosen` at the flagged leaves of `like`, None (a zero cotangent) at the others."""
    values = iter(chosen)
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten([next(values) if flag else None for flag, _ in zip(flags, leaves, strict=True)])


def _moving(rule: _Static, operands: PyTree, flags):
    """The objective as a function of its flagged leaves only; and those leaves."""
    leaves, treedef = jax.tree.flatten(operands)

    def fn(moved: list):
        values = iter(moved)
        return rule(*treedef.unflatten([next(values) if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)]))

    return fn, _choose(flags, operands)


# ---- the gradient: (inner, rest) -> ((value, (model, aux)), ∇_inner value)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(rule, inner, rest):
    return jax.value_and_grad(rule, has_aux=True)(inner, rest)


def _gradient_fwd(rule, inner, rest):
    (inner, rest), flags = _unwrap((inner, rest))
    return jax.value_and_grad(rule, has_aux=True)(inner, rest), (inner, rest, flags)


def _gradient_bwd(rule, residuals, cotangents):
    inner, rest, flags = residuals
    (value_cotangent, extras_cotangent), u = cotangents
    count = len(jax.tree.leaves(inner))

    def gradients(inner):  # with respect to all that moves, the inner parameters included
        fn, moved = _moving(rule, (inner, rest), flags)
        return jax.grad(fn, has_aux=True)(moved)[0]

    direction = jax.tree.leaves(u, is_leaf=_is_zero)
    assert len(direction) == count
    if all(map(_is_zero, direction)):
        total, first = None, (None if _is_zero(value_cotangent) else gradients(inner))
    else:
        u = jax.tree.map(_instantiate, u, is_leaf=_is_zero)
        first, total = jax.jvp(gradients, (inner,), (u,))
    if not _is_zero(value_cotangent):  # the gradient itself comes free with its directional derivative
        scaled = tree.scale(value_cotangent, first)
        total = scaled if total is None else tree.add(total, scaled)
    if not all(map(_is_zero, jax.tree.leaves(extras_cotangent, is_leaf=_is_zero))):
        extra = _pull_extras(rule, inner, rest, flags, extras_cotangent)
        total = extra if total is None else tree.add(total, extra)
    if total is None:
        return None, None
    return _place(flags, (inner, rest), total)


_gradient.defvjp(_gradient_fwd, _gradient_bwd, symbolic_zeros=True)


def _instantiate(a):
    if not _is_zero(a):
        return a
    return jnp.zeros(a.shape, a.dtype)


def _pull_extras(rule, inner, rest, flags, cotangent):
    """Reverse mode through model state and aux: what a stateful objective hands to its next step."""
    fn, moved = _moving(rule, (inner, rest), flags)
    keep = [not _is_zero(c) and c.dtype != jax.dtypes.float0 for c in jax.tree.leaves(cotangent, is_leaf=_is_zero)]
    _, pull = jax.vjp(lambda moved: _choose(keep, fn(moved)[1]), moved)
    return pull([c for c, k in zip(jax.tree.leaves(cotangent, is_leaf=_is_zero), keep, strict=True) if k])[0]


# ---- the objective, whose own reverse rule calls `_gradient`


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _objective(rule, inner, rest):
    return rule(inner, rest)


def _objective_fwd(rule, inner, rest):
    (inner, rest), flags = _unwrap((inner, rest))
    out, gradient = _gradient(rule, inner, rest)
    return out, (gradient, inner, rest, flags)


def _objective_bwd(rule, residuals, cotangents):
    gradient, inner, rest, flags = residuals
    value_cotangent, extras_cotangent = cotangents
    count = len(jax.tree.leaves(inner))
    extras = not all(map(_is_zero, jax.tree.leaves(extras_cotangent, is_leaf=_is_zero)))
    if not extras and not any(flags[count:]):  # what solvers ask for: the value, with respect to the inner parameters
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
