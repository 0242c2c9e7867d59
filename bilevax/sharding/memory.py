"""Objectives that need less memory: microbatches, and half precision inside with whole precision
around it.

Rematerialisation is JAX's own: ``jax.checkpoint(objective, policy=...)`` is an objective, and so is
one whose policy offloads to the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax.base import Bound, Objective, PyTree, objective


def accumulate(fn: Callable[..., Any], microbatches: int) -> Objective:
    r"""The objective of a batch as the mean over its microbatches, one in memory at a time.

    .. math::
        f(y, x, B) = \frac{1}{n} \sum_{i=1}^{n} f(y, x, B_i)

    Equal to `fn` on the whole batch, to rounding, where `fn` is a mean over rows; so are all
    derivatives, at both levels, and each of them holds the activations of one microbatch only.
    Microbatch i is every n-th row from the i-th, so that each device of a sharded batch has its
    part in each.

    Args:
      fn: ``(inner_params, outer_params, batch) -> scalar``, or `objective` of one. Its aux is
        stacked, a microbatch each; its model state goes from one to
        the next; its key is split.
      microbatches: how many, at least 1. It divides the rows (on D devices: those of each).

    Returns:
      An `Objective`.

    Raises:
      TypeError, ValueError: for arguments of another kind; in the run, for batches that it does not
        divide.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> loss = bx.sharding.accumulate(lambda y, x, batch: jnp.mean((batch - y) ** 2), 4)
      >>> float(loss.fn(jnp.float32(1.0), None, jnp.arange(8.0)))
      11.5
    """
    one = objective(fn)
    settings = dict(
        fn=one.fn,
        count=numbers.count(microbatches, "microbatches"),
        has_aux=one.has_aux,
        stateful=one.stateful,
    )
    return dataclasses.replace(one, fn=Bound(f"accumulate({one.name})", _accumulated, **settings))


def _accumulated(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    *model: Any,
    fn: Callable[..., Any],
    count: Any,
    has_aux: bool,
    stateful: bool,
    **keyed: Any,
) -> Any:
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(batch)}
    if len(lengths) != 1 or 0 in lengths or (rows := lengths.pop()) % count:
        shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(batch)]
        raise ValueError(
            f"batch: got shapes {shapes} for {count} microbatches; expected one common leading "
            f"axis that {count} divides."
        )
    parts = jax.tree.map(lambda a: a.reshape(rows // count, count, *a.shape[1:]), batch)
    keys: Any = jax.random.split(keyed["key"], count) if keyed else None

    @jax.checkpoint
    def part(inner, outer, model, i):
        rows = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 1, keepdims=False), parts)
        out = fn(inner, outer, rows, *model, **({"key": keys[i]} if keyed else {}))
        if not (has_aux or stateful):
            return out, model, None
        value, rest = out
        if not stateful:
            return value, model, rest
        new, aux = rest if has_aux else (rest, None)
        return value, (new,), aux

    def body(model, i):
        value, model, aux = part(inner, outer, model, i)
        return model, (value, aux)

    model, (values, aux) = lax.scan(body, model, jnp.arange(count, dtype=jnp.int32))
    value = jnp.mean(values)
    if not (has_aux or stateful):
        return value
    return value, ((model[0], aux) if has_aux else model[0]) if stateful else aux


def low_precision(fn: Callable[..., Any], dtype: jnp.dtype = jnp.bfloat16) -> Objective:
    """An objective that computes in a narrower type: parameters, optimizer states, adjoints and
    gradients stay as wide as they are.

    Floating-point leaves of parameters, batch and model state are rounded on the way in, the value
    and the new model state widened on the way out. What is
    differentiated is the rounded computation; sums over parameters (inner products, norms, updates)
    are taken in the parameters' own type.

    Args:
      fn: ``(inner_params, outer_params, batch) -> scalar``, or `objective` of one. Take large sums
        in float32 inside it where they matter.
      dtype: a floating-point dtype.

    Returns:
      An `Objective`.

    Raises:
      TypeError: for another dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> loss = bx.sharding.low_precision(lambda y, x, batch: jnp.mean((batch - y) ** 2))
      >>> value, grad = jax.value_and_grad(loss.fn)(jnp.float32(1.0), None, jnp.arange(4.0))
      >>> value.dtype.name, grad.dtype.name, float(grad)
      ('float32', 'float32', -1.0)
    """
    known = (
        isinstance(dtype, (np.dtype, str))
        or (isinstance(dtype, type) and issubclass(dtype, np.generic))
        or hasattr(dtype, "dtype")
    )
    try:
        floating = (
            known and not hasattr(dtype, "shape") and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        )
    except TypeError:  # a text that names none
        floating = False
    if not floating:
        raise TypeError(
            f"dtype: got {numbers.describe(dtype)}; expected a floating-point dtype. Try "
            "jnp.bfloat16."
        )
    one = objective(fn)
    settings = dict(fn=one.fn, dtype=jnp.dtype(dtype), has_aux=one.has_aux, stateful=one.stateful)
    return dataclasses.replace(one, fn=Bound(f"low_precision({one.name})", _narrow, **settings))


def _narrow(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    *model: Any,
    fn: Callable[..., Any],
    dtype: Any,
    has_aux: bool,
    stateful: bool,
    **keyed: Any,
) -> Any:
    def narrow(value):
        return jax.tree.map(
            lambda a: jnp.asarray(a).astype(dtype) if tree.is_float(a) else a, value
        )

    wide = jnp.dtype(np.float32)
    for leaf in jax.tree.leaves((inner, outer)):
        if tree.is_float(leaf):
            wide = np.promote_types(wide, jnp.result_type(leaf))
    out = fn(narrow(inner), narrow(outer), narrow(batch), *narrow(model), **keyed)
    if not (has_aux or stateful):
        return out.astype(wide)
    value, rest = out
    if stateful:
        new = jax.tree.map(
            lambda a, old: a.astype(jnp.result_type(old)), rest[0] if has_aux else rest, model[0]
        )
        rest = (new, rest[1]) if has_aux else new
    return value.astype(wide), rest


__all__ = ["accumulate", "low_precision"]
