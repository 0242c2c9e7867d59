"""Traced arrays that a user's function captures, as values: only as such can they be
differentiated, batched or refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

from bilevax._core.jaxpr import evaluate
from bilevax._core.settings import Bound
from bilevax.base import Objective


def hoisted(objective: Objective, *args: Any) -> Objective:
    """`objective` with the traced arrays that its function captures bound to it; `args` are values
    or shapes of its arguments.

    Where nothing traced is captured, it is `objective` itself.
    """
    if not _in_a_trace():  # nothing can be traced, and a second call of a driver traces nothing
        return objective
    # of a function of its own: JAX remembers the trace of the user's, perhaps of a trace that has
    # ended, or of one before what is captured was another value
    consts = jax.make_jaxpr(lambda *args: objective(*args))(*args).consts
    found = {id(const): const for const in consts if isinstance(const, jax.core.Tracer)}
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


def _in_a_trace() -> bool:
    state = get_opaque_trace_state()
    with jax.core.eval_context():
        return bool(state != get_opaque_trace_state())


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
