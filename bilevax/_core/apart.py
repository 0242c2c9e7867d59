"""Computations of their own: a compiler that gives back what one pass over a model has kept before
the next begins.

A pass forward and back through a model whose layers are a loop keeps its activations in buffers
that start as zeros. On GPUs the compiler makes all zeros of one shape in one kernel, and so holds
the buffers of all passes of a step from the first to the last of them: three passes took 2.9 times
the memory of one. What stands in a branch is spared that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any

LARGE = (
    2**24
)  # bytes of parameters from which on the host's one look at a predicate is nothing beside a pass


def large(params: PyTree) -> bool:
    """Whether a pass over these parameters is worth a branch."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) >= LARGE


def apart(fn: Callable[..., Any], params: PyTree, *args: Any) -> Any:
    """``fn(params, *args)``, in a branch of its own where `params` are large."""
    if not large(params):
        return fn(params, *args)
    shapes = jax.eval_shape(fn, params, *args)
    if not _plain(shapes):
        return fn(params, *args)

    def never(*_):
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return lax.cond(lax.optimization_barrier(jnp.asarray(True)), fn, never, params, *args)


def _plain(shapes: PyTree) -> bool:
    """Whether zeros of these shapes are of the same type: no keys, no axis of a mesh that types
    speak of.
    """
    automatic = all(
        kind == jax.sharding.AxisType.Auto for kind in jax.sharding.get_abstract_mesh().axis_types
    )
    return automatic and not any(
        jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in jax.tree.leaves(shapes)
    )


__all__ = ["LARGE", "apart", "large"]
