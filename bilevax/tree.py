"""Algebra on pytrees of arrays: the vectors of every solver here.

Inner products are leafwise ``sum(a * b)``: unlike ``jnp.vdot`` they never reshape, so they keep any
sharding of the leaves.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from bilevax._core.types import PyTree


def accumulator(*leaves: Any) -> jnp.dtype:
    """The dtype that sums over these leaves are taken in: their own, and float32 for the half
    precisions.
    """
    return reduce(_wider, (jnp.result_type(u) for u in leaves), jnp.dtype(jnp.float32))


def _wider(a: Any, b: PyTree) -> jnp.dtype:
    """The dtype that holds both; numpy's rule, since jnp's refuses two dtypes under strict
    promotion.
    """
    return np.promote_types(a, b)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product ``sum_leaves sum(a * b)``, accumulated in float32 or wider."""

    def leaf(u, v):
        dtype = accumulator(u, v)
        return jnp.sum(u.astype(dtype) * v.astype(dtype))

    parts = [leaf(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    if not parts:
        return jnp.zeros(())
    dtype = reduce(_wider, (p.dtype for p in parts))
    total: jax.Array = sum(p.astype(dtype) for p in parts)
    return total


def norm(a: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, also where squares would leave the numbers of the dtype."""
    leaves = [
        jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf
        for leaf in jax.tree.leaves(a)
        if jnp.size(leaf)
    ]
    if not leaves:
        return jnp.sqrt(dot(a, a))
    dtype = accumulator(*leaves)
    largest = reduce(
        jnp.maximum, (jnp.max(jnp.abs(lax.stop_gradient(leaf))).astype(dtype) for leaf in leaves)
    )
    # A power of two, so that nothing is rounded; one wherever squares do no harm.
    reach = 2.0 ** (3 * int(jnp.finfo(dtype).maxexp) // 8)
    large, small, one = (jnp.asarray(a, dtype) for a in (reach, 1 / reach, 1.0))
    unit = lax.select(largest > large, small, lax.select(largest < small, large, one))
    scaled = jax.tree.map(lambda leaf: leaf.astype(dtype) * unit, leaves)
    return jnp.sqrt(dot(scaled, scaled)) / unit


def add(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise ``a + b``."""
    return jax.tree.map(jnp.add, a, b)


def sub(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise ``a - b``."""
    return jax.tree.map(jnp.subtract, a, b)


def neg(a: PyTree) -> PyTree:
    """Leafwise ``-a``."""
    return jax.tree.map(jnp.negative, a)


def scale(s: Any, a: PyTree) -> PyTree:
    """Leafwise ``s * a``, each leaf keeping its dtype."""

    def leaf(u):
        dtype = accumulator(u)
        return (jnp.asarray(s, dtype) * u.astype(dtype)).astype(
            u.dtype
        )  # a scalar from a wider leaf must not promote this one

    return jax.tree.map(leaf, a)


def unit(a: PyTree) -> PyTree:
    """``a / ‖a‖``; zero stays zero."""
    size = norm(a)
    return scale(1 / jnp.where(size == 0, jnp.ones_like(size), size), a)


def axpy(s: Any, a: PyTree, b: PyTree) -> PyTree:
    """Leafwise ``s * a + b``, each leaf keeping the dtype of ``b``."""

    def leaf(u, v):
        dtype = accumulator(u, v)
        return (jnp.asarray(s, dtype) * u.astype(dtype) + v.astype(dtype)).astype(v.dtype)

    return jax.tree.map(leaf, a, b)


def rows_dot(rows: PyTree, v: PyTree) -> jax.Array:
    """Inner products of `v` with each row of a stack of vectors (a leading axis on each leaf)."""
    return jax.vmap(dot, in_axes=(0, None))(rows, v)


def rows_sum(coefficients: jax.Array, rows: PyTree) -> PyTree:
    """``sum_i coefficients[i] rows[i]``, summed in float32 or wider."""

    def leaf(u):
        dtype = accumulator(u)
        c = coefficients.astype(dtype).reshape((-1,) + (1,) * (u.ndim - 1))
        return jnp.sum(c * u.astype(dtype), axis=0).astype(u.dtype)

    return jax.tree.map(leaf, rows)


def zeros_like(a: PyTree) -> PyTree:
    """Leafwise zeros."""
    return jax.tree.map(jnp.zeros_like, a)


def where(condition: Any, a: PyTree, b: PyTree) -> PyTree:
    """Leafwise ``a`` if ``condition`` (a scalar) else ``b``; PRNG keys included."""
    return jax.tree.map(lambda u, v: jnp.where(condition, u, v), a, b)


@jax.jit
def nan_where(condition: Any, a: PyTree) -> PyTree:
    """NaN in the floating-point leaves of ``a`` if ``condition`` (a scalar), else ``a``.

    One program, so that eager code that looks for NaN after each operation meets none where there
    is none.
    """
    return jax.tree.map(
        lambda u: jnp.where(condition, jnp.asarray(jnp.nan, u.dtype), u) if is_float(u) else u, a
    )


def normal_like(key: jax.Array, a: PyTree) -> PyTree:
    """A standard normal draw with the structure, shapes and dtypes of ``a``."""
    leaves, treedef = jax.tree.flatten(a)
    keys = jax.random.split(key, max(len(leaves), 1))
    return treedef.unflatten(
        [jax.random.normal(k, u.shape, u.dtype) for k, u in zip(keys, leaves, strict=False)]
    )


def size(a: PyTree) -> int:
    """Number of entries over all leaves."""
    return sum(int(np.prod(jnp.shape(u))) for u in jax.tree.leaves(a))


def is_float(leaf: Any) -> bool:
    """Whether a leaf is a real floating-point array or number: what gradients are taken with
    respect to.
    """
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def all_finite(a: PyTree) -> jax.Array:
    """True when every entry of every floating-point leaf is finite. One scalar, no transfer."""
    flags = [jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(a) if is_float(u)]
    return reduce(jnp.logical_and, flags, jnp.asarray(True))


def agreed(flag: jax.Array, like: jax.Array) -> jax.Array:
    """A flag that holds only where it holds on every device, over the named axes along which it
    differs by device and ``like`` does not.

    For batches of ``jax.shard_map`` with ``check_vma``, which are each device's own: what is
    concluded from them must not be. Where ``like`` differs too, devices go their own ways, and none
    may wait for another.
    """
    axes = _differing(flag) - _differing(like)
    return lax.pmin(flag.astype(jnp.int32), tuple(sorted(axes))) > 0 if axes else flag


def _differing(value: Any) -> frozenset[Any]:
    return frozenset(getattr(getattr(jax.typeof(value), "manual_axis_type", None), "varying", ()))


def partition(a: PyTree) -> tuple[PyTree, PyTree]:
    """Split into the floating-point leaves and the others, each with None in the other's places."""
    return jax.tree.map(lambda u: u if is_float(u) else None, a), jax.tree.map(
        lambda u: None if is_float(u) else u, a
    )


def combine(a: PyTree, b: PyTree) -> PyTree:
    """Undo `partition`."""
    return jax.tree.map(lambda u, v: v if u is None else u, a, b, is_leaf=lambda u: u is None)


def strong(a: PyTree) -> PyTree:
    """Arrays in place of Python and numpy numbers, weak types stripped, so that ``f(0.1)`` and a
    float32 share one trace.
    """

    def leaf(u):
        u = jnp.asarray(u)
        return (
            u
            if jnp.issubdtype(u.dtype, jax.dtypes.extended)
            else lax.convert_element_type(u, u.dtype)
        )

    return jax.tree.map(leaf, a)


def copy(a: PyTree) -> PyTree:
    """Fresh buffers with the same values and shardings: what is donated later must not be the
    caller's.
    """
    return jax.tree.map(jnp.copy, strong(a))


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "accumulator", "add", "agreed", "all_finite", "axpy", "combine", "copy", "dot", "is_float",
    "nan_where", "neg", "norm", "normal_like", "partition", "rows_dot", "rows_sum", "scale",
    "size", "strong", "sub", "unit", "where", "zeros_like",
]  # fmt: skip
