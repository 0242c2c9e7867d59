"""Optax transformations as the library runs them: any of them, under strict promotion, with states that keep their dtypes."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bilevax import tree
from bilevax._core.settings import parameters
from bilevax._core.types import PyTree


def _lenient():
    """Optax raises decays to integer counts and adds Python-scalar state, which strict promotion forbids; the user's own code stays strict."""
    return jax.numpy_dtype_promotion("standard")


def init(opt: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The first state, canonical."""
    with _lenient():
        return tree.strong(opt.init(params))


def update(opt: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree, **extra) -> tuple[PyTree, PyTree]:
    """``opt.update``; what a transformation does not ask for among `extra` (``value``, ``grad``, ``value_fn``) is dropped."""
    with _lenient():
        updates, new = optax.with_extra_args_support(opt).update(grads, state, params, **extra)
    return updates, jax.tree.map(_like, new, state)


def accepted(update: Callable, extra: dict) -> dict:
    """What of `extra` an inner solver's update takes."""
    taken = parameters(update)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    return {key: value for key, value in extra.items() if takes_all or key in taken}


def apply(params: PyTree, updates: PyTree) -> PyTree:
    """``params + updates``, each leaf keeping its dtype."""
    return jax.tree.map(lambda p, u: p + jnp.asarray(u).astype(p.dtype), params, updates)


def _like(new, old):
    """State keeps its dtypes from step to step: a loop's carry may not drift to a wider or a weak type."""
    new = jnp.asarray(new)
    return new if new.dtype == old.dtype and not new.weak_type else lax.convert_element_type(new, old.dtype)
