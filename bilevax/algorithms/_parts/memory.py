"""Memories that reduce the variance of stochastic directions: momentum, STORM, SAGA, SARAH and
PAGE. Pure functions on pytrees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax.base import PyTree


def momentum(memory: PyTree, new: PyTree, weight: Any) -> PyTree:
    """Moving average ``(1 − θ) d + θ D``."""
    return tree.axpy(weight, tree.sub(new, memory), memory)


def storm(memory: PyTree, new: PyTree, old: PyTree, weight: Any) -> PyTree:
    """``D(new) + (1 − θ)(d − D(old))``, both D on one batch: a moving average whose bias is
    corrected.

    Source: Cutkosky and Orabona, "Momentum-based variance reduction in non-convex SGD" (NeurIPS
    2019).
    """
    return tree.axpy(1 - weight, tree.sub(memory, old), new)


def sarah(memory: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """``d + D(new) − D(old)``, both D on one batch: exact differences from an exact start, which
    SARAH takes every period and PAGE by chance.

    Source: Nguyen et al., "SARAH" (ICML 2017); Li et al., "PAGE" (ICML 2021).
    """
    return tree.add(memory, tree.sub(new, old))


class Saga(NamedTuple):
    """The last evaluation on each batch (a leading axis on each leaf), and their mean."""

    table: PyTree
    mean: PyTree


def saga_init(like: PyTree, num_batches: int) -> Saga:
    """A table of zeros: the correction is unbiased from any table."""
    return Saga(
        jax.tree.map(lambda a: jnp.zeros((num_batches, *a.shape), a.dtype), like),
        tree.zeros_like(like),
    )


def saga(memory: Saga, new: PyTree, index: Any) -> tuple[PyTree, PyTree]:
    """``D_i(new) − table_i + mean``, and the change ``D_i(new) − table_i``.

    Source: Defazio, Bach and Lacoste-Julien, "SAGA" (NeurIPS 2014).
    """
    change = jax.tree.map(
        lambda n, t: n - lax.dynamic_index_in_dim(t, index, keepdims=False), new, memory.table
    )
    return tree.add(change, memory.mean), change


def saga_write(memory: Saga, new: PyTree, change: PyTree, index: Any, keep: Any) -> Saga:
    """The memory with ``table_i = D_i(new)``, or as it was where not `keep`: one row is written,
    and no table copied.
    """
    size = jax.tree.leaves(memory.table)[0].shape[0]
    row = jax.tree.map(
        lambda n, t: jnp.where(keep, n, lax.dynamic_index_in_dim(t, index, keepdims=False)),
        new,
        memory.table,
    )
    table = jax.tree.map(
        lambda t, n: lax.dynamic_update_index_in_dim(t, n, index, 0), memory.table, row
    )
    return Saga(table, tree.where(keep, tree.axpy(1 / size, change, memory.mean), memory.mean))
