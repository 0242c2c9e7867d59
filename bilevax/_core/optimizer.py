"""Optax transformations as the library runs them: any of them, under strict promotion, with states
that keep their dtypes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bilevax import tree
from bilevax._core.settings import parameters
from bilevax._core.types import PyTree


def _lenient() -> Any:
    """Optax raises decays to integer counts and adds Python-scalar state, which strict promotion
    forbids; the user's own code stays strict.
    """
    return jax.numpy_dtype_promotion("standard")


def init(opt: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The first state, canonical."""
    with _lenient():
        return tree.strong(opt.init(params))


def update(
    opt: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree, **extra: Any
) -> tuple[PyTree, PyTree]:
    """``opt.update``, given those of `extra` (``value``, ``grad``, ``value_fn``, ``grad_fn``) that
    it accepts.
    """
    with _lenient():
        updates, new = opt.update(grads, state, params, **accepted(opt.update, extra))
    return updates, jax.tree.map(_like, new, state)


def accepted(fn: Callable[..., Any], extra: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of `extra` that `fn` has parameters for."""
    named = parameters(fn)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values())
    # What takes all hands them on, and a line search complains of what it does not know.
    return {
        name: value
        for name, value in extra.items()
        if name in named or (takes_all and name != "grad_fn")
    }


def leading(opt: optax.GradientTransformation) -> optax.GradientTransformation:
    """Of an ``optax.MultiSteps`` the update that accumulation leads to, on its state; any other as
    it is.
    """
    owner = getattr(opt.update, "__self__", opt)
    if not isinstance(owner, optax.MultiSteps):
        return opt
    inner = owner.inner_opt if hasattr(owner, "inner_opt") else owner._opt

    def lead(grads, state, params=None, **extra):
        updates, moved = update(inner, grads, state.inner_opt_state, params, **extra)
        return updates, state._replace(inner_opt_state=moved)

    return optax.GradientTransformationExtraArgs(owner.init, lead)


def apply(params: PyTree, updates: PyTree) -> PyTree:
    """``params + updates``, each leaf keeping its dtype."""
    return jax.tree.map(lambda p, u: p + jnp.asarray(u).astype(p.dtype), params, updates)


def moved(
    opt: optax.GradientTransformation,
    direction: PyTree,
    state: PyTree,
    params: PyTree,
    project: Callable[[PyTree], PyTree] | None = None,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """How each step of a level ends: updated along `direction`, applied, put into the feasible set;
    the parameters, and the optimizer's state.
    """
    updates, state = update(opt, direction, state, params, **extra)
    params = apply(params, updates)
    return params if project is None else project(params), state


def _like(new: Any, old: Any) -> Any:
    """State keeps its dtypes from step to step: a loop's carry may not drift to a wider or a weak
    type.
    """
    new = jnp.asarray(new)
    return (
        new
        if new.dtype == old.dtype and not new.weak_type
        else lax.convert_element_type(new, old.dtype)
    )
