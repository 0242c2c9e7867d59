"""Traced arrays that a user's function captures, as values: only as such can they be
differentiated, batched or refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from bilevax._core.jaxpr import evaluate
from bilevax._core.settings import Bound
from bilevax.base import Ctx, Objective, PyTree


def hoisted(objective: Objective, inner: PyTree, outer: PyTree, ctx: Ctx) -> Objective:
    """`objective` with the traced arrays that its function captures bound to it, found at these
    arguments or their shapes.

    Where nothing traced is captured, it is `objective` itself.
    """
    args, kwargs = objective.arguments(inner, outer, ctx)
    found = _traced(_constants(objective.fn, args, kwargs))
    if found:  # JAX remembers the trace of a function, perhaps of a trace that has ended
        found = _traced(_constants(_anew(objective.fn), args, kwargs))
    if not found:
        return objective
    fn = Bound(
        objective.name,
        _with_captured,
        fn=objective.fn,
        ids=tuple(found),
        captured=tuple(found.values()),
    )
    return dataclasses.replace(objective, fn=fn)


def _traced(constants: list[Any]) -> dict[int, Any]:
    return {id(const): const for const in constants if isinstance(const, jax.core.Tracer)}


def _constants(fn: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """What a function captures. JAX remembers it by the user's own, which a second call of a driver
    feels.
    """
    try:
        hash(fn)
    except TypeError:
        fn = _anew(fn)
    return jax.make_jaxpr(fn)(*args, **kwargs).consts


def _anew(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, of which JAX remembers nothing."""
    return lambda *args, **kwargs: fn(*args, **kwargs)


def _with_captured(
    *args: Any, fn: Callable[..., Any], ids: Any, captured: Any, **kwargs: Any
) -> Any:
    closed, shape = jax.make_jaxpr(lambda args, kwargs: fn(*args, **kwargs), return_shape=True)(
        args, kwargs
    )
    given = dict(zip(ids, captured, strict=True))
    consts = [given.get(id(const), const) for const in closed.consts]
    return jax.tree.unflatten(
        jax.tree.structure(shape), evaluate(closed.jaxpr, consts, jax.tree.leaves((args, kwargs)))
    )
