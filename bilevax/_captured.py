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
from bilevax.base import Objective


def hoisted(objective: Objective, *args: Any) -> Objective:
    """`objective` with the traced arrays that its function captures bound to it; `args` are values
    or shapes of its arguments.

    Where nothing traced is captured, it is `objective` itself.
    """
    found = {
        id(const): const
        for const in _constants(objective, *args)
        if isinstance(const, jax.core.Tracer)
    }
    if found:  # JAX remembers the trace of a function, perhaps of a trace that has ended
        again = jax.make_jaxpr(lambda *args: objective(*args))(*args).consts
        found = {id(const): const for const in again if isinstance(const, jax.core.Tracer)}
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


def _constants(objective: Objective, *args: Any) -> list[Any]:
    try:
        hash(objective)
    except TypeError:
        return jax.make_jaxpr(lambda *args: objective(*args))(*args).consts
    return jax.make_jaxpr(objective)(*args).consts


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
